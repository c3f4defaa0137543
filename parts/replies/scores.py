"""What can be counted of replies: their form, loops, traces in the thinking, lengths, the words that they
share with a reference, speed; with 95% intervals, and the differences of two models. None of it says whether
a reply is medically right. Knows no file and no model."""

import math
import re
from collections import Counter
from functools import lru_cache
from itertools import compress, filterfalse, pairwise
from typing import NamedTuple

import numpy

from parts.model.encoding import Reply
from parts.rows import traces
from parts.rows.row import Row, conversation

# A text loops where LOOP characters in a row stand in it for the third time at least, each with the GRAM - 1
# that follow. Digits, white space and the signs of lists and tables do not count: "1. 多喝水 2. 多喝水 3. …"
# is a loop, the rule of a table is none. Of 120 published rows the most is 16 characters in a thinking, 3 in
# an answer.
LOOP = 50
GRAM = 8
NOT_SAID = re.compile(r"[\s\d|:=_*#.、-]+")
ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
DRAWS = 1000
# With fewer rows in which two models are unlike, chance alone lets all point one way more often than once in
# 20 (sign test: 2 / 2**5 = 6%), although the interval of such a draw may well leave 0.
LEAST_UNLIKE = 6


class Score:
    """One figure of all replies: the sum of their values by the sum of their weights, which is the mean where
    all weigh the same.

    `key` is for programs, `name` for people; a share has the unit "%", and is shown in percent. `values` and
    `weights` have a number for each reply; it weighs 1 where nothing is said, 0 where it does not count, and
    in tokens a second its seconds. `floor` is the score of answers that are held against other questions'
    references. `seed` is that of the draws.
    """

    def __init__(self, key: str, name: str, unit: str, values, weights=None, floor=None, seed: int = 0):
        self.floor = floor
        self.names = {"key": key, "name": name, "unit": unit}
        weights = numpy.ones(len(values)) if weights is None else weights
        # Both sums are drawn together: in a ratio such as tokens a second the rows that are drawn change
        # both.
        self.counts = numpy.stack([numpy.array(values, dtype=float), weights], axis=1)  # [replies, 2]
        self.value = ratios(self.counts.sum(axis=0)[None])[0]  # nan where nothing counts
        self.draws = ratios(draw_counts(len(values), seed) @ self.counts)  # [DRAWS]: the value in each draw

    def as_json(self) -> dict:
        """Return the figures, None where there is none; `n` is how many replies count."""
        figures = {"n": int(self.counts.any(axis=1).sum()), "value": none_if_nan(self.value)}
        return self.names | figures | {"floor": self.floor} | bounds(self.draws)

    def compare(self, other: "Score") -> dict:
        """Return the difference from another model's score on the same questions, by the paired bootstrap. It
        `differs` only where the interval leaves 0, and at least LEAST_UNLIKE rows are unlike."""
        interval = bounds(self.draws - other.draws)
        unlike = (self.counts != other.counts).any(axis=1).sum()
        leaves_zero = interval["low"] is not None and not interval["low"] <= 0 <= interval["high"]
        figures = {"n": len(self.counts), "value": none_if_nan(self.value), "other": none_if_nan(other.value)}
        figures["difference"] = none_if_nan(self.value - other.value)
        figures["differs"] = bool(leaves_zero and unlike >= LEAST_UNLIKE)
        return self.names | figures | interval


class Measured(NamedTuple):
    """What `measure` finds in one model's replies."""

    scores: dict[str, Score]  # by their keys, in the order of the tables
    rouge_l: numpy.ndarray  # [replies], nan where the row has no reference
    traces: list[list[traces.Trace]]  # those in the thinking of each reply


def ratios(sums: numpy.ndarray) -> numpy.ndarray:
    """Return the ratios of [n, 2] sums; nan where nothing counts."""
    return numpy.divide(sums[:, 0], sums[:, 1], out=numpy.full(len(sums), math.nan), where=sums[:, 1] != 0)


def none_if_nan(value: float) -> float | None:
    """Return a number for JSON, which knows no nan."""
    return None if math.isnan(value) else float(value)


def bounds(draws: numpy.ndarray) -> dict:
    """Return the bounds of the middle 95%. Where all draws are alike, as of a share that no row has, they are
    one number; where nothing counts they are None."""
    # A draw may hold none of the few rows that count: it has no ratio, and says nothing about the others'.
    draws = draws[~numpy.isnan(draws)]
    low, high = numpy.percentile(draws, [2.5, 97.5]).tolist() if len(draws) else (None, None)
    return {"low": low, "high": high}


# The draws of 241 rows are 2 MB, and each score of each model wants the same ones.
@lru_cache(maxsize=8)
def draw_counts(rows: int, seed: int) -> numpy.ndarray:
    """Return [DRAWS, rows]: how often each row is in each draw, with replacement. The draws are the same for
    all models, which makes their differences paired."""
    return numpy.random.default_rng(seed).multinomial(rows, numpy.full(rows, 1 / rows), DRAWS)


def loops(text: str) -> bool:
    """Tell whether a text says the same again and again."""
    text, seen, run = NOT_SAID.sub("", text), Counter(), 0
    for start in range(len(text) - GRAM + 1):
        gram = text[start : start + GRAM]
        run = run + 1 if seen[gram] >= 2 else 0
        if run >= LOOP:
            return True
        seen[gram] += 1
    return False


def is_whole(reply: Reply, thinking: bool = True) -> bool:
    """Tell whether there is an answer, after exactly one thinking that is closed and not empty; or after
    none, where none was asked for."""
    formed = reply.form == "one" and reply.thinking if thinking else reply.form == "none"
    return bool(formed and reply.answer)


