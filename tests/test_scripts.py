"""The scripts as a person calls them, in a folder of their own. The demo starts each anew, here they are forked."""

import ast
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers import ROOT, SAMPLES, SCRIPTS, contents, run_script
from hub_server import Hub

import inference

FEW_STEPS = "--max_steps 6 --eval_steps 3 --logging_steps 1 --learning_rate 1e-3 --sample_tokens 8".split()
FEW_STEPS += "--report_to none".split()


def fails(result, *parts: str) -> None:
    """A user's mistake: exit status not 0, no traceback, and a last line with all of `parts`."""
    last = result.stdout.strip().splitlines()[-1]
    assert result.returncode not in (0, None) and "Traceback" not in result.stdout, result.stdout
    for part in ("错误：", *parts):
        assert part in last, (part, last)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model):
    """A working folder after data.py, train.py and train_lora.py; the base beside it."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_model, folder / "base")
    training = ("--model_name", "base", *FEW_STEPS)
    for script, flags in (("data.py", ("--dataset", SAMPLES)), ("train.py", training), ("train_lora.py", training)):
        result = run_script(script, *flags, cwd=folder)
        assert result.returncode == 0, result.stdout
        (folder / f"{script}.txt").write_text(result.stdout, encoding="utf-8")
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_commands_and_an_unknown_flag_is_an_error(script, tmp_path):
    result = run_script(script, "--help", cwd=tmp_path, fresh=script == "data.py")
    assert result.returncode == 0 and script in result.stdout
    fails(run_script(script, "--lerning_rate", "1", cwd=tmp_path), "--lerning_rate")
    assert list(tmp_path.iterdir()) == []


def test_training_reports_data_tokens_and_where_the_model_is(trained):
    output = (trained / "train.py.txt").read_text(encoding="utf-8")
    for part in ("train.jsonl：108 条，token 数平均", "监督部分：<think>⏎", " token/s", "【问题】", "【回答】"):
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
    piped = run_script("inference.py", "--max_new_tokens", 2, cwd=trained, stdin="咳嗽\x1b[2J？\n\n多久？\n")
    assert "【问题】咳嗽？\n\n多久？\n" in piped.stdout


def test_adapter_is_merged_and_asked(trained):
    result = run_script("inference_lora.py", "--merge_to", "merged", cwd=trained)
    assert result.returncode == 0 and "python inference.py --model_path merged" in result.stdout
    assert "**它不是医生。**" in Path(trained, "merged", "README.md").read_text(encoding="utf-8")  # the card goes along
    assert run_script("inference.py", "--model_path", "merged", "--max_new_tokens", 5, cwd=trained).returncode == 0
    fails(run_script("inference_lora.py", "--merge_to", "merged", cwd=trained), "merged 不是可写的空文件夹")


def test_mistakes_in_training_get_one_sentence_and_change_nothing(workspace, tiny_model):
    Path("bad.jsonl").write_text('{"question": "头痛？", "think": "想。", "answer": ""}\n', encoding="utf-8")
    before = contents(workspace)
    for flag, value, said in (
        ("--max_length", 5, "train.jsonl 的样本都超过 5 个 token"),
        ("--val_file", "no.jsonl", "python data.py"),
        ("--train_file", "bad.jsonl", "bad.jsonl 第 1 行 answer 为空；请用 python data.py"),
    ):
        result = run_script("train.py", "--model_name", tiny_model, *FEW_STEPS, flag, value, cwd=workspace)
        fails(result, said, str(value))
        assert contents(workspace) == before


def start_bare(tmp_path, versions: dict[str, str], script: str = "data.py") -> str:
    """What a script says that ends at once, with Python's own library and, so it seems, these others."""
    for name, version in versions.items():
        (info := tmp_path / f"{name.replace('-', '_')}-{version}.dist-info").mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    options = {"env": {"PYTHONPATH": str(tmp_path), "PYTHONUTF8": "1"}, "capture_output": True, "encoding": "utf-8"}
    result = subprocess.run([sys.executable, "-S", ROOT / script], cwd=tmp_path, **options)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_where_nothing_is_installed_one_sentence_says_so(tmp_path, script):
    said = start_bare(tmp_path, {}, script)
    assert said.startswith("错误：需要 torch、transformers、") and said.endswith("pip install -r requirements.txt\n")
    ast.parse((ROOT / script).read_text(encoding="utf-8"), feature_version=(3, 8))  # an older Python gets that far


