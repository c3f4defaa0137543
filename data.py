"""Download the medical R1 data, check it, split it, and turn rows into training examples.

    python data.py                              # the published set, from ModelScope
    python data.py --dataset my.jsonl           # your own .jsonl, .json, .csv or .parquet
    python data.py --dataset owner/name         # another ModelScope data set
    python data.py --revision REV --sha256 HEX  # exactly this data, or none

Every row needs three texts: question, think, answer. The split is the published one: seed 42, shuffle, the first
90 % train. A row that cannot be used is left out after the split, so it moves no other row, and is reported.
"""

import argparse
import codecs
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import re
import statistics
import sys
import tempfile
from functools import lru_cache, partial
from pathlib import Path

MODEL_NAME = "Qwen/Qwen3-1.7B"  # ModelScope id; Qwen/Qwen3-0.6B for small cards
DATASET_NAME = "krisfu/delicate_medical_r1_data"  # ModelScope id, 2,407 rows
SYSTEM_PROMPT = "你是一个医学专家，你需要根据用户的问题，给出带有思考的回答。"  # the published one
MAX_LENGTH = 2048  # tokens of prompt and reply together; about 1 example in 240 is longer
SEED = 42
TRAIN_SHARE = 0.9
TRAIN_FILE = "train.jsonl"
VAL_FILE = "val.jsonl"
OUTPUT_DIR = "output/qwen3-medical"
LORA_OUTPUT_DIR = "output/qwen3-medical-lora"
SOURCE_SUFFIX = ".source.json"  # of a file beside the training file: what it was made from
IGNORE_INDEX = -100  # a label that the loss skips

FIELDS = ("question", "think", "answer")
SUFFIXES = (".jsonl", ".parquet", ".csv", ".json")  # the first kind that a data set on the hub has is taken
REPEATED = object()  # instead of a row that has a field twice
BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
TAG = re.compile(r"</?think>")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
# Names that the client would write outside its folder, on one system or another.
OUTSIDE = re.compile(r"[/\\].*|[A-Za-z]:.*|(.*[/\\])?\.\.([/\\].*)?", re.DOTALL)
# Limits of the ModelScope client, which reads them at its import; the environment's go first. A hub that is silent or
# drips is given up after 50 s for its list of files (3 x 15 s), after 150 s for the files (6 x 20 s), pauses included.
HUB_LIMITS = {
    "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "3",
    "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "5",
    "MODELSCOPE_DOWNLOAD_TIMEOUT": "20",  # seconds without a byte
    "MODELSCOPE_DOWNLOAD_LOW_SPEED_WINDOW_SECONDS": "20",
    "MODELSCOPE_DOWNLOAD_MIN_BYTES_PER_SECOND": "10240",
    "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": "21600",  # seconds a file; an hour is short for 3.4 GB
}
HUB_CAUSES = {  # what the client's errors mean, the first that fits
    "FileIntegrityError": "内容与文件列表不符",
    "NotExistError": "没有这个名称、版本或文件",
    "PermissionDeniedError": "没有权限",
    "AuthenticationError": "没有权限",
    "JSONDecodeError": "回应不是文件列表",
    "TimeoutError": "超时",
    "ConnectionError": "连接失败",
    "ServerError": "服务器出错",
}

Row = dict[str, str]
Place = int | tuple[str, int]  # of a row: its number, with the file's name where there are several


# ---- reading ------------------------------------------------------------------------------------------------------


def read_rows(path: str | Path) -> list[tuple[int, object]]:
    """All rows of a file as (number, row): the line for .jsonl, else the row's place, both counted from 1.

    Text stays as typed: nothing is turned into numbers, dates or NaN. Raises SystemExit with the line and the remedy
    for a file that is missing, unreadable, empty, not UTF-8 or not of its format.
    """
    return parse_rows(Path(path), read_content(Path(path)))


