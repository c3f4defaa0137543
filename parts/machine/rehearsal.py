"""The worst step of a training and its largest evaluation, tried before anything is written: does the plan
fit here, and how fast is it. No optimizer steps: weights, random states and the trainer are afterwards what
they were."""

import math
import time

import accelerate
import torch

from parts.machine import kernels, plan
from parts.machine.plan import Plan
from parts.model.encoding import IGNORE_INDEX
from parts.terminal import is_out_of_memory
from parts.training.packing import lengths_of
from parts.training.safe_trainer import SAVING, evaluation_steps, same_random_states
from parts.training.trainer import peak


def settle(trainer, plans: list[Plan]) -> None:
    """Let `trainer` follow the first of `plans` whose optimizer and whose memory are seen to be right here,
    the same in all processes, and print it; without a rehearsal the memory is believed. Raises SystemExit
    where an optimizer is the reason that no plan is left, else torch.OutOfMemoryError."""
    args = trainer.args
    while plans:
        first = plans[0]
        if first.optimizer.startswith("8bit") and (problem := problem_of_8bit(args.device)):
            plans = [other for other in plans if not other.optimizer.startswith("8bit")]
            if not plans:
                needed = f"放得下的方案都需要 8 位优化器（{first.optimizer}）"
                raise SystemExit(f"错误：{needed}，而它在这里用不了：{problem}。")
            print(f"8 位优化器在这里用不了：{problem}。")
            continue
        plan.apply(first, trainer.model)
        trainer.follow(first)
        kind = "显存" if plan.has_own_memory(args.device) else "内存"
        print(plan.describe(first, f"每张卡的{kind}" if args.fsdp else kind))
        if not args.rehearse:
            return
        rehearsed = rehearse(trainer)
        # Where one process has no room all go on to the next plan, as they train by the same one.
        if all(accelerate.utils.gather_object([rehearsed is not None])):
            print(rehearsed)
            return
        # A later rung may be larger than the one that failed, and would fail too.
        plans = [other for other in plans if other.total < first.total]
        print(f"预演：{kind}不足，放不下这个方案；{'换一个更小的。' if plans else '没有更小的方案了。'}")
    raise torch.OutOfMemoryError("out of memory in the rehearsal of the smallest plan")


def problem_of_8bit(device: torch.device) -> str | None:
    """Return why 8-bit steps do not run in one of the processes, or None where they run in all."""
    for verdict in accelerate.utils.gather_object([kernels.try_step("8bit", device)]):
        if not verdict.runs:
            return verdict.why
    return None


def rehearse(trainer) -> str | None:
    """Return what the plan that `trainer` follows took here, in a few words, or None where it does not fit.
    A sharded model raises the error instead, which ends the training in all processes."""
    device = trainer.args.device
    try:
        with same_random_states(device):
            return measure(trainer)
    except RuntimeError as error:
        # Of a sharded model the others still wait for this process's part.
        if not is_out_of_memory(error) or trainer.args.fsdp:
            raise
    finally:
        # An error that was caught is gone by now, and with it the graph that its traceback held.
        trainer.drop_gradients()
        trainer.model.eval()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def measure(trainer) -> str:
    """Take the worst step and one of mean length, each twice, and the largest evaluation batch, beside a
    block of the optimizer's size. Returns what was seen, in a few words."""
    args, data = trainer.args, trainer.train_dataset
    lengths, size = lengths_of(data), args.per_device_train_batch_size
    mean = sum(lengths) / len(lengths)
    # It stands for the optimizer's states, which are made in its first step; that would change the weights.
    held = trainer.plan.parts["优化器"]
    if args.world_size > 1 and not args.fsdp:
        held += trainer.trained_bytes()  # DistributedDataParallel's copies of the gradients
    placeholder = torch.empty(int(held), dtype=torch.uint8, device=args.device)
    worst = sorted(range(len(data)), key=lengths.__getitem__)[-size:]
    usual = sorted(range(len(data)), key=lambda i: abs(lengths[i] - mean))[:size]
    for rows in (worst, usual):
        batch = trainer.data_collator([data[i] for i in rows])
        supervised = (batch["labels"] != IGNORE_INDEX).sum().to(args.device)
        inputs = trainer._prepare_inputs(batch)
        for _ in range(2):  # the first one loads kernels
            seconds = seconds_of(args.device, trainer.training_step, trainer.model, inputs, supervised)
            # Where a step is several passes, the second one adds to the gradients of the first.
            if args.gradient_accumulation_steps == 1:
                trainer.drop_gradients()
        trainer.drop_gradients()
    trainer.model.eval()
    eval_seconds = 0.0  # where this process has no rows
    if batches := trainer.evaluation_batches(trainer.eval_dataset):
        # Of a sharded model the last batches may be empty, and a pass over one is taken nevertheless.
        rows = next(filter(None, reversed(batches)), [])
        eval_seconds = seconds_of(args.device, trainer.evaluate_rows, trainer.eval_dataset, rows)
    del placeholder
    memory = f"峰值 {peak(args.device) / 1e9:.2f} GB（估算 {trainer.plan.total / 1e9:.2f}）"
    fits = f"预演：最大的一步（{sum(lengths[i] for i in worst)} 个 token）和评估都放得下，{memory}。"
    if args.check and args.device.type == "cpu":  # the model is shrunk there: its speed tells nothing
        return fits
    speed = batch["input_ids"].numel() / seconds
    trainer.promised = speed * args.world_size
    minutes = math.ceil(seconds_of_run(trainer, seconds, eval_seconds * len(batches)) / 60)
    takes = f"每秒 {speed:,.0f} 个 token，整个训练约 {minutes} 分钟"
    return f"{fits}{takes}，含评估，保存按 {SAVING:.0%} 计，不含优化器和样例。"


def seconds_of(device: torch.device, run, *args) -> float:
    """Return how long `run(*args)` takes, until the device has done all that it was asked for."""
    backend = torch.get_device_module(device)
    # A GPU works on after the call that asked for it: without waiting one would time the asking.
    backend.synchronize()
    begin = time.perf_counter()
    run(*args)
    backend.synchronize()
    return time.perf_counter() - begin


def seconds_of_run(trainer, seconds: float, eval_seconds: float) -> float:
    """Estimate the whole training with its evaluations and saving, without optimizer steps, from the seconds
    of a device's share of a step and of an evaluation."""
    args = trainer.args
    steps = args.max_steps
    if steps <= 0:  # Trainer's word for: as many as the epochs have
        steps = math.ceil(len(trainer.train_dataset) / args.examples_per_step) * args.num_train_epochs
    evaluating = steps / evaluation_steps(args, steps) * eval_seconds
    return (steps * args.gradient_accumulation_steps * seconds + evaluating) * (1 + SAVING)
