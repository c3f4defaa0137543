"""What is not installed, and what a library refuses, is said before anything is loaded."""

import importlib.util
import re
import sys

import pytest

import train
import train_lora
from parts.arguments import parse_flags


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"report_to": "tensorboard"},
            "--report_to tensorboard 在这里用不了（.*）；请先运行 pip install tensorboard，",
        ),
        ({"report_to": ["swanlab", "wandb"]}, "--report_to wandb 在这里用不了（.*）；请先运行 pip install wandb，"),
        ({"report_to": "comet_ml"}, "--report_to comet_ml 在这里用不了（.*）；请先运行 pip install comet-ml，"),
        ({"report_to": "paper"}, "--report_to paper：只有 none、"),
        ({"optim": "adamw_bnb_8bit"}, "--optim adamw_bnb_8bit 在这里用不了（.*pip install -U bitsandbytes"),
        ({"optim": "adamw_torch_8bit"}, "--optim adamw_torch_8bit 在这里用不了（.*pip install torchao"),
        ({"optim": "galore_adamw", "optim_target_modules": ["attn"]}, "--optim galore_adamw 在这里用不了（.*pip inst"),
        ({"optim": "lomo"}, "--optim lomo 在这里用不了（它在反向传播中更新，"),
        ({"optim": "schedule_free_adamw"}, "--optim schedule_free_adamw 在这里用不了（评估和保存用的是它平均"),
        ({"optim": "sgd", "optim_args": "momentum"}, "--optim sgd 在这里用不了（not enough values"),
        ({"optim": "sgd", "optim_args": "speed=1"}, "--optim sgd 在这里用不了（它不看 --optim_args）"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "--optim sgd 在这里用不了（它不看 --adam_beta1）"),
        ({"optim_target_modules": ["attn"]}, "--optim adamw_torch_fused 在这里用不了（它不看 --optim_target_modules）"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_type cosine_with_min_lr .*lr_scheduler_kwargs"),
        ({"lr_scheduler_kwargs": '{"a": 1}'}, "--lr_scheduler_type linear 在这里用不了（.* argument 'a'"),
        ({"dataloader_persistent_workers": True}, r"--dataloader_\* 在这里用不了（.*num_workers > 0"),
        ({"torch_compile_backend": "magic"}, "--torch_compile 在这里用不了（.*magic"),
        ({"fp16": True, "use_cpu": True}, "--fp16：这里的权重是 bfloat16，或没有 GPU"),
        ({"use_liger_kernel": True, "fast_kernels": False, "use_cpu": True}, "--use_liger_kernel 要 GPU 和 liger"),
    ],
    ids=str,
)
def test_what_cannot_work_here_is_said_at_once(changes, message):
    packages = ("bitsandbytes", "torchao", "tensorboard", "wandb", "comet_ml", "galore_torch")
    if any(importlib.util.find_spec(name) and name.split("_")[0] in message for name in packages):
        pytest.skip("is about its absence")
    with pytest.raises(ValueError, match=f"^{message}"):
        train.TrainArguments(**{"report_to": "none"} | changes)


@pytest.mark.parametrize(
    ("flags", "package"), [("--optimizer 8bit", "torchao"), ("--load_in_4bit true", "bitsandbytes")]
)
def test_a_command_names_the_package_that_it_needs(monkeypatch, capsys, flags, package):
    if importlib.util.find_spec(package):
        pytest.skip("is about its absence")
    monkeypatch.setattr("sys.argv", ["train_lora.py", *flags.split()])
    with pytest.raises(SystemExit, match="2"):
        parse_flags(train_lora.LoraArguments, "")
    assert re.search(
        f"error: {flags.removesuffix(' true')} 要用 {package}；请先运行 pip install", capsys.readouterr().err
    )


def test_libraries_of_samples_are_missed_before_the_first_evaluation(monkeypatch, capsys):
    for name in ("rapidfuzz", "rjieba"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit, match="2"):
        parse_flags(train.TrainArguments, "")
    said = "--eval_samples 4 要用 rapidfuzz、rjieba；请先运行 pip install rapidfuzz rjieba"
    assert said in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["train.py", "--eval_samples", "0"])
    assert parse_flags(train.TrainArguments, "").eval_samples == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "adafactor"},
        {"optim": "adamw_torch", "adam_beta1": 0.5},
        {"optim": "rmsprop", "optim_args": "alpha=0.9"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4},
        {"report_to": ["swanlab"]},
    ],
    ids=str,
)
def test_what_works_is_let_through(changes):
    args = train.TrainArguments(**{"report_to": "none"} | changes)
    assert args.optimizer == ("optim" if "optim" in changes else None)