def read_content(path: Path) -> bytes:
    """A data file's bytes."""
    if path.suffix.lower() not in SUFFIXES:
        raise SystemExit(
            f"错误：不认识 {path} 的格式；请转成 .jsonl、.json、.csv 或 .parquet（UTF-8）再用 --dataset 指定。"
        )
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name too long for a file
        raise SystemExit(
            f"错误：找不到数据文件 {path}；请检查路径，或不带 --dataset 运行 python data.py 下载公开数据集。"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise SystemExit(f"错误：无法读取 {path}（{error.strerror}）；请检查文件权限。") from None


def parse_rows(path: Path, content: bytes) -> list[tuple[int, object]]:
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
    marked = [name for mark, name in BYTE_ORDER_MARKS.items() if line.startswith(mark)]
    if b"\0" in line and not marked:
        raise SystemExit(f"错误：{path} 第 {line_number} 行含 NUL 字节：文件损坏，或是 UTF-16 编码；请另存为 UTF-8。")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        encoding = marked[0] if marked else "GB18030"
        raise SystemExit(
            f"错误：{path} 第 {line_number} 行不是 UTF-8 编码（该行第 {error.start + 1} 字节）；"
            f"请另存为 UTF-8，例如：iconv -f {encoding} -t UTF-8 {path} > utf8{path.suffix}"
        ) from None


def decode_all(path: Path, content: bytes) -> str:
    """A whole file as text; a bad byte is reported with its line."""
    lines = content.split(b"\n")
    return "\n".join(decode(path, number, line) for number, line in enumerate(lines, 1))


def first_line(error: Exception) -> str:
    """What an error says in one line; its class when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def to_object(pairs: list[tuple[str, object]]) -> object:
    """A JSON object as dict. Of a field's two values json alone would keep the last without a word."""
    return row if len(row := dict(pairs)) == len(pairs) else REPEATED


def parse_json(path: Path, text: str, first_line: int = 1) -> object:
    try:
        # int() refuses long numbers; no number is used anyway
        return json.loads(text, parse_int=float, object_pairs_hook=to_object)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise SystemExit(
            f"错误：{path} 第 {line} 行不是合法的 JSON（{error.msg}，第 {error.colno} 列）；请修正这一行。"
        ) from None
    except RecursionError:
        raise SystemExit(f"错误：{path} 第 {first_line} 行的 JSON 嵌套过深；每行只要一个简单的对象。") from None


def read_jsonl(path: Path, content: bytes) -> list[tuple[int, object]]:
    # Split at \n alone: str.splitlines would also break at characters such as U+2028 that JSON allows inside texts.
    lines = enumerate(content.split(b"\n"), 1)
    return [(number, parse_json(path, decode(path, number, line), number)) for number, line in lines if line.strip()]


def read_json(path: Path, content: bytes) -> list[tuple[int, object]]:
    rows = parse_json(path, decode_all(path, content))
    if not isinstance(rows, list):
        raise SystemExit(f"错误：{path} 应是对象的数组 [{{…}}, …]；每行一个对象的文件请命名为 .jsonl。")
    return list(enumerate(rows, 1))


def read_csv(path: Path, content: bytes) -> list[tuple[int, object]]:
    import pandas

    decode_all(path, content)
    try:
        table = pandas.read_csv(io.BytesIO(content), dtype=str, na_filter=False, encoding="utf-8")
        # Where the first row has more fields than the header, pandas makes its first ones the index: all would shift.
        if not isinstance(table.index, pandas.RangeIndex):
            raise ValueError("第 1 行数据比表头多出字段")
    except ValueError as error:  # pandas' ParserError and EmptyDataError among them
        raise SystemExit(
            f"错误：{path} 不是合法的 CSV（{str(error).strip()}）；含逗号或换行的文字请用双引号括起。"
        ) from None
    return list(enumerate(table.to_dict("records"), 1))


def read_parquet(path: Path, content: bytes) -> list[tuple[int, object]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
        # Only what is needed; all when something is missing, so that the message can name what is there.
        rows = table.select(FIELDS if set(FIELDS) <= set(table.column_names) else table.column_names).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # a text that is not UTF-8 is a ValueError
        raise SystemExit(f"错误：{path} 不是完整的 Parquet 文件（{first_line(error)}）；请重新导出。") from None
    return list(enumerate(rows, 1))


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


# ---- downloading --------------------------------------------------------------------------------------------------


class HubUnreachable(SystemExit):
    """The hub gave no list of files, and nothing was written: what an earlier command downloaded is as it was."""


def hub_cause(error: Exception) -> str:
    """What went wrong, in a few words and in the client's. It raises its own, requests' and OS errors alike."""
    file = ""
    if failed := getattr(error, "failed_files", None):
        file, error = next(iter(failed.items()))
    kinds = [kind.__name__ for kind in type(error).__mro__]
    words = [file, *[cause for kind, cause in HUB_CAUSES.items() if kind in kinds][:1]]
    return "：".join([*filter(None, words), shorten(first_line(error).rpartition("Caused by ")[2], 160)])


def list_files(api, name: str, kind: str, revision: str | None) -> dict[str, dict]:
    """{name: entry} of the files in a repository. Raises ValueError when one would be written outside its folder."""
    files = {file.path: file for file in api.list_repo_files(name, kind, revision=revision) if not file.is_dir}
    if not files:
        raise ValueError("文件列表是空的")
    if outside := [path for path in (revision or "", *files) if OUTSIDE.fullmatch(path)]:
        raise ValueError(f"{outside[0]} 会写到文件夹之外，已拒绝")
    # The client takes a size of 0 at its word, but here it may also be one that the list does not tell.
    return {path: {"Path": path, "Size": file.size or None, "Sha256": file.sha256} for path, file in files.items()}


def from_hub(name: str, kind: str, remedy: str, choose, folder: str | None = None, revision: str | None = None):
    """(folder, names) of those files of a ModelScope repository that `choose` takes from all names.

    `kind` is "dataset" or "model"; without a `folder` they go into the client's cache. Raises SystemExit with one
    sentence, HubUnreachable when it failed before anything was written.
    """
    for limit, value in HUB_LIMITS.items():
        os.environ.setdefault(limit, value)
    from modelscope_hub import HubApi

    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)  # it tells of every retry
    api, files = HubApi(), None
    try:
        files = list_files(api, name, kind, revision)
        names = choose(list(files))
        entries = [files[path] for path in names]  # its own list, asked for anew, would not be the one checked here
        path = api.download_repo(name, kind, revision=revision, local_dir=folder, file_list=entries, max_workers=16)
        return Path(path), names
    except Exception as error:
        unreachable = files is None and (isinstance(error, OSError) or getattr(error, "retryable", False))
        raise (HubUnreachable if unreachable else SystemExit)(
            f"错误：无法从 {api.legacy.endpoint} 下载{'数据集' if kind == 'dataset' else '模型'} {name}"
            f"（{hub_cause(error)}）；请检查名称和网络后重试同一命令，"
            f"或用环境变量 MODELSCOPE_ENDPOINT 换一个镜像，或{remedy}。"
        ) from None


def choose_data(dataset: str, names: list[str]) -> list[str]:
    """The data files among `names`; when there are several formats, those of one."""
    # Metadata that the hub keeps beside the data has these names.
    names = [name for name in sorted(names) if not Path(name).name.startswith(("dataset_info", "configuration"))]
    for suffix in SUFFIXES:
        if found := [name for name in names if name.lower().endswith(suffix)]:
            return found
    raise SystemExit(f"错误：数据集 {dataset} 里没有 .jsonl、.json、.csv 或 .parquet 文件；请用 --dataset 换一个。")


def download_dataset(dataset: str, revision: str | None) -> dict[str, bytes]:
    """{name: content} of the data files of a ModelScope data set, by name.

    Not through the client's cache: there it keeps, and would hand out, files that the hub has renamed or dropped since.
    """
    with tempfile.TemporaryDirectory() as folder:
        choose = partial(choose_data, dataset)
        path, names = from_hub(dataset, "dataset", "用 --dataset 指定本地文件", choose, folder, revision)
        return {name: (path / name).read_bytes() for name in names}


def load_rows(dataset: str, revision: str | None, sha256: str | None) -> tuple[list[tuple[Place, object]], str, str]:
    """Rows of a local file or of a ModelScope data set as (place, row), where they came from, and their SHA-256.

    `sha256` is the checksum that the file must have; of several files, that of their contents in order of their names.
    """
    local = os.path.exists(dataset) or Path(dataset).suffix.lower() in SUFFIXES
    if not local and not HUB_ID.fullmatch(dataset):
        raise SystemExit(
            f"错误：--dataset {dataset} 既不是已有的文件，也不是 ModelScope 数据集名（形如 {DATASET_NAME}）。"
        )
    if local and revision:
        raise SystemExit(f"错误：--revision {revision} 只用于 ModelScope 上的数据集，而 {dataset} 是本地文件。")
    contents = {"": read_content(Path(dataset))} if local else download_dataset(dataset, revision)
    found = hashlib.sha256(b"".join(contents.values())).hexdigest()
    if sha256 and sha256.lower() != found:
        raise SystemExit(
            f"错误：{dataset} 的 SHA-256 是 {found}，不是 --sha256 {sha256}；数据已变，请核对来源，或去掉 --sha256。"
        )
    rows = [
        ((name, number) if len(contents) > 1 else number, row)
        for name, content in contents.items()
        for number, row in parse_rows(Path(dataset, name), content)
    ]
    return rows, dataset if local else f"{dataset}（{'、'.join(contents)}）", found


# ---- checking, cleaning, splitting --------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Strip white space, make line ends `\\n`, and turn a literal backslash-n into the line break it stands for.

    Before a letter the two characters stay: there they begin a LaTeX command (\\nu) or a path.
    """
    return re.sub(r"\\n(?![A-Za-z])", "\n", text.replace("\r\n", "\n")).strip()


def check_row(row: object) -> tuple[Row | None, str | None]:
    """(clean row, None), or (None, what is wrong with it)."""
    if not isinstance(row, dict):
        return None, "同一字段出现多次" if row is REPEATED else "不是对象"
    cleaned = {}
    for field in FIELDS:
        if field not in row:
            return None, f"缺少字段 {field}"
        text = row[field]
        if text is None:
            return None, f"{field} 为 null"
        if not isinstance(text, str):
            return None, f"{field} 不是文本"
        if not (text := clean(text)):
            return None, f"{field} 为空"
        if field != "question" and TAG.search(text):  # the template writes them; these would be learnt as text
            return None, f"{field} 含 <think> 或 </think> 标签"
        try:
            text.encode()
        except UnicodeEncodeError:
            return None, f"{field} 含无效字符（不成对的代理码点）"
        cleaned[field] = text
    return cleaned, None


def keep_usable(part: list[tuple[Place, object]], problems: dict[str, list[Place]], taken: set[str]) -> list[Row]:
    """The clean, distinct rows of one part, in order; `problems` gathers what is left out: reason -> places.

    `taken` holds the questions of the other part, which must not appear here.
    """
    kept, seen = [], set()
    for number, raw in part:
        row, problem = check_row(raw)
        if row and tuple(row.values()) in seen:
            problem = "与前面的行重复"
        elif row and row["question"] in taken:
            problem = "验证集的问题也在训练集里"
        if problem:
            problems.setdefault(problem, []).append(number)
        else:
            seen.add(tuple(row.values()))
            kept.append(row)
    return kept


def split_rows(rows: list[tuple[Place, object]]) -> tuple[list[Row], list[Row], dict[str, list[Place]]]:
    """(train, val, problems): the published split, then the check. Raises SystemExit when a part would be empty."""
    columns = {name for _, row in rows if isinstance(row, dict) for name in row}
    if missing := [field for field in FIELDS if field not in columns]:
        there = "、".join(sorted(map(str, columns))[:10]) or "无"
        raise SystemExit(
            f"错误：数据缺少列 {'、'.join(missing)}（现有的列：{there}）；请改列名为 {'、'.join(FIELDS)}。"
        )
    shuffled = list(rows)
    random.Random(SEED).shuffle(shuffled)
    cut = int(len(shuffled) * TRAIN_SHARE)
    problems: dict[str, list[Place]] = {}
    train = keep_usable(shuffled[:cut], problems, taken=set())
    val = keep_usable(shuffled[cut:], problems, taken={row["question"] for row in train})
    if not train or not val:
        part = "训练集" if not train else "验证集"
        raise SystemExit(
            f"错误：{len(rows)} 行中可用的有 {len(train) + len(val)} 行，划分后{part}为空；请提供更多不同的行。"
            + "".join(f"\n  {line}" for line in describe(problems))
        )
    return train, val, problems


def describe(problems: dict[str, list[Place]], most: int = 5) -> list[str]:
    """One line per kind of problem: how many rows, and where the first ones are."""
    lines = []
    for problem, places in problems.items():
        first, more = sorted(places)[:most], " 等" if len(places) > most else ""
        where = f"第 {'、'.join(map(str, first))}{more} 行"
        if isinstance(first[0], tuple):
            where = "、".join(f"{file} 第 {number} 行" for file, number in first) + more
        lines.append(f"{problem}：{len(places)} 行（{where}）")
    return lines


# ---- writing and telling ------------------------------------------------------------------------------------------


def to_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_files(texts: dict[str, str]) -> None:
    """Write {path: text}. Each file appears whole, and none before all could be written."""
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
    except OSError as error:
        names = "、".join(path for path in texts if not path.endswith(SOURCE_SUFFIX))
        raise SystemExit(
            f"错误：无法写入 {names}（{error.strerror}）；请检查权限和磁盘空间，或用 --train_file、--val_file 换位置。"
        ) from None
    finally:
        for draft in drafts.values():
            with contextlib.suppress(OSError):
                draft.unlink()


def summary(source: str, sha256: str, total: int, parts: dict[str, list[Row]], problems: dict) -> str:
    """What a person wants to know about the data, as text."""
    rows = [row for part in parts.values() for row in part]
    lines = [f"数据来源  {source}：共 {total} 行", f"SHA-256   {sha256}"]
    lines += [f"已写入    {path}：{len(part)} 行" for path, part in parts.items()]
    lines += [f"未采用    {line}" for line in describe(problems)] or ["未采用    0 行"]
    for field in FIELDS:
        lengths = [len(row[field]) for row in rows]
        lines.append(
            f"字符数    {field}：平均 {statistics.mean(lengths):.0f}，"
            f"中位数 {statistics.median(lengths):.0f}，最长 {max(lengths)}"
        )
    example = rows[0]
    lines += ["", "示例（训练集第 1 行）"]
    lines += [f"  {name}：{shorten(example[field])}" for name, field in zip(("问题", "思考", "回答"), FIELDS)]
    return "\n".join(lines)


def shorten(text: str, most: int = 120) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + "……"


def prepare(dataset=DATASET_NAME, train_file=TRAIN_FILE, val_file=VAL_FILE, revision=None, sha256=None) -> None:
    """Load, check, clean and split `dataset`, write the two files, and print the summary."""
    train_path, val_path, source_path = map(os.path.realpath, (train_file, val_file, dataset))
    if train_path == val_path:
        raise SystemExit(f"错误：--train_file 和 --val_file 都是 {train_file}；请给两个不同的文件名。")
    if source_path in (train_path, val_path):
        raise SystemExit(f"错误：写入会覆盖原始数据 {dataset}；请用 --train_file、--val_file 换个文件名。")
    rows, source, found = load_rows(dataset, revision, sha256)
    train, val, problems = split_rows(rows)
    parts = {train_file: train, val_file: val}
    local = os.path.exists(dataset)  # its folder may name people
    origin = {"source": Path(source).name if local else source, "revision": revision, "sha256": found}
    texts = {path: to_jsonl(part) for path, part in parts.items()}
    origin["train_sha256"] = hashlib.sha256(texts[train_file].encode()).hexdigest()
    write_files(texts | {train_file + SOURCE_SUFFIX: to_jsonl([origin])})
    print(summary(source, found, len(rows), parts, problems))


def read_origin(train_file: str) -> dict[str, str | None]:
    """{source, revision, sha256 of the source, train_sha256}: what `prepare` made the file from. Only the last for a
    file that it did not write, or that has changed since."""
    found = {"train_sha256": hashlib.sha256(Path(train_file).read_bytes()).hexdigest()}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        origin = json.loads(Path(train_file + SOURCE_SUFFIX).read_text(encoding="utf-8"))
        if origin["train_sha256"] == found["train_sha256"]:
            return origin
    return found


def read_examples(path: str) -> list[Row]:
    """The rows of a file that `prepare` wrote. Raises SystemExit when a row cannot be trained on."""
    rows = []
    for number, raw in read_rows(path):
        row, problem = check_row(raw)
        if problem:
            raise SystemExit(
                f"错误：{path} 第 {number} 行 {problem}；请用 python data.py --dataset <原始数据> 重新生成。"
            )
        rows.append(row)
    return rows


# ---- messages, prompt, labels -------------------------------------------------------------------------------------


def to_messages(question: str, think: str | None = None, answer: str | None = None) -> list[dict[str, str]]:
    """[system, user], and the assistant's message when there is an answer."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "reasoning_content": think or "", "content": answer})
    return messages


@lru_cache(maxsize=4)
def control_pattern(tokenizer) -> re.Pattern:
    """Matches any token, such as <|im_end|> or <think>, that the tokenizer takes whole out of a text."""
    tokens = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, tokens)) + ")")


