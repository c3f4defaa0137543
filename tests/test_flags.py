"""Every flag of transformers.TrainingArguments acts, or is refused by its name: none is left out."""

import os
import re
import sys
from dataclasses import MISSING, fields

import pytest
import torch
import transformers
from helpers import build_trainer, make_rows, same, save

import train_lora
from parts import run_settings
from parts.arguments import parse_flags
from parts.flags import REFUSED

ACTS = {  # seen in the weights or the log of three steps: another value, and what it needs beside it
    "per_device_train_batch_size": (2, {}),
    "num_train_epochs": (2, {"max_steps": -1}),
    "max_steps": (2, {}),
    "learning_rate": (1e-2, {}),
    "lr_scheduler_type": ("constant", {}),
    "lr_scheduler_kwargs": ({"num_cycles": 2.0}, {"lr_scheduler_type": "cosine"}),
    "warmup_steps": (2, {}),
    "optim": ("sgd", {}),
    "optim_args": ("momentum=0.9", {"optim": "sgd"}),
    "weight_decay": (0.5, {}),
    "adam_beta1": (0.5, {}),
    "adam_beta2": (0.5, {}),
    "adam_epsilon": (0.1, {}),
    "gradient_accumulation_steps": (2, {}),
    "max_grad_norm": (0.01, {"optim": "sgd"}),
    "label_smoothing_factor": (0.5, {"full_logits": True}),
    "bf16": (True, {}),
    "neftune_noise_alpha": (5.0, {}),
    "seed": (1, {}),
    "data_seed": (1, {}),
    "train_sampling_strategy": ("sequential", {}),
    "dataloader_drop_last": (True, {"max_steps": -1}),
    "logging_strategy": ("epoch", {"logging_steps": 10}),
    "logging_steps": (2, {}),
    "logging_first_step": (True, {"logging_steps": 2}),
    "include_num_input_tokens_seen": ("all", {}),
    "skip_memory_metrics": (False, {}),
    "eval_strategy": ("epoch", {}),
    "eval_steps": (1, {"eval_strategy": "steps"}),
    "eval_delay": (2, {"eval_strategy": "steps", "eval_steps": 1}),
    "eval_on_start": (True, {"eval_strategy": "steps", "eval_steps": 1}),
}
SETS = {  # seen in what the Trainer makes of it
    "run_name": ("x", lambda trainer: trainer.args.run_name == "x"),
    "log_level": ("error", lambda trainer: transformers.logging.get_verbosity() == transformers.logging.ERROR),
    "use_cpu": (True, lambda trainer: trainer.model.device.type == "cpu"),
    "full_determinism": (True, lambda trainer: torch.are_deterministic_algorithms_enabled()),
    "activation_checkpointing": (True, lambda trainer: trainer.plan.checkpoint_every == 1),
    "gradient_checkpointing": (True, lambda trainer: trainer.plan.checkpoint_every == 1),
    "save_total_limit": (7, lambda trainer: trainer.limit == 7),
    "dataloader_num_workers": (1, lambda trainer: trainer.get_train_dataloader().num_workers == 1),
}
ELSEWHERE = {
    "several processes or machines": "fsdp average_tokens_across_devices ddp_find_unused_parameters "
    "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank "
    "log_on_each_node log_level_replica",
    "a GPU": "fp16 tf32 use_liger_kernel liger_kernel_config torch_empty_cache_steps dataloader_pin_memory",
    "a compiler, for longer than a test may take": "torch_compile torch_compile_backend torch_compile_mode",
    "a process that loads data": "dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context",
    "a package that is not installed here": "optim_target_modules project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id",
    "no other value than its default": "greater_is_better",
    "the tests of saving, continuing and SwanLab": "output_dir save_strategy save_steps load_best_model_at_end "
    "metric_for_best_model resume_from_checkpoint restore_callback_states_from_checkpoint "
    "ignore_data_skip report_to disable_tqdm",
}
ELSEWHERE = {name: where for where, names in ELSEWHERE.items() for name in names.split()}
NAMES = [field.name for field in fields(transformers.TrainingArguments)]
# In examples_per_step, where the processes may share a step otherwise.
DECIDING = {*run_settings.SETTINGS, "per_device_train_batch_size"}
DECIDING |= {"gradient_accumulation_steps"}
ALIKE = ("eval_strategy", "eval_steps", "eval_delay")  # of the deciding ones, that decide which is the best checkpoint


def another(name: str):
    """A value that is not the flag's default."""
    field = train_lora.LoraArguments.__dataclass_fields__[name]
    default = field.default if field.default_factory is MISSING else None
    return not default if isinstance(default, bool) else default + 1 if isinstance(default, int) else "x"


