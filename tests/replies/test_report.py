"""Models held against each other: tables, JSON, and the page as a parser and, where there is one, a browser read it."""

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

from chat_server import ChatServer, text
from rich.console import Console

from parts import endpoint
from parts.endpoint import Endpoint
from parts.model.encoding import Reply
from parts.replies import report
from parts.replies.questions import Candidate
from parts.rows import traces

BY = {"model": "a", "weights": None, "no_thinking": False, "max_new_tokens": 30, "seed": 42}
ROWS = [{"question": f"第 {i} 问？", "answer": f"多喝水，休息 {i} 天。", "seen": i % 3 == 0} for i in range(12)]
GOOD = [Reply("先想原因。", f"多喝水，休息 {i} 天。", True, "one", 10, 0.1) for i in range(12)]
BAD = [Reply("根据用户提供的答案，想", "", False, "unclosed", 30, 0.1) for _ in range(12)]
HOSTILE = [
    "<script>document.title = 'taken'</script>",
    "</div></details></section><h1>out</h1>",
    "<!-- & --> &lt; &amp;lt; &#60; ]]> <![CDATA[",
    '"\' onclick="alert(1)" {{ title }} {% raw %} ${title}',
    '<img src="http://127.0.0.1:9/x.png" onerror="alert(1)"><style>body{display:none}</style><plaintext>',
    "第一行\n\n  第二行\t缩进  两个空格",
    "ما هو سكر الدم؟ 空腹血糖 3.9–6.1 mmol/L 👨‍👩‍👧",
]
LEAK = "先想一想。答案里提到多喝水，根据用户提供的答案，需要写出思考过程。"


def compare(*replies: list[Reply], rows=ROWS, names=("模型0", "模型1"), **by) -> report.Comparison:
    """`by`: what is unlike in how the last one was asked."""
    candidates = [Candidate(name, f"{name}.jsonl", by=BY, replies=each) for name, each in zip(names, replies)]
    candidates[-1].by = BY | by
    comparison = report.Comparison(rows, candidates, 42)
    comparison.console = Console(width=80, record=True, highlight=False, file=io.StringIO())
    return comparison


