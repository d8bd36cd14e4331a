"""The ledger: each window once per epoch, the past never changes, the answer never depends on how it is asked."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.data import blend, shuffle
from megatron_steel.data.order import Ledger, SourceSpec
from megatron_steel.data.shuffle import permute, round_keys


def spec(name: str, windows: int, weight: float = 1.0, content: str | None = None) -> SourceSpec:
    return SourceSpec(name, content or f"content of {name}", windows, weight)


# ---- shuffle -----------------------------------------------------------------------------------------------------


def test_shuffle_keeps_its_golden_values() -> None:
    """The order of a checkpointed run must survive every release of numpy and of this file."""
    keys = round_keys("window", 1234, 0, "abc", 0)
    assert keys[0] == GOLDEN_KEY
    assert permute(np.arange(10), 10, keys).tolist() == GOLDEN_10
    assert permute(np.arange(4), 10**9, keys).tolist() == GOLDEN_BILLION


GOLDEN_KEY = 1137512682926960032
GOLDEN_10 = [8, 6, 7, 5, 4, 2, 1, 0, 9, 3]
GOLDEN_BILLION = [536736923, 271887009, 658353135, 151883038]


@given(st.integers(1, 3000), st.integers())
def test_shuffle_is_a_bijection(size: int, seed: int) -> None:
    elements = permute(np.arange(size), size, round_keys(seed))
    assert np.array_equal(np.sort(elements), np.arange(size))


def test_shuffle_reaches_every_order_of_four_equally_often() -> None:
    """Chi-square over the 24 orders of 4 elements: 23 degrees of freedom, 0.1 % quantile 49.7."""
    keys = np.stack([round_keys(seed) for seed in range(6000)], axis=1)
    orders = np.stack([permute(np.full(6000, place), 4, keys) for place in range(4)])
    _, counts = np.unique(orders, axis=1, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 250) ** 2 / 250).sum() < 49.7


def test_shuffle_leaves_no_trend() -> None:
    """Neighbours are unrelated: the lag-1 and the position correlation of 100,003 elements are noise (5 sigma)."""
    elements = permute(np.arange(100_003), 100_003, round_keys("trend")).astype(float)
    assert abs(np.corrcoef(elements[:-1], elements[1:])[0, 1]) < 5 / 100_003**0.5
    assert abs(np.corrcoef(elements, np.arange(100_003))[0, 1]) < 5 / 100_003**0.5


def test_one_key_per_position_equals_one_key_at_a_time() -> None:
    keys = [round_keys(seed) for seed in range(5)]
    places = np.array([0, 6, 3, 3, 1])
    together = permute(places, 7, np.stack(keys, axis=1))
    assert together.tolist() == [int(permute(places[i : i + 1], 7, keys[i])[0]) for i in range(5)]


def test_blocks_of_the_shuffle_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are worked on in blocks; the order is the same for any block, with one key and with one per position."""
    places = np.random.default_rng(0).integers(0, 10**12, 1000)
    one, many = round_keys("one"), np.stack([round_keys(number % 5) for number in range(1000)], axis=1)
    whole = [permute(places, 10**12, keys) for keys in (one, many)]
    for block in (1, 7, 999, 1000):
        monkeypatch.setattr(shuffle, "BLOCK", block)
        assert all(np.array_equal(permute(places, 10**12, k), w) for k, w in zip((one, many), whole, strict=True))


# ---- blend -------------------------------------------------------------------------------------------------------

weights = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


@given(weights, st.integers(0, 300))
def test_blend_equals_exact_merge(parts: list[int], length: int) -> None:
    """Against exact fractions: repeatedly take the source whose next draw is earliest, the first one in a tie."""
    shares = blend.normalise([float(part) for part in parts])
    taken = [0] * len(parts)
    expected = []
    for _ in range(length):
        times = [Fraction(2 * count + 1) / (2 * Fraction(share)) for count, share in zip(taken, shares, strict=True)]
        # Doubles decide, so the fractions are rounded as division of doubles rounds them.
        source = min(range(len(parts)), key=lambda s: (float(times[s]), s))
        expected.append((source, taken[source]))
        taken[source] += 1
    source, draw = blend.draws(np.array(shares), 0, length)
    assert list(zip(source.tolist(), draw.tolist(), strict=True)) == expected
    assert blend.counts(np.array(shares), length).tolist() == taken


@given(weights, st.integers(0, 10**12), st.integers(0, 200))
def test_blend_counts_stay_within_the_stated_bound(parts: list[int], start: int, length: int) -> None:
    shares = np.array(blend.normalise([float(part) for part in parts]))
    counts = blend.counts(shares, start + length)
    assert counts.sum() == start + length
    bound = 0.5 + shares * (len(shares) - 2) / 2 if len(shares) > 1 else np.zeros(1)
    assert (np.abs(counts - shares * (start + length)) <= bound + 1e-3).all()
    source, draw = blend.draws(shares, start, start + length)
    assert np.array_equal(counts - blend.counts(shares, start), np.bincount(source, minlength=len(shares)))
    for number in range(len(shares)):
        assert np.array_equal(draw[source == number], np.arange(blend.counts(shares, start)[number], counts[number]))


