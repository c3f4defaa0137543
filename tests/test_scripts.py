"""The scripts as a person calls them, in a folder of their own. The demo starts each anew, here they are forked."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, SAMPLES, SCRIPTS, contents, run_script
from hub_server import Hub

import inference

FEW_STEPS = "--max_steps 6 --eval_steps 3 --logging_steps 1 --learning_rate 1e-3 --sample_tokens 8".split()
FEW_STEPS += "--report_to none".split()


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
def test_help_shows_the_commands_and_an_unknown_flag_is_an_error(script, tmp_path):
    result = run_script(script, "--help", cwd=tmp_path, fresh=script == "data.py")
    assert result.returncode == 0 and script in result.stdout
    fails(run_script(script, "--lerning_rate", "1", cwd=tmp_path), "--lerning_rate")
    assert list(tmp_path.iterdir()) == []


def test_training_reports_data_tokens_and_where_the_model_is(trained):
    output = (trained / "train.py.txt").read_text(encoding="utf-8")
    for part in ("train.jsonl：108 条，token 数平均", "监督部分：<think>⏎", " token/秒", "【问题】", "【回答】"):
        assert part in output
    assert output.strip().splitlines()[-1].endswith("模型在 output/qwen3-medical，提问：python inference.py")
    assert "Warning" not in output


def test_inference_asks_the_trained_model_the_published_question_and_any_model_what_it_is_told(trained):
    result = run_script("inference.py", "--max_new_tokens", 12, cwd=trained)
    assert result.returncode == 0, result.stdout
    assert "不能代替医生" in result.stdout.splitlines()[0] and "医生，我最近被诊断为糖尿病" in result.stdout
    flags = ("--model_path", "base", "头痛？", "--no_thinking", "--max_new_tokens", 30, "--seed")
    first, again, other = (run_script("inference.py", *flags, seed, cwd=trained).stdout for seed in (1, 1, 2))
    assert first == again != other and "【问题】头痛？" in first


def test_adapter_is_asked_and_merged(trained):
    result = run_script("inference_lora.py", "头痛？", "--max_new_tokens", 5, cwd=trained)
    assert result.returncode == 0 and "【问题】头痛？" in result.stdout
    result = run_script("inference_lora.py", "--merge_to", "merged", cwd=trained)
    assert result.returncode == 0 and "python inference.py --model_path merged" in result.stdout
    assert "**它不是医生。**" in Path(trained, "merged", "README.md").read_text(encoding="utf-8")  # the card goes along
    result = run_script("inference.py", "--model_path", "merged", "--max_new_tokens", 5, cwd=trained)
    assert result.returncode == 0, result.stdout
    fails(run_script("inference_lora.py", "--merge_to", "merged", cwd=trained), "merged 不是可写的空文件夹")


@pytest.mark.parametrize("suffix", [".py", "_lora.py"])
def test_no_trained_model_names_the_command_that_makes_one(suffix, tmp_path):
    fails(run_script(f"inference{suffix}", cwd=tmp_path), "里没有训练好的模型", f"python train{suffix}")


MISTAKES = {  # and what is said of them
    "--max_length 5": ("train.jsonl 的样本都超过 5 个 token", "--max_length"),
    "--val_file no.jsonl": ("找不到 no.jsonl；", "python data.py", "--val_file no.jsonl"),
    "--train_file bad.jsonl": ("bad.jsonl 第 1 行 answer 为空；", "python data.py --dataset"),
}


def test_mistakes_in_training_get_one_sentence_and_change_nothing(workspace, tiny_model):
    Path("bad.jsonl").write_text('{"question": "头痛？", "think": "想。", "answer": ""}\n', encoding="utf-8")
    before = contents(workspace)
    for flags, said in MISTAKES.items():
        result = run_script("train.py", "--model_name", tiny_model, *FEW_STEPS, *flags.split(), cwd=workspace)
        assert fails(result, *said).startswith("错误：") and contents(workspace) == before


def start_bare(tmp_path, versions: dict[str, str], script: str = "data.py") -> str:
    """What a script says that ends at once, with Python's own library and, so it seems, these others."""
    for name, version in versions.items():
        (info := tmp_path / f"{name.replace('-', '_')}-{version}.dist-info").mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    command = [sys.executable, "-S", ROOT / script]
    env = {"PYTHONPATH": str(tmp_path), "PYTHONUTF8": "1"}
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_where_nothing_is_installed_one_sentence_says_so(tmp_path, script):
    said = start_bare(tmp_path, {}, script)
    assert said.startswith("错误：需要 torch、transformers、")
    assert said.endswith("；请运行 pip install -r requirements.txt\n")
    ast.parse((ROOT / script).read_text(encoding="utf-8"), feature_version=(3, 8))  # an older Python gets that far


def test_a_library_that_is_missing_or_too_old_is_named(tmp_path):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    floors = dict(re.match(r"([\w-]+)[^>]*>=([\d.]+)", line).groups() for line in lines if not line.startswith("#"))
    versions = floors | {"torch": "2.100.0+cpu", "transformers": "4.57.1"}
    del versions["swanlab"], versions["liger-kernel"]
    missing = "、liger-kernel" if sys.platform == "linux" else ""
    told = f"错误：需要 transformers {floors['transformers']} 或更新的（现在是 4.57.1）、swanlab{missing}；请运行 pip"
    assert start_bare(tmp_path, versions).startswith(told)


def test_an_old_python_is_named_before_all_else():
    code = "import sys; sys.version_info, sys.version = (3, 10, 4), '3.10.4 (main)'; import parts"
    result = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert result.returncode == 1 and result.stderr.startswith("错误：需要 Python 3.11 或更新的（现在是 3.10.4）；")


def test_replies_that_are_there_are_kept_and_told_of_before_a_model_is_loaded(tmp_path):
    (tmp_path / "q.txt").write_text("头痛？", encoding="utf-8")
    (tmp_path / "old.jsonl").write_text("{}", encoding="utf-8")
    for script in ("inference.py", "inference_lora.py"):
        result = run_script(script, "--questions", "q.txt", "--replies", "old.jsonl", cwd=tmp_path)
        assert fails(result, "错误：old.jsonl 第 1 行不是 inference.py 写的回复；它不会被改写")
    assert (tmp_path / "old.jsonl").read_text(encoding="utf-8") == "{}"


def test_a_command_line_that_makes_no_sense_is_one_line(monkeypatch, capsys):
    for flags, message in (
        (["  "], "question：问题是空的"),
        (["--seed", "4294967296"], "--seed：要一个 0 到 4294967295 的整数，不是 '4294967296'"),
        (["--questions", "q.txt", "--chat"], "--chat 和 --questions 不能一起写"),
        (["--replies", "r.jsonl"], "--replies 只和 --questions 一起起作用"),
    ):
        monkeypatch.setattr(sys, "argv", ["inference.py", *flags])
        with pytest.raises(SystemExit) as error:
            inference.main()
        assert error.value.code == 2 and capsys.readouterr().err == f"错误：{message}\n"


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
