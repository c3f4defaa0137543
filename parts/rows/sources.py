"""Data sets, local or on a hub: read, recognised, divided into training and validation part, and held against each
other, near-duplicates too. Knows no set by name and writes nothing."""

import hashlib
import os
import random
import re
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from parts import hub
from parts.rows import files as row_files
from parts.rows import row as rows
from parts.rows import shapes
from parts.rows.row import Place, Placed

IN_TRAIN, IN_VAL = "验证集的问题也在训练集里", "训练集的问题也在验证集里"
PARTS = {  # words of a file's path
    "train": ("train", "training", "trainset"),
    "val": ("validation", "validate", "valid", "val", "valset", "dev", "devset", "development", "eval", "evaluation"),
    "test": ("test", "testing", "testset", "heldout", "holdout"),
}
# Near-duplicates are answers that share many short passages.
LENGTH = 5  # characters of a passage
SHARE = 0.3  # of the shorter answer's passages, from which on two are near-duplicates
LEAST = 20  # passages of an answer, below which it is too short to tell
FEW, COMMON, MANY = 10, 0.02, 50  # a passage of more answers than 2 % of them, at least 10, at most 50, says nothing
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
            if not digits.isdecimal() or not 2 <= int(digits) < 2**32:
                raise SystemExit(f"错误：--dataset {dataset}：# 后面要一个不小于 2 的整数，例如 {name}#500")
            count = int(digits)
        if name in counts:
            raise SystemExit(f"错误：--dataset {' '.join(datasets)}：同一个数据集写了两次；请改正。")
        counts[name] = count
    if len(counts) > 1 and (revision or sha256):
        raise SystemExit(f"错误：--dataset {' '.join(datasets)}：--revision 和 --sha256 只用于一个数据集；请改正。")
    return counts


def part_of(file: str) -> str:
    """train, val or test: which part of a hub's data set a file is, `data/validation-00000-of-00001.parquet` say."""
    for name in reversed(file.lower().split("/")):  # its own name says more than its folders'
        words = set(re.split(r"[^a-z]+", name))
        for part, names in PARTS.items():
            if words & set(names):
                return part
    return "train"


def choose_files(dataset: str, names: list[str]) -> list[str]:
    """The data files among the `names` of a hub's data set; where there are several formats, those of one."""
    _, _, inside = hub.split(dataset)
    formats: dict[str, list[str]] = {suffix: [] for suffix in row_files.SUFFIXES}
    for name in sorted(names):
        # Metadata that the hub keeps beside the data has these names.
        if f"/{name}/".startswith(f"/{inside}".rstrip("/") + "/") and not re.search(
            r"(^|/)(dataset_info|configuration)[^/]*$", name
        ):
            formats.get(Path(name).suffix.lower(), []).append(name)
    there = [files for files in formats.values() if files]
    if not there:
        suffixes = "、".join(row_files.SUFFIXES)
        raise SystemExit(f"错误：数据集 {dataset} 里没有 {suffixes} 文件；请用 --dataset 换一个。")
    # Tests alone, or an example, in another format are not the set.
    return next((files for files in there if "train" in map(part_of, files)), there[0])


def read_contents(dataset: str, revision: str | None) -> dict[str, bytes]:
    """{file: bytes} of a local file, whose name is "", or of a hub's data set.

    What is downloaded does not go through the client's cache: there it keeps, and would hand out, files that the hub
    has renamed or dropped since.
    """
    missing = "://" not in dataset and Path(dataset).suffix.lower() in row_files.SUFFIXES  # a file that is not there
    if os.path.exists(dataset) or missing:
        if revision:
            raise SystemExit(f"错误：--revision {revision} 只用于 hub 上的数据集，而 {dataset} 是本地文件。")
        return {"": row_files.read_bytes(Path(dataset))}
    if not hub.split(dataset):
        raise SystemExit(
            f"错误：--dataset {dataset} 既不是已有的文件，也不是 ModelScope 数据集名（形如 owner/name）。"
            f"{hub.forms(dataset)}"
        )
    with tempfile.TemporaryDirectory() as folder:
        choose = partial(choose_files, dataset)
        path, names = hub.download(dataset, "dataset", "用 --dataset 指定本地文件", choose, folder, revision)
        return {name: (path / name).read_bytes() for name in names}


def read_files(dataset: str, contents: dict[str, bytes], names: list[str], marked: bool) -> tuple[list[Placed], str]:
    """(rows of these files with our fields, how they were read). `marked`: each place says the file too."""
    found, mappings = [], {}
    for name in names:
        placed = row_files.parse(Path(dataset, name), contents[name])
        if marked:
            placed = [((name or dataset, number), row) for number, row in placed]
        converted, mapping = shapes.to_fields(placed, name or dataset)
        found += converted
        mappings[mapping] = True
    return found, "；".join(filter(None, mappings))


def read_own_val(read, files: dict[str, list[str]]) -> tuple[list[Placed], list[str]]:
    """(rows, files) of what a hub keeps for validation, else of its tests; none where they have no answers."""
    for part in ("val", "test"):
        try:
            placed, _ = read(files[part])
        except SystemExit:
            if part == "val":
                raise
            continue  # tests are often published in a form of their own
        if any(isinstance(row, dict) and row.get("answer") for _, row in placed):
            return placed, files[part]
    return [], []


