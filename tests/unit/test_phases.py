"""Weights, target epochs and phases: against a slow oracle, published numbers, and what a resume may change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.config.rampup import BatchSizes
from megatron_steel.data.order import Ledger, SourceSpec
from megatron_steel.data.phases import Phase, Request, Weighting, arrange, parse_phases

# Brown et al. 2020, table 2.2: tokens (billions) and weight in a training of 300 billion tokens.
GPT3 = {"cc": (410, 0.60), "webtext2": (19, 0.22), "books1": (12, 0.08), "books2": (55, 0.08), "wiki": (3, 0.03)}
# 300 * weight / tokens, to 3 digits. The paper prints 0.44, 2.9, 1.9, 0.43, 3.4 from weights it did not round.
GPT3_EPOCHS = [0.439, 3.47, 2.00, 0.436, 3.00]
SEQ_LENGTH = 2048


def spec(name: str, windows: int, weight: float = 1.0) -> SourceSpec:
    return SourceSpec(name, f"content of {name}", windows, weight)


def request(
    sources: Sequence[SourceSpec], phases: Sequence[Phase] = (), weighting: Weighting = "weights", seed: int = 1
) -> Request:
    return Request(sources, weighting, phases, seed, 8)


def new(asked: Request) -> Ledger:
    return arrange(asked, None, 0, append=False)[0]


def saved(ledger: Ledger) -> Ledger:
    """The ledger as a checkpoint gives it back."""
    return Ledger.from_json(json.loads(json.dumps(ledger.to_json())))


# ---- weights and target epochs -----------------------------------------------------------------------------------


def test_gpt3_weights_give_the_epochs() -> None:
    windows = {name: tokens * 10**9 // SEQ_LENGTH for name, (tokens, _) in GPT3.items()}
    ledger = new(request([spec(name, windows[name], weight) for name, (_, weight) in GPT3.items()]))
    # The published weights add up to 1.01.
    rows = ledger.epoch_table(int(1.01 * 300e9 / SEQ_LENGTH))
    assert [row.name for row in rows] == list(GPT3)
    assert [float(f"{row.epochs:.3g}") for row in rows] == GPT3_EPOCHS
    # Within what rounding a weight to whole percents can do to it, these are the paper's.
    published = [(0.44, 60), (1.9, 8), (0.43, 8), (3.4, 3)]
    for row, (epochs, percent) in zip([rows[0], *rows[2:]], published, strict=True):
        assert row.epochs * (percent - 0.5) / percent - 0.005 <= epochs <= row.epochs * (percent + 0.5) / percent


def test_gpt3_epochs_give_the_weights() -> None:
    windows = {name: tokens * 10**9 // SEQ_LENGTH for name, (tokens, _) in GPT3.items()}
    exact = [300 * weight / tokens for tokens, weight in GPT3.values()]
    sources = [spec(name, windows[name], epochs * windows[name]) for name, epochs in zip(GPT3, exact, strict=True)]
    ledger = new(request(sources, weighting="epochs"))
    shares = [row.share for row in ledger.epoch_table(1)]
    assert [float(f"{share * 1.01:.3g}") for share in shares] == [0.6, 0.22, 0.08, 0.08, 0.03]
    total = round(sum(source.weight for source in sources))
    assert ledger.epochs(total).tolist() == pytest.approx(exact, abs=1e-6)


def test_ten_thousand_draws_have_the_shares() -> None:
    sources = [spec("a", 900, 0.61), spec("b", 500, 0.30), spec("c", 77, 0.09)]
    counts = np.bincount(new(request(sources)).samples(0, 10_000)[0])
    assert counts == pytest.approx([6100, 3000, 900], abs=1)


# ---- phases against an oracle ------------------------------------------------------------------------------------


def oracle(parts: Sequence[tuple[int, dict[str, float]]], windows: dict[str, int], stop: int) -> list[tuple[str, int]]:
    """(source, epoch) of samples [0, stop), one at a time: the source whose next draw is earliest since the last start.

    Shares are exact fractions rounded once; a source's epoch is its number of draws in the whole run over its windows.
    """
    result: list[tuple[str, int]] = []
    drawn = dict.fromkeys(windows, 0)
    for n in range(stop):
        begins = [start for start, _ in parts if start <= n]
        weights = [weights for start, weights in parts if start == begins[-1]][-1]
        total = sum(Fraction(repr(weight)) for weight in weights.values())
        since = [name for name, _ in result[begins[-1] :]]
        times = [
            float(Fraction(2 * since.count(name) + 1) / (2 * Fraction(float(Fraction(repr(weight)) / total))))
            for name, weight in weights.items()
        ]
        name = list(weights)[times.index(min(times))]
        result.append((name, drawn[name] // windows[name]))
        drawn[name] += 1
    return result


WINDOWS = {"a": 5, "b": 17, "c": 30}
weights_of = st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.1, 0.3, 1.0, 2.5]), min_size=1)


@st.composite
def plans(draw: st.DrawFn) -> list[Phase]:
    starts = draw(st.lists(st.integers(1, 110), max_size=3, unique=True))
    return [Phase(start, draw(weights_of)) for start in sorted(starts)]


@given(weights_of, plans(), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_phases_equal_the_oracle(base: dict[str, float], phases: list[Phase], seed: int) -> None:
    """Source and epoch of each sample are the oracle's; within an epoch no window comes twice."""
    sources = [spec(name, windows, base.get(name, 0.0)) for name, windows in WINDOWS.items()]
    # The order of sources decides ties, so the oracle gets the ledger's.
    base = {name: base[name] for name in WINDOWS if name in base}
    ledger = new(request(sources, phases, seed=seed))
    source, epoch, window = ledger.samples(0, 130)
    names = [one.name for one in ledger.sources]
    expected = oracle([(0, base), *((p.start, dict(p.weights)) for p in phases)], WINDOWS, 130)
    assert [(names[s], e) for s, e in zip(source.tolist(), epoch.tolist(), strict=True)] == expected
    seen = list(zip(source.tolist(), epoch.tolist(), window.tolist(), strict=True))
    assert len(set(seen)) == len(seen)
    for name, windows in WINDOWS.items():
        mine = [w for s, e, w in seen if names[s] == name and e == 0]
        assert set(mine) <= set(range(windows))
        if any(names[s] == name and e == 1 for s, e, _ in seen):
            assert sorted(mine) == list(range(windows))


