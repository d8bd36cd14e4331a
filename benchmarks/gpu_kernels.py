"""Time of each Triton kernel against PyTorch's composition of the same, and Liger's where it is installed. Needs a GPU.

    python benchmarks/gpu_kernels.py --json benchmarks/records/gpu_kernels.json

Each row is forward and backward of one function in bf16: median milliseconds of CUDA events over --repeats runs, after
a warm-up and with the second-level cache overwritten before each. GB/s counts what the function has to move at least:
every input, output and gradient once. The share is that of a copy measured in the same process, the most that memory
does. Prints a Markdown table. Default sizes are a 1B model's: 16,384 tokens, H 2048, F 8192, 32 query and 8 key heads
of 64, vocabulary 151,936; about two minutes, less than 30 GiB.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Function = Callable[[], Any]


class Case:
    """A function in several forms over the same inputs."""

    def __init__(self, name: str, moved: int, forms: dict[str, Function]) -> None:
        """``moved``: bytes that forward and backward have to read and write; ``forms``: each does both passes once."""
        self.name, self.moved, self.forms = name, moved, forms


def both_passes(function: Callable[..., Any], *inputs: Any) -> Function:
    """One forward and one backward pass with gradients of all ones, made once."""
    import torch

    grads: list[Any] = []

    def run() -> None:
        results = function(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        if not grads:
            grads.extend(torch.ones_like(result) for result in results)
        torch.autograd.grad(results, [x for x in inputs if x.requires_grad], grads)

    return run


def norm_case(args: argparse.Namespace) -> Case:
    """RMSNorm: reads x; reads x and dy and writes dx."""
    import torch.nn.functional as F

    from megatron_steel.model.norms import rms_norm

    x, weight = made(args.tokens, args.hidden_size), made(args.hidden_size)
    forms = {
        "ours": both_passes(lambda x, w: rms_norm(x, w, 1e-6), x, weight),
        "torch": both_passes(lambda x, w: F.rms_norm(x, (args.hidden_size,), w, 1e-6), x, weight),
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        forms["liger"] = both_passes(
            lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False), x, weight
        )
    return Case("RMSNorm", 5 * 2 * x.numel(), forms)


def swiglu_case(args: argparse.Namespace) -> Case:
    """SwiGLU: reads 2 F and writes F; reads 3 F and writes 2 F."""
    import torch.nn.functional as F

    from megatron_steel.model.mlp import swiglu

    x = made(args.tokens, 2 * args.ffn_hidden_size)

    def plain(x: Any) -> Any:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    forms = {"ours": both_passes(swiglu, x), "torch": both_passes(plain, x)}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        # It takes two tensors; halves of one it copies.
        halves = [half.detach().contiguous().requires_grad_() for half in x.chunk(2, -1)]
        forms["liger"] = both_passes(lambda gate, up: LigerSiLUMulFunction.apply(gate, up), *halves)
    return Case("SwiGLU", 8 * 2 * args.tokens * args.ffn_hidden_size, forms)


def rotate_case(args: argparse.Namespace) -> Case:
    """Split and rotation: reads and writes the projection once in each pass."""
    import torch

    from megatron_steel.model.attention import SplitAndRotate, split_and_rotate

    groups, width = args.key_heads, args.head_width
    mixed = made(args.seq_length, args.tokens // args.seq_length, (args.query_heads + 2 * groups) * width)
    angles = torch.randn(args.seq_length, 1, 1, 1, width // 2, device=mixed.device)
    cos, sin = torch.cat([angles, angles], -1).cos().bfloat16(), angles.sin().bfloat16()
    forms = {
        "ours": both_passes(lambda x: split_and_rotate(x, cos, sin, groups, width), mixed),
        "torch": both_passes(lambda x: SplitAndRotate.apply(x, cos, sin, groups, width), mixed),
    }
    return Case("split and rotate", 4 * 2 * mixed.numel(), forms)


def loss_case(args: argparse.Namespace) -> Case:
    """Cross-entropy: reads the logits; reads them and writes their gradient. Form "ours" destroys its logits."""
    import torch
    import torch.nn.functional as F

    from megatron_steel.model.cross_entropy import VocabParallelCrossEntropy, cross_entropy

    logits = made(args.tokens, args.vocab_size)
    labels = torch.randint(args.vocab_size, (args.tokens,), device=logits.device)
    forms = {
        "ours": both_passes(lambda x: cross_entropy(x, labels, args.vocab_size, None), logits),
        "torch": both_passes(lambda x: VocabParallelCrossEntropy.apply(x, labels, args.vocab_size, None), logits),
        "torch F.cross_entropy": both_passes(lambda x: F.cross_entropy(x, labels, reduction="none"), logits),
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_cross_entropy

        forms["liger"] = both_passes(lambda x: liger_cross_entropy(x, labels), logits)
    return Case("cross-entropy", 3 * 2 * logits.numel(), forms)


CASES = {"rms_norm": norm_case, "swiglu": swiglu_case, "rotate": rotate_case, "cross_entropy": loss_case}


def made(*shape: int) -> Any:
    """Random bf16 on the GPU that wants a gradient."""
    import torch

    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def milliseconds(run: Function, repeats: int, flush: Any) -> float:
    """Median over runs, each after the cache was overwritten."""
    import torch

    times = []
    for number in range(repeats + 3):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_speed(repeats: int, flush: Any) -> float:
    """GB/s of a copy of 1 GiB, read and written."""
    import torch

    source, target = (torch.empty(2**30, dtype=torch.int8, device="cuda") for _ in range(2))
    return 2 * 2**30 / milliseconds(lambda: target.copy_(source), repeats, flush) / 1e6


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rows, and what they were measured on."""
    import torch

    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    bandwidth = copy_speed(args.repeats, flush)
    rows = []
    for name in args.only or CASES:
        case = CASES[name](args)
        for form, run in case.forms.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            time_ms = milliseconds(run, args.repeats, flush)
            peak = torch.cuda.max_memory_allocated() - before
            speed = case.moved / time_ms / 1e6
            row = {"function": case.name, "form": form, "ms": time_ms, "gb_per_s": speed, "share": speed / bandwidth}
            rows.append({**row, "peak_mib": peak / 2**20})
        del case, run
        torch.cuda.empty_cache()
    where = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gb_per_s": bandwidth}
    return {**where, "date": time.strftime("%Y-%m-%d"), "options": vars(args), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    lines = [
        f"{result['device']}, torch {result['torch']}, a copy moves {result['copy_gb_per_s']:.0f} GB/s",
        "",
        "| Function | Form | ms | GB/s | of a copy | MiB on top |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['function']} | {row['form']} | {row['ms']:.3f} | {row['gb_per_s']:.0f} | {row['share']:.2f} "
            f"| {row['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--ffn-hidden-size", type=int, default=8192)
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=CASES, help="these functions alone")
    parser.add_argument("--json", help="write everything here")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        parser.error("this measures kernels on a GPU, and PyTorch finds none")
    result = measure(args)
    print(table(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
