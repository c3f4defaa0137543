"""What can be counted of replies: their form, what a check-up finds, loops, traces in the thinking, lengths,
the words that they share with a reference, speed; with 95% intervals, and the differences of two models. None
of it says whether a reply is medically right. Knows no file and no model."""

import math
import re
from collections import Counter
from functools import lru_cache
from itertools import compress, filterfalse, pairwise
from typing import NamedTuple

import numpy

from parts.model.encoding import Reply
from parts.replies import checkup
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
RECALLS = {f"{kind}_recall": f"{name} 召回" for kind, name in ROUGE.items()}
OVERLAPS = ROUGE | RECALLS  # F1 favours the answer that is as short as the reference, recall the longer one
# Where answers are so many times as long as the other model's, what they share with a reference is read as
# nothing: ten answers of 177 characters had F1 0.469 and recall 0.452, ten of 626 had 0.277 and 0.548.
LENGTH_RATIO = 1.5
DRAWS = 1000
Z = 1.959964  # the normal distribution's 97.5%
# With fewer rows in which two models are unlike, chance alone lets all point one way more often than once in
# 20 (sign test: 2 / 2**5 = 6%), although the interval of such a draw may well leave 0.
LEAST_UNLIKE = 6


class Score:
    """One figure of all replies: the sum of their values by the sum of their weights, which is the mean where
    all weigh the same.

    `key` is for programs, `name` for people; a share has the unit "%", is shown in percent, and its weights
    are 0 and 1. `values` and `weights` have a number for each reply; it weighs 1 where nothing is said, 0
    where it does not count, and in tokens a second its seconds. `better` is 1 where a high figure is better,
    -1 where a low one is, 0 where neither is. `floor` is the score of answers that are held against other
    questions' references. `seed` is that of the draws.
    """

    def __init__(self, key, name, unit, values, weights=None, floor=None, better: int = 0, seed: int = 0):
        self.floor, self.better = floor, better
        self.names = {"key": key, "name": name, "unit": unit, "better": better}
        weights = numpy.ones(len(values)) if weights is None else weights
        # Both sums are drawn together: in a ratio such as tokens a second the rows that are drawn change
        # both.
        self.counts = numpy.stack([numpy.array(values, dtype=float), weights], axis=1)  # [replies, 2]
        self.value = ratios(self.counts.sum(axis=0)[None])[0]  # nan where nothing counts
        self.seed = seed

    def draws(self) -> numpy.ndarray:
        """Return the value in each draw, [DRAWS]; nobody asks for those of a share."""
        return ratios(draw_counts(len(self.counts), self.seed) @ self.counts)

    def as_json(self) -> dict:
        """Return the figures, None where there is none; `n` is how many replies count."""
        figures = {"n": int(self.counts.any(axis=1).sum()), "value": none_if_nan(self.value)}
        if self.names["unit"] == "%":
            interval = wilson(*self.counts.sum(axis=0))
        else:
            interval = bounds(self.draws())
        return self.names | figures | {"floor": self.floor} | interval

    def compare(self, other: "Score") -> dict:
        """Return the difference from another model's score on the same questions, with its interval: shares
        by Newcombe's method for pairs, others by the paired bootstrap. It `differs` only where the interval
        leaves 0, and at least LEAST_UNLIKE rows are unlike."""
        if self.names["unit"] == "%":
            interval = newcombe(self.counts, other.counts)
        else:
            interval = bounds(self.draws() - other.draws())
        unlike = (self.counts != other.counts).any(axis=1).sum()
        leaves_zero = interval["low"] is not None and not interval["low"] <= 0 <= interval["high"]
        figures = {"n": len(self.counts), "value": none_if_nan(self.value), "other": none_if_nan(other.value)}
        figures["difference"] = none_if_nan(self.value - other.value)
        figures["differs"] = bool(leaves_zero and unlike >= LEAST_UNLIKE)
        return self.names | figures | interval


class Measured(NamedTuple):
    """What `measure` finds in one model's replies."""

    scores: dict[str, Score]  # by their keys, in the order of the tables
    traces: list[list[traces.Trace]]  # those in the thinking of each reply
    faults: list[list[str]]  # what a check-up finds in each reply; nothing in one to another question


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


def wilson(count: float, total: float) -> dict:
    """Return the bounds of a share's 95% interval (Wilson 1927), None of none: that of 0 in 20 reaches to
    16%, where the bootstrap would say 0%."""
    if not total:
        return {"low": None, "high": None}
    middle = count + Z * Z / 2
    half = Z * (count * (total - count) / total + Z * Z / 4) ** 0.5
    return {"low": float((middle - half) / (total + Z * Z)), "high": float((middle + half) / (total + Z * Z))}


def newcombe(ours: numpy.ndarray, theirs: numpy.ndarray) -> dict:
    """Return the bounds of the 95% interval of the difference of two shares of the same replies [n, 2], made
    of the shares' own intervals and of how much they go together (Newcombe 1998, Statistics in Medicine 17,
    2635, method 10 without its continuity correction)."""
    both = (ours[:, 1] > 0) & (theirs[:, 1] > 0)
    if not both.any():
        return {"low": None, "high": None}
    shares, gaps = [], []
    for values in (ours[both, 0], theirs[both, 0]):
        share, interval = values.mean(), wilson(values.sum(), len(values))
        shares.append(share)
        gaps.append((share - interval["low"], interval["high"] - share))
    varies = all(0 < share < 1 for share in shares)
    together = numpy.corrcoef(ours[both, 0], theirs[both, 0])[0, 1] if varies else 0
    (below, above), (other_below, other_above) = gaps
    difference = shares[0] - shares[1]
    # Rounding can leave a little less than 0 where both say the same of every reply.
    down = max(below**2 - 2 * together * below * other_above + other_above**2, 0)
    up = max(above**2 - 2 * together * above * other_below + other_below**2, 0)
    return {"low": float(difference - down**0.5), "high": float(difference + up**0.5)}


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


