"""What can be counted of replies: whole or not, loops, traces in the thinking, lengths, the words that they share with
a reference, speed; with 95 % intervals, and the differences of two models. None of it says whether a reply is medically
right. Knows no file and no model."""

import math
import re
from collections import Counter
from functools import lru_cache

import numpy

from parts.model.encoding import Reply
from parts.rows import traces
from parts.rows.row import Row

# A text loops where LOOP characters in a row stand in it for the third time at least, each with the GRAM - 1 that
# follow. Digits, white space and the signs of lists and tables do not count: "1. 多喝水 2. 多喝水 3. …" is a loop, the
# rule of a table is none. Of 120 published rows the most is 16 characters in a thinking, 3 in an answer.
LOOP = 50
GRAM = 8
NOT_SAID = re.compile(r"[\s\d|:=_*#.、-]+")
ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
DRAWS = 1000
# With fewer rows in which two models are unlike, chance alone lets all point one way more often than once in 20
# (sign test: 2 / 2**5 = 6 %), although the interval of such a draw may well leave 0.
LEAST_UNLIKE = 6


class Score:
    """One thing that is counted of all replies: the ratio of two sums over them, the mean of what counts, say.

    `key` is for programs, `name` for people; a share has the unit "%", and is shown in percent. `values` are one for
    each reply, each counted `of` so much: 1 where nothing is said, 0 in a reply that does not count. `floor` is what
    answers get that are held against other questions' references. `seed` is that of the draws.
    """

    def __init__(
        self, key: str, name: str, unit: str, values, of=None, floor: float | None = None, seed: int = 0
    ):
        self.key, self.floor = key, floor
        self.names = {"key": key, "name": name, "unit": unit}
        of = numpy.ones(len(values)) if of is None else of
        self.counts = numpy.stack([numpy.array(values, dtype=float), of], axis=1)  # [replies, 2]
        self.value = divide(self.counts.sum(axis=0)[None])[0]  # nan where nothing counts
        self.draws = divide(draw(len(self.counts), seed) @ self.counts)  # [DRAWS]: the value in each draw

    def as_json(self) -> dict:
        """Return the figures, None where there is none; `n` is how many replies count."""
        n = int(self.counts.any(axis=1).sum())
        return self.names | {"n": n, "value": plain(self.value), "floor": self.floor} | middle(self.draws)

    def compare(self, other: "Score") -> dict:
        """Hold this score against another model's on the same questions, by the paired bootstrap. `differs` only where
        the interval leaves 0, and enough rows are unlike."""
        bounds = middle(self.draws - other.draws)
        unlike = (self.counts != other.counts).any(axis=1).sum()
        differs = (
            bounds["low"] is not None and not bounds["low"] <= 0 <= bounds["high"] and unlike >= LEAST_UNLIKE
        )
        figures = {"n": len(self.counts), "value": plain(self.value), "other": plain(other.value)}
        figures |= {"difference": plain(self.value - other.value), "differs": bool(differs)}
        return self.names | figures | bounds


def divide(sums: numpy.ndarray) -> numpy.ndarray:
    """Return the ratios of [n, 2] sums; nan where nothing counts."""
    return numpy.divide(sums[:, 0], sums[:, 1], out=numpy.full(len(sums), math.nan), where=sums[:, 1] != 0)


def plain(value: float) -> float | None:
    """Return a number for JSON, which knows no nan."""
    return None if math.isnan(value) else float(value)


def middle(draws: numpy.ndarray) -> dict:
    """Return the bounds of the middle 95 %. Where all draws are alike, as of a share that no row has, they are one."""
    draws = draws[~numpy.isnan(draws)]
    low, high = numpy.percentile(draws, [2.5, 97.5]).tolist() if len(draws) else (None, None)
    return {"low": low, "high": high}


@lru_cache(maxsize=8)
def draw(rows: int, seed: int) -> numpy.ndarray:
    """Return [DRAWS, rows]: how often each row is in each draw, with replacement. The draws are the same for all
    models, which makes their differences paired."""
    return numpy.random.default_rng(seed).multinomial(rows, numpy.full(rows, 1 / rows), DRAWS)


def loops(text: str) -> bool:
    """Whether a text says the same again and again."""
    text, seen, run = NOT_SAID.sub("", text), Counter(), 0
    for start in range(len(text) - GRAM + 1):
        gram = text[start : start + GRAM]
        run = run + 1 if seen[gram] >= 2 else 0
        if run >= LOOP:
            return True
        seen[gram] += 1
    return False


def whole(reply: Reply, thinking: bool = True) -> bool:
    """Whether there is an answer, after exactly one thinking that is closed and not empty; or after none, where none
    was asked for."""
    formed = reply.form == "one" and reply.thinking if thinking else reply.form == "none"
    return bool(formed and reply.answer)


