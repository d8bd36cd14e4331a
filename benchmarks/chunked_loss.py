"""Time and memory of the output layer with its loss: all logits at once against a few tokens at a time.

    python benchmarks/chunked_loss.py --tokens 512 1024 2048

Each row is a process of its own: forward and backward of the output layer alone, on the CPU, in fp32. Memory is the
peak of the process above what it had before the first pass.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def measure(tokens: int, vocabulary: int, hidden: int, chunk: int, repeats: int) -> dict[str, float]:
    """Fastest seconds of a pass and MiB above the start, in this process."""
    import torch

    from megatron_steel.runtime import cpu

    cpu.install()
    from megatron_steel.model.cross_entropy import cross_entropy
    from megatron_steel.model.output import ChunkedCrossEntropy

    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    # In place: a temporary would count as memory that was there before.
    weight = torch.randn(vocabulary, hidden, generator=generator).mul_(0.02).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        states.grad = weight.grad = None
        begin = time.perf_counter()
        if chunk:
            losses = ChunkedCrossEntropy.apply(states, weight, labels, chunk, vocabulary, None, None)
        else:
            losses = cross_entropy(states @ weight.t(), labels, vocabulary, None)
        torch.autograd.backward(losses, torch.full_like(losses, 1.0 / tokens))
        seconds.append(time.perf_counter() - begin)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": min(seconds), "mib": (after - before) / 1024}


def main() -> None:
    """Print one row for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--cross-entropy-chunk-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", nargs=2, type=int, metavar=("TOKENS", "CHUNK"), help="measure here and print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], args.vocab_size, args.hidden_size, args.one[1], args.repeats)))
        return
    print("tokens  all logits: s, MiB    in parts: s, MiB")
    root = Path(__file__).resolve().parent.parent
    for tokens in args.tokens:
        rows = []
        for chunk in (0, args.cross_entropy_chunk_size):
            command = [sys.executable, "-m", "benchmarks.chunked_loss", "--one", str(tokens), str(chunk)]
            command += ["--vocab-size", str(args.vocab_size), "--hidden-size", str(args.hidden_size)]
            command += ["--repeats", str(args.repeats)]
            rows.append(json.loads(subprocess.run(command, cwd=root, check=True, capture_output=True).stdout))
        print(f"{tokens:6}  " + "    ".join(f"{row['seconds']:8.2f} {row['mib']:8.0f}" for row in rows), flush=True)


if __name__ == "__main__":
    main()
