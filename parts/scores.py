"""What can be counted of replies: whole or not, loops, traces in the thinking, lengths, what they share with a
reference, speed. None of it says whether a reply is medically right. Knows no file and no model."""

import re
from collections import Counter

import numpy

from parts import overlaps, traces
from parts.encoding import Reply
from parts.intervals import Measure, ratio
from parts.rows import Row, clean

# A text loops where LOOP characters in a row stand in it for the third time at least, each with the GRAM - 1 that
# follow. Digits, white space and the signs of lists and tables do not count: "1. 多喝水 2. 多喝水 3. …" is a loop, the
# rule of a table is none. Of 120 published rows the most is 16 characters in a thinking, 3 in an answer.
LOOP = 50
GRAM = 8
NOT_SAID = re.compile(r"[\s\d|:=_*#.、-]+")


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


def in_loop(reply: Reply) -> bool:
    """Whether one of its two texts is such."""
    return loops(reply.thinking) or loops(reply.answer)


def whole(reply: Reply, thinking: bool = True) -> bool:
    """Whether there is an answer, after exactly one thinking that is closed and not empty; or after none, where none
    was asked for."""
    formed = reply.form == "one" and reply.thinking if thinking else reply.form == "none"
    return bool(formed and reply.answer)


def asked(row: Row) -> list[str]:
    """The questions of earlier turns, and the one that is answered."""
    return [question for question, _ in row.get("history") or []] + [row["question"]]


def find_traces(row: Row, reply: Reply) -> list[traces.Trace]:
    """Of how the training data were made, in a reply's thinking. What the asker said in earlier turns counts as
    said."""
    return traces.find(reply.thinking, "\n".join(asked(row)), reply.answer)


def reference(row: Row, field: str) -> str | None:
    """The row's own text to hold a reply against, or None."""
    text = row.get(field)
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) and clean(text) else None


def written(reply: Reply, field: str) -> str:
    """What is held against a reference: of a reply that was cut off inside its thinking nothing, and it shares nothing
    with any. BLEU hears of that only by the sum of all lengths, so it is to be read beside the share of whole ones."""
    return "" if reply.form == "unclosed" else reply.thinking if field == "think" else reply.answer


def overlap(rows: list[Row], replies: list[Reply], field: str, name: str, corpus: bool) -> list[Measure]:
    """The overlaps of the answers, or thinkings, with those of the rows that have one."""
    pairs = [(row, reply, text) for row, reply in zip(rows, replies) if (text := reference(row, field))]
    if not pairs:
        return []
    texts = [written(reply, field) for _, reply, _ in pairs]
    references = [text for _, _, text in pairs]
    others = overlaps.strangers([row["question"] for row, _, _ in pairs], references)
    found = overlaps.statistics(texts, references, corpus)
    floor = overlaps.statistics(texts, [references[place] for place in others], corpus) if others else {}
    names = overlaps.ROUGE | overlaps.CORPUS
    measures = [
        Measure(
            f"{field}_{kind}",
            f"{name} {names[kind]}",
            "0–1" if kind in overlaps.ROUGE else "0–100",
            found[kind],
            total,
            floor.get(kind),
        )
        for kind, total in overlaps.totals(found).items()
    ]
    new = numpy.array([not row.get("seen") for row, _, _ in pairs])
    if new.all() or not new.any():
        return measures
    return measures + [
        each._replace(
            key=f"{each.key}_new",
            name=f"{each.name}（新题）",
            statistics=each.statistics[new],
            floor=each.floor[new] if others else None,
        )
        for each in measures
    ]


def measure(rows: list[Row], replies: list[Reply], thinking: bool = True) -> list[Measure]:
    """All of it, for the `replies` to the questions of `rows`, at least one. `thinking`: it was asked for."""
    ones = numpy.ones(len(replies))

    def mean(key: str, name: str, unit: str, values, of=ones) -> Measure:
        return Measure(key, name, unit, numpy.stack([numpy.array(values, dtype=float), of], axis=1), ratio)

    closed = numpy.array([float(reply.form != "unclosed") for reply in replies])  # else there is no answer to measure
    found = [{trace.kind for trace in find_traces(row, reply)} for row, reply in zip(rows, replies)]
    seconds = numpy.array([reply.seconds for reply in replies])
    measures = [
        mean("whole", "完整的回复", "%", [whole(reply, thinking) for reply in replies]),
        mean("stopped", "自己停下", "%", [reply.complete for reply in replies]),
        mean("loops", "原地打转", "%", [in_loop(reply) for reply in replies]),
    ]
    if thinking:
        measures += [mean("traces", "思考有制作的痕迹", "%", [bool(kinds) for kinds in found])]
        for kind, name in traces.KINDS.items():
            measures += [mean(f"traces_{kind}", f"- {name}", "%", [kind in kinds for kinds in found])]
        measures += [mean("think_length", "思考的字数", "字", [len(reply.thinking) for reply in replies])]
    lengths = [len(reply.answer) for reply in replies] * closed
    measures += [mean("answer_length", "回答的字数", "字", lengths, of=closed)]
    measures += overlap(rows, replies, "answer", "回答", corpus=True)
    if thinking:
        measures += overlap(rows, replies, "think", "思考", corpus=False)
    # The replies of a batch share one speed, so what is drawn varies less than batches do.
    return measures + [mean("speed", "每秒 token", "token/秒", [reply.tokens for reply in replies], of=seconds)]
