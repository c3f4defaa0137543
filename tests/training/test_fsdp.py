"""A model that is cut among processes (--fsdp): the gradients, the curve and the checkpoints of one
process."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import helpers
import pytest
import torch
from helpers import as_flags, build_model, card_arguments, history, on_meta, run_script, same, together, weights
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import train
import train_lora
from parts.machine import plan
from parts.model.encoding import IGNORE_INDEX
from parts.model.weights import load_weights
from parts.run import checkpoints
from parts.training import flags as flags_of
from parts.training import optimizers, sharding
from parts.training.packing import LinearCrossEntropy

HERE = "tests/training/test_fsdp.py"
LORA = "train_lora.py"
CPU = torch.device("cpu")
STEPS = dict(max_steps=8, eval_steps=4, save_steps=4, logging_steps=1, sample_tokens=2, learning_rate=1e-3)
STEPS |= {"report_to": "none"}
ADAPTER = {"lora_dropout": 0, "lora_rank": 1}  # of half of the adapter's weights the second process has nothing
# With passes and recomputed layers on the way
SHARDED = {"fsdp": "true", "per_device_train_batch_size": 2, "batch_tokens": 130, "checkpoint_every": 1}


def flags(script: str, model, output_dir: str, **changes) -> list[str]:
    adapter = ADAPTER if script == LORA else {}
    return as_flags({"model_name": model, "output_dir": output_dir} | STEPS | adapter | changes)


# ---- what the forked processes do ------------------------------------------------------------------------


def make_trainer(model_path, **changes):
    """A trainer of `examples`, of a part of the model where there are several processes."""
    import datasets

    args = helpers.arguments(model_path, output_dir="trainer", fsdp="WORLD_SIZE" in os.environ, **changes)
    model = load_weights(str(model_path), args.device, on_cpu=args.fsdp)
    dataset = datasets.Dataset.from_list(helpers.examples())
    return train.build_trainer(args, model, None, dataset, dataset)


def measure(model_path: str, file: str) -> None:
    """Into `file`: the gradients of one step over all examples, and the losses of three evaluations."""
    trainer = make_trainer(model_path, batch_tokens=60)  # two passes of the first process, one of the second
    args, total = trainer.args, sum(label != IGNORE_INDEX for row in helpers.examples() for label in row["labels"][1:])
    batch = trainer.data_collator(helpers.examples()[args.process_index :: args.world_size])
    trainer.training_step(trainer.model, batch, torch.tensor(total))
    measured = {}
    for name, p in trainer.model.named_parameters():
        assert not args.fsdp or p.to_local().numel() == p.numel() / 2
        measured[name] = p.grad.full_tensor() if args.fsdp else p.grad
    for rows in (1, 2, 3):  # fewer than processes, as many, and more
        metrics = trainer.evaluate(trainer.train_dataset.select(range(rows)))
        measured[f"evaluation of {rows}"] = torch.tensor([metrics["eval_loss"], metrics["eval_token_loss"]])
    if not args.process_index:
        save_file({name: tensor.contiguous() for name, tensor in measured.items()}, file)


def ruin(model_path: str) -> None:
    """A weight of the second process's part is no number."""
    trainer = make_trainer(model_path)
    if trainer.args.process_index:
        next(trainer.model.parameters()).detach().to_local()[0] = float("nan")
    trainer.create_optimizer_and_scheduler(4)
    trainer.check_weights()


def stop(script: str, *flags) -> None:
    """A training with these flags, whose last process is asked to stop in step 6."""
    sys.argv = [script, *flags]
    module, add_adapter = (train_lora, train_lora.add_adapter) if script == LORA else (train, None)
    args = module.arguments(**flags_of.parse("", module.RECIPE))
    asked = [helpers.At(6, helpers.terminate)] if args.process_index == args.world_size - 1 else []
    train.train(args, add_adapter, asked)


def step(file: str) -> None:
    """Into `file`: weights in bfloat16 after twice two steps with Kahan sums, whose states were saved and read
    between."""
    torch.distributed.init_process_group("gloo")
    first = not torch.distributed.get_rank()
    model = build_halves()
    sharding.shard(model, CPU, 2)
    optimizer = kahan(model)
    parts = sharding.step_on_rows(optimizer)
    gathered = sharding.gather_states(take_steps(model, optimizer), parts, first)
    assert all(p.grad is None for p in optimizer.param_groups[0]["params"])  # else a step's gradients would stay
    if first:
        torch.save(gathered, "states.pt")
    torch.distributed.barrier()
    optimizer = kahan(model)
    sharding.load_states(optimizer, sharding.step_on_rows(optimizer), "states.pt")
    take_steps(model, optimizer)
    gathered = sharding.collect(sharding.trained_of(model), first)
    if first:
        save_file(gathered, file)