@lru_cache(maxsize=4)
def text_tokenizer(tokenizer):
    """The same tokenizer without its control tokens: to it, `<|im_end|>` is ten ordinary characters."""
    from tokenizers import Tokenizer

    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(settings))


def encode_messages(tokenizer, messages: list[dict], prompt_only: bool = False, thinking: bool = True) -> list[int]:
    """Token ids of `messages` through the tokenizer's own chat template: the only place where it is called.

    `prompt_only` adds the opening of the assistant's turn; with `thinking=False` the template puts an empty thinking
    block into it. What people wrote is text and never control: the template is rendered around placeholders, and
    only control tokens that the template itself wrote become control ids, so a question that contains `<|im_end|>`
    cannot end its own turn. For all other text the ids are those of `tokenizer.apply_chat_template`.
    """
    texts: list[str] = []

    def placeholder(text: str) -> str:
        texts.append(text.encode("utf-8", "replace").decode())  # a terminal may hand over half a character
        return f"\ue000{len(texts) - 1}\ue001"

    shells = [{k: v if k == "role" else placeholder(v) for k, v in message.items()} for message in messages]
    rendered = tokenizer.apply_chat_template(
        shells, tokenize=False, add_generation_prompt=prompt_only, enable_thinking=thinking
    )
    # Text between two control tokens is tokenized as one piece, as the tokenizer itself does it.
    ids, piece = [], ""
    for part in re.split(r"(\ue000\d+\ue001)", rendered):
        if part.startswith("\ue000"):
            piece += texts[int(part[1:-1])]
            continue
        for token in control_pattern(tokenizer).split(part):
            if control_pattern(tokenizer).fullmatch(token):
                ids += text_tokenizer(tokenizer).encode(piece, add_special_tokens=False).ids if piece else []
                ids.append(tokenizer.convert_tokens_to_ids(token))
                piece = ""
            else:
                piece += token
    return ids + (text_tokenizer(tokenizer).encode(piece, add_special_tokens=False).ids if piece else [])


