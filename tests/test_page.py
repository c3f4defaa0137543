"""The page of replies: as a parser and, where there is one, a browser read it."""

import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from helpers import contents, refused

from parts import page, traces
from parts.page import Case

HOSTILE = [
    "<script>document.title = 'taken'</script>",
    "</div></details></section><h1>out</h1>",
    "<!-- & --> &lt; &amp;lt; &#60; ]]> <![CDATA[",
    '"\' onclick="alert(1)" `${title}` $title $$',
    '<img src="http://127.0.0.1:9/x.png" onerror="alert(1)"><style>body{display:none}</style><plaintext>',
    "第一行\n\n  第二行\t缩进  两个空格",
    "ما هو سكر الدم؟ 空腹血糖 3.9–6.1 mmol/L 👨‍👩‍👧",
    "长" * 3000,
]
LEAK = "先想一想。答案里提到多喝水，根据用户提供的答案，需要写出思考过程。"
VOID = {"meta", "input"}


class Reader(HTMLParser):
    """Elements as [tag, attributes, all text inside], in order."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.open.append(self.found[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def texts(self, name: str) -> list[str]:
        """Of the elements with this tag or class."""
        return [text for tag, attributes, text in self.found if name in (tag, *attributes.get("class", "").split())]


def reply(answer="多喝水。", think="想一想。", complete=True, **more) -> dict:
    return {"think": think, "answer": answer, "complete": complete} | more


def case(difference=0.0, question="感冒了怎么办？", reference=None, replies=None, **more) -> Case:
    return Case(question, reference, replies or [("基础", reply()), ("微调", reply())], difference, **more)


def hostile_page() -> str:
    cases = [
        case(1.0, text, {"answer": text}, [(text, reply(text, text)), ("微调", reply(text))], note=text)
        for text in HOSTILE
    ]
    tables = [(HOSTILE[0], HOSTILE[:3], [HOSTILE[:3], HOSTILE[3:6]], HOSTILE[3:5])]
    return page.render(HOSTILE[0], tables, cases, measure=HOSTILE[1], notice=HOSTILE[2])


def is_inert(text: str) -> Reader:
    """Nothing in the page runs or is fetched, every element is closed, and the texts are those of `hostile_page`."""
    read = Reader(text)
    assert not read.open
    assert not {tag for tag, *_ in read.found} & {
        "script",
        "img",
        "link",
        "iframe",
        "object",
        "base",
        "form",
        "plaintext",
    }
    for _, attributes, _ in read.found:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        assert attributes.get("href", "#").startswith("#")
    assert "default-src 'none'" in read.found[3][1]["content"]
    assert read.texts("h1") == [HOSTILE[0]] and read.texts("title") == [HOSTILE[0]]
    assert read.texts("notice") == [HOSTILE[2]]
    assert read.texts("td") == [*HOSTILE[1:3], *HOSTILE[4:6]]
    assert read.texts("text") == [shown for text in HOSTILE for shown in [text, text, text, "想一想。", text, text]]
    assert read.texts("facts")[1:3] == HOSTILE[3:5]
    assert read.texts("h4") == [name for text in HOSTILE for name in (text, "微调")]
    return read


def test_texts_come_back_as_they_were_and_none_acts():
    is_inert(hostile_page())


def test_in_a_browser_texts_come_back_as_they_were_and_none_acts(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if not browser:
        pytest.skip("no Chromium or Chrome here")
    (tmp_path / "page.html").write_text(hostile_page(), encoding="utf-8", newline="")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--dump-dom",
    ]
    read = subprocess.run([*command, f"file://{tmp_path}/page.html"], capture_output=True, timeout=60).stdout.decode()
    is_inert(read)


@pytest.mark.parametrize("unseen", "\0\x1b\x7f\x85\r\u061c\u200f\u202e\u2067\ud800\udfff")
def test_what_is_not_seen_is_named(unseen, tmp_path):
    page.write(str(tmp_path / "page.html"), f"甲{unseen}乙", [], [case(question=f"甲{unseen}乙")])
    read = Reader((tmp_path / "page.html").read_bytes().decode())
    assert read.texts("h1") == read.texts("text")[:1] == [f"甲[U+{ord(unseen):04X}]乙"]


def test_traces_are_marked_where_they_are_and_only_in_the_thinking():
    found = traces.find(LEAK, "感冒了怎么办？", LEAK)
    assert found
    read = Reader(page.render("页", [], [case(replies=[("基础", reply()), ("微调", reply(LEAK, LEAK))])]))
    marks = [(attributes["title"], text) for tag, attributes, text in read.found if tag == "mark" and attributes]
    assert marks == [(traces.KINDS[kind], LEAK[start:end]) for kind, start, end in found]
    assert read.texts("text")[3:] == [LEAK, LEAK]
    assert all(traces.KINDS[trace.kind] in read.texts("summary")[2] for trace in found)
    assert (
        "有痕迹 1" in read.texts("nav")[0] and len(read.texts("traced")) == 2
    )  # its section, and its line of the list


def test_marks_keep_their_place_after_what_is_not_seen():
    read = Reader(page.render("页", [], [case(replies=[("微调", reply(think="\0<b>&" + LEAK))])]))
    marked = [text for tag, attributes, text in read.found if tag == "mark" and attributes]
    assert marked == [LEAK[start:end] for _, start, end in traces.find(LEAK, "感冒了怎么办？", "多喝水。")]


def test_largest_differences_come_first_and_the_list_leads_to_them():
    values = {"小": 0.1, "无": float("nan"), "负": -0.6, "大": 0.5, "零": 0.0, "同": 0.5}
    read = Reader(page.render("页", [], [case(value, question) for question, value in values.items()]))
    questions = ["负", "大", "同", "小", "零", "无"]
    assert [text[1:] for text in read.texts("h3")] == questions
    lines = ["负 −0.60", "大 0.50", "同 0.50", "小 0.10", "零 0.00", "无 —"]
    assert [line.strip() for line in read.texts("li")] == lines
    links = [attributes["href"] for tag, attributes, text in read.found if tag == "a" and text in questions]
    assert links == [f"#{attributes['id']}" for _, attributes, _ in read.found if "case" in attributes.get("class", "")]


@pytest.mark.parametrize(
    ("made", "label"),
    [
        (reply(), []),
        (reply(complete=False), ["回答没有写完"]),
        (reply("", complete=False), ["断在思考里，没有回答"]),
        (reply("", form="unclosed"), ["断在思考里，没有回答"]),  # it stopped by itself there
        (reply(form="broken"), ["思考不是恰好一段"]),
        (reply(form="one"), []),
        (reply(think="", form="none"), []),
        (reply(""), ["没有回答"]),
        (reply(think=""), []),
    ],
)
def test_reply_that_is_not_whole_says_so(made, label):
    read = Reader(page.render("页", [], [case(replies=[("微调", made)])]))
    assert read.texts("problem") == label
    assert len(read.texts("broken")) == (2 if label else 0)
    assert ("没有思考" in read.texts("reply")[0]) == (not made["think"])


def test_counts_and_folds():
    made = reply(think="四个字。", tokens=12, seconds=3.25)
    text = page.render("页", [], [case(reference={"answer": "参考"}, replies=[("甲", made)], note="平")], measure="差")
    read = Reader(text)
    assert read.texts("summary") == ["按 差 的大小排列", "思考 4 字", "参考回答 2 字"]
    facts = read.texts("facts")
    assert (
        facts[0] == "1 个问题，每个 1 份回复" and "差 0.00 · 平" in facts and "回答 4 字 · 12 token · 3.2 秒" in facts
    )
    assert [attributes for tag, attributes, _ in read.found if tag == "details"] == [{"open": None}, {}, {}]
    assert "没有参考回答" in Reader(page.render("页", [], [case()])).texts("case")[0]


def test_many_cases_make_one_page_that_stays_small():
    replies = [("基础", reply("答" * 300, "想" * 1500)), ("微调", reply("答" * 300, LEAK * 45))]
    cases = [case(place / 241, replies=replies) for place in range(241)]
    text = page.render("页", [], cases)
    assert text.count('<section class="case') == 241 and len(text.encode()) < 6e6
    assert "<details><summary>按" in text  # the list is folded


def test_page_of_nothing():
    assert Reader(page.render("页", [("分数", ["", "甲"], [])], [])).texts("th") == ["", "甲"]


def test_page_that_cannot_be_written_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("旧")
    (tmp_path / "folder").mkdir()
    before = contents(tmp_path)
    for path in (tmp_path / "file" / "page.html", tmp_path / "folder"):
        refused(f"无法写入网页 {path}（~）；请腾出空间，或换一个位置。", page.write, str(path), "页", [], [case()])
    assert contents(tmp_path) == before
    page.write(str(tmp_path / "file"), "页", [], [case()])
    assert Reader((tmp_path / "file").read_text(encoding="utf-8")).texts("h1") == ["页"]
