"""Stateless shuffles: position -> element of a random order, without ever storing the order.

A balanced Feistel network (Luby and Rackoff 1988, "How to construct pseudorandom permutations") over the smallest
domain of 4**h elements that holds [0, n), with cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite
domains") back into [0, n). The round function is the finaliser of SplitMix64 (Steele, Lea and Flood 2014). All of it
is written out here in 64-bit integer arithmetic, so the order of a run never changes with a numpy release.
"""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 8
MAX_DOMAIN = 1 << 60
# Below 64 elements a Feistel network has too few distinct round functions to reach every order.
MIN_HALF_BITS = 3
# Values worked on at a time: what a round touches stays in a core's cache.
BLOCK = 1 << 14


def round_keys(*parts: int | str) -> np.ndarray:
    """Return the uint64 keys (ROUNDS,) of the shuffle that is named by `parts` (seeds, fingerprints, epochs)."""
    # The length of each part is hashed too: ("a", "bc") and ("ab", "c") must name different shuffles.
    text = "".join(f"{len(str(part))}:{part}," for part in parts)
    digest = hashlib.sha512(b"megatron_steel shuffle 1 " + text.encode()).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permute(positions: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Map positions in [0, size) to elements in [0, size); a bijection for each key.

    positions: int64 (N,). keys: uint64 (ROUNDS,) for one order, or (ROUNDS, N) for one order per position.
    Returns int64 (N,).
    """
    assert 0 < size <= MAX_DOMAIN and keys.shape[0] == ROUNDS
    assert positions.size == 0 or (positions.min() >= 0 and positions.max() < size)
    if size == 1:
        return np.zeros_like(positions)
    half = max(MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
    columns = keys.reshape(ROUNDS, -1)
    elements = _feistel(positions.astype(np.uint64), half, columns)
    outside = np.flatnonzero(elements >= np.uint64(size))
    while outside.size:
        # Following the cycle from a point inside always comes back inside, and stays one to one.
        walked = _feistel(elements[outside], half, columns if columns.shape[1] == 1 else columns[:, outside])
        elements[outside] = walked
        outside = outside[walked >= np.uint64(size)]
    return elements.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """One pass of the network over uint64 values of 2 * half bits; keys (ROUNDS, 1 or N)."""
    shift, size = np.uint64(64 - half), len(values)
    out = np.empty_like(values)
    mixed, scratch = np.empty_like(values[:BLOCK]), np.empty_like(values[:BLOCK])
    for start in range(0, size, BLOCK):
        block = slice(start, min(start + BLOCK, size))
        part, other = mixed[: block.stop - start], scratch[: block.stop - start]
        left = values[block] >> np.uint64(half)
        right = values[block] & np.uint64((1 << half) - 1)
        for key in keys:
            np.add(right, key if key.size == 1 else key[block], out=part)
            _mix(part, other)
            part >>= shift
            left ^= part
            left, right = right, left
        np.left_shift(left, np.uint64(half), out=out[block])
        out[block] |= right
    return out


def _mix(values: np.ndarray, scratch: np.ndarray) -> None:
    """SplitMix64's finaliser in place, modulo 2**64 (numpy arrays wrap silently); `scratch` is overwritten."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(values, np.uint64(shift), out=scratch)
        values ^= scratch
        values *= np.uint64(factor)
    np.right_shift(values, np.uint64(31), out=scratch)
    values ^= scratch
