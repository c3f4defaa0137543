"""Download the medical R1 data, check it, clean it, split it, and turn rows into training examples.

    python data.py                                        # the published set, from ModelScope
    python data.py --dataset my.jsonl                     # your own .jsonl, .json, .csv, .parquet, .xlsx
    python data.py --dataset owner/name hf://owner/name   # sets of ModelScope and Hugging Face, together
    python data.py --dataset hf://owner/name/zh           # its configuration zh, or its folder or file zh
    python data.py --dataset my.jsonl owner/name#500      # 500 rows of the second
    python data.py --revision REV --sha256 HEX            # exactly this data, or none
    python data.py --raw                                  # the thinking as published, with its leaks
    python data.py --think_with http://127.0.0.1:8000/v1 --rethink    # thinking made anew by a teacher

A row has a question, a thinking and an answer, and perhaps earlier turns; the shapes of the leading public
sets are read as they are. The published set is split as published: seed 42, shuffle, the first 90 % train.
Others are split likewise, but rows that begin with the same question go to one side, and what a hub keeps for
validation or tests is never trained on. A row that cannot be used is left out after the split, so it moves no
other row, and is reported.

Most published thinkings show how they were made: their writer had been given the answer. Both files are
written without that, unless --raw, by which alone losses compare with those of the public run. Cleaning does
not make such a thinking one that finds the answer: a teacher's does, who thinks from the question alone.
"""

import contextlib
import hashlib
import json
import os
import shlex
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from parts import endpoint, terminal
from parts.model import encoding
from parts.rows import files, row, sources, traces

MODEL_NAME = "Qwen/Qwen3-1.7B"  # ModelScope id; Qwen/Qwen3-0.6B for small cards
DATASET_NAME = "krisfu/delicate_medical_r1_data"  # ModelScope id, 2,407 rows
SYSTEM_PROMPT = "你是一个医学专家，你需要根据用户的问题，给出带有思考的回答。"  # the published one
MAX_LENGTH = 2048  # tokens of prompt and reply together; about 1 example in 240 is longer
EXAMPLES_PER_STEP, NUM_TRAIN_EPOCHS = 4, 2  # the recipe's
# The published script's: with others its validation rows are trained on, and losses do not compare.
SEED = 42
TRAIN_SHARE = 0.9
TRAIN_FILE = "train.jsonl"
VAL_FILE = "val.jsonl"
OUTPUT_DIR = "output/qwen3-medical"
LORA_OUTPUT_DIR = "output/qwen3-medical-lora"
# How long a training may take for each byte of its training file, by a formula: 6 FLOPs for each token and
# each of 1.72 billion weights, at 40 %, which is assumed, of an RTX 4090's peak in bfloat16, 165.2 TFLOPS by
# NVIDIA's data sheet. Tokens: 120 published rows take 433,200 bytes in such a file and are 95,155 of Qwen3's
# with the template, 0.22 for each byte; very short rows have 0.28, and so has English.
SECONDS_PER_BYTE = 0.22 * 6 * 1.72e9 / (0.4 * 165.2e12)
KEEP_THINKLESS = (
    "加 --without_thinking keep，可以学习不思考、直接回答（提问时加 --no_thinking）；"
    "要它会思考，用 --think_with 请另一个模型思考，或换有思考的数据"
)
SOURCE_SUFFIX = ".source.json"  # of a file beside the training file: what it was made from
TEACHER_SUFFIX = ".teacher.jsonl"  # of another one: what the teacher replied
# A reply is known again by these texts too: whoever changes a word of them asks, and pays, anew.
THINK_PROMPT = "你是一个医学专家。先想清楚，再回答。思考和回答都用提问的语言；回答里不说思考的过程。"
AGREE_PROMPT = """\
你是严谨的临床医生，判断同一个问题的两个答案在医学上是否一致。主要结论相同，诊断、用药、剂量和就医建议都不矛盾，
就是一致，说法、详略、次序不同不要紧；否则，或者没有把握，就是不一致。不评好坏。"""


