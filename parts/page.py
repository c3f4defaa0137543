"""One page of HTML on which a person reads replies side by side: tables first, then each question with a column a
model, the largest differences first. The file needs no other one, no network and no JavaScript, and whatever a model
wrote is text on it. Knows no score and no model: tables, differences and words come from the caller."""

import html
import itertools
import math
import re
import string
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from parts import row_files, traces
from parts.terminal import shorten

# What would not be seen, would turn the order of the letters around it, or cannot be written at all: control
# characters but for line ends and tabs, marks of direction, halves of surrogate pairs.
UNSEEN = re.compile(
    "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]|[\ud800-\udfff]"
)
TEMPLATE = Path(__file__).with_name("page.html")
TITLE = 60  # characters of a question in the list at the top
FILTERS = {"traced": "有痕迹", "broken": "不完整"}  # class of cases -> for people: has a trace, has a reply cut short
LISTED = 12  # questions of which the list is open from the start

PROBLEMS = {"unclosed": "断在思考里，没有回答", "broken": "思考不是恰好一段"}  # form of a reply -> for people
Table = tuple  # heading, names of the columns, rows of cells; perhaps also notes, lines below the table


class Case(NamedTuple):
    question: str
    reference: dict | None  # its `answer` is shown; None where there is none
    replies: list[tuple[str, dict]]  # (model, {think, answer, complete}, perhaps also form, tokens, seconds)
    difference: float  # by whose size cases are sorted; NaN, shown as a dash, where there is none
    note: str = ""  # a line about this case


class Reply(NamedTuple):
    """What is shown of one reply."""

    found: list[traces.Trace]
    problem: str  # of its form, "" when it is whole
    column: str  # HTML


def shown(text: str) -> str:
    """`text` as HTML, also inside an attribute: nothing in it acts, what is not seen becomes its name, [U+202E]."""
    return html.escape(UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text))


def marked(text: str, found: list[traces.Trace]) -> str:
    """`text` as HTML with its traces marked; `found` in order and apart from each other."""
    parts, place = [], 0
    for trace in found:
        title, inside = shown(traces.KINDS[trace.kind]), shown(text[trace.start : trace.end])
        parts += [shown(text[place : trace.start]), f'<mark title="{title}">{inside}</mark>']
        place = trace.end
    return "".join([*parts, shown(text[place:])])


def problem_of(reply: dict) -> str:
    """What is wrong with a reply's form, in words; "" when nothing is."""
    if problem := PROBLEMS.get(reply.get("form")):
        return problem
    if not reply["answer"]:
        return "没有回答" if reply["complete"] else PROBLEMS["unclosed"]
    return "" if reply["complete"] else "回答没有写完"


def make_reply(name: str, reply: dict, question: str) -> Reply:
    """One column: the model's name, what can be counted, the thinking folded, the answer."""
    think, answer, problem = reply["think"], reply["answer"], problem_of(reply)
    found = traces.find(think, question, answer)
    facts = [f"回答 {len(answer)} 字"]
    facts += [f"{reply['tokens']} token"] if reply.get("tokens") is not None else []
    facts += [f"{reply['seconds']:.1f} 秒"] if reply.get("seconds") is not None else []
    kinds = Counter(traces.KINDS[trace.kind] for trace in found)
    said = "、".join(kind + (f" {times} 处" if times > 1 else "") for kind, times in kinds.items())
    column = f'<article class="reply"><h4>{shown(name)}</h4>\n<p class="facts">'
    column += f'<b class="problem">{problem}</b> ' * bool(problem) + f"{' · '.join(facts)}</p>\n"
    column += "<details><summary>" if think else '<p class="facts">没有思考</p>\n'
    if think:
        column += f"思考 {len(think)} 字" + f' <b class="traces">{shown(said)}</b>' * bool(found)
        column += f'</summary>\n<div class="text" dir="auto">{marked(think, found)}</div></details>\n'
    column += f'<div class="text answer" dir="auto">{shown(answer)}</div>' * bool(answer)
    return Reply(found, problem, column + "</article>\n")


