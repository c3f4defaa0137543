"""The scripts as a person calls them: each in a process of its own, in a folder of its own."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import REAL, ROOT, run_script
from hub import Hub

import inference
import inference_lora
import train

SCRIPTS = ("data.py", "train.py", "train_lora.py", "inference.py", "inference_lora.py")
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


def loss_curve(folder: Path) -> list[tuple[float, float]]:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    curve = [(log["loss"], log["grad_norm"]) for log in history if "loss" in log]
    return curve + [(log["eval_loss"], log["eval_token_loss"]) for log in history if "eval_loss" in log]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model):
    """A working folder after data.py, train.py and train_lora.py; the base beside it as `base`."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_model, folder / "base")
    for command in (
        ("data.py", "--dataset", ROOT / "tests" / "demo" / "medical.jsonl"),
        ("train.py", "--model_name", "base", *FEW_STEPS),
        ("train_lora.py", "--model_name", "base", *FEW_STEPS),
    ):
        result = run_script(*command, cwd=folder)
        assert result.returncode == 0, result.stdout
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_commands_and_the_defaults(script, tmp_path):
    result = run_script(script, "--help", cwd=tmp_path)
    assert result.returncode == 0 and f"python {script}" in result.stdout
    assert "default" in result.stdout and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_flag_is_an_error(script, tmp_path):
    fails(run_script(script, "--lerning_rate", "1", cwd=tmp_path), "unrecognized arguments: --lerning_rate")
    assert list(tmp_path.iterdir()) == []


def test_flags_that_do_not_fit_are_an_error(tmp_path):
    result = run_script("train.py", "--eval_steps", "30", "--save_steps", "20", cwd=tmp_path)
    fails(result, "round multiple of the evaluation steps")


