"""Replies to the same questions held against each other: as tables, as JSON, and as one page of HTML on which
a person reads them side by side. The page needs no other file, no network and no JavaScript, and whatever a
model wrote is text on it. Knows replies, not the models that wrote them."""

import json
from collections import namedtuple
from operator import itemgetter
from pathlib import Path

import rich.table
from rich.console import Console

from parts import terminal
from parts.replies import checkup, judge, questions, scores
from parts.rows import files, traces
from parts.rows.row import Row, conversation
from parts.terminal import name_unseen

DIGITS = {"%": 1, "字": 0, "0–1": 3, "token/秒": 1}  # of each unit, behind the point
ARROWS = {1: "↑", -1: "↓", 0: ""}  # which direction is better
NOTES = {  # below a table with these scores
    "answer_rougeL": "随机配对：同样的回答与另一题的参考回答比，是底线。重合只比字面，不表示医学上正确。",
    "answer_rougeL_new": "（新题）：不含 seen 的行，那些行在训练集里有近似的题。",
}
DIRECTIONS = "↑ 越高越好，↓ 越低越好。"
DIFFERS = (
    "差是前一个模型减后一个，更好、更差说的是前一个：差的 95% 区间不含 0，且至少六题不一样。"
    "区间：比例用 Newcombe 法，其余用成对自助法。二十来项里，约有一项会只因偶然而不同。"
)
BY_LENGTH = (
    f"随字数变：两者回答的字数相差超过 {scores.LENGTH_RATIO} 倍，重合的差别可能只来自长短，不说明好坏。"
)
JUDGEMENTS = {"better": "更好", "worse": "更差", "different": "不同", "unclear": "差异不显著"}
JUDGEMENTS["length"] = "随字数变"
JUDGED = "两种先后各问一次，都选同一个才算较好；区间含 50 就是差异不显著。评审也是模型，不是医生。"
# In the order in which they are read: first what the judge likes less.
VERDICTS = {judge.LOSS: "{other} 较好", judge.WIN: "{first} 较好", judge.SPLIT: "两种先后不一致"}
VERDICTS |= {judge.TIE: "平", judge.FAILED: "没有裁决"}


# Of texts: the first cell of each row is its name, and the notes are lines below the table.
Table = namedtuple("Table", "heading columns rows notes")


