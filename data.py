"""Download the medical R1 data, check it, split it, and turn rows into training examples.

    python data.py                              # the published set, from ModelScope
    python data.py --dataset my.jsonl           # your own .jsonl, .json, .csv or .parquet
    python data.py --dataset owner/name         # another ModelScope data set

Every row needs three texts: question, think, answer. The split is the published one: seed 42, shuffle, the first
90 % train. A row that cannot be used is left out after the split, so it moves no other row, and is reported.
"""

import argparse
import codecs
import contextlib
import io
import json
import logging
import os
import random
import re
import statistics
import sys
import tempfile
from functools import lru_cache
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
IGNORE_INDEX = -100  # a label that the loss skips

FIELDS = ("question", "think", "answer")
SUFFIXES = (".jsonl", ".parquet", ".csv", ".json")  # the first kind that a data set on the hub has is taken
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name

Row = dict[str, str]


# ---- reading ------------------------------------------------------------------------------------------------------


def read_rows(path: str | Path) -> list[tuple[int, object]]:
    """All rows of a file as (number, row): the line for .jsonl, else the row's place, both counted from 1.

    Text stays as typed: nothing is turned into numbers, dates or NaN. Raises SystemExit with the line and the remedy
    for a file that is missing, unreadable, empty, not UTF-8 or not of its format.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise SystemExit(
            f"错误：不认识 {path} 的格式；请转成 .jsonl、.json、.csv 或 .parquet（UTF-8）再用 --dataset 指定。"
        )
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name too long for a file
        raise SystemExit(
            f"错误：找不到数据文件 {path}；请检查路径，或不带 --dataset 运行 python data.py 下载公开数据集。"
        )
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise SystemExit(f"错误：无法读取 {path}（{error.strerror}）；请检查文件权限。") from None
    if not content.strip():
        raise SystemExit(f"错误：{path} 是空文件；请换一个有内容的文件。")
    rows = READERS[path.suffix.lower()](path, content)
    if not rows:
        raise SystemExit(f"错误：{path} 里没有一行数据；每行需要 {'、'.join(FIELDS)} 三个字段。")
    return rows


def decode(path: Path, line_number: int, line: bytes) -> str:
    """One line as text."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "GB18030"
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


def parse_json(path: Path, text: str, first_line: int = 1) -> object:
    try:
        return json.loads(text, parse_int=float)  # int() refuses long numbers; no number is used anyway
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


def from_hub(download, name: str, kind: str, remedy: str, **options) -> Path:
    """The folder into which modelscope's `download` put the repository `name`; one clear sentence when it cannot."""
    logging.getLogger("modelscope_hub").setLevel(logging.ERROR)  # it tells of every retry
    try:
        return Path(download(name, **options))
    except Exception as error:  # the client raises its own, requests', urllib3's and OS errors alike
        cause = shorten(first_line(error), 200)
        address = os.environ.get("MODELSCOPE_ENDPOINT", "ModelScope")
        raise SystemExit(
            f"错误：无法从 {address} 下载{kind} {name}（{cause}）；请检查名称和网络后重试同一命令，或{remedy}。"
        ) from None


def download_dataset(name: str, folder: str) -> list[Path]:
    """Download the data files of a ModelScope data set into `folder`; when it has several formats, those of one.

    Not into the client's cache: there it keeps, and would hand out, files that the hub has renamed or dropped since.
    """
    from modelscope.hub.snapshot_download import dataset_snapshot_download

    from_hub(
        dataset_snapshot_download,
        name,
        "数据集",
        "用 --dataset 指定本地文件",
        local_dir=folder,
        allow_patterns=[f"*{suffix}" for suffix in SUFFIXES],
    )
    # Metadata that the hub keeps beside the data has these names.
    files = [
        path for path in sorted(Path(folder).rglob("*")) if not path.name.startswith(("dataset_info", "configuration"))
    ]
    for suffix in SUFFIXES:
        if found := [path for path in files if path.suffix.lower() == suffix]:
            return found
    raise SystemExit(f"错误：数据集 {name} 里没有 .jsonl、.json、.csv 或 .parquet 文件；请用 --dataset 换一个。")


def load_rows(dataset: str) -> tuple[list[tuple[int, object]], str]:
    """Rows of a local file or of a ModelScope data set as (number, row), and where they came from."""
    if os.path.exists(dataset) or Path(dataset).suffix.lower() in SUFFIXES:
        return read_rows(dataset), dataset
    if not HUB_ID.fullmatch(dataset):
        raise SystemExit(
            f"错误：--dataset {dataset} 既不是已有的文件，也不是 ModelScope 数据集名（形如 {DATASET_NAME}）。"
        )
    with tempfile.TemporaryDirectory() as folder:
        files = download_dataset(dataset, folder)
        rows = [row for path in files for row in read_rows(path)]
    return rows, f"{dataset}（{'、'.join(path.name for path in files)}）"


