"""Rows that say nearly the same: their answers share many short passages. Knows texts, not where rows go."""

from collections import Counter, defaultdict
from itertools import combinations

LENGTH = 5  # characters of a passage
SHARE = 0.3  # of the shorter answer's passages, from which on two are near-duplicates
LEAST = 20  # passages, below which an answer is too short to tell
COMMON = 0.02  # share of the answers, above which a passage that they hold says nothing: 请及时就医
FEW = 10  # answers, up to which it always counts


def pairs(answers: list[str]) -> list[tuple[int, int]]:
    """Places (i, j), i < j, of answers that are near-duplicates of each other, in order."""
    passages = [{text[start : start + LENGTH] for start in range(len(text) - LENGTH + 1)} for text in answers]
    holders = defaultdict(list)
    for place, found in enumerate(passages):
        if len(found) >= LEAST:
            for passage in found:
                holders[passage].append(place)
    shared = Counter()
    for places in holders.values():
        if 1 < len(places) <= max(FEW, COMMON * len(answers)):
            shared.update(combinations(places, 2))
    return sorted(
        pair for pair, count in shared.items() if count >= SHARE * min(len(passages[place]) for place in pair)
    )
