"""One measurement of ``gpu_train.py``, in a process of its own: a model, a backend, a precision, a micro-batch size.

Prints one JSON object as its last line. Memory that did not suffice is a result too: ``{"error": ...}``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_steel.config.check import padded_vocab_size
from megatron_steel.config.load import from_flat
from megatron_steel.config.presets import PRESETS
from megatron_steel.config.schema import Config
from megatron_steel.data.indexed import IndexedWriter
from megatron_steel.plan.estimate import flops_per_token
from megatron_steel.runtime import cpu, device, environment
from megatron_steel.runtime import world as runtime
from megatron_steel.runtime.signals import StopRequest

MODELS: dict[str, dict[str, Any]] = {
    "steel_1b": PRESETS["steel_1b"],
    "llama3.2_1b": PRESETS["llama3.2_1b"],
    # OLMo-core's 1B of its speed table: 18 layers, 1.13e9 parameters in matrix products.
    "olmo2_1b": {
        "model_family": "olmo2", "num_layers": 18, "hidden_size": 2048, "ffn_hidden_size": 5632,
        "num_attention_heads": 16, "norm_placement": "post", "qk_layernorm_full": True, "norm_epsilon": 1e-6,
        "rotary_base": 5e5, "untie_embeddings_and_output_weights": True, "vocab_size": 100352,
        "max_position_embeddings": 4096,
    },
    "llama3_8b": PRESETS["llama3_8b"],
    "smoke": {
        "model_family": "llama", "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4,
        "num_query_groups": 2, "vocab_size": 512, "max_position_embeddings": 64,
    },
}  # fmt: skip
# Switched off one at a time: modules whose Triton kernels go back to PyTorch's functions.
KERNELS = {
    "rms_norm": ("norms",),
    "swiglu": ("mlp",),
    "rotate": ("attention",),
    "cross_entropy": ("cross_entropy", "output"),
    "kernels": ("norms", "mlp", "attention", "cross_entropy", "output"),
}
DOCUMENT = 1000


def flat_options(case: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Options of a run that a user could give; one micro-batch size, the same tokens in every step."""
    size = MODELS[case["model"]]
    flags = {
        "train_data_path": [prefix],
        "tokenizer_type": "NullTokenizer",
        "seq_length": case["seq_length"],
        "micro_batch_size": case["micro_batch"],
        "global_batch_size": case["samples"],
        "train_iters": 1000,
        "max_epochs_per_source": 1e9,
        "transformer_impl": case["backend"],
        "bf16": case["bf16"],
        "manual_gc": True,
        "manual_gc_interval": 100,
        **case.get("flags", {}),
    }
    # The tokenizer counts one more: the end of a document.
    return {**size, **flags, "vocab_size": size["vocab_size"] - 1}


def write_tokens(folder: str, vocabulary: int, tokens: int) -> str:
    """Random documents; returns the prefix."""
    rng, prefix = np.random.default_rng(0), str(Path(folder) / "set")
    with IndexedWriter(prefix, np.dtype(np.int32)) as writer:
        for _ in range(tokens // DOCUMENT + 1):
            writer.add_document([*rng.integers(0, vocabulary - 1, DOCUMENT).tolist(), vocabulary - 1])
        writer.commit()
    return prefix


def matmul_rate(seconds: float) -> float:
    """FLOP/s of square products of bf16 (fp32 on a CPU) over about ``seconds``: the most this device does right now."""
    size, kind = (8192, torch.bfloat16) if device.has_gpu() else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device.device()).to(kind) for _ in range(2))
    out, products, begun = torch.mm(a, b), 0, 0.0
    device.synchronize()
    begun = time.perf_counter()
    while (passed := time.perf_counter() - begun) < seconds:
        for _ in range(10):
            torch.mm(a, b, out=out)
        device.synchronize()
        products += 10
    return 2.0 * size**3 * products / passed


