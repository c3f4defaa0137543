"""Data sets, local or on a hub: read, recognised, divided into training and validation part, and held against
each other, near-duplicates too. Knows no set by name and writes nothing."""

import contextlib
import hashlib
import os
import random
import re
import tempfile
import zlib
from collections import Counter, defaultdict
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import NamedTuple

from parts import hub
from parts.rows import files, shapes
from parts.rows.row import LocatedRows, Problems, Rows, check, drop_overlap, keep_usable, topic
from parts.terminal import progress, shorten

SPLITS = {  # words of a file's path, by which hubs tell what a file is for
    "train": {"train", "training", "trainset"},
    "val": set("validation validate valid val valset dev devset development eval evaluation".split()),
    "test": {"test", "testing", "testset", "heldout", "holdout"},
}
# Near-duplicates are answers that share many short passages.
PASSAGE_LENGTH = 5  # characters
DUPLICATE_SHARE = 0.3  # of the shorter answer's passages, from which on two are near-duplicates
MIN_PASSAGES = 20  # of an answer, below which it is too short to tell
# A passage says nothing that more than 2 % of the answers have; of few answers 10 may have it, of many 50.
# The upper limit also bounds the work: a passage of n answers makes n * (n - 1) / 2 pairs.
COMMON_SHARE, COMMON_AT_LEAST, COMMON_AT_MOST = 0.02, 10, 50
MAX_PASSAGES = 2_000_000  # that are held in memory, of more only every n-th: about 400 MB


class Source(NamedTuple):
    """A data set that was read and split."""

    lines: list[str]  # what to say of it
    origin: dict[str, str | None]  # what it was, for the model card
    train: LocatedRows
    val: LocatedRows
    has_own_val: bool  # whether its hub keeps that part for validation


# ---- reading -----------------------------------------------------------------------------------------------


def read_names(datasets: list[str], revision: str | None, sha256: str | None) -> dict[str, int | None]:
    """Return {data set: rows that are wanted of it, or None for all} of names such as `owner/name#500`. It
    raises SystemExit where they cannot be meant so."""
    flag = f"--dataset {' '.join(datasets)}"
    counts: dict[str, int | None] = {}
    for dataset in datasets:
        name, count = dataset, None
        if "#" in dataset and not os.path.exists(dataset):  # a file's name may have one
            name, _, digits = dataset.rpartition("#")
            # One row could not be both trained on and validated with.
            if not digits.isdecimal() or int(digits) < 2:
                raise SystemExit(f"错误：--dataset {dataset}：# 后面应是不小于 2 的整数，例如 {name}#500")
            count = int(digits)
        if name in counts:
            raise SystemExit(f"错误：{flag}：同一个数据集写了两次；请改正。")
        counts[name] = count
    if len(counts) > 1 and (revision or sha256):
        raise SystemExit(f"错误：{flag}：--revision 和 --sha256 只能用于单个数据集；请改正。")
    return counts


def split_of(file: str) -> str:
    """Return train, val or test: which split of a hub's data set a file such as
    `data/validation-00000-of-00001.parquet` belongs to."""
    for name in reversed(file.lower().split("/")):  # its own name says more than its folders'
        for split, words in SPLITS.items():
            if not words.isdisjoint(re.split(r"[^a-z]+", name)):
                return split
    return "train"


def to_splits(told: list[tuple[str, str]]) -> dict[str, str]:
    """Return {file: split} of pairs (what tells a file's split, the file). What is in two is no training."""
    splits: dict[str, str] = {}
    for words, name in told:
        if splits.get(name, "train") == "train":
            splits[name] = split_of(words)
    return splits


