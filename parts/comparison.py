"""What replies to the same questions come to: one model's scores, and how each other's differ; as tables, as JSON, and
question by question. Knows replies, not the models that wrote them."""

import json
from pathlib import Path
from typing import NamedTuple

from parts import intervals, judge, overlaps, page, reply_file, row_files, score_table, scores
from parts.candidates import Answered
from parts.intervals import Difference, Line, Measure
from parts.rows import Row
from parts.terminal import explain_failed_write

SAID = {judge.WIN: "前者较好", judge.TIE: "平", judge.LOSS: "后者较好", judge.FAILED: "没有裁决"}


class Measured(NamedTuple):
    """A model's replies, and what they come to."""

    answered: Answered
    measures: list[Measure]
    lines: list[Line]


def measure(rows: list[Row], answered: Answered) -> Measured:
    """All that is counted of the replies to the questions of `rows`, with intervals."""
    measures = scores.measure(rows, answered.replies, not answered.by.get("no_thinking"))
    return Measured(answered, measures, [intervals.line(each) for each in measures])


def differences(one: Measured, other: Measured) -> list[Difference]:
    """Of all that is counted of both. Not of the speed: that is the machine's and the batches', whose replies share
    one."""
    known = {each.key: each for each in other.measures if each.key != "speed"}
    return [intervals.compare(each, known[each.key]) for each in one.measures if each.key in known]


def signatures(measured: list[Measured]) -> dict[str, str]:
    """sacrebleu's, where it was used."""
    used = any(line.key == "answer_bleu" for line in measured[0].lines)
    return overlaps.signatures() if used else {}


class Judged(NamedTuple):
    """What a judge said of the first model's answers beside another's."""

    judge: str  # the model that judged, its address where none told its name
    verdicts: list[str]  # one a question, of judge.WIN, TIE, LOSS and FAILED
    tally: dict


def judge_all(rows: list[Row], measured: list[Measured], endpoint, prompt: str, replies: str, console) -> list[Judged]:
    """The verdicts on the first model's answers beside each other's; none without an `endpoint`. What was asked is
    noted beside the file `replies`, and not asked again."""
    found, first = [], measured[0].answered
    for each in measured[1:] if endpoint else []:
        pairs = [
            judge.Pair(
                "\n".join(scores.asked(row)),
                scores.reference(row, "answer") or "",
                scores.written(ours, "answer"),
                scores.written(other, "answer"),
            )
            for row, ours, other in zip(rows, first.replies, each.answered.replies)
        ]
        verdicts, problem = judge.Judge(endpoint, prompt).compare(pairs, f"{replies}.judge.jsonl", console)
        if problem:
            console.print(problem, style="yellow", markup=False, soft_wrap=True)
        found.append(Judged(endpoint.model or endpoint.url, verdicts, judge.tally(verdicts)))
    return found


def tables(measured: list[Measured], judged: list[Judged]) -> list[page.Table]:
    """Of the first one's scores, of its differences from each other, and of the verdicts on both; each with the notes
    that belong below it."""
    (first, _, lines), keys = measured[0], {line.key for line in measured[0].lines}
    notes = [score_table.FLOOR] * ("answer_bleu" in keys) + [score_table.NEW] * ("answer_bleu_new" in keys)
    notes += [f"{name}：{text}" for name, text in signatures(measured).items()]
    found = [(*score_table.of_scores(f"{first.name}：{len(first.replies)} 个问题", lines), notes)]
    for place, each in enumerate(measured[1:]):
        other = each.answered
        heading = f"{first.name}（前）与 {other.name}（后）相比"
        unlike = "；".join(reply_file.describe_flags(other.by, first.by))
        notes = [score_table.DIFFERS] + [f"注意：后者不是这样问的（{unlike}）。"] * bool(unlike)
        found.append((*score_table.of_differences(heading, differences(measured[0], each)), notes))
        if judged:
            heading = f"评审 {judged[place].judge}：{first.name}（前）与 {other.name}（后）"
            found.append((heading, ["", "前者"], judge.describe(judged[place].tally), [score_table.JUDGED]))
    return found


def to_json(measured: list[Measured], judged: list[Judged]) -> str:
    """Everything that the tables show, and each other one's own scores. A difference is the first one minus the
    other."""
    models = []
    for each in measured:
        name, path, by, replies = each.answered
        found = {"name": name, "replies": path, "questions": len(replies), "by": by}
        found["scores"] = [line._asdict() for line in each.lines]
        if each is not measured[0]:
            found["differences"] = [one._asdict() for one in differences(measured[0], each)]
            if judged:
                found["judge"] = {"model": judged[len(models) - 1].judge} | judged[len(models) - 1].tally
        models.append(found)
    return json.dumps({"signatures": signatures(measured), "models": models}, ensure_ascii=False, indent=1) + "\n"


def cases(rows: list[Row], measured: list[Measured], judged: list[Judged]) -> list[page.Case]:
    """Each question with all replies, and by how much the first model's answer and another's differ at most in ROUGE-L;
    NaN where there is no reference."""
    found, all_answered = [], [each.answered for each in measured]
    for place, row in enumerate(rows):
        reference = {field: text for field in ("think", "answer") if (text := scores.reference(row, field))}
        replies = [each.replies[place] for each in all_answered]
        difference = float("nan")
        if "answer" in reference:
            shared = [overlaps.rouge(scores.written(reply, "answer"), reference["answer"])[-1] for reply in replies]
            difference = max(abs(each - shared[0]) for each in shared)
        fields = [(each.name, reply_file.to_fields(reply)) for each, reply in zip(all_answered, replies)]
        said = "；".join(SAID[each.verdicts[place]] for each in judged)
        note = f"评审：{said}" if said else ""
        found.append(page.Case("\n".join(scores.asked(row)), reference or None, fields, difference, note))
    return found


def report(measured: list[Measured], judged: list[Judged], tables: list[page.Table], path: Path, console) -> None:
    """Print the tables, and write all figures as JSON into `path`."""
    for *table, notes in tables:
        score_table.show(console, table, *notes)
    with explain_failed_write(path, "回复"):
        row_files.write({str(path): to_json(measured, judged)})
    files = "、".join(dict.fromkeys(each.answered.path for each in measured))
    console.print(f"\n回复：{files}\n分数：{path}", markup=False, soft_wrap=True)
