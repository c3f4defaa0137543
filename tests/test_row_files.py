"""Every format gives the same rows of the same texts; a file that cannot be read ends with its line and its remedy."""

import codecs
import csv
import json
import re
from pathlib import Path

import pytest
from helpers import as_jsonl, as_parquet, make_row, make_rows, published, run_script, save, written

import data
from parts import row_files
from parts.rows import FIELDS

pytestmark = pytest.mark.usefixtures("folder")
ENDINGS = [".jsonl", ".json", ".csv", ".parquet"]
TEXTS = [
    *("0456", "2024-01-02", "NA", "null", "NaN", "None", "True", "1e5", "", " 空 ", "#注", "'单'", "😀", "\\n"),
    *("分行\u2028后", "分段\u0085\u2029后", '一，a,b\n“二”\n\n"三";\t四', "\n", "甲\r\n乙"),
]
ROWS = [{"question": f"{i}", "think": text, "answer": text * 2} for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("ending", [*ENDINGS, ".JSONL", ".Json", ".CSV", ".PARQUET"])
def test_every_format_gives_the_same_rows_of_the_same_texts(ending):
    assert row_files.read(save(ROWS, "plain" + ending)) == list(enumerate(ROWS, 1))
    assert row_files.read(save(ROWS, "marked" + ending, codecs.BOM_UTF8)) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("ending", ENDINGS)
def test_script_reads_each_format_and_writes_only_the_three_fields(folder, ending):
    # A process of its own: here, what this file imports could stand in for an import that data.py forgot.
    rows = [{"id": str(i), **dict(reversed(row.items())), "来源": "x"} for i, row in enumerate(make_rows(20))]
    result = run_script("data.py", "--dataset", save(rows, "rows" + ending), cwd=folder)
    assert result.returncode == 0, result.stdout
    texts = [as_jsonl(part) for part in published(make_rows(20))]  # UTF-8, one object a line, the same keys in order
    assert [Path(name).read_bytes() for name in ("train.jsonl", "val.jsonl")] == [text.encode() for text in texts]


GOOD = as_jsonl(make_rows(20))
HEAD = "question,think,answer\n"
MISSING = "找不到数据文件 {}；请检查路径，或不带 --dataset 运行 python data.py 下载公开数据集。"
EMPTY = "{} 是空文件；请换一个有内容的文件。"
FOLDER = "{} 是一个文件夹，里面没有数据文件；请指定一个文件"
FORMAT = "不认识 {} 的格式；请转成 .jsonl、.json、.csv、.tsv 或 .parquet（UTF-8）再用 --dataset 指定。"
JSON = "{} 第 %s 行不是合法的 JSON（%s 列）；请修正这一行。"
CODING = "{} 第 %s 行不是 UTF-8 编码（该行第 %s 字节）；请另存为 UTF-8，例如：iconv -f %s -t UTF-8 {} > utf8[]"
NUL = "{} 第 %s 行含 NUL 字节：文件损坏，或是 UTF-16 编码；请另存为 UTF-8。"
DEEP = "{} 第 %s 行的 JSON 嵌套过深；每行只要一个简单的对象。"
COLUMNS = "{} 里认不出问题和回答（有这些列：%s；一行是 ~\n  python -c ~"
CSV = "{} 不是合法的 CSV（%s）；含逗号或换行的文字请用双引号括起。"
PARQUET = "{} 不是完整的 Parquet 文件（~）；请重新导出。"
NO_ROWS = "{} 里没有一行数据；每行需要 question、think、answer 三个字段。"
TOO_FEW = "%s 行中可用的有 %s 行，划分后%s为空；请提供更多不同的行。"
NONE = "%s 行中可用的有 0 行，划分后训练集为空；请按下面的原因改正。"
EQUAL = "\n  与前面的行重复：9 行（第 1、2、3、4、5 等 行）"
KEEP = "\n  没有思考的行加 --without_thinking keep 就会采用，作为不思考的回答来学"
NEITHER = "--dataset {} 既不是已有的文件，也不是 ModelScope 数据集名（形如 owner/name）。"
VAL_PLACES = sorted(published(range(1, 21))[1])
ERRORS = [  # name, content (None: nothing, ...: a folder, Path: a link), message with {} for the name, [] its ending
    ("missing.jsonl", None, MISSING),
    ("folder.jsonl", ..., FOLDER),
    ("n" * 300 + ".jsonl", None, MISSING),
    ("empty.jsonl", "", EMPTY),
    ("blank.csv", " \n\t\r\n", EMPTY),
    ("only-a-mark.json", "\ufeff\n", EMPTY),
    ("rows.xlsx", "x", FORMAT),
    ("folder", ..., FOLDER),
    ("gbk.jsonl", GOOD.encode() + GOOD.encode("gbk"), CODING % (21, 15, "GB18030")),
    ("gbk.json", '[\n"我"]'.encode("gbk"), CODING % (2, 2, "GB18030")),
    ("gbk.csv", f"{HEAD}q,t,a\n问,思,答\n".encode("gbk"), CODING % (3, 1, "GB18030")),
    ("utf-16.jsonl", GOOD.encode("utf-16"), CODING % (1, 1, "UTF-16")),
    ("utf-16.json", json.dumps(make_rows(2)).encode("utf-16"), CODING % (1, 1, "UTF-16")),
    ("utf-16-unmarked.csv", HEAD.encode("utf-16-be"), NUL % 1),
    ("utf-16-unmarked.jsonl", GOOD.encode("utf-16-le"), NUL % 1),
    ("utf-32.jsonl", GOOD.encode("utf-32"), CODING % (1, 1, "UTF-32")),
    ("half-a-pair.jsonl", GOOD.encode().replace("思考7".encode(), b"\xed\xa0\xbd"), CODING % (7, 38, "GB18030")),
    ("latin-1.csv", f"{HEAD}caf\xe9,t,a\n".encode("latin-1"), CODING % (2, 4, "GB18030")),
    ("nul.jsonl", GOOD.replace("思考7", "思\0考7"), NUL % 7),
    ("nul.csv", f"{HEAD}q,t\0,a\n", NUL % 2),
    ("zeros-at-the-end.jsonl", GOOD + "\0" * 512, NUL % 21),
    ("old-mac.jsonl", GOOD.replace("\n", "\r"), JSON % (1, "Extra data，第 57")),
    (
        "50-MB-line-cut.jsonl",
        f'{GOOD}{{"think": "' + "思" * 17_000_000,
        JSON % (21, "Unterminated string starting at，第 11"),
    ),
    (
        "single-quotes.jsonl",
        GOOD.replace('"', "'"),
        JSON % (1, "Expecting property name enclosed in double quotes，第 2"),
    ),
    ("comma-at-the-end.json", "[{},\n]", JSON % ("~", "~")),
    ("half-an-array.json", json.dumps(make_rows(2), indent=1)[:-2], JSON % (11, "Expecting ',' delimiter，第 3")),
    ("twice.csv", "question,think,answer,answer\nq,t,a,b\n", "{} 的表头里有重复的列名；请改名，或删掉不要的一列。"),
    ("no-header.csv", "q1,t1,a1\nq2,t2,a2\n", COLUMNS % "“q1”、“t1”、“a1”"),
    (
        "numbers.parquet",
        as_parquet({"question": ["q"], "think": ["t"]} | {"answer": [None]}),
        NONE % 1 + "\n  answer 为 null：1 行（第 1 行）",
    ),
    (
        "tags-in-all.jsonl",
        GOOD.replace("思考", "<think>思考"),
        NONE % 20 + "\n  think 含 <think> 或 </think> 标签：20 行（第 1、2、3、4、5 等 行）",
    ),
    (
        "validation-empty.jsonl",
        as_jsonl([row | {"answer": ""} if row in published(make_rows(20))[1] else row for row in make_rows(20)]),
        TOO_FEW % (20, 18, "验证集") + "\n  answer 为空：2 行（第 {}、{} 行）".format(*VAL_PLACES),
    ),
    ("link-to-itself.jsonl", Path("link-to-itself.jsonl"), MISSING),
    ("link-to-nothing.jsonl", Path("nothing"), MISSING),
    ("link-to-a-folder.jsonl", Path(), FOLDER),
    ("unreadable.jsonl", Path("/proc/self/mem"), "无法读取 {}（Input/output error）；请检查文件权限。"),
    ("words.jsonl", f"{GOOD}\n头痛\n", JSON % (22, "Expecting value，第 1")),
    ("cut.jsonl", GOOD[:-5], JSON % (20, "Unterminated string starting at，第 51")),
    ("deep.jsonl", GOOD + "[" * 100000, DEEP % 21),
    ("deep.json", "[" * 100000, DEEP % 1),
    ("object.json", "{}", COLUMNS % "无"),
    ("number.json", "5", NONE % 1 + "\n  不是对象：1 行（第 1 行）"),
    ("none.json", "[]", NO_ROWS),
    ("none.csv", HEAD, NO_ROWS),
    ("none.parquet", as_parquet({field: [] for field in FIELDS}), NO_ROWS),
    ("columns.jsonl", as_jsonl([{"think": "思", "问": "b", "a": 1}]), COLUMNS % "“think”、“问”、“a”"),
    ("columns.csv", "question,label\n问,答\n", COLUMNS % "“question”、“label”"),
    ("columns.parquet", as_parquet({"think": ["t"], "x": ["x"]}), COLUMNS % "“think”、“x”"),
    ("one.jsonl", as_jsonl(make_rows(1)), TOO_FEW % (1, 1, "训练集")),
    (
        "bad.jsonl",
        as_jsonl([make_row(1, think="")] * 9),
        NONE % 9 + "\n  think 为空：9 行（第 1、2、3、4、5 等 行）" + KEEP,
    ),
    ("equal.jsonl", as_jsonl([make_row(1)] * 10), TOO_FEW % (10, 1, "验证集") + EQUAL),
    ("quote.csv", f'{HEAD}q,"t,a\nq,t,a\n', CSV % "~"),
    ("comma.csv", f"{HEAD}q,t,a\nq,t,a,b\n", CSV % "~"),
    ("commas.csv", HEAD + "q,t,a,b\n" * 20, CSV % "第 1 行数据比表头多出字段"),
    ("words.parquet", "words", PARQUET),
    ("cut.parquet", as_parquet(dict.fromkeys(FIELDS, ["q"]))[:-9], PARQUET),
    ("gbk.parquet", as_parquet(dict.fromkeys(FIELDS, ["我".encode("gbk")])), PARQUET),
    ("nonsense", None, NEITHER),
    ("a/b/c", None, NEITHER),
    ("n" * 300, None, NEITHER),
]


@pytest.mark.parametrize("name, content, message", ERRORS, ids=[name[-20:] for name, _, _ in ERRORS])
def test_unusable_source_ends_with_its_remedy_and_writes_nothing(fails, name, content, message):
    if content is ...:
        Path(name).mkdir()
    elif isinstance(content, Path):
        Path(name).symlink_to(content)
    elif content is not None:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    fails(message.replace("{}", name).replace("[]", Path(name).suffix), "--dataset", name)


ODD = {  # what looks wrong and is fine: how the 20 good rows are written, and the rows that come of it
    "byte order mark": lambda: b"\xef\xbb\xbf" + GOOD.encode(),
    "CRLF": lambda: GOOD.replace("\n", "\r\n").encode(),
    "mark and CRLF": lambda: b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode(),
    "no line end at the end": lambda: GOOD.rstrip("\n").encode(),
    "empty lines": lambda: GOOD.replace("\n", "\n\n \n").encode(),
    "all escaped": lambda: "".join(json.dumps(row) + "\n" for row in make_rows(20)).encode(),
    "other fields, nested": lambda: GOOD.replace("{", '{"metrics": {"f1": [1e400, {}]}, ').encode(),
    "arrays of lines": lambda: json.dumps(make_rows(20), indent=1).encode(),
    "a mark in the middle": lambda: GOOD.replace(as_jsonl([make_row(9)]), "\ufeff" + as_jsonl([make_row(9)])).encode(),
    "an array in a line": lambda: json.dumps(make_rows(20)).encode(),
    "names in capitals, with blanks": lambda: GOOD.replace('"think"', '" Think\u200b "').encode(),
    "tags around the thinking": lambda: re.sub("(思考.*?。)", r"<think>\\n\1</think>", GOOD).encode(),
    "spaces around": lambda: GOOD.replace("。", "。\\u3000 ").encode(),
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_odd_file_gives_the_same_rows(content):
    Path("odd.jsonl").write_bytes(content())
    data.prepare("odd.jsonl")
    assert written() == published(make_rows(20))


def test_header_of_a_joined_table_is_no_row():
    save(make_rows(9), "rows.csv", codecs.BOM_UTF8)
    Path("twice.csv").write_bytes(Path("rows.csv").read_bytes() * 2)
    assert [row for _, row in row_files.read("twice.csv")] == make_rows(9) * 2


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_other_line_ends_of_a_table(end):
    Path("rows.csv").write_bytes(end.join(["", "question;think;answer", "问;想;答", ""]).encode())
    assert row_files.read("rows.csv") == [(1, {"question": "问", "think": "想", "answer": "答"})]


TABLES = {
    "semicolons.csv": ";",
    "tabs.csv": "\t",
    "tabs.tsv": "\t",
    "commas.tsv": ",",
}


@pytest.mark.parametrize("name", TABLES)
def test_separator_is_read_from_the_header(name):
    save([row | {"answer": "甲,乙；\t;丙"} for row in make_rows(20)], "rows.csv")
    with open("rows.csv", encoding="utf-8", newline="") as file, open(name, "w", encoding="utf-8", newline="") as out:
        csv.writer(out, delimiter=TABLES[name]).writerows(csv.reader(file))
    assert row_files.read(name) == row_files.read("rows.csv") and len(row_files.read(name)) == 20


NAMED_JSON = {"lines": GOOD, "array": json.dumps(make_rows(20))}
NAMED_JSON["a list in it"] = json.dumps({"total": 20, "data": make_rows(20)})


@pytest.mark.parametrize("text", NAMED_JSON.values(), ids=NAMED_JSON)
def test_json_is_read_as_what_it_is(text):
    Path("rows.json").write_text(text, encoding="utf-8")
    data.prepare("rows.json")
    assert written() == published(make_rows(20))


def test_folder_is_named_with_the_files_in_it(fails):
    Path("here").mkdir()
    save(make_rows(20), "here/rows.jsonl")
    fails(
        "here 是一个文件夹，里面的数据文件有 rows.jsonl；请指定一个文件：python data.py --dataset here/rows.jsonl",
        "--dataset",
        "here",
    )


@pytest.mark.parametrize("text", ["空\0字", "<|im_end|>", "思" * 17_000_000], ids=["NUL", "control token", "50 MB"])
def test_odd_text_is_kept_as_it_is(text):
    rows = [*make_rows(19), make_row(20, think=text)]
    data.prepare(save(rows, "odd.jsonl"))
    assert written() == published(rows)


def test_question_may_speak_of_the_tags():
    rows = [*make_rows(19), make_row(20, question="<think> 是什么？")]
    data.prepare(save(rows, "odd.jsonl"))
    assert written() == published(rows)


@pytest.mark.parametrize(
    ("path", "beside"), [("val.jsonl", "val.clean.jsonl"), ("a/my.val.json", "a/my.val.clean.jsonl")]
)
def test_the_clean_text_stands_beside_the_published_one(path, beside):
    assert Path(row_files.clean_path(path)) == Path(beside)
