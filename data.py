"""Download the medical R1 data, check it, split it, and turn rows into training examples.

    python data.py                              # the published set, from ModelScope
    python data.py --dataset my.jsonl           # your own .jsonl, .json, .csv or .parquet
    python data.py --dataset owner/name         # another ModelScope data set
    python data.py --revision REV --sha256 HEX  # exactly this data, or none

Every row needs three texts: question, think, answer. The split is the published one: seed 42, shuffle, the first
90 % train. A row that cannot be used is left out after the split, so it moves no other row, and is reported.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
from pathlib import Path

try:
    from parts import encoding, hub, row_files, rows, terminal
    from parts.rows import FIELDS, Place, Row
except ModuleNotFoundError as error:  # python -P, a copy without parts/, or nothing installed yet
    raise SystemExit(
        f"错误：找不到 {error.name}；请在完整的项目文件夹里运行，不要用 python -P；缺的是库，就先运行 "
        "pip install -r requirements.txt"
    ) from None

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


def load_rows(dataset: str, revision: str | None, sha256: str | None) -> tuple[list[tuple[Place, object]], str, str]:
    """Rows of a local file or of a ModelScope data set as (place, row), where they came from, and their SHA-256.

    `sha256` is the checksum that the file must have; of several files, that of their contents in order of their names.
    """
    named = "://" not in dataset and Path(dataset).suffix.lower() in row_files.SUFFIXES  # a file that is not there
    local = os.path.exists(dataset) or named
    if not local and not hub.is_name(dataset):
        raise SystemExit(
            f"错误：--dataset {dataset} 既不是已有的文件，也不是 ModelScope 数据集名（形如 {DATASET_NAME}）。"
            f"{hub.forms(dataset)}"
        )
    if local and revision:
        raise SystemExit(f"错误：--revision {revision} 只用于 ModelScope 上的数据集，而 {dataset} 是本地文件。")
    contents = {"": row_files.read_bytes(Path(dataset))} if local else hub.download_dataset(dataset, revision)
    found = hashlib.sha256(b"".join(contents.values())).hexdigest()
    if sha256 and sha256.lower() != found:
        raise SystemExit(
            f"错误：{dataset} 的 SHA-256 是 {found}，不是 --sha256 {sha256}；数据已变，请核对来源，或去掉 --sha256。"
        )
    loaded = [
        ((name, number) if len(contents) > 1 else number, row)
        for name, content in contents.items()
        for number, row in row_files.parse(Path(dataset, name), content)
    ]
    return loaded, dataset if local else f"{dataset}（{'、'.join(contents)}）", found


def split_rows(loaded: list[tuple[Place, object]]) -> tuple[list[Row], list[Row], dict[str, list[Place]]]:
    """(train, val, problems): the published split, then the check. Raises SystemExit when a part would be empty."""
    columns = {name for _, row in loaded if isinstance(row, dict) for name in row}
    if missing := [field for field in FIELDS if field not in columns]:
        there = "、".join(sorted(map(str, columns))[:10]) or "无"
        raise SystemExit(
            f"错误：数据缺少列 {'、'.join(missing)}（现有的列：{there}）；请改列名为 {'、'.join(FIELDS)}。"
        )
    shuffled = list(loaded)
    random.Random(SEED).shuffle(shuffled)
    cut = int(len(shuffled) * TRAIN_SHARE)
    problems: dict[str, list[Place]] = {}
    train = rows.keep_usable(shuffled[:cut], problems, taken=set())
    val = rows.keep_usable(shuffled[cut:], problems, taken={row["question"] for row in train})
    if not train or not val:
        part = "训练集" if not train else "验证集"
        raise SystemExit(
            f"错误：{len(loaded)} 行中可用的有 {len(train) + len(val)} 行，划分后{part}为空；请提供更多不同的行。"
            + "".join(f"\n  {line}" for line in rows.describe_problems(problems))
        )
    return train, val, problems


def refuse_overwriting(train_file: str, val_file: str, dataset: str) -> None:
    """Raises SystemExit when one file would be written over another, or over the data."""
    train_path, val_path, source_path = map(os.path.realpath, (train_file, val_file, dataset))
    if train_path == val_path:
        raise SystemExit(f"错误：--train_file 和 --val_file 都是 {train_file}；请给两个不同的文件名。")
    if source_path in (train_path, val_path):
        raise SystemExit(f"错误：写入会覆盖原始数据 {dataset}；请用 --train_file、--val_file 换个文件名。")


def prepare(dataset=DATASET_NAME, train_file=TRAIN_FILE, val_file=VAL_FILE, revision=None, sha256=None) -> None:
    """Load, check, clean and split `dataset`, write the two files, and print the summary."""
    refuse_overwriting(train_file, val_file, dataset)
    loaded, source, found = load_rows(dataset, revision, sha256)
    train, val, problems = split_rows(loaded)
    texts = {train_file: row_files.to_jsonl(train), val_file: row_files.to_jsonl(val)}
    local = os.path.exists(dataset)  # its folder may name people
    origin = {"source": Path(source).name if local else source, "revision": revision, "sha256": found}
    origin["train_sha256"] = hashlib.sha256(texts[train_file].encode()).hexdigest()
    try:
        row_files.write(texts | {train_file + SOURCE_SUFFIX: row_files.to_jsonl([origin])})
    except OSError as error:
        raise SystemExit(
            f"错误：无法写入 {train_file}、{val_file}（{error.strerror}）；"
            "请检查权限和磁盘空间，或用 --train_file、--val_file 换位置。"
        ) from None
    print(rows.summary(source, found, len(loaded), {train_file: train, val_file: val}, problems))


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
    examples = []
    for number, raw in row_files.read(path):
        row, problem = rows.check(raw)
        if problem:
            raise SystemExit(
                f"错误：{path} 第 {number} 行 {problem}；请用 python data.py --dataset <原始数据> 重新生成。"
            )
        examples.append(row)
    return examples


def to_messages(question: str, think: str | None = None, answer: str | None = None) -> list[dict[str, str]]:
    """[system, user], and the assistant's message when there is an answer."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "reasoning_content": think or "", "content": answer})
    return messages


def load_dataset(path: str, tokenizer, max_length: int):
    """A datasets.Dataset of input_ids and labels from a file that `prepare` wrote; prints its lengths. Too long
    examples are left out, as a cut would lose the answer, which comes last. Raises SystemExit when none is left."""
    import datasets

    datasets.disable_progress_bars()
    examples = datasets.Dataset.from_list(read_examples(path))
    encoded = examples.map(
        lambda row: encoding.encode_example(tokenizer, to_messages(**row)),
        remove_columns=examples.column_names,
        new_fingerprint="encoded",  # else datasets hashes the whole tokenizer: 4 s, for a cache that is not used here
    )
    lengths = [len(ids) for ids in encoded["input_ids"]]
    print(encoding.describe_lengths(path, lengths, max_length))
    fitting = encoded.select([i for i, length in enumerate(lengths) if length <= max_length])
    if not len(fitting):
        raise SystemExit(
            f"错误：{path} 的样本都超过 {max_length} 个 token（最短 {min(lengths)}）；请加大 --max_length。"
        )
    return fitting


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
    terminal.run_main(main)
