"""Data sets, local or on a hub: read, recognised, divided into their two parts, and held against each other. Knows no
set by name and writes nothing."""

import contextlib
import hashlib
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from parts import hub, row_files, rows, shapes, split
from parts.rows import Placed

IN_TRAIN, IN_VAL = "验证集的问题也在训练集里", "训练集的问题也在验证集里"


class Source(NamedTuple):
    """A data set that was read: what to say of it, where it came from, and its two parts."""

    lines: list[str]
    origin: dict[str, str | None]
    train: list[Placed]
    val: list[Placed]
    own_val: bool  # a part that its hub keeps for validation


def read_contents(dataset: str, revision: str | None) -> dict[str, bytes]:
    """{file: bytes} of a local file, whose name is "", or of a hub's data set."""
    named = "://" not in dataset and Path(dataset).suffix.lower() in row_files.SUFFIXES  # a file that is not there
    if os.path.exists(dataset) or named:
        if revision:
            raise SystemExit(f"错误：--revision {revision} 只用于 hub 上的数据集，而 {dataset} 是本地文件。")
        return {"": row_files.read_bytes(Path(dataset))}
    if not hub.is_name(dataset):
        raise SystemExit(
            f"错误：--dataset {dataset} 既不是已有的文件，也不是 ModelScope 数据集名（形如 owner/name）。"
            f"{hub.forms(dataset)}"
        )
    return hub.download_dataset(dataset, revision)


def load(dataset: str, revision: str | None, sha256: str | None, several: bool, divide, fixed: bool = False) -> Source:
    """One data set, recognised and split by `divide(rows)`, unless a hub keeps a part of it for validation; `fixed`: by
    it in any case. `sha256` is the checksum that it must have; of several files, that of their contents in order of
    their names."""
    contents = read_contents(dataset, revision)
    found = hashlib.sha256(b"".join(contents.values())).hexdigest()
    if sha256 and sha256.lower() != found:
        raise SystemExit(
            f"错误：{dataset} 的 SHA-256 是 {found}，不是 --sha256 {sha256}；数据已变，请核对来源，或去掉 --sha256。"
        )
    files: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in contents:
        files["train" if fixed else split.part_of(name)].append(name)
    if not files["train"]:
        raise SystemExit(f"错误：{dataset} 里只有验证或测试的部分，不用来训练；请换一个数据集。")
    read = partial(read_files, dataset, contents, marked=several or len(contents) > 1)
    train, mapping = read(files["train"])
    own, unused = [], [*files["val"], *files["test"]]
    for part in ("val", "test"):  # tests are often published without answers
        if not own and files[part]:
            with contextlib.suppress(SystemExit) if part == "test" else contextlib.nullcontext():
                placed = read(files[part])[0]
                if any(isinstance(row, dict) and row.get("answer") for _, row in placed):
                    own, unused = placed, [name for name in unused if name not in files[part]]
    train, val = (sum(divide(part), []) for part in (train, own)) if own else divide(train)
    shown = f"{dataset}（{'、'.join(contents)}）" if contents.keys() != {""} else dataset
    lines = [f"数据来源  {shown}：共 {len(train) + len(val)} 行", f"SHA-256   {found}"]
    lines += [f"读作      {mapping}"] * bool(mapping)
    lines += [f"划分      验证集是它自己的，{len(own)} 行"] * bool(own)
    lines += [f"划分      不用它的 {'、'.join(unused)}"] * bool(unused)
    local = contents.keys() == {""}  # its folder may name people
    origin = {"source": Path(dataset).name if local else shown, "revision": revision, "sha256": found}
    return Source(lines, origin, train, val, bool(own))


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


def check(
    sources: list[Source], counts: list[int | None], share: float, thinkless: bool, problems: dict
) -> list[tuple[list, list]]:
    """[(train, val)] of the clean rows of each source, at most `counts` of them, this `share` to train on.
    No question is in a training part and in a validation part; `problems` gathers what is left out."""
    found, seen = [], (set(), set())
    for source, count in zip(sources, counts):
        train, val = (
            rows.keep_usable(part, problems, there, thinkless) for part, there in zip((source.train, source.val), seen)
        )
        if source.own_val:
            train = rows.leave_out(train, rows.topics(val), IN_VAL, problems)
        else:
            val = rows.leave_out(val, rows.topics(train), IN_TRAIN, problems)
        found.append(split.sample(train, val, count, share))
    for place, (train, val) in enumerate(found):  # validation parts stay as they are
        others = set().union(*(rows.topics(other) for i, (_, other) in enumerate(found) if i != place))
        found[place] = rows.leave_out(train, others, IN_VAL, problems), val
    return found


def describe(sources: list[Source], counts: list[int | None], found: list[tuple[list, list]]) -> list[str]:
    """Where the rows come from, and how many were taken of each source where there are several, or not all of one."""
    lines = []
    for source, count, (train, val) in zip(sources, counts, found):
        lines += source.lines
        if count or len(sources) > 1:
            limit = f"，最多取 {count} 行" if count else ""
            lines.append(f"采用      训练 {len(train)} 行，验证 {len(val)} 行{limit}")
    return lines


def read_count(dataset: str) -> tuple[str, int | None]:
    """(data set, rows of the sample) of `owner/name#500`."""
    if "#" not in dataset or os.path.exists(dataset):
        return dataset, None
    name, _, count = dataset.rpartition("#")
    if not count.isdecimal() or not 2 <= int(count) < 2**32:
        raise SystemExit(f"错误：--dataset {dataset}：# 后面要一个不小于 2 的整数，例如 {name}#500")
    return name, int(count)