@pytest.mark.parametrize("name", NAMES)
def test_each_flag_is_refused_or_acts(name):
    kinds = [kind for kind in (REFUSED, ACTS, SETS, ELSEWHERE) if name in kind]
    assert len(kinds) == 1, f"{name}: does it act?"
    if kinds == [REFUSED]:
        with pytest.raises(ValueError, match=f"^--{name}：{re.escape(REFUSED[name])}$"):
            train_lora.LoraArguments(report_to="none", **{name: another(name)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor：只和 --full_logits true 一起起作用"),
        (
            {"use_liger_kernel": True},
            "--use_liger_kernel：只和 --fast_kernels false 一起起作用；不写它，能用的 Liger 算子已经在用",
        ),
        ({"liger_kernel_config": {"rope": True}}, "--liger_kernel_config：只和 --use_liger_kernel 一起起作用"),
        ({"greater_is_better": True}, "--greater_is_better：这里能选的都是损失，越小越好"),
        (
            {"metric_for_best_model": "accuracy"},
            "--metric_for_best_model accuracy：只有 eval_loss、eval_token_loss",
        ),
        (
            {"load_best_model_at_end": False, "early_stopping_patience": 5},
            "--early_stopping_patience：只和 --load_best_model_at_end true 及评估一起起作用",
        ),
        (
            {"optim": "sgd", "optimizer": "kahan"},
            "--optim：只和 --optimizer optim 一起起作用，不和 --optimizer kahan",
        ),
        (
            {"optimizer": "8bit_in_backward", "max_grad_norm": 0.5},
            "--max_grad_norm：--optimizer 8bit_in_backward 不裁剪梯度",
        ),
        (
            {"project": "mine"},
            "--project：只和 --report_to trackio 一起起作用；SwanLab 的项目名用 SWANLAB_PROJECT",
        ),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": '{"a": 1}'},
            "--lr_scheduler_kwargs：constant 没有参数",
        ),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 5},
            "--warmup_steps：constant 不预热，constant_with_warmup 才预热",
        ),
        ({"eval_strategy": "no", "eval_delay": 5}, "--eval_delay：--eval_strategy no 时没有评估"),
        ({"eval_strategy": "no", "eval_samples": 2}, "--eval_samples：--eval_strategy no 时没有评估"),
        ({"eval_samples": -1}, "--eval_samples -1：要一个不小于 0 的整数"),
        (
            {"load_best_model_at_end": False, "early_stopping_patience": 0, "metric_for_best_model": "eval_token_loss"},
            "--metric_for_best_model：只和 --load_best_model_at_end true 一起起作用",
        ),
        ({"eval_strategy": "epoch", "eval_steps": 7}, "--eval_steps：--eval_strategy epoch 时不按步评估"),
        ({"eval_strategy": "epoch", "save_steps": 7}, "--save_steps：只和 --save_strategy steps 一起起作用"),
        (
            {"logging_strategy": "epoch", "logging_steps": 7},
            "--logging_steps：只和 --logging_strategy steps 一起起作用",
        ),
        (
            {"save_strategy": "epoch"},
            "--save_strategy epoch：要和 --eval_strategy 一样，或是 best，或加 --load_best_model_at_end false",
        ),
        ({"eval_steps": 2, "save_steps": 3}, "--save_steps 3：要是 --eval_steps 2 的倍数"),
        (
            {"gradient_checkpointing": True, "checkpoint_every": 0},
            "--gradient_checkpointing 和 --checkpoint_every 说的不一样；请只写 --checkpoint_every",
        ),
        ({"ddp_backend": "gloo"}, "--ddp_backend：只和 torchrun 一起起作用"),
        ({"lr_scheduler_kwargs": "{bad"}, '--lr_scheduler_kwargs：要写成 JSON，例如 {"min_lr_rate": 0.1}'),
    ],
    ids=str,
)
def test_a_flag_that_acts_only_beside_another_says_so(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train_lora.LoraArguments(report_to="none", **changes)


def test_no_samples_may_be_asked_for_where_there_is_no_evaluation():
    assert train_lora.LoraArguments(report_to="none", eval_strategy="no", eval_samples=0).eval_samples == 0


def test_a_secret_is_not_repeated():
    with pytest.raises(ValueError, match="^--hub_token：") as error:
        train_lora.LoraArguments(report_to="none", hub_token="a-secret")
    assert "a-secret" not in str(error.value)


def test_the_command_line_without_flags_gives_none(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_lora.py"])
    assert parse_flags(train_lora.LoraArguments, "").optimizer is None  # and nothing is refused


def test_every_name_is_a_flag():
    """Of this version of transformers, or of the newest that is taken."""
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}
    for names in (REFUSED, ACTS, SETS, ELSEWHERE):
        assert set(names) <= {*NAMES, *newer}
    assert not DECIDING & REFUSED.keys()


@pytest.fixture(scope="module")
def outcome(tiny_model, tokenizer, tmp_path_factory):
    """outcome(**flags): the weights after three steps with these flags, and the log but for its times."""
    file, known = save(make_rows(9), tmp_path_factory.mktemp("rows") / "rows.jsonl"), {}

    def train_with(**changes):
        if (key := str(changes)) not in known:
            folder = tmp_path_factory.mktemp("out")
            values = {"output_dir": str(folder), "eval_strategy": "no", "save_strategy": "no", "max_steps": 3}
            values |= {"num_train_epochs": 1, "load_best_model_at_end": False}
            trainer = build_trainer(tiny_model, tokenizer, file=file, **values | changes)
            trainer.train()
            logs = [{k: v for k, v in log.items() if not re.search("second|runtime|memory", k)} for log in
                    trainer.state.log_history]  # fmt: skip
            known[key] = trainer.model.state_dict(), logs
        return known[key]

    return train_with


@pytest.mark.parametrize(
    ("name", "value", "holds"),
    [(name, *rest) for name, rest in SETS.items() if name in train_lora.LoraArguments.__dataclass_fields__],
)
def test_a_flag_sets_what_it_says(workspace, tiny_model, tokenizer, monkeypatch, name, value, holds):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # full_determinism writes into it
    before = transformers.logging.get_verbosity()
    try:
        assert not holds(build_trainer(tiny_model, tokenizer)) or name == "use_cpu"
        assert holds(build_trainer(tiny_model, tokenizer, **{name: value}))
    finally:
        transformers.logging.set_verbosity(before)
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ACTS)
def test_a_flag_that_acts_is_seen_and_those_that_decide_the_weights_are_kept(outcome, name):
    value, needs = ACTS[name]
    (before, log), (after, other_log) = outcome(**needs), outcome(**needs, **{name: value})
    assert log != other_log or not same(before, after)
    if name not in ALIKE:
        assert same(before, after) == (name not in DECIDING)