@given(weights_of, plans(), plans(), st.integers(0, 120))
@settings(deadline=None, max_examples=40)
def test_changing_future_phases_never_changes_the_past(
    base: dict[str, float], before: list[Phase], after: list[Phase], consumed: int
) -> None:
    sources = [spec(name, windows, base.get(name, 0.0)) for name, windows in WINDOWS.items()]
    ledger = new(request(sources, before))
    kept = [phase for phase in before if phase.start < consumed]
    changed = request(sources, [*kept, *(phase for phase in after if phase.start >= consumed)])
    grown, _ = arrange(changed, saved(ledger), consumed, append=True)
    assert np.array_equal(grown.samples(0, consumed), ledger.samples(0, consumed))
    seen = set(zip(*(part.tolist() for part in grown.samples(0, 200)), strict=True))
    assert len(seen) == 200
    # The same request again, now or later, is what the checkpoint has; nothing is asked of the user.
    for at in (consumed, consumed + 7, 150):
        assert arrange(changed, saved(grown), at, append=False) == (grown, [])


@given(weights_of, plans(), st.data())
@settings(deadline=None, max_examples=30)
def test_a_changed_past_is_always_refused(base: dict[str, float], phases: list[Phase], data: st.DataObject) -> None:
    if not phases:
        return
    sources = [spec(name, windows, base.get(name, 0.0)) for name, windows in WINDOWS.items()]
    ledger = new(request(sources, phases))
    which = data.draw(st.integers(0, len(phases) - 1))
    consumed = phases[which].start + data.draw(st.integers(1, 50))
    weights = phases[which].weights
    others = [{"a": 0.7, "c": 0.9}, {"b": 1.0, "c": 0.123}]
    if len(weights) > 1:
        others.append({name: weight * (1 + place) for place, (name, weight) in enumerate(weights.items())})
    other = data.draw(st.sampled_from(others))
    moved = Phase(phases[which].start - 1, phases[which].weights)
    for wrong in (Phase(phases[which].start, other), moved):
        if wrong.start in [phase.start for phase in phases] and wrong is moved:
            continue
        asked = request(sources, [*phases[:which], wrong, *phases[which + 1 :]])
        for append in (False, True):
            if wrong is moved and wrong.start == 0:
                continue
            with pytest.raises(ValueError, match="is not what the checkpoint was trained with"):
                arrange(asked, saved(ledger), consumed, append)


