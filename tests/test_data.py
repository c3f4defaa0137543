"""From a file or the hub to train.jsonl and val.jsonl: the published split, no row lost, both files or none."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, contents, make_rows, published, refused, run_script, save, says, written
from hub_server import Hub

import data

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize("total, train, val", [(2, 1, 1), (11, 9, 2), (2407, 2166, 241)])
def test_split_is_the_published_one(total, train, val):
    data.prepare(save(make_rows(total), "rows.jsonl"))
    assert written() == published(make_rows(total))
    assert [len(part) for part in written()] == [train, val]


WRITE = "无法写入 {train}、{val}（~）；请检查权限和磁盘空间，~"
SAME = "输入和输出里有两个是同一个文件（{train}、{val}、~"
OUTPUTS = [
    ("train.jsonl", "sub", WRITE),
    ("sub", "val.jsonl", WRITE),
    ("train.jsonl", "link/train.jsonl", SAME),
    ("train.jsonl", "train.jsonl.source.json", SAME),
    ("rows.jsonl", "val.jsonl", SAME),
    ("train.jsonl", "link/rows.jsonl", SAME),
]


@pytest.mark.parametrize("train, val, message", OUTPUTS, ids=[f"{train}-{val[:20]}" for train, val, _ in OUTPUTS])
def test_both_files_are_written_or_none_and_no_file_over_another(folder, train, val, message):
    Path("sub").mkdir()
    Path("link").symlink_to(folder)
    Path("train.jsonl").write_bytes(b"old\r\n")
    source = save(make_rows(20), "rows.jsonl")
    before = contents(folder)
    refused(message.format(train=train, val=val), data.prepare, source, train, val)
    assert contents(folder) == before


def test_script_fails_with_one_sentence(folder):
    no_file, no_flag = "无法读取数据文件 no.csv（~）；~", "--datasets~你是不是想写 --dataset~"
    for flag, message, status in (("--dataset", no_file, 1), ("--datasets", no_flag, 2)):
        result = run_script("data.py", flag, "no.csv", cwd=folder)
        assert result.returncode == status and says(result.stdout.splitlines()[-1], message), result.stdout
    assert not contents(folder)


def test_nothing_heavy_is_imported_before_it_is_needed():
    heavy = "torch", "transformers", "datasets", "pandas", "pyarrow", "modelscope_hub", "huggingface_hub"
    code = f"import sys, data; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def download(hub: Hub, folder: Path, *flags: str):
    """Run data.py in work/; the client stores what it downloads beside it."""
    Path("work").mkdir(exist_ok=True)
    return run_script("data.py", *flags, cwd=folder / "work", env=hub.env(folder / "home"))


META = {"dataset_infos.json": [{}], "configuration.json": [{}]}
SETS = {  # the files of a set, and those that are taken
    "one format": (META | {"all.csv": make_rows(20), "all.jsonl": make_rows(20)}, "all.jsonl"),
    "two parts": ({"b.jsonl": make_rows(20, first=11), "a.jsonl": make_rows(10)}, "a.jsonl、b.jsonl"),
}


@pytest.mark.parametrize("files, taken", SETS.values(), ids=SETS)
def test_set_is_downloaded_with_its_data_files_in_the_order_of_their_names(hub, folder, files, taken):
    for file, rows in files.items():
        save(rows, hub.set / file)
    result = download(hub, folder, "--dataset", "owner/name")
    assert result.returncode == 0, result.stdout
    assert f"数据来源  owner/name（{taken}）：共 20 行\n" in result.stdout
    assert written(folder / "work") == published(make_rows(20))


def test_failed_download_ends_with_one_sentence_and_leaves_old_files(hub, folder):
    data.prepare(save(make_rows(20), "rows.jsonl"), "work/train.jsonl", "work/val.jsonl")
    old = contents(folder / "work")
    result = download(hub, folder, "--dataset", "owner/name")  # without a data file
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert says(result.stdout.splitlines()[-1], "数据集 owner/name 里没有 .jsonl~"), result.stdout
    assert contents(folder / "work") == old


def test_summary_ends_with_the_command_that_trains(folder):
    save(make_rows(20), "rows.jsonl")
    out = run_script("data.py", "--dataset", "rows.jsonl", "--val_file", "my val.jsonl", cwd=folder).stdout
    command = "python train.py --num_train_epochs 3 --train_file train.jsonl --val_file 'my val.jsonl'"
    assert f"\n下一步    {command}\n          3 轮，约 15 步；RTX 4090 上估算约 1 分钟（" in out
    # Rows of the published set's mean length in bytes: few, as many as it has, and many.
    for rows, flag, said in (
        (999, " --num_train_epochs 3", "3 轮，约 750 步；RTX 4090 上估算约 6 分钟"),
        (2166, "", "2 轮，约 1,084 步；RTX 4090 上估算约 9 分钟"),
        (20_000, " --num_train_epochs 1", "1 轮，约 5,000 步；RTX 4090 上估算约 41 分钟"),
    ):
        Path("train.jsonl").write_bytes(b"x" * 3609 * rows + b"\n" * rows)
        assert f"python train.py{flag}\n          {said}" in data.propose("train.jsonl", "val.jsonl")


def test_too_long_examples_are_left_out_whole_and_counted(workspace, tokenizer, capsys, monkeypatch):
    examples = data.load_dataset("train.jsonl", tokenizer, max_length=10**6)["input_ids"]
    capsys.readouterr()
    limit = sorted(map(len, examples))[54]
    short = data.load_dataset("train.jsonl", tokenizer, max_length=limit)["input_ids"]
    assert len(examples) == 108 > len(short) > 0
    assert list(short) == [ids for ids in examples if len(ids) <= limit]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in short)
    told = f"超过 --max_length {limit} 而未采用的 {108 - len(short)} 条（{1 - len(short) / 108:.1%}），"
    assert f"；{told}" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    data.load_dataset("train.jsonl", tokenizer, max_length=limit)
    assert f"；\033[33m{told}" in capsys.readouterr().out
    data.load_dataset("train.jsonl", tokenizer, max_length=10**6)
    assert capsys.readouterr().out.endswith("而未采用的 0 条（0.0%）\n")
    message = "train.jsonl 的样本都超过 10 个 token（最短 ~）；请加大 --max_length。"
    refused(message, data.load_dataset, "train.jsonl", tokenizer, 10)
