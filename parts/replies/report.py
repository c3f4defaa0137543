"""Replies to the same questions held against each other: as tables, as JSON, and as one page of HTML on which
a person reads them side by side. The page needs no other file, no network and no JavaScript, and whatever a
model wrote is text on it. Knows replies, not the models that wrote them."""

import json
from collections import namedtuple
from pathlib import Path

import numpy
import rich.table
from rich.console import Console

from parts import terminal
from parts.replies import judge, questions, scores
from parts.rows import files, traces
from parts.rows.row import Row, all_questions
from parts.terminal import name_unseen

DIGITS = {"%": 1, "字": 0, "0–1": 3, "token/秒": 1}  # of each unit, behind the point
NOTES = {  # below a table with these scores
    "answer_rougeL": "随机配对：同样的回答与另一题的参考回答比，是底线。重合只比字面，不表示医学上正确。",
    "answer_rougeL_new": "（新题）：不含 seen 的行，那些行在训练集里有近似的题。",
}
DIFFERS = "差：前减后。不同：差的 95% 区间（成对自助法）不含 0，且至少六题不一样。"
JUDGED = "两种先后各问一次，都选同一个才算较好；区间含 50 就是差异不显著。评审也是模型，不是医生。"
VERDICTS = {judge.WIN: "前者较好", judge.TIE: "平", judge.LOSS: "后者较好", judge.FAILED: "没有裁决"}


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
                model["differences"] = compare_scores(self.measured[0].scores, measured.scores)
            self.models.append(model)
            self.measured.append(measured)

    def ask_judge(self, endpoint, prompt: str, record: str) -> None:
        """Let the model at `endpoint` judge the first model's answers beside each other's. What was asked is
        noted in the file `record`, and not asked again."""
        for model, candidate in zip(self.models[1:], self.candidates[1:]):
            pairs = []
            for row, ours, other in zip(self.rows, self.candidates[0].replies, candidate.replies):
                answers = scores.final_answer(ours), scores.final_answer(other)
                pairs.append(judge.Pair(all_questions(row), row.get("answer") or "", *answers))
            # Where some requests failed, or all: the other verdicts are shown, and those are counted.
            verdicts, problem = judge.Judge(endpoint, prompt, record).compare(pairs, self.console)
            if problem:
                self.console.print(problem, style="yellow", markup=False, soft_wrap=True)
            self.verdicts.append(verdicts)
            model["judge"] = {"model": endpoint.model or endpoint.url} | judge.tally(verdicts)

    def tables(self) -> list[Table]:
        """Return the first one's scores, its differences from each other, and the verdicts on both."""
        first, *others = self.models
        tables = [score_table(f"{first['name']}：{len(self.rows)} 个问题", first["scores"])]
        for other in others:
            pair = f"{first['name']}（前）与 {other['name']}（后）"
            tables.append(difference_table(f"{pair}相比", other["differences"]))
            # A difference of the settings would be read as one of the models.
            if changes := questions.describe_changes(other["by"], first["by"], questions.SETTINGS):
                tables[-1].notes.append(f"注意：后者提问时的设置不同（{changes}）。")
            if "judge" in other:
                tables.append(judge_table(f"评审 {other['judge']['model']}：{pair}", other["judge"]))
        return tables

    def cases(self) -> list[dict]:
        """Return all questions as the page shows them, the largest differences first and those without a
        reference last. `difference` is by how much the first answer and another differ at most in ROUGE-L."""
        shares = numpy.stack([measured.rouge_l for measured in self.measured])  # [models, questions]
        differences = abs(shares - shares[0]).max(axis=0)
        cases = []
        # Sorted arrays have nan, that of a question without a reference, at their end.
        for i in numpy.argsort(-differences, kind="stable"):
            case = {"question": all_questions(self.rows[i]), "reference": self.rows[i].get("answer")}
            case["difference"] = scores.none_if_nan(differences[i])
            case["verdicts"] = "；".join(VERDICTS[verdicts[i]] for verdicts in self.verdicts)
            case["replies"] = []
            for candidate, measured in zip(self.candidates, self.measured):
                reply = candidate.replies[i]
                case["replies"].append((candidate.name, reply, cut(reply.thinking, measured.traces[i])))
            cases.append(case)
        return cases

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
        return page.get_template("report.html").render(texts, tables=self.tables(), cases=self.cases())

    def write(self, replies: str, notice: str) -> None:
        """Print the tables, and write figures and page beside the file `replies`, both whole or none."""
        for table in self.tables():
            print_table(self.console, table)
        figures, page = questions.result_paths(replies)
        html = self.to_html(f"{self.models[0]['name']} 的回复", notice)
        with terminal.explain_failed_write(figures, "回复"):
            files.write({figures: self.to_json(), page: html})
        # One file of replies may be compared with itself.
        paths = "、".join(dict.fromkeys(candidate.path for candidate in self.candidates))
        self.console.print(f"\n回复：{paths}\n分数：{figures}\n网页：{page}", markup=False, soft_wrap=True)


def compare_scores(first: dict[str, scores.Score], other: dict[str, scores.Score]) -> list[dict]:
    """Return the difference of each score that both models have."""
    lines = []
    for key, score in first.items():
        # A speed is the machine's and the batches', not the model's.
        if key in other and key != "speed":
            lines.append(score.compare(other[key]))
    return lines


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
    """Return a score's name, and its unit where the name does not tell it."""
    return f"{line['name']} %" if line["unit"] == "%" else line["name"]


def score_table(heading: str, lines: list[dict]) -> Table:
    """Return one model's scores, with the notes on those that need one."""
    rows, notes = [], []
    for line in lines:
        floor = "" if line["floor"] is None else number(line["floor"], line["unit"])
        rows.append([label(line), str(line["n"]), number(line["value"], line["unit"]), interval(line), floor])
        if line["key"] in NOTES:
            notes.append(NOTES[line["key"]])
    return Table(heading, ["指标", "条数", "值", "95% 区间", "随机配对"], rows, notes)


def difference_table(heading: str, lines: list[dict]) -> Table:
    """Return the differences of two models."""
    rows = []
    for line in lines:
        value, other = number(line["value"], line["unit"]), number(line["other"], line["unit"])
        difference = number(line["difference"], line["unit"], "+")
        judgement = "不同" if line["differs"] else "差异不显著"
        rows.append([label(line), value, other, difference, interval(line, "+"), judgement])
    return Table(heading, ["指标", "前", "后", "差", "差的 95% 区间", "判断"], rows, [DIFFERS])


def judge_table(heading: str, tally: dict) -> Table:
    """Return the verdicts on two models, from what judge.tally counted."""
    rows = [["问题", str(tally["n"])], ["没有裁决", str(tally["failures"])]]
    rows.append(["较好、平、较差", f"{tally['wins']}、{tally['ties']}、{tally['losses']}"])
    share = f"{number(tally['share'], '%')} {interval(tally | {'unit': '%'})}"
    rows.append(["较好的比例 %（不计平局）和它的 95% 区间", share])
    return Table(heading, ["", "前者"], rows, [JUDGED])


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