def figure(difference: float) -> str:
    return "—" if math.isnan(difference) else f"{difference:.2f}".replace("-", "−")


def make_case(number: int, case: Case, measure: str) -> tuple[str, str, set[str]]:
    """(its line in the list, its section, its classes): `traced` where a thinking has traces, `broken` where a reply
    is not whole."""
    replies = [make_reply(name, reply, case.question) for name, reply in case.replies]
    kinds = {"traced": any(reply.found for reply in replies), "broken": any(reply.problem for reply in replies)}
    classes = {name for name, holds in kinds.items() if holds}
    css, reference = " ".join(sorted(classes)), (case.reference or {}).get("answer") or ""
    facts = f"{shown(measure)} {figure(case.difference)}" + f" · {shown(case.note)}" * bool(case.note)
    line = (
        f'<li class="{css}"><a href="#case-{number}" dir="auto">{shown(shorten(case.question, TITLE))}</a> '
        f"<span>{figure(case.difference)}</span></li>\n"
    )
    section = (
        f'<section class="case {css}" id="case-{number}">\n<h3><a href="#case-{number}">{number}</a>'
        f'<span class="text" dir="auto">{shown(case.question)}</span></h3>\n<p class="facts">{facts}</p>\n'
        f'<div class="replies">\n{"".join(reply.column for reply in replies)}</div>\n'
    )
    if reference:
        section += f"<details><summary>参考回答 {len(reference)} 字</summary>\n"
        section += f'<div class="text" dir="auto">{shown(reference)}</div></details>\n'
    else:
        section += '<p class="facts">没有参考回答</p>\n'
    return line, section + "</section>\n", classes


def make_table(heading: str, columns: list[str], rows: list[list[str]], notes: list[str] = ()) -> str:
    """The first cell of a row is its name. On a narrow screen cells break before what is in brackets, an interval say;
    a table that still is too wide is scrolled alone."""
    head = "".join(f'<th scope="col">{shown(name)}</th>' for name in columns)
    body = ""
    for name, *cells in rows:
        cells = (re.sub(r"[（(\[].*?[）)\]]", r"<span>\g<0></span>", shown(cell)) for cell in cells)
        body += f'<tr><th scope="row">{shown(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
    return (
        f'<h2>{shown(heading)}</h2>\n<div class="wide" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
        + "".join(f'<p class="facts">{shown(note)}</p>\n' for note in notes)
    )


def render(title: str, tables: list[Table], cases: list[Case], measure: str = "相差", notice: str = "") -> str:
    """The page. `measure` says what the cases' differences are; `notice` stands at its top."""
    cases = sorted(cases, key=lambda case: math.inf if math.isnan(case.difference) else -abs(case.difference))
    made = [make_case(number, case, measure) for number, case in enumerate(cases, 1)]
    counts = Counter(itertools.chain.from_iterable(classes for _, _, classes in made))
    models = max((len(case.replies) for case in cases), default=0)
    filters = {name: words for name, words in FILTERS.items() if counts[name]}
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=shown(title),
        notice=f'<p class="notice">{shown(notice)}</p>' * bool(notice),
        models=models,
        counts=f"{len(cases)} 个问题，每个 {models} 份回复",
        filters="只看：" * bool(filters)
        + "".join(
            f'<label><input type="checkbox" id="{name}"> {words} {counts[name]}</label>\n'
            for name, words in filters.items()
        ),
        tables="".join(make_table(*table) for table in tables),
        open=" open" * (len(cases) <= LISTED),
        measure=shown(measure),
        kinds="、".join(map(shown, traces.KINDS.values())),
        lines="".join(line for line, _, _ in made),
        cases="".join(section for _, section, _ in made),
    )


def write(path: str, title: str, tables: list[Table], cases: list[Case], **words: str) -> None:
    """Write the page of `render` to `path`, whole or not at all. Raises SystemExit when it cannot be written."""
    try:
        row_files.write({path: render(title, tables, cases, **words)})
    except OSError as error:
        raise SystemExit(f"错误：无法写入网页 {path}（{error.strerror}）；请腾出空间，或换一个位置。") from None
