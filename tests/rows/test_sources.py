"""Data sets from files and hubs: each read and split by itself, held against each other, no question on both sides;
answers that say nearly the same are found."""

import random
from pathlib import Path

import pytest
from helpers import make_row, make_rows, published, refused, run_script, save, written
from hub_server import Hub

import data
from parts.rows import sources
from parts.rows.row import topic

pytestmark = pytest.mark.usefixtures("folder")
DRAWN = random.Random(0)
PHRASES = ["".join(DRAWN.choices([chr(0x4E00 + i) for i in range(2000)], k=12)) for _ in range(400)]
ANSWERS = ["，".join(PHRASES[i : i + 4]) for i in range(0, 400, 4)]  # of which no two are alike


def download(hub: Hub, *flags: str) -> str:
    """What data.py prints, in a process of its own: the client reads its address once."""
    return run_script("data.py", *flags, cwd=Path.cwd(), env=hub.env(Path.cwd() / "home")).stdout


def fill(hub: Hub, **files: list[dict]) -> None:
    for name, rows in files.items():
        save(rows, hub.set / f"{name}.jsonl")


def test_several_sets_are_each_split_by_themselves(capsys):
    first, second = make_rows(20), make_rows(130, first=101)
    odd = [{"prompt": r["question"], "response": f"<think>{r['think']}</think>{r['answer']}"} for r in second]
    names = [save(first, "a.jsonl"), save(odd, "b.csv")]
    data.prepare(names)
    assert written() == tuple(map(list.__add__, published(first), published(second)))
    out = capsys.readouterr().out
    assert "数据来源  a.jsonl：共 20 行" in out and "采用      训练 18 行，验证 2 行\n" in out
    assert "读作      prompt -> question，response -> answer，response 开头的 <think>…</think> -> think" in out
    assert [source["source"] for source in data.read_origin("train.jsonl")["sources"]] == names


def test_sample_of_one_and_all_of_the_other(capsys):
    names = [save(make_rows(20), "a.jsonl"), save(make_rows(300, first=101), "b.jsonl")]
    data.prepare([names[0], f"{names[1]}#20"])
    smaller = written()
    data.prepare([names[0], f"{names[1]}#50"])
    assert all(part == more[: len(part)] for part, more in zip(smaller, written()))
    train, val = published(make_rows(300, first=101))
    assert written() == tuple(map(list.__add__, published(make_rows(20)), (train[:45], val[:5])))
    assert "采用      训练 45 行，验证 5 行，最多取 50 行\n" in capsys.readouterr().out


def test_no_question_of_one_sets_validation_is_in_anothers_training(capsys):
    rows = make_rows(40)
    held = published(rows)[1]
    other = [*make_rows(120, first=101), *(row | {"answer": "别的"} for row in held)]
    data.prepare([save(rows, "a.jsonl"), save(other, "b.jsonl")])
    train, val = written()
    assert val[: len(held)] == held and {row["question"] for row in train}.isdisjoint(row["question"] for row in val)
    assert "未采用    训练集的问题也在验证集里：" in capsys.readouterr().out


def test_what_cannot_be_meant_is_refused():
    save(make_rows(20), "a.jsonl")
    refused("--dataset a.jsonl#0：# 后面应是不小于 2 的整数~", data.prepare, "a.jsonl#0")
    refused("--dataset a.jsonl#5 a.jsonl：同一个数据集写了两次~", data.prepare, ["a.jsonl#5", "a.jsonl"])
    refused("--dataset hf:// 既不是已有的文件，~hub 上的请写 hf://owner/name~", data.prepare, "hf://")
    refused("~--sha256 只能用于单个数据集~", data.prepare, ["a.jsonl", "b.jsonl"], sha256="00")
    refused("a.jsonl 的 SHA-256 是 ~，不是 --sha256 00~", data.prepare, "a.jsonl", sha256="00")
    assert not Path("train.jsonl").exists()


@pytest.mark.parametrize("own", ["validation", "test"])
def test_own_part_of_a_hub_is_never_trained_on(hub, own):
    fill(hub, train=make_rows(30), **{own: [make_row(7, answer="别的"), *make_rows(109, first=101)]})
    out = download(hub, "--dataset", "owner/name")
    train, val = written()
    assert sorted(map(str, train)) == sorted(str(row) for row in make_rows(30) if row != make_row(7))
    assert sorted(map(str, val)) == sorted(map(str, [make_row(7, answer="别的"), *make_rows(109, first=101)]))
    assert "划分      使用数据集自带的验证集，10 行\n" in out


def test_rows_of_an_own_part_that_cannot_be_used_are_reported_and_its_tests_not_used(hub):
    odd = [make_row(101, answer=""), make_row(102, think=None)]
    fill(hub, train=make_rows(30), validation=[*odd, *make_rows(109, first=103)], test=make_rows(208, first=201))
    out = download(hub, "--dataset", "owner/name", "--without_thinking", "keep")
    assert "未采用    answer 为空：1 行（validation.jsonl 第 1 行）\n" in out
    assert make_row(102, think="") in written()[1] and [len(part) for part in written()] == [30, 8]
    assert "划分      不使用数据集自带的 test.jsonl\n" in out