@given(weights, st.sampled_from([0.001, 0.1, 0.5, 10.0, 1e6]))
def test_scaling_the_weights_changes_nothing(parts: list[int], factor: float) -> None:
    exact = [float(Fraction(repr(factor)) * part) for part in parts]
    assert blend.normalise(exact) == blend.normalise([float(part) for part in parts])


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), 1e-14])
def test_bad_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        Ledger.create([spec("a", 3, 1.0), spec("b", 3, weight)], 1, 8)


# ---- ledger ------------------------------------------------------------------------------------------------------


@st.composite
def histories(draw: st.DrawFn) -> tuple[Ledger, list[tuple[int, Ledger]]]:
    """A ledger with up to four appends over up to six sources, and each ledger before an append with its sample."""
    pool = [spec(f"s{i}", draw(st.integers(1, 40)), draw(st.sampled_from([0.1, 0.25, 1.0, 3.0]))) for i in range(6)]
    chosen = st.lists(st.sampled_from(pool), min_size=1, max_size=6, unique=True)
    ledger = Ledger.create(draw(chosen), draw(st.integers(0, 5)), 8)
    past = []
    at = 0
    for _ in range(draw(st.integers(0, 4))):
        at += draw(st.integers(0, 90))
        past.append((at, ledger))
        ledger = ledger.append(at, draw(chosen), draw(st.integers(0, 5)))
    return ledger, past