def test_future_phases_need_append_data() -> None:
    sources = [spec("web", 900, 3.0), spec("books", 100, 1.0)]
    late = Phase(200, {"web": 1.0, "books": 1.0})
    ledger = new(request(sources, [late]))
    assert [segment.start for segment in ledger.segments] == [0, 200]
    assert [segment.start for segment in ledger.until(200).segments] == [0]
    assert [segment.start for segment in ledger.until(201).segments] == [0, 200]
    for phases, message in (
        ([], r"start at samples \[\], the checkpoint's at \[200\]: pass --append-data"),
        ([replace(late, start=300)], r"start at samples \[300\], the checkpoint's at \[200\]"),
        ([replace(late, weights={"web": 1.0, "books": 3.0})], "phase at sample 200: the weight of source 'web'"),
        ([late, Phase(400, {"books": 1.0})], r"\[200, 400\]"),
    ):
        with pytest.raises(ValueError, match=message):
            arrange(request(sources, phases), saved(ledger), 64, append=False)
        grown, notes = arrange(request(sources, phases), saved(ledger), 64, append=True)
        assert notes == ["data phases after sample 64 were planned anew"]
        assert [segment.start for segment in grown.segments] == [0, *(phase.start for phase in phases)]
        assert np.array_equal(grown.samples(0, 200 if phases else 64), ledger.samples(0, 200 if phases else 64))


def test_a_phase_may_bring_a_source_of_its_own() -> None:
    sources = [spec("web", 900, 1.0), spec("gold", 50, 0.0)]
    ledger = new(request(sources, [Phase(100, {"web": 1.0, "gold": 1.0})]))
    source, epoch, window = ledger.samples(0, 200)
    assert (source[:100] == 0).all() and np.bincount(source[100:]).tolist() == [50, 50]
    assert sorted(window[source == 1].tolist()) == list(range(50)) and (epoch == 0).all()
    with pytest.raises(ValueError, match="names source 'golden', but the data has gold, web: list its file"):
        new(request(sources, [Phase(100, {"golden": 1.0})]))


def test_epoch_limit_judges_what_a_phase_repeats_and_then_drops() -> None:
    sources = [spec("web", 900, 1.0), spec("gold", 10, 1.0)]
    ledger = new(request(sources, [Phase(100, {"web": 1.0})]))
    with pytest.raises(ValueError, match="'gold' would be seen 5 times"):
        ledger.check_max_epochs(300, 4.0)
    ledger.check_max_epochs(300, 4.0, consumed_samples=100)
    assert [(row.name, row.share, row.epochs) for row in ledger.epoch_table(300)][1] == ("gold", 0.0, 5.0)
    assert ledger.epoch_table(50)[1].share == 0.5
    assert ledger.drawn_from(0) == {"content of web", "content of gold"}
    assert ledger.drawn_from(100) == {"content of web"} == ledger.drawn_from(5000)


# ---- resume and append -------------------------------------------------------------------------------------------


def test_appended_sources_without_weights_finish_together() -> None:
    """Three sources, one of them new: unused windows are the weights, so all end their epoch at the same sample."""
    old = [spec("a", 1000, 1000.0), spec("b", 500, 500.0)]
    ledger = new(request(old, weighting="windows"))
    asked = request([*old, spec("c", 700, 700.0)], weighting="windows")
    with pytest.raises(ValueError, match="source 'c' is new: pass --append-data"):
        arrange(asked, saved(ledger), 600, append=False)
    grown, notes = arrange(asked, saved(ledger), 600, append=True)
    assert notes == ["data appended: a new segment of the order starts at sample 600"]
    assert grown.epochs(2200).tolist() == [1.0, 1.0, 1.0]
    source, epoch, _ = grown.samples(600, 2200)
    assert (epoch == 0).all()
    for block in source.reshape(16, 100):
        assert set(block.tolist()) == {0, 1, 2}
    # Going on without weights keeps the ones in force.
    assert arrange(asked, saved(grown), 1000, append=False) == (grown, [])
    assert arrange(asked, saved(grown), 1000, append=True) == (grown, [])