def build_halves():
    torch.manual_seed(0)
    return build_model(layers=1, shape=helpers.SMALL)


def kahan(model):
    cls, options = optimizers.pick("kahan", False, lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
    return cls(model.parameters(), **options)


def take_steps(model, optimizer):
    """The optimizer after two steps with made-up gradients, the same in all processes."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = sharding.cut(p, grad) if isinstance(p, DTensor) else grad
        optimizer.step()
    return optimizer


def account(layers: int, tokens: int, every: int, tied: str) -> None:
    """Prints the estimate for one of four cards, and the peak by torch's own account of the real operations,
    on tensors without storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    layers, tokens, every = int(layers), int(tokens), int(every)
    shape = helpers.QWEN | {"tie_word_embeddings": tied == "True"}
    # It adds the two gradients of a tied embedding out of place, which torch does to such tensors alone.
    shape |= {"vocab_size": 32768} if tied == "True" else {}
    args = card_arguments()
    args.fsdp, args.world_size = True, 4
    model = on_meta(layers=layers, shape=shape)
    estimate = plan.estimate(model, args, False, tokens, every, False, "kahan", tokens)
    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    mesh, kept = sharding.init_device_mesh("cpu", (4,)), []
    with FakeTensorMode(), mock.patch.object(sharding, "init_device_mesh", lambda *_: mesh):
        model = build_model(layers=layers, shape=shape)
        sharding.shard(model, CPU, 4)
        plan.apply(plan.Plan(tokens, every, False, "kahan", {}, 0), model)
        ids, positions = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None]
        model.get_decoder().register_forward_hook(lambda _, args, output: kept.append(output.last_hidden_state[0]))
        (tracker := MemTracker()).track_external(model)
        with tracker:
            asked = {"lengths": (tokens // 4,) * 4, "use_cache": False, "logits_to_keep": ids[0, :0]}
            model(input_ids=ids, position_ids=positions, **asked)
            LinearCrossEntropy.apply(kept.pop(), model.lm_head.weight, ids[0])[0].backward()
            [snapshot] = tracker.get_tracker_snapshot("peak").values()
    print(json.dumps([sum(estimate.values()) - plan.RESERVE_BYTES, snapshot["Total"] + estimate["优化器"]]))


# ---- tests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_and_evaluations_are_those_of_one_process(folder, tiny_model, tied):
    """The gathered output layer's too, where it is the embedding and where it is not."""
    if not tied:
        model = load_weights(str(tiny_model), CPU)
        model.config.tie_word_embeddings = False
        shutil.copytree(tiny_model, "untied")
        type(model)(model.config).save_pretrained("untied")
        tiny_model = "untied"
    measure(str(tiny_model), "one")
    together(HERE, tiny_model, "two", cwds=[folder] * 2, call="measure")
    one, two = load_file("one"), load_file("two")
    assert one.keys() == two.keys() and ("lm_head.weight" in one) == (not tied)
    for name, tensor in two.items():
        assert (tensor - one[name]).norm() < 1e-5 * one[name].norm(), name


def follows(folder: str, other: str) -> None:
    """Both runs have the same curve, and nearly the same weights at the end."""
    logs, others = history(folder), history(other)
    assert len(logs) == len(others) > 3
    for log, expected in zip(logs, others):
        assert log.keys() == expected.keys()
        for name, most in {"loss": 1e-3, "grad_norm": 1e-3, "eval_loss": 1e-4}.items():
            assert log.get(name, 0) == pytest.approx(expected.get(name, 0), rel=most), name
    saved, wanted = weights(folder), weights(other)
    assert saved.keys() == wanted.keys() and all(saved[name].allclose(wanted[name], atol=2e-5) for name in wanted)


@pytest.mark.parametrize("script", ["train.py", LORA])
def test_a_cut_model_follows_the_curve_of_one_process_and_continues(workspace, tiny_model, script):
    """Stopped, it goes on to the same weights, and so do one process from the checkpoints of two, and two
    from one's, to nearly the same."""

    def one(name: str, *script, status: int = 0, **more) -> str:
        ended = run_script(*script, *flags(script[-1], tiny_model, name), cwd=workspace, **more)
        assert ended.returncode == status, ended.stdout
        return ended.stdout

    def two(name: str, *script, rehearse: str = "false", **more) -> list[str]:
        values = flags(script[-1], tiny_model, name, rehearse=rehearse, **SHARDED)
        return together(*script, *values, cwds=[workspace] * 2, **more)

    one("one", script)
    [said, silent] = two("two", script, rehearse="true")
    assert said.count("训练完成") == 1 and "提问：python" in said and "【问题】" not in said and not silent
    assert "每张卡的内存计划" in said and "预演：最大的一步" in said
    follows("two", "one")
    names = {path: sorted(os.listdir(f"{path}/checkpoint-8")) for path in ("one", "two")}
    assert names["two"] == sorted({*names["one"], "rng_state_0.pth", "rng_state_1.pth"} - {"rng_state.pth"})
    config = "adapter_config.json" if script == LORA else "config.json"
    assert Path("two", config).read_text() == Path("one", config).read_text()

    two("stopped", HERE, script, call="stop", status=143)
    assert [checkpoints.step_of(path) for path in checkpoints.find_intact("stopped")] == [4, 6]
    shutil.copytree("stopped", "parted")
    assert "resumed from step 6" in two("stopped", script)[0] and same(weights("stopped"), weights("two"))
    assert "resumed from step 6" in one("parted", script)
    follows("parted", "one")
    if script != LORA:  # an adapter of one process is the same files as one of two
        one("joined", HERE, script, call="stop", status=143)
        assert "resumed from step 6" in two("joined", script)[0]
        follows("joined", "one")


def test_a_cut_model_ends_with_its_best_weights(workspace, tiny_model):
    """The learning rate grows from 0, and ruins them. They are kept in memory, by each process its part, and written as
    weights alone beside the checkpoint that follows."""
    ruinous = {"max_steps": 4, "eval_steps": 1, "learning_rate": 3, "lr_scheduler_type": "constant_with_warmup"}
    ruinous |= {"warmup_steps": 10, "early_stopping_patience": 9}
    two = flags("train.py", tiny_model, "run", **SHARDED, **ruinous)
    [said, _] = together("train.py", *two, cwds=[workspace] * 2)
    best = int(re.search(r"保存的权重：.*（第 (\d+) 步）", said).group(1))
    assert best < 4 and same(weights("run"), weights(f"run/checkpoint-{best}"))
    assert not Path(f"run/checkpoint-{best}/optimizer.pt").exists()
    assert not same(weights("run"), weights("run/checkpoint-4"))


def test_an_optimizer_of_parts_takes_the_steps_of_whole_weights(folder):
    together(HERE, "two", cwds=[folder] * 2, call="step")
    model = build_halves()
    take_steps(model, take_steps(model, kahan(model)))
    assert same(load_file("two"), sharding.trained_of(model))


def test_a_weight_that_is_no_number_in_one_part_stops_all(folder, tiny_model):
    [said, silent] = together(HERE, tiny_model, cwds=[folder] * 2, call="ruin", status=1)
    assert "错误：到第 0 步 weights 成了 nan" in said and "错误" not in silent


def test_what_does_not_go_with_a_cut_model_is_refused(monkeypatch):
    helpers.refused("--fsdp：模型分给几张卡，要用 torchrun 启动~", flags_of.check, {"fsdp": True})
    for name, value in {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    for name, value in {"load_in_4bit": True, "optimizer": "8bit"}.items():
        helpers.refused(f"--{name}~ 不能和 --fsdp 一起用。", flags_of.check, {"fsdp": True, name: value})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    helpers.refused("请去掉 accelerate launch 的 --use_fsdp~", flags_of.check, {"fsdp": True})


def test_a_model_that_will_be_cut_is_read_into_the_memory_of_the_cpu(tiny_model):
    card = torch.device("meta")  # stands for a GPU
    assert load_weights(str(tiny_model), card).device == card
    assert load_weights(str(tiny_model), card, on_cpu=True).device == CPU


@pytest.mark.parametrize("case", [(8, 2048, 0, True), (4, 8192, 1, True), (2, 512, 1, False)], ids=str)
def test_the_plan_of_one_card_is_never_below_the_peak(folder, case):
    output = run_script(HERE, *case, cwd=folder, call="account").stdout
    estimate, peak = json.loads(output.splitlines()[-1])
    assert peak <= estimate <= 1.2 * peak
