"""Files of rows (.jsonl, .json, .csv, .tsv, .parquet) to objects and back. Text stays as typed; what cannot be read
ends with the line and the remedy. Does not look into the rows: that is row.py's."""

import codecs
import contextlib
import csv
import io
import json
import os
import re
from pathlib import Path

from parts.rows.row import FIELDS, SAME_FIELD_TWICE
from parts.terminal import first_line

SUFFIXES = (
    ".jsonl",
    ".parquet",
    ".csv",
    ".tsv",
    ".json",
)  # the first kind that a data set on the hub has is taken
CONTAINERS = ("data", "rows", "train", "examples", "items", "records")  # names of a list of rows in an object


def read(path: str | Path) -> list[tuple[int, object]]:
    """All rows of a file as (number, row): the line for .jsonl, else the row's place, both counted from 1.

    Text stays as typed: nothing is turned into numbers, dates or NaN. Raises SystemExit with the line and the remedy
    for a file that is missing, unreadable, empty, not UTF-8 or not of its format.
    """
    return parse(Path(path), read_bytes(Path(path)))


def read_bytes(path: Path) -> bytes:
    """A data file's bytes."""
    if os.path.isdir(path):
        names = sorted(file.name for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        raise SystemExit(
            f"错误：{path} 是文件夹；请指定里面的一个数据文件：{'、'.join(names[:10]) or '没有'}。"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise SystemExit(f"错误：不认识 {path} 的格式；请解压，转成 UTF-8 的 {'、'.join(SUFFIXES)} 之一。")
    try:
        return path.read_bytes()
    except OSError as error:
        raise SystemExit(f"错误：无法读取数据文件 {path}（{error.strerror}）；请检查路径和权限。") from None


def parse(path: Path, content: bytes) -> list[tuple[int, object]]:
    """The rows in a file's content; `path` tells the format, and the file in messages."""
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        raise SystemExit(f"错误：{path} 是空文件；请换一个有内容的文件。")
    rows = READERS[path.suffix.lower()](path, content)
    if not rows:
        raise SystemExit(f"错误：{path} 里没有一行数据；每行需要 {'、'.join(FIELDS)} 三个字段。")
    return rows


def decode_all(path: Path, content: bytes) -> str:
    """A file's content as text."""
    nul = content.find(b"\0")
    if nul >= 0:
        line = content.count(b"\n", 0, nul) + 1
        raise SystemExit(
            f"错误：{path} 第 {line} 行含 NUL 字节：文件损坏，或是 UTF-16 编码；请另存为 UTF-8。"
        )
    try:
        # There may be a byte order mark, of files that were joined in the middle too, where nobody sees it.
        return content.decode().removeprefix("\ufeff").replace("\n\ufeff", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        remedy = f"请另存为 UTF-8，例如：iconv -f GB18030 -t UTF-8 {path} > utf8{path.suffix}"
        raise SystemExit(f"错误：{path} 第 {line} 行不是 UTF-8 编码；{remedy}") from None


def load_json(text: str) -> object:
    """What a JSON text holds. Of a field's two values json alone would keep the last without a word."""

    def to_object(pairs: list[tuple[str, object]]) -> object:
        row = dict(pairs)
        return row if len(row) == len(pairs) else SAME_FIELD_TWICE

    # int() would refuse long numbers; no number is used anyway
    return json.loads(text, parse_int=float, object_pairs_hook=to_object)


def parse_json(path: Path, text: str, line: int = 1) -> object:
    """A JSON text that begins on this line of its file."""
    try:
        return load_json(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", "嵌套过深")
        raise SystemExit(f"错误：{path} 第 {line} 行不是合法的 JSON（{reason}）；请修正这一行。") from None


def read_json(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Of a file named .jsonl or .json: one object a line, or an array of them, whichever it is."""
    text = decode_all(path, content)
    # Split at \n alone: str.splitlines would also break at characters such as U+2028 that JSON allows inside texts.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    first = None
    with contextlib.suppress(ValueError, RecursionError):
        first = load_json(lines[0][1])
    spread = first is None and (path.suffix.lower() == ".json" or lines[0][1].lstrip().startswith("["))
    if spread or len(lines) == 1:
        return list(enumerate(rows_in(parse_json(path, text)), 1))
    return [(number, parse_json(path, line, number)) for number, line in lines]


def rows_in(value: object) -> list:
    """The rows of [{…}, …] or {"data": [{…}, …]}; else the value is itself the only row."""
    if isinstance(value, dict):
        lists = [rows for name, rows in value.items() if name in CONTAINERS and isinstance(rows, list)]
        if len(lists) == 1 and any(isinstance(row, dict) for row in lists[0]):
            return lists[0]
    return value if isinstance(value, list) else [value]


def read_csv(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Of a table under a header, which tells what separates its columns."""
    text = decode_all(path, content).lstrip("\r\n")
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    separator = max(",;\t", key=header.count)  # the first of equals, a comma, for a single column
    csv.field_size_limit(2**31 - 1)  # of a cell: 131,072 characters unless told
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        rows = list(table)
        names = table.fieldnames
        if len(set(names)) < len(names):
            raise csv.Error("表头里有重复的列名")
        if any(None in row for row in rows):  # where DictReader puts what is too much
            raise csv.Error("有的行比表头的列多")
    except csv.Error as error:
        raise SystemExit(
            f"错误：{path} 不是合法的 CSV（{error}）；请改正，含分隔符的文字要用双引号括起。"
        ) from None
    # The header of the second of two files that were joined is no row.
    return [(number, row) for number, row in enumerate(rows, 1) if list(row.values()) != names]


def read_parquet(path: Path, content: bytes) -> list[tuple[int, object]]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # a text that is not UTF-8 is a ValueError
        raise SystemExit(
            f"错误：{path} 不是完整的 Parquet 文件（{first_line(error)}）；请重新导出。"
        ) from None
    return list(enumerate(rows, 1))


READERS = {
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


def to_jsonl(rows) -> str:
    """One JSON object a line, of a list of them or of any other iterable."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(texts: dict[str, str]) -> None:
    """Write {path: text}. Each file appears whole, and none before all could be written. Raises OSError."""
    drafts = {path: Path(f"{path}.{os.getpid()}.tmp") for path in texts}
    try:
        for path, draft in drafts.items():
            draft.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(texts[path], encoding="utf-8", newline="\n")
        for path in texts:
            if os.path.isdir(path):
                raise IsADirectoryError(0, "是一个文件夹", path)
        for path, draft in drafts.items():
            os.replace(draft, path)
    finally:
        for draft in drafts.values():
            with contextlib.suppress(OSError):
                draft.unlink()