def refuse_overwriting(train_file: str, val_file: str, datasets: list[str]) -> None:
    """Raise SystemExit when one file would be written over another, or over the data."""
    paths = [train_file, val_file, train_file + SOURCE_SUFFIX, train_file + TEACHER_SUFFIX, *datasets]
    # By their real paths: one may be a link to another.
    if len(set(map(os.path.realpath, paths))) < len(paths):
        named, remedy = "、".join(paths), "请用 --train_file、--val_file 换个文件名"
        raise SystemExit(f"错误：输入和输出里有两个是同一个文件（{named}）；{remedy}。")


def refuse_empty(train: row.LocatedRows, val: row.LocatedRows, problems: row.Problems) -> None:
    """Raise SystemExit, with the reasons, when no row is left to train on, or none to validate with."""
    if train and val:
        return
    empty, usable = "验证集" if train else "训练集", len(train) + len(val)
    remedy = "，或加 --raw 保留原文" if traces.TOO_LITTLE in problems else ""
    error = f"错误：划分后{empty}为空，可用的只有 {usable} 行；请按下面的原因修改，或补充不重复的行{remedy}。"
    if (thinkless := row.count_thinkless(problems)) > usable:
        error = f"错误：数据没有思考（{thinkless} 行）。{KEEP_THINKLESS}。"
    raise SystemExit("\n  ".join([error, *row.describe_problems(problems)]))


def prepare(
    dataset: str | list[str] | None = None,
    train_file: str = TRAIN_FILE,
    val_file: str = VAL_FILE,
    revision: str | None = None,
    sha256: str | None = None,
    without_thinking: str = "drop",
    raw: bool = False,
    think_with: str | None = None,
    think_model: str | None = None,
    think_limit: int | None = None,
    rethink: bool = False,
) -> None:
    """Write the training and the validation file of a data set, or of several, and print the summary.

    `dataset`: a file or a hub's name, or a list of them; the published set where none is named.
    `without_thinking`: "keep" for rows without it too. `raw`: the thinking stays as it was. `think_with`: the
    address of a teacher, which thinks about rows without thinking, with `rethink` about all; with
    `think_limit` only so many rows are taken. It raises SystemExit, and writes neither file, when the data
    cannot be read or a file would be empty.
    """
    names = [dataset] if isinstance(dataset, str) else dataset or [DATASET_NAME]
    counts = sources.read_names(names, revision, sha256)
    refuse_overwriting(train_file, val_file, list(counts))

    if think_with:
        from parts.rows import teacher  # here, as training imports data.py and wants none

        begin, record = partial(to_messages, system=THINK_PROMPT), train_file + TEACHER_SUFFIX
        tutor = teacher.Teacher(think_with, think_model, begin, AGREE_PROMPT, MAX_LENGTH, record)

    # 1. Load each data set and split it. The published one is split by rows, for the public run's two files.
    loaded = []
    for name in counts:
        published = name.removeprefix("ms://") == DATASET_NAME
        loaded.append(sources.load(name, revision, sha256, len(counts) > 1, published, SEED, TRAIN_SHARE))

    # 2. Check the rows, and put the sets together.
    problems: row.Problems = {}
    with_thinkless = bool(think_with) or without_thinking == "keep"
    train, val, lines = sources.join(loaded, counts, TRAIN_SHARE, with_thinkless, problems)
    origin = {"sources": [source.origin for source in loaded], "raw": raw}

    # 3. Think anew: a teacher thinks and answers who knows the question alone.
    if think_with:
        train, val = sources.take_sample(train, val, think_limit, TRAIN_SHARE)
        train, val, new = tutor.think_anew(train, val, rethink, problems)
        lines.append(f"教师模型  {tutor.name} 重写了 {new} 行的思考和回答，可用的共 {len(train + val)} 行")
        origin["teacher"] = {"model": tutor.name, "rows": new}
    if kept := sum(not example["think"] for _, example in train + val):
        lines.append(f"没有思考  {kept} 行，用来学习不思考、直接回答（提问时加 --no_thinking）")
    if thinkless := row.count_thinkless(problems):
        lines.append(f"没有思考  {thinkless} 行，未采用；其余可用的 {len(train + val)} 行。{KEEP_THINKLESS}")

    # 4. Leave out of the thinking what its writer could only know from the answer.
    if raw:
        lines.append("清理      跳过（--raw）")
    else:
        done = Counter()
        train = traces.clean_rows(train, problems, done)
        val = traces.clean_rows(val, problems, done)
        lines.append(f"清理      {traces.describe_cleaning(done)}")
    refuse_empty(train, val, problems)

    # 5. Write what is left, and say what was done. Where a row stood is of no use any more.
    _, train = zip(*train)
    _, val = zip(*val)
    lines.append(sources.mark_seen(train, val))
    write(train_file, train, val_file, val, origin)
    print(row.summary(lines, {train_file: train, val_file: val}, problems))


