"""Every format gives the same rows of the same texts; a file that cannot be read ends with its line and its remedy."""

import codecs
import csv
import datetime
import gzip
import json
import re
import sys
from pathlib import Path

import datasets
import pytest
from helpers import as_jsonl, as_parquet, as_xlsx, make_row, make_rows, published, refused, run_script, save, written
from pandas import DataFrame

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
    numbered = list(enumerate(ROWS, 2 if ending.lower() == ".csv" else 1))  # a table's header is its first row
    assert files.read(save(ROWS, "plain" + ending)) == numbered
    assert files.read(save(ROWS, "marked" + ending, codecs.BOM_UTF8)) == numbered


@pytest.mark.parametrize("ending", [*ENDINGS, ".xlsx"])
def test_script_reads_each_format_and_writes_only_the_three_fields(folder, ending):
    # A process of its own: here, what this file imports could stand in for an import that data.py forgot.
    rows = [{"id": "7", **dict(reversed(row.items())), "来源": "x"} for row in make_rows(20)]
    result = run_script("data.py", "--dataset", save(rows, "rows" + ending), cwd=folder)
    assert result.returncode == 0, result.stdout
    texts = [as_jsonl(part) for part in published(make_rows(20))]  # UTF-8, one object a line, the same keys in order
    assert [Path(name).read_bytes() for name in ("train.jsonl", "val.jsonl")] == [text.encode() for text in texts]


GOOD = as_jsonl(make_rows(20))
HEAD = "question,think,answer\n"
LINES = [",".join(row.values()) + "\n" for row in make_rows(20)]
ERRORS = {  # name: (content, None where there is no file; message with {} for the name)
    "missing.jsonl": (None, "无法读取数据文件 {}（~）；~"),
    ".": (None, "{} 是文件夹；请指定里面的一个数据文件：~"),
    "blank.csv": (" \n\t\r\n", "{} 是空文件；~"),
    "rows.xls": ("x", "不支持 {} 的格式；~"),
    "damaged.xlsx": ("x", "无法读取 {}（~）；请改正，或重新另存为 .xlsx"),
    "twice.xlsx": (as_xlsx([[*FIELDS, "answer"], ("q", "t", "a", "b")]), "无法读取 {}（表头里有重复的列名）；~"),
    "pointer.parquet": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "{} ~；~运行 git lfs pull。"),
    "page.jsonl": ("\n<!DOCTYPE html>\n<html></html>", "{} 是一个网页~"),
    "packed.jsonl.gz": (gzip.compress(GOOD.encode()), "{} 是压缩包；请解压~"),
    "old.xlsx": (b"\xd0\xcf\x11\xe0" + bytes(600), "{} 是 PDF、XML 或旧格式的 Office 文件；~"),
    "sheets.xlsx": (as_xlsx(*[[FIELDS, ("q", "t", "a")]] * 2), "{} 有几个工作表都有数据（表0、表1）；~"),
    "blank.xlsx": (as_xlsx(), "{} 里没有数据；~"),
    "joined.jsonl": (GOOD.encode() + GOOD.encode("gbk"), "{} 第 21 行不是 UTF-8（也不是 GB18030）；~"),
    # Both would decode as GB18030, to Chinese that nobody wrote.
    "one bad byte.csv": (f"{HEAD}é,é,é\n".encode() + b"\xe9t,t,a\n", "{} 第 3 行不是 UTF-8~"),
    "Windows-1252.csv": (HEAD.encode() + b"Don\x92t.,t,a\n", "{} 第 2 行不是 UTF-8~"),
    "blank-utf-16.csv": ("\n \n".encode("utf-16"), "{} 是空文件；~"),
    "utf-16-unmarked.csv": (HEAD.encode("utf-16-be"), "{} 第 1 行含 NUL 字节~"),
    "nul.jsonl": (GOOD.replace("思考7", "思\0考7"), "{} 第 7 行含 NUL 字节~"),
    "long-line-cut.jsonl": (f'{GOOD}{{"think": "' + "思" * 10**6, "{} 第 21 行不是合法的 JSON（~）；~"),
    "array-cut.json": ('[\n{"question":', "{} 第 2 行（从第 1 行开始）不是合法的 JSON（~）；~"),
    "deep.jsonl": (GOOD + "[" * 100000, "{} 第 21 行不是合法的 JSON（嵌套过深）；~"),
    "twice.csv": ("question,think,answer,answer\nq,t,a,b\n", "{} 不是合法的 CSV（~）；~"),
    "quote.csv": (f'{HEAD}q,"t,a\nq,t,a\n', "{} 不是合法的 CSV（~）；~"),
    "comma.csv": (f"{HEAD}q,t,a\nq,t,a,b\n", "{} 不是合法的 CSV（~）；~"),
    "cut.parquet": (as_parquet(dict.fromkeys(FIELDS, ["q"]))[:-9], "{} 不是完整的 Parquet 或 Arrow 文件（~）；~"),
    "none.json": ("[]", "{} 里没有数据；~"),
    "columns.csv": (
        "question,la\x1b[31mbel\n问,答\n",
        "{} 里认不出问题和回答（有这些列：“question”、“la[U+001B][31mbel”；~\n~python -c ~",
    ),
    "number.json": ("5", "划分后训练集为空，可用的只有 0 行；~\n  不是对象：1 行（第 1 行）"),
    "equal.jsonl": (as_jsonl([make_row(1)] * 10), "划分后验证集为空，可用的只有 1 行；~\n  与前面的行重复：9 行（~）"),
    "nonsense": (None, "--dataset {} 既不是已有的文件，也不是 hub 上的数据集名~"),
}


