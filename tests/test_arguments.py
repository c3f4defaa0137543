"""Flags that make no sense are refused at once, in one sentence."""

import re
import sys
from pathlib import Path

import pytest
from helpers import arguments, run

import data
import train
import train_lora
from parts import checkpoints
from parts.arguments import parse_flags


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
        ({"data_seed": -1}, "--data_seed -1：要一个不小于 0 的整数"),
        ({"weight_decay": -0.1}, "--weight_decay -0.1：要一个不小于 0 的数"),
        ({"max_grad_norm": float("nan")}, "--max_grad_norm nan：要一个不小于 0 的数"),
        ({"adam_epsilon": 0.0}, "--adam_epsilon 0.0：要一个大于 0 的数"),
        ({"adam_beta2": 1.0}, "--adam_beta2 1.0：要一个从 0 到 1（不含 1）的数"),
        ({"lora_dropout": 1.5}, "--lora_dropout 1.5：要一个从 0 到 1（不含 1）的数"),
        ({"lora_dropout": -0.1}, "--lora_dropout -0.1：要一个从 0 到 1（不含 1）的数"),
        ({"eval_steps": -5}, "--eval_steps -5：要一个大于 0 的数"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers -1：要一个不小于 0 的整数"),
        (
            {"resume_from_checkpoint": "nowhere"},
            "--resume_from_checkpoint nowhere：没有这个文件夹；不写这个参数，就会从最近的完整检查点继续",
        ),
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


def test_nothing_is_written_into_what_the_user_wished(workspace, tiny_model):
    args = arguments(tiny_model, max_steps=2)
    before = dict(vars(args))
    train.train(args)
    assert vars(args) == before


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_other_evaluation_strategies_work_with_one_flag(workspace, tiny_model, strategy):
    steps = (
        {"max_steps": 28, "eval_steps": train.EVAL_STEPS} if strategy == "epoch" else {"max_steps": 2}
    )  # 27 steps an epoch
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


def test_one_process_trains_on_one_gpu(tiny_model):
    """Also where a library has seen two before CUDA_VISIBLE_DEVICES could be set."""
    args = arguments(tiny_model)
    args._n_gpu = 2  # as Trainer's own arguments would have it
    assert args.n_gpu == 1 and args.train_batch_size == train.BATCH_SIZE
