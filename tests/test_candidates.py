"""What cannot be compared is refused before a model is loaded."""

import json
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
from helpers import refused

import inference
from parts import candidates, checkpoints, reply_file
from parts.encoding import Reply

ROWS = [{"question": "头痛？", "history": []}, {"question": "感冒？", "history": []}]
BY = {"model": "a", "weights": None, "no_thinking": False, "max_new_tokens": 30, "seed": 42}


def write(path: str, rows=ROWS) -> None:
    lines = [reply_file.to_line(row, Reply("想", "答", True, "one"), BY) for row in rows]
    Path(path).write_text("".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["none.jsonl"], "找不到 --compare_with none.jsonl；请检查路径。"),
        (["part.jsonl"], "--compare_with part.jsonl 只有 1 条回复，而问题有 2 个；请先用写它的命令答完。"),
        (
            ["other.jsonl"],
            "--compare_with other.jsonl 第 1 行不是对 --questions 里问题的回复，或多了一次；~",
        ),
        (["rows.jsonl"], "--compare_with rows.jsonl 第 1 行不是 inference.py 写的回复；请换一个文件。"),
        (["whole.jsonl", "./whole.jsonl"], "--compare_with whole.jsonl ./whole.jsonl：有两个是同一个，或名字太像；~"),
        (["a/b", "a-b"], "--compare_with a/b a-b：有两个是同一个，或名字太像；请去掉一个。"),
        (["taken/model"], "--replies r.taken-model.jsonl 已经存在，而第 1 行不是 inference.py 写的回复；~"),
    ],
)
def test_files_that_cannot_be_compared_are_named(folder, others, message):
    write("whole.jsonl")
    write("part.jsonl", ROWS[:1])
    write("other.jsonl", [{"question": "别的？"}])
    Path("rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    Path("r.taken-model.jsonl").write_text("mine\n", encoding="utf-8")
    refused(message, candidates.check, ROWS, "r.jsonl", others)
    assert not Path("r.jsonl").exists()


def test_a_file_may_be_compared_with_itself_before_it_is_whole(folder):
    write("r.jsonl", ROWS[:1])
    candidates.check(ROWS, "r.jsonl", ["r.jsonl", "some/model"])
    assert candidates.beside("out/r.jsonl", "Qwen/Qwen3-1.7B") == "out/r.Qwen-Qwen3-1.7B.jsonl"


@pytest.mark.parametrize(
    ("other", "message"),
    [("output/none", "找不到模型 output/none：~"), ("empty", "empty 里没有训练好的模型；请先运行 python train.py，~")],
)
def test_a_model_that_is_not_there_is_refused_before_another_answers(finished, monkeypatch, other, message):
    Path("empty").mkdir()
    Path("q.txt").write_text("头痛？", encoding="utf-8")
    flags = ["--model_path", "full", "--questions", "q.txt", "--max_new_tokens", "3", "--compare_with", other]
    monkeypatch.setattr(sys, "argv", ["inference.py", *flags])
    refused(message, inference.main)
    assert not Path("replies.jsonl").exists()


def test_an_adapter_is_known_by_its_folder_before_its_training_has_ended(interrupted):
    """Its folder has nothing but checkpoints then."""
    folders = ("lora", "lora/checkpoint-10", "full", "full/checkpoint-10", "none", "Qwen/Qwen3-1.7B")
    assert [checkpoints.holds_adapter(folder) for folder in folders] == [True, True, False, False, False, False]


def test_an_adapter_of_another_base_is_refused_before_another_answers(finished, monkeypatch):
    config = Path("lora/adapter_config.json")
    settings = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": "full"}
    config.write_text(json.dumps(settings), encoding="utf-8")
    Path("q.txt").write_text("头痛？", encoding="utf-8")
    flags = ["--model_path", "full", "--questions", "q.txt", "--max_new_tokens", "3", "--compare_with", "lora"]
    monkeypatch.setattr(sys, "argv", ["inference.py", *flags])
    refused("lora 的适配器不是在现在的 full 上训练的（~）；请放回原来的基础模型。", inference.main)
    assert not Path("replies.jsonl").exists()


def test_models_are_loaded_one_after_another(folder, tiny_model):
    """The second one when nothing holds the first one any more; the third one's replies are there."""
    args = inference.build_parser("", "").parse_args(["--max_new_tokens", "3"])
    loaded, alive = [], []

    def load(path):
        alive.append([each() for each in loaded if each() is not None])
        model, tokenizer = inference.load_found(path)
        model.itself = [model]  # as models are, here and there: only the collector frees them
        loaded.append(weakref.ref(model))
        return model, tokenizer

    kind = candidates.Kind(lambda name, revision: None, lambda name, revision, thinking: (str(tiny_model),), load)
    settings = {"no_thinking": False, "max_new_tokens": 3, "seed": 42}
    asked = [candidates.candidate(kind, name, None, f"{name}.jsonl", settings) for name in ("first", "second")]
    write("third.jsonl")
    asked.append(candidates.candidate(kind, "third.jsonl", None, "third.jsonl", settings))
    for _ in range(2):  # and then there is nothing more to load
        answered = candidates.answer(ROWS, asked, partial(inference.begin, args=args))
        assert alive == [[], []]
    assert [each.by["model"] for each in answered] == ["first", "second", "a"]
    assert answered[0].replies[0][:5] == answered[1].replies[0][:5]  # the same seed
