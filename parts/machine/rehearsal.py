"""The worst step of a training and its largest evaluation, tried before anything is written: does the plan
fit here, and how fast is it. No optimizer steps: weights, random states and the trainer are afterwards what
they were."""

import math
import time
from typing import NamedTuple

import accelerate
import torch

from parts.machine import kernels, plan
from parts.machine.plan import Plan
from parts.model.encoding import IGNORE_INDEX
from parts.terminal import is_out_of_memory
from parts.training.packing import lengths_of
from parts.training.safe_trainer import same_random_states
from parts.training.trainer import peak


class Rehearsed(NamedTuple):
    """What the worst step and the largest evaluation took."""

    peak: int  # bytes, the optimizer's states to be included
    tokens: int  # of the worst step on this device
    train_speed: float  # tokens/s, forward and backward
    eval_speed: float  # tokens/s


def settle(trainer, plans: list[Plan]) -> None:
    """Let `trainer` follow the first of `plans` whose optimizer and whose memory are seen to be right here,
    the same in all processes, and print it; without a rehearsal the memory is believed. Raises SystemExit
    where an optimizer is the reason that no plan is left, else torch.OutOfMemoryError."""
    args = trainer.args
    while plans:
        first = plans[0]
        if first.optimizer.startswith("8bit"):
            verdicts = accelerate.utils.gather_object([kernels.try_step("8bit", args.device)])
            if why := next((verdict.why for verdict in verdicts if not verdict.runs), None):
                plans = [other for other in plans if not other.optimizer.startswith("8bit")]
                if not plans:
                    raise SystemExit(f"错误：放得下的方案都要 8 位优化器（{first.optimizer}），它在这里用不了：{why}。")
                print(f"不用 8 位优化器：{why}。")
                continue
        plan.apply(first, trainer.model)
        trainer.follow(first)
        kind = "显存" if plan.is_own(args.device) else "内存"
        print(plan.describe(first, f"每张卡的{kind}" if args.fsdp else kind))
        if not args.rehearse:
            return
        rehearsed = rehearse(trainer)
        if all(accelerate.utils.gather_object([rehearsed is not None])):
            print(describe(rehearsed, trainer))
            return
        plans = [other for other in plans if other.total < first.total]
        print(f"预演：显存不足，这个方案在这里放不下{'；换一个小一些的。' if plans else '，也没有更小的了。'}")
    raise torch.OutOfMemoryError("out of memory in the rehearsal of the smallest plan")


def rehearse(trainer) -> Rehearsed | None:
    """Return what the plan that `trainer` follows took here, or None: it does not fit. Of a sharded model
    that raises the error and ends the training, in all processes."""
    device, rehearsed = trainer.args.device, None
    try:
        with same_random_states(device):
            rehearsed = measure(trainer)
    except RuntimeError as error:
        if not is_out_of_memory(error) or trainer.args.fsdp:  # the others wait for this one's part of the model
            raise
    finally:  # an error that was caught is gone by now, and with it the graph that its traceback held
        trainer.drop_gradients()
        trainer.model.eval()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return rehearsed


def measure(trainer) -> Rehearsed:
    """Take the worst step, twice, and the largest evaluation batch, beside a block of the optimizer's
    size."""
    args, data = trainer.args, trainer.train_dataset
    by_length = sorted(range(len(data)), key=lengths_of(data).__getitem__)
    batch = trainer.data_collator([data[i] for i in by_length[-args.per_device_train_batch_size :]])
    tokens, supervised = batch["input_ids"].numel(), (batch["labels"] != IGNORE_INDEX).sum().to(args.device)
    held = trainer.plan.parts["优化器"]
    if args.world_size > 1 and not args.fsdp:
        held += trainer.trained_bytes()  # DistributedDataParallel's copies of the gradients
    placeholder = torch.empty(int(held), dtype=torch.uint8, device=args.device)
    inputs = trainer._prepare_inputs(batch)
    for _ in range(2):  # the first one loads kernels
        seconds = seconds_of(args.device, trainer.take_passes, trainer.model, inputs, supervised)
        if args.gradient_accumulation_steps == 1:
            trainer.drop_gradients()
    trainer.drop_gradients()
    eval_speed = measure_evaluation(trainer)
    del placeholder
    return Rehearsed(peak(args.device), tokens, tokens / seconds, eval_speed)


def measure_evaluation(trainer) -> float:
    """Return the tokens/s of the largest evaluation batch; infinite where this process has none."""
    data = trainer.eval_dataset
    trainer.model.eval()
    batches = trainer.evaluation_batches(data)
    if not batches:
        return math.inf
    # Of a sharded model the last batches may be empty, and a pass over one is taken nevertheless.
    rows = next(filter(None, reversed(batches)), [])
    seconds = seconds_of(trainer.args.device, trainer.evaluate_rows, data, rows)
    return sum(len(data[i]["input_ids"]) for i in rows) / seconds if rows else math.inf


def seconds_of(device: torch.device, run, *args) -> float:
    """Return how long `run(*args)` takes, until the device has done all that it was asked for."""
    backend = torch.get_device_module(device)
    backend.synchronize()
    begin = time.perf_counter()
    run(*args)
    backend.synchronize()
    return time.perf_counter() - begin


def seconds_of_run(rehearsed: Rehearsed, trainer) -> float:
    """Estimate, from above, the whole training and its evaluations, without optimizer steps and saving."""
    args, data = trainer.args, trainer.train_dataset
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(len(data) / args.examples_per_step) * args.num_train_epochs
    tokens = sum(lengths_of(data)) / len(data) * args.examples_per_step * steps
    eval_tokens = sum(lengths_of(trainer.eval_dataset)) * steps / args.eval_steps
    seconds = tokens / rehearsed.train_speed + eval_tokens / rehearsed.eval_speed  # x / inf is 0
    return seconds / args.world_size


def describe(rehearsed: Rehearsed, trainer) -> str:
    """Return what a rehearsal showed, in a few words."""
    minutes = math.ceil(seconds_of_run(rehearsed, trainer) / 60)
    return (
        f"预演：最大的一步（{rehearsed.tokens} 个 token）和评估都放得下，峰值 {rehearsed.peak / 1e9:.2f} GB"
        f"（估算 {trainer.plan.total / 1e9:.2f}）。"
        f"每秒 {rehearsed.train_speed:,.0f} 个 token，整个训练最多约 {minutes} 分钟，不算优化器、样例和保存。"
    )
