"""Learning rate as a pure function of the step.

``step`` is the number of iterations completed before the one that uses the rate: iteration 1 uses ``step = 0``. That is
what megatron-core's scheduler does, so curves can be laid over each other: with warm-up the first iteration has rate 0,
and iteration ``warm-up + 1`` is the first one with the full rate. Two differences, both on purpose:

* The unit is always one iteration. megatron-core counts samples, which makes no difference except for
  inverse-square-root without warm-up, where its curve depends on the batch size.
* A step that was skipped (infinite gradient) counts like any other; the curve depends on the iteration alone.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_steel.config.schema import OptimizerConfig


def decay_iterations(options: OptimizerConfig, train_iters: int) -> int:
    """Iteration at which the decay ends."""
    return options.lr_decay_iters or train_iters


def warmup_iterations(options: OptimizerConfig, train_iters: int) -> float:
    """Iterations of linear warm-up; a fraction of the decay need not be whole."""
    if options.lr_warmup_fraction is not None:
        return options.lr_warmup_fraction * decay_iterations(options, train_iters)
    return options.lr_warmup_iters


def learning_rate(step: int, options: OptimizerConfig, train_iters: int) -> float:
    """Rate of the iteration that follows ``step`` completed ones.

    Linear from 0 to ``lr`` over the warm-up, then ``lr_decay_style`` down to ``min_lr`` at the end of the decay, and
    ``min_lr`` after it. ``constant`` never decays. ``inverse-square-root`` is lr * sqrt(warm-up / step) (Vaswani et al.
    2017, section 5.3) and falls to ``min_lr`` only after the end. ``WSD`` keeps ``lr`` until its last phase (Hu et al.
    2024, arXiv:2404.06395, section 4).
    """
    warmup, end = warmup_iterations(options, train_iters), decay_iterations(options, train_iters)
    if warmup > 0 and step <= warmup:
        return options.lr * (step / warmup)
    if options.lr_decay_style == "constant":
        return options.lr
    if step > end:
        return options.min_lr
    if options.lr_decay_style == "inverse-square-root":
        return max(options.min_lr, options.lr * math.sqrt(max(warmup, 1) / max(step, 1)))
    share = remaining_share(step, options, warmup, end)
    # Both ends are exact; between them a rounding error must not carry the rate above lr.
    return min(options.lr, options.lr * share + options.min_lr * (1.0 - share))


def remaining_share(step: int, options: OptimizerConfig, warmup: float, end: int) -> float:
    """Share of (lr - min_lr) that is left, from 1 at the end of the warm-up to 0 at the end of the decay."""
    if options.lr_decay_style == "WSD":
        last = options.lr_wsd_decay_iters
        assert last is not None, "config.check lets WSD through only with lr_wsd_decay_iters"
        return decay_shape(options.lr_wsd_decay_style, max(0.0, (step - (end - last)) / last))
    return decay_shape(options.lr_decay_style, (step - warmup) / (end - warmup))


def decay_shape(style: str, progress: float) -> float:
    """Falling curve from 1 at ``progress`` 0 to 0 at 1."""
    if style == "linear":
        return 1.0 - progress
    if style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if style == "exponential":
        return 2.0 * 0.5**progress - 1.0
    assert style == "minus_sqrt", style
    return 1.0 - math.sqrt(progress)


def schedule_identity(options: OptimizerConfig, train_iters: int) -> dict[str, Any]:
    """Everything that decides the curve and the weight decay, resolved, and nothing that does not.

    Stored in checkpoints (JSON types only). A constant rate does not depend on ``train_iters``, so extending such a
    run changes nothing here, while a cosine that ends with the run becomes another curve.
    """
    identity: dict[str, Any] = {
        "lr": options.lr,
        "lr_decay_style": options.lr_decay_style,
        "lr_warmup_iters": warmup_iterations(options, train_iters),
        "weight_decay": options.weight_decay,
    }
    if options.lr_decay_style != "constant":
        identity["min_lr"] = options.min_lr
        identity["lr_decay_iters"] = decay_iterations(options, train_iters)
    if options.lr_decay_style == "WSD":
        identity["lr_wsd_decay_iters"] = options.lr_wsd_decay_iters
        identity["lr_wsd_decay_style"] = options.lr_wsd_decay_style
    return identity


def check_same_schedule(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare two :func:`schedule_identity`; ``ValueError`` names what differs and how to change it on purpose."""
    changes = [
        f"{name} {saved.get(name, 'unset')} -> {now.get(name, 'unset')}"
        for name in {**saved, **now}
        if saved.get(name) != now.get(name)
    ]
    if changes:
        raise ValueError(
            f"the learning-rate schedule differs from the checkpoint's: {', '.join(changes)}; use the same options, or "
            f"pass --override-opt-param-scheduler to go on with the new ones"
        )
