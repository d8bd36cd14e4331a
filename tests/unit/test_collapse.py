"""Rewards that fall together are noticed, and end a run that asks for it."""

from __future__ import annotations

import pytest

from megatron_steel.metrics.collapse import RewardWatch


def watch(patience: int | None, *rows: tuple[float, float]) -> tuple[list[int], list[int]]:
    """Numbers of the reports with a warning, and of those after which the run would end."""
    looks = RewardWatch("good", "bad", patience)
    warned, ended = [], []
    for number, (good, bad) in enumerate(rows):
        if looks.see({"good": good, "bad": bad}) is not None:
            warned.append(number)
        if looks.collapsed:
            ended.append(number)
    return warned, ended


DOWN = [(-0.1 * n, -0.2 * n) for n in range(1, 7)]


def test_falls_in_a_row_are_warned_of_once() -> None:
    assert watch(None, *DOWN) == ([3], [])
    assert watch(2, *DOWN) == ([3], [2, 3, 4, 5])


@pytest.mark.parametrize(
    "rows",
    [
        [(0.1 * n, -0.2 * n) for n in range(1, 7)],  # as it should be
        [(-0.1 * n, 0.2 * n) for n in range(1, 7)],  # wrong, but nothing collapses
        [(1.0 - 0.1 * n, 1.0 - 0.2 * n) for n in range(1, 5)],  # both above the reference
        [DOWN[0], DOWN[1], DOWN[2], (-0.2, -0.7), DOWN[3], DOWN[4]],  # a rise in between
    ],
)
def test_other_courses_are_not(rows: list[tuple[float, float]]) -> None:
    assert watch(4, *rows) == ([], [])


def test_the_warning_says_what_to_do() -> None:
    looks = RewardWatch("rewards/chosen", "rewards/rejected", None)
    said = [looks.see({"rewards/chosen": -float(n), "rewards/rejected": -2.0 * n}) for n in range(4)]
    assert said[3] is not None and "rewards/chosen (-3)" in said[3] and "--rpo-alpha" in said[3]
