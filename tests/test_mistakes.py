"""What goes wrong at a user's hands gets one sentence, early, and nothing that was there is lost."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_data import contents
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
        run(tiny_model, max_steps=2, output_dir="full")
        run(tiny_model, lora=True, max_steps=2, output_dir="lora")
    return folder


@pytest.fixture
def copies(finished, tmp_path, monkeypatch):
    """A working folder of its own with the finished runs and the data."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sample_tokens": 0}, "--sample_tokens 0：要一个大于 0 的数"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0：要一个大于 0 的数"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0：要一个大于 0 的数"),
        ({"learning_rate": -1.0}, "--learning_rate -1.0：要一个大于 0 的数"),
        ({"learning_rate": float("nan")}, "--learning_rate nan：要一个大于 0 的数"),
        ({"num_train_epochs": 0}, "--num_train_epochs 0：要一个大于 0 的数"),
        ({"num_train_epochs": float("inf")}, "--num_train_epochs inf：要一个大于 0 的数"),
        ({"max_steps": 0}, "--max_steps 0：要一个大于 0 的数"),
        ({"max_length": 0}, "--max_length 0：要一个大于 0 的数"),
        ({"seed": -1}, "--seed -1：要一个不小于 0 的整数"),
        ({"seed": 2**32}, "--seed 4294967296：要一个小于 4294967296 的整数"),
        ({"early_stopping_patience": -1}, "--early_stopping_patience -1：要一个不小于 0 的整数"),
        ({"lora_rank": 0}, "--lora_rank 0：要一个大于 0 的数"),
        ({"output_dir": ""}, "--output_dir 是空的"),
        ({"memory_gb": 0.4}, "--memory_gb 0.4：驱动自己就要约 0.5 GB"),
        ({"save_only_model": True}, "--save_only_model：这样的检查点不能继续训练，不支持"),
        ({"offload_activations": True, "use_cpu": True}, "--offload_activations 要 GPU"),
        (
            {"offload_activations": True, "gradient_checkpointing": False},
            "--offload_activations：没有要重算的层（--checkpoint_every 0），也就没有什么可放",
        ),
    ],
    ids=str,
)
def test_numbers_that_make_no_sense_are_refused_at_once(flags, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train_lora.LoraArguments(**flags)


def test_a_flag_that_is_true_false_or_planned_may_stand_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--gradient_checkpointing", "--report_to", "none"])
    assert parse_flags(train.TrainArguments, "").checkpoint_every == 1
    monkeypatch.setattr(sys, "argv", ["train.py", "--gradient_checkpointing", "false", "--report_to", "none"])
    assert parse_flags(train.TrainArguments, "").checkpoint_every == 0


def test_a_folder_with_anything_but_a_run_is_not_written_into(copies, tiny_model):
    shutil.copytree(tiny_model, "base")
    before = contents(copies)
    for folder in ("base", "."):
        first = min(path.name for path in Path(folder).iterdir())
        message = f"{folder} 里有别的文件（{first} 等）；请用 --output_dir 指定一个新文件夹。"
        refused(message, output_folder.check, arguments(tiny_model, output_dir=folder))
    assert contents(copies) == before


def test_a_finished_run_is_given_up_only_when_training_can_start(copies, tiny_model):
    before = contents(copies)
    args = arguments(Path("no model"), output_dir="full", overwrite_output_dir=True)
    refused(NO_MODEL.format("no model"), train.train, args)
    assert contents(copies) == before


@pytest.mark.parametrize("checkpoint", ["nope", "full/checkpoint-9", "true"])
def test_checkpoint_that_is_not_there(copies, tiny_model, checkpoint):
    message = f"--resume_from_checkpoint {checkpoint} 不是完整的检查点（没有写完（缺少 manifest.json））；"
    message += "不写这个参数，就会从最近的完整检查点继续。"
    args = arguments(tiny_model, output_dir="new", resume_from_checkpoint=checkpoint)
    refused(message, output_folder.choose_checkpoint, args)


def test_adapter_as_the_model_to_train_or_to_ask(copies):
    merge = "请先合并：python inference_lora.py --model_path lora --merge_to output/merged"
    refused(f"lora 是 LoRA 适配器，不是完整的模型；{merge}", hub.find_model, "lora", "")
    other = "{0} 要用另一个脚本来问：python {1} --model_path {0}"
    refused(other.format("lora", "inference_lora.py"), inference.load_trained, "lora")
    refused(other.format("full", "inference.py"), inference_lora.load_adapter, "full")


def test_weights_that_are_cut_off(copies):
    for file in (Path("full/model.safetensors"), Path("lora/adapter_model.safetensors")):
        file.write_bytes(file.read_bytes()[:1000])
    refused(MODEL.format("full", "~"), inference.load_trained, "full")
    base = json.loads(Path("lora/adapter_config.json").read_text())["base_model_name_or_path"]
    refused(ADAPTER.format(base, "~"), inference_lora.load_adapter, "lora")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"base_model_name_or_path": null}'])