def final_answer(reply: Reply) -> str:
    """Return the answer that is held against a reference, or shown to a judge."""
    # A reply that was cut off inside its thinking came to no answer: what it wrote before it began to think,
    # or between two thinkings, must not score.
    return "" if reply.form == "unclosed" else reply.answer


# References are cut once for all models, and again as the reference of another question.
@lru_cache(maxsize=4096)
def cut_words(text: str) -> tuple[str, ...]:
    """Return the words and signs of a text, without white space."""
    import rjieba

    # rouge-score's own tokenizer drops all Chinese; a Chinese text has words only once they are cut.
    return tuple(filterfalse(str.isspace, rjieba.cut(text)))


def f1(one: Counter, other: Counter) -> float:
    """Return F1 of two bags of n-grams, from 0 to 1: what both have, as often as both have it."""
    return 2 * (one & other).total() / max(one.total() + other.total(), 1)


def rouge(text: str, reference: str) -> list[float]:
    """Return F1 of ROUGE-1, ROUGE-2 and ROUGE-L over words, from 0 to 1, as rouge-score defines them: of
    shared words, of shared pairs of words, and of the longest common subsequence. Only letters are
    compared."""
    from rapidfuzz.distance import LCSseq

    one, other = cut_words(text), cut_words(reference)
    subsequence = LCSseq.similarity(one, other)
    return [
        f1(Counter(one), Counter(other)),
        f1(Counter(pairwise(one)), Counter(pairwise(other))),
        2 * subsequence / max(len(one) + len(other), 1),
    ]


def draw_references(rows: list[Row], seed: int) -> list[str]:
    """Return for each row the reference of another one, drawn, whose question and reference differ from its
    own; [] where a row has no such other."""
    order = numpy.random.default_rng(seed).permutation(len(rows)).tolist()
    references = [""] * len(rows)
    for turn, i in enumerate(order):
        for other in order[turn + 1 :] + order[:turn]:
            if rows[other]["question"] != rows[i]["question"] and rows[other]["answer"] != rows[i]["answer"]:
                references[i] = rows[other]["answer"]
                break
        else:
            return []
    return references


def overlaps(replies: list[Reply], references: list[str]) -> numpy.ndarray:
    """Return [replies, 3]: ROUGE of each answer and its reference, nan where there is no reference."""
    shares = numpy.full((len(replies), len(ROUGE)), math.nan)
    for i, (reply, reference) in enumerate(zip(replies, references)):
        if reference:
            shares[i] = rouge(final_answer(reply), reference)
    return shares


def overlap_scores(rows: list[Row], replies: list[Reply], shares, seed: int) -> dict[str, Score]:
    """Return the scores of `shares` [rows, 3], what `overlaps` says of the rows' own references; and once
    more without the rows that stand in the training part too, where there are both."""
    has_reference = ~numpy.isnan(shares[:, 0])
    if not has_reference.any():
        return {}
    rows, replies = list(compress(rows, has_reference)), list(compress(replies, has_reference))
    shares = shares[has_reference]
    # Two texts of one language share words, whatever they say: only what is above this floor tells anything.
    references = draw_references(rows, seed)
    floors = overlaps(replies, references)
    new = numpy.array([not row.get("seen") for row in rows])
    parts = {"": slice(None)}
    if new.any() and not new.all():
        parts["_new"] = new
    scores = {}
    for ending, part in parts.items():
        label = "（新题）" if ending else ""
        for i, (kind, name) in enumerate(ROUGE.items()):
            key, name = f"answer_{kind}{ending}", f"回答 {name}{label}"
            floor = float(floors[part, i].mean()) if references else None
            scores[key] = Score(key, name, "0–1", shares[part, i], floor=floor, seed=seed)
    return scores


def measure(rows: list[Row], replies: list[Reply], thinking: bool, seed: int) -> Measured:
    """Return all that is counted of the `replies` to the questions of `rows`, at least one. `thinking`: it
    was asked for. `seed` is that of the draws."""
    scores, found, kinds = {}, [], []
    for row, reply in zip(rows, replies):
        # What the asker said in earlier turns was said: a thinking that speaks of it cites no hidden answer.
        marks = traces.find(reply.thinking, conversation(row), reply.answer)
        found.append(marks)
        kinds.append({trace.kind for trace in marks})

    def add(key: str, name: str, unit: str, values, weights=None) -> None:
        scores[key] = Score(key, name, unit, values, weights, seed=seed)

    thinkings, answers, complete, forms, tokens, seconds = zip(*replies)  # the fields of Reply
    add("whole", "完整的回复", "%", [is_whole(reply, thinking) for reply in replies])
    add("stopped", "正常结束", "%", complete)
    add("loops", "重复循环", "%", [loops(reply.thinking) or loops(reply.answer) for reply in replies])
    if thinking:
        add("traces", "思考有答案泄露", "%", list(map(bool, kinds)))
        for kind, name in traces.KINDS.items():
            add(f"traces_{kind}", f"- {name}", "%", [kind in present for present in kinds])
        add("think_length", "思考的字数", "字", list(map(len, thinkings)))
    # A reply that was cut off inside its thinking has no answer to measure: it does not count, not even as 0.
    closed = numpy.array(forms) != "unclosed"
    add("answer_length", "回答的字数", "字", numpy.where(closed, list(map(len, answers)), 0), closed)
    shares = overlaps(replies, [row.get("answer") for row in rows])
    scores |= overlap_scores(rows, replies, shares, seed)
    # The replies of a batch share one speed, so what is drawn varies less than batches do.
    add("speed", "每秒 token", "token/秒", tokens, seconds)
    return Measured(scores, shares[:, 2], found)