def write(train_file: str, train: row.Rows, val_file: str, val: row.Rows, origin: dict) -> None:
    """Write both files, and beside the training file its `origin`, all or none. It raises SystemExit."""
    for example in train + val:
        example.pop("instruction", None)  # the cleaning has seen it
    texts = {train_file: files.to_jsonl(train), val_file: files.to_jsonl(val)}
    # With the checksum read_origin sees whether the file was changed since.
    origin = origin | {"train_sha256": hashlib.sha256(texts[train_file].encode()).hexdigest()}
    texts[train_file + SOURCE_SUFFIX] = files.to_jsonl([origin])
    try:
        files.write(texts)
    except OSError as error:
        failure = f"无法写入 {train_file}、{val_file}（{error.strerror}）"
        raise SystemExit(f"错误：{failure}；请检查权限和磁盘空间，或换个位置。") from None


def propose(train_file: str, val_file: str) -> str:
    """Return the command that trains on these files, for how many epochs, and how long it may take."""
    content = Path(train_file).read_bytes()
    rows = content.count(b"\n")
    # Unsloth's documentation advises 1 to 3. The public run of 2,166 rows was best at the end of the first of
    # the recipe's 2 epochs. Few rows make few steps; of many, each says less that is new. As the best step is
    # what is kept, an epoch too many costs time only.
    epochs = 3 if rows < 1000 else NUM_TRAIN_EPOCHS
    if rows > 10_000:
        epochs = 1
    command = "python train.py"
    if epochs != NUM_TRAIN_EPOCHS:
        command += f" --num_train_epochs {epochs}"
    if (train_file, val_file) != (TRAIN_FILE, VAL_FILE):
        command += f" --train_file {shlex.quote(train_file)} --val_file {shlex.quote(val_file)}"
    steps = -(-rows // EXAMPLES_PER_STEP) * epochs
    minutes = max(1, round(SECONDS_PER_BYTE * len(content) * epochs / 60))
    estimate = f"{epochs} 轮，约 {steps:,} 步；RTX 4090 上估算约 {minutes:,} 分钟（按公式，未实测，不含评估）"
    return f"\n下一步    {command}\n          {estimate}"


def read_origin(train_file: str) -> dict[str, object]:
    """Return {sources: [{source, revision, sha256}], raw, train_sha256}: what `prepare` made the file from.
    Only the last for a file that it did not write, or that has changed since."""
    sha256 = terminal.sha256(train_file)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        origin = json.loads(Path(train_file + SOURCE_SUFFIX).read_text(encoding="utf-8"))
        if origin["train_sha256"] == sha256:
            return origin
    return {"train_sha256": sha256}


def read_examples(path: str) -> list[row.Row]:
    """Return the rows of a file that `prepare` wrote. It raises SystemExit when one cannot be trained on."""
    examples = []
    for number, raw in files.read(path):
        # An empty thinking was kept on purpose; one that is missing or null was not written by `prepare`.
        thinkless = isinstance(raw, dict) and raw.get("think") == ""
        try:
            examples.append(row.check(raw, thinkless=thinkless))
        except ValueError as problem:
            remedy = "请用 python data.py --dataset <原始数据> 重新生成"
            raise SystemExit(f"错误：{path} 第 {number} 行 {problem}；{remedy}。") from None
    return examples


def to_messages(question: str, think=None, answer=None, history=None, system=SYSTEM_PROMPT) -> list[dict]:
    """Return [system, earlier turns, user], and the assistant's message when there is an answer. `history`:
    [[question, answer], …]."""
    messages = [{"role": "system", "content": system}]
    # Without their thinking: the model's own template drops it from earlier turns.
    for asked, said in history or []:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    messages.append({"role": "user", "content": question})
    if answer is not None:
        messages.append({"role": "assistant", "reasoning_content": think or "", "content": answer})
    return messages


def load_dataset(path: str, tokenizer, max_length: int):
    """Return a datasets.Dataset of input_ids and labels from a file that `prepare` wrote; print its lengths.

    Examples of more than `max_length` tokens are left out, as a cut would lose the answer, which comes last.
    It raises SystemExit when none is left.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # from_list takes its columns from the first row, which may have no history where others have one.
    examples = datasets.Dataset.from_list([{"history": None} | example for example in read_examples(path)])
    encoded = examples.map(
        lambda example: encoding.encode_example(tokenizer, to_messages(**example)),
        desc=f"编码 {path}",
        remove_columns=examples.column_names,
        # Else datasets hashes the whole tokenizer, 4 s, for a cache that is not used here.
        new_fingerprint="encoded",
    )
    lengths = list(map(len, encoded["input_ids"]))
    print(encoding.describe_lengths(path, lengths, max_length))
    shortest = min(lengths)
    if shortest > max_length:
        cause = f"{path} 的样本都超过 {max_length} 个 token（最短 {shortest}）"
        raise SystemExit(f"错误：{cause}；请加大 --max_length。")
    return encoded.select([i for i, length in enumerate(lengths) if length <= max_length])


def main() -> None:
    parser = terminal.Parser(description="下载、检查、清理、划分数据。例子在 data.py 开头。")
    flag = parser.add_argument_group("参数").add_argument
    flag("--dataset", nargs="+", action="extend", help="文件、ModelScope 名、hf://名[/配置]；#500 取 500 行")
    flag("--revision", help="hub 上数据集的版本：分支、标签或提交；默认最新")
    flag("--sha256", help="数据的 SHA-256，不一致就报错；默认不检查")
    flag("--raw", action="store_true", help="保留公布的原文，不清理答案泄露（“看过标准答案”的痕迹）")
    flag("--without_thinking", choices=("drop", "keep"), default="drop", help="没有思考的行：默认 drop，丢弃")
    flag("--train_file", default=TRAIN_FILE, help="训练集；默认 %(default)s")
    flag("--val_file", default=VAL_FILE, help="验证集；默认 %(default)s")
    flag = parser.add_argument_group("由教师模型重新思考").add_argument
    flag("--think_with", metavar="URL", type=endpoint.address, help="没有思考的行由这个地址的模型思考")
    flag("--think_model", metavar="NAME", help="由哪个模型思考（只有一个时不需要）")
    flag("--rethink", action="store_true", help="有思考的行也重新思考")
    flag("--think_limit", metavar="N", type=partial(terminal.whole_number, 2), help="试用：只取 N 行")
    args = parser.parse_args()
    if not args.think_with and (args.think_model or args.rethink or args.think_limit):
        parser.error("--think_model、--rethink、--think_limit 只和 --think_with 一起起作用")
    if args.think_with and args.without_thinking == "keep":
        parser.error("--think_with 和 --without_thinking keep 不能同时使用")
    prepare(**vars(args))
    print(propose(args.train_file, args.val_file))


if __name__ == "__main__":
    terminal.run_main(main)