def test_adapter_configuration_that_is_broken(copies, text):
    Path("lora/adapter_config.json").write_text(text, encoding="utf-8")
    unreadable = "lora/adapter_config.json 无法读取（~）；请重新运行 python train_lora.py"
    no_base = "lora 的适配器需要基础模型 ，但它不在那里；请放回，或改 adapter_config.json 里的路径。"
    refused(no_base if "null" in text else unreadable, inference_lora.load_adapter, "lora")


def test_adapter_without_its_weights_asks_no_hub(copies):
    Path("lora/adapter_model.safetensors").unlink()
    base = json.loads(Path("lora/adapter_config.json").read_text())["base_model_name_or_path"]
    refused(ADAPTER.format(base, "缺少 adapter_model.safetensors"), inference_lora.load_adapter, "lora")


def test_checkpoint_cut_off_while_it_was_written_is_not_asked(copies):
    Path("full/trainer_state.json").unlink()
    Path("full/config.json").unlink()
    shutil.copytree("full/checkpoint-2", "full/checkpoint-7")
    Path("full/checkpoint-7/trainer_state.json").unlink()
    shutil.copytree("full/checkpoint-2", "full/checkpoint-best")  # a copy that a user made
    assert checkpoints.find_trained("full") == Path("full/checkpoint-2")


def test_best_checkpoint_is_asked_before_training_is_finished_also_after_a_move(copies, tiny_model):
    Path("full/trainer_state.json").unlink()
    shutil.copytree("full/checkpoint-2", "full/checkpoint-4")
    shutil.move("full", "moved")
    assert checkpoints.find_trained("moved") == Path("moved/checkpoint-2")  # the state names full/checkpoint-2


def test_model_that_ends_its_turn_with_another_token(tiny_model, tmp_path):
    """A base model's tokenizer names <|endoftext|> as the end; its replies have to end with the turn all the same."""
    shutil.copytree(tiny_model, tmp_path / "base")
    config = tmp_path / "base" / "tokenizer_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"<|im_end|>"', '"<|endoftext|>"'), encoding="utf-8")
    tokenizer = models.load_tokenizer(str(tmp_path / "base"))
    example = encoding.encode_example(tokenizer, data.to_messages("问", "想", "答"))
    assert tokenizer.decode(example["labels"][-1]) == "<|im_end|>" == tokenizer.eos_token


def test_template_that_writes_no_thinking(workspace, tiny_model):
    shutil.copytree(tiny_model, "silent")
    template = Path("silent/chat_template.jinja")
    text = template.read_text(encoding="utf-8")
    template.write_text(
        text.replace("message.role == 'assistant' and loop.index0", "loop.index0 < 0 and 0"), encoding="utf-8"
    )
    message = f"{Path('silent')} 的对话模板不写思考；请换一个会思考的模型，例如 Qwen/Qwen3-1.7B。"
    refused(message, train.train, arguments(Path("silent")))


