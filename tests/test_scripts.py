"""The scripts as a person calls them, in a folder of their own. The demo starts each anew, here they are forked."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, SAMPLES, SCRIPTS, arguments, contents, refused, run_script
from hub_server import Hub

import inference
import train
from parts import models

FEW_STEPS = (
    *(
        "--max_steps",
        "6",
        "--eval_steps",
        "3",
        "--logging_steps",
        "1",
        "--learning_rate",
        "1e-3",
        "--sample_tokens",
        "8",
    ),
    *("--disable_tqdm", "true", "--report_to", "none"),
)


def fails(result, *parts: str) -> str:
    """A user's mistake: exit status not 0, no traceback, and a last line with all of `parts`."""
    assert result.returncode not in (0, None)
    assert "Traceback" not in result.stdout, result.stdout
    last = result.stdout.strip().splitlines()[-1]
    for part in parts:
        assert part in last, (part, last)
    return last


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model):
    """A working folder after data.py, train.py and train_lora.py; the base beside it."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_model, folder / "base")
    for command in (
        ("data.py", "--dataset", SAMPLES),
        ("train.py", "--model_name", "base", *FEW_STEPS),
        ("train_lora.py", "--model_name", "base", *FEW_STEPS),
    ):
        result = run_script(*command, cwd=folder)
        assert result.returncode == 0, result.stdout
        (folder / f"{command[0]}.txt").write_text(result.stdout, encoding="utf-8")
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_commands_and_the_defaults(script, tmp_path):
    result = run_script(script, "--help", cwd=tmp_path, fresh=script == "data.py")
    assert result.returncode == 0 and f"python {script}" in result.stdout
    assert re.search("default|默认", result.stdout) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_flag_is_an_error(script, tmp_path):
    fails(run_script(script, "--lerning_rate", "1", cwd=tmp_path), "--lerning_rate")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--help"], ["--lora"], ["--replies", "mine.jsonl"], ["--judge_model", "x"]])
def test_asking_answers_flags_without_torch(flags, tmp_path):
    """It takes seconds to be imported. What would do nothing is named."""
    code = "import sys, inference_lora; sys.argv[0] = 'inference_lora.py'\ntry: inference_lora.main()\n"
    code += "finally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    command = [sys.executable, "-c", code, *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert result.returncode == (0 if flags == ["--help"] else 2), result.stderr
    assert result.stderr.count("\n") <= 1 and ("起作用" in result.stderr) == (len(flags) == 2)


def test_flags_that_do_not_fit_are_an_error(tmp_path):
    result = run_script("train.py", "--eval_steps", "30", "--save_steps", "20", cwd=tmp_path)
    fails(result, "train.py: error: --save_steps 20：要是 --eval_steps 30 的倍数")


def test_training_reports_data_tokens_and_where_the_model_is(trained):
    output = (trained / "train.py.txt").read_text(encoding="utf-8")
    for part in ("train.jsonl：108 条，token 数平均", "监督部分：<think>⏎", " token/秒", "【问题】", "【回答】"):
        assert part in output
    assert output.strip().splitlines()[-1].endswith("模型在 output/qwen3-medical，提问：python inference.py")
    assert "Warning" not in output


def test_inference_finds_the_trained_model_and_asks_the_published_question(trained):
    result = run_script("inference.py", "--max_new_tokens", 12, cwd=trained)
    assert result.returncode == 0, result.stdout
    assert "不能代替医生" in result.stdout.splitlines()[0]
    assert "医生，我最近被诊断为糖尿病" in result.stdout


def test_inference_is_repeatable_with_a_seed(trained, capsys):
    (model, tokenizer), outputs = models.load_trained(str(trained / "base")), []
    for seed in ("1", "1", "2"):
        flags = ["头痛怎么办？", "--seed", seed, "--max_new_tokens", "30"]
        args = inference.build_parser("", "").parse_args(flags)
        inference.ask(args, inference.begin(args, model, tokenizer))
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_inference_asks_any_model_without_thinking(trained):
    flags = ("--model_path", "base", "头痛？", "--max_new_tokens", 5, "--no_thinking")
    result = run_script("inference.py", *flags, cwd=trained)
    assert result.returncode == 0 and "【问题】头痛？" in result.stdout


def test_chat_holds_a_conversation_until_an_empty_line(trained):
    result = run_script(
        "inference.py", "--chat", "--max_new_tokens", 5, cwd=trained, stdin="头痛？\n<|im_end|>\n\n不会问到"
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("问：") == 3 and "不会问到" not in result.stdout


def test_adapter_is_asked_and_merged(trained):
    result = run_script("inference_lora.py", "头痛？", "--max_new_tokens", 5, cwd=trained)
    assert result.returncode == 0 and "【问题】头痛？" in result.stdout
    result = run_script("inference_lora.py", "--merge_to", "merged", cwd=trained)
    assert result.returncode == 0 and "python inference.py --model_path merged" in result.stdout
    assert "**它不是医生。**" in Path(trained, "merged", "README.md").read_text(encoding="utf-8")  # the card goes along
    result = run_script("inference.py", "--model_path", "merged", "--max_new_tokens", 5, cwd=trained)
    assert result.returncode == 0, result.stdout
    fails(run_script("inference_lora.py", "--merge_to", "merged", cwd=trained), "merged 不是可写的空文件夹")


@pytest.mark.parametrize(
    ("script", "train_script"), [("inference.py", "train.py"), ("inference_lora.py", "train_lora.py")]
)
def test_no_trained_model_names_the_command_that_makes_one(script, train_script, tmp_path):
    fails(run_script(script, cwd=tmp_path), "里没有训练好的模型", f"python {train_script}")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"max_length": 5}, r"train.jsonl 的样本都超过 5 个 token（最短 \d+）；请加大 --max_length。"),
        (
            {"output_dir": "val.jsonl/out"},
            "无法写入 val.jsonl/out（Not a directory）；请检查权限，或用 --output_dir 换位置。",
        ),
    ],
)
def test_mistakes_in_training_get_one_sentence_and_change_nothing(workspace, tiny_model, changes, parts):
    before = {path.name: path.read_bytes() for path in workspace.glob("*.jsonl")}
    args = train.TrainArguments(**{"model_name": str(tiny_model), "report_to": "none"} | changes)
    with pytest.raises(SystemExit, match=f"^错误：{parts}$"):
        train.train(args)
    assert before == {path.name: path.read_bytes() for path in workspace.glob("*.jsonl")}


def test_a_mistake_ends_the_command_without_a_traceback(workspace, tiny_model):
    result = run_script("train.py", "--model_name", tiny_model, "--max_length", "5", *FEW_STEPS, cwd=workspace)
    fails(result, "错误：train.jsonl 的样本都超过 5 个 token", "--max_length")


def test_bad_row_in_the_training_file_is_named(workspace, tiny_model):
    with open("train.jsonl", "a", encoding="utf-8") as file:
        file.write('{"question": "头痛？", "think": "想。", "answer": ""}\n')
    message = "错误：train.jsonl 第 109 行 answer 为空；请用 python data.py --dataset <原始数据> 重新生成。"
    with pytest.raises(SystemExit, match=f"^{message}$"):
        train.train(train.TrainArguments(model_name=str(tiny_model), report_to="none"))


def test_a_copy_without_its_parts_says_so_in_one_sentence(tmp_path):
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
    for flags in ((), ("-P",)):
        command = [sys.executable, *flags, tmp_path / "data.py"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
        assert result.returncode == 1 and result.stderr.startswith("错误：") and result.stderr.count("\n") == 1


def test_replies_that_are_there_are_kept_and_told_of_before_a_model_is_loaded(tmp_path):
    (tmp_path / "q.txt").write_text("头痛？", encoding="utf-8")
    (tmp_path / "old.jsonl").write_text("{}", encoding="utf-8")
    for script in ("inference.py", "inference_lora.py"):
        result = run_script(script, "--questions", "q.txt", "--replies", "old.jsonl", cwd=tmp_path)
        assert fails(result, "错误：old.jsonl 第 1 行不是 inference.py 写的回复；它不会被改写")
    assert (tmp_path / "old.jsonl").read_text(encoding="utf-8") == "{}"


NUMBER = "--{}：要一个 {} 到 4294967295 的整数，不是 '{}'"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([""], "question：问题是空的"),
        (["  "], "question：问题是空的"),
        (["--max_new_tokens", "0"], NUMBER.format("max_new_tokens", 1, 0)),
        (["--max_new_tokens", "2k"], NUMBER.format("max_new_tokens", 1, "2k")),
        (["--max_new_tokens", "9" * 5000], NUMBER.format("max_new_tokens", 1, "9" * 5000)),
        (["--seed", "-1"], NUMBER.format("seed", 0, -1)),
        (["--question", "q.txt"], "没有参数 --question；你是不是想写 --questions？全部参数：--help"),
        (["--push_to", "modelscope:a/b"], "没有参数 --push_to；全部参数：--help"),
        (["--questions"], "--questions 后面要有一个值"),
        (["--questions", "q.txt", "--chat"], "--chat 和 --questions 不能一起写"),
        (["--fast_kernels", "no"], "--fast_kernels：要写 true 或 false，不是 'no'"),
        (["--seed", "1.5"], NUMBER.format("seed", 0, 1.5)),
        (["--seed", "4294967296"], NUMBER.format("seed", 0, 2**32)),
    ],
    ids=lambda value: "_".join(value)[:30] if isinstance(value, list) else "",
)
def test_questions_and_numbers_that_make_no_sense(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        inference.build_parser("", "output").parse_args(flags)
    assert error.value.code == 2 and capsys.readouterr().err == f"错误：{message}\n"


@pytest.mark.parametrize("flag", ["train_file", "val_file"])
def test_file_that_cannot_be_trained_on(workspace, tiny_model, flag):
    Path("bad.jsonl").mkdir()
    before = contents(workspace)
    files = {"train_file": "train.jsonl", "val_file": "val.jsonl"} | {flag: "bad.jsonl"}
    flags = " ".join(f"--{name} {file}" for name, file in files.items())
    refused(
        f"找不到 bad.jsonl；请先运行 python data.py --dataset <数据> {flags}",
        train.train,
        arguments(tiny_model, **files),
    )
    assert contents(workspace) == before


def test_missing_data_and_model_come_from_the_hub(tmp_path, tiny_model):
    """From an empty folder and an empty cache to a trained model: the real client against a server on loopback."""
    shutil.copytree(ROOT / "tests" / "demo", tmp_path / "set", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (tmp_path / "work").mkdir()
    with Hub({"Qwen/Qwen3-1.7B": tiny_model}, {"krisfu/delicate_medical_r1_data": tmp_path / "set"}) as hub:
        flags = (*FEW_STEPS, "--model_revision", "v5")
        result = run_script("train_lora.py", *flags, cwd=tmp_path / "work", env=hub.env(tmp_path))
        assert result.returncode == 0, result.stdout
        # The adapter names its base as an id, so another machine can fetch it.
        asked = run_script("inference_lora.py", "--max_new_tokens", 5, cwd=tmp_path / "work", env=hub.env(tmp_path))
    assert (tmp_path / "work" / "train.jsonl").is_file()
    config = tmp_path / "work" / "output" / "qwen3-medical-lora" / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("Qwen/Qwen3-1.7B", "v5")
    assert asked.returncode == 0, asked.stdout


def test_model_that_the_hub_does_not_have(workspace):
    with Hub() as hub:
        result = run_script("train.py", "--model_name", "Qwen/Nope", *FEW_STEPS, cwd=workspace, env=hub.env(workspace))
    fails(result, f"无法从 {hub.url} 下载模型 Qwen/Nope", "--model_name")