def find_splits(dataset: str, names: list[str], fetch) -> dict[str, str]:
    """Return {file: split} of a hub's data set that has these `names`: of the configuration, the folder or
    the file that is written behind its name, else of the default configuration. The card tells the splits, or
    else the files' names. Raises SystemExit where it is not clear which files are meant."""
    scheme, repository, inside = hub.split(dataset)
    configs, default = {}, ""
    if hub.CARD in names:
        card = fetch(hub.CARD)
        try:
            configs, default = hub.read_card(card, names)
        except Exception as error:  # yaml and datasets raise what they like
            problem = f"{dataset} 的 {hub.CARD} 写得不对（{shorten(str(error))}），分不清训练集和测试集"
            raise SystemExit(f"错误：{problem}；请下载要用的文件，再用 --dataset 指定它。") from None
    chosen = inside or default
    several = f"{dataset} 有 {len(configs)} 个配置（{'、'.join(configs)}）"
    remedy = f"请写明要哪一个，形如 --dataset {scheme}://{repository}/{next(iter(configs), '')}"
    if chosen in configs:
        if len(configs) > 1 and not inside:
            print(f"提示：{several}，用的是默认的 {chosen}；要别的{remedy}", flush=True)
        return to_splits(configs[chosen])
    told = [(name, name) for name in names]
    for files_of_config in configs.values():
        told += files_of_config
    folder = f"/{inside}".rstrip("/") + "/"
    splits = {name: split for name, split in to_splits(told).items() if f"/{name}/".startswith(folder)}
    if configs and (chosen is None or not splits):
        raise SystemExit(f"错误：{several}；{remedy}")
    return splits


def choose_files(dataset: str, published: bool, names: list[str], fetch) -> dict[str, str]:
    """Return {data file: split} of a hub's data set that has these `names`; where there are several formats,
    of the files of one. It raises SystemExit when there are none."""
    splits = dict.fromkeys(names, "train") if published else find_splits(dataset, names, fetch)
    formats: dict[str, list[str]] = {suffix: [] for suffix in files.SUFFIXES}
    for name in sorted(splits):
        path = Path(name)
        # Hubs keep such files beside the data.
        is_metadata = path.name.startswith(("dataset_info", "configuration"))
        if path.suffix.lower() in formats and not is_metadata:
            formats[path.suffix.lower()].append(name)
    candidates = list(filter(None, formats.values()))
    if not candidates:
        raise SystemExit(f"错误：数据集 {dataset} 里没有 {'、'.join(formats)} 文件；请用 --dataset 换一个。")
    # Tests alone, or an example, in another format are not the set.
    having_train = [chosen for chosen in candidates if "train" in map(splits.get, chosen)]
    return {name: splits[name] for name in (having_train or candidates)[0]}


def read_contents(dataset: str, revision: str | None, published: bool) -> tuple[dict, dict]:
    """Return ({file: bytes}, {file: split}) of a local file, whose name is "", or of a hub's data set, which
    is `published` with one file whose name tells nothing.

    What is downloaded does not go through the client's cache: there it keeps, and would hand out, files that
    the hub has renamed or dropped since.
    """
    # What ends as a file of ours does is a file, there or not: a mistyped one is no name on a hub.
    if os.path.exists(dataset) or "://" not in dataset and files.has_known_suffix(dataset):
        if revision:
            raise SystemExit(f"错误：{dataset} 是本地文件，--revision {revision} 只能用于 hub 上的数据集。")
        if inside := sorted(Path(dataset).rglob("data*.arrow")):  # datasets' save_to_disk wrote it
            contents = {path.relative_to(dataset).as_posix(): path.read_bytes() for path in inside}
            return contents, {name: split_of(name) for name in contents}
        return {"": files.read_bytes(Path(dataset))}, {"": "train"}
    if not hub.split(dataset):
        forms = hub.forms(dataset)
        raise SystemExit(f"错误：--dataset {dataset} 既不是已有的文件，也不是 hub 上的数据集名。{forms}")
    choose = partial(choose_files, dataset, published)
    with tempfile.TemporaryDirectory() as folder:
        path, splits = hub.download(dataset, "dataset", "用 --dataset 指定本地文件", choose, folder, revision)
        return {name: (path / name).read_bytes() for name in splits}, splits


def read_files(dataset: str, contents: dict, names: list[str], name_files: bool) -> tuple[LocatedRows, str]:
    """Return (rows of these files with our fields, how they were read). `name_files`: whether a row's
    location names its file, as it must where there are several."""
    rows = []
    for name in names:
        file = (name or dataset) if name_files else ""
        rows += [((file, number), row) for number, row in files.parse(Path(dataset, name), contents[name])]
    return shapes.to_fields(rows, dataset)


