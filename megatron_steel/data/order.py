"""The data ledger: which window of which source is sample n of a run.

A run's order is a list of segments, kept as JSON in every checkpoint. `Ledger.sample(n)` is a pure function of it: it
does not depend on the length of the run, the number of ranks, the micro-batch or how it is asked. Appending data closes
the open segment and opens one over the unused windows of the old sources and all windows of the new ones. Segments may
start in the future: phases of other weights are planned that way (data/phases.py).

Within a segment, data/blend.py says which source serves sample n and which draw of that source this is; the draws of a
source walk through its epochs, and each epoch visits its windows in the order of a stateless shuffle (data/shuffle.py).
An epoch that is cut by an append is shuffled again over what is left of it: position p of the rest stands for a
position that the earlier segment had not reached yet, which is looked up there. So each window comes exactly once per
epoch whatever was appended when, in O(1) memory for any number of windows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_steel.data import blend
from megatron_steel.data.ledger_check import differences, read_segments, refuse_duplicates
from megatron_steel.data.shuffle import permute, round_keys

VERSION = 1


@dataclass(frozen=True)
class SourceSpec:
    """A source as the user gives it: `windows` samples of one content, drawn in proportion to `weight`."""

    name: str
    fingerprint: str
    windows: int
    weight: float


@dataclass(frozen=True)
class SegmentSource:
    """A source in a segment: its share of the samples, and where its epochs stand when the segment opens."""

    name: str
    fingerprint: str
    share: float
    windows: int
    epoch: int
    remaining: int

    def size(self, epoch: int) -> int:
        """Windows that this segment may draw in `epoch`: what was left of the first one, all of a later one."""
        return self.remaining if epoch == self.epoch else self.windows


@dataclass(frozen=True)
class Segment:
    """Samples from `start` on, up to the start of the next segment."""

    start: int
    seed: int
    sources: tuple[SegmentSource, ...]


class Sample(NamedTuple):
    """Where a sample comes from; `source` is an index into `Ledger.sources`, epochs count from 0."""

    source: int
    epoch: int
    window: int


class EpochRow(NamedTuple):
    """What a run takes from a source; `share` is the one in force at its end."""

    name: str
    share: float
    windows: int
    samples: int
    epochs: float


@dataclass(frozen=True)
class Ledger:
    """The order of a run. Made by `create`, `append` and `from_json`; never changed in place."""

    seq_length: int
    segments: tuple[Segment, ...]
    sources: tuple[SourceSpec, ...] = field(init=False, compare=False, repr=False)
    """Every source ever used, in order of appearance, with its latest name and share (0 when it was dropped)."""
    _shares: tuple[np.ndarray, ...] = field(init=False, compare=False, repr=False)
    _indices: tuple[np.ndarray, ...] = field(init=False, compare=False, repr=False)
    _previous: tuple[tuple[int | None, ...], ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Derive what every query needs: shares, ledger-wide source indices, and each source's previous segment."""
        latest: dict[str, int] = {}
        known: dict[str, SegmentSource] = {}
        indices, previous = [], []
        for number, segment in enumerate(self.segments):
            previous.append(tuple(latest.get(source.fingerprint) for source in segment.sources))
            known.update((source.fingerprint, source) for source in segment.sources)
            latest.update((source.fingerprint, number) for source in segment.sources)
            position = {fingerprint: index for index, fingerprint in enumerate(known)}
            indices.append(np.array([position[source.fingerprint] for source in segment.sources]))
        sources = tuple(
            SourceSpec(s.name, s.fingerprint, s.windows, s.share if latest[s.fingerprint] == number else 0.0)
            for s in known.values()
        )
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "_shares", tuple(np.array([s.share for s in g.sources]) for g in self.segments))
        object.__setattr__(self, "_indices", tuple(indices))
        object.__setattr__(self, "_previous", tuple(previous))

    @staticmethod
    def create(sources: Sequence[SourceSpec], seed: int, seq_length: int) -> Ledger:
        """Return the ledger of a new run. Raises ValueError for no sources, bad weights or the same content twice."""
        return Ledger(seq_length, (_open_segment(0, seed, sources, {}),))

    @property
    def seed(self) -> int:
        """Seed of the first segment: datasets of the run are opened with it, also after a resume with another seed."""
        return self.segments[0].seed

    def sample(self, n: int) -> Sample:
        """Return where sample n comes from."""
        source, epoch, window = self.samples(n, n + 1)
        return Sample(int(source[0]), int(epoch[0]), int(window[0]))

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return source index (into `sources`), epoch and window, int64 (stop - start,) each, of [start, stop)."""
        if not 0 <= start <= stop <= blend.MAX_DRAWS:
            raise ValueError(f"samples [{start}, {stop}) are outside of the ledger: 0 <= start <= stop <= 2**48")
        parts = [np.empty((3, 0), dtype=np.int64)]
        for number, segment in enumerate(self.segments):
            low, high = max(start, segment.start), min(stop, self._end(number, stop))
            if low < high:
                parts.append(self._segment_samples(number, low - segment.start, high - segment.start))
        source, epoch, window = np.concatenate(parts, axis=1)
        return source, epoch, window

    def consumed(self, n: int) -> np.ndarray:
        """Return the samples drawn from each of `sources` in [0, n), int64."""
        total = np.zeros(len(self.sources), dtype=np.int64)
        for number, segment in enumerate(self.segments):
            length = min(n, self._end(number, n)) - segment.start
            if length > 0:
                total[self._indices[number]] += blend.counts(self._shares[number], length)
        return total

    def epochs(self, n: int) -> np.ndarray:
        """Return how often each of `sources` was seen in samples [0, n), float64: draws / windows."""
        return self.consumed(n) / np.array([source.windows for source in self.sources])

    def segment_at(self, n: int) -> int:
        """Return the number of the segment that sample n belongs to."""
        return max(number for number, segment in enumerate(self.segments) if segment.start <= max(n, 0))

    def sources_at(self, n: int) -> list[SourceSpec]:
        """Return what sample n is drawn from, with shares as weights."""
        return [
            SourceSpec(s.name, s.fingerprint, s.windows, s.share) for s in self.segments[self.segment_at(n)].sources
        ]

    def drawn_from(self, start: int, stop: int = blend.MAX_DRAWS) -> set[str]:
        """Return the fingerprints of the sources that samples [start, stop) may come from."""
        segments = self.segments[self.segment_at(start) :]
        return {source.fingerprint for g in segments if g.start < stop for source in g.sources}

    def until(self, n: int) -> Ledger:
        """Return this ledger without the segments from sample n on, which nobody has seen; the first always stays."""
        return Ledger(self.seq_length, tuple(g for i, g in enumerate(self.segments) if i == 0 or g.start < n))

    def unused(self, n: int) -> dict[str, int]:
        """Return by fingerprint the windows of every source's present epoch that samples [0, n) have not drawn."""
        return {fingerprint: remaining for fingerprint, (_, remaining) in self.until(n)._positions(n).items()}

    def append(self, consumed_samples: int, sources: Sequence[SourceSpec], seed: int) -> Ledger:
        """Return this ledger with a segment over `sources` from sample `consumed_samples` on.

        `sources` is the full new list: a known fingerprint goes on with its unused windows, a new one starts fresh, one
        that is left out or has weight 0 is no longer drawn (it goes on where it stopped if a later append lists it).
        Raises ValueError for the same content twice, a name whose content changed, another number of windows for a
        known fingerprint, or a sample before the open segment.
        """
        if consumed_samples < self.segments[-1].start:
            raise ValueError(
                f"cannot append data at sample {consumed_samples}: the open segment starts at sample "
                f"{self.segments[-1].start}; resume from a checkpoint that was written after it"
            )
        problems = differences(self.sources, [s for s in sources if s.weight], appending=True)
        if problems:
            raise ValueError(f"cannot append data: {'; '.join(problems)}")
        segment = _open_segment(consumed_samples, seed, sources, self._positions(consumed_samples))
        return Ledger(self.seq_length, (*self.segments, segment))

    def check(self, sources: Sequence[SourceSpec], seq_length: int, at: int | None = None) -> None:
        """Raise a ValueError that names every difference between this run's data and `sources`.

        Compared is what sample `at` is drawn from (None: the last segment). A file that only moved or was renamed is
        the same source; the order of the list does not matter.
        """
        if seq_length != self.seq_length:
            raise ValueError(
                f"seq_length {seq_length} differs from {self.seq_length} of the checkpoint's data order; "
                f"pass --seq-length {self.seq_length}, or start a new run from the weights with --finetune"
            )
        given = [source for source in sources if source.weight]
        refuse_duplicates(given)
        known = self.sources_at(self.segments[-1].start if at is None else at)
        problems = differences(known, given, appending=False)
        if problems:
            raise ValueError(f"the data differs from the checkpoint's: {'; '.join(problems)}")

    def epoch_table(self, total_samples: int) -> list[EpochRow]:
        """Return what a run of `total_samples` takes from each source, to be printed before step 0."""
        shares = {source.fingerprint: source.weight for source in self.sources_at(total_samples - 1)}
        return [
            EpochRow(s.name, shares.get(s.fingerprint, 0.0), s.windows, int(samples), float(samples / s.windows))
            for s, samples in zip(self.sources, self.consumed(total_samples), strict=True)
        ]

    def check_max_epochs(self, total_samples: int, max_epochs_per_source: float, consumed_samples: int = 0) -> None:
        """Raise ValueError if a run of `total_samples` sees a source more often than `max_epochs_per_source` times.

        Sources from which nothing is drawn after `consumed_samples` are not judged: their past cannot be changed.
        """
        coming = self.drawn_from(consumed_samples, total_samples)
        for source, row in zip(self.sources, self.epoch_table(total_samples), strict=True):
            if source.fingerprint in coming and row.epochs > max_epochs_per_source:
                raise ValueError(
                    f"source {row.name!r} would be seen {row.epochs:.4g} times ({row.samples} samples of {row.windows} "
                    f"windows), more than --max-epochs-per-source {max_epochs_per_source:g}: add data, lower its "
                    "weight, train fewer samples or raise --max-epochs-per-source"
                )

    def to_json(self) -> dict[str, object]:
        """Return the ledger as plain JSON values; floats survive json.dumps and json.loads exactly."""
        return {
            "version": VERSION,
            "seq_length": self.seq_length,
            "segments": [asdict(segment) for segment in self.segments],
        }

    @staticmethod
    def from_json(data: Mapping[str, object]) -> Ledger:
        """Return the ledger that `to_json` wrote. Raises ValueError for anything `to_json` cannot have written."""
        seq_length, segment_rows = read_segments(data, VERSION)
        segments: list[Segment] = []
        positions: dict[str, tuple[int, int]] = {}
        for start, seed, rows in segment_rows:
            if segments:
                positions |= _positions_after(segments[-1], start - segments[-1].start)
            segment = Segment(start, seed, tuple(SegmentSource(**row) for row in rows))
            for source in segment.sources:
                position = positions.get(source.fingerprint, (0, source.windows))
                if position != (source.epoch, source.remaining):
                    raise ValueError(
                        f"data ledger is damaged: source {source.name!r} of the segment at sample {start} should open "
                        f"with (epoch, remaining) {position}, not {(source.epoch, source.remaining)}"
                    )
            segments.append(segment)
        return Ledger(seq_length, tuple(segments))

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of the canonical JSON; two runs with the same one train on the same samples."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _end(self, number: int, open_end: int) -> int:
        """First sample after segment `number`; the last segment is open."""
        return self.segments[number + 1].start if number + 1 < len(self.segments) else open_end

    def _segment_samples(self, number: int, start: int, stop: int) -> np.ndarray:
        """Source index, epoch and window, int64 (3, stop - start), of samples counted from the segment's start."""
        source, draw = blend.draws(self._shares[number], start, stop)
        out = np.empty((3, stop - start), dtype=np.int64)
        out[0] = self._indices[number][source]
        # Not np.unique: its first call imports numpy.ma, as long as all the rest of a start.
        for position in sorted(set(source.tolist())):
            here = np.flatnonzero(source == position)
            out[1:, here] = self._draws_of(number, position, draw[here])
        return out

    def _draws_of(self, number: int, position: int, draw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and window of the given draws of one source of a segment (int64, same shape as `draw`)."""
        source = self.segments[number].sources[position]
        later = draw - source.remaining
        in_first = later < 0
        epoch = np.where(in_first, source.epoch, source.epoch + 1 + later // source.windows)
        place = np.where(in_first, draw, later % source.windows)
        window = np.empty_like(draw)
        rest = in_first & (source.remaining < source.windows)
        if rest.any():
            window[rest] = self._rest_of_epoch(number, position, source.epoch, place[rest])
        whole = np.flatnonzero(~rest)
        if whole.size:
            names = sorted(set(epoch[whole].tolist()))
            which = np.searchsorted(names, epoch[whole])
            keys = np.stack([self._keys(number, source, name) for name in names], axis=1)
            window[whole] = permute(place[whole], source.windows, keys if len(names) == 1 else keys[:, which])
        return epoch, window

    def _rest_of_epoch(self, number: int, position: int, epoch: int, place: np.ndarray) -> np.ndarray:
        """Windows of an epoch that an earlier segment began, at `place` among those it had left."""
        while True:
            source = self.segments[number].sources[position]
            size = source.size(epoch)
            place = permute(place, size, self._keys(number, source, epoch))
            if size == source.windows:
                return place
            earlier = self._previous[number][position]
            assert earlier is not None
            fingerprints = [s.fingerprint for s in self.segments[earlier].sources]
            number, position = earlier, fingerprints.index(source.fingerprint)
            # That segment had drawn all but the last `size` places of its part of the epoch.
            place = place + self.segments[number].sources[position].size(epoch) - size

    def _keys(self, number: int, source: SegmentSource, epoch: int) -> np.ndarray:
        """Keys of the shuffle of one epoch of a source in a segment."""
        return round_keys("window", self.segments[number].seed, number, source.fingerprint, epoch)

    def _positions(self, n: int) -> dict[str, tuple[int, int]]:
        """(epoch, windows left of it, at least 1) of every source ever used, after n samples."""
        positions: dict[str, tuple[int, int]] = {}
        for number, segment in enumerate(self.segments):
            positions |= _positions_after(segment, self._end(number, n) - segment.start)
        return positions


def _positions_after(segment: Segment, length: int) -> dict[str, tuple[int, int]]:
    """(epoch, windows left of it, at least 1) of each source of a segment after `length` samples of it."""
    drawn = blend.counts(np.array([source.share for source in segment.sources]), length)
    return {s.fingerprint: _advance(s, int(count)) for s, count in zip(segment.sources, drawn, strict=True)}


def _advance(source: SegmentSource, drawn: int) -> tuple[int, int]:
    """(epoch, windows left of it) after `drawn` draws in a segment; a finished epoch is the next one, untouched."""
    if drawn < source.remaining:
        return source.epoch, source.remaining - drawn
    epochs, used = divmod(drawn - source.remaining, source.windows)
    return source.epoch + 1 + epochs, source.windows - used


def _open_segment(
    start: int, seed: int, sources: Sequence[SourceSpec], positions: Mapping[str, tuple[int, int]]
) -> Segment:
    """The segment over `sources` at sample `start`; `positions` has (epoch, remaining) of those known before."""
    used = [source for source in sources if source.weight]
    if not used:
        raise ValueError("no data source with a weight above 0; give at least one")
    refuse_duplicates(used)
    for source in used:
        if source.windows < 1:
            raise ValueError(f"source {source.name!r} has no windows; remove it or lower --seq-length")
    shares = blend.normalise([source.weight for source in used])
    opened = []
    for source, share in zip(used, shares, strict=True):
        epoch, remaining = positions.get(source.fingerprint, (0, source.windows))
        opened.append(SegmentSource(source.name, source.fingerprint, share, source.windows, epoch, remaining))
    return Segment(start, seed, tuple(opened))
