"""Files of rows (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .xlsx) to objects and back. Text stays as
typed; what cannot be read ends with the line and the remedy. Does not look into the rows, as row.py does."""

import codecs
import contextlib
import csv
import io
import json
import os
import re
from itertools import zip_longest
from pathlib import Path

from parts.rows.row import FIELDS, SAME_FIELD_TWICE
from parts.terminal import first_line, progress

# A hub's data set that comes in several formats is read in the first of these.
SUFFIXES = (".jsonl", ".parquet", ".arrow", ".csv", ".tsv", ".json", ".xlsx")
CONTAINERS = ("data", "rows", "train", "examples", "items", "records")  # names of a list of rows in an object


def read(path: str | Path) -> list[tuple[int, object]]:
    """Return all rows of a file as (number, row): the line on which one of several JSON values begins, the
    row of a table as a spreadsheet counts them, with the header, else the row's position, all from 1.

    Text stays as typed: nothing is turned into numbers, dates or NaN. It raises SystemExit with the line and
    the remedy for a file that is missing, unreadable, empty, in no known encoding or not of its format.
    """
    return parse(Path(path), read_bytes(Path(path)))


def has_known_suffix(path: str | Path) -> bool:
    """Tell whether a file's name ends as one of the formats that are read here."""
    return Path(path).suffix.lower() in SUFFIXES


def read_bytes(path: Path) -> bytes:
    """Return a data file's bytes. It raises SystemExit for a folder or an unreadable file."""
    # os.path says no to a name that is too long for a file, where Path.is_dir would raise.
    if os.path.isdir(path):
        inside = "、".join(sorted(filter(has_known_suffix, os.listdir(path)))[:10]) or "没有"
        raise SystemExit(f"错误：{path} 是文件夹；请指定里面的一个数据文件：{inside}。")
    try:
        return path.read_bytes()
    except OSError as error:
        raise SystemExit(f"错误：无法读取数据文件 {path}（{error.strerror}）；请检查路径和权限。") from None


def parse(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Return the rows in a file's content, as `read` does. Its first bytes tell the format, else the
    suffix of `path`, which messages name."""
    # The bytes of byte order marks and of white space, in UTF-16 too.
    if not content.strip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n\v\f"):
        raise SystemExit(f"错误：{path} 是空文件；请换一个有内容的文件。")
    start = content.lstrip(b"\xef\xbb\xbf \t\r\n")
    known = (reader for pattern, reader in FIRST_BYTES.items() if re.match(pattern, start, re.IGNORECASE))
    reader = next(known, None) or READERS.get(path.suffix.lower(), OTHER)
    if isinstance(reader, str):
        raise SystemExit(f"错误：{reader.format(path)}。")
    rows = reader(path, content)
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


def to_object(pairs: list[tuple[str, object]]) -> object:
    """Return a JSON object, or SAME_FIELD_TWICE: json would keep a field's last value without a word."""
    row = dict(pairs)
    return row if len(row) == len(pairs) else SAME_FIELD_TWICE


def to_number(digits: str) -> int | float:
    """Return a number: int() refuses more than 4,300 digits with a ValueError."""
    return int(digits) if len(digits) < 4300 else float(digits)


def json_values(path: Path, text: str):
    """Yield (line, value) of the JSON values in a text, one a line or over many, with commas between them or
    without. It raises SystemExit where there is none."""
    # Not strict: a tab or a line break may stand in a text as it is.
    decoder = json.JSONDecoder(parse_int=to_number, object_pairs_hook=to_object, strict=False)
    gap, line, end = re.compile(r"[\s,\ufeff]*"), 1, 0
    while True:
        start = gap.match(text, end).end()
        line += text.count("\n", end, start)
        if start == len(text):
            return
        try:
            value, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError) as error:
            wrong, reason = getattr(error, "lineno", line), getattr(error, "msg", "嵌套过深")
            place = f"{path} 第 {wrong} 行" + (f"（从第 {line} 行开始）" if wrong > line else "")
            raise SystemExit(f"错误：{place}不是合法的 JSON（{reason}）；请修正这一行。") from None
        yield line, value
        line += text.count("\n", start, end)


