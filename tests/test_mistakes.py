"""What goes wrong at a user's hands gets one sentence, early, and nothing that was there is lost."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from test_train import arguments

import data
import inference
import inference_lora
import train
import train_lora


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    """A finished full run (`full`) and a finished LoRA run (`lora`) of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data.prepare(str(ROOT / "tests" / "demo" / "medical.jsonl"))
        train.run(arguments(tiny_model, max_steps=2, output_dir="full"))
        lora = arguments(tiny_model, train_lora.LoraArguments, max_steps=2, output_dir="lora")
        train.run(lora, train_lora.add_adapter)
        train_lora.name_base(lora)
    return folder


@pytest.fixture
def copies(finished, tmp_path, monkeypatch):
    """A working folder of its own with the finished runs and the data."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ({"sample_tokens": 0}, "--sample_tokens 0"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0"),
        ({"learning_rate": -1.0}, "--learning_rate -1.0"),
        ({"num_train_epochs": 0}, "--num_train_epochs 0"),
        ({"max_steps": 0}, "--max_steps 0"),
        ({"max_length": 0}, "--max_length 0"),
        ({"seed": -1}, "--seed -1"),
        ({"early_stopping_patience": -1}, "--early_stopping_patience -1"),
        ({"lora_rank": 0}, "--lora_rank 0"),
        ({"output_dir": ""}, "--output_dir 是空的"),
    ],
    ids=str,
)
def test_numbers_that_make_no_sense_are_refused_at_once(flags, part):
    with pytest.raises(ValueError, match=part):
        train_lora.LoraArguments(**flags)


def test_a_folder_with_anything_but_a_run_is_not_written_into(copies, tiny_model):
    shutil.copytree(tiny_model, "base")
    before = contents(copies)
    for folder in ("base", "."):
        with pytest.raises(SystemExit, match=f"{folder} 里有别的文件.*--output_dir"):
            train.claim_output_dir(arguments(tiny_model, output_dir=folder))
    assert contents(copies) == before


def test_a_finished_run_is_given_up_only_when_training_can_start(copies, tiny_model):
    before = contents(copies)
    with pytest.raises(SystemExit, match="找不到模型 no model"):
        train.run(arguments(Path("no model"), output_dir="full", overwrite_output_dir=True))
    assert contents(copies) == before


@pytest.mark.parametrize("checkpoint", ["nope", "full/checkpoint-9", "true"])
def test_checkpoint_that_is_not_there(copies, tiny_model, checkpoint):
    with pytest.raises(SystemExit, match=f"--resume_from_checkpoint {checkpoint} 不是完整的检查点"):
        train.claim_output_dir(arguments(tiny_model, output_dir="new", resume_from_checkpoint=checkpoint))


def test_adapter_as_the_model_to_train_or_to_ask(copies):
    with pytest.raises(SystemExit, match=r"lora 是 LoRA 适配器.*--merge_to"):
        inference.resolve_model("lora")
    with pytest.raises(SystemExit, match="python inference_lora.py --model_path lora"):
        inference.load_trained("lora")
    with pytest.raises(SystemExit, match="python inference.py --model_path full"):
        inference_lora.load_adapter("full")


def test_weights_that_are_cut_off(copies):
    for file in (Path("full/model.safetensors"), Path("lora/adapter_model.safetensors")):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="full 里的模型无法读取"):
        inference.load_trained("full")
    with pytest.raises(SystemExit, match="lora 的适配器无法装到"):
        inference_lora.load_adapter("lora")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"base_model_name_or_path": null}'])
def test_adapter_configuration_that_is_broken(copies, text):
    Path("lora/adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="^错误：lora"):
        inference_lora.load_adapter("lora")


def test_adapter_without_its_weights_asks_no_hub(copies):
    Path("lora/adapter_model.safetensors").unlink()
    with pytest.raises(SystemExit, match="缺少 adapter_model.safetensors"):
        inference_lora.load_adapter("lora")


def test_checkpoint_cut_off_while_it_was_written_is_not_asked(copies):
    Path("full/trainer_state.json").unlink()
    Path("full/config.json").unlink()
    shutil.copytree("full/checkpoint-2", "full/checkpoint-7")
    Path("full/checkpoint-7/trainer_state.json").unlink()
    shutil.copytree("full/checkpoint-2", "full/checkpoint-best")  # a copy that a user made
    assert inference.find_trained("full") == Path("full/checkpoint-2")


def test_best_checkpoint_is_asked_before_training_is_finished_also_after_a_move(copies, tiny_model):
    Path("full/trainer_state.json").unlink()
    shutil.copytree("full/checkpoint-2", "full/checkpoint-4")
    shutil.move("full", "moved")
    assert inference.find_trained("moved") == Path("moved/checkpoint-2")  # the state names full/checkpoint-2


def test_model_that_ends_its_turn_with_another_token(tiny_model, tmp_path):
    """A base model's tokenizer names <|endoftext|> as the end; its replies have to end with the turn all the same."""
    shutil.copytree(tiny_model, tmp_path / "base")
    config = tmp_path / "base" / "tokenizer_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"<|im_end|>"', '"<|endoftext|>"'), encoding="utf-8")
    tokenizer = inference.load_tokenizer(str(tmp_path / "base"))
    example = data.encode_example(tokenizer, {"question": "问", "think": "想", "answer": "答"})
    assert tokenizer.decode(example["labels"][-1]) == "<|im_end|>" == tokenizer.eos_token


