"""Trainings of a model that is cut among two processes, by either flag, and what is asked of each of them."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import At, Started, arguments, examples, free_port, history, run_script, same, terminate, weights
from safetensors.torch import load_file, save_file

import train
import train_lora
from parts import arguments as flags_of
from parts import checkpoints, models
from parts.encoding import IGNORE_INDEX

STEPS = {"max_steps": 8, "eval_steps": 4, "logging_steps": 1, "sample_tokens": 2, "learning_rate": 1e-3}
STEPS |= {"report_to": "none", "disable_tqdm": "true", "eval_samples": 0, "lora_dropout": 0}
STEPS |= {"lora_rank": 1}  # of half of the adapter's weights the second process has nothing
HERE = "tests/sharded_runs.py"
LORA = "train_lora.py"
CPU = torch.device("cpu")


def as_flags(script: str, model, sharded: str = "", **changes) -> list[str]:
    values = STEPS | {"model_name": model} | ({sharded: "true", "per_device_train_batch_size": 2} if sharded else {})
    values |= changes
    values = {name: value for name, value in values.items() if script == LORA or not name.startswith("lora")}
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def together(script: str, *flags, cwd, status: int = 0, **more) -> list[str]:
    """What each of two processes says that are started as torchrun starts them, but forked; both end with `status`."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
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
        for name, most in {"loss": 1e-3, "grad_norm": 1e-3, "eval_loss": 1e-4, "eval_think_loss": 1e-4}.items():
            assert log.get(name, 0) == pytest.approx(expected.get(name, 0), rel=most), name
    found, wanted = weights(folder), weights(other)
    assert found.keys() == wanted.keys()
    assert all(found[name].allclose(wanted[name], atol=2e-5) for name in wanted)


def has_gradients_of_one(flag: str, folder, tiny_model, tied: bool) -> None:
    """And its evaluations: the gathered output layer's too, where it is the embedding and where it is not."""
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
    measure(str(tiny_model), "one", flag)
    together(HERE, tiny_model, "two", flag, cwd=folder, call="measure")
    one, two = load_file("one"), load_file("two")
    assert one.keys() == two.keys() and ("lm_head.weight" in one) == (not tied)
    for name, found in two.items():
        assert (found - one[name]).norm() < 1e-5 * one[name].norm(), name


PASSES = {"batch_tokens": 130, "checkpoint_every": 1}


def has_curve_of_one(flag: str, workspace, tiny_model, script: str, passes=PASSES, joins: bool = True) -> None:
    """Stopped, it goes on to the same weights, and so do one process from the checkpoints of two, and two from one's,
    to nearly the same. A rehearsal, passes and recomputed layers on the way."""
    assert run_script(script, *as_flags(script, tiny_model), "--output_dir", "one", cwd=workspace).returncode == 0
    sharded = as_flags(script, tiny_model, flag, rehearse="true", **passes)
    [said, silent] = together(script, *sharded, "--output_dir", "two", cwd=workspace)
    assert said.count("训练完成") == 1 and said.count("【问题】") == 3 and "每张卡的内存计划" in said
    assert "预演：最大的一步" in said and "评估不生成样例" in said and not silent
    follows("two", "one")
    names = {path: sorted(os.listdir(f"{path}/checkpoint-8")) for path in ("one", "two")}
    assert names["two"] == sorted({*names["one"], "rng_state_0.pth", "rng_state_1.pth"} - {"rng_state.pth"})
    config = "adapter_config.json" if script == LORA else "config.json"
    assert Path("two", config).read_text() == Path("one", config).read_text()

    together(HERE, script, *sharded, "--output_dir", "stopped", cwd=workspace, call="stop", status=143)
    assert [checkpoints.step_of(path) for path in checkpoints.find_whole("stopped")] == [4, 6]
    shutil.copytree("stopped", "parted")
    [said, _] = together(script, *sharded, "--output_dir", "stopped", cwd=workspace)
    assert "resumed from step 6" in said and same(weights("stopped"), weights("two"))
    one = run_script(script, *as_flags(script, tiny_model), "--output_dir", "parted", cwd=workspace)
    assert one.returncode == 0 and "resumed from step 6" in one.stdout, one.stdout
    follows("parted", "one")
    if not joins:
        return
    one = run_script(HERE, script, *as_flags(script, tiny_model), "--output_dir", "joined", cwd=workspace, call="stop")
    assert one.returncode == 143, one.stdout
    [said, _] = together(script, *sharded, "--output_dir", "joined", cwd=workspace)
    assert "resumed from step 6" in said
    follows("joined", "one")


# ---- what the forked processes do ---------------------------------------------------------------------------------


def make_trainer(model_path, flag: str, **changes):
    """A trainer of `examples`, of a part of the model where there are several processes."""
    import datasets

    changes |= {flag: True} if "WORLD_SIZE" in os.environ else {}
    args = arguments(model_path, output_dir="trainer", **changes)
    model = models.load_weights(str(model_path), args.device, on_cpu=bool(args.sharded))
    dataset = datasets.Dataset.from_list(examples())
    return train.build_trainer(args, model, None, dataset, dataset)


def measure(model_path: str, file: str, flag: str) -> None:
    """Into `file`: the gradients of one step over all examples, and the losses of three evaluations."""
    trainer = make_trainer(model_path, flag, batch_tokens=60)  # two passes of the first process, one of the second
    args, total = trainer.args, sum(label != IGNORE_INDEX for row in examples() for label in row["labels"][1:])
    batch = trainer.data_collator(examples()[args.process_index :: args.world_size])
    trainer.take_passes(trainer.model, batch, torch.tensor(total))
    found = {name: p.grad for name, p in trainer.model.named_parameters()}
    if args.sharded:
        held = sum(trainer.local(p).numel() for p in trainer.model.parameters())
        whole = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
        assert held == whole / 2, (held, whole)
    if args.deepspeed:
        from deepspeed.utils import safe_get_full_grad

        found = {name: safe_get_full_grad(p) for name, p in trainer.model.named_parameters()}
    if args.fsdp:
        found = {name: grad.full_tensor() for name, grad in found.items()}
    for rows in (1, 2, 3):  # fewer than processes, as many, and more
        metrics = trainer.evaluate(trainer.train_dataset.select(range(rows)))
        found[f"evaluation of {rows}"] = torch.tensor([metrics["eval_loss"], metrics["eval_token_loss"]])
    if not args.process_index:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)


def ruin(model_path: str, flag: str) -> None:
    """A weight of the second process's part is no number."""
    trainer = make_trainer(model_path, flag)
    trainer.create_optimizer_and_scheduler(4)
    if trainer.args.process_index:
        trainer.local(next(trainer.model.parameters()))[0] = float("nan")
    trainer.check_weights()


def stop(script: str, *flags) -> None:
    """A training with these flags, whose last process is asked to stop in step 6."""
    sys.argv = [script, *flags]
    lora = script == LORA
    args = flags_of.parse_flags(train_lora.LoraArguments if lora else train.TrainArguments, "")
    asked = [At(6, terminate)] if args.process_index == args.world_size - 1 else []
    train.train(args, train_lora.add_adapter if lora else None, asked)
