"""Rows that say nearly the same: their answers share many short passages. Knows texts, not where rows go."""

import zlib
from collections import Counter, defaultdict
from itertools import combinations

LENGTH = 5  # characters of a passage
SHARE = 0.3  # of the shorter answer's passages, from which on two are near-duplicates
LEAST = 20  # passages of an answer, below which it is too short to tell
FEW, COMMON, MANY = 10, 0.02, 50  # a passage of more answers than 2 % of them, at least 10, at most 50, says nothing
PASSAGES = 2_000_000  # that are held in memory, of more only every n-th: about 400 MB


def pairs(answers: list[str]) -> list[tuple[int, int]]:
    """Places (i, j), i < j, of answers that are near-duplicates of each other, in order. Of very many long answers a
    part of the passages is looked at, the same in all of them: their shares are estimates then. An answer that stands
    there more than COMMON times is paired with its first copy only."""
    every = -(-sum(map(len, answers)) // PASSAGES)
    counts, holders, shared, first, copies = [], defaultdict(list), Counter(), {}, set()
    for place, text in enumerate(answers):
        found = {text[start : start + LENGTH] for start in range(len(text) - LENGTH + 1)}
        if every > 1:
            found = {passage for passage in found if zlib.crc32(passage.encode()) % every == 0}
        counts.append(len(found))
        if len(text) >= LEAST + LENGTH:
            if first.setdefault(text, place) != place:  # of many copies every passage is common
                copies.add((first[text], place))
            for passage in found:
                holders[passage].append(place)
    for places in holders.values():
        if 1 < len(places) <= min(max(FEW, COMMON * len(answers)), MANY):
            shared.update(combinations(places, 2))
    alike = {pair for pair, count in shared.items() if count >= SHARE * min(counts[place] for place in pair)}
    return sorted(alike | copies)