class Reader(HTMLParser):
    """Elements as [tag, attributes, all text inside], in order."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append([tag, dict(attributes), ""])
        if tag not in ("meta", "input"):
            self.open.append(self.tags[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def texts(self, name: str) -> list[str]:
        """Of the elements with this tag or class."""
        return [text for tag, attributes, text in self.tags if name in (tag, *attributes.get("class", "").split())]


def read_page(*replies: Reply, row=ROWS[0]) -> Reader:
    return Reader(compare(*([reply] for reply in replies), rows=[row]).to_html("页", "提醒"))


def test_what_is_compared_with_itself_differs_nowhere():
    mixed = [*GOOD[:6], *BAD[6:]]
    comparison = compare(mixed, mixed)
    lines = comparison.models[1]["differences"]
    assert {(line["difference"], line["differs"], line["judgement"]) for line in lines} == {(0, False, "unclear")}
    assert comparison.summary() == ["与 模型1 相比：没有显著更好或更差的指标。"]


def test_differences_are_found_and_have_the_sign_of_the_first_one():
    comparison = compare(GOOD, BAD)
    lines = {line["key"]: line for line in comparison.models[1]["differences"]}
    different = {key for key, line in lines.items() if line["differs"] and "rouge" not in key}
    assert different == {"whole", "stopped", "traces", "traces_answer", "think_length"}
    assert all(line["differs"] for key, line in lines.items() if "rouge" in key) and len(lines) == 23
    judged = {key: line["judgement"] for key, line in lines.items() if key in different}
    assert judged == dict.fromkeys(different, "better") | {"think_length": "different"}
    assert "更好的有 完整的回复、正常结束、思考有答案泄露" in comparison.summary()[0]
    assert (lines["whole"]["difference"], lines["traces"]["difference"]) == (1, -1)
    assert lines["answer_length"]["difference"] is None  # the second one never came to an answer


def test_tables_fit_into_80_columns_and_json_has_all_of_it():
    comparison = compare([*GOOD[:10], *BAD[10:]], BAD, seed=7)
    for table in comparison.tables():
        report.print_table(comparison.console, table)
    first, second = comparison.console.export_text().split("模型0 比 模型1")
    assert all(text in first for text in ("模型0：12 个问题", "模型1：12 个问题", "随机配对：", "（新题）："))
    assert all(text in second for text in ("更好", "差异不显著", "—", "--seed 是 7，现在是 42"))
    assert re.search(r"^完整的回复 %↑ +12 +83.3 +\[55.2, 95.3\]", first, re.MULTILINE)
    one, other = json.loads(comparison.to_json())["models"]
    assert one["by"] == BY and len(one["scores"]) == 24 and "differences" not in one
    for line in one["scores"]:
        assert [*line] == ["key", "name", "unit", "better", "n", "value", "floor", "low", "high"]
        assert line["name"] in first and (line["name"] in second) == (line["key"] != "speed")
    names = ["key", "name", "unit", "better", "n", "value", "other", "difference", "differs", "low", "high"]
    assert [*other["differences"][0]] == [*names, "judgement"] and "NaN" not in comparison.to_json()


def test_a_judge_is_asked_about_answers_alone_and_heard_everywhere(folder):
    """It prefers whichever answer is longer, in whatever place."""

    def speak(body):
        asked = body["messages"][-1]["content"]
        return text("裁决：A" if asked.index("休息 2 天。" * 3) < asked.index("只要睡觉") else "裁决：B")

    longer, shorter = GOOD[0]._replace(answer="休息 2 天。" * 3), GOOD[0]._replace(answer="只要睡觉")
    comparison = compare([longer] * 2 + GOOD[2:3], [shorter] * 2 + GOOD[2:3], rows=ROWS[:3])
    with ChatServer(speak) as server:
        comparison.ask_judge(Endpoint(server.url), "比较", "judge.jsonl")
        asked = [body["messages"][-1]["content"] for method, _, _, body in server.requests if method == "POST"]
    assert len(asked) == 4 and GOOD[0].thinking not in "".join(asked)
    table = comparison.tables()[3]
    assert table.heading == "评审 judge：模型0 与 模型1" and ["较好、平、较差", "2、1、0"] in table.rows
    assert [case["verdicts"] for case in comparison.cases()] == ["模型0 较好", "模型0 较好", "平"]
    assert comparison.summary()[0] == "评审：模型0 较好 2，平 1，模型1 较好 0"
    judged = json.loads(comparison.to_json())["models"][1]["judge"]
    assert (judged["model"], judged["wins"]) == ("judge", 2)
    assert "评审：模型0 较好" in comparison.to_html("页", "提醒")


def test_a_judge_that_is_down_is_a_line_and_no_end(folder, monkeypatch):
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    with ChatServer() as server:
        pass
    comparison = compare(GOOD[:1], [GOOD[0]._replace(answer="别的")], rows=ROWS[:1])
    comparison.ask_judge(Endpoint(server.url), "比较", "judge.jsonl")
    assert comparison.verdicts == [["failed"]] and comparison.models[1]["judge"]["model"] == server.url
    assert server.url in comparison.console.export_text() and len(comparison.tables()) == 4


def hostile_page() -> str:
    rows = [{"question": hostile, "answer": hostile} for hostile in HOSTILE]
    one, other = ([Reply(think or content, content, True, "one") for content in HOSTILE] for think in ("", "想一想。"))
    return compare(one, other, rows=rows, names=(HOSTILE[0], HOSTILE[4])).to_html(HOSTILE[1], HOSTILE[2])


def is_inert(page: str) -> None:
    """Nothing in the page runs or is fetched, every element is closed, and the texts are those of `hostile_page`."""
    read = Reader(page)
    assert not read.open
    forbidden = {"script", "img", "link", "iframe", "object", "base", "form", "plaintext"}
    assert not {tag for tag, *_ in read.tags} & forbidden
    for _, attributes, _ in read.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        assert attributes.get("href", "#").startswith("#")
    assert "default-src 'none'" in read.tags[3][1]["content"]
    assert read.texts("h1") == read.texts("title") == [HOSTILE[1]] and read.texts("notice") == [HOSTILE[2]]
    shown = [[hostile, hostile, hostile, "想一想。", hostile, hostile] for hostile in HOSTILE]
    assert read.texts("text") == sum(shown, [])
    assert read.texts("h4") == [HOSTILE[0], HOSTILE[4]] * len(HOSTILE)


def test_texts_come_back_as_they_were_and_none_acts(tmp_path):
    is_inert(hostile_page())
    if browser := next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None):
        (tmp_path / "page.html").write_text(hostile_page(), encoding="utf-8", newline="")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
        command += ["--dump-dom", f"file://{tmp_path}/page.html"]
        is_inert(subprocess.run(command, capture_output=True, timeout=60).stdout.decode())


def test_what_is_not_seen_is_named():
    for unseen in "\0\x1b\x7f\x85\r\u061c\u200f\u202e\u2067\ud800\udfff":
        shown = f"甲{unseen}乙"
        read = read_page(Reply(shown, shown, True, "one"), row={"question": shown})
        assert set(read.texts("text")) == {f"甲[U+{ord(unseen):04X}]乙"}


def test_traces_are_marked_where_they_are_and_only_in_the_thinking():
    thinking = "\0<b>&" + LEAK
    read = read_page(GOOD[0], Reply(thinking, LEAK, True, "one"))
    marks = [(attributes["title"], content) for tag, attributes, content in read.tags if tag == "mark" and attributes]
    expected = traces.find(thinking, ROWS[0]["question"], LEAK)
    assert marks == [(traces.KINDS[kind], thinking[start:end]) for kind, start, end in expected] and len(marks) > 1
    assert read.texts("text")[3:5] == [thinking.replace("\0", "[U+0000]"), LEAK]
    assert all(traces.KINDS[trace.kind] in read.texts("traces")[0] for trace in expected)
    assert "答案泄露 1" in read.texts("nav")[0] and len(read.texts("traced")) == 2  # its section, its line of the list


def test_reply_that_is_not_whole_says_so():
    for thinking, answer, complete, form, label in (
        ("想", "答", True, "one", []),
        ("想", "答", False, "one", ["回答没有写完"]),
        ("想", "", True, "unclosed", ["断在思考里，没有回答"]),  # it stopped by itself there
        ("想", "答", True, "broken", ["思考不是恰好一段"]),
        ("", "答", True, "none", []),
        ("想", "", True, "one", ["没有回答"]),
    ):
        read = read_page(Reply(thinking, answer, complete, form))
        assert read.texts("problem") == label and len(read.texts("broken")) == 2 * len(label)
        assert ("没有思考" in read.texts("reply")[0]) == (not thinking)


def test_replies_stand_as_in_the_file_and_the_list_leads_to_them():
    rows = [*ROWS[:2], {"question": "多久？", "history": [["头痛？", "休息。"]]}]
    changed = GOOD[1]._replace(answer="多喝水，休息。", tokens=12, seconds=3.25)
    read = Reader(compare(GOOD[:3], [GOOD[0], changed, GOOD[2]], rows=rows).to_html("页", "提醒"))
    assert [content[1:] for content in read.texts("h3")] == ["第 0 问？", "第 1 问？", "头痛？\n休息。\n多久？"]
    links = [attributes["href"] for tag, attributes, _ in read.tags if tag == "a"][3:6]
    assert links == [f"#{attributes['id']}" for _, attributes, _ in read.tags if "case" in attributes.get("class", "")]
    assert "回答 7 字 · 12 token · 3.2 秒" in read.texts("facts") and "没有参考回答" in read.texts("case")[2]
