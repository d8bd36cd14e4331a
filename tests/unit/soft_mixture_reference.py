"""The feed-forwards of Steel-LLM in numpy float64, written as sums over tokens, experts and slots."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def softmax(z: Array, axis: int) -> Array:
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def expert(x: Array, first: Array, second: Array, double: bool) -> Array:
    """x [d]; first [2 f, d], second [2 d, f] or [d, f]: gate rows, then up rows."""
    gate, up = np.split(first @ x, 2)
    v = second @ (silu(gate) * up)
    if not double:
        return v
    gate, up = np.split(v, 2)
    return silu(gate) * up


def mixture(form: str, x: Array, w: dict[str, Array], double: bool) -> Array:
    """One sample [L, d] through a soft mixture; ``w`` holds its parameters by name."""
    first, second = w["experts.linear_fc1.weight"], w["experts.linear_fc2.weight"]
    n = len(first)
    y = np.zeros_like(x)
    if form == "softmoe_v1":
        g = softmax(x @ w["gating.weight"].T + w["gating.bias"], -1)
        for t in range(len(x)):
            y[t] = sum(g[t, i] * expert(x[t], first[i], second[i], double) for i in range(n))
        return y
    if form == "softmoe_v2":
        z = x @ w["score"]
        p = z.shape[1] // n
        slots = softmax(z, -1).T @ x
        outputs = np.stack([expert(s, first[k // p], second[k // p], double) for k, s in enumerate(slots)])
        return softmax(z, 0) @ outputs
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    phi = w["scale"] * w["phi"] / np.linalg.norm(w["phi"], axis=0, keepdims=True)
    p = phi.shape[2]
    z = np.einsum("md,dnp->mnp", unit, phi).reshape(len(x), n * p)
    combine = softmax(z, -1)
    for t in range(len(x)):
        seen = slice(0, t + 1) if form == "softmoe_causal" else slice(None)
        slots = softmax(z[seen], 0).T @ unit[seen]
        y[t] = sum(combine[t, k] * expert(slots[k], first[k // p], second[k // p], double) for k in range(n * p))
    return y
