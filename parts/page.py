"""One page of HTML on which a person reads replies side by side: tables first, then each question with a column a
model, the largest differences first. The file needs no other one, no network and no JavaScript, and whatever a model
wrote is text on it. Knows no score and no model: tables, differences and words come from the caller."""

import html
import itertools
import math
import re
import string
from collections import Counter
from typing import NamedTuple

from parts import row_files, traces
from parts.terminal import shorten

# What would not be seen, would turn the order of the letters around it, or cannot be written at all: control
# characters but for line ends and tabs, marks of direction, halves of surrogate pairs.
UNSEEN = re.compile(
    "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]|[\ud800-\udfff]"
)
TITLE = 60  # characters of a question in the list at the top
FILTERS = {"traced": "有痕迹", "broken": "不完整"}  # class of cases -> for people: has a trace, has a reply cut short
LISTED = 12  # questions of which the list is open from the start

Table = tuple[str, list[str], list[list[str]]]  # heading, names of the columns, rows of cells


class Case(NamedTuple):
    question: str
    reference: dict | None  # its `answer` is shown; None where there is none
    replies: list[tuple[str, dict]]  # (model, {think, answer, complete}, perhaps with tokens and seconds)
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
    if reply["answer"]:
        return "" if reply["complete"] else "回答没有写完"
    return "没有回答" if reply["complete"] else "没有回答：断在思考里"


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


def signed(difference: float) -> str:
    return "—" if math.isnan(difference) else f"{difference:+.2f}".replace("-", "−")


def make_case(number: int, case: Case, measure: str) -> tuple[str, str, set[str]]:
    """(its line in the list, its section, its classes): `traced` where a thinking has traces, `broken` where a reply
    is not whole."""
    replies = [make_reply(name, reply, case.question) for name, reply in case.replies]
    kinds = {"traced": any(reply.found for reply in replies), "broken": any(reply.problem for reply in replies)}
    classes = {name for name, holds in kinds.items() if holds}
    css, reference = " ".join(sorted(classes)), (case.reference or {}).get("answer") or ""
    facts = f"{shown(measure)} {signed(case.difference)}" + f" · {shown(case.note)}" * bool(case.note)
    line = (
        f'<li class="{css}"><a href="#case-{number}" dir="auto">{shown(shorten(case.question, TITLE))}</a> '
        f"<span>{signed(case.difference)}</span></li>\n"
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


def make_table(heading: str, columns: list[str], rows: list[list[str]]) -> str:
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
    )


def render(title: str, tables: list[Table], cases: list[Case], measure: str = "相差", notice: str = "") -> str:
    """The page. `measure` says what the cases' differences are; `notice` stands at its top."""
    cases = sorted(cases, key=lambda case: math.inf if math.isnan(case.difference) else -abs(case.difference))
    made = [make_case(number, case, measure) for number, case in enumerate(cases, 1)]
    counts = Counter(itertools.chain.from_iterable(classes for _, _, classes in made))
    models = max((len(case.replies) for case in cases), default=0)
    filters = {name: words for name, words in FILTERS.items() if counts[name]}
    return PAGE.substitute(
        title=shown(title),
        notice=f'<p class="notice">{shown(notice)}</p>' * bool(notice),
        style=STYLE,
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


STYLE = """
:root { color-scheme: light dark; --page: #f5f5f2; --paper: #fff; --ink: #1d2226; --soft: #5d666e; --line: #dcdcd6;
  --link: #0b5cad; --mark: #ffe08a; --bad: #b3261e; --warn: #7a4d00; --warn-paper: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --paper: #1d2125; --ink: #e3e5e7; --soft: #9aa4ad;
  --line: #363c42; --link: #7db7f5; --mark: #6b5200; --bad: #ff9c92; --warn: #f1cf85; --warn-paper: #332a14; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.75 system-ui, -apple-system, "PingFang SC",
  "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; overflow-wrap: anywhere; }
header, main { max-width: max(60rem, min(100rem, var(--models) * 36rem)); margin: auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.3; margin: 1.5rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
p { margin: .3rem 0; }
.notice { color: var(--warn); background: var(--warn-paper); border-radius: .4rem; padding: .4rem .8rem; }
.facts, nav, li span { color: var(--soft); font-size: .875rem; }
nav { position: sticky; top: 0; z-index: 2; background: var(--page); border-bottom: 1px solid var(--line); }
nav div { max-width: max(60rem, min(100rem, var(--models) * 36rem)); margin: auto; padding: .3rem 1rem; display: flex;
  flex-wrap: wrap; gap: 0 1.25rem; }
[id] { scroll-margin-top: 3.5rem; }
.wide { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9375rem; }
th, td { padding: .35rem .8rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
td span { display: inline-block; white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; border-top: 0; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); font-weight: 500; }
ol { margin: .5rem 0; padding-left: 2.5rem; max-height: 70vh; overflow-y: auto; }
summary { cursor: pointer; color: var(--soft); font-size: .875rem; padding: .15rem 0; }
.case { background: var(--paper); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.25rem;
  margin: 1.25rem 0; content-visibility: auto; contain-intrinsic-size: auto 40rem; }
h3 { font-size: 1.0625rem; line-height: 1.6; margin: 0; display: flex; gap: .75rem; }
.replies { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem 2rem;
  margin: .75rem 0; }
.reply { --tone: #6c757d; border-top: 3px solid var(--tone); min-width: 0; }
.reply:nth-child(4n + 2) { --tone: #12877a; }
.reply:nth-child(4n + 3) { --tone: #8553c4; }
.reply:nth-child(4n + 4) { --tone: #c26a1b; }
h4 { margin: .4rem 0 0; font-size: 1rem; }
.text { white-space: pre-wrap; }
.answer { margin-top: .5rem; }
details > .text { color: var(--soft); border-left: 3px solid var(--line); padding-left: .8rem; margin: .4rem 0;
  font-size: .9375rem; }
mark { background: var(--mark); color: var(--ink); border-radius: .2rem; padding: 0 .1rem; }
.traces { font-weight: normal; color: var(--ink); background: var(--mark); border-radius: .6rem; padding: 0 .5rem; }
.problem { color: var(--bad); }
body:has(#traced:checked) :is(.case, li):not(.traced), body:has(#broken:checked) :is(.case, li):not(.broken) {
  display: none; }
@media (max-width: 40rem) { .case { padding: .75rem; margin: .75rem -.5rem; } ol { padding-left: 2rem; }
  th, td { white-space: normal; overflow-wrap: normal; padding: .3rem .5rem; font-size: .8125rem; line-height: 1.5; }
  nav div { gap: 0 .8rem; } }
@media print { nav { display: none; } .case { content-visibility: visible; break-inside: auto; } }
"""

# The policy lets nothing run and nothing be fetched, should a text ever get out of its place.
PAGE = string.Template("""\
<!DOCTYPE html>
<html lang="zh-CN">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body style="--models: $models">
<header>
<h1>$title</h1>
$notice
<p class="facts">$counts</p>
</header>
<nav><div>
<a href="#scores">分数</a>
<a href="#list">目录</a>
<a href="#cases">回复</a>
$filters</div></nav>
<main>
<section id="scores">
$tables</section>
<section id="list">
<h2>目录</h2>
<details$open><summary>按 $measure 的大小排列</summary>
<ol>
$lines</ol></details>
</section>
<section id="cases">
<h2>回复</h2>
<p class="facts">思考点开就能看；其中<mark>标出的</mark>是留下的痕迹：$kinds。</p>
$cases</section>
</main>
</body>
</html>
""")
