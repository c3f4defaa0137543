"""Download the medical R1 data, check it, split it, and turn rows into training examples.

    python data.py                                        # the published set, from ModelScope
    python data.py --dataset my.jsonl                     # your own .jsonl, .json, .csv, .tsv or .parquet
    python data.py --dataset owner/name hf://owner/name   # sets of ModelScope and Hugging Face, together
    python data.py --dataset my.jsonl owner/name#500      # 500 rows of the second
    python data.py --revision REV --sha256 HEX            # exactly this data, or none
    python data.py --raw                                  # the thinking as published, traces of its making and all

A row has a question, a thinking and an answer, and perhaps earlier turns; the shapes of the leading public sets are
read as they are. The published set is split as published: seed 42, shuffle, the first 90 % train. Others likewise, but
rows that begin with the same question go to one side, and what a hub keeps for validation or tests is never trained
on. A row that cannot be used is left out after the split, so it moves no other row, and is reported.

Most published thinkings show how they were made: their writer had been given the answer. They are trained on without
that. val.jsonl keeps the published text, so that losses compare; val.clean.jsonl is the same rows without it.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

from parts import cleaning, encoding, near_duplicates, row_files, rows, sources, split, terminal
from parts.rows import Placed, Row

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


def refuse_overwriting(train_file: str, val_file: str, datasets: list[str]) -> None:
    """Raises SystemExit when one file would be written over another, or over the data."""
    paths = [os.path.realpath(file) for file in (train_file, val_file, row_files.clean_path(val_file))]
    if paths[0] == paths[1]:
        raise SystemExit(f"错误：--train_file 和 --val_file 都是 {train_file}；请给两个不同的文件名。")
    if paths[0] == paths[2]:
        raise SystemExit(f"错误：--train_file 是 {train_file}，那里要写清理过的验证集；请换一个文件名。")
    if os.path.realpath(train_file + SOURCE_SUFFIX) in paths:
        raise SystemExit(f"错误：{train_file}{SOURCE_SUFFIX} 里要写训练集的来源；请给 --val_file 换一个文件名。")
    for dataset in datasets:
        if os.path.realpath(dataset) in paths:
            raise SystemExit(f"错误：写入会覆盖原始数据 {dataset}；请用 --train_file、--val_file 换个文件名。")


def prepare(
    dataset: str | list[str] | None = None,
    train_file: str = TRAIN_FILE,
    val_file: str = VAL_FILE,
    revision: str | None = None,
    sha256: str | None = None,
    without_thinking: str = "drop",
    raw: bool = False,
) -> None:
    """Load, check, clean and split each data set, the published one where none is named; write the files, and print the
    summary. `raw`: the training file has the thinking as it was."""
    given = [dataset] if isinstance(dataset, str) else dataset or [DATASET_NAME]
    wanted = [sources.read_count(name) for name in given]
    names = [name for name, _ in wanted]
    refuse_overwriting(train_file, val_file, names)
    if len(names) > len(set(names)):
        raise SystemExit(f"错误：--dataset {' '.join(names)}：同一个数据集写了两次；请改正。")
    if len(names) > 1 and (revision or sha256):
        raise SystemExit(f"错误：--dataset {' '.join(names)}：--revision 和 --sha256 只用于一个数据集；请改正。")
    loaded, problems = [], {}
    for name in names:
        fixed = name.removeprefix("ms://") == DATASET_NAME
        divide = partial(split.by_row if fixed else split.by_question, seed=SEED, share=TRAIN_SHARE)
        loaded.append(sources.load(name, revision, sha256, len(names) > 1, divide, fixed))
    counts = [count for _, count in wanted]
    found = sources.check(loaded, counts, TRAIN_SHARE, without_thinking == "keep", problems)
    train, val = (sum(parts, []) for parts in zip(*found))
    cleaned, how = cleaning.clean_rows(train)
    train = train if raw else cleaning.keep_whole(cleaned, train, problems)
    total = sum(len(source.train) + len(source.val) for source in loaded)
    if not train or not val:
        part = "训练集" if not train else "验证集"
        raise SystemExit(
            f"错误：{total} 行中可用的有 {len(train) + len(val)} 行，划分后{part}为空；"
            f"{'请提供更多不同的行' if train or val and not cleaned else '请按下面的原因改正'}"
            f"{'，或加 --raw 照原文写' if cleaned and not train else ''}。"
            + "".join(f"\n  {line}" for line in rows.describe_problems(problems))
        )
    lines = sources.describe(loaded, counts, found)
    lines += [f"清理      {'没有（--raw）；会是：' if raw else ''}{how}", mark_seen(train, val)]
    clean_val = cleaning.keep_whole(cleaning.clean_rows(val)[0], val)  # the same rows in any case
    parts = {train_file: train, val_file: val, row_files.clean_path(val_file): clean_val}
    write(parts, {"sources": [source.origin for source in loaded], "raw": raw})
    print(rows.summary(lines, parts, problems))


def mark_seen(train: list[Placed], val: list[Placed]) -> str:
    """Mark the validation rows whose answer nearly stands in the training part; returns what to say of it."""
    alike = near_duplicates.pairs([row["answer"] for _, row in train + val])
    seen = {j - len(train) for i, j in alike if i < len(train) <= j}
    for place in seen:
        val[place][1]["seen"] = True
    inside = sum(j < len(train) for _, j in alike)
    return f'近似重复  训练集内 {inside} 对；验证集 {len(seen)}/{len(val)} 行与训练集近似，标为 "seen": true'


def write(parts: dict[str, list[Placed]], origin: dict[str, object]) -> None:
    """Write the rows of each file, of the training part first, and beside that its `origin`."""
    train_file, val_file, _ = parts
    texts = {file: row_files.to_jsonl(map(rows.without_instruction, part)) for file, part in parts.items()}
    origin = origin | {"train_sha256": hashlib.sha256(texts[train_file].encode()).hexdigest()}
    try:
        row_files.write(texts | {train_file + SOURCE_SUFFIX: row_files.to_jsonl([origin])})
    except OSError as error:
        raise SystemExit(
            f"错误：无法写入 {train_file}、{val_file}（{error.strerror}）；"
            "请检查权限和磁盘空间，或用 --train_file、--val_file 换位置。"
        ) from None


def read_origin(train_file: str) -> dict[str, object]:
    """{sources: [{source, revision, sha256}], raw, train_sha256}: what `prepare` made the file from. Only the last for
    a file that it did not write, or that has changed since."""
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


def to_messages(
    question: str, think: str | None = None, answer: str | None = None, history=None, system: str = SYSTEM_PROMPT
) -> list[dict[str, str]]:
    """[system, earlier turns, user], and the assistant's message when there is an answer. `history`: [[question,
    answer], …]; their thinking is not fed back."""
    messages = [{"role": "system", "content": system}]
    for asked, said in history or []:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    messages.append({"role": "user", "content": question})
    if answer is not None:
        messages.append({"role": "assistant", "reasoning_content": think or "", "content": answer})
    return messages


def load_dataset(path: str, tokenizer, max_length: int):
    """A datasets.Dataset of input_ids and labels from a file that `prepare` wrote; prints its lengths. Too long
    examples are left out, as a cut would lose the answer, which comes last. Raises SystemExit when none is left."""
    import datasets

    (datasets.enable_progress_bars if sys.stderr.isatty() else datasets.disable_progress_bars)()
    examples = datasets.Dataset.from_list([{"history": None} | row for row in read_examples(path)])
    encoded = examples.map(
        lambda row: encoding.encode_example(tokenizer, to_messages(**row)),
        desc=f"编码 {path}",
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
    parser.add_argument(
        "--dataset",
        nargs="+",
        action="extend",
        help=f"local files, ModelScope ids, hf://owner/name; #500 behind one: 500 rows of it (default: {DATASET_NAME})",
    )
    parser.add_argument(
        "--without_thinking",
        choices=("drop", "keep"),
        default="drop",
        help="rows without thinking: left out, or learnt as replies without thinking (default: %(default)s)",
    )
    parser.add_argument("--train_file", default=TRAIN_FILE, help="where the training part goes (default: %(default)s)")
    parser.add_argument("--val_file", default=VAL_FILE, help="where the validation part goes (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of the data set on its hub (default: master)")
    parser.add_argument("--sha256", help="checksum that the data must have (default: not checked)")
    parser.add_argument(
        "--raw", action="store_true", help="train on the thinking as it is, with the traces of its making"
    )
    prepare(**vars(parser.parse_args()))


if __name__ == "__main__":
    terminal.run_main(main)
