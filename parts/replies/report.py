"""Replies to the same questions held against each other: as tables, as JSON, and as one page of HTML on which a person
reads them side by side. The page needs no other file, no network and no JavaScript, and whatever a model wrote is text
on it. Knows replies, not the models that wrote them."""

import json
import re
from collections import namedtuple
from pathlib import Path

import rich.table
from rich.console import Console

from parts import terminal
from parts.model.encoding import Reply
from parts.replies import judge, questions, scores
from parts.rows import files, traces
from parts.rows.row import Row

DIGITS = {"%": 1, "字": 0, "0–1": 3, "token/秒": 1}  # of each unit, behind the point
NOTES = {  # below a table with these scores
    "answer_rougeL": "乱配：同样的回答各与另一题的参考比，是底线。重合只比字面，不是医学上的对错。",
    "answer_rougeL_new": "（新题）：不算 seen 的行，那些在训练集里有近似的题。",
}
DIFFERS = "差：前减后。不同：差的 95 % 区间（成对自助法）不含 0，且至少六题不一样。"
JUDGED = "两种先后各问一次，都选同一个才算较好；区间含 50 就是分不出。评审也是模型，不是医生。"
VERDICTS = {judge.WIN: "前者较好", judge.TIE: "平", judge.LOSS: "后者较好", judge.FAILED: "没有裁决"}
# What would not be seen, would turn the order of the letters around it, or cannot be written at all: control
# characters but for line ends and tabs, marks of direction, halves of surrogate pairs.
UNSEEN = re.compile(
    "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]|[\ud800-\udfff]"
)


# Of texts: the first cell of each row is its name, and the notes are lines below the table.
Table = namedtuple("Table", "heading columns rows notes")


class Comparison:
    """The first candidate's replies to the questions of `rows`, and the others' beside them. `seed` is that of the
    intervals. A difference is the first one minus the other."""

    def __init__(self, rows: list[Row], candidates: list[questions.Candidate], seed: int):
        self.rows, self.candidates = rows, candidates
        self.console = Console(highlight=False, emoji=False)
        self.verdicts: list[list[str]] = []  # on each candidate but the first: one a question, of VERDICTS
        self.models: list[dict] = []  # all that is counted, as it goes into the JSON
        first: list[scores.Score] = []
        for candidate in candidates:
            counted = scores.measure(rows, candidate.replies, not candidate.by.get("no_thinking"), seed)
            model = {
                "name": candidate.name,
                "replies": candidate.path,
                "questions": len(rows),
                "by": candidate.by,
            }
            model["scores"] = [score.as_json() for score in counted]
            if first:  # not of the speed: that is the machine's and the batches'
                known = {score.key: score for score in counted if score.key != "speed"}
                model["differences"] = [
                    score.compare(known[score.key]) for score in first if score.key in known
                ]
            self.models.append(model)
            first = first or counted

    def ask_judge(self, endpoint, prompt: str, record: str) -> None:
        """Let the model at `endpoint` judge the first model's answers beside each other's. What was asked is noted in
        the file `record`, and not asked again."""
        for model, candidate in zip(self.models[1:], self.candidates[1:]):
            pairs = []
            for row, ours, other in zip(self.rows, self.candidates[0].replies, candidate.replies):
                answers = scores.written(ours), scores.written(other)
                pairs.append(judge.Pair(scores.asked(row), row.get("answer") or "", *answers))
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
            if changes := questions.describe_changes(other["by"], first["by"], questions.SETTINGS):
                tables[-1].notes.append(f"注意：后者不是这样问的（{changes}）。")
            if "judge" in other:
                tables.append(judge_table(f"评审 {other['judge']['model']}：{pair}", other["judge"]))
        return tables

    def cases(self) -> list[dict]:
        """Return all questions as the page shows them, the largest differences first and those without a reference
        last. `difference` is by how much the first answer and another differ at most in ROUGE-L."""
        cases = []
        for i, row in enumerate(self.rows):
            replies = [candidate.replies[i] for candidate in self.candidates]
            case = {"question": scores.asked(row), "reference": row.get("answer"), "difference": None}
            case["verdicts"] = "；".join(VERDICTS[verdicts[i]] for verdicts in self.verdicts)
            case["replies"] = [
                (model["name"], reply, cut(row, reply)) for model, reply in zip(self.models, replies)
            ]
            if case["reference"]:
                shared = [scores.rouge(scores.written(reply), case["reference"])[-1] for reply in replies]
                case["difference"] = max(abs(share - shared[0]) for share in shared)
            cases.append(case)
        return sorted(cases, key=lambda case: 1 if case["difference"] is None else -case["difference"])

    def to_json(self) -> str:
        """Return everything that the tables show, and each other one's own scores."""
        return json.dumps({"models": self.models}, ensure_ascii=False, indent=1) + "\n"

    def to_html(self, title: str, notice: str) -> str:
        """Return the page."""
        import jinja2

        loader = jinja2.FileSystemLoader(Path(__file__).parent)
        # Autoescape and `name_unseen` hold for all that the template shows, wherever it stands.
        page = jinja2.Environment(autoescape=True, finalize=name_unseen, trim_blocks=True, loader=loader)
        page.filters["shorten"] = terminal.shorten
        words = {"title": title, "notice": notice, "kinds": traces.KINDS.values()}
        return page.get_template("report.html").render(words, tables=self.tables(), cases=self.cases())

    def write(self, replies: str, notice: str) -> None:
        """Print the tables, and write figures and page beside the file `replies`, both whole or none."""
        for table in self.tables():
            print_table(self.console, table)
        figures, page = questions.result_paths(replies)
        with terminal.explain_failed_write(figures, "回复"):
            files.write(
                {figures: self.to_json(), page: self.to_html(f"{self.models[0]['name']} 的回复", notice)}
            )
        paths = "、".join(dict.fromkeys(model["replies"] for model in self.models))
        self.console.print(f"\n回复：{paths}\n分数：{figures}\n网页：{page}", markup=False, soft_wrap=True)


