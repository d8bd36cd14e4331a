"""What the ledger refuses: damaged JSON, the same content twice, data that changed between two starts of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from megatron_steel.data import blend, shuffle

# Shares this close are the same weights typed with other digits; the ledger's stay in force.
SHARE_TOLERANCE = 1e-9


class Source(Protocol):
    """What is compared of a source (order.SourceSpec)."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def windows(self) -> int: ...
    @property
    def weight(self) -> float: ...


def refuse_duplicates(sources: Sequence[Source]) -> None:
    """Raise ValueError if two sources have the same content or the same name, naming both."""
    by_content: dict[str, Source] = {}
    by_name: dict[str, Source] = {}
    for source in sources:
        twin = by_content.setdefault(source.fingerprint, source)
        if twin is not source:
            raise ValueError(
                f"sources {twin.name!r} and {source.name!r} have the same content; list it once, with a higher weight "
                "if it should be seen more often"
            )
        if by_name.setdefault(source.name, source) is not source:
            raise ValueError(f"two sources with different content are named {source.name!r}; rename one of the files")


def differences(known: Sequence[Source], given: Sequence[Source], appending: bool) -> list[str]:
    """Return one phrase per difference between the sources of a ledger and those of the user.

    When appending, missing and new sources and other weights are fine; changed content and window counts never are.
    """
    before = {source.fingerprint: source for source in known}
    now = {source.fingerprint: source for source in given}
    missing = {source.name: source for source in known if source.fingerprint not in now}
    problems = []
    for source in given:
        twin = before.get(source.fingerprint)
        if twin is not None and twin.windows != source.windows:
            problems.append(
                f"source {source.name!r} has {source.windows} windows where the checkpoint has {twin.windows}"
            )
        elif twin is None and source.name in missing:
            old = missing.pop(source.name)
            problems.append(
                f"the content of source {source.name!r} changed (fingerprint {source.fingerprint[:12]}, was "
                f"{old.fingerprint[:12]}): restore the file, or give the new content as a file with another name; if "
                "only :max_samples=, :max_tokens= or :fraction= after its path changed, give it as it was"
            )
        elif twin is None and not appending:
            problems.append(f"source {source.name!r} is new: pass --append-data to add it from here on")
    if appending:
        return problems
    problems += [
        f"source {name!r} ({source.fingerprint[:12]}) is missing: give its file again, or pass --append-data to drop it"
        for name, source in missing.items()
    ]
    return problems or _changed_weights(before, given)


def _changed_weights(before: Mapping[str, Source], given: Sequence[Source]) -> list[str]:
    """Return a phrase per source whose share is not the ledger's; both hold the same contents."""
    shares = blend.normalise([source.weight for source in given]) if given else []
    return [
        f"the weight of source {source.name!r} is {share:.6g} of the sum, was {before[source.fingerprint].weight:.6g}: "
        "pass --append-data to change it from here on"
        for source, share in zip(given, shares, strict=True)
        if not math.isclose(share, before[source.fingerprint].weight, rel_tol=SHARE_TOLERANCE)
    ]


def read_segments(data: object, version: int) -> tuple[int, list[tuple[int, int, list[dict[str, Any]]]]]:
    """Check a ledger's JSON; return seq_length and (start, seed, source fields) per segment.

    Raises a ValueError that names the field for anything that is not a ledger of this version.
    """
    top = _object(data, {"version", "seq_length", "segments"}, "the data ledger")
    if top["version"] != version or isinstance(top["version"], bool):
        raise ValueError(f"data ledger has version {top['version']!r}; this program reads version {version}")
    seq_length = _integer(top, "seq_length", 1, 1 << 31, "the data ledger")
    if not isinstance(top["segments"], list) or not top["segments"]:
        raise ValueError("data ledger is damaged: segments is not a list with at least one entry")
    rows: list[tuple[int, int, list[dict[str, Any]]]] = []
    windows_of: dict[str, int] = {}
    for number, entry in enumerate(top["segments"]):
        where = f"segment {number}"
        segment = _object(entry, {"start", "seed", "sources"}, where)
        low = rows[-1][0] if rows else 0
        start = _integer(segment, "start", low, blend.MAX_DRAWS if rows else 0, where)
        seed = _integer(segment, "seed", -(1 << 63), 1 << 63, where)
        if not isinstance(segment["sources"], list | tuple) or not segment["sources"]:
            raise ValueError(f"data ledger is damaged: {where} has no list of sources")
        sources = [_source(source, f"source {i} of {where}") for i, source in enumerate(segment["sources"])]
        _consistent(sources, windows_of, where)
        rows.append((start, seed, sources))
    return seq_length, rows


def _source(data: object, where: str) -> dict[str, Any]:
    """Return the checked fields of a source of a segment."""
    source = _object(data, {"name", "fingerprint", "share", "windows", "epoch", "remaining"}, where)
    for key in ("name", "fingerprint"):
        if not isinstance(source[key], str) or not source[key]:
            raise ValueError(f"data ledger is damaged: {key} of {where} is not a text")
    share = source["share"]
    if not isinstance(share, float) or not blend.MIN_SHARE <= share <= 1.0:
        raise ValueError(f"data ledger is damaged: share of {where} is {share!r}, not a number in (0, 1]")
    windows = _integer(source, "windows", 1, shuffle.MAX_DOMAIN, where)
    _integer(source, "epoch", 0, blend.MAX_DRAWS, where)
    _integer(source, "remaining", 1, windows, where)
    return source


def _consistent(sources: Sequence[Mapping[str, Any]], windows_of: dict[str, int], where: str) -> None:
    """Check the sources of a segment against each other and against `windows_of` the segments before (updated)."""
    for key in ("name", "fingerprint"):
        if len({source[key] for source in sources}) < len(sources):
            raise ValueError(f"data ledger is damaged: two sources of {where} have the same {key}")
    # Shares are correctly rounded quotients, so they add up to 1 within one unit in the last place.
    if abs(math.fsum(source["share"] for source in sources) - 1.0) > 2.0**-50:
        raise ValueError(f"data ledger is damaged: the shares of {where} do not add up to 1")
    for source in sources:
        windows = windows_of.setdefault(str(source["fingerprint"]), int(source["windows"]))
        if windows != source["windows"]:
            raise ValueError(
                f"data ledger is damaged: source {source['name']!r} of {where} has {source['windows']} windows, "
                f"{windows} before"
            )


def _object(data: object, keys: set[str], where: str) -> dict[str, Any]:
    """Return `data` if it is a JSON object with exactly these keys."""
    if not isinstance(data, dict) or set(data) != keys:
        found = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"data ledger is damaged: {where} should have the fields {sorted(keys)}, has {found}")
    return data


def _integer(data: Mapping[str, Any], key: str, low: int, high: int, where: str) -> int:
    """Return data[key] if it is an integer in [low, high]."""
    value = data[key]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"data ledger is damaged: {key} of {where} is {value!r}, not an integer in [{low}, {high}]")
    return value
