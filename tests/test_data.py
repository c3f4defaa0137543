"""From a file or the hub to train.jsonl and val.jsonl: the published split, no row lost, both files or none."""

from pathlib import Path

import pytest
from helpers import contents, make_row, make_rows, published, run_script, save, says, written
from hub_server import Hub

import data

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize("total, train, val", [(2, 1, 1), (11, 9, 2), (2407, 2166, 241)])
def test_split_is_the_published_one(total, train, val):
    data.prepare(save(make_rows(total), "rows.jsonl"))
    assert written() == published(make_rows(total))
    assert [len(part) for part in written()] == [train, val]


@pytest.mark.parametrize("place", [0, 17, 39])
def test_bad_row_moves_no_other(place):
    rows = make_rows(40)
    data.prepare(save(rows, "good.jsonl"))
    good = written()
    data.prepare(save(rows[:place] + [make_row(0, answer="")] + rows[place + 1 :], "bad.jsonl"))
    assert written() == tuple([row for row in part if row != rows[place]] for part in good)


WRITE = "无法写入 {train}、{val}（%s）；请检查权限和磁盘空间，或用 --train_file、--val_file 换位置。"
SAME = "--train_file 和 --val_file 都是 {train}；请给两个不同的文件名。"
SOURCE = "写入会覆盖原始数据 rows.jsonl；请用 --train_file、--val_file 换个文件名。"
ORIGIN = "{val} 里要写训练集的来源；请给 --val_file 换一个文件名。"
OUTPUTS = [
    ("train.jsonl", "sub", WRITE % "是一个文件夹"),
    ("sub", "val.jsonl", WRITE % "是一个文件夹"),
    ("train.jsonl", "rows.jsonl/val.jsonl", WRITE % "File exists"),
    ("train.jsonl", "v" * 300, WRITE % "File name too long"),
    *[
        ("train.jsonl", same, SAME)
        for same in ("train.jsonl", "./train.jsonl", "sub/../train.jsonl", "link/train.jsonl")
    ],
    *[("train.jsonl", none, WRITE % "是一个文件夹") for none in ("", ".", "/")],
    ("train.jsonl", "train.jsonl.source.json", ORIGIN),
    ("rows.jsonl", "val.jsonl", SOURCE),
    ("train.jsonl", "link/rows.jsonl", SOURCE),
]


@pytest.mark.parametrize("old", [{}, {"train.jsonl": b"old\r\n", "val.jsonl": b""}], ids=["new", "over old ones"])
@pytest.mark.parametrize("train, val, message", OUTPUTS, ids=[f"{train}-{val[:20]}" for train, val, _ in OUTPUTS])
def test_both_files_are_written_or_none_and_no_file_over_another(folder, fails, train, val, message, old):
    Path("sub").mkdir()
    Path("link").symlink_to(folder)
    for name, content in old.items():
        Path(name).write_bytes(content)
    source = save(make_rows(20), "rows.jsonl")
    fails(message.format(train=train, val=val), "--dataset", source, "--train_file", train, "--val_file", val)


def test_link_to_a_file_is_read_and_stays_a_link():
    save(make_rows(20), "rows.jsonl")
    Path("link.jsonl").symlink_to("rows.jsonl")
    data.prepare("link.jsonl")
    assert written() == published(make_rows(20)) and Path("link.jsonl").is_symlink()


@pytest.mark.parametrize(
    "flag, name, status, message",
    [
        (
            "--dataset",
            "missing.csv",
            1,
            "错误：找不到数据文件 {}；请检查路径，或不带 --dataset 运行 python data.py 下载公开数据集。",
        ),
        ("--dataset", "cut.jsonl", 1, "错误：{} 第 1 行不是合法的 JSON（Expecting value，第 14 列）；请修正这一行。"),
        (
            "--dataset",
            "nonsense",
            1,
            "错误：--dataset {} 既不是已有的文件，也不是 ModelScope 数据集名（形如 owner/name）。",
        ),
        ("--datasets", "rows.csv", 2, "data.py: error: unrecognized arguments: --datasets {}"),
        ("--data", "rows.csv", 2, "data.py: error: unrecognized arguments: --data {}"),  # no flag can be shortened
    ],
)
def test_script_fails_with_one_sentence(folder, flag, name, status, message):
    Path("cut.jsonl").write_text('{"question": ')
    result = run_script("data.py", flag, name, cwd=folder)
    assert result.returncode == status
    before, found, after = result.stdout.partition(message.replace("{}", name))
    assert found and after == "\n" and (before.startswith("usage: data.py") if status == 2 else before == "")
    assert list(contents(folder)) == ["cut.jsonl"]