def read_own_val(read, names: dict[str, list[str]]) -> tuple[LocatedRows, list[str]]:
    """Return (rows, files) of what a hub keeps for validation, else of its tests; none where they have no
    answers."""
    for split in ("val", "test"):
        with contextlib.suppress(SystemExit):  # tests are often published in a form of their own
            rows, _ = read(names[split])
            for _, row in rows:
                if isinstance(row, dict) and row.get("answer"):
                    return rows, names[split]
    return [], []


def load(dataset: str, revision, sha256, name_files: bool, published: bool, seed, share: float) -> Source:
    """Return one data set, recognised, and split unless a hub keeps a part of it for validation.

    `published`: it is split by rows in any case, as the published training script does. `sha256` is the
    checksum that it must have; of several files, that of their contents in order of their names.
    """
    contents, splits = read_contents(dataset, revision, published)
    checksum = hashlib.sha256(b"".join(contents.values())).hexdigest()
    if sha256 and sha256.lower() != checksum:
        raise SystemExit(f"错误：{dataset} 的 SHA-256 是 {checksum}，不是 --sha256 {sha256}；请核对来源。")
    names: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name, split in splits.items():
        names[split].append(name)
    if not names["train"]:
        raise SystemExit(f"错误：{dataset} 里只有验证集或测试集，不能用来训练；请换一个数据集。")

    read = partial(read_files, dataset, contents, name_files=name_files or len(contents) > 1)
    rows, mapping = read(names["train"])
    own_val, used = read_own_val(read, names)
    shown = source = f"{dataset}（{'、'.join(contents)}）"
    if os.path.exists(dataset):
        # Only the name goes into the model card: the folder of a local file may name people.
        shown, source = dataset, Path(dataset).name
    lines = [f"数据来源  {shown}：共 {len(rows) + len(own_val)} 行", f"SHA-256   {checksum}"]
    for name, content in contents.items():
        if (encoding := files.encoding_of(content)) != "utf-8":
            lines.append(f"编码      {name or dataset} 不是 UTF-8，按 {encoding.upper()} 读取")
    if mapping:
        lines.append(f"读作      {mapping}")
    divide = divide_rows if published else divide_questions
    train, val = divide(rows, seed, share)
    if own_val:
        lines.append(f"划分      使用数据集自带的验证集，{len(own_val)} 行")
        # Shuffled as the others are, so that the first rows of it are a fair sample.
        first, rest = divide(own_val, seed, share)
        train, val = train + val, first + rest
    unused = [name for name in names["val"] + names["test"] if name not in used]
    if unused:
        lines.append(f"划分      不使用数据集自带的 {'、'.join(unused)}")
    origin = {"source": source, "revision": revision, "sha256": checksum}
    return Source(lines, origin, train, val, bool(own_val))


# ---- dividing ----------------------------------------------------------------------------------------------


def divide_rows(rows: LocatedRows, seed: int, share: float) -> tuple[LocatedRows, LocatedRows]:
    """Return (train, val) as the published script does: shuffled, and cut at this share of the rows."""
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    cut = int(len(shuffled) * share)
    return shuffled[:cut], shuffled[cut:]


def divide_questions(rows: LocatedRows, seed: int, share: float) -> tuple[LocatedRows, LocatedRows]:
    """Return (train, val) likewise, but all rows of one question stay together: where all questions differ,
    it is the same."""
    first, rest = divide_rows(rows, seed, share)
    groups: dict[str, LocatedRows] = {}
    for location, row in first + rest:
        try:
            # Of the clean text: white space at its ends makes no other question.
            question = topic(check(row, ("question",)))
        except ValueError:
            question = f"\0{location}"  # what cannot be used is a group of its own
        groups.setdefault(question, []).append((location, row))
    train, val = [], []
    for i, group in enumerate(groups.values(), 1):
        is_needed = i > 1 and i == len(groups) and not val  # else there would be none to validate
        part = val if is_needed or len(train) >= len(first) else train
        part += group
    return train, val