def load(dataset: str, revision: str | None, sha256: str | None, several: bool, fixed: bool, divide) -> Source:
    """One data set, recognised, and split by `divide(rows)` unless a hub keeps a part of it for validation; `fixed`: by
    that in any case. `sha256` is the checksum that it must have; of several files, that of their contents in order of
    their names."""
    contents = read_contents(dataset, revision)
    checksum = hashlib.sha256(b"".join(contents.values())).hexdigest()
    if sha256 and sha256.lower() != checksum:
        raise SystemExit(
            f"错误：{dataset} 的 SHA-256 是 {checksum}，不是 --sha256 {sha256}；数据已变，请核对来源，或去掉 --sha256。"
        )
    files: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in contents:
        files["train" if fixed else part_of(name)].append(name)
    if not files["train"]:
        raise SystemExit(f"错误：{dataset} 里只有验证或测试的部分，不用来训练；请换一个数据集。")

    local = "" in contents
    shown = dataset if local else f"{dataset}（{'、'.join(contents)}）"
    read = partial(read_files, dataset, contents, marked=several or len(contents) > 1)
    placed, mapping = read(files["train"])
    own, used = read_own_val(read, files)
    lines = [f"数据来源  {shown}：共 {len(placed) + len(own)} 行", f"SHA-256   {checksum}"]
    if mapping:
        lines.append(f"读作      {mapping}")
    if own:
        lines.append(f"划分      验证集是它自己的，{len(own)} 行")
    if unused := [name for name in files["val"] + files["test"] if name not in used]:
        lines.append(f"划分      不用它的 {'、'.join(unused)}")
    # The folder of a local file may name people.
    origin = {"source": Path(dataset).name if local else shown, "revision": revision, "sha256": checksum}
    train, val = divide(placed)
    if own:
        train, val = train + val, sum(divide(own), [])
    return Source(lines, origin, train, val, bool(own))


# ---- dividing -------------------------------------------------------------------------------------------------------


def by_row(loaded: list[Placed], seed: int, share: float) -> tuple[list[Placed], list[Placed]]:
    """(train, val) of the published training script: shuffled, and cut at this share of the rows."""
    shuffled = list(loaded)
    random.Random(seed).shuffle(shuffled)
    cut = int(len(shuffled) * share)
    return shuffled[:cut], shuffled[cut:]


def by_question(loaded: list[Placed], seed: int, share: float) -> tuple[list[Placed], list[Placed]]:
    """(train, val) likewise, but all rows of one question stay together: where all questions differ, it is the same."""
    train, val = by_row(loaded, seed, share)
    cut = len(train)
    groups: dict[str, list[Placed]] = {}
    for placed in train + val:
        groups.setdefault(question_of(placed), []).append(placed)
    train, val = [], []
    for i, group in enumerate(groups.values(), 1):
        needed = i > 1 and i == len(groups) and not val  # else there would be none to validate
        (val if needed or len(train) >= cut else train).extend(group)
    return train, val


def question_of(placed: Placed) -> str:
    """What a row is grouped by; a row that cannot be used is a group of its own."""
    place, row = placed
    try:
        return rows.clean(rows.topic(row))
    except (AttributeError, KeyError, IndexError, TypeError):
        return f"\0{place}"


def sample(train: list, val: list, count: int | None, share: float) -> tuple[list, list]:
    """`count` rows, this share of them to train on: the first ones, so that a larger sample contains a smaller one."""
    if count is None or count >= len(train) + len(val):
        return train, val
    cut = max(1, min(round(count * share), count - 1))
    return train[:cut], val[: count - cut]


def join(
    sources: list[Source], counts: Iterable[int | None], share: float, thinkless: bool, problems: dict[str, list[Place]]
) -> tuple[list[Placed], list[Placed], list[str]]:
    """(train, val, what to say) of the clean rows of all sources, of each at most its count, `share` of a sample to
    train on. No question is in a training part and in a validation part; `problems` gathers what is left out."""
    parts, seen_train, seen_val = [], set(), set()
    for source, count in zip(sources, counts):
        train = rows.keep_usable(source.train, problems, seen_train, thinkless)
        val = rows.keep_usable(source.val, problems, seen_val, thinkless)
        if source.own_val:
            train = rows.leave_out(train, rows.topics(val), IN_VAL, problems)
        else:
            val = rows.leave_out(val, rows.topics(train), IN_TRAIN, problems)
        parts.append(sample(train, val, count, share))
    all_train, all_val, lines = [], [], []
    for source, count, (train, val) in zip(sources, counts, parts):
        others = [placed for _, other in parts if other is not val for placed in other]
        train = rows.leave_out(train, rows.topics(others), IN_VAL, problems)  # validation parts stay as they are
        lines += source.lines
        if count or len(sources) > 1:
            most = f"，最多取 {count} 行" if count else ""
            lines.append(f"采用      训练 {len(train)} 行，验证 {len(val)} 行{most}")
        all_train += train
        all_val += val
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
    for numbers in holders.values():
        if 1 < len(numbers) <= min(max(FEW, COMMON * len(answers)), MANY):
            shared.update(combinations(numbers, 2))
    alike |= {(i, j) for (i, j), count in shared.items() if count >= SHARE * min(counts[i], counts[j])}
    return sorted(alike)


def mark_seen(train: list[Placed], val: list[Placed]) -> str:
    """Mark the validation rows whose answer nearly stands in the training part; returns what to say of it."""
    inside, seen = 0, set()
    for i, j in near_duplicates([row["answer"] for _, row in train + val]):
        if j < len(train):
            inside += 1
        elif i < len(train):
            seen.add(j - len(train))
    for i in seen:
        val[i][1]["seen"] = True
    return f'近似重复  训练集内 {inside} 对；验证集 {len(seen)}/{len(val)} 行与训练集近似，标为 "seen": true'
