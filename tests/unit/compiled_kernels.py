"""Compile every kernel for a Hopper GPU, which needs none; prints one line for each. test_kernels.py runs it."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_steel.model.kernels import cross_entropy, rms_norm, rotate, swiglu

HOPPER = GPUTarget("cuda", 90, 32)
ROTATE = {"heads": 32, "per_group": 4, "width": 96, "HEADS": 32, "HALF": 32}
NORM = {"inverse_ptr": "*fp32", "partial_ptr": "*fp32", "eps": "fp32"}
LOSS = {"label_ptr": "*i64", **dict.fromkeys(("target_ptr", "total_ptr", "peak_ptr", "grad_ptr"), "*fp32")}
CASES = [
    (rms_norm.forward_kernel, {"ROUND": True, "ROWS": 1, "BLOCK": 2048}, NORM),
    (rms_norm.backward_kernel, {"ROWS": 1, "BLOCK": 16384}, NORM),
    (rms_norm.backward_kernel, {"ROWS": 16, "BLOCK": 128}, NORM),
    (swiglu.forward_kernel, {"BLOCK": 2048}, {}),
    (swiglu.backward_kernel, {"BLOCK": 2048}, {}),
    (rotate.rotate_kernel, {**ROTATE, "turned": 64, "REST": 32, "FORWARD": True}, {}),
    (rotate.rotate_kernel, {**ROTATE, "turned": 96, "REST": 0, "HALF": 64, "FORWARD": False}, {}),
    (cross_entropy.forward_kernel, {"BLOCK": 4096}, LOSS),
    (cross_entropy.backward_kernel, {"BLOCK": 4096}, LOSS),
]


def compile_for_hopper(kernel: triton.JITFunction, constants: dict[str, int], types: dict[str, str]) -> int:
    """-> bytes of machine code."""
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return len(triton.compile(source, target=HOPPER, options={"num_warps": 16}).asm["cubin"])


if __name__ == "__main__":
    for case in CASES:
        print(case[0].__name__, case[1], compile_for_hopper(*case))
