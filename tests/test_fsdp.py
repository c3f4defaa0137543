"""A model that is cut among processes (--fsdp): the gradients, the curve and the checkpoints of one process."""

import re

import pytest
import sharded_runs
import torch
from helpers import SMALL, build_model, card_arguments, on_meta, same, weights
from safetensors.torch import load_file, save_file
from sharded_runs import CPU, LORA, as_flags, has_curve_of_one, has_gradients_of_one, together
from torch.distributed.tensor import DTensor

import train
import train_lora
from parts import memory, optimizers, sharding

HERE = "tests/test_fsdp.py"


# ---- what the forked processes do ---------------------------------------------------------------------------------


def step(name: str, file: str) -> None:
    """Into `file`: weights in bfloat16 after four steps of this optimizer, whose states were saved and read between."""
    torch.distributed.init_process_group("gloo")
    first = not torch.distributed.get_rank()
    model = build_halves()
    sharding.shard(model, CPU, 2)
    for states in (None, "states.pt"):
        optimizer = take_steps(model, name, states)
        if gathered := sharding.gather_states(optimizer, first):
            torch.save(gathered, "states.pt")
        torch.distributed.barrier()
    if gathered := sharding.gather(model, first):
        save_file(gathered, file)


def build_halves():
    torch.manual_seed(0)
    return build_model(layers=1, shape=SMALL)


def take_steps(model, name: str, states: str | None, steps: int = 2):
    """The optimizer after steps with made-up gradients, the same in all processes."""
    picked = optimizers.pick(name, False, lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
    cls, options = picked or (torch.optim.AdamW, {"lr": 1e-3})
    optimizer = cls(model.parameters(), **options)
    if states:
        sharding.load_states(optimizer, states)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if isinstance(p, DTensor):
                grad = sharding.distribute(p, sharding.rows_of(p, grad))
            p.grad = grad
        optimizer.step()
    return optimizer


# ---- tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_and_evaluations_are_those_of_one_process(folder, tiny_model, tied):
    has_gradients_of_one("fsdp", folder, tiny_model, tied)


@pytest.mark.parametrize("script", ["train.py", LORA])
def test_a_cut_model_follows_the_curve_of_one_process_and_continues(workspace, tiny_model, script):
    has_curve_of_one("fsdp", workspace, tiny_model, script)


def test_a_cut_model_ends_with_its_best_weights(workspace, tiny_model):
    """The learning rate grows from 0, and ruins them."""
    ruinous = {"max_steps": 4, "eval_steps": 1, "learning_rate": 3, "lr_scheduler_type": "constant_with_warmup"}
    ruinous |= {"warmup_steps": 10, "early_stopping_patience": 9}
    [said, _] = together(
        "train.py", *as_flags("train.py", tiny_model, "fsdp", **ruinous, output_dir="run"), cwd=workspace
    )
    best = int(re.search(r"保存的权重：.*（第 (\d+) 步）", said).group(1))
    assert best < 4 and same(weights("run"), weights(f"run/checkpoint-{best}"))
    assert not same(weights("run"), weights("run/checkpoint-4"))


@pytest.mark.parametrize("name", ["kahan", "optim"])
def test_an_optimizer_of_parts_takes_the_steps_of_whole_weights(folder, name):
    together(HERE, name, "two", cwd=folder, call="step")
    model = build_halves()
    for states in (None, "one.pt"):
        torch.save(take_steps(model, name, states).state_dict(), "one.pt")
    found = load_file("two")
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all(found[name].equal(p) for name, p in model.named_parameters())


def test_a_weight_that_is_no_number_in_one_part_stops_all(folder, tiny_model):
    [said, silent] = together(sharded_runs.HERE, tiny_model, "fsdp", cwd=folder, call="ruin", status=1)
    assert "错误：到第 0 步 weights 成了 nan" in said and "错误" not in silent


def test_what_does_not_go_with_a_cut_model_is_refused(monkeypatch):
    def refused(message: str, cls=train.TrainArguments, **changes) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            cls(**{"fsdp": True, "report_to": "none"} | changes)

    refused("--fsdp：模型分给几张卡，要用 torchrun 启动")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("--fsdp full_shard：只能是 true 或 false", fsdp="full_shard")
    refused("--fsdp_config：怎样分片已经定好", fsdp_config={"version": 1})
    refused("--load_in_4bit 不能和 --fsdp 一起用", train_lora.LoraArguments, load_in_4bit=True)
    refused("--optimizer 8bit 不能和 --fsdp 一起用", optimizer="8bit")
    refused("--optimizer 8bit_in_backward 不能和 --fsdp 一起用", optimizer="8bit_in_backward")
    refused("--optim sgd 不能和 --fsdp 一起用", optim="sgd")
    for name in ("full_logits", "torch_compile", "bf16", "use_liger_kernel"):
        refused(f"--{name} 不能和 --fsdp 一起用", **{name: True})
    refused("--neftune_noise_alpha 不能和 --fsdp 一起用", neftune_noise_alpha=5.0)
    refused("--eval_samples 不能和 --fsdp 一起用", eval_samples=2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused("请去掉 accelerate launch 的 FSDP 设置")


def test_only_the_first_process_says_what_is_refused(folder):
    said, silent = together("train.py", "--fsdp", "--optimizer", "8bit", cwd=folder, status=2)
    assert said.splitlines()[-1].endswith("没有看到过它在分片的权重上算对") and not silent


def test_a_weight_with_too_few_rows_is_refused():
    with pytest.raises(SystemExit, match="错误：--fsdp 把每个权重按行分给 3 张卡，而最小的只有 4 行"):
        sharding.require_rows(torch.nn.Linear(8, 4), 3)
    sharding.require_rows(torch.nn.Linear(8, 4), 4)


@pytest.mark.parametrize("lora", [False, True])
def test_the_plan_is_that_of_one_card(lora):
    """States are shared out evenly; weights nearly so: one layer, and the output layer, are whole."""
    args = card_arguments(lora, memory_gb=140)
    model = train_lora.add_adapter(on_meta(), args) if lora else on_meta()
    one = memory.estimate(model, args, True, 2048, 1, False, "kahan", 8192)
    args.fsdp, args.sharded, args.world_size = True, "fsdp", 4
    four = memory.estimate(model, args, True, 2048, 1, False, "kahan", 8192)
    assert four["优化器"] == one["优化器"] / 4
    assert one["权重"] / 4 < four["权重"] < one["权重"] / 4 + 1.2e9
    assert sum(four.values()) < sum(one.values())