def take_sample(train: list, val: list, count: int | None, share: float) -> tuple[list, list]:
    """Return `count` rows, this share of them to train on: the first ones, so that a larger sample contains a
    smaller one. All rows where `count` is None."""
    if count is None or count >= len(train) + len(val):
        return train, val
    # Neither part may become empty.
    cut = max(1, min(round(count * share), count - 1))
    return train[:cut], val[: count - cut]


def join(sources: list[Source], counts: dict, share: float, thinkless: bool, problems: Problems) -> tuple:
    """Return (train, val, what to say) of the clean rows of all sources, of each at most its count, `share`
    of a sample to train on. No question is in a training part and in a validation part; `problems` gathers
    what is left out."""
    sampled, all_train, all_val, lines = [], [], [], []
    # Apart, so that a row of both parts is left out of one of them by its question, not as repeated.
    seen_train, seen_val = set(), set()
    for source, count in zip(sources, counts.values()):
        train = keep_usable(source.train, problems, seen_train, thinkless)
        val = keep_usable(source.val, problems, seen_val, thinkless)
        if not source.has_own_val:
            val = drop_overlap(val, train, "验证集的问题也在训练集里", problems)
        train, val = take_sample(train, val, count, share)
        sampled.append((source, count, train, val))
        all_val += val
    # Validation parts stay as they are, a hub's own above all: what is in one is trained on in no set.
    for source, count, train, val in sampled:
        train = drop_overlap(train, all_val, "训练集的问题也在验证集里", problems)
        all_train += train
        lines += source.lines
        if count or len(sampled) > 1:
            most = f"，最多取 {count} 行" if count else ""
            lines.append(f"采用      训练 {len(train)} 行，验证 {len(val)} 行{most}")
    return all_train, all_val, lines


# ---- near-duplicates ---------------------------------------------------------------------------------------


def near_duplicates(answers: list[str]) -> list[tuple[int, int]]:
    """Return numbers (i, j), i < j, of answers that are near-duplicates of each other, in order.

    Of very many long answers a part of the passages is looked at: their shares are estimates then. An answer
    that stands there more than COMMON_SHARE times is paired with its first copy only.
    """
    every = -(-sum(map(len, answers)) // MAX_PASSAGES)
    counts, first_copy, duplicates = [], {}, set()
    holders = defaultdict(list)  # passage -> numbers of the answers that have it
    for i, text in enumerate(progress(answers, "近似重复")):
        passages = {text[start : start + PASSAGE_LENGTH] for start in range(len(text) - PASSAGE_LENGTH + 1)}
        if every > 1:
            # By a checksum, so that it is the same passages in all answers; hash() differs from run to run.
            passages = {passage for passage in passages if zlib.crc32(passage.encode()) % every == 0}
        counts.append(len(passages))
        if len(text) < MIN_PASSAGES + PASSAGE_LENGTH:
            continue
        if first_copy.setdefault(text, i) != i:  # of many copies every passage is common
            duplicates.add((first_copy[text], i))
        for passage in passages:
            holders[passage].append(i)
    most = min(max(COMMON_AT_LEAST, COMMON_SHARE * len(answers)), COMMON_AT_MOST)
    pairs = (combinations(numbers, 2) for numbers in holders.values() if len(numbers) <= most)
    shared = Counter(chain.from_iterable(pairs))  # (i, j) -> passages that both have
    for (i, j), count in shared.items():
        if count >= DUPLICATE_SHARE * min(counts[i], counts[j]):
            duplicates.add((i, j))
    return sorted(duplicates)


def mark_seen(train: Rows, val: Rows) -> str:
    """Mark the validation rows whose answer nearly stands in the training part; return what to say of it."""
    inside, seen = 0, set()
    for i, j in near_duplicates([row["answer"] for row in train + val]):
        if j < len(train):
            inside += 1
        elif i < len(train):
            seen.add(j - len(train))
    for number in seen:
        val[number]["seen"] = True
    return f'近似重复  训练集内 {inside} 对；验证集 {len(seen)}/{len(val)} 行与训练集近似，标为 "seen": true'