@given(histories())
@settings(deadline=None, max_examples=30)
def test_each_window_exactly_once_per_epoch(history: tuple[Ledger, object]) -> None:
    ledger, _ = history
    source, epoch, window = ledger.samples(0, 600)
    for number, described in enumerate(ledger.sources):
        mine = source == number
        assert np.array_equal(epoch[mine], np.arange(mine.sum()) // described.windows)
        for name in np.unique(epoch[mine]):
            seen = np.sort(window[mine & (epoch == name)])
            if name < epoch[mine].max():
                assert np.array_equal(seen, np.arange(described.windows))
            assert len(np.unique(seen)) == len(seen)
            assert seen[-1] < described.windows
    assert np.array_equal(ledger.consumed(600), np.bincount(source, minlength=len(ledger.sources)))


@given(histories())
@settings(deadline=None, max_examples=30)
def test_append_never_changes_the_past(history: tuple[Ledger, list[tuple[int, Ledger]]]) -> None:
    ledger, past = history
    names = [source.fingerprint for source in ledger.sources]
    for at, before in past:
        assert np.array_equal(ledger.samples(0, at), before.samples(0, at))
        assert names[: len(before.sources)] == [source.fingerprint for source in before.sources]


@given(histories(), st.integers(0, 400), st.integers(0, 60), st.integers(1, 17))
@settings(deadline=None, max_examples=30)
def test_the_answer_does_not_depend_on_the_question(
    history: tuple[Ledger, object], start: int, length: int, step: int
) -> None:
    ledger, _ = history
    whole = np.stack(ledger.samples(start, start + length))
    blocks = [np.stack(ledger.samples(at, min(at + step, start + length))) for at in range(start, start + length, step)]
    assert np.array_equal(whole, np.concatenate([np.empty((3, 0), dtype=np.int64), *blocks], axis=1))
    singles = [ledger.sample(n) for n in range(start, start + min(length, 10))]
    assert [list(sample) for sample in singles] == whole[:, : len(singles)].T.tolist()


@given(histories(), st.integers(0, 400))
@settings(deadline=None, max_examples=30)
def test_save_and_load_changes_nothing(history: tuple[Ledger, object], n: int) -> None:
    ledger, _ = history
    loaded = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert loaded == ledger
    assert loaded.fingerprint() == ledger.fingerprint()
    assert loaded.sources == ledger.sources
    assert np.array_equal(loaded.samples(n, n + 20), ledger.samples(n, n + 20))
    at = max(n, ledger.segments[-1].start)
    more = [spec("s0", ledger_windows(ledger, "s0")), spec("late", 9)]
    assert loaded.append(at, more, 3) == ledger.append(at, more, 3)


def ledger_windows(ledger: Ledger, name: str) -> int:
    return next((source.windows for source in ledger.sources if source.name == name), 5)


def test_append_mixes_unused_old_with_new() -> None:
    """1000 old windows, 400 trained, 800 new ones: the next 1,200 samples hold both throughout, none twice."""
    ledger = Ledger.create([spec("old", 1000)], 7, 8)
    grown = ledger.append(400, [spec("old", 1000, 600.0), spec("new", 800, 800.0)], 7)
    source, epoch, window = grown.samples(400, 1800)
    trained = set(ledger.samples(0, 400)[2].tolist())
    assert set(window[source == 0].tolist()) == set(range(1000)) - trained
    assert set(window[source == 1].tolist()) == set(range(800))
    assert (epoch == 0).all()
    for block in source.reshape(14, 100):
        assert abs((block == 0).sum() - 600 / 14) <= 1.5
    # Freshly shuffled: the rest does not come in the order in which it would have come without the append.
    assert window[source == 0].tolist() != ledger.samples(400, 1000)[2].tolist()
    after = grown.samples(1800, 3000)
    assert (after[1] == 1).all()


def test_order_has_golden_values() -> None:
    ledger = Ledger.create([spec("zh", 50, 0.7), spec("en", 20, 0.3)], 1234, 8)
    ledger = ledger.append(30, [spec("zh", 50, 0.5), spec("en", 20, 0.3), spec("code", 10, 0.2)], 1234)
    assert [list(part[:8]) for part in ledger.samples(26, 40)] == GOLDEN_ORDER


GOLDEN_ORDER = [[0, 0, 1, 0, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0, 0, 0], [22, 30, 16, 4, 38, 12, 0, 23]]


def test_a_dropped_source_goes_on_where_it_stopped() -> None:
    both = [spec("a", 10), spec("b", 10)]
    ledger = Ledger.create(both, 1, 8).append(8, [spec("a", 10)], 1).append(20, both, 1)
    assert [source.weight for source in Ledger.create(both, 1, 8).append(8, both[:1], 1).sources] == [1.0, 0.0]
    source, epoch, window = ledger.samples(0, 32)
    mine = (source == 1) & (epoch == 0)
    assert sorted(window[mine].tolist()) == list(range(10))


def test_other_seeds_sources_and_epochs_have_other_orders() -> None:
    ledger = Ledger.create([spec("a", 100), spec("b", 100)], 1, 8)
    source, epoch, window = ledger.samples(0, 400)
    orders = [window[(source == s) & (epoch == e)].tolist() for s in (0, 1) for e in (0, 1)]
    orders.append(Ledger.create([spec("a", 100)], 2, 8).samples(0, 100)[2].tolist())
    assert len({tuple(order) for order in orders}) == 5


def test_same_content_twice_is_refused_naming_both() -> None:
    twice = [spec("wiki", 5, content="x"), spec("wiki_copy", 5, content="x")]
    with pytest.raises(ValueError, match="'wiki' and 'wiki_copy' have the same content"):
        Ledger.create(twice, 1, 8)
    with pytest.raises(ValueError, match="'wiki' and 'wiki_copy' have the same content"):
        Ledger.create(twice[:1], 1, 8).append(3, twice, 1)
    with pytest.raises(ValueError, match="are named 'wiki'"):
        Ledger.create([spec("wiki", 5, content="x"), spec("wiki", 5, content="y")], 1, 8)


@pytest.mark.parametrize(
    ("sources", "seq_length", "message"),
    [
        ([spec("a", 5), spec("b", 5, 3.0)], 16, "seq_length 16 differs from 8"),
        ([spec("a", 5)], 8, "'b' .* is missing"),
        ([spec("a", 5), spec("b", 5, 3.0), spec("c", 5)], 8, "'c' is new: pass --append-data"),
        ([spec("a", 5), spec("b", 5, 3.0, content="other")], 8, "content of source 'b' changed"),
        ([spec("a", 5), spec("b", 5, 2.0)], 8, "weight of source 'b' is 0.666667 of the sum, was 0.75"),
        ([spec("a", 5), spec("b", 6, 3.0)], 8, "'b' has 6 windows where the checkpoint has 5"),
        ([spec("a", 5), spec("b", 5, 0.0)], 8, "'b' .* is missing"),
        ([spec("c", 5)], 8, "'c' is new.*'a' .*missing.*'b' .*missing"),
        ([], 8, "'a' .*missing"),
    ],
)
def test_resume_names_what_differs(sources: list[SourceSpec], seq_length: int, message: str) -> None:
    ledger = Ledger.create([spec("a", 5), spec("b", 5, 3.0)], 1, 8)
    with pytest.raises(ValueError, match=message) as raised:
        ledger.check(sources, seq_length)
    assert "\n" not in str(raised.value)


def test_resume_accepts_moved_reordered_and_rescaled_sources() -> None:
    ledger = Ledger.create([spec("a", 5, 0.1), spec("b", 5, 0.2)], 1, 8)
    ledger.check([spec("moved", 5, 20.0, content="content of b"), spec("a", 5, 10.0)], 8)


def test_append_refuses_changed_content_and_the_past() -> None:
    ledger = Ledger.create([spec("a", 5)], 1, 8).append(10, [spec("a", 5), spec("b", 5)], 1)
    with pytest.raises(ValueError, match="'a' has 6 windows"):
        ledger.append(12, [spec("a", 6)], 1)
    with pytest.raises(ValueError, match="content of source 'b' changed"):
        ledger.append(12, [spec("a", 5), spec("b", 5, content="new")], 1)
    with pytest.raises(ValueError, match="open segment starts at sample 10"):
        ledger.append(9, [spec("a", 5)], 1)
    with pytest.raises(ValueError, match="no data source"):
        ledger.append(12, [spec("a", 5, 0.0)], 1)


def test_epoch_table_and_limit() -> None:
    ledger = Ledger.create([spec("small", 10, 0.5), spec("large", 1000, 0.5)], 1, 8)
    rows = ledger.epoch_table(200)
    assert [(row.name, row.share, row.windows, row.samples, row.epochs) for row in rows] == [
        ("small", 0.5, 10, 100, 10.0),
        ("large", 0.5, 1000, 100, 0.1),
    ]
    ledger.check_max_epochs(200, 10.0)
    with pytest.raises(ValueError, match=r"'small' would be seen 10.1 times.*raise --max-epochs-per-source"):
        ledger.check_max_epochs(202, 10.0)
    assert ledger.epochs(200).tolist() == [10.0, 0.1]
    ledger.append(202, [spec("large", 1000)], 1).check_max_epochs(300, 10.0, consumed_samples=202)


def damaged(path: list[object], value: object) -> dict[str, object]:
    ledger = Ledger.create([spec("a", 50), spec("b", 5)], 1, 8).append(7, [spec("a", 50), spec("c", 5)], 1)
    data = json.loads(json.dumps(ledger.to_json()))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["version"], 2),
        (["version"], None),
        (["seq_length"], 0),
        (["seq_length"], True),
        (["segments"], []),
        (["segments"], {"0": 1}),
        (["segments", 0, "start"], 3),
        (["segments", 1, "start"], -1),
        (["segments", 1, "start"], 9),
        (["segments", 1, "start"], 1 << 70),
        (["segments", 0, "seed"], "1"),
        (["segments", 0, "sources"], []),
        (["segments", 0, "sources", 0], None),
        (["segments", 0, "sources", 0, "share"], float("nan")),
        (["segments", 0, "sources", 0, "share"], 0.6),
        (["segments", 0, "sources", 0, "share"], "0.5"),
        (["segments", 0, "sources", 0, "windows"], 51),
        (["segments", 0, "sources", 0, "windows"], 1e3),
        (["segments", 0, "sources", 0, "fingerprint"], "content of b"),
        (["segments", 0, "sources", 0, "name"], 5),
        (["segments", 0, "sources", 0, "extra"], 5),
        (["segments", 0, "sources", 0, "epoch"], 1),
        (["segments", 1, "sources", 0, "remaining"], 45),
        (["segments", 1, "sources", 0, "remaining"], 0),
        (["segments", 1, "sources", 0, "windows"], 60),
    ],
)
def test_damaged_json_is_refused(path: list[object], value: object) -> None:
    Ledger.from_json(damaged(["version"], 1))
    with pytest.raises(ValueError, match="ledger"):
        Ledger.from_json(damaged(path, value))