def test_a_library_that_is_missing_too_old_or_too_new_is_named(tmp_path):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    floors = dict(re.match(r"([\w-]+)[^>]*>=([\d.]+)", line).groups() for line in lines if not line.startswith("#"))
    versions = floors | {"torch": "2.100.0+cpu", "transformers": "4.57.1", "accelerate": "1.15.9"}
    del versions["swanlab"], versions["liger-kernel"]
    missing = "、liger-kernel" if sys.platform == "linux" else ""
    expected = (
        rf"错误：需要 torch>=[\d.,<]+（当前 2.100.0\+cpu）、transformers>=[\d.,<]+（当前 4.57.1）、swanlab{missing}；"
    )
    assert re.match(expected, start_bare(tmp_path, versions))


def test_an_old_python_is_named_before_all_else():
    code = "import sys; sys.version_info, sys.version = (3, 10, 4), '3.10.4 (main)'; import parts"
    result = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert result.returncode == 1 and result.stderr.startswith("错误：需要 Python 3.11 或更新版本（当前 3.10.4）；")


def test_no_trained_model_names_the_command_that_makes_one_and_replies_that_are_there_are_kept(tmp_path):
    (tmp_path / "q.txt").write_text("头痛？", encoding="utf-8")
    (tmp_path / "old.jsonl").write_text("{}", encoding="utf-8")
    for suffix in (".py", "_lora.py"):
        inference = partial(run_script, f"inference{suffix}", cwd=tmp_path)
        fails(inference(), "里没有训练好的模型", f"python train{suffix}")
        fails(inference("--questions", "q.txt", "--replies", "old.jsonl"), "old.jsonl 第 1 行")
    assert (tmp_path / "old.jsonl").read_text(encoding="utf-8") == "{}"


def test_a_command_line_that_makes_no_sense_is_one_line(monkeypatch, capsys):
    for flags, message in (
        (["  "], "question：问题是空的"),
        (["--seed", "4294967296"], "--seed：要一个 0 到 4294967295 的整数，不是 '4294967296'"),
        (["--questions", "q.txt", "--chat"], "--chat 和 --questions 不能同时使用"),
        (["--replies", "r.jsonl"], "--replies "),
    ):
        monkeypatch.setattr(sys, "argv", ["inference.py", *flags])
        with pytest.raises(SystemExit, match="2"):
            inference.main()
        said = capsys.readouterr().err
        assert said.startswith(f"错误：{message}") and said.count("\n") == 1


def test_missing_data_and_model_come_from_the_hub(tmp_path, tiny_model):
    """From an empty folder and an empty cache to a trained model: the real client against a server on loopback."""
    shutil.copytree(ROOT / "tests" / "demo", tmp_path / "set", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (tmp_path / "work").mkdir()
    with Hub({"Qwen/Qwen3-1.7B": tiny_model}, {"krisfu/delicate_medical_r1_data": tmp_path / "set"}) as hub:
        run = partial(run_script, cwd=tmp_path / "work", env=hub.env(tmp_path))
        result = run("train_lora.py", *FEW_STEPS, "--model_revision", "v5")
        assert result.returncode == 0, result.stdout
        # The adapter names its base as an id and a revision, so another machine can fetch it.
        hub.requests.clear()
        asked = run("inference_lora.py", "头痛？", "--max_new_tokens", 5)
    assert (tmp_path / "work" / "train.jsonl").is_file()
    assert asked.returncode == 0 and "【问题】头痛？" in asked.stdout, asked.stdout
    assert hub.requests and all(re.search("/Qwen/Qwen3-1.7B/.*Revision=v5", address) for address in hub.requests)