# ---- checking, cleaning, splitting --------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Strip white space, make line ends `\\n`, and turn a literal backslash-n into the line break it stands for.

    Before a letter the two characters stay: there they begin a LaTeX command (\\nu) or a path.
    """
    return re.sub(r"\\n(?![A-Za-z])", "\n", text.replace("\r\n", "\n")).strip()


def check_row(row: object) -> tuple[Row | None, str | None]:
    """(clean row, None), or (None, what is wrong with it)."""
    if not isinstance(row, dict):
        return None, "不是对象"
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
        try:
            text.encode()
        except UnicodeEncodeError:
            return None, f"{field} 含无效字符（不成对的代理码点）"
        cleaned[field] = text
    return cleaned, None


def keep_usable(part: list[tuple[int, object]], problems: dict[str, list[int]], taken: set[str]) -> list[Row]:
    """The clean, distinct rows of one part, in order; `problems` gathers what is left out: reason -> row numbers.

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


def split_rows(rows: list[tuple[int, object]]) -> tuple[list[Row], list[Row], dict[str, list[int]]]:
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
    problems: dict[str, list[int]] = {}
    train = keep_usable(shuffled[:cut], problems, taken=set())
    val = keep_usable(shuffled[cut:], problems, taken={row["question"] for row in train})
    if not train or not val:
        part = "训练集" if not train else "验证集"
        raise SystemExit(
            f"错误：{len(rows)} 行中可用的有 {len(train) + len(val)} 行，划分后{part}为空；请提供更多不同的行。"
            + "".join(f"\n  {line}" for line in describe(problems))
        )
    return train, val, problems


def describe(problems: dict[str, list[int]], most: int = 5) -> list[str]:
    """One line per kind of problem: how many rows, and the first row numbers."""
    lines = []
    for problem, numbers in problems.items():
        first = "、".join(map(str, sorted(numbers)[:most]))
        lines.append(f"{problem}：{len(numbers)} 行（第 {first}{' 等' if len(numbers) > most else ''} 行）")
    return lines


# ---- writing and telling ------------------------------------------------------------------------------------------


def write_files(parts: dict[str, list[Row]]) -> None:
    """Write {path: rows} as JSONL. All files appear whole, or none does and what was there stays."""
    drafts = {path: Path(f"{path}.{os.getpid()}.tmp") for path in parts}
    try:
        for path, draft in drafts.items():
            draft.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in parts[path])
        if taken := [path for path in parts if Path(path).is_dir()]:
            raise IsADirectoryError(0, "是一个文件夹", taken[0])
        for path, draft in drafts.items():
            os.replace(draft, path)
    except OSError as error:
        raise SystemExit(
            f"错误：无法写入 {'、'.join(parts)}（{error.strerror}）；"
            "请检查权限和磁盘空间，或用 --train_file、--val_file 换位置。"
        ) from None
    finally:
        for draft in drafts.values():
            with contextlib.suppress(OSError):
                draft.unlink()


def summary(source: str, total: int, parts: dict[str, list[Row]], problems: dict[str, list[int]]) -> str:
    """What a person wants to know about the data, as text."""
    rows = [row for part in parts.values() for row in part]
    lines = [f"数据来源  {source}：共 {total} 行"]
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


def prepare(dataset: str = DATASET_NAME, train_file: str = TRAIN_FILE, val_file: str = VAL_FILE) -> None:
    """Load, check, clean and split `dataset`, write the two files, and print the summary."""
    train_path, val_path, source_path = map(os.path.realpath, (train_file, val_file, dataset))
    if train_path == val_path:
        raise SystemExit(f"错误：--train_file 和 --val_file 都是 {train_file}；请给两个不同的文件名。")
    if source_path in (train_path, val_path):
        raise SystemExit(f"错误：写入会覆盖原始数据 {dataset}；请用 --train_file、--val_file 换个文件名。")
    rows, source = load_rows(dataset)
    train, val, problems = split_rows(rows)
    parts = {train_file: train, val_file: val}
    write_files(parts)
    print(summary(source, len(rows), parts, problems))


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
    args = parser.parse_args()
    prepare(args.dataset, args.train_file, args.val_file)


if __name__ == "__main__":
    run_main(main)
