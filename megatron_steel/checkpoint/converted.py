"""Publishing a checkpoint of weights alone that was made of something else: an import, a larger vocabulary."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_steel.checkpoint import files
from megatron_steel.checkpoint.hf_folder import remove_empty
from megatron_steel.checkpoint.state import STATE_FILE, TOKENIZER_FOLDER, TrainState
from megatron_steel.config.load import to_flat
from megatron_steel.config.schema import Config
from megatron_steel.text.tokenizer import Tokenizer

GENERATION_FILE = "generation_config.json"


def check_new_root(root: Path) -> None:
    """``ValueError`` when a directory already holds checkpoints, so that an import never takes a run's place."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"--save {root}: exists and is not a directory; give a new name")
    if root.is_dir() and files.published(root):
        raise ValueError(f"--save {root}: already holds checkpoints; give a new name")


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What identifies a tokenizer in checkpoints and sidecars."""
    return {"type": tokenizer.name, "fingerprint": tokenizer.fingerprint(), "vocab_size": tokenizer.vocab_size}


def publish_weights(
    root: Path, config: Config, write: Callable[[Path], None], tokenizer: Tokenizer | None, generation: Path | None
) -> Path:
    """Publish a checkpoint without optimizer state as iteration 0 of a new root; returns its directory.

    ``write`` writes the tensors into the directory it is given; ``generation`` is a ``generation_config.json`` to take
    along if it is there. Nothing is left of a checkpoint that fails. Raises ``ValueError`` when the root is in use, or
    when the tokenizer has more ids than the model has rows.
    """
    check_new_root(root)
    rows = config.size.vocab_size
    assert rows is not None
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the embedding only {rows} rows; resize the embedding or "
            f"remove the added tokens"
        )
    state = TrainState(config=to_flat(config), vocab_size=rows, has_optimizer=False)
    temporary = files.temporary_directory(root, 0)
    made = [path for path in (root.absolute(), *root.absolute().parents) if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(root)
        temporary.mkdir()
        write(temporary)
        if tokenizer is not None:
            tokenizer.save(temporary / TOKENIZER_FOLDER)
            state.tokenizer = tokenizer_facts(tokenizer)
        if generation is not None and generation.is_file():
            shutil.copyfile(generation, temporary / GENERATION_FILE)
        files.write_json(temporary / STATE_FILE, state.to_json())
        return files.publish(root, 0, files.describe_files(temporary, files.list_files(temporary)))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        remove_empty(made)
        raise
