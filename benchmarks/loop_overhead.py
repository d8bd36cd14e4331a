"""What our training loop costs over bare megatron-core calls, on a CPU; and weak scaling of whole steps.

    python benchmarks/loop_overhead.py --pairs 30
    torchrun --nproc-per-node 2 benchmarks/loop_overhead.py --pairs 30

Two steps on the same model, optimizer and number of tokens, in turns: ours reads the ledger, counts tokens, takes the
step, and keeps losses by source and metrics; the bare one zeroes gradients, runs megatron-core's schedule on batches
that are there already, and calls its optimizer. A pair is timed in both orders by turns; what is reported is the median
ratio of the pairs, in wall time and in CPU time of the process, which other work on the machine disturbs less. For weak
scaling compare the step time of one rank and of two, each with one core of its own and the same work.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_steel.config.load import from_flat
from megatron_steel.data.batch import Batch
from megatron_steel.data.indexed import IndexedWriter
from megatron_steel.runtime import cpu
from megatron_steel.runtime import world as runtime
from megatron_steel.runtime.signals import StopRequest

VOCABULARY = 8192
SIZES: dict[str, Any] = {
    "model_family": "qwen2", "add_qkv_bias": True, "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 768,
    "num_attention_heads": 8, "num_query_groups": 4, "max_position_embeddings": 256, "seq_length": 256,
    "micro_batch_size": 2, "tokenizer_type": "NullTokenizer", "vocab_size": VOCABULARY - 1, "train_iters": 100_000,
}  # fmt: skip
WARM_UP = 3


def write_tokens(folder: str) -> str:
    """Random documents; returns the prefix."""
    rng, prefix = np.random.default_rng(0), str(Path(folder) / "set")
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(400):
            writer.add_document([*rng.integers(0, VOCABULARY - 1, 1000).tolist(), VOCABULARY - 1])
        writer.commit()
    return prefix


def bare_step(session: Any, batches: Sequence[Batch]) -> None:
    """One step with nothing around megatron-core."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model, tokens = session.model, sum(batch.valid_tokens for batch in batches) * session.world.data_size

    def loss(losses_BS: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = (losses_BS.float() * batch.loss_mask_BS).sum()
        return total / tokens, torch.zeros((), dtype=torch.int), {"loss": total.detach()}

    def forward(iterator: Iterator[Batch], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)
        losses = chunk(batch.tokens_BS, batch.position_ids_BS, None, labels=batch.labels_BS)
        return losses, partial(loss, batch=batch)

    model.chunks[0].zero_grad_buffer()
    session.optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=model.chunks[0],
        num_microbatches=len(batches),
        seq_length=batches[0].tokens_BS.shape[1],
        micro_batch_size=len(batches[0].tokens_BS),
        forward_only=False,
    )
    session.optimizer.step()


def timed(step: Callable[[], None], here: runtime.World) -> tuple[float, float]:
    """(wall seconds, CPU seconds of this process) of one step that all ranks begin together."""
    runtime.barrier(here)
    wall, busy = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - busy


def measure(session: Any, pairs: int) -> str:
    """One line of medians."""
    from megatron_steel.train.loop import take_step

    batches = session.loader.step(0)
    ours, bare = partial(take_step, session), partial(bare_step, session, batches)
    rows = []
    for number in range(-WARM_UP, pairs):
        if number % 2:
            theirs, mine = timed(bare, session.world), timed(ours, session.world)
        else:
            mine, theirs = timed(ours, session.world), timed(bare, session.world)
        if number >= 0:
            rows.append((*mine, *theirs))
    wall, busy, bare_wall, bare_busy = (statistics.median(column) for column in zip(*rows, strict=True))
    ratios = [statistics.median(row[i] / row[i + 2] for row in rows) for i in (0, 1)]
    return (
        f"{session.world.size} ranks, {pairs} pairs, load {os.getloadavg()[0]:.1f}: step {wall * 1e3:.1f} ms "
        f"(CPU {busy * 1e3:.1f}), bare {bare_wall * 1e3:.1f} ms (CPU {bare_busy * 1e3:.1f}), "
        f"overhead {ratios[0] - 1:+.2%} (CPU {ratios[1] - 1:+.2%})"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Overhead of the training loop over bare megatron-core calls")
    parser.add_argument("--pairs", type=int, default=30, help="timed pairs of steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cpu.install()
    from megatron_steel.train.prepare import prepare
    from megatron_steel.train.run import build_session

    with tempfile.TemporaryDirectory() as folder:
        config = from_flat({**SIZES, "train_data_path": [write_tokens(folder)], "max_epochs_per_source": 1e9})
        prepared = prepare(config)
        here = runtime.start()
        torch.set_num_threads(1)
        session = build_session(prepared, here, StopRequest(), time.monotonic())
        with session.loader:
            line = measure(session, options.pairs)
        if here.rank == 0:
            print(line, flush=True)
        runtime.stop(here, failed=False)


if __name__ == "__main__":
    main()