def asked(row: Row) -> str:
    """Return the questions of earlier turns, and the one that is answered, a line each."""
    return "\n".join([*(question for question, _ in row.get("history") or []), row["question"]])


def find_traces(row: Row, reply: Reply) -> list[traces.Trace]:
    """Return the traces, in a reply's thinking, of how the training data were made. What the asker said in earlier
    turns counts as said."""
    return traces.find(reply.thinking, asked(row), reply.answer)


def written(reply: Reply) -> str:
    """Return the answer that is held against a reference: that of a reply that was cut off inside its thinking is none,
    and shares nothing with any."""
    return "" if reply.form == "unclosed" else reply.answer


@lru_cache(maxsize=4096)
def words(text: str) -> tuple[str, ...]:
    """Return the words and signs of a text, without white space."""
    import rjieba

    return tuple(word for word in rjieba.cut(text) if not word.isspace())


def rouge(text: str, reference: str) -> list[float]:
    """Return F1 of each of ROUGE over words, from 0 to 1, as rouge-score defines it: n-grams that both have, as often
    as both have them, and the longest common subsequence. Only letters are compared."""
    from rapidfuzz.distance import LCSseq

    one, other = words(text), words(reference)
    shared = []
    for size in (1, 2):
        grams = [Counter(zip(*(tokens[i:] for i in range(size)))) for tokens in (one, other)]
        shared.append((grams[0] & grams[1]).total() / max(sum(gram.total() for gram in grams), 1))
    shared.append(LCSseq.similarity(one, other) / max(len(one) + len(other), 1))
    return [2 * share for share in shared]


def strangers(rows: list[Row], seed: int) -> list[Row]:
    """Return for each row another one, drawn, with another question and another reference; [] where one has none."""
    order = numpy.random.default_rng(seed).permutation(len(rows)).tolist()
    others: dict[int, Row] = {}
    for turn, i in enumerate(order):
        for other in order[turn + 1 :] + order[:turn]:
            if rows[other]["question"] != rows[i]["question"] and rows[other]["answer"] != rows[i]["answer"]:
                others[i] = rows[other]
                break
    return [others[i] for i in range(len(rows))] if len(others) == len(rows) else []


def overlap(rows: list[Row], replies: list[Reply], seed: int) -> list[Score]:
    """Return how much the answers share with those of the rows that have one; and once more without the rows that stand
    in the training part too, where there are both."""
    known = [(row, written(reply)) for row, reply in zip(rows, replies) if row.get("answer")]
    if not known:
        return []
    others = strangers([row for row, _ in known], seed)
    values = numpy.array([rouge(text, row["answer"]) for row, text in known])
    floors = numpy.array([rouge(text, other["answer"]) for (_, text), other in zip(known, others)])
    new = numpy.array([not row.get("seen") for row, _ in known])
    parts = [("", "", slice(None))]
    if new.any() and not new.all():
        parts.append(("_new", "（新题）", new))
    scores = []
    for ending, label, part in parts:
        for i, (kind, name) in enumerate(ROUGE.items()):
            floor = float(floors[part, i].mean()) if others else None
            key, name = f"answer_{kind}{ending}", f"回答 {name}{label}"
            scores.append(Score(key, name, "0–1", values[part, i], floor=floor, seed=seed))
    return scores


def measure(rows: list[Row], replies: list[Reply], thinking: bool, seed: int) -> list[Score]:
    """Return all that is counted of the `replies` to the questions of `rows`, at least one. `thinking`: it was asked
    for. `seed` is that of the draws."""
    scores = []

    def add(key: str, name: str, unit: str, values, of=None) -> None:
        scores.append(Score(key, name, unit, values, of, seed=seed))

    add("whole", "完整的回复", "%", [whole(reply, thinking) for reply in replies])
    add("stopped", "自己停下", "%", [reply.complete for reply in replies])
    add("loops", "原地打转", "%", [loops(reply.thinking) or loops(reply.answer) for reply in replies])
    if thinking:
        kinds = [{trace.kind for trace in find_traces(row, reply)} for row, reply in zip(rows, replies)]
        add("traces", "思考有制作的痕迹", "%", [bool(found) for found in kinds])
        for kind, name in traces.KINDS.items():
            add(f"traces_{kind}", f"- {name}", "%", [kind in found for found in kinds])
        add("think_length", "思考的字数", "字", [len(reply.thinking) for reply in replies])
    closed = numpy.array(
        [float(reply.form != "unclosed") for reply in replies]
    )  # else there is no answer to measure
    add("answer_length", "回答的字数", "字", [len(reply.answer) for reply in replies] * closed, closed)
    scores += overlap(rows, replies, seed)
    # The replies of a batch share one speed, so what is drawn varies less than batches do.
    seconds = [reply.seconds for reply in replies]
    add("speed", "每秒 token", "token/秒", [reply.tokens for reply in replies], seconds)
    return scores
