"""Publishing a checkpoint of weights alone that was made of something else: an import, a larger vocabulary."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_steel.checkpoint import files
from megatron_steel.checkpoint.dcp_write import Chunk, write_chunks
from megatron_steel.checkpoint.hf_folder import remove_empty
from megatron_steel.checkpoint.hf_map import Piece, our_shape
from megatron_steel.checkpoint.state import STATE_FILE, TOKENIZER_FOLDER, TrainState
from megatron_steel.config.load import to_flat
from megatron_steel.config.schema import Config
from megatron_steel.data.progress import ByteProgress
from megatron_steel.data.workers import Aside
from megatron_steel.text.tokenizer import Tokenizer

GENERATION_FILE = "generation_config.json"
# Each has a tensor in memory, and they hash what they write: one per core, but not many.
THREADS = min(8, os.cpu_count() or 1)


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, lines in a log; the function it gives takes the bytes that were done since."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield ByteProgress(label, total).add
        return
    with tqdm(total=total, desc=label, unit="B", unit_scale=True) as bar:
        yield bar.update


def piece_chunk(piece: Piece, padded_vocab: int, dtype: torch.dtype, read: Callable[[], Tensor]) -> Chunk:
    """The chunk of a checkpoint that a piece is; ``read`` gives our tensor in any precision."""
    shape = our_shape(piece, padded_vocab)
    kind = torch.float32 if piece.fp32 else dtype
    ones, zeros = (1,) * len(piece.index), (0,) * len(shape)
    return Chunk(piece.key, (*piece.of, *shape), (*piece.index, *zeros), (*ones, *shape), kind, lambda: read().to(kind))


def check_new_root(root: Path) -> None:
    """``ValueError`` when a directory already holds checkpoints, so that an import never takes a run's place."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"--save {root}: exists and is not a directory; give a new name")
    if root.is_dir() and files.published(root):
        raise ValueError(f"--save {root}: already holds checkpoints; give a new name")


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What identifies a tokenizer in checkpoints and sidecars."""
    return {"type": tokenizer.name, "fingerprint": tokenizer.fingerprint(), "vocab_size": tokenizer.vocab_size}


def save_tokenizer(load: Callable[[], Tokenizer | None], directory: Path, rows: int) -> dict[str, Any]:
    """Write a tokenizer; returns what identifies it, nothing where there is none.

    Raises ``ValueError`` when it has more ids than the model has ``rows``.
    """
    tokenizer = load()
    if tokenizer is None:
        return {}
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the embedding only {rows} rows; resize the embedding or "
            f"remove the added tokens"
        )
    tokenizer.save(directory)
    return tokenizer_facts(tokenizer)


def publish_weights(
    root: Path,
    config: Config,
    chunks: Sequence[Chunk],
    tokenizer: Callable[[], Tokenizer | None],
    generation: Path | None,
) -> Path:
    """Publish a checkpoint without optimizer state as iteration 0 of a new root; returns its directory.

    ``chunks`` are its tensors, each read when its turn has come; ``tokenizer`` loads the tokenizer, in a process beside
    the writing of the tensors, since a large one takes two seconds; ``generation`` is a ``generation_config.json`` to
    take along if it is there. Nothing is left of a checkpoint that fails. Raises ``ValueError`` when the root is in
    use, or when the tokenizer has more ids than the model has rows.
    """
    check_new_root(root)
    rows = config.size.vocab_size
    assert rows is not None
    state = TrainState(config=to_flat(config), vocab_size=rows, has_optimizer=False)
    temporary = files.temporary_directory(root, 0)
    made = [path for path in (root.absolute(), *root.absolute().parents) if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(root)
        temporary.mkdir()
        with Aside(partial(save_tokenizer, tokenizer, temporary / TOKENIZER_FOLDER, rows)) as saved:
            with progress(sum(chunk.nbytes for chunk in chunks), "import") as advance:
                facts = write_chunks(temporary, chunks, THREADS, advance)
            state.tokenizer = saved.result
        if generation is not None and generation.is_file():
            shutil.copyfile(generation, temporary / GENERATION_FILE)
        files.write_json(temporary / STATE_FILE, state.to_json())
        others = [path for path in files.list_files(temporary) if str(path.relative_to(temporary)) not in facts]
        facts |= files.describe_files(temporary, others)
        return files.publish(root, 0, dict(sorted(facts.items())))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        remove_empty(made)
        raise
