"""A model that is cut among processes (--fsdp): the gradients, the curve and the checkpoints of one process."""

import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import (
    QWEN,
    SMALL,
    At,
    Started,
    arguments,
    build_model,
    card_arguments,
    examples,
    history,
    on_meta,
    run_script,
    same,
    terminate,
    weights,
)
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import train
import train_lora
from parts import arguments as flags_of
from parts import checkpoints, memory, memory_plan, models, optimizers, sharding
from parts.encoding import IGNORE_INDEX
from parts.loss import LinearCrossEntropy
from parts.sharded_trainer import ShardedTrainer

STEPS = {"max_steps": 12, "eval_steps": 4, "logging_steps": 1, "sample_tokens": 2, "learning_rate": 1e-3}
STEPS |= {"report_to": "none", "disable_tqdm": "true", "eval_samples": 0, "lora_dropout": 0}
STEPS |= {"lora_rank": 1}  # of half of the adapter's weights the second process has nothing
HERE = "tests/test_fsdp.py"
LORA = "train_lora.py"
CPU = torch.device("cpu")


def as_flags(script: str, model, sharded: bool = False, **changes) -> list[str]:
    values = STEPS | {"model_name": model} | changes
    values |= {"fsdp": "true", "per_device_train_batch_size": 2} if sharded else {}
    values = {name: value for name, value in values.items() if script == LORA or not name.startswith("lora")}
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def together(script: str, *flags, cwd, status: int = 0, **more) -> list[str]:
    """What each of two processes says that are started as torchrun starts them, but forked; both end with `status`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    both = [Started(script, flags, cwd, env, **more) for env in ranks]
    ends = [process.wait(60) for process in both]
    assert ends == [status] * 2, "\n".join(process.stdout for process in both)
    return [process.stdout for process in both]


def follows(folder: str, other: str) -> None:
    """Both runs have the same curve, and nearly the same weights at the end."""
    logs, others = history(folder), history(other)
    assert [set(log) for log in logs] == [set(log) for log in others] and len(logs) > 3
    for log, expected in zip(logs, others):
        for name, most in {"loss": 1e-3, "grad_norm": 1e-3, "eval_loss": 1e-4, "eval_clean_think_loss": 1e-4}.items():
            assert log.get(name, 0) == pytest.approx(expected.get(name, 0), rel=most), name
    found, wanted = weights(folder), weights(other)
    assert found.keys() == wanted.keys()
    assert all(found[name].allclose(wanted[name], atol=2e-5) for name in wanted)


# ---- what the forked processes do ---------------------------------------------------------------------------------


def make_trainer(model_path, **changes):
    """A trainer of `examples`, of a part of the model where there are several processes."""
    import datasets

    args = arguments(model_path, fsdp="WORLD_SIZE" in os.environ, output_dir="trainer", **changes)
    model = models.load_weights(str(model_path), args.device, on_cpu=args.fsdp)
    dataset = datasets.Dataset.from_list(examples())
    return train.build_trainer(args, model, None, dataset, dataset)


def measure(model_path: str, file: str) -> None:
    """Into `file`: the gradients of one step over all examples, and the losses of three evaluations."""
    trainer = make_trainer(model_path, batch_tokens=60)  # two passes of the first process, one of the second
    args, total = trainer.args, sum(label != IGNORE_INDEX for row in examples() for label in row["labels"][1:])
    batch = trainer.data_collator(examples()[args.process_index :: args.world_size])
    trainer.take_passes(trainer.model, batch, torch.tensor(total))
    found = {name: p.grad for name, p in trainer.model.named_parameters()}
    if args.fsdp:
        held, of = (sum(each(p).numel() for p in trainer.model.parameters()) for each in (sharding.local, lambda p: p))
        assert held == of / 2, (held, of)
        found = {name: grad.full_tensor() for name, grad in found.items()}
    for rows in (1, 2, 3):  # fewer than processes, as many, and more
        metrics = trainer.evaluate(trainer.train_dataset.select(range(rows)))
        found[f"evaluation of {rows}"] = torch.tensor([metrics["eval_loss"], metrics["eval_token_loss"]])
    if not args.process_index:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)


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


def ruin(model_path: str) -> None:
    """A weight of the second process's part is no number."""
    trainer = make_trainer(model_path)
    trainer.create_optimizer_and_scheduler(4)
    if trainer.args.process_index:
        sharding.local(next(trainer.model.parameters()))[0] = float("nan")
    trainer.check_weights()


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
    args.fsdp, args.world_size = True, 4
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