def test_demo_ends_with_replies_that_think(tmp_path):
    result = run_script("tests/demo/demo.py", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("【思考】\n") >= 2 and "演示完成" in result.stdout
    for command in ("data.py", "train.py", "inference.py", "train_lora.py", "inference_lora.py"):
        assert f"$ python {command}" in result.stdout


def test_training_reports_data_tokens_and_where_the_model_is(workspace, tiny_model):
    result = run_script("train.py", "--model_name", tiny_model, *FEW_STEPS, cwd=workspace)
    assert result.returncode == 0, result.stdout
    for part in (
        "train.jsonl：108 条，token 数平均",
        "监督部分：<think>⏎",
        " token/秒",
        "【问题】",
        "【回答】",
    ):
        assert part in result.stdout
    assert result.stdout.strip().splitlines()[-1].endswith("模型在 output/qwen3-medical，提问：python inference.py")
    assert "Warning" not in result.stdout


@pytest.mark.parametrize(("launcher", "script"), [("torchrun", "train.py"), ("accelerate", "train_lora.py")])
def test_two_processes_follow_the_curve_of_one(workspace, tiny_model, launcher, script):
    flags = ("--model_name", str(tiny_model), *FEW_STEPS, "--gradient_accumulation_steps", "1")
    flags += ("--lora_dropout", "0") if script == "train_lora.py" else ()  # each process drops other elements
    result = run_script(script, *flags, "--per_device_train_batch_size", 4, "--output_dir", "one", cwd=workspace)
    assert result.returncode == 0, result.stdout
    launch = {
        "torchrun": ["torchrun", "--nproc_per_node=2", "--master_port=29531"],
        "accelerate": [
            *("accelerate", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"),
            *("--dynamo_backend=no", "--main_process_port=29532"),
        ],
    }[launcher]
    command = [Path(sysconfig.get_path("scripts"), launch[0]), *launch[1:], ROOT / script, *flags]
    command += ["--per_device_train_batch_size", "2", "--output_dir", "two"]
    two = subprocess.run(command, cwd=workspace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    assert two.returncode == 0, two.stdout
    assert two.stdout.count("训练完成") == 1 and two.stdout.count("【问题】") == 3  # rank 0 alone speaks
    one, both = loss_curve(workspace / "one"), loss_curve(workspace / "two")
    assert len(one) == 6 + 2
    for expected, found in zip(one, both):
        assert found == pytest.approx(expected, rel=2e-4)


def test_inference_finds_the_trained_model_and_asks_the_published_question(trained):
    result = run_script("inference.py", "--max_new_tokens", 12, cwd=trained)
    assert result.returncode == 0, result.stdout
    assert "不能代替医生" in result.stdout.splitlines()[0]
    assert "医生，我最近被诊断为糖尿病" in result.stdout


def test_inference_is_repeatable_with_a_seed(trained, capsys):
    loaded, outputs = inference.load_trained(str(trained / "base")), []
    for seed in ("1", "1", "2"):
        flags = ["头痛怎么办？", "--seed", seed, "--max_new_tokens", "30"]
        inference.predict(*loaded, inference.build_parser("", "").parse_args(flags))
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


@pytest.mark.parametrize("folder", ["a_file", "full", "/proc/merged", ""])
def test_merging_is_refused_into_anything_but_a_new_folder(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("x")
    Path("full").mkdir()
    Path("full", "model.safetensors").touch()
    message = f"错误：{folder} 不是可写的空文件夹；请用 --merge_to 指定一个新文件夹。"
    with pytest.raises(SystemExit, match=f"^{re.escape(message)}$"):
        inference_lora.refuse_unless_empty(folder)


@pytest.mark.parametrize(
    ("script", "train_script"), [("inference.py", "train.py"), ("inference_lora.py", "train_lora.py")]
)
def test_no_trained_model_names_the_command_that_makes_one(script, train_script, tmp_path):
    fails(run_script(script, cwd=tmp_path), "里没有训练好的模型", f"python {train_script}")


def test_adapter_whose_base_is_missing(trained, tmp_path):
    shutil.copytree(trained / "output" / "qwen3-medical-lora", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": "/nowhere/base"}
    config.write_text(json.dumps(settings), encoding="utf-8")
    result = run_script("inference_lora.py", "--model_path", "adapter", cwd=tmp_path)
    fails(result, "adapter 的适配器需要基础模型 /nowhere/base", "adapter_config.json")


def test_adapter_of_another_base(trained, tmp_path):
    import tiny_model

    tiny_model.build(tmp_path / "wide", tiny_model.sample_texts(), hidden_size=128)
    shutil.copytree(trained / "output" / "qwen3-medical-lora", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": str(tmp_path / "wide")}
    config.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(SystemExit, match="的适配器无法装到.*train_lora.py"):
        inference_lora.load_adapter(str(tmp_path / "adapter"))


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
        file.write('{"question": "头痛？", "think": "", "answer": "休息。"}\n')
    message = "错误：train.jsonl 第 109 行 think 为空；请用 python data.py --dataset <原始数据> 重新生成。"
    with pytest.raises(SystemExit, match=f"^{message}$"):
        train.train(train.TrainArguments(model_name=str(tiny_model), report_to="none"))


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


@pytest.mark.skipif(not REAL.is_dir(), reason="the real rows and tokenizer are not part of the project")
def test_the_path_runs_on_real_rows_with_the_real_tokenizer(tmp_path):
    """On the thirty shortest rows: with a vocabulary of 151,936 a CPU is slow."""
    subprocess.run([sys.executable, REAL / "build_model.py", tmp_path / "real"], check=True)
    rows = sorted((REAL / "medical_r1_120.jsonl").read_text(encoding="utf-8").splitlines(), key=len)[:30]
    (tmp_path / "short.jsonl").write_text("\n".join(rows), encoding="utf-8")
    one_step = ("--model_name", "real", "--max_steps", "1", "--sample_tokens", "8", "--report_to", "none")
    for command in (
        ("data.py", "--dataset", "short.jsonl"),
        ("train.py", *one_step),
        ("inference.py", "--max_new_tokens", "8"),
        ("train_lora.py", *one_step),
        ("inference_lora.py", "--max_new_tokens", "8"),
    ):
        result = run_script(*command, cwd=tmp_path)
        assert result.returncode == 0, result.stdout
