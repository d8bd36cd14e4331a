"""What the CPU layer costs: the share of an optimizer step that is spent in substituted functions.

    python benchmarks/cpu_layer.py                       # steel_tiny, one sample of 128 tokens: the worst case
    python benchmarks/cpu_layer.py --model steel_tiny --seq-length 512 --micro-batch-size 4

A step is timed as it is. Then the calls of substituted functions in one step are counted with Python's profiler, and
each kind of call is timed alone: a substituted function's whole time, or for tensor factories the difference to the
original. Share = sum(calls x time per call) / step time. The names megatron.core looks up cost what they cost in torch:
they stand in an ordinary module. Exits with 1 when the share is above --limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import timeit
from collections import Counter
from collections.abc import Callable, Sequence
from types import FrameType, FunctionType
from typing import Any

import numpy as np
import torch

from megatron_steel.config import load
from megatron_steel.runtime import cpu, host, world

# Time of a call that has no example below: a Python call with a little work, rounded up.
OTHER_SECONDS = 1e-6


def build_step(model: str, seq_length: int, micro_batch_size: int) -> Callable[[], object]:
    """One optimizer step of the product on random tokens."""
    from megatron_steel.data.batch import Batch
    from megatron_steel.model.build import build_model
    from megatron_steel.objective.language import NextToken
    from megatron_steel.optim.optimizer import build_optimizer
    from megatron_steel.train.step import train_step

    config = load.parse(
        ["--model", model, "--seq-length", str(seq_length), "--micro-batch-size", str(micro_batch_size)]
        + ["--use-distributed-optimizer"]
    )
    load.expand_model(config)
    here = world.start()
    vocab = config.size.vocab_size or 4096
    built = build_model(config, vocab, here)
    optimizer = build_optimizer(config, built)
    tokens = torch.randint(0, vocab, (micro_batch_size, seq_length + 1))
    batch = Batch(
        tokens_BS=tokens[:, :-1].contiguous(),
        labels_BS=tokens[:, 1:].contiguous(),
        loss_mask_BS=torch.ones(micro_batch_size, seq_length),
        position_ids_BS=torch.arange(seq_length).expand(micro_batch_size, -1).contiguous(),
        sources_B=np.zeros(micro_batch_size, dtype=np.int64),
        valid_tokens=micro_batch_size * seq_length,
    )

    def step() -> object:
        return train_step(built, optimizer, [batch], NextToken(), batch.valid_tokens, here, 1e-4, 0.1, 1.0, 1)

    return step


def count_calls(step: Callable[[], object]) -> Counter[str]:
    """Calls of each function of the layer in one step."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename == host.__file__:
            calls[frame.f_code.co_name] += 1

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


def seconds_per_call(function: Callable[[], object], number: int = 20_000) -> float:
    """Best of five repetitions."""
    return min(timeit.repeat(function, number=number, repeat=5)) / number


def in_megatron(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function as if megatron.core had defined it: the layer looks at its callers."""
    return FunctionType(function.__code__, {"__name__": "megatron.core.example"}, None, None, function.__closure__)


def time_calls() -> dict[str, float]:
    """Seconds that one call of each kind of function adds."""
    tensor, on_host, state = torch.zeros(4), host.on_host(torch.zeros), host.get_rng_state()
    plain = seconds_per_call(lambda: torch.zeros(4, device="cpu"))
    return {
        "build": max(0.0, seconds_per_call(lambda: on_host(4, device="cpu")) - plain),
        "names_cuda": 0.0,  # a part of build
        "current_device": seconds_per_call(host.current_device),
        "tensor_type": seconds_per_call(in_megatron(lambda: tensor.type())),
        "tensor_cuda": seconds_per_call(in_megatron(lambda: tensor.cuda())),
        "called_by_megatron": 0.0,  # a part of tensor_type and tensor_cuda
        "get_rng_state": seconds_per_call(host.get_rng_state),
        "set_rng_state": seconds_per_call(lambda: host.set_rng_state(state)),
        "nothing": seconds_per_call(host.nothing),
        "new_stream": seconds_per_call(host.new_stream),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="steel_tiny")
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=float, default=3.0, help="highest share in percent")
    options = parser.parse_args(argv)
    if not cpu.install():
        raise SystemExit("error: there is a GPU here, so there is no CPU layer to measure")
    step = build_step(options.model, options.seq_length, options.micro_batch_size)
    times = []
    for _ in range(options.steps + 3):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    step_seconds = statistics.median(times[3:])
    calls, cost = count_calls(step), time_calls()
    total = 0.0
    for name, count in calls.most_common():
        each = cost.get(name, OTHER_SECONDS)
        total += count * each
        print(f"{name:24} {count:6d} calls x {each * 1e6:6.2f} us = {count * each * 1e6:8.1f} us")
    share = 100 * total / step_seconds
    print(
        f"{options.model}, {options.micro_batch_size} x {options.seq_length} tokens, {torch.get_num_threads()} threads:"
    )
    print(
        f"step {step_seconds * 1e3:.2f} ms, in the layer {total * 1e3:.3f} ms = {share:.2f} % (limit {options.limit} %)"
    )
    return int(share > options.limit)


if __name__ == "__main__":
    raise SystemExit(main())
