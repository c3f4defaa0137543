"""What belongs together stays together; what a hub keeps for validation is known by its file's name."""

import pytest
from helpers import make_row, make_rows, published

from parts import split

FILES = {
    "medical_r1.jsonl": "train",
    "data/train-00000-of-00001.parquet": "train",
    "data/validation-00000-of-00001.parquet": "val",
    "zh/valid.jsonl": "val",
    "dev.csv": "val",
    "eval_data.json": "val",
    "test.jsonl": "test",
    "train/test.jsonl": "test",
    "validation/0001.parquet": "val",
    "latest/contest.jsonl": "train",
    "testset.jsonl": "test",
    "medical-evaluation.csv": "val",
    "holdout/0.parquet": "test",
    "train_test_mix.jsonl": "train",
}


@pytest.mark.parametrize("file, part", FILES.items())
def test_part_is_read_from_the_files_path(file, part):
    assert split.part_of(file) == part


def place(rows: list[dict]) -> list:
    return list(enumerate(rows, 1))


@pytest.mark.parametrize("total", [2, 3, 11, 40])
def test_where_all_questions_differ_the_split_is_the_published_one(total):
    found = split.by_question(place(make_rows(total)), 42, 0.9)
    assert tuple([row for _, row in part] for part in found) == published(make_rows(total))


@pytest.mark.parametrize("answers", [2, 3, 7, 30])
def test_rows_of_one_question_are_in_one_part_and_neither_is_empty(answers):
    rows = [make_row(i, answer=f"回答{j}") for j in range(answers) for i in range(5)]
    rows += [make_row(9, history=[["问题1？", "先答"]])]  # it begins with question 1
    train, val = split.by_question(place(rows), 42, 0.9)
    questions = [{split.question_of(placed) for placed in part} for part in (train, val)]
    assert train and val and questions[0].isdisjoint(questions[1])
    assert sorted(number for number, _ in train + val) == list(range(1, len(rows) + 1))


def test_two_questions_of_which_one_has_nearly_all_rows_are_two_parts():
    rows = [make_row(1)] + [make_row(2, answer=str(i)) for i in range(99)]
    assert {len(part) for part in split.by_question(place(rows), 42, 0.9)} == {1, 99}


@pytest.mark.parametrize(
    "odd", [None, [], "x", {}, {"question": 3}, {"question": "问", "history": 3}, {"history": [3]}]
)
def test_row_that_cannot_be_used_is_a_group_of_its_own(odd):
    train, val = split.by_question(place([odd, *make_rows(9), odd]), 42, 0.9)
    assert len(train) == 9 and len(val) == 2


def test_larger_sample_contains_the_smaller_one():
    train, val = split.by_question(place(make_rows(100)), 42, 0.9)
    small, large = split.sample(train, val, 10, 0.9), split.sample(train, val, 50, 0.9)
    assert [len(part) for part in small] == [9, 1] and [len(part) for part in large] == [45, 5]
    assert all(part == more[: len(part)] for part, more in zip(small, large))
    assert split.sample(train, val, 100, 0.9) == split.sample(train, val, 1000, 0.9) == (train, val)
