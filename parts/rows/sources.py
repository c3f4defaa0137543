"""Data sets, local or on a hub: read, recognised, divided into training and validation part, and held against each
other, near-duplicates too. Knows no set by name and writes nothing."""

import contextlib
import hashlib
import os
import random
import re
import tempfile
import zlib
from collections import Counter, defaultdict
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from parts import hub
from parts.rows import files, shapes
from parts.rows.row import Placed, Problems, check, keep_usable, leave_out, topic

PARTS = {  # words of a file's path
    "train": ("train", "training", "trainset"),
    "val": (
        "validation",
        "validate",
        "valid",
        "val",
        "valset",
        "dev",
        "devset",
        "development",
        "eval",
        "evaluation",
    ),
    "test": ("test", "testing", "testset", "heldout", "holdout"),
}
# Near-duplicates are answers that share many short passages.
LENGTH = 5  # characters of a passage
SHARE = 0.3  # of the shorter answer's passages, from which on two are near-duplicates
LEAST = 20  # passages of an answer, below which it is too short to tell
FEW, COMMON, MANY = (
    10,
    0.02,
    50,
)  # a passage of more answers than 2 % of them, at least 10, at most 50, says nothing
PASSAGES = 2_000_000  # that are held in memory, of more only every n-th: about 400 MB


class Source(NamedTuple):
    """A data set that was read."""

    lines: list[str]  # what to say of it
    origin: dict[str, str | None]  # what it was, for the model card
    train: list[Placed]
    val: list[Placed]
    own_val: bool  # whether its hub keeps that part for validation


# ---- reading --------------------------------------------------------------------------------------------------------


def read_names(datasets: list[str], revision: str | None, sha256: str | None) -> dict[str, int | None]:
    """{data set: rows that are wanted of it} of names such as `owner/name#500`. Raises SystemExit where they cannot be
    meant so."""
    counts: dict[str, int | None] = {}
    for dataset in datasets:
        name, count = dataset, None
        if "#" in dataset and not os.path.exists(dataset):
            name, _, digits = dataset.rpartition("#")
            if not digits.isdecimal() or int(digits) < 2:
                raise SystemExit(f"错误：--dataset {dataset}：# 后面要一个不小于 2 的整数，例如 {name}#500")
            count = int(digits)
        if name in counts:
            raise SystemExit(f"错误：--dataset {' '.join(datasets)}：同一个数据集写了两次；请改正。")
        counts[name] = count
    if len(counts) > 1 and (revision or sha256):
        raise SystemExit(
            f"错误：--dataset {' '.join(datasets)}：--revision 和 --sha256 只用于一个数据集；请改正。"
        )
    return counts


def part_of(file: str) -> str:
    """train, val or test: which part of a hub's data set a file is, `data/validation-00000-of-00001.parquet` say."""
    for name in reversed(file.lower().split("/")):  # its own name says more than its folders'
        for part, names in PARTS.items():
            if not set(names).isdisjoint(re.split(r"[^a-z]+", name)):
                return part
    return "train"


def choose_files(dataset: str, names: list[str]) -> list[str]:
    """The data files among the `names` of a hub's data set; where there are several formats, those of one."""
    inside = hub.split(dataset).inside.rstrip("/")
    formats: dict[str, list[str]] = {suffix: [] for suffix in files.SUFFIXES}
    for name in sorted(names):
        suffix = Path(name).suffix.lower()
        metadata = re.match(
            "dataset_info|configuration", Path(name).name
        )  # that the hub keeps beside the data
        if suffix in formats and not metadata and f"/{name}/".startswith(f"/{inside}/" if inside else "/"):
            formats[suffix].append(name)
    there = [chosen for chosen in formats.values() if chosen]
    if not there:
        raise SystemExit(f"错误：数据集 {dataset} 里没有 {'、'.join(formats)} 文件；请用 --dataset 换一个。")
    # Tests alone, or an example, in another format are not the set.
    return next((chosen for chosen in there if "train" in map(part_of, chosen)), there[0])