def stop(script: str, *flags) -> None:
    """A training with these flags, whose last process is asked to stop in step 6."""
    sys.argv = [script, *flags]
    lora = script == LORA
    args = flags_of.parse_flags(train_lora.LoraArguments if lora else train.TrainArguments, "")
    asked = [At(6, terminate)] if args.process_index == args.world_size - 1 else []
    train.train(args, train_lora.add_adapter if lora else None, asked)


# ---- tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_and_evaluations_are_those_of_one_process(folder, tiny_model, tied):
    """The gathered output layer's too, where it is the embedding and where it is not."""
    if not tied:
        model = models.load_weights(str(tiny_model), CPU)
        model.config.tie_word_embeddings = False
        untied = type(model)(model.config)
        untied.load_state_dict(model.state_dict())
        with torch.no_grad():
            untied.lm_head.weight.mul_(-2)
        shutil.copytree(tiny_model, "untied")
        untied.save_pretrained("untied")
        assert "lm_head.weight" in weights("untied")
        tiny_model = "untied"
    measure(str(tiny_model), "one")
    together(HERE, tiny_model, "two", cwd=folder, call="measure")
    one, two = load_file("one"), load_file("two")
    assert one.keys() == two.keys() and ("lm_head.weight" in one) == (not tied)
    for name, found in two.items():
        assert (found - one[name]).norm() < 1e-5 * one[name].norm(), name


@pytest.mark.parametrize("script", ["train.py", LORA])
def test_a_cut_model_follows_the_curve_of_one_process_and_continues(workspace, tiny_model, script):
    """Stopped, it goes on to the same weights, and so do one process from the checkpoints of two, and two from one's,
    to nearly the same. A rehearsal, passes and recomputed layers on the way."""
    assert run_script(script, *as_flags(script, tiny_model), "--output_dir", "one", cwd=workspace).returncode == 0
    sharded = as_flags(script, tiny_model, True, batch_tokens=130, checkpoint_every=1, rehearse="true")
    [said, silent] = together(script, *sharded, "--output_dir", "two", cwd=workspace)
    assert said.count("训练完成") == 1 and said.count("【问题】") == 3 and "每张卡的内存计划" in said
    assert "预演：最大的一步" in said and "评估不生成样例" in said and not silent
    follows("two", "one")
    names = {path: sorted(os.listdir(f"{path}/checkpoint-12")) for path in ("one", "two")}
    assert names["two"] == sorted({*names["one"], "rng_state_0.pth", "rng_state_1.pth"} - {"rng_state.pth"})
    config = "adapter_config.json" if script == LORA else "config.json"
    assert Path("two", config).read_text() == Path("one", config).read_text()

    together(HERE, script, *sharded, "--output_dir", "stopped", cwd=workspace, call="stop", status=143)
    assert [checkpoints.step_of(path) for path in checkpoints.find_whole("stopped")] == [4, 6]
    one = run_script(HERE, script, *as_flags(script, tiny_model), "--output_dir", "alone", cwd=workspace, call="stop")
    assert one.returncode == 143, one.stdout
    for source, copy in (("stopped", "parted"), ("alone", "joined")):
        shutil.copytree(source, copy)
    [said, _] = together(script, *sharded, "--output_dir", "stopped", cwd=workspace)
    assert "resumed from step 6" in said and same(weights("stopped"), weights("two"))
    [said, _] = together(script, *sharded, "--output_dir", "joined", cwd=workspace)
    assert "resumed from step 6" in said
    one = run_script(script, *as_flags(script, tiny_model), "--output_dir", "parted", cwd=workspace)
    assert one.returncode == 0 and "resumed from step 6" in one.stdout, one.stdout
    follows("joined", "one")
    follows("parted", "one")


def test_a_cut_model_ends_with_its_best_weights(workspace, tiny_model):
    """The learning rate grows from 0, and ruins them."""
    ruinous = {"max_steps": 4, "eval_steps": 1, "learning_rate": 3, "lr_scheduler_type": "constant_with_warmup"}
    ruinous |= {"warmup_steps": 10, "early_stopping_patience": 9}
    [said, _] = together(
        "train.py", *as_flags("train.py", tiny_model, True, **ruinous, output_dir="run"), cwd=workspace
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
    [said, silent] = together(HERE, tiny_model, cwd=folder, call="ruin", status=1)
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
    args.fsdp, args.world_size = True, 4
    four = memory.estimate(model, args, True, 2048, 1, False, "kahan", 8192)
    assert four["优化器"] == one["优化器"] / 4
    assert one["权重"] / 4 < four["权重"] < one["权重"] / 4 + 1.2e9
    assert sum(four.values()) < sum(one.values())
