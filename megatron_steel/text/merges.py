"""Learning more merges of a byte-pair encoding that is already there.

The rule is that of the first merges (Sennrich et al. 2016, 3.2): the most frequent pair of neighbours becomes one
token, again and again; it only starts from words written in the tokens there are. Merges of the old encoding come
first when a text is encoded, so every new one is reached, and a text without new tokens keeps its ids.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import pairwise

Pair = tuple[int, int]


def merged(word: list[int], pair: Pair, token: int) -> list[int]:
    """A word with every occurrence of a pair, from left to right, replaced by one token."""
    result: list[int] = []
    place = 0
    while place < len(word):
        if place + 1 < len(word) and (word[place], word[place + 1]) == pair:
            result.append(token)
            place += 2
        else:
            result.append(word[place])
            place += 1
    return result


def learn_merges(
    words: Mapping[tuple[int, ...], int], texts: dict[int, str], first_id: int, count: int
) -> list[tuple[str, str]]:
    """The next merges for words (in ids, with how often each occurs), until there are ``count`` new tokens.

    ``texts`` are the tokens' texts by id and gets the new ones, from ``first_id`` on. Ends early when no two tokens
    are neighbours any more. Ties go to the pair with smaller ids, as in the library ``tokenizers``.
    """
    spelled = [list(word) for word in words]
    often = list(words.values())
    ids = {text: index for index, text in texts.items()}
    frequency: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for number, word in enumerate(spelled):
        for pair in pairwise(word):
            frequency[pair] += often[number]
            places[pair].add(number)
    queue = [(-times, pair) for pair, times in frequency.items()]
    heapq.heapify(queue)
    merges: list[tuple[str, str]] = []
    made = 0
    while queue and made < count:
        times, pair = heapq.heappop(queue)
        if -times != frequency[pair]:
            if frequency[pair] > 0:
                heapq.heappush(queue, (-frequency[pair], pair))
            continue
        text = texts[pair[0]] + texts[pair[1]]
        if text not in ids:
            ids[text] = first_id + made
            texts[ids[text]] = text
            made += 1
        merges.append((texts[pair[0]], texts[pair[1]]))
        for changed in replace(spelled, often, pair, ids[text], frequency, places):
            heapq.heappush(queue, (-frequency[changed], changed))
    return merges


def replace(
    spelled: list[list[int]],
    often: list[int],
    pair: Pair,
    token: int,
    frequency: Counter[Pair],
    places: defaultdict[Pair, set[int]],
) -> set[Pair]:
    """Merge a pair in every word that has it and keep the counts; returns the pairs that became more frequent."""
    more: set[Pair] = set()
    for number in places.pop(pair):
        before = Counter(pairwise(spelled[number]))
        spelled[number] = merged(spelled[number], pair, token)
        after = Counter(pairwise(spelled[number]))
        for neighbours in before.keys() | after.keys():
            change = (after[neighbours] - before[neighbours]) * often[number]
            frequency[neighbours] += change
            if after[neighbours]:
                places[neighbours].add(number)
            elif neighbours in places:
                places[neighbours].discard(number)
            if change > 0:
                more.add(neighbours)
    del frequency[pair]
    return more
