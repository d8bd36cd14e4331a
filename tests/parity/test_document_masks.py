"""Packed documents against transformers with explicit position ids and a block-diagonal mask: the same logits."""

from __future__ import annotations

from pathlib import Path

import hf_models
import numpy as np
import pytest
import torch
from hf_models import make_model
from pool import WorkerPool
from torch import Tensor

from megatron_steel.data.batch import Batch
from megatron_steel.data.document_batches import BatchBuilder
from megatron_steel.runtime import world as runtime

NAMES = ("llama-rope", "llama-yarn", "qwen2-tied", "qwen3", "mistral", "olmo2", "gemma2", "gemma3")
EOD = 2
TOLERANCE = 1e-5
FLAGS: dict[str, dict[str, bool]] = {
    "mask and positions": {"reset_attention_mask": True, "reset_position_ids": True},
    "mask": {"reset_attention_mask": True},
    "positions": {"reset_position_ids": True},
}


def rows(vocab_size: int) -> np.ndarray:
    """Two rows of 40 tokens and the next one: documents of 1 to 17 tokens, the last of each row unfinished."""
    ids = torch.randint(3, vocab_size, (2, 41), generator=torch.Generator().manual_seed(3)).numpy()
    ids[0, [4, 5, 22]] = ids[1, [16, 30, 38]] = EOD
    return ids


def build_batch(ids: np.ndarray, flags: dict[str, bool]) -> Batch:
    builder = BatchBuilder(
        seq_length=40, tensor_group=None, reads_data=True, device=torch.device("cpu"), eod_id=EOD, **flags
    )
    host = builder.read(lambda _, row: ids[row], (1, 2))
    return builder.build(host, np.zeros((1, 2), np.int64), np.ones((1, 2), dtype=bool))[0]


@torch.no_grad()
def logits_of_transformers(name: str, flags: dict[str, bool]) -> Tensor:
    """[2, 40, V] in fp32, from a mask and positions written down here, token by token."""
    model = make_model(name, attn_implementation="eager")
    tokens_BS = torch.from_numpy(rows(model.config.vocab_size)[:, :-1])
    allowed = torch.zeros(2, 1, 40, 40, dtype=torch.bool)
    positions_BS = torch.zeros(2, 40, dtype=torch.int64)
    for row in range(2):
        begin = 0
        for query in range(40):
            if query and tokens_BS[row, query - 1] == EOD:
                begin = query
            allowed[row, 0, query, begin if flags.get("reset_attention_mask") else 0 : query + 1] = True
            positions_BS[row, query] = query - begin if flags.get("reset_position_ids") else query
    near = torch.ones(40, 40, dtype=torch.bool).triu(1 - (getattr(model.config, "sliding_window", None) or 40))
    lowest = torch.finfo(torch.float32).min
    full, sliding = (torch.zeros(seen.shape).masked_fill(~seen, lowest) for seen in (allowed, allowed & near))
    by_kind = {"full_attention": full, "sliding_attention": sliding}
    mask = by_kind if name.startswith("gemma") else full
    return model(tokens_BS, attention_mask=mask, position_ids=positions_BS).logits


@torch.no_grad()
def work_logits(checkpoints: dict[str, str], flags: dict[str, bool], other: bool = False) -> dict[str, np.ndarray]:
    """What our engine computes for the same rows, packed into one; with an ``other`` first document when asked to."""
    from megatron_steel.checkpoint.verify import load_for_inference
    from megatron_steel.objective.language import packed_documents

    world = runtime.start()
    found = {}
    for name, checkpoint in checkpoints.items():
        model, _ = load_for_inference(Path(checkpoint), world, bf16=False)
        ids = rows(model.vocab_size)
        if other:
            ids[0, :4] = ids[0, :4][::-1] - 1 + 2 * (ids[0, :4][::-1] <= EOD + 1)
        batch = build_batch(ids, flags)
        inputs = (batch.tokens_BS.reshape(1, -1), batch.position_ids_BS.reshape(1, -1), None)
        logits = model.language_models()[0](*inputs, packed_seq_params=packed_documents(batch))
        found[name] = logits[..., : model.vocab_size].reshape(2, 40, -1).numpy()
    return found


@pytest.fixture(scope="module")
def checkpoints(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        make_model(name).save_pretrained(folder / name)
    roots = {name: (str(folder / name), str(folder / f"{name}-ours")) for name in NAMES}
    return pool.run(1, hf_models.work_import, roots, join=False)[0]


@pytest.mark.parametrize("case", FLAGS)
def test_packed_documents_are_those_of_transformers(pool: WorkerPool, checkpoints: dict[str, str], case: str) -> None:
    ours = pool.run(1, work_logits, checkpoints, FLAGS[case], join=False)[0]
    for name in NAMES:
        theirs = logits_of_transformers(name, FLAGS[case]).numpy()
        plain = logits_of_transformers(name, {}).numpy()
        difference = np.abs(ours[name] - theirs).max()
        print(f"{case}, {name}: {difference:.1e}, without the flags {np.abs(plain - theirs).max():.1e}")
        assert np.abs(plain - theirs).max() > 1000 * TOLERANCE
        assert difference < TOLERANCE


def test_another_first_document_changes_no_bit_of_the_others(pool: WorkerPool, checkpoints: dict[str, str]) -> None:
    flags = FLAGS["mask and positions"]
    before, after = (pool.run(1, work_logits, checkpoints, flags, other, join=False)[0] for other in (False, True))
    for name in NAMES:
        assert np.abs(before[name][0, :4] - after[name][0, :4]).max() > 0.01
        assert np.array_equal(before[name][0, 5:], after[name][0, 5:]) and np.array_equal(
            before[name][1], after[name][1]
        )