def download(hub: Hub, folder: Path, *flags: str):
    """Run data.py in work/; the client stores what it downloads beside it."""
    Path("work").mkdir(exist_ok=True)
    return run_script("data.py", *flags, cwd=folder / "work", env=hub.env(folder / "home"))


META = {"dataset_infos.json": [{}], "configuration.json": [{}]}
SETS = [  # the name that is asked for, the files of the set, those that are taken
    ("", META | {"medical_r1.jsonl": make_rows(2407)}, "medical_r1.jsonl"),
    ("owner/name", META | {"rows.json": make_rows(20)}, "rows.json"),
    ("owner/name", {"all.csv": make_rows(20), "all.jsonl": make_rows(20)}, "all.jsonl"),
    ("owner/name", {"b.jsonl": make_rows(20, first=11), "a.jsonl": make_rows(10)}, "a.jsonl、b.jsonl"),
]


@pytest.mark.parametrize("name, files, taken", SETS, ids=["default", "no metadata", "one format", "two parts"])
def test_set_is_downloaded_with_its_data_files_in_the_order_of_their_names(hub, folder, name, files, taken):
    for file, rows in files.items():
        save(rows, hub.set / file)
    result = download(hub, folder, *(["--dataset", name] if name else []))
    assert result.returncode == 0, result.stdout
    rows = make_rows(20 if name else 2407)
    assert f"\n数据来源  {name or 'krisfu/delicate_medical_r1_data'}（{taken}）：共 {len(rows)} 行\n" in result.stdout
    assert written(folder / "work") == published(rows)


def test_file_that_the_hub_has_renamed_is_not_read_twice(hub, folder):
    save(make_rows(20), hub.set / "old.jsonl")
    assert download(hub, folder, "--dataset", "owner/name").returncode == 0
    (hub.set / "old.jsonl").rename(hub.set / "new.jsonl")
    assert "owner/name（new.jsonl）：共 20 行" in download(hub, folder, "--dataset", "owner/name").stdout


AGAIN = "请检查名称和网络后重试同一命令，或用环境变量 MODELSCOPE_ENDPOINT 换一个镜像，或用 --dataset 指定本地文件。~"
LOADING = "无法从 {url} 下载数据集 {name}（~）；" + AGAIN
NO_FILES = "数据集 {name} 里没有 .jsonl、.parquet、.csv、.tsv、.json 文件；请用 --dataset 换一个。"


@pytest.mark.parametrize(
    "name, stopped, message",
    [("owner/name", False, NO_FILES), ("owner/unknown", False, LOADING), ("owner/name", True, LOADING)],
    ids=["no data file", "unknown set", "connection refused"],
)
def test_failed_download_ends_with_one_sentence_and_leaves_old_files(hub, folder, name, stopped, message):
    if stopped:
        hub.__exit__()
    data.prepare(save(make_rows(20), "rows.jsonl"), "work/train.jsonl", "work/val.jsonl")
    old = contents(folder / "work")
    result = download(hub, folder, "--dataset", name)
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert says(result.stdout.splitlines()[-1], message.format(url=hub.url, name=name)), result.stdout
    assert contents(folder / "work") == old


def test_examples_are_the_rows_that_were_written():
    data.prepare(save(make_rows(25), "rows.csv"))
    assert (data.read_examples("train.jsonl"), data.read_examples("val.jsonl")) == written()
    by_hand = save([make_row(1, think=" 思考1。\\n")], "val.jsonl")
    assert data.read_examples(by_hand) == [make_row(1)]  # cleaned like the others


def test_too_long_examples_are_left_out_whole_and_counted(workspace, tokenizer, capsys):
    lengths = [len(ids) for ids in data.load_dataset("train.jsonl", tokenizer, max_length=10**6)["input_ids"]]
    capsys.readouterr()
    dataset = data.load_dataset("train.jsonl", tokenizer, max_length=115)
    kept = [length for length in lengths if length <= 115]
    assert len(lengths) == 108 and 0 < len(kept) < 108
    assert [len(ids) for ids in dataset["input_ids"]] == kept
    assert all(ids[-1] == tokenizer.eos_token_id for ids in dataset["input_ids"])
    assert f"超过 --max_length 115 而未采用的 {108 - len(kept)} 条" in capsys.readouterr().out


def test_no_example_short_enough_is_an_error(workspace, tokenizer):
    with pytest.raises(
        SystemExit, match=r"错误：train.jsonl 的样本都超过 10 个 token（最短 \d+）；请加大 --max_length。"
    ):
        data.load_dataset("train.jsonl", tokenizer, max_length=10)