NUMBER = "argument --{}: 要一个 {} 到 4294967295 的整数，不是 '{}'"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([""], "argument question: 问题是空的"),
        (["  "], "argument question: 问题是空的"),
        (["--max_new_tokens", "0"], NUMBER.format("max_new_tokens", 1, 0)),
        (["--max_new_tokens", "2k"], NUMBER.format("max_new_tokens", 1, "2k")),
        (["--max_new_tokens", "9" * 5000], NUMBER.format("max_new_tokens", 1, "9" * 5000)),
        (["--seed", "-1"], NUMBER.format("seed", 0, -1)),
        (["--seed", "1.5"], NUMBER.format("seed", 0, 1.5)),
        (["--seed", "4294967296"], NUMBER.format("seed", 0, 2**32)),
    ],
    ids=lambda value: "_".join(value)[:30] if isinstance(value, list) else "",
)
def test_questions_and_numbers_that_make_no_sense(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        inference.build_parser("", "output").parse_args(flags)
    assert error.value.code == 2 and capsys.readouterr().err.endswith(f"error: {message}\n")


GOOD = '{"question": "问", "think": "想", "answer": "答"}\n'
AGAIN = "；请用 python data.py --dataset <原始数据> 重新生成。"
CODING = "不是 UTF-8 编码（该行第 {} 字节）；请另存为 UTF-8，例如：iconv -f {} -t UTF-8 bad.jsonl > utf8.jsonl"
BAD_FILES = {  # what is in the file (..., a folder; Path, a link) and the message
    "missing": (None, "找不到 bad.jsonl；请先运行 python data.py --dataset <数据> {flags}"),
    "folder": (..., "找不到 bad.jsonl；请先运行 python data.py --dataset <数据> {flags}"),
    "link to nothing": (Path("no"), "找不到 bad.jsonl；请先运行 python data.py --dataset <数据> {flags}"),
    "unreadable": (Path("/proc/self/mem"), "无法读取 bad.jsonl（Input/output error）；请检查文件权限。"),
    "empty": (b"", "bad.jsonl 是空文件；请换一个有内容的文件。"),
    "GBK": (GOOD.encode() + GOOD.encode("gbk"), "bad.jsonl 第 2 行" + CODING.format(15, "GB18030")),
    "UTF-16": (GOOD.encode("utf-16"), "bad.jsonl 第 1 行" + CODING.format(1, "UTF-16")),
    "NUL": (GOOD.encode() + b"\0" * 9, "bad.jsonl 第 2 行含 NUL 字节：文件损坏，或是 UTF-16 编码；请另存为 UTF-8。"),
    "last line cut": (
        (GOOD + GOOD[:-4]).encode(),
        "bad.jsonl 第 2 行不是合法的 JSON（Unterminated string starting at，第 43 列）；请修正这一行。",
    ),
    "an array": (b"[1]", f"bad.jsonl 第 1 行 不是对象{AGAIN}"),
    "a column missing": (b'{"question": "q"}', f"bad.jsonl 第 1 行 缺少字段 think{AGAIN}"),
    "a number": (GOOD.replace('"答"', "5").encode(), f"bad.jsonl 第 1 行 answer 不是文本{AGAIN}"),
    "NaN": (GOOD.replace('"答"', "NaN").encode(), f"bad.jsonl 第 1 行 answer 不是文本{AGAIN}"),
    "an empty text": (GOOD.replace("想", "").encode(), f"bad.jsonl 第 1 行 think 为空{AGAIN}"),
    "half a pair": (
        GOOD.replace("答", "\\ud83d").encode(),
        f"bad.jsonl 第 1 行 answer 含无效字符（不成对的代理码点）{AGAIN}",
    ),
    "a field twice": (GOOD.replace('{"', '{"answer": "另", "').encode(), f"bad.jsonl 第 1 行 同一字段出现多次{AGAIN}"),
    "tags": (GOOD.replace("想", "<think>").encode(), f"bad.jsonl 第 1 行 think 含 <think> 或 </think> 标签{AGAIN}"),
}


@pytest.mark.parametrize("flag", ["train_file", "val_file"])
@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_file_that_cannot_be_trained_on(workspace, tiny_model, flag, content, message):
    if content is ...:
        Path("bad.jsonl").mkdir()
    elif isinstance(content, Path):
        Path("bad.jsonl").symlink_to(content)
    elif content is not None:
        Path("bad.jsonl").write_bytes(content)
    before = contents(workspace)
    files = {"train_file": "train.jsonl", "val_file": "val.jsonl"} | {flag: "bad.jsonl"}
    flags = " ".join(f"--{name} {file}" for name, file in files.items())
    refused(message.format(flags=flags), train.train, arguments(tiny_model, **files))
    assert contents(workspace) == before


NO_MODEL = "找不到模型 {}：既不是已有的文件夹，也不是 ModelScope 模型名（形如 Qwen/Qwen3-1.7B）。"
MODEL = "{} 里的模型无法读取（{}）；请重新下载或重新训练。"
TOKENIZER = "{} 里的分词器无法读取（{}）；请重新下载或换一个模型。"
ADAPTER = "lora 的适配器无法装到 {} 上（{}）；请重新运行 python train_lora.py"
UNTRAINED = "{} 里没有训练好的模型；请先运行 python train.py，或用 --model_path 指定模型的文件夹。"
NO_TEMPLATE = "{} 的分词器没有 <|im_end|> 或对话模板；请换一个 Qwen3 模型，例如 Qwen/Qwen3-1.7B。"
BAD_MODELS = {  # a file of the model, its content (None: not there), the message
    "configuration missing": ("config.json", None, UNTRAINED),
    "configuration cut": ("config.json", b"{", MODEL),
    "configuration an array": ("config.json", b"[]", MODEL),
    "configuration in GBK": ("config.json", '{"a": "我"}'.encode("gbk"), MODEL),
    "code of its own": ("config.json", b'{"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}', MODEL),
    "another architecture": (
        "config.json",
        b'{"model_type": "bert"}',
        MODEL.format("{}", "缺少 ~ 个权重，例如 bert.~"),
    ),
    "generation settings cut": ("generation_config.json", b"{", MODEL),
    "tokenizer missing": ("tokenizer.json", None, TOKENIZER),
    "tokenizer empty": ("tokenizer.json", b"{}", TOKENIZER),
    "tokenizer an array": ("tokenizer.json", b"[]", TOKENIZER),
    "tokenizer settings cut": ("tokenizer_config.json", b"[", TOKENIZER),
    "template missing": ("chat_template.jinja", None, NO_TEMPLATE),
    "template broken": ("chat_template.jinja", b"{% if %}", TOKENIZER),
    "template fails": ("chat_template.jinja", b"{{ 1 / 0 }}", TOKENIZER.format("{}", "division by zero")),
    "weights empty": ("model.safetensors", b"", MODEL),
    "weights a page": ("model.safetensors", b"<html>" * 99, MODEL),
}


@pytest.mark.parametrize(("file", "content", "message"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_model_that_cannot_be_asked(tiny_model, tmp_path, monkeypatch, file, content, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "bad")
    Path("bad", file).unlink()
    if content is not None:
        Path("bad", file).write_bytes(content)
    refused(message.format("bad", "~"), inference.load_trained, "bad")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no model", NO_MODEL),
        ("a/b/c", NO_MODEL),
        ("a_file", NO_MODEL),
        ("n" * 300, NO_MODEL),
        ("output/qwen3-medical", UNTRAINED),
        ("a_folder", UNTRAINED),
    ],
    ids=["spaces", "two slashes", "a file", "too long", "not trained yet", "an empty folder"],
)
def test_model_that_is_not_there(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("a_file").touch()
    Path("a_folder").mkdir()
    refused(message.format(name), inference.load_trained, name)


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json"])
def test_model_that_cannot_be_trained(workspace, tiny_model, file):
    shutil.copytree(tiny_model, "bad")
    Path("bad", file).write_bytes(b"[]")
    refused(TOKENIZER.format(Path("bad").resolve(), "~"), train.train, arguments(Path("bad")))


def test_folder_that_holds_no_model_cannot_be_trained(workspace):
    Path("bad").mkdir()
    refused(TOKENIZER.format(Path("bad").resolve(), "~"), train.train, arguments(Path("bad")))


def test_half_a_character_from_a_terminal_is_asked_all_the_same(tokenizer):
    ids = encoding.encode_messages(tokenizer, data.to_messages("\udcff头痛？"), prompt_only=True)
    assert "?头痛？" in tokenizer.decode(ids)


@pytest.mark.parametrize("encoding", ["gbk", "ascii"])
def test_terminals_of_other_encodings(copies, encoding):
    command = [sys.executable, ROOT / "inference.py", "--model_path", "full", "♥ 头痛？", "--max_new_tokens", "5"]
    env = {"PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin", "HOME": str(copies)}
    result = subprocess.run(command, env=env, capture_output=True)
    assert result.returncode == 0, result.stderr


def test_tracking_that_cannot_start_says_how_to_go_on_without(workspace, tiny_model, monkeypatch):
    monkeypatch.setenv("SWANLAB_MODE", "nonsense")
    message = "SwanLab 无法开始（~）；请改正，或设 SWANLAB_MODE=local，或加 --report_to none。"
    refused(message, tracking.start, arguments(tiny_model, report_to="swanlab"), "project", {})


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_other_evaluation_strategies_work_with_one_flag(workspace, tiny_model, strategy):
    steps = {"max_steps": 28} if strategy == "epoch" else {"max_steps": 2}  # 27 steps an epoch
    trainer = run(tiny_model, eval_strategy=strategy, **steps)
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert bool(evaluated) == (strategy == "epoch")
    assert Path(data.OUTPUT_DIR, "model.safetensors").is_file()


def test_patience_is_that_of_the_command_that_continues(workspace, tiny_model, monkeypatch):
    changes = {"max_steps": 40, "eval_steps": 1, "learning_rate": 1.0}
    first = run(tiny_model, early_stopping_patience=3, **changes)
    stopped = first.state.global_step
    Path(data.OUTPUT_DIR, checkpoints.FINISHED_MARK).unlink()
    again = run(tiny_model, early_stopping_patience=5, **changes)
    evaluations = [log["eval_loss"] for log in again.state.log_history if "eval_loss" in log]
    assert stopped < again.state.global_step == evaluations.index(min(evaluations)) + 1 + 5 < 40