def leaves(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Paths of every value inside a JSON document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path] * bool(path) + [found for key, child in children for found in leaves(child, (*path, key))]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.data(), json_values)
@settings(deadline=None, max_examples=100)
def test_any_changed_json_is_refused_or_is_a_ledger(data: st.DataObject, value: object) -> None:
    """Whatever replaces any part of the JSON: a ValueError, or a ledger that says the same and can be asked."""
    path = data.draw(st.sampled_from(leaves(damaged(["version"], 1))))
    changed = damaged(list(path), value)
    try:
        ledger = Ledger.from_json(changed)
    except ValueError:
        return
    assert ledger.to_json()["seq_length"] == changed["seq_length"]
    ledger.samples(0, 50)


@pytest.mark.parametrize("data", [None, [], "x", 3, {}])
def test_json_that_is_no_ledger_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="ledger"):
        Ledger.from_json(data)  # type: ignore[arg-type]


def test_a_billion_windows_cost_nothing() -> None:
    ledger = Ledger.create([spec("a", 10**9, 0.9), spec("b", 10**9, 0.1)], 1, 8)
    source, epoch, window = ledger.samples(2 * 10**9, 2 * 10**9 + 512)
    assert (epoch[source == 0] == 1).all()
    assert (window < 10**9).all()
    assert len(np.unique(window[source == 0])) == (source == 0).sum()
