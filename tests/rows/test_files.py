"""Every format gives the same rows of the same texts; a file that cannot be read ends with its line and its remedy."""

import codecs
import csv
import json
import re
from pathlib import Path

import pytest
from helpers import as_jsonl, as_parquet, make_row, make_rows, published, refused, run_script, save, written

import data
from parts.rows import files
from parts.rows.row import FIELDS

pytestmark = pytest.mark.usefixtures("folder")
ENDINGS = [".jsonl", ".json", ".csv", ".parquet"]
TEXTS = [
    *("0456", "2024-01-02", "NA", "null", "NaN", "None", "True", "1e5", "", " 空 ", "#注", "'单'", "😀", "\\n"),
    *("分行\u2028后", "分段\u0085\u2029后", '一，a,b\n“二”\n\n"三";\t四', "\n", "甲\r\n乙"),
]
ROWS = [{"question": f"{i}", "think": text, "answer": text * 2} for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("ending", [*ENDINGS, ".JSONL", ".CSV"])
def test_every_format_gives_the_same_rows_of_the_same_texts(ending):
    assert files.read(save(ROWS, "plain" + ending)) == list(enumerate(ROWS, 1))
    assert files.read(save(ROWS, "marked" + ending, codecs.BOM_UTF8)) == list(enumerate(ROWS, 1))


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
MISSING, EMPTY, FOLDER = "找不到数据文件 {}；~", "{} 是空文件；~", "{} 是一个文件夹（里面的数据文件：没有）；~"
JSON, CODING = "{} 第 %s 行不是合法的 JSON（~）；~", "{} 第 %s 行不是 UTF-8 编码；~iconv -f %s ~"
NUL, DEEP = "{} 第 %s 行含 NUL 字节~", "{} 第 %s 行的 JSON 嵌套过深；~"
CSV, PARQUET = "{} 不是合法的 CSV（~）；~", "{} 不是完整的 Parquet 文件（~）；~"
COLUMNS, NO_ROWS = "{} 里认不出问题和回答（有这些列：%s；~\n~", "{} 里没有一行数据；~"
TOO_FEW = "划分后%s为空，可用的只有 %s 行；~"
ERRORS = {  # name: (content, message with {} for the name); None: nothing, ...: a folder, Path: a link
    "missing.jsonl": (None, MISSING),
    "folder": (..., FOLDER),
    "blank.csv": (" \n\t\r\n", EMPTY),
    "rows.xlsx": ("x", "不认识 {} 的格式；~"),
    "gbk.jsonl": (GOOD.encode() + GOOD.encode("gbk"), CODING % (21, "GB18030")),
    "gbk.json": ('[\n"我"]'.encode("gbk"), CODING % (2, "GB18030")),
    "utf-16-unmarked.csv": (HEAD.encode("utf-16-be"), NUL % 1),
    "nul.jsonl": (GOOD.replace("思考7", "思\0考7"), NUL % 7),
    "50-MB-line-cut.jsonl": (f'{GOOD}{{"think": "' + "思" * 17_000_000, JSON % 21),
    "deep.jsonl": (GOOD + "[" * 100000, DEEP % 21),
    "deep.json": ("[" * 100000, DEEP % 1),
    "twice.csv": ("question,think,answer,answer\nq,t,a,b\n", CSV),
    "quote.csv": (f'{HEAD}q,"t,a\nq,t,a\n', CSV),
    "comma.csv": (f"{HEAD}q,t,a\nq,t,a,b\n", CSV),
    "cut.parquet": (as_parquet(dict.fromkeys(FIELDS, ["q"]))[:-9], PARQUET),
    "gbk.parquet": (as_parquet(dict.fromkeys(FIELDS, ["我".encode("gbk")])), PARQUET),
    "none.json": ("[]", NO_ROWS),
    "none.csv": (HEAD, NO_ROWS),
    "columns.csv": ("question,label\n问,答\n", COLUMNS % "“question”、“label”"),
    "object.json": ("{}", COLUMNS % "无"),
    "one.jsonl": (as_jsonl(make_rows(1)), TOO_FEW % ("训练集", 1)),
    "number.json": ("5", TOO_FEW % ("训练集", 0) + "\n  不是对象：1 行（第 1 行）"),
    "equal.jsonl": (as_jsonl([make_row(1)] * 10), TOO_FEW % ("验证集", 1) + "\n  与前面的行重复：9 行（~）"),
    "numbers.parquet": (
        as_parquet({"question": ["q"], "think": ["t"]} | {"answer": [None]}),
        TOO_FEW % ("训练集", 0) + "\n  answer 为 null：1 行（第 1 行）",
    ),
    "link-to-itself.jsonl": (Path("link-to-itself.jsonl"), MISSING),
    "unreadable.jsonl": (Path("/proc/self/mem"), "无法读取 {}（~）；请检查文件权限。"),
    "nonsense": (None, "--dataset {} 既不是已有的文件，也不是 ModelScope 数据集名~"),
    "a/b/c": (None, "--dataset {} 既不是已有的文件，也不是 ModelScope 数据集名~"),
}


@pytest.mark.parametrize("name", ERRORS, ids=[name[-20:] for name in ERRORS])
def test_unusable_source_ends_with_its_remedy_and_writes_nothing(name):
    content, message = ERRORS[name]
    if content is ...:
        Path(name).mkdir()
    elif isinstance(content, Path):
        Path(name).symlink_to(content)
    elif content is not None:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    before = list(Path().iterdir())
    refused(message.replace("{}", name), data.prepare, name)
    assert list(Path().iterdir()) == before


ODD = {  # what looks wrong and is fine: how the 20 good rows are written
    "byte order mark": b"\xef\xbb\xbf" + GOOD.encode(),
    "CRLF": GOOD.replace("\n", "\r\n").encode(),
    "empty lines": GOOD.replace("\n", "\n\n \n").encode(),
    "other fields, nested": GOOD.replace("{", '{"metrics": {"f1": [1e400, {}]}, ').encode(),
    "arrays of lines": json.dumps(make_rows(20), indent=1).encode(),
    "a mark in the middle": GOOD.replace(as_jsonl([make_row(9)]), "\ufeff" + as_jsonl([make_row(9)])).encode(),
    "names in capitals, with blanks": GOOD.replace('"think"', '" Think\u200b "').encode(),
    "tags around the thinking": re.sub("(思考.*?。)", r"<think>\\n\1</think>", GOOD).encode(),
}
NAMED_JSON = {"lines": GOOD, "array": json.dumps(make_rows(20)), "list": json.dumps({"n": 1, "data": make_rows(20)})}


def test_odd_file_gives_the_same_rows():
    files = {f"{name}.jsonl": content for name, content in ODD.items()}
    files |= {f"{name}.json": text.encode() for name, text in NAMED_JSON.items()}  # read as what it is
    for name, content in files.items():
        Path(name).write_bytes(content)
        data.prepare(name)
        assert written() == published(make_rows(20)), name


def test_header_of_a_joined_table_is_no_row():
    save(make_rows(9), "rows.csv", codecs.BOM_UTF8)
    Path("twice.csv").write_bytes(Path("rows.csv").read_bytes() * 2)
    assert [row for _, row in files.read("twice.csv")] == make_rows(9) * 2


@pytest.mark.parametrize("name, separator", [("semicolons.csv", ";"), ("tabs.csv", "\t"), ("tabs.tsv", "\t")])
def test_separator_is_read_from_the_header_whatever_the_line_ends(name, separator):
    save([row | {"answer": "甲,乙；\t;丙"} for row in make_rows(20)], "rows.csv")
    for end in ("\n", "\r", "\r\n"):
        with (
            open("rows.csv", encoding="utf-8", newline="") as file,
            open(name, "w", encoding="utf-8", newline="") as out,
        ):
            csv.writer(out, delimiter=separator, lineterminator=end).writerows([[], *csv.reader(file)])
        assert files.read(name) == files.read("rows.csv") and len(files.read(name)) == 20


def test_folder_is_named_with_the_files_in_it():
    Path("here").mkdir()
    save(make_rows(20), "here/rows.jsonl")
    refused("here 是一个文件夹（里面的数据文件：rows.jsonl）；~", data.prepare, "here")


def test_odd_text_is_kept_as_it_is():
    rows = [*make_rows(16), make_row(17, question="<think> 是什么？"), make_row(18, think="空\0字")]
    rows += [make_row(19, think="<|im_end|>"), make_row(20, think="思" * 17_000_000)]
    data.prepare(save(rows, "odd.jsonl"))
    assert written() == published(rows)