@pytest.mark.parametrize("name", ERRORS, ids=[name[-20:] for name in ERRORS])
def test_unusable_source_ends_with_its_remedy_and_writes_nothing(name):
    content, message = ERRORS[name]
    if content is not None:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    before = list(Path().iterdir())
    refused(message.replace("{}", name), data.prepare, name)
    assert list(Path().iterdir()) == before


ODD = {  # what looks wrong and is fine: how the 20 good rows are written
    "crlf.jsonl": GOOD.replace("\n", "\r\n"),
    "other fields, nested.jsonl": GOOD.replace("{", '{"metrics": {"f1": [1e400, {}]}, '),
    "an array of lines.jsonl": json.dumps(make_rows(20), indent=1),
    "a mark in the middle.jsonl": GOOD.replace(as_jsonl([make_row(9)]), "\ufeff" + as_jsonl([make_row(9)])),
    "names in capitals, with blanks.jsonl": GOOD.replace('"think"', '" Think\u200b "'),
    "tags around the thinking.jsonl": re.sub("(思考.*?。)", r"<think>\\n\1</think>", GOOD),
    "one over many lines.jsonl": "\n".join(json.dumps(row, indent=1) for row in make_rows(20)),
    "an array without its brackets.jsonl": GOOD.replace("\n", ",\n"),
    "JSON.csv": GOOD,
    "columns.json": json.dumps(dict(zip(FIELDS, map(list, zip(*map(dict.values, make_rows(20))))))),
    **{f"{orient}.json": DataFrame(make_rows(20)).to_json(orient=orient) for orient in ("columns", "index", "split")},
    "Excel's own line.csv": f"sep=;\r\n{HEAD}{''.join(LINES)}".replace(",", ";") + ";;\r\n",
    "list.json": json.dumps({"n": 1, "data": make_rows(20)}),
    "two tables, joined.csv": HEAD + "".join(LINES[:9]) + "\ufeff" + HEAD + "".join(LINES[9:]),
}


def test_odd_file_gives_the_same_rows():
    for name, text in ODD.items():
        Path(name).write_bytes(text.encode())
        data.prepare(name)
        assert written() == published(make_rows(20)), name


def test_content_decides_whatever_the_name_says():
    rows = make_rows(20)
    datasets.Dataset.from_list(rows).save_to_disk("saved")
    Path("parquet.jsonl").write_bytes(as_parquet({field: [row[field] for row in rows] for field in FIELDS}))
    Path("sheet.csv").write_bytes(as_xlsx([FIELDS, *map(tuple, map(dict.values, rows))]))
    for name in ("saved", "saved/data-00000-of-00001.arrow", "parquet.jsonl", "sheet.csv"):
        data.prepare(name)
        assert written() == published(rows), name
    assert data.read_origin("train.jsonl")["sources"][0]["source"] == "sheet.csv"


@pytest.mark.parametrize("name, separator", [("semicolons.csv", ";"), ("tabs.csv", "\t"), ("tabs.tsv", "\t")])
def test_separator_is_read_from_the_header_whatever_the_line_ends(name, separator):
    rows = [row | {"answer": "甲,乙；\t;丙"} for row in make_rows(20)]
    for end in ("\n", "\r", "\r\n"):
        with open(name, "w", encoding="utf-8", newline="") as out:
            table = csv.writer(out, delimiter=separator, lineterminator=end)
            table.writerows([[], FIELDS, *(row.values() for row in rows)])
        assert files.read(name) == list(enumerate(rows, 3))  # a blank row, and the header


def test_odd_text_is_kept_as_it_is():
    rows = [*make_rows(18), make_row(19, question="<think> 和 <|im_end|> 是什么？"), make_row(20, think="思" * 10**6)]
    data.prepare(save(rows, "odd.jsonl"))
    assert written() == published(rows)


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
def test_what_excel_saves_in_china_is_read_and_told(encoding, capsys):
    Path("rows.csv").write_text(HEAD + "".join(LINES), encoding=encoding, newline="\r\n")
    data.prepare("rows.csv")
    assert written() == published(make_rows(20))
    assert f"\n编码      rows.csv 不是 UTF-8，按 {encoding.upper()} 读取\n" in capsys.readouterr().out


def test_cells_of_a_sheet_are_what_was_typed(monkeypatch, capsys):
    """Numbers, dates and errors are no text, an empty cell is none; rows have the sheet's numbers."""
    cells = [120, datetime.datetime(2024, 1, 2), "#NAME?", None, "0456", "NA"]
    rows = [row | {"answer": cell} for row, cell in zip(make_rows(6), cells)] + make_rows(60, first=7)
    data.prepare(save(rows, "rows.xlsx"))
    assert sorted(map(str, sum(written(), []))) == sorted(map(str, rows[4:]))
    out = capsys.readouterr().out
    assert "answer 不是文本：3 行（第 2 行、第 3 行、第 4 行）" in out and "answer 为空：1 行（第 5 行）" in out
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    refused("无法读取 rows.xlsx（~）；请 pip install openpyxl==3.1.5", data.prepare, "rows.xlsx")