def read_json(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Read the objects of a file, or those of the one array or object that it holds."""
    rows = list(progress(json_values(path, decode_all(path, content)), "读取"))
    return list(enumerate(rows_in(rows[0][1]), 1)) if len(rows) == 1 else rows


def rows_in(value: object) -> list:
    """Return the rows of [{…}, …], {"data": [{…}, …]}, a table by columns, or what pandas' to_json writes;
    any other value is itself the only row."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    lists = [value[name] for name in CONTAINERS if isinstance(value.get(name), list)]
    # A row of its own may have a list in such a field too, but not one of objects.
    if len(lists) == 1 and dict in map(type, lists[0]):
        return lists[0]
    if len(lists) == 1 and isinstance(value.get("columns"), list) and {list} == set(map(type, lists[0])):
        return [dict(zip(value["columns"], cells)) for cells in lists[0]]  # orient="split"
    columns = list(value.values())
    if {dict} == set(map(type, columns)):
        if not all(map(str.isdigit, columns[0])):
            return columns  # orient="index": each is a row
        columns = [list(cells.values()) for cells in columns]  # the default: each has its cells by their row
    if {list} == set(map(type, columns)) and len(set(map(len, columns))) == 1:
        return [dict(zip(value, cells)) for cells in zip(*columns)]
    return [value]


def under_header(table) -> list[tuple[int, dict]]:
    """Return the rows of a table, given as lists of cells, under its first row that is not blank. It raises
    ValueError."""
    header, rows = [], []
    for number, cells in enumerate(progress(table, "读取"), 1):
        if all(cell == "" for cell in cells):
            continue  # Excel leaves them at the end
        if not header:
            header = list(map(str, cells))
            # More than one column may have no name.
            if len({*header} - {""}) < len(header) - header.count(""):
                raise ValueError("表头里有重复的列名")
        elif len(cells) > len(header):
            raise ValueError("有的行比表头的列多")
        elif cells != header:  # of the second of two files that were joined it is no row
            rows.append((number, dict(zip_longest(header, cells))))
    return rows


def read_csv(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Read a table under a header. That or Excel's line `sep=;` above it tells what separates its columns."""
    text = decode_all(path, content)
    header = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
    separator = max(",;\t", key=header.count)  # the first of equals, a comma, for a single column
    if excels := re.match('\\s*"?sep=(.)"?[\r\n]+', text):
        separator, text = excels[1], text[excels.end() :]
    csv.field_size_limit(2**31 - 1)  # of a cell: 131,072 characters unless told
    # newline="" leaves line ends to csv, which alone knows those inside quotes.
    table = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        return under_header(table)
    except (csv.Error, ValueError) as error:
        remedy = "请改正，含分隔符的文字要用双引号括起来"
        raise SystemExit(f"错误：{path} 不是合法的 CSV（{error}）；{remedy}。") from None


def read_arrow(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Read the rows of a Parquet file, or of an Arrow stream, which datasets' save_to_disk writes."""
    import pyarrow.parquet  # here, as `--help` and the other formats do not wait for it

    try:
        if content.startswith(b"\xff\xff\xff\xff"):
            rows = pyarrow.ipc.open_stream(content).read_all().to_pylist()
        else:
            rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # a text that is not UTF-8 is a ValueError
        cause = first_line(error)
        raise SystemExit(f"错误：{path} 不是完整的 Parquet 或 Arrow 文件（{cause}）；请重新导出。") from None
    return list(enumerate(rows, 1))


def read_xlsx(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Read the only sheet that has rows, under its header. Numbers and dates stay what they are, as nobody
    typed the text that they look like; an error such as #NAME? becomes NaN. It raises SystemExit when several
    sheets have rows."""
    from pandas import read_excel  # here, as the other formats do not wait for it

    try:
        # None: all sheets. Without the filter "NA" stays a text, and an empty cell is an empty one.
        sheets = read_excel(io.BytesIO(content), None, header=None, dtype=object, na_filter=False)
        tables = {name: under_header(sheet.to_numpy().tolist()) for name, sheet in sheets.items()}
    except Exception as error:  # zipfile's, the XML parser's, openpyxl's own; or there is no openpyxl
        remedy = "请改正，或重新另存为 .xlsx"
        if isinstance(error, ImportError):
            remedy = "请 pip install openpyxl==3.1.5"
        raise SystemExit(f"错误：无法读取 {path}（{first_line(error)}）；{remedy}") from None
    tables = {name: rows for name, rows in tables.items() if rows}
    if len(tables) > 1:
        raise SystemExit(f"错误：{path} 有几个工作表都有数据（{'、'.join(tables)}）；请只留下要用的一个。")
    return next(iter(tables.values()), [])


OTHER = f"不支持 {{}} 的格式；请解压，转成 {'、'.join(SUFFIXES)} 之一"
# What a file begins with, whatever its name says -> what reads it, or what to say of it.
FIRST_BYTES = {
    rb"PAR1\x15|\xff{4}": read_arrow,
    rb"(?:\[\s*)?\{\s*\"": read_json,
    rb"PK\x03\x04(?=[\s\S]*xl/workbook\.xml)": read_xlsx,
    rb"PK\x03\x04|\x1f\x8b|BZh\d|7z\xbc\xaf|Rar!": "{} 是压缩包；请解压，再指定里面的一个数据文件",
    rb"<(?:!doctype )?html": "{} 是一个网页（多半是登录页或错误页）；请重新下载数据文件",
    rb"version https://git-lfs": "{} 是 git-lfs 的指针，数据还没有下载；请在它的文件夹里运行 git lfs pull",
    rb"SQLite format 3": "{} 是 SQLite 数据库；请运行 sqlite3 -csv -header 文件 'SELECT * FROM 表名' > a.csv",
    rb"%PDF|<\?xml|\xd0\xcf\x11\xe0": "{} 是 PDF、XML 或旧格式的 Office 文件；请另存为 .xlsx，或转成 .jsonl",
}
READERS = {".xlsx": read_xlsx, ".jsonl": read_json, ".json": read_json, ".csv": read_csv, ".tsv": read_csv}
READERS |= {".parquet": read_arrow, ".arrow": read_arrow}


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