class Comparison:
    """The first candidate's replies to the questions of `rows`, and the others' beside them. `seed` is that
    of the intervals. A difference is the first one minus the other."""

    def __init__(self, rows: list[Row], candidates: list[questions.Candidate], seed: int):
        self.rows, self.candidates = rows, candidates
        # rich would colour figures, and turn :smile: in a model's name into a picture.
        self.console = Console(highlight=False, emoji=False)
        self.verdicts: list[list[str]] = []  # on each candidate but the first: one a question, of VERDICTS
        self.models: list[dict] = []  # all that is counted, as it goes into the JSON
        self.measured: list[scores.Measured] = []
        for candidate in candidates:
            measured = scores.measure(rows, candidate.replies, not candidate.by.get("no_thinking"), seed)
            model = {"name": candidate.name, "replies": candidate.path, "questions": len(rows)}
            model["by"] = candidate.by
            model["scores"] = list(map(scores.Score.as_json, measured.scores.values()))
            if self.measured:
                model["differences"] = scores.compare_all(self.measured[0].scores, measured.scores)
            self.models.append(model)
            self.measured.append(measured)

    def ask_judge(self, endpoint, prompt: str, record: str) -> None:
        """Let the model at `endpoint` judge the first model's answers beside each other's. What was asked is
        noted in the file `record`, and not asked again."""
        for model, candidate in zip(self.models[1:], self.candidates[1:]):
            pairs = []
            for row, ours, other in zip(self.rows, self.candidates[0].replies, candidate.replies):
                answers = scores.final_answer(ours), scores.final_answer(other)
                pairs.append(judge.Pair(conversation(row), row.get("answer") or "", *answers))
            # Where some requests failed, or all: the other verdicts are shown, and those are counted.
            verdicts, problem = judge.Judge(endpoint, prompt, record).compare(pairs, self.console)
            if problem:
                self.console.print(problem, style="yellow", markup=False, soft_wrap=True)
            self.verdicts.append(verdicts)
            model["judge"] = {"model": endpoint.model or endpoint.url} | judge.tally(verdicts, pairs)

    def tables(self) -> list[Table]:
        """Return each one's scores, the first one's differences from each other, and the verdicts on both."""
        tables = []
        for model in self.models:
            tables.append(score_table(f"{model['name']}：{len(self.rows)} 个问题", model["scores"]))
        first, *others = self.models
        for other in others:
            tables.append(difference_table(first["name"], other["name"], other["differences"]))
            # A difference of the settings would be read as one of the models.
            if changes := questions.describe_changes(other["by"], first["by"], questions.SETTINGS):
                tables[-1].notes.append(f"注意：{other['name']} 提问时的设置不同（{changes}）。")
            if "judge" in other:
                heading = f"评审 {other['judge']['model']}：{first['name']} 与 {other['name']}"
                tables.append(judge_table(heading, first["name"], other["judge"]))
        return tables

    def summary(self) -> list[str]:
        """Return what a person reads first: one line for each thing that was asked for."""
        first, *others = self.models
        lines = []
        for key in (checkup.SAFETY, checkup.GENERAL):
            if f"checkup_{key}" in self.measured[0].scores:
                lines.append(self.describe_checkup(f"checkup_{key}"))
        for other in others:
            if "judge" in other:
                lines.append(describe_verdicts(first["name"], other["name"], other["judge"]))
            lines.append(describe_differences(other["name"], other["differences"]))
        return lines

    def describe_checkup(self, key: str) -> str:
        """Return how many questions of the check-up each model passed, and how much worse the first one may
        be than each other."""
        parts = []
        for model in self.models:
            line = find_line(model["scores"], key)
            passed = f"{round(line['value'] * line['n'])}/{line['n']}"
            if model is self.models[0]:
                parts.append(f"{line['name']}：{model['name']} {passed}")
                continue
            difference = find_line(model["differences"], key)
            change, worst = (number(difference[figure], "%", "+") for figure in ("difference", "low"))
            at_worst = "可能差到" if difference["low"] < 0 else "最少也高"
            parts.append(f"{model['name']} {passed}，差别 {change}%（{at_worst} {worst}%）")
        return "；".join(parts)

    def cases(self) -> list[dict]:
        """Return all questions as the page shows them: where there is a judge by its verdicts, those that the
        first one lost at the top; where there is a check-up those that only the first one failed; else as in
        the file."""
        cases = []
        for i, row in enumerate(self.rows):
            case = {"question": conversation(row), "reference": row.get("answer") or row.get("right")}
            verdicts = [verdicts[i] for verdicts in self.verdicts]
            words = []
            for verdict, other in zip(verdicts, self.models[1:]):
                words.append(VERDICTS[verdict].format(first=self.models[0]["name"], other=other["name"]))
            case["verdicts"] = "；".join(words)
            case["kind"] = checkup.KINDS.get(row.get("checkup"), "")
            case["replies"] = []
            failed = []
            for candidate, measured in zip(self.candidates, self.measured):
                reply, faults = candidate.replies[i], measured.faults[i]
                pieces = cut(reply.thinking, measured.traces[i])
                case["replies"].append((candidate.name, reply, pieces, faults))
                failed.append(bool(faults))
            if verdicts:
                order = min(map(list(VERDICTS).index, verdicts))
            else:
                # Failed by the first one alone, by others alone, by all, by none.
                order = (not any(failed), all(failed), not failed[0])
            cases.append((order, i, case))
        return [case for _, _, case in sorted(cases, key=itemgetter(0, 1))]

    def to_json(self) -> str:
        """Return everything that the tables show, and each other one's own scores."""
        return json.dumps({"models": self.models}, ensure_ascii=False, indent=1) + "\n"

    def to_html(self, title: str, notice: str) -> str:
        """Return the page."""
        import jinja2

        # The template has no other author than this project; what it shows may come from anybody.
        loader = jinja2.FileSystemLoader(Path(__file__).parent)
        # Autoescape and name_unseen hold for all that the template shows, wherever it stands.
        page = jinja2.Environment(autoescape=True, trim_blocks=True, loader=loader, finalize=name_unseen)
        page.filters["shorten"] = terminal.shorten
        texts = {"title": title, "notice": notice, "kinds": traces.KINDS.values()}
        if checkup.group(self.rows):
            texts["checkup"] = checkup.NOTICE
        parts = {"summary": self.summary(), "tables": self.tables(), "cases": self.cases()}
        return page.get_template("report.html").render(texts, **parts)

    def write(self, replies: str, notice: str) -> None:
        """Print the tables, and write figures and page beside the file `replies`, both whole or none."""
        for table in self.tables():
            print_table(self.console, table)
        if checkup.group(self.rows):
            self.console.print(f"\n{checkup.NOTICE}", style="dim", markup=False)
        self.console.print("", *self.summary(), sep="\n", markup=False)
        figures, page = questions.result_paths(replies)
        html = self.to_html(f"{self.models[0]['name']} 的回复", notice)
        with terminal.explain_failed_write(figures, "回复"):
            files.write({figures: self.to_json(), page: html})
        # One file of replies may be compared with itself.
        paths = "、".join(dict.fromkeys(candidate.path for candidate in self.candidates))
        self.console.print(f"\n回复：{paths}\n分数：{figures}\n网页：{page}", markup=False, soft_wrap=True)


def find_line(lines: list[dict], key: str) -> dict:
    """Return the line of the JSON with this score."""
    return next(line for line in lines if line["key"] == key)


