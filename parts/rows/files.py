"""Files of rows (.jsonl, .json, .csv, .tsv, .parquet) to objects and back. Text stays as typed; what cannot be read
ends with the line and the remedy. Does not look into the rows: that is rows.py's."""

import codecs
import contextlib
import csv
import io
import json
import os
import re
import shlex
from pathlib import Path

from parts.rows.row import FIELDS, SAME_FIELD_TWICE
from parts.terminal import first_line

SUFFIXES = (".jsonl", ".parquet", ".csv", ".tsv", ".json")  # the first kind that a data set on the hub has is taken
CONTAINERS = ("data", "rows", "train", "examples", "items", "records")  # names of a list of rows in an object
BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def read(path: str | Path) -> list[tuple[int, object]]:
    """All rows of a file as (number, row): the line for .jsonl, else the row's place, both counted from 1.

    Text stays as typed: nothing is turned into numbers, dates or NaN. Raises SystemExit with the line and the remedy
    for a file that is missing, unreadable, empty, not UTF-8 or not of its format.
    """
    return parse(Path(path), read_bytes(Path(path)))


def read_bytes(path: Path) -> bytes:
    """A data file's bytes."""
    if os.path.isdir(path):
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        remedy = "里面没有数据文件；请指定一个文件"
        if files:
            names, first = "、".join(file.name for file in files[:10]), shlex.quote(str(files[0]))
            remedy = f"里面的数据文件有 {names}；请指定一个文件：python data.py --dataset {first}"
        raise SystemExit(f"错误：{path} 是一个文件夹，{remedy}")
    if path.suffix.lower() not in SUFFIXES:
        raise SystemExit(
            f"错误：不认识 {path} 的格式；压缩包请先解压，"
            "再转成 .jsonl、.json、.csv、.tsv 或 .parquet（UTF-8），用 --dataset 指定。"
        )
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name too long for a file
        raise SystemExit(
            f"错误：找不到数据文件 {path}；请检查路径，或不带 --dataset 运行 python data.py 下载公开数据集。"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise SystemExit(f"错误：无法读取 {path}（{error.strerror}）；请检查文件权限。") from None


def parse(path: Path, content: bytes) -> list[tuple[int, object]]:
    """The rows in a file's content; `path` tells the format, and the file in messages."""
    content = content.removeprefix(codecs.BOM_UTF8)
    if not content.strip():
        raise SystemExit(f"错误：{path} 是空文件；请换一个有内容的文件。")
    rows = READERS[path.suffix.lower()](path, content)
    if not rows:
        raise SystemExit(f"错误：{path} 里没有一行数据；每行需要 {'、'.join(FIELDS)} 三个字段。")
    return rows


def decode(path: Path, line_number: int, line: bytes) -> str:
    """One line as text."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if line.startswith(mark)), "GB18030")
    if b"\0" in line and encoding == "GB18030":
        raise SystemExit(f"错误：{path} 第 {line_number} 行含 NUL 字节：文件损坏，或是 UTF-16 编码；请另存为 UTF-8。")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise SystemExit(
            f"错误：{path} 第 {line_number} 行不是 UTF-8 编码（该行第 {error.start + 1} 字节）；"
            f"请另存为 UTF-8，例如：iconv -f {encoding} -t UTF-8 {path} > utf8{path.suffix}"
        ) from None


def decode_all(path: Path, content: bytes) -> str:
    """A whole file as text; a bad byte is reported with its line."""
    lines = content.split(b"\n")
    return "\n".join(decode(path, number, line) for number, line in enumerate(lines, 1))


def to_object(pairs: list[tuple[str, object]]) -> object:
    """A JSON object as dict. Of a field's two values json alone would keep the last without a word."""
    row = dict(pairs)
    return row if len(row) == len(pairs) else SAME_FIELD_TWICE


def load_json(text: str) -> object:
    """A JSON text; texts stay as typed."""
    # int() refuses long numbers; no number is used anyway
    return json.loads(text, parse_int=float, object_pairs_hook=to_object)


def parse_json(path: Path, text: str, line: int = 1) -> object:
    """A JSON text that begins on this line of its file."""
    try:
        return load_json(text)
    except json.JSONDecodeError as error:
        where = f"{path} 第 {line + error.lineno - 1} 行"
        raise SystemExit(f"错误：{where}不是合法的 JSON（{error.msg}，第 {error.colno} 列）；请修正这一行。") from None
    except RecursionError:
        raise SystemExit(f"错误：{path} 第 {line} 行的 JSON 嵌套过深；每行只要一个简单的对象。") from None


def read_json(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Of a file named .jsonl or .json: one object a line, or an array of them, whichever it is."""
    # Split at \n alone: str.splitlines would also break at characters such as U+2028 that JSON allows inside texts.
    # Files that were joined have a byte order mark in the middle, where nobody sees it.
    lines = [line.removeprefix(codecs.BOM_UTF8) for line in content.split(b"\n")]
    lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    first = None
    with contextlib.suppress(ValueError, RecursionError):
        first = load_json(lines[0][1].decode())
    if first is None and (path.suffix.lower() == ".json" or lines[0][1].lstrip().startswith(b"[")):
        first, lines = parse_json(path, decode_all(path, content)), lines[:1]
    if len(lines) > 1 or not isinstance(first, list | dict):
        return [(number, parse_json(path, decode(path, number, line), number)) for number, line in lines]
    return list(enumerate(first if isinstance(first, list) else rows_in(first), 1))


def rows_in(found: dict) -> list:
    """The rows of {"data": [{…}, …]}; else the object is itself the only row."""
    lists = [value for name, value in found.items() if name in CONTAINERS and isinstance(value, list)]
    return lists[0] if len(lists) == 1 and any(isinstance(row, dict) for row in lists[0]) else [found]


SEPARATORS = {",": "逗号", ";": "分号", "\t": "制表符"}


def read_csv(path: Path, content: bytes) -> list[tuple[int, object]]:
    import pandas

    header = re.split(r"[\r\n]", decode_all(path, content).lstrip("\r\n"), maxsplit=1)[0]
    names = {sign: next(csv.reader([header], delimiter=sign), []) for sign in SEPARATORS}
    separator = max(names, key=lambda sign: len(names[sign]))  # the first of equals, a comma, for a single column
    if len(set(names[separator])) < len(names[separator]):
        raise SystemExit(f"错误：{path} 的表头里有重复的列名；请改名，或删掉不要的一列。")
    try:
        table = pandas.read_csv(io.BytesIO(content), dtype=str, na_filter=False, encoding="utf-8", sep=separator)
        # Where the first row has more fields than the header, pandas makes its first ones the index: all would shift.
        if not isinstance(table.index, pandas.RangeIndex):
            raise ValueError("第 1 行数据比表头多出字段")
    except ValueError as error:  # pandas' ParserError and EmptyDataError among them
        raise SystemExit(
            f"错误：{path} 不是合法的 CSV（{str(error).strip()}）；"
            f"含{SEPARATORS[separator]}或换行的文字请用双引号括起。"
        ) from None
    rows = enumerate(table.to_dict("records"), 1)
    header = [name.strip("\ufeff") for name in table.columns]  # where files were joined, the second one is no row
    return [(number, row) for number, row in rows if [text.strip("\ufeff") for text in row.values()] != header]


def read_parquet(path: Path, content: bytes) -> list[tuple[int, object]]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # a text that is not UTF-8 is a ValueError
        raise SystemExit(f"错误：{path} 不是完整的 Parquet 文件（{first_line(error)}）；请重新导出。") from None
    return list(enumerate(rows, 1))


READERS = {".jsonl": read_json, ".json": read_json, ".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}


def to_jsonl(rows: list[dict]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(texts: dict[str, str]) -> None:
    """Write {path: text}. Each file appears whole, and none before all could be written. Raises OSError."""
    drafts = {path: Path(f"{path}.{os.getpid()}.tmp") for path in texts}
    try:
        for path, draft in drafts.items():
            draft.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("w", encoding="utf-8", newline="\n") as file:
                file.write(texts[path])
        if taken := [path for path in texts if Path(path).is_dir()]:
            raise IsADirectoryError(0, "是一个文件夹", taken[0])
        for path, draft in drafts.items():
            os.replace(draft, path)
    finally:
        for draft in drafts.values():
            with contextlib.suppress(OSError):
                draft.unlink()
