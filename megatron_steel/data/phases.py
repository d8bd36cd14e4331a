"""From weights, target epochs and phases to the segments of a ledger; at a resume, what of them may still change.

A phase is a set of weights that holds from one sample on until the next phase begins ("annealing": the share of the
best data rises at the end of a run). Phases are planned into the ledger when the run starts, so sample n stays a pure
function of what the checkpoint stores. What was consumed is never planned again: a phase that lies in the past must be
given as it was, one that lies ahead may be changed with --append-data.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from megatron_steel.data import blend
from megatron_steel.data.ledger_check import SHARE_TOLERANCE, differences, refuse_duplicates
from megatron_steel.data.order import Ledger, SourceSpec

Weighting = Literal["weights", "epochs", "windows"]
STARTS = ("start_samples", "start_iteration", "start_tokens")
USAGE = 'give each phase as one text such as "start_tokens=2e9 web=0.3 books=0.7"'


@dataclass(frozen=True)
class Phase:
    """Weights by source name that hold from sample `start` on; a source that is not named is not drawn."""

    start: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Request:
    """What the options ask of the order of a run.

    weighting says what the weights of `sources` mean before the first phase. "weights": what the user wrote. "epochs":
    target epochs times windows; what was drawn before a segment opens is taken off. "windows": none were given; a
    new run draws all windows, an append what is unused, so that all sources end their epoch at the same sample.
    """

    sources: Sequence[SourceSpec]
    weighting: Weighting
    phases: Sequence[Phase]
    seed: int
    seq_length: int


def parse_phases(values: Sequence[str], seq_length: int, consumed_after: Callable[[int], int]) -> list[Phase]:
    """Return the phases that --data-phases gives, in order of their starts.

    Starts are rounded up, those in tokens to a whole sample of `seq_length`; `consumed_after` gives the samples of so
    many iterations.
    Raises ValueError for a phase without exactly one start, a bad number, no positive weight, or starts that do not
    rise.
    """
    phases: list[Phase] = []
    for text in values:
        phase = _parse_phase(text, seq_length, consumed_after)
        if phases and phase.start <= phases[-1].start:
            raise ValueError(
                f"--data-phases: {text!r} starts at sample {phase.start}, not after the phase before it "
                f"({phases[-1].start}); list the phases in order"
            )
        phases.append(phase)
    return phases


def _parse_phase(text: str, seq_length: int, consumed_after: Callable[[int], int]) -> Phase:
    """One phase from its text."""
    starts: list[int] = []
    weights: dict[str, float] = {}
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"--data-phases {text!r}: {error}; {USAGE}") from error
    for word in words:
        name, _, digits = word.rpartition("=")
        try:
            number = Fraction(digits)
        except (ValueError, ZeroDivisionError):
            number = Fraction(-1)
        if not name or number < 0 or name in weights:
            raise ValueError(f"--data-phases {text!r}: {word!r} is not NAME=NUMBER with a new name; {USAGE}")
        if name in STARTS:
            whole = math.ceil(number / seq_length if name == "start_tokens" else number)
            starts.append(consumed_after(whole) if name == "start_iteration" else whole)
        else:
            weights[name] = float(number)
    if len(starts) != 1 or not any(weights.values()):
        raise ValueError(f"--data-phases {text!r}: needs one of {', '.join(STARTS)} and a weight above 0; {USAGE}")
    return Phase(starts[0], weights)


def arrange(request: Request, ledger: Ledger | None, consumed_samples: int, append: bool) -> tuple[Ledger, list[str]]:
    """Return the ledger of a run and lines for the log.

    ledger: the checkpoint's, None for a new run. Raises ValueError for anything that differs from the checkpoint's
    order: always for what was consumed, and for what comes unless `append`.
    """
    if ledger is None:
        start, *later = _wanted(request, None, 0)
        ledger = Ledger.create(start[1], request.seed, request.seq_length)
        for at, sources in later:
            ledger = ledger.append(at, sources, request.seed)
        return ledger, []
    _check_past(request, ledger, consumed_samples)
    wanted = _wanted(request, ledger, ledger.segments[ledger.segment_at(consumed_samples)].start, consumed_samples)
    try:
        ledger.check(wanted[0][1], request.seq_length, consumed_samples)
        _check_future(ledger, wanted[1:], consumed_samples)
        return ledger, []
    except ValueError:
        if not append or ledger.seq_length != request.seq_length:
            raise
    return _rebuild(request, ledger, consumed_samples)


def _rebuild(request: Request, ledger: Ledger, at: int) -> tuple[Ledger, list[str]]:
    """The ledger with everything from sample `at` on planned anew, and what to say about it."""
    grown, notes = ledger.until(at), []
    active = grown.segments[grown.segment_at(at)]
    same = _wanted(request, grown, active.start, at)[0][1]
    if _differs(grown, same, at):
        grown = grown.append(at, _wanted(request, grown, at)[0][1], request.seed)
        notes.append(f"data appended: a new segment of the order starts at sample {at}")
    for start, sources in _wanted(request, grown, at)[1:]:
        grown = grown.append(start, sources, request.seed)
    return grown, notes or [f"data phases after sample {at} were planned anew"]


def _wanted(
    request: Request, ledger: Ledger | None, since: int, at: int | None = None
) -> list[tuple[int, list[SourceSpec]]]:
    """(first sample, sources with weights) of what holds at sample `at` (None: `since`) and of each later phase.

    since: sample from which the weights before the first phase count what is unused.
    """
    at = since if at is None else at
    begun = [phase for phase in request.phases if phase.start <= at]
    first = _of_phase(request, begun[-1]) if begun else _base(request, ledger, since)
    return [(at, first), *((p.start, _of_phase(request, p)) for p in request.phases if p.start > at)]


def _of_phase(request: Request, phase: Phase) -> list[SourceSpec]:
    """The sources that a phase names, with its weights."""
    by_name = {source.name: source for source in request.sources}
    for name in phase.weights:
        if name not in by_name:
            raise ValueError(
                f"--data-phases names source {name!r}, but the data has {', '.join(sorted(by_name))}: "
                "list its file in the data path too, with weight 0 if no earlier part draws from it"
            )
    return [replace(by_name[name], weight=weight) for name, weight in phase.weights.items() if weight]


def _base(request: Request, ledger: Ledger | None, since: int) -> list[SourceSpec]:
    """The sources with the weights that hold outside of phases, for a segment that opens at sample `since`."""
    given = [source for source in request.sources if source.weight]
    refuse_duplicates(given)
    if ledger is None or request.weighting == "weights":
        return given
    if request.weighting == "windows":
        now = {source.fingerprint: source.weight for source in ledger.sources_at(since)}
        if {source.fingerprint for source in given} == set(now):
            # Nothing was asked for and nothing was added: the weights in force stay.
            return [replace(source, weight=now[source.fingerprint]) for source in given]
        unused = ledger.unused(since)
        return [replace(s, weight=float(unused.get(s.fingerprint, s.windows))) for s in given]
    consumed = ledger.consumed(since).tolist()
    drawn = {source.fingerprint: count for source, count in zip(ledger.sources, consumed, strict=True)}
    left = [replace(s, weight=s.weight - drawn.get(s.fingerprint, 0)) for s in given]
    for source in left:
        if source.weight <= 0:
            raise ValueError(
                f"--target-epochs: source {source.name!r} was seen {drawn[source.fingerprint] / source.windows:.4g} "
                "times before; raise its target, or set it to 0 to leave it out from here on"
            )
    return left


def _differs(ledger: Ledger, sources: Sequence[SourceSpec], at: int) -> bool:
    """Whether sample `at` is drawn from something else than `sources`."""
    return bool(differences(ledger.sources_at(at), sources, appending=False))


def _check_future(ledger: Ledger, wanted: Sequence[tuple[int, list[SourceSpec]]], at: int) -> None:
    """Raise ValueError unless the segments after sample `at` are the wanted ones."""
    have = [segment.start for segment in ledger.segments if segment.start > at]
    starts = [start for start, _ in wanted]
    if have != starts:
        raise ValueError(
            f"--data-phases after sample {at} start at samples {starts}, the checkpoint's at {have}: "
            "pass --append-data to change what comes"
        )
    for start, sources in wanted:
        problems = differences(ledger.sources_at(start), sources, appending=False)
        if problems:
            raise ValueError(f"--data-phases, phase at sample {start}: {'; '.join(problems)}")


def _check_past(request: Request, ledger: Ledger, consumed_samples: int) -> None:
    """Raise ValueError if a phase that began before sample `consumed_samples` is not what was trained on."""
    for phase in request.phases:
        if phase.start >= consumed_samples:
            break
        segments = [segment for segment in ledger.segments if segment.start == phase.start]
        renamed = {source.name: source.fingerprint for source in request.sources}
        named = {source.name: source.fingerprint for source in segments[-1].sources} if segments else {}
        weights = {renamed.get(name) or named.get(name): w for name, w in phase.weights.items() if w}
        shares = dict(zip(weights, blend.normalise(list(weights.values())), strict=True))
        was = {source.fingerprint: source.share for source in segments[-1].sources} if segments else {}
        if shares.keys() != was.keys() or any(
            not math.isclose(share, was[str(name)], rel_tol=SHARE_TOLERANCE) for name, share in shares.items()
        ):
            raise ValueError(
                f"--data-phases: the phase from sample {phase.start} on is not what the checkpoint was trained with "
                f"({consumed_samples} samples); give past phases as they were, and a new one from here on"
            )
