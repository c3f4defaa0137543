"""A model that is cut among processes (--fsdp): the gradients, the curve and the checkpoints of one process."""

import json
import re
from unittest import mock

import pytest
import sharded_runs
import torch
from helpers import QWEN, SMALL, arguments, build_model, card_arguments, on_meta, run_script, same, weights
from safetensors.torch import load_file, save_file
from sharded_runs import CPU, LORA, as_flags, has_curve_of_one, has_gradients_of_one, together
from torch.distributed.tensor import DTensor

import train
import train_lora
from parts import memory, memory_plan, models, optimizers, sharding
from parts.loss import LinearCrossEntropy
from parts.sharded_trainer import ShardedTrainer

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


def account(layers: int, tokens: int, every: int, tied: str) -> None:
    """Prints the estimate for one of four cards, and the peak by torch's own account of the real operations, on tensors
    without storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    layers, tokens, every, shape = int(layers), int(tokens), int(every), QWEN | {"tie_word_embeddings": tied == "True"}
    # It adds the two gradients of a tied embedding out of place, which torch does to such tensors alone.
    shape |= {"vocab_size": 32768} if tied == "True" else {}
    args = card_arguments()
    args.sharded, args.world_size = "fsdp", 4
    model = on_meta(layers=layers, shape=shape)
    estimate = memory.estimate(model, args, False, tokens, every, False, "kahan", tokens)
    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    mesh, kept = sharding.init_device_mesh("cpu", (4,)), []
    with FakeTensorMode(), mock.patch.object(sharding, "init_device_mesh", lambda *_: mesh):
        model = build_model(layers=layers, shape=shape)
        sharding.shard(model, CPU, 4)
        memory_plan.apply(memory_plan.Plan(tokens, every, False, "kahan", {}, 0), model)
        ids, positions = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None]
        model.get_decoder().register_forward_hook(lambda _, args, output: kept.append(output.last_hidden_state[0]))
        (tracker := MemTracker()).track_external(model)
        with tracker:
            asked = {"lengths": (tokens // 4,) * 4, "use_cache": False, "logits_to_keep": ids[0, :0]}
            model(input_ids=ids, position_ids=positions, **asked)
            LinearCrossEntropy.apply(kept.pop(), model.lm_head.weight, ids[0])[0].backward()
            [snapshot] = tracker.get_tracker_snapshot("peak").values()
    print(json.dumps([sum(estimate.values()) - memory.RESERVE_BYTES, snapshot["Total"] + estimate["优化器"]]))


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


def test_no_card_is_asked_to_hold_all(tiny_model, monkeypatch, capsys):
    """The model is read into the CPU's memory, and asked at the end only where it fits."""
    card = torch.device("meta")  # stands for a GPU
    model = models.load_weights(str(tiny_model), card, on_cpu=True)
    assert model.device == CPU and models.load_weights(str(tiny_model), card).device == card
    trainer = object.__new__(ShardedTrainer)
    trainer.model, trainer.args = model, arguments(tiny_model, output_dir=str(tiny_model))
    assert trainer.whole_model("").device == CPU
    monkeypatch.setattr(memory, "free_here", lambda device: 1.5 * model.get_memory_footprint())
    assert trainer.whole_model("") is None and "放不进一张卡，不生成" in capsys.readouterr().out


@pytest.mark.parametrize("case", [(8, 2048, 0, True), (8, 8192, 1, True), (4, 512, 1, False)], ids=str)
def test_the_plan_of_one_card_is_never_below_the_peak(folder, case):
    output = run_script(HERE, *case, cwd=folder, call="account").stdout
    estimate, found = json.loads(output.splitlines()[-1])
    assert found <= estimate <= 1.2 * found


@pytest.mark.parametrize("lora", [False, True])
def test_the_plan_is_that_of_one_card(lora):
    """States are shared out evenly; weights nearly so: one layer, and the output layer, are whole."""
    args = card_arguments(lora, memory_gb=140)
    model = train_lora.add_adapter(on_meta(), args) if lora else on_meta()
    one = memory.estimate(model, args, True, 2048, 1, False, "kahan", 8192)
    args.sharded, args.world_size = "fsdp", 4
    four = memory.estimate(model, args, True, 2048, 1, False, "kahan", 8192)
    assert four["优化器"] == one["优化器"] / 4
    assert one["权重"] / 4 < four["权重"] < one["权重"] / 4 + 1.2e9
    assert sum(four.values()) < sum(one.values())
