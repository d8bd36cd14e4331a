"""Parameters, FLOPs, memory, time and cost of a run, from its options alone; runs on a login node without torch.

    python tools/plan.py --model steel_1b --seq-length 2048 --bf16 --gpus 8 --memory-gib 80 --tokens 1e12

Every option of a training run is taken as well, with the same meaning.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout this file belongs to

from megatron_steel.config.check import check, data_parallel_size, padded_vocab_size  # noqa: E402
from megatron_steel.config.load import parse, user_errors  # noqa: E402
from megatron_steel.config.rampup import batch_sizes  # noqa: E402
from megatron_steel.config.schema import Config  # noqa: E402
from megatron_steel.plan import estimate  # noqa: E402
from megatron_steel.plan.parameters import count_parameters  # noqa: E402

GIB = 2**30


def own_options() -> argparse.ArgumentParser:
    """The options a training run does not have."""
    parser = argparse.ArgumentParser(
        prog="tools/plan.py",
        description="Parameters, FLOPs, memory, time and cost of a run. Takes every option of a training run too "
        "(python -m megatron_steel.pretrain --help).",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, default=1, help="devices of the whole run")
    parser.add_argument("--memory-gib", type=float, default=80.0, help="memory of one device")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="peak of one device; H100 and H200: 989 bf16")
    parser.add_argument("--mfu", type=float, default=0.40, help="share of the peak that is reached, full attention")
    parser.add_argument("--tokens", type=float, default=None, help="tokens of the run; train_iters x batch when unset")
    parser.add_argument("--hour-price", type=float, default=None, help="price of one device for an hour")
    return parser


def table(config: Config, vocab: int, options: argparse.Namespace) -> list[tuple[str, str]]:
    """What is printed, as (name, value)."""
    model, training, gpus = config.size, config.training, options.gpus
    count = count_parameters(model, vocab)
    full, causal = (estimate.flops_per_token(model, training.seq_length, vocab, kind) for kind in ("full", "causal"))
    memory = estimate.memory_per_rank(config, vocab, gpus)
    largest = estimate.max_micro_batch(config, vocab, gpus, options.memory_gib * GIB)
    batch_tokens = (training.global_batch_size or 0) * training.seq_length
    samples = batch_sizes(training).consumed_after(training.train_iters)
    tokens = options.tokens or float(samples * training.seq_length)
    time = estimate.run_time(tokens, full, gpus, options.peak_tflops * 1e12, options.mfu)
    rows = [
        ("parameters", f"{count.total:,} (vocabulary padded to {vocab:,})"),
        *([("  active for a token", f"{count.active:,}")] if count.active < count.total else []),
        ("  embedding / output", f"{count.embedding:,} / {count.output:,}"),
        ("  each layer", f"{count.per_layer:,}"),
        ("  in matrix products", f"{count.matmul:,}"),
        ("FLOPs per token", f"{full / 1e9:.2f} GFLOP full attention, {causal / 1e9:.2f} causal"),
        ("layout", f"{gpus} devices, {data_parallel_size(config, gpus)} data-parallel replicas"),
        ("bytes on the fullest rank", f"{memory.total / GIB:.2f} GiB of {options.memory_gib:g}"),
    ]
    for name in ("weights", "gradients", "optimizer", "activations", "logits"):
        rows.append((f"  {name}", f"{getattr(memory, name) / GIB:.2f} GiB"))
    room = f"{largest} ({estimate.RESERVE:.0%} of the memory left free)" if largest else "none fits"
    rows += [
        ("largest micro-batch size", f"{room}; this run has {training.micro_batch_size}"),
        ("tokens per step", f"{batch_tokens:,}"),
        ("tokens of the run", f"{tokens:,.0f} = {tokens / count.total:.1f} per parameter"),
        ("tokens per second", f"{tokens / time.seconds:,.0f} = {tokens / time.seconds / gpus:,.0f} per device"),
        ("time", f"{time.seconds / 3600:,.1f} hours at {options.mfu:.0%} of {options.peak_tflops:g} TFLOP/s"),
        ("device hours", f"{time.device_hours:,.0f}"),
    ]
    if options.hour_price is not None:
        rows.append(("cost", f"{time.device_hours * options.hour_price:,.0f} at {options.hour_price:g} an hour"))
    return rows


def main(argv: Sequence[str]) -> None:
    """Print the table for a command line; user errors end with one line and exit code 2."""
    options, rest = own_options().parse_known_args(argv)
    with user_errors():
        for name in ("gpus", "memory_gib", "peak_tflops", "mfu", "tokens"):
            value = getattr(options, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be greater than 0, not {value:g}")
        config = parse(rest, "tools/plan.py")
        size, tensor = config.size, config.parallel.tensor_model_parallel_size
        warnings = check(config, options.gpus)
        if size.vocab_size is None:
            raise ValueError("--vocab-size is needed here: this model takes it from the tokenizer, which is not read")
        vocab = padded_vocab_size(size.vocab_size, size.make_vocab_size_divisible_by, tensor)
        rows = table(config, vocab, options)
    for line in warnings:
        print(f"note: {line}")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main(sys.argv[1:])