def encode_example(tokenizer, row: Row) -> dict[str, list[int]]:
    """{"input_ids", "labels"}, both of length T: the prompt's labels are IGNORE_INDEX, the last label is <|im_end|>."""
    prompt = encode_messages(tokenizer, to_messages(row["question"]), prompt_only=True)
    ids = encode_messages(tokenizer, to_messages(row["question"], row["think"], row["answer"]))
    assert ids[: len(prompt)] == prompt, (prompt, ids)
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)  # drops the line break after <|im_end|>
    return {"input_ids": ids[:end], "labels": [IGNORE_INDEX] * len(prompt) + ids[len(prompt) : end]}


def load_dataset(path: str, tokenizer, max_length: int):
    """(datasets.Dataset with input_ids and labels, lengths in tokens of all examples). Too long ones are left out
    rather than cut: a cut would lose the answer, which comes last."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(read_examples(path))
    encoded = rows.map(
        lambda row: encode_example(tokenizer, row),
        remove_columns=rows.column_names,
        new_fingerprint="encoded",  # else datasets hashes the whole tokenizer: 4 s, for a cache that is not used here
    )
    lengths = [len(ids) for ids in encoded["input_ids"]]
    fitting = encoded.select([i for i, length in enumerate(lengths) if length <= max_length])
    if not len(fitting):
        raise SystemExit(
            f"错误：{path} 的样本都超过 {max_length} 个 token（最短 {min(lengths)}）；请加大 --max_length。"
        )
    return fitting, lengths


def describe_tokens(path: str, lengths: list[int], max_length: int) -> str:
    """Lengths in tokens, and how many examples were left out for theirs."""
    mean, p50, p95 = sum(lengths) / len(lengths), *(sorted(lengths)[int(len(lengths) * q)] for q in (0.5, 0.95))
    over = sum(length > max_length for length in lengths)
    return (
        f"{path}：{len(lengths)} 条，token 数平均 {mean:.0f}，p50 {p50}，p95 {p95}，最长 {max(lengths)}；"
        f"超过 --max_length {max_length} 而未采用的 {over} 条"
    )


def describe_example(tokenizer, example: dict[str, list[int]]) -> str:
    """One example as the model sees it: the prompt, and the supervised part."""
    prompt = sum(label == IGNORE_INDEX for label in example["labels"])
    parts = example["input_ids"][:prompt], example["input_ids"][prompt:]
    texts = (shorten(tokenizer.decode(part).replace("\n", "⏎"), 300) for part in parts)
    return "示例（⏎ 为换行）\n  提示（不计损失）：{}\n  监督部分：{}".format(*texts)


def run_main(main) -> None:
    """Run a script's `main`: on terminals of any encoding, and without a traceback after Ctrl-C or `| head`."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        print("\n已中断。", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads what is still to be flushed
        raise SystemExit(141) from None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset", default=DATASET_NAME, help="local file or ModelScope id (default: %(default)s)")
    parser.add_argument("--train_file", default=TRAIN_FILE, help="where the training part goes (default: %(default)s)")
    parser.add_argument("--val_file", default=VAL_FILE, help="where the validation part goes (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of the ModelScope data set (default: master)")
    parser.add_argument("--sha256", help="checksum that the data must have (default: not checked)")
    prepare(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_main(main)
