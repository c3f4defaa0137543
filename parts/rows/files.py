"""Files of rows (.jsonl, .json, .csv, .tsv, .parquet) to objects and back. Text stays as typed; what cannot
be read ends with the line and the remedy. Does not look into the rows: that is row.py's."""

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

# A hub's data set that comes in several formats is read in the first of these.
SUFFIXES = (".jsonl", ".parquet", ".csv", ".tsv", ".json")
CONTAINERS = ("data", "rows", "train", "examples", "items", "records")  # names of a list of rows in an object


def read(path: str | Path) -> list[tuple[int, object]]:
    """Return all rows of a file as (number, row): the line for .jsonl, else the row's position, both counted
    from 1.

    Text stays as typed: nothing is turned into numbers, dates or NaN. It raises SystemExit with the line and
    the remedy for a file that is missing, unreadable, empty, not UTF-8 or not of its format.
    """
    return parse(Path(path), read_bytes(Path(path)))


def has_known_suffix(path: str | Path) -> bool:
    """Tell whether a file's name ends as one of the formats that are read here."""
    return Path(path).suffix.lower() in SUFFIXES


def read_bytes(path: Path) -> bytes:
    """Return a data file's bytes. It raises SystemExit for a folder, another format or an unreadable file."""
    # os.path says no to a name that is too long for a file, where Path.is_dir would raise.
    if os.path.isdir(path):
        inside = "、".join(sorted(filter(has_known_suffix, os.listdir(path)))[:10]) or "没有"
        raise SystemExit(f"错误：{path} 是文件夹；请指定里面的一个数据文件：{inside}。")
    if not has_known_suffix(path):
        formats = "、".join(SUFFIXES)
        raise SystemExit(f"错误：不支持 {path} 的格式；请解压，转成 UTF-8 编码的 {formats} 之一。")
    try:
        return path.read_bytes()
    except OSError as error:
        raise SystemExit(f"错误：无法读取数据文件 {path}（{error.strerror}）；请检查路径和权限。") from None


def parse(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Return the rows in a file's content, as `read` does; `path` tells the format, and messages name it."""
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        raise SystemExit(f"错误：{path} 是空文件；请换一个有内容的文件。")
    rows = READERS[path.suffix.lower()](path, content)
    if not rows:
        raise SystemExit(f"错误：{path} 里没有数据；每行需要 {'、'.join(FIELDS)} 三个字段。")
    return rows


def decode_all(path: Path, content: bytes) -> str:
    """Return a file's content as text. It raises SystemExit with the line that is not UTF-8."""
    # UTF-16 without its mark decodes as UTF-8 where the text is English: its NULs give it away.
    nul = content.find(b"\0")
    if nul >= 0:
        line = content.count(b"\n", 0, nul) + 1
        raise SystemExit(f"错误：{path} 第 {line} 行含 NUL 字节（文件损坏或是 UTF-16）；请另存为 UTF-8。")
    try:
        # Files that were joined have a byte order mark in the middle too, where nobody sees it.
        return content.decode().removeprefix("\ufeff").replace("\n\ufeff", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        remedy = f"请另存为 UTF-8，例如：iconv -f GB18030 -t UTF-8 {path} > utf8{path.suffix}"
        raise SystemExit(f"错误：{path} 第 {line} 行不是 UTF-8 编码；{remedy}") from None


def load_json(text: str) -> object:
    """Return what a JSON text holds, with SAME_FIELD_TWICE for an object that has a field twice: json would
    keep its last value without a word."""

    def to_object(pairs: list[tuple[str, object]]) -> object:
        row = dict(pairs)
        return row if len(row) == len(pairs) else SAME_FIELD_TWICE

    # int() refuses numbers of more than 4,300 digits with a ValueError; no number is used anyway.
    return json.loads(text, parse_int=float, object_pairs_hook=to_object)


def parse_json(path: Path, text: str, line: int = 1) -> object:
    """Return what a JSON text holds that begins on this line of its file, or raise SystemExit."""
    try:
        return load_json(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", "嵌套过深")
        raise SystemExit(f"错误：{path} 第 {line} 行不是合法的 JSON（{reason}）；请修正这一行。") from None


def read_json(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Read one object a line, or an array of them, whichever a file named .jsonl or .json holds."""
    text = decode_all(path, content)
    # Split at \n alone: str.splitlines would also break at characters that JSON allows in texts, U+2028 say.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    _, top = lines[0]
    first = None
    with contextlib.suppress(ValueError, RecursionError):
        first = load_json(top)
    # A first line that is no JSON begins a value over many lines, or is damaged: the name decides, or a [.
    is_one_value = first is None and (path.suffix.lower() == ".json" or top.lstrip().startswith("["))
    if is_one_value or len(lines) == 1:
        return list(enumerate(rows_in(parse_json(path, text)), 1))
    return [(number, parse_json(path, line, number)) for number, line in lines]


def rows_in(value: object) -> list:
    """Return the rows of [{…}, …] or {"data": [{…}, …]}; any other value is itself the only row."""
    if isinstance(value, dict):
        lists = [value[name] for name in CONTAINERS if isinstance(value.get(name), list)]
        # A row of its own may have a list in such a field too, but not one of objects.
        if len(lists) == 1 and dict in map(type, lists[0]):
            return lists[0]
    return value if isinstance(value, list) else [value]


def read_csv(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Read a table under a header, which tells what separates its columns."""
    text = decode_all(path, content).lstrip("\r\n")
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    separator = max(",;\t", key=header.count)  # the first of equals, a comma, for a single column
    csv.field_size_limit(2**31 - 1)  # of a cell: 131,072 characters unless told
    # newline="" leaves line ends to csv, which alone knows those inside quotes.
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows = []
    try:
        header_names = table.fieldnames
        if len(set(header_names)) < len(header_names):
            raise csv.Error("表头里有重复的列名")
        for number, row in enumerate(table, 1):
            if None in row:  # where DictReader puts the cells for which the header has no name
                raise csv.Error("有的行比表头的列多")
            # The header of the second of two files that were joined is no row.
            if list(row.values()) != header_names:
                rows.append((number, row))
    except csv.Error as error:
        remedy = "请改正，含分隔符的文字要用双引号括起来"
        raise SystemExit(f"错误：{path} 不是合法的 CSV（{error}）；{remedy}。") from None
    return rows


def read_parquet(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Read the rows of a Parquet file."""
    import pyarrow.parquet  # here, as `--help` and the other formats do not wait for it

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # a text that is not UTF-8 is a ValueError
        cause = first_line(error)
        raise SystemExit(f"错误：{path} 不是完整的 Parquet 文件（{cause}）；请重新导出。") from None
    return list(enumerate(rows, 1))


READERS = {".jsonl": read_json, ".json": read_json, ".parquet": read_parquet}
READERS |= {".csv": read_csv, ".tsv": read_csv}


def to_jsonl(rows: list) -> str:
    """Return one JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(texts: dict[str, str]) -> None:
    """Write {path: text}. Each file appears whole, none before all could be written. It raises OSError."""
    drafts = {}
    try:
        for path, text in texts.items():
            drafts[path] = draft = Path(f"{path}.{os.getpid()}.tmp")
            draft.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(text, encoding="utf-8", newline="\n")
        # os.replace onto a folder fails, and would do so after the first file had its new content.
        for path in texts:
            if os.path.isdir(path):
                raise IsADirectoryError(0, "是一个文件夹", path)
        for path, draft in drafts.items():
            os.replace(draft, path)
    finally:
        for draft in drafts.values():
            with contextlib.suppress(OSError):
                draft.unlink()