def test_target_epochs_count_what_was_seen_before_an_append() -> None:
    old = [spec("a", 1000, 2000.0), spec("b", 500, 250.0)]
    ledger = new(request(old, weighting="epochs"))
    assert ledger.epochs(2250).tolist() == [2.0, 0.5]
    asked = request([*old, spec("c", 100, 300.0)], weighting="epochs")
    grown, _ = arrange(asked, saved(ledger), 450, append=True)
    assert grown.epochs(2550).tolist() == [2.0, 0.5, 3.0]
    assert arrange(asked, saved(grown), 900, append=False) == (grown, [])
    less = request([replace(old[0], weight=300.0), *old[1:]], weighting="epochs")
    with pytest.raises(ValueError, match="--target-epochs: source 'a' was seen 0.4 times before; raise its target"):
        arrange(less, saved(ledger), 450, append=True)


def test_appending_before_a_planned_phase_keeps_the_phase() -> None:
    late = Phase(400, {"a": 1.0, "b": 2.0})
    old = [spec("a", 300, 1.0), spec("b", 300, 1.0)]
    ledger = new(request(old, [late]))
    asked = request([*old, spec("c", 100, 1.0)], [late])
    grown, notes = arrange(asked, saved(ledger), 100, append=True)
    assert [segment.start for segment in grown.segments] == [0, 100, 400] and "sample 100" in notes[0]
    assert np.array_equal(grown.samples(0, 100), ledger.samples(0, 100))
    assert set(grown.samples(100, 400)[0].tolist()) == {0, 1, 2} and set(grown.samples(400, 500)[0].tolist()) == {0, 1}
    assert arrange(asked, saved(grown), 250, append=False) == (grown, [])


def test_every_step_of_three_sources_can_be_the_last() -> None:
    """C9: whenever a run of three sources with a phase is saved and loaded, the rest of its samples is the same."""
    sources = [spec("a", 13, 0.5), spec("b", 29, 0.3), spec("c", 7, 0.2)]
    asked = request(sources, [Phase(60, {"a": 0.2, "b": 0.2, "c": 0.6})])
    ledger = new(asked)
    whole = np.stack(ledger.samples(0, 160))
    for step in range(160):
        resumed, notes = arrange(asked, saved(ledger), step, append=False)
        assert notes == [] and resumed.fingerprint() == ledger.fingerprint()
        assert np.array_equal(np.stack(resumed.samples(step, 160)), whole[:, step:])
        assert resumed.unused(step) == {
            s.fingerprint: s.windows - int((whole[0, :step] == i).sum()) % s.windows
            for i, s in enumerate(ledger.sources)
        }
        ledger = saved(resumed)


# ---- parsing -----------------------------------------------------------------------------------------------------


EIGHT = BatchSizes(final=8).consumed_after


def test_phases_are_read_in_samples() -> None:
    values = ["start_samples=100 a=1", "start_iteration=20 'my web'=0.5 lang=zh/wiki=2", "start_tokens=2e6 a=1 b=0"]
    assert parse_phases(values, 1000, EIGHT) == [
        Phase(100, {"a": 1.0}),
        Phase(160, {"my web": 0.5, "lang=zh/wiki": 2.0}),
        Phase(2000, {"a": 1.0, "b": 0.0}),
    ]
    assert parse_phases(["start_tokens=2001 a=1"], 1000, EIGHT)[0].start == 3
    assert parse_phases([], 1000, EIGHT) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a=1"], "needs one of start_samples"),
        (["start_samples=1 start_tokens=5 a=1"], "needs one of start_samples"),
        (["start_samples=1 a=0"], "a weight above 0"),
        (["start_samples=1"], "a weight above 0"),
        (["start_samples=1 a"], "'a' is not NAME=NUMBER"),
        (["start_samples=1 =3"], "'=3' is not NAME=NUMBER"),
        (["start_samples=1 a=x"], "'a=x' is not NAME=NUMBER"),
        (["start_samples=1 a=-1"], "'a=-1' is not NAME=NUMBER"),
        (["start_samples=1 a=nan"], "'a=nan' is not NAME=NUMBER"),
        (["start_samples=1 a=1 a=2"], "'a=2' is not NAME=NUMBER with a new name"),
        (["start_samples=-1 a=1"], "'start_samples=-1' is not"),
        (["start_samples=1 'a=1"], "No closing quotation"),
        (["start_samples=5 a=1", "start_samples=5 a=2"], "starts at sample 5, not after the phase before it"),
    ],
)
def test_bad_phases_are_refused(values: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        parse_phases(values, 1000, EIGHT)
    assert "\n" not in str(raised.value)