def read_contents(dataset: str, revision: str | None) -> dict[str, bytes]:
    """{file: bytes} of a local file, whose name is "", or of a hub's data set.

    What is downloaded does not go through the client's cache: there it keeps, and would hand out, files that the hub
    has renamed or dropped since.
    """
    # What ends as a file of ours does is a file, there or not.
    if os.path.exists(dataset) or "://" not in dataset and Path(dataset).suffix.lower() in files.SUFFIXES:
        if revision:
            raise SystemExit(f"错误：--revision {revision} 只用于 hub 上的数据集，而 {dataset} 是本地文件。")
        return {"": files.read_bytes(Path(dataset))}
    if not hub.split(dataset):
        raise SystemExit(
            f"错误：--dataset {dataset} 既不是已有的文件，也不是 hub 上的数据集名。{hub.forms(dataset)}"
        )
    with tempfile.TemporaryDirectory() as folder:
        choose = partial(choose_files, dataset)
        path, names = hub.download(dataset, "dataset", "用 --dataset 指定本地文件", choose, folder, revision)
        return {name: (path / name).read_bytes() for name in names}


def read_files(
    dataset: str, contents: dict[str, bytes], names: list[str], marked: bool
) -> tuple[list[Placed], str]:
    """(rows of these files with our fields, how they were read). `marked`: each place says the file too."""
    placed = []
    for name in names:
        file = (name or dataset) if marked else ""
        placed += [((file, number), row) for number, row in files.parse(Path(dataset, name), contents[name])]
    return shapes.to_fields(placed, dataset)


def read_own_val(read, names: dict[str, list[str]]) -> tuple[list[Placed], list[str]]:
    """(rows, files) of what a hub keeps for validation, else of its tests; none where they have no answers."""
    for part in ("val", "test"):
        with contextlib.suppress(SystemExit):  # tests are often published in a form of their own
            placed, _ = read(names[part])
            if any(isinstance(row, dict) and row.get("answer") for _, row in placed):
                return placed, names[part]
    return [], []


def load(dataset: str, revision, sha256, marked: bool, by_rows: bool, seed: int, share: float) -> Source:
    """One data set, recognised, and split unless a hub keeps a part of it for validation; `by_rows`: as the published
    training script splits, in any case. `sha256` is the checksum that it must have; of several files, that of their
    contents in order of their names. `marked`: each place says the file too."""
    contents = read_contents(dataset, revision)
    checksum = hashlib.sha256(b"".join(contents.values())).hexdigest()
    if sha256 and sha256.lower() != checksum:
        raise SystemExit(f"错误：{dataset} 的 SHA-256 是 {checksum}，不是 --sha256 {sha256}；请核对来源。")
    names: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in contents:
        names["train" if by_rows else part_of(name)].append(name)
    if not names["train"]:
        raise SystemExit(f"错误：{dataset} 里只有验证或测试的部分，不用来训练；请换一个数据集。")

    read = partial(read_files, dataset, contents, marked=marked or len(contents) > 1)
    placed, mapping = read(names["train"])
    own, used = read_own_val(read, names)
    # The folder of a local file may name people.
    shown = source = f"{dataset}（{'、'.join(contents)}）"
    if "" in contents:
        shown, source = dataset, Path(dataset).name
    lines = [f"数据来源  {shown}：共 {len(placed) + len(own)} 行", f"SHA-256   {checksum}"]
    if mapping:
        lines.append(f"读作      {mapping}")
    divide = by_row if by_rows else by_question
    train, val = divide(placed, seed, share)
    if own:
        lines.append(f"划分      验证集是它自己的，{len(own)} 行")
        train, val = train + val, sum(divide(own, seed, share), [])
    unused = [name for name in names["val"] + names["test"] if name not in used]
    if unused:
        lines.append(f"划分      不用它的 {'、'.join(unused)}")
    return Source(lines, {"source": source, "revision": revision, "sha256": checksum}, train, val, bool(own))


# ---- dividing -------------------------------------------------------------------------------------------------------


def by_row(loaded: list[Placed], seed: int, share: float) -> tuple[list[Placed], list[Placed]]:
    """(train, val) of the published training script: shuffled, and cut at this share of the rows."""
    shuffled = list(loaded)
    random.Random(seed).shuffle(shuffled)
    cut = int(len(shuffled) * share)
    return shuffled[:cut], shuffled[cut:]