def describe_differences(other: str, lines: list[dict]) -> str:
    """Return in which scores the first model is better and worse than the `other`, in one line."""
    groups: dict[str, list[str]] = {"better": [], "worse": []}
    by_length = False
    for line in lines:
        # A kind of trace, or of question, is a part of what stands above it.
        if line["judgement"] in groups and not line["name"].startswith("- "):
            groups[line["judgement"]].append(line["name"])
        by_length |= line["judgement"] == "length"
    parts = []
    for judgement, names in groups.items():
        if names:
            parts.append(f"{JUDGEMENTS[judgement]}的有 {'、'.join(names)}")
    text = f"与 {other} 相比：{'，'.join(parts) or '没有显著更好或更差的指标'}"
    if by_length:
        length = find_line(lines, "answer_length")
        lengths = f"{number(length['value'], '字')} 字与 {number(length['other'], '字')} 字"
        text += f"；回答长短悬殊（{lengths}），重合的高低不说明好坏"
    return f"{text}。"


def describe_verdicts(first: str, other: str, tally: dict) -> str:
    """Return what a judge says of two models, in one line."""
    text = f"评审：{first} 较好 {tally['wins']}，平 {tally['ties']}，{other} 较好 {tally['losses']}"
    return text + ("；" + tally["problem"] if tally["problem"] else "")


def number(value: float | None, unit: str, sign: str = "") -> str:
    """Return a figure in its unit's digits, shares in percent; — where there is none. With `sign` "+" a
    positive one has its sign too."""
    if value is None:
        return "—"
    scale = 100 if unit == "%" else 1
    return f"{value * scale:{sign}.{DIGITS[unit]}f}"


def interval(line: dict, sign: str = "") -> str:
    """Return the interval of a line of the JSON, in square brackets."""
    low, high = number(line["low"], line["unit"], sign), number(line["high"], line["unit"], sign)
    return f"[{low}, {high}]"


def label(line: dict) -> str:
    """Return a score's name, its unit where the name does not tell it, and which direction is better."""
    unit = " %" if line["unit"] == "%" else ""
    return f"{line['name']}{unit}{ARROWS[line['better']]}"


def score_table(heading: str, lines: list[dict]) -> Table:
    """Return one model's scores, with the notes on those that need one."""
    rows, notes = [], [DIRECTIONS]
    for line in lines:
        floor = "" if line["floor"] is None else number(line["floor"], line["unit"])
        rows.append([label(line), str(line["n"]), number(line["value"], line["unit"]), interval(line), floor])
        if line["key"] in NOTES:
            notes.append(NOTES[line["key"]])
    return Table(heading, ["指标", "条数", "值", "95% 区间", "随机配对"], rows, notes)


def difference_table(first: str, other: str, lines: list[dict]) -> Table:
    """Return the differences of the first model from another."""
    rows, notes = [], [DIFFERS]
    for line in lines:
        difference = number(line["difference"], line["unit"], "+")
        rows.append([label(line), difference, interval(line, "+"), JUDGEMENTS[line["judgement"]]])
        if line["judgement"] == "length" and BY_LENGTH not in notes:
            notes.append(BY_LENGTH)
    columns = ["指标", "差", "差的 95% 区间", "判断"]
    return Table(f"{first} 比 {other}", columns, rows, notes)


def judge_table(heading: str, first: str, tally: dict) -> Table:
    """Return the verdicts on two models, from what judge.tally counted."""
    rows = [["问题", str(tally["n"])], ["没有裁决", str(tally["failures"])]]
    rows.append(["较好、平、较差", f"{tally['wins']}、{tally['ties']}、{tally['losses']}"])
    share = f"{number(tally['share'], '%')} {interval(tally | {'unit': '%'})}"
    rows.append(["较好的比例 %（不计平局）和它的 95% 区间", share])
    rows.append(["两种先后裁决一致的比例 %", number(tally["agreement"], "%")])
    return Table(heading, ["", first], rows, [JUDGED])


def print_table(console: Console, table: Table) -> None:
    """Print a table, of at most 80 columns, and its notes."""
    # 80 columns is a terminal that nobody made wider; a name that is longer is folded, not cut.
    grid = rich.table.Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for i, column in enumerate(table.columns):
        grid.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*row)
    # A model's name may hold square brackets, which rich would read as its markup.
    console.print(f"\n{table.heading}", style="bold", markup=False)
    console.print(grid)
    console.print("\n".join(table.notes), style="dim", markup=False)


def cut(thinking: str, marks: list[traces.Trace]) -> list[tuple[str, str]]:
    """Cut a thinking before and after its traces: return each piece with the kind of trace that it is, or
    ""."""
    pieces, end = [], 0
    for trace in marks:
        pieces.append((thinking[end : trace.start], ""))
        pieces.append((thinking[trace.start : trace.end], traces.KINDS[trace.kind]))
        end = trace.end
    return [*pieces, (thinking[end:], "")]
