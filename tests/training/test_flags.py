"""Each flag that is shown acts; what does not act, or cannot be meant, is refused in one sentence, before
torch is imported where the command line says it."""

import functools
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT, SCRIPTS, arguments, build_trainer, make_rows, refused, run, same, save

import train
import train_lora
from parts.run import folder
from parts.training import flags, optimizers

ACTS = {  # seen in the weights or the log of three steps: another value, and what it needs beside it
    "per_device_train_batch_size": (2, {}),
    "num_train_epochs": (2, {"max_steps": -1}),
    "max_steps": (2, {}),
    "learning_rate": (1e-2, {}),
    "lr_scheduler_type": ("constant", {}),
    "warmup_steps": (2, {}),
    "weight_decay": (0.5, {}),
    "adam_beta2": (0.5, {}),
    "gradient_accumulation_steps": (2, {}),
    "max_grad_norm": (0.01, {}),
    "seed": (1, {}),
    "logging_steps": (2, {}),
    "eval_steps": (2, {}),
    "eval_on_start": (True, {}),
    "lora_rank": (4, {"lora": True}),
    "lora_alpha": (8, {"lora": True}),
    "lora_dropout": (0.5, {"lora": True}),
    "target_modules": (("q_proj",), {"lora": True}),
    "use_rslora": (True, {"lora": True}),
    "use_dora": (True, {"lora": True}),
}
SETS = {  # seen in what the Trainer makes of it
    "run_name": ("x", lambda trainer: trainer.args.run_name == "x"),
    "use_cpu": (True, lambda trainer: trainer.model.device.type == "cpu"),
    "checkpoint_every": (1, lambda trainer: trainer.plan.checkpoint_every == 1),
    "batch_tokens": (99, lambda trainer: trainer.plan.batch_tokens == 99),
    "memory_gb": (2.0, lambda trainer: trainer.plan.free == 1.5e9),
    "save_total_limit": (7, lambda trainer: trainer.limit == 7),
    "save_steps": (200, lambda trainer: trainer.args.save_steps == 200),
    "full_logits": (True, lambda trainer: trainer.args.full_logits),
}
ELSEWHERE = {  # flags that other tests see acting
    "the trainings of all tests": "train_file val_file max_length model_name output_dir report_to",
    "test_hub": "model_revision",
    "test_train, test_safe_trainer": "early_stopping_patience overwrite_output_dir resume_from_checkpoint",
    "test_optimizers, test_kernels, test_rehearsal, test_check": "optimizer fast_kernels rehearse check",
    "test_gpu": "offload_activations",
    "test_samples": "eval_samples sample_tokens",
    "test_fsdp, test_processes": "fsdp ddp_timeout",
    "test_qlora": "load_in_4bit",
    "test_train_lora": "adapter",
}
DECIDING = {*folder.SETTINGS, *folder.LORA_SETTINGS} - {"eval_steps"}  # which decides which checkpoint is the best
DECIDING |= {"per_device_train_batch_size", "gradient_accumulation_steps"}  # in examples_per_step