def test_template_that_writes_no_thinking(workspace, tiny_model):
    shutil.copytree(tiny_model, "silent")
    template = Path("silent/chat_template.jinja")
    text = template.read_text(encoding="utf-8")
    template.write_text(
        text.replace("message.role == 'assistant' and loop.index0", "loop.index0 < 0 and 0"), encoding="utf-8"
    )
    with pytest.raises(SystemExit, match="silent 的对话模板不写思考"):
        train.run(arguments(Path("silent")))


@pytest.mark.parametrize("flags", [[""], ["  "], ["--max_new_tokens", "0"], ["--seed", "-1"]])
def test_questions_and_numbers_that_make_no_sense(flags):
    with pytest.raises(SystemExit) as error:
        inference.build_parser("", "output").parse_args(flags)
    assert error.value.code == 2


def test_half_a_character_from_a_terminal_is_asked_all_the_same(tokenizer):
    ids = data.encode_messages(tokenizer, data.to_messages("\udcff头痛？"), prompt_only=True)
    assert "?头痛？" in tokenizer.decode(ids)


@pytest.mark.parametrize("encoding", ["gbk", "ascii"])
def test_terminals_of_other_encodings(copies, encoding):
    command = [sys.executable, ROOT / "inference.py", "--model_path", "full", "♥ 头痛？", "--max_new_tokens", "5"]
    env = {"PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin", "HOME": str(copies)}
    result = subprocess.run(command, env=env, capture_output=True)
    assert result.returncode == 0, result.stderr


def test_tracking_that_cannot_start_says_how_to_go_on_without(workspace, tiny_model, monkeypatch):
    monkeypatch.setenv("SWANLAB_MODE", "nonsense")
    with pytest.raises(SystemExit, match="SwanLab 无法开始.*--report_to none"):
        train.start_tracking(arguments(tiny_model, report_to="swanlab"))


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_other_evaluation_strategies_work_with_one_flag(workspace, tiny_model, strategy):
    steps = {"max_steps": 28} if strategy == "epoch" else {"max_steps": 2}  # 27 steps an epoch
    trainer = train.run(arguments(tiny_model, eval_strategy=strategy, **steps))
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert bool(evaluated) == (strategy == "epoch")
    assert Path(data.OUTPUT_DIR, "model.safetensors").is_file()


def test_patience_is_that_of_the_command_that_continues(workspace, tiny_model, monkeypatch):
    changes = {"max_steps": 40, "eval_steps": 1, "learning_rate": 1.0}
    first = train.run(arguments(tiny_model, early_stopping_patience=3, **changes))
    stopped = first.state.global_step
    Path(data.OUTPUT_DIR, inference.FINISHED_MARK).unlink()
    again = train.run(arguments(tiny_model, early_stopping_patience=5, **changes))
    evaluations = [log["eval_loss"] for log in again.state.log_history if "eval_loss" in log]
    assert stopped < again.state.global_step == evaluations.index(min(evaluations)) + 1 + 5 < 40


def test_ctrl_c_ends_without_a_traceback_and_the_command_continues(workspace, tiny_model):
    flags = ["--model_name", tiny_model, "--report_to", "none", "--max_steps", "60", "--eval_steps", "5"]
    flags += ["--logging_steps", "5", "--sample_tokens", "4", "--disable_tqdm", "true"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    while not inference.find_checkpoints(data.OUTPUT_DIR) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in output and "已中断" in output, output
    result = run_script("train.py", *flags, cwd=workspace)
    assert result.returncode == 0 and "resumed from step " in result.stdout
    state = json.loads(Path(data.OUTPUT_DIR, "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 60
    assert torch.isfinite(torch.tensor(state["best_metric"]))
