"""Data sets from files and hubs: each read and split by itself, held against each other, no question on both sides."""

from pathlib import Path

import pytest
from helpers import make_row, make_rows, published, refused, run_script, save, written
from hub_server import Hub

import data

pytestmark = pytest.mark.usefixtures("folder")


def download(hub: Hub, *flags: str) -> str:
    """What data.py prints, in a process of its own: the client reads its address once."""
    return run_script("data.py", *flags, cwd=Path.cwd(), env=hub.env(Path.cwd() / "home")).stdout


def fill(hub: Hub, **files: list[dict]) -> None:
    for name, rows in files.items():
        save(rows, hub.set / f"{name}.jsonl")


def test_several_sets_are_each_split_by_themselves(capsys):
    first, second = make_rows(20), [{"prompt": f"另{i}", "response": f"<think>想{i}</think>答{i}"} for i in range(30)]
    names = [save(first, "a.jsonl"), save(second, "b.csv")]
    data.prepare(names)
    alike = [{"question": f"另{i}", "think": f"想{i}", "answer": f"答{i}"} for i in range(30)]
    assert written() == tuple(one + other for one, other in zip(published(first), published(alike)))
    out = capsys.readouterr().out
    assert "数据来源  a.jsonl：共 20 行" in out and "采用      训练 18 行，验证 2 行\n" in out
    assert "读作      prompt -> question，response -> answer，response 开头的 <think>…</think> -> think" in out
    assert [source["source"] for source in data.read_origin("train.jsonl")["sources"]] == names


def test_sample_of_one_and_all_of_the_other(capsys):
    names = [save(make_rows(20), "a.jsonl"), save(make_rows(300, first=101), "b.jsonl")]
    data.prepare([names[0], f"{names[1]}#50"])
    train, val = published(make_rows(300, first=101))
    assert written() == tuple(one + part for one, part in zip(published(make_rows(20)), (train[:45], val[:5])))
    assert "采用      训练 45 行，验证 5 行，最多取 50 行\n" in capsys.readouterr().out


def test_no_question_of_one_sets_validation_is_in_anothers_training(capsys):
    rows = make_rows(40)
    held = published(rows)[1]
    other = [*make_rows(120, first=101), *(row | {"answer": "别的"} for row in held)]
    data.prepare([save(rows, "a.jsonl"), save(other, "b.jsonl")])
    train, val = written()
    assert val[: len(held)] == held and {row["question"] for row in train}.isdisjoint(row["question"] for row in val)
    assert "未采用    训练集的问题也在验证集里：" in capsys.readouterr().out


def test_same_row_in_two_sets_is_one_row(capsys):
    data.prepare([save(make_rows(40), "a.jsonl"), save(make_rows(40), "b.jsonl")])
    assert written() == published(make_rows(40))
    assert "未采用    与前面的行重复：40 行（b.jsonl 第 1 行、" in capsys.readouterr().out


WRONG = {
    "a.jsonl#0": "--dataset a.jsonl#0：# 后面要一个不小于 2 的整数，例如 a.jsonl#500",
    "a.jsonl#x": "--dataset a.jsonl#x：# 后面要一个不小于 2 的整数，例如 a.jsonl#500",
    "a.jsonl b.jsonl a.jsonl": "--dataset a.jsonl b.jsonl a.jsonl：同一个数据集写了两次；请改正。",
    "a.jsonl#5 a.jsonl": "--dataset a.jsonl a.jsonl：同一个数据集写了两次；请改正。",
    "hf://": "--dataset hf:// 既不是已有的文件，~hub 上的请写 hf://owner/name~",
}


@pytest.mark.parametrize("names, message", WRONG.items())
def test_what_cannot_be_meant_is_refused(names, message):
    save(make_rows(20), "a.jsonl")
    save(make_rows(20), "b.jsonl")
    refused(message, data.prepare, names.split())
    assert not Path("train.jsonl").exists()


def test_checksum_belongs_to_one_set():
    names = [save(make_rows(20), "a.jsonl"), save(make_rows(20), "b.jsonl")]
    message = "--dataset a.jsonl b.jsonl：--revision 和 --sha256 只用于一个数据集；请改正。"
    refused(message, data.prepare, names, sha256="00")