def test_tests_without_answers_are_not_used(hub):
    fill(hub, train=make_rows(30), test=[{"question": f"考{i}？"} for i in range(9)])
    out = download(hub, "--dataset", "owner/name")
    assert written() == published(make_rows(30)) and "划分      不使用数据集自带的 test.jsonl\n" in out
    (hub.set / "train.jsonl").unlink()
    assert "错误：owner/name 里只有验证集或测试集，" in download(hub, "--dataset", "owner/name")


def test_split_of_the_published_set_is_fixed_row_for_row(hub):
    rows = make_rows(40)
    train, val = published(range(40))
    rows[val[0]] = make_row(train[0] + 1, answer="别的")  # a question of the training part
    fill(hub, r1_test=rows)
    out = download(hub)
    assert written() == ([rows[i] for i in train], [rows[i] for i in val[1:]])
    assert f"未采用    验证集的问题也在训练集里：1 行（第 {val[0] + 1} 行）\n" in out


def test_rows_without_thinking_are_kept_where_that_is_asked_for(capsys):
    rows, thinkings = make_rows(40), [None, "", " \u200b", "<think>\n\n</think>"]
    raw = [row | {"think": thinkings[i]} if i < 4 else row for i, row in enumerate(rows)]
    kept = [row | {"think": ""} if i < 4 else row for i, row in enumerate(rows)]
    data.prepare(save(raw, "rows.jsonl"), without_thinking="keep")
    assert written() == published(kept) == (data.read_examples("train.jsonl"), data.read_examples("val.jsonl"))
    data.prepare("rows.jsonl")
    assert written() == tuple([row for row in part if row["think"]] for part in published(kept))
    out = capsys.readouterr().out
    assert "没有思考  4 行，未采用；其余可用的 36 行。加 --without_thinking keep，" in out
    save([{**row, "think": ""} for row in rows], "none.jsonl")
    reason = "~--without_thinking keep~--no_thinking~\n  think 为空：40 行（~）"
    refused(f"数据没有思考（40 行）。{reason}", data.prepare, "none.jsonl", "new.jsonl")
    assert not Path("new.jsonl").exists()


FILES = {
    "train": "medical_r1.jsonl data/train-00000-of-00001.parquet latest/contest.jsonl train_test_mix.jsonl",
    "val": "data/validation-00000-of-00001.parquet zh/valid.jsonl dev.csv eval_data.json validation/0001.parquet",
    "test": "test.jsonl train/test.jsonl testset.jsonl holdout/0.parquet",
}


def test_split_is_read_from_the_files_path():
    for split, names in FILES.items():
        assert set(map(sources.split_of, names.split())) == {split}


@pytest.mark.parametrize("answers", [2, 30])
def test_rows_of_one_question_are_in_one_part_and_neither_is_empty(answers):
    odd = [None, "x", {}, {"question": 3}, {"question": "问", "history": 3}, {"history": [3]}]  # each by itself
    rows = [make_row(i, answer=f"回答{j}") for j in range(answers) for i in range(5)] + odd
    rows += [make_row(9, history=[["问题1？", "先答"]])] * 90  # it begins with question 1
    train, val = sources.divide_questions(list(enumerate(rows, 1)), 42, 0.9)
    questions = [{topic(row) for _, row in part if row not in odd} for part in (train, val)]
    assert train and val and questions[0].isdisjoint(questions[1])
    assert sorted(number for number, _ in train + val) == list(range(1, len(rows) + 1))


def test_answers_that_share_a_third_of_their_passages_are_near_duplicates_whatever_their_order():
    first, second, third = PHRASES[:12], PHRASES[20:32], PHRASES[40:52]
    mixed = [first, second, third[:7] + first[:5], second[::-1], third[:10] + first[:2]]
    assert sources.near_duplicates(["，".join(phrases) for phrases in mixed]) == [(0, 2), (1, 3), (2, 4)]
    copies = ANSWERS[-1:] * 30  # each with the first one
    assert sources.near_duplicates(ANSWERS[:50] + copies) == [(50, number) for number in range(51, 80)]


def test_short_answers_and_what_all_say_are_no_duplicates():
    closing = "以上内容不能代替医生的诊断，如有不适请及时到正规医院就诊，并按照医生的建议用药和复查"
    assert sources.near_duplicates(["多喝水，多休息。"] * 3 + [text + closing for text in ANSWERS]) == []


def test_a_validation_row_whose_answer_stands_in_the_training_part_is_marked(capsys):
    rows = [make_row(i, answer=ANSWERS[i]) for i in range(20)]
    data.prepare(save(rows, "rows.jsonl"))
    (other, _), (marked, unmarked) = written()[0][:2], written()[1]
    rows[int(marked["question"][2:-1])]["answer"] = other["answer"][:40] + "另外多休息。"
    data.prepare(save(rows, "rows.jsonl"))
    seen = {row["question"]: row.get("seen", False) for row in written()[1]}
    assert seen == {marked["question"]: True, unmarked["question"]: False}
    assert "训练集内 0 对；验证集 1/2 行与训练集近似" in capsys.readouterr().out
    assert data.read_examples("val.jsonl")[0].keys() == {"question", "think", "answer"}