def number(value: float | None, unit: str, sign: str = "") -> str:
    """Return a figure in its unit's digits, shares in percent; — where there is none."""
    return "—" if value is None else f"{value * (100 if unit == '%' else 1):{sign}.{DIGITS[unit]}f}"


def interval(line: dict, sign: str = "") -> str:
    return f"[{number(line['low'], line['unit'], sign)}, {number(line['high'], line['unit'], sign)}]"


def label(line: dict) -> str:
    """Return a score's name, and its unit where the name does not tell it."""
    return f"{line['name']} %" if line["unit"] == "%" else line["name"]


def score_table(heading: str, lines: list[dict]) -> Table:
    rows = []
    for line in lines:
        floor = "" if line["floor"] is None else number(line["floor"], line["unit"])
        rows.append([label(line), str(line["n"]), number(line["value"], line["unit"]), interval(line), floor])
    notes = [NOTES[line["key"]] for line in lines if line["key"] in NOTES]
    return Table(heading, ["指标", "条数", "值", "95 % 区间", "乱配"], rows, notes)


def difference_table(heading: str, lines: list[dict]) -> Table:
    rows = []
    for line in lines:
        values = [number(line[name], line["unit"]) for name in ("value", "other")]
        difference = number(line["difference"], line["unit"], "+")
        judgement = "不同" if line["differs"] else "分不出"
        rows.append([label(line), *values, difference, interval(line, "+"), judgement])
    return Table(heading, ["指标", "前", "后", "差", "差的 95 % 区间", "判断"], rows, [DIFFERS])


def judge_table(heading: str, tally: dict) -> Table:
    rows = [["问题", str(tally["n"])], ["没有裁决", str(tally["failures"])]]
    rows.append(["较好、平、较差", f"{tally['wins']}、{tally['ties']}、{tally['losses']}"])
    share = f"{number(tally['share'], '%')} {interval(tally | {'unit': '%'})}"
    rows.append(["较好的比例 %，平不算，和它的 95 % 区间", share])
    return Table(heading, ["", "前者"], rows, [JUDGED])


def print_table(console: Console, table: Table) -> None:
    """Print a table, of at most 80 columns, and its notes."""
    grid = rich.table.Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for i, column in enumerate(table.columns):
        grid.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*row)
    console.print(f"\n{table.heading}", style="bold", markup=False)
    console.print(grid)
    console.print("\n".join(table.notes), style="dim", markup=False)


def cut(row: Row, reply: Reply) -> list[tuple[str, str]]:
    """Cut a thinking before and after its traces: return each piece with the kind of trace that it is, or ""."""
    pieces, end = [], 0
    for trace in scores.find_traces(row, reply):
        pieces.append((reply.thinking[end : trace.start], ""))
        pieces.append((reply.thinking[trace.start : trace.end], traces.KINDS[trace.kind]))
        end = trace.end
    return [*pieces, (reply.thinking[end:], "")]


def name_unseen(value: object) -> object:
    """Put into a text, for what is not seen of it, its name: [U+202E]."""
    return UNSEEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", value) if isinstance(value, str) else value
