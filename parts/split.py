"""Which rows train and which validate: by chance, without parting what belongs together, or as a hub has it. Knows no
file format and no row's text but the question that it begins with."""

import random
import re

from parts.rows import Placed, clean, topic

PARTS = {  # words of a file's path
    "train": ("train", "training", "trainset"),
    "val": ("validation", "validate", "valid", "val", "valset", "dev", "devset", "development", "eval", "evaluation"),
    "test": ("test", "testing", "testset", "heldout", "holdout"),
}


def part_of(file: str) -> str:
    """train, val or test: which part of a hub's data set a file is, `data/validation-00000-of-00001.parquet` say."""
    for name in reversed(file.lower().split("/")):  # its own name says more than its folders'
        words = re.split(r"[^a-z]+", name)
        if found := [part for part in PARTS if not set(PARTS[part]).isdisjoint(words)]:
            return found[0]
    return "train"


def by_row(loaded: list[Placed], seed: int, share: float) -> tuple[list[Placed], list[Placed]]:
    """(train, val) of the published training script: shuffled, and cut at this share of the rows."""
    shuffled = list(loaded)
    random.Random(seed).shuffle(shuffled)
    cut = int(len(shuffled) * share)
    return shuffled[:cut], shuffled[cut:]


def by_question(loaded: list[Placed], seed: int, share: float) -> tuple[list[Placed], list[Placed]]:
    """(train, val) likewise, but all rows of one question stay together: where all questions differ, it is the same."""
    train, val = by_row(loaded, seed, share)
    groups: dict[str, list[Placed]] = {}
    for placed in train + val:
        groups.setdefault(question_of(placed), []).append(placed)
    cut, last = len(train), len(groups) - 1
    train, val = [], []
    for place, group in enumerate(groups.values()):
        whole = len(train) < cut and not (place == last and place and not val)  # else there would be none to validate
        (train if whole else val).extend(group)
    return train, val


def question_of(placed: Placed) -> str:
    """What a row is grouped by; a row that cannot be used is a group of its own."""
    place, row = placed
    try:
        return clean(topic(row))
    except (AttributeError, KeyError, IndexError, TypeError):
        return f"\0{place}"


def sample(train: list, val: list, count: int | None, share: float) -> tuple[list, list]:
    """`count` rows, this share of them to train on: the first ones, so that a larger sample contains a smaller one."""
    if count is None or count >= len(train) + len(val):
        return train, val
    cut = max(1, min(round(count * share), count - 1))
    return train[:cut], val[: count - cut]