@pytest.mark.parametrize("own", ["validation", "test"])
def test_own_part_of_a_hub_is_never_trained_on(hub, own):
    fill(hub, train=make_rows(30), **{own: [make_row(7, answer="别的"), *make_rows(109, first=101)]})
    out = download(hub, "--dataset", "owner/name")
    train, val = written()
    assert sorted(map(str, train)) == sorted(str(row) for row in make_rows(30) if row != make_row(7))
    assert sorted(map(str, val)) == sorted(map(str, [make_row(7, answer="别的"), *make_rows(109, first=101)]))
    assert "划分      验证集是它自己的，10 行\n" in out


def test_rows_of_an_own_part_that_cannot_be_used_are_reported_and_those_without_thinking_kept(hub):
    odd = [make_row(101, answer=""), make_row(102, think=None)]
    fill(hub, train=make_rows(30), validation=[*odd, *make_rows(109, first=103)])
    out = download(hub, "--dataset", "owner/name", "--without_thinking", "keep")
    assert "未采用    answer 为空：1 行（validation.jsonl 第 1 行）\n" in out
    assert make_row(102, think="") in written()[1] and [len(part) for part in written()] == [30, 8]


def test_beside_a_validation_part_a_test_part_is_not_used(hub):
    fill(hub, train=make_rows(30), dev=make_rows(109, first=101), test=make_rows(208, first=201))
    out = download(hub, "--dataset", "owner/name")
    assert [len(part) for part in written()] == [30, 9]
    assert "划分      不用它的 test.jsonl\n" in out


def test_tests_without_answers_are_not_used(hub):
    fill(hub, train=make_rows(30), test=[{"question": f"考{i}？"} for i in range(9)])
    out = download(hub, "--dataset", "owner/name")
    assert written() == published(make_rows(30)) and "划分      不用它的 test.jsonl\n" in out


def test_flag_given_twice_is_two_sets():
    names = [save(make_rows(20), "a.jsonl"), save(make_rows(140, first=121), "b.jsonl")]
    run_script("data.py", "--dataset", names[0], "--dataset", names[1], cwd=Path.cwd())
    assert [len(part) for part in written()] == [36, 4]


def test_set_of_nothing_but_tests_is_refused(hub):
    fill(hub, test=make_rows(30))
    out = download(hub, "--dataset", "owner/name")
    assert out.endswith("\n错误：owner/name 里只有验证或测试的部分，不用来训练；请换一个数据集。\n")


def test_split_of_the_published_set_is_fixed_row_for_row(hub):
    rows = make_rows(40)
    train, val = published(range(40))
    rows[val[0]] = make_row(train[0] + 1, answer="别的")  # a question of the training part
    fill(hub, r1_test=rows)
    out = download(hub)
    assert written() == ([rows[i] for i in train], [rows[i] for i in val[1:]])
    assert f"未采用    验证集的问题也在训练集里：1 行（第 {val[0] + 1} 行）\n" in out


@pytest.mark.parametrize("thinking", [None, "", " \u200b", "<think>\n\n</think>"])
def test_rows_without_thinking_are_kept_where_that_is_asked_for(capsys, thinking):
    rows = make_rows(20)
    raw = [row if i % 2 else row | {"think": thinking} for i, row in enumerate(rows)]
    kept = [row if i % 2 else row | {"think": ""} for i, row in enumerate(rows)]
    data.prepare(save(raw, "rows.jsonl"), without_thinking="keep")
    assert written() == published(kept)
    assert data.read_examples("train.jsonl") == published(kept)[0]
    data.prepare("rows.jsonl")
    assert written() == tuple([row for row in part if row["think"]] for part in published(kept))
    assert "没有思考的行加 --without_thinking keep 就会采用" in capsys.readouterr().out


def test_answers_alone_are_named_as_rows_without_thinking():
    save([{"question": f"问{i}", "response": f"答{i}"} for i in range(20)], "rows.jsonl")
    with pytest.raises(SystemExit, match="没有思考的行加 --without_thinking keep 就会采用"):
        data.prepare("rows.jsonl")
    data.prepare("rows.jsonl", without_thinking="keep")
    assert [len(part) for part in written()] == [18, 2]