def sensors() -> dict[str, float]:
    """Watts and MHz of the GPU right now, as nvidia-smi says; nothing where it is not."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=power.draw,clocks.sm", "--format=csv,noheader,nounits", "--id=0"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=20)
    # A value that a machine does not tell is "[N/A]".
    values = zip(("watts", "sm_mhz"), found.stdout.strip().split(","), strict=False)
    return {name: float(value) for name, value in values if value.strip().replace(".", "").isdigit()}


@contextlib.contextmanager
def without(part: str | None) -> Iterator[None]:
    """A part of the ``torch`` backend taken out, as the ablation asks: PyTorch's own functions do its work."""
    with contextlib.ExitStack() as stack:
        if part in KERNELS:
            from importlib import import_module

            for name in KERNELS[part]:
                module = import_module(f"megatron_steel.model.{name}")
                assert callable(module.takes_kernel), name
                module.takes_kernel = lambda tensor: False  # type: ignore[attr-defined]
        elif part == "flash attention":
            from torch.nn.attention import SDPBackend, sdpa_kernel

            stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        elif part == "fused AdamW":
            import megatron_steel.train.step as step

            fused = step.set_rates

            def set_rates(optimizer: Any, lr: float, decay: float) -> None:
                fused(optimizer, lr, decay)
                for group in optimizer.param_groups:
                    group["fused"], group["foreach"] = False, True

            update = torch.optim.AdamW.step

            def unfused(optimizer: torch.optim.AdamW, closure: Any = None) -> Any:
                # Only the fused kernel reads whether to skip; the others assert that nobody asks for it.
                optimizer.found_inf = None  # type: ignore[attr-defined]
                return update(optimizer, closure)

            step.set_rates, torch.optim.AdamW.step = set_rates, unfused  # type: ignore[method-assign]
        else:
            assert part is None, part
        yield


def timed_blocks(step: Callable[[], None], case: dict[str, Any]) -> list[float]:
    """Seconds of a step in each block of steps; nobody waits for the device inside a block."""
    blocks = []
    for _ in range(case["blocks"]):
        device.synchronize()
        begun = time.perf_counter()
        for _ in range(case["steps"]):
            step()
        device.synchronize()
        blocks.append((time.perf_counter() - begun) / case["steps"])
    return blocks


def measure(config: Config, case: dict[str, Any], first_loss: Callable[[], float], step: Callable[[], None]) -> Any:
    """Speeds around a step; ``first_loss`` takes the first one."""
    before = matmul_rate(case["matmul_seconds"])
    loss = first_loss()
    for _ in range(case["warmup"]):
        step()
    blocks = timed_blocks(step, case)
    read = sensors()
    after = matmul_rate(case["matmul_seconds"])
    tokens, seconds = case["samples"] * case["seq_length"], statistics.median(blocks)
    padded = padded_vocab_size(MODELS[case["model"]]["vocab_size"], config.size.make_vocab_size_divisible_by, 1)
    flops = flops_per_token(config.size, case["seq_length"], padded)
    rate, sheet = tokens / seconds, device.peak_flops(torch.bfloat16)[0]
    ceiling = max(before, after)
    return {
        "loss": loss, "vocabulary": MODELS[case["model"]]["vocab_size"],
        "tokens_per_s": rate, "step_ms": seconds * 1e3, "block_ms": [block * 1e3 for block in blocks],
        "gflop_per_token": flops / 1e9, "tflops": rate * flops / 1e12, "mfu": rate * flops / sheet,
        "share_of_matmul": rate * flops / ceiling, "matmul_tflops": [before / 1e12, after / 1e12],
        **read, "peak_gb": device.peak_memory_bytes() / 1e9,
    }  # fmt: skip


def our_leg(case: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The product's own session: ledger, loader, step, metrics."""
    from megatron_steel.train.loop import mean_losses, take_step
    from megatron_steel.train.prepare import prepare
    from megatron_steel.train.run import build_session

    config = from_flat(flat_options(case, prefix))
    prepared = prepare(config)
    environment.prepare(single_queue=False)
    here = runtime.start()
    session = build_session(prepared, here, StopRequest(), time.monotonic())

    def first_loss() -> float:
        take_step(session)
        return float(mean_losses(session)["loss"])

    with session.loader, without(case.get("without")):
        row = measure(config, case, first_loss, lambda: take_step(session))
    return row | {"backend": session.model.backend}


def plain_leg(case: dict[str, Any], prefix: str) -> dict[str, Any]:
    """What ``pip install megatron-core`` gives: its model of its local layers, its DDP, its optimizer over AdamW."""
    from plain_megatron import PlainTraining

    config = from_flat(flat_options({**case, "backend": "local"}, prefix))
    runtime.start()
    training = PlainTraining(config, MODELS[case["model"]]["vocab_size"], case["samples"] // case["micro_batch"])
    return measure(config, case, training.step, training.step) | {"backend": "plain megatron-core"}


def main() -> None:
    """Measure the case of the first argument."""
    case = json.loads(sys.argv[1])
    cpu.install()
    tokens = case["samples"] * case["seq_length"] * (case["warmup"] + case["steps"] * case["blocks"] + 2)
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_tokens(folder, MODELS[case["model"]]["vocab_size"], min(tokens, 4_000_000))
        try:
            row = (plain_leg if case["backend"] == "plain" else our_leg)(case, prefix)
        except torch.OutOfMemoryError:
            row = {"error": "out of memory"}
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