def rouge(text: str, reference: str) -> list[float]:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L over words, from 0 to 1, as rouge-score defines them: of shared
    words, of shared pairs of words, and of the longest common subsequence; first their F1, then their
    recalls, the share of the reference that the text has. Only letters are compared."""
    from rapidfuzz.distance import LCSseq

    one, other = cut_words(text), cut_words(reference)
    pairs, other_pairs = Counter(pairwise(one)), Counter(pairwise(other))
    shared = (Counter(one) & Counter(other)).total(), (pairs & other_pairs).total()
    shared += (LCSseq.similarity(one, other),)
    # How many words and pairs there are; there is one pair less than words.
    sizes, other_sizes = (len(one), pairs.total(), len(one)), (len(other), other_pairs.total(), len(other))
    f1, recall = [], []
    for count, size, other_size in zip(shared, sizes, other_sizes):
        f1.append(2 * count / max(size + other_size, 1))
        recall.append(count / max(other_size, 1))
    return f1 + recall


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
    """Return [replies, 6]: `rouge` of each answer and its reference, nan where there is no reference."""
    shares = numpy.full((len(replies), len(OVERLAPS)), math.nan)
    for i, (reply, reference) in enumerate(zip(replies, references)):
        if reference:
            shares[i] = rouge(final_answer(reply), reference)
    return shares


def overlap_scores(rows: list[Row], replies: list[Reply], shares, seed: int) -> dict[str, Score]:
    """Return the scores of `shares` [rows, 6], what `overlaps` says of the rows' own references; and once
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
        for i, (kind, name) in enumerate(OVERLAPS.items()):
            key, name = f"answer_{kind}{ending}", f"回答 {name}{label}"
            floor = float(floors[part, i].mean()) if references else None
            scores[key] = Score(key, name, "0–1", shares[part, i], floor=floor, better=1, seed=seed)
    return scores


def measure(rows: list[Row], replies: list[Reply], thinking: bool, seed: int) -> Measured:
    """Return all that is counted of the `replies` to the questions of `rows`, at least one. `thinking`: it
    was asked for. `seed` is that of the draws."""
    scores, found, kinds, faults = {}, [], [], []
    for row, reply in zip(rows, replies):
        # What the asker said in earlier turns was said: a thinking that speaks of it cites no hidden answer.
        marks = traces.find(reply.thinking, conversation(row), reply.answer)
        found.append(marks)
        kinds.append({trace.kind for trace in marks})
        faults.append(checkup.find_faults(row, final_answer(reply)))

    def add(key: str, name: str, unit: str, values, weights=None, better: int = 0) -> None:
        scores[key] = Score(key, name, unit, values, weights, better=better, seed=seed)

    for key, (name, asked) in checkup.group(rows).items():
        asked = numpy.array(asked)
        passed = asked & ~numpy.array(list(map(bool, faults)))
        add(f"checkup_{key}", name, "%", passed, asked, better=1)
    thinkings, answers, complete, forms, tokens, seconds = zip(*replies)  # the fields of Reply
    add("whole", "完整的回复", "%", [is_whole(reply, thinking) for reply in replies], better=1)
    add("stopped", "正常结束", "%", complete, better=1)
    looping = [loops(reply.thinking) or loops(reply.answer) for reply in replies]
    add("loops", "重复循环", "%", looping, better=-1)
    if thinking:
        add("traces", "思考有答案泄露", "%", list(map(bool, kinds)), better=-1)
        for kind, name in traces.KINDS.items():
            add(f"traces_{kind}", f"- {name}", "%", [kind in present for present in kinds], better=-1)
        add("think_length", "思考的字数", "字", list(map(len, thinkings)))
    # A reply that was cut off inside its thinking has no answer to measure: it does not count, not even as 0.
    closed = numpy.array(forms) != "unclosed"
    add("answer_length", "回答的字数", "字", numpy.where(closed, list(map(len, answers)), 0), closed)
    shares = overlaps(replies, [row.get("answer") for row in rows])
    scores |= overlap_scores(rows, replies, shares, seed)
    # The replies of a batch share one speed, so what is drawn varies less than batches do.
    add("speed", "每秒 token", "token/秒", tokens, seconds)
    return Measured(scores, found, faults)


def compare_all(first: dict[str, Score], other: dict[str, Score]) -> list[dict]:
    """Return the difference of each score that both models have, with its `judgement` on the first one:
    better, worse, different where neither is, unclear, or length where the answers' lengths alone may make
    it."""
    lengths = [scores["answer_length"].value for scores in (first, other)]
    # Of a model that came to no answer the length is nan, and the comparison False.
    unlike_lengths = max(lengths) > LENGTH_RATIO * min(lengths)
    lines = []
    for key, score in first.items():
        # A speed is the machine's and the batches', not the model's.
        if key not in other or key == "speed":
            continue
        line = score.compare(other[key])
        judgement = "unclear"
        if unlike_lengths and key.startswith("answer_rouge"):
            judgement = "length"
        elif line["differs"] and not score.better:
            judgement = "different"
        elif line["differs"]:
            judgement = "better" if line["difference"] * score.better > 0 else "worse"
        lines.append(line | {"judgement": judgement})
    return lines