def parse(script: str, *words: str, **environment) -> subprocess.CompletedProcess:
    """The script in a process of its own, which must not import torch."""
    spy = "import sys; sys.modules['torch'] = None; import runpy; sys.argv = sys.argv[1:]; "
    spy += f"sys.path.insert(0, {str(ROOT)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", spy, str(ROOT / script), *words]
    env = os.environ | {"PYTHONUTF8": "1"} | environment
    return subprocess.run(command, env=env, capture_output=True, encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_a_wrong_flag_need_no_torch(script):
    shown = parse(script, "--help")
    assert shown.returncode == 0 and shown.stdout.count("\n") <= 110, shown.stderr
    wrong = parse(script, "--modle_path" if "inference" in script else "--train_fil", "x")
    assert wrong.returncode == 2 and wrong.stderr.startswith("错误：") and wrong.stderr.count("\n") == 1
    assert re.search("你是不是想写 --(model_path|train_file)", wrong.stderr)


@pytest.mark.parametrize(("script", "flag"), [("data.py", "--dataset"), ("train.py", "--resume_from_checkpoint")])
def test_a_path_behind_an_equals_sign_begins_at_home(script, flag):
    assert "/somewhere/none" in parse(script, f"{flag}=~/none", HOME="/somewhere").stderr


def test_every_flag_of_the_table_is_seen_to_act_somewhere():
    seen = [*ACTS, *SETS, *" ".join(ELSEWHERE.values()).split()]
    assert sorted(seen) == sorted(flags.FLAGS)
    fields = train.arguments(report_to="none").__dataclass_fields__
    assert set(flags.FLAGS) <= set(fields) and flags.OPTIMIZERS == tuple(optimizers.OPTIMIZERS)


@pytest.fixture(scope="module")
def outcome(tiny_model, tokenizer, tmp_path_factory):
    """outcome(**flags): the weights after three steps with these flags, and the log but for its times."""
    file = save(make_rows(9), tmp_path_factory.mktemp("rows") / "rows.jsonl")

    @functools.cache
    def train_with(**changes):
        values = {"max_steps": 3, "num_train_epochs": 1, "output_dir": str(tmp_path_factory.mktemp("out"))}
        trainer = build_trainer(tiny_model, tokenizer, file=file, **values | changes)
        trainer.train()
        logs = []
        for log in trainer.state.log_history:
            logs.append({name: log[name] for name in log if not re.search("second|runtime|memory", name)})
        return trainer.model.state_dict(), logs

    return train_with


@pytest.mark.parametrize("name", ACTS)
def test_a_flag_that_acts_is_seen_and_those_that_decide_the_weights_are_kept(outcome, name):
    value, needs = ACTS[name]
    (before, log), (after, other_log) = outcome(**needs), outcome(**needs, **{name: value})
    assert log != other_log or not same(before, after)
    if name != "eval_steps":
        assert same(before, after) == (name not in DECIDING)


@pytest.mark.parametrize("name", SETS)
def test_a_flag_sets_what_it_says(workspace, tiny_model, tokenizer, name):
    value, holds = SETS[name]
    assert not holds(build_trainer(tiny_model, tokenizer)) or name == "use_cpu"
    assert holds(build_trainer(tiny_model, tokenizer, **{name: value}))


@pytest.mark.parametrize(
    ("changes", "stem"),
    [
        ({"learning_rate": float("nan")}, "--learning_rate nan：要一个大于 0 的数"),
        ({"seed": 2**32}, "--seed 4294967296：要一个从 0 到 4294967295 的整数"),
        ({"weight_decay": -0.1}, "--weight_decay -0.1：要一个不小于 0 的数"),
        ({"adam_beta2": 1.0}, "--adam_beta2 1.0：要一个从 0 到 1（不含 1）的数"),
        ({"output_dir": ""}, "--output_dir 是空的"),
        ({"offload_activations": True, "use_cpu": True}, "--offload_activations 要 GPU"),
        ({"offload_activations": True, "checkpoint_every": 0}, "--offload_activations：没有要重算的层"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "--warmup_steps：constant 不预热"),
        ({"optimizer": "8bit_in_backward", "max_grad_norm": 0.5}, "--max_grad_norm：--optimizer 8bit_in_backward"),
        ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint nowhere：没有这个文件夹"),
        ({"hub_token": "a-secret"}, "hub_token：这里的训练会忽略这个设置，请去掉。"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_at_once(changes, stem):
    refused(f"{stem}~", train_lora.arguments, report_to="none", **changes)


@pytest.mark.parametrize(
    ("words", "stem"),
    [
        ("--deepspeed true", "--deepspeed：不再支持；放不下时请用 --fsdp true"),
        ("--optimizer sgd", "--optimizer：只能是 kahan、8bit、8bit_in_backward、adamw 之一，不是 'sgd'"),
        ("--report_to wandb tensorboard", "多了一个 tensorboard"),
        ("--check maybe", "--check：只能是 true 或 false，不是 'maybe'"),
        ("--optimizer 8bit", "--optimizer 8bit 要用 torchao；请先运行 pip install torchao"),
        ("--report_to wandb", "--report_to wandb 要用 wandb；请先运行 pip install wandb"),
        ("--target_modules", "--target_modules 后面要有一个值"),
    ],
)
def test_the_command_line_is_refused_in_one_sentence(words, stem, capsys, monkeypatch):
    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda name: None)  # nothing is installed
    monkeypatch.setattr(sys, "argv", ["train_lora.py", *words.split()])
    with pytest.raises(SystemExit) as ended:
        flags.parse("", train_lora.RECIPE)
    said = ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert said.startswith(f"错误：{stem}") and said.count("\n") <= 1


def test_of_several_processes_on_a_machine_one_says_it():
    assert parse("train.py", "--seed", "-1", LOCAL_RANK="1").stderr == ""


def test_nothing_is_written_into_what_the_user_wished(workspace, tiny_model):
    args = arguments(tiny_model, max_steps=2)
    before = dict(vars(args))
    train.train(args)
    assert vars(args) == before


def test_a_layer_that_is_not_there_is_named(workspace, tiny_model):
    refused("--target_modules 无法使用~wheel_proj~", run, tiny_model, lora=True, target_modules=["wheel_proj"])


def test_one_process_trains_on_one_gpu(tiny_model):
    """Also where a library has seen two before CUDA_VISIBLE_DEVICES could be set."""
    args = arguments(tiny_model)
    args._n_gpu = 2  # as Trainer's own arguments would have it
    assert args.n_gpu == 1 and args.train_batch_size == train.RECIPE["per_device_train_batch_size"]
