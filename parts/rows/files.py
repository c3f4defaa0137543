"""Files of rows (.jsonl, .json, .csv, .tsv, .parquet, .xlsx) to objects and back. Text stays as typed; what
cannot be read ends with the line and the remedy. Does not look into the rows: that is row.py's."""

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
SUFFIXES = (".jsonl", ".parquet", ".csv", ".tsv", ".json", ".xlsx")
BINARY = (".parquet", ".xlsx")  # the others are text
CONTAINERS = ("data", "rows", "train", "examples", "items", "records")  # names of a list of rows in an object


def read(path: str | Path) -> list[tuple[int, object]]:
    """Return all rows of a file as (number, row): the line for .jsonl, the sheet's row for .xlsx, else the
    row's position, all counted from 1.

    Text stays as typed: nothing is turned into numbers, dates or NaN. It raises SystemExit with the line and
    the remedy for a file that is missing, unreadable, empty, in no known encoding or not of its format.
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
        raise SystemExit(f"错误：不支持 {path} 的格式；请解压，转成 {'、'.join(SUFFIXES)} 之一。")
    try:
        return path.read_bytes()
    except OSError as error:
        raise SystemExit(f"错误：无法读取数据文件 {path}（{error.strerror}）；请检查路径和权限。") from None


def parse(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Return the rows in a file's content, as `read` does; `path` tells the format, and messages name it."""
    # The bytes of byte order marks and of white space, in UTF-16 too.
    if not content.strip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n\v\f"):
        raise SystemExit(f"错误：{path} 是空文件；请换一个有内容的文件。")
    rows = READERS[path.suffix.lower()](path, content)
    if not rows:
        raise SystemExit(f"错误：{path} 里没有数据；每行需要 {'、'.join(FIELDS)} 三个字段。")
    return rows


def encoding_of(content: bytes) -> str:
    """Return utf-16 where its mark says so, gb18030 where Excel in China saved the text so, else utf-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    with contextlib.suppress(UnicodeDecodeError):
        content.decode()
        return "utf-8"
    with contextlib.suppress(UnicodeDecodeError):
        text = content.decode("gb18030")
        # UTF-8 with a few bad bytes may decode as GB18030 too, to characters that nobody typed. 120 published
        # rows in GB18030, read as UTF-8, have 3.6 bad places for each good character, and 20 of their
        # characters alone 1.5 or more.
        as_utf8 = content.decode("utf-8", "replace")
        bad = as_utf8.count("\ufffd")
        good = len(as_utf8) - bad - len(content.decode("ascii", "ignore"))
        # So may a Western text. Of a Chinese one more than half of the wide characters are GB2312's, which
        # make two bytes each, and the rest none.
        if bad > good and len(text.encode("gb2312", "ignore")) >= len(text):
            return "gb18030"
    return "utf-8"


def decode_all(path: Path, content: bytes) -> str:
    """Return a file's content as text. It raises SystemExit with the line that cannot be decoded."""
    encoding = encoding_of(content)
    # UTF-16 without its mark decodes as UTF-8 where the text is English: its NULs give it away.
    nul = content.find(b"\0") if encoding != "utf-16" else -1
    if nul >= 0:
        line = content.count(b"\n", 0, nul) + 1
        raise SystemExit(f"错误：{path} 第 {line} 行含 NUL 字节（文件损坏或是 UTF-16）；请另存为 UTF-8。")
    try:
        # Files that were joined have a byte order mark in the middle too, where nobody sees it.
        return content.decode(encoding).removeprefix("\ufeff").replace("\n\ufeff", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SystemExit(f"错误：{path} 第 {line} 行不是 UTF-8（也不是 GB18030）；请另存为 UTF-8。") from None


def load_json(text: str) -> object:
    """Return what a JSON text holds, with SAME_FIELD_TWICE for an object that has a field twice: json would
    keep its last value without a word."""

    def to_object(pairs: list[tuple[str, object]]) -> object:
        row = dict(pairs)
        return row if len(row) == len(pairs) else SAME_FIELD_TWICE

    def to_number(digits: str) -> int | float:
        # int() refuses numbers of more than 4,300 digits with a ValueError.
        return int(digits) if len(digits) < 4300 else float(digits)

    return json.loads(text, parse_int=to_number, object_pairs_hook=to_object)


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


def read_xlsx(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Read the only sheet that has rows, under its header. Numbers and dates stay what they are, as nobody
    typed the text that they look like; an error such as #NAME? becomes NaN. It raises SystemExit when several
    sheets have rows."""
    from pandas import read_excel  # here, as the other formats do not wait for it

    try:
        # None: all sheets. Without the filter "NA" stays a text, and an empty cell is an empty one.
        sheets = read_excel(io.BytesIO(content), None, dtype=object, na_filter=False, engine="openpyxl")
    except Exception as error:  # zipfile's, the XML parser's, openpyxl's own; or there is no openpyxl
        remedy = "请 pip install openpyxl==3.1.5" if isinstance(error, ImportError) else "请重新另存为 .xlsx"
        raise SystemExit(f"错误：无法读取 {path}（{first_line(error)}）；{remedy}") from None
    sheets = {name: sheet for name, sheet in sheets.items() if len(sheet)}
    if len(sheets) > 1:
        raise SystemExit(f"错误：{path} 有几个工作表都有数据（{'、'.join(sheets)}）；请只留下要用的一个。")
    rows = []
    for sheet in sheets.values():
        rows += enumerate(sheet.rename(columns=str).to_dict("records"), 2)
    return rows


READERS = {".xlsx": read_xlsx, ".jsonl": read_json, ".json": read_json, ".parquet": read_parquet}
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