def by_question(loaded: list[Placed], seed: int, share: float) -> tuple[list[Placed], list[Placed]]:
    """(train, val) likewise, but all rows of one question stay together: where all questions differ, it is the same."""
    first, rest = by_row(loaded, seed, share)
    groups: dict[str, list[Placed]] = {}
    for placed in first + rest:
        try:
            question = topic(check(placed[1], ("question",)))
        except ValueError:
            question = f"\0{placed[0]}"  # what cannot be used is a group of its own
        groups.setdefault(question, []).append(placed)
    train, val = [], []
    for i, group in enumerate(groups.values(), 1):
        needed = i > 1 and i == len(groups) and not val  # else there would be none to validate
        (val if needed or len(train) >= len(first) else train).extend(group)
    return train, val


def sample(train: list, val: list, count: int | None, share: float) -> tuple[list, list]:
    """`count` rows, this share of them to train on: the first ones, so that a larger sample contains a smaller one."""
    if count is None or count >= len(train) + len(val):
        return train, val
    cut = max(1, min(round(count * share), count - 1))
    return train[:cut], val[: count - cut]


def join(
    sources: list[Source], counts: dict, share: float, thinkless: bool, problems: Problems
) -> tuple[list, ...]:
    """(train, val, what to say) of the clean rows of all sources, of each at most its count, `share` of a sample to
    train on. No question is in a training part and in a validation part; `problems` gathers what is left out."""
    parts, seen_train, seen_val = [], set(), set()
    for source, count in zip(sources, counts.values()):
        train = keep_usable(source.train, problems, seen_train, thinkless)
        val = keep_usable(source.val, problems, seen_val, thinkless)
        if not source.own_val:
            val = leave_out(val, train, "验证集的问题也在训练集里", problems)
        parts.append((source, count, *sample(train, val, count, share)))
    all_train, lines = [], []
    all_val = [placed for *_, val in parts for placed in val]
    for source, count, train, val in parts:
        train = leave_out(
            train, all_val, "训练集的问题也在验证集里", problems
        )  # validation parts stay as they are
        all_train += train
        lines += source.lines
        if count or len(parts) > 1:
            most = f"，最多取 {count} 行" if count else ""
            lines.append(f"采用      训练 {len(train)} 行，验证 {len(val)} 行{most}")
    return all_train, all_val, lines


# ---- near-duplicates ------------------------------------------------------------------------------------------------


def near_duplicates(answers: list[str]) -> list[tuple[int, int]]:
    """Numbers (i, j), i < j, of answers that are near-duplicates of each other, in order. Of very many long answers a
    part of the passages is looked at, the same in all of them: their shares are estimates then. An answer that stands
    there more than COMMON times is paired with its first copy only."""
    every = -(-sum(map(len, answers)) // PASSAGES)
    counts, holders, shared, first, alike = [], defaultdict(list), Counter(), {}, set()
    for i, text in enumerate(answers):
        passages = {text[start : start + LENGTH] for start in range(len(text) - LENGTH + 1)}
        if every > 1:
            passages = {passage for passage in passages if zlib.crc32(passage.encode()) % every == 0}
        counts.append(len(passages))
        if len(text) < LEAST + LENGTH:
            continue
        if first.setdefault(text, i) != i:  # of many copies every passage is common
            alike.add((first[text], i))
        for passage in passages:
            holders[passage].append(i)
    most = min(max(FEW, COMMON * len(answers)), MANY)
    for numbers in holders.values():
        if len(numbers) <= most:
            shared.update(combinations(numbers, 2))
    alike |= {(i, j) for (i, j), count in shared.items() if count >= SHARE * min(counts[i], counts[j])}
    return sorted(alike)


def mark_seen(train: list[Placed], val: list[Placed]) -> str:
    """Mark the validation rows whose answer nearly stands in the training part; returns what to say of it."""
    inside = 0
    for i, j in near_duplicates([row["answer"] for _, row in train + val]):
        inside += j < len(train)
        if i < len(train) <= j:
            val[j - len(train)][1]["seen"] = True
    seen = sum("seen" in row for _, row in val)
    return f'近似重复  训练集内 {inside} 对；验证集 {seen}/{len(val)} 行与训练集近似，标为 "seen": true'
