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
from parts.training.safe_trainer import same_random_states
from parts.training.trainer import peak


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
                    raise SystemExit(
                        f"错误：放得下的方案都要 8 位优化器（{first.optimizer}），它在这里用不了：{why}。"
                    )
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
            print(rehearsed)
            return
        plans = [other for other in plans if other.total < first.total]
        print(
            f"预演：显存不足，这个方案在这里放不下{'；换一个小一些的。' if plans else '，也没有更小的了。'}"
        )
    raise torch.OutOfMemoryError("out of memory in the rehearsal of the smallest plan")


def rehearse(trainer) -> str | None:
    """Return what the plan that `trainer` follows took here, or None: it does not fit. Of a sharded model
    that raises the error and ends the training, in all processes."""
    device = trainer.args.device
    try:
        with same_random_states(device):
            return measure(trainer)
    except RuntimeError as error:
        if (
            not is_out_of_memory(error) or trainer.args.fsdp
        ):  # the others wait for this one's part of the model
            raise
    finally:  # an error that was caught is gone by now, and with it the graph that its traceback held
        trainer.drop_gradients()
        trainer.model.eval()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def measure(trainer) -> str:
    """Take the worst step, twice, and the largest evaluation batch, beside a block of the optimizer's
    size. Returns what was seen, in a few words."""
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
        seconds = seconds_of(args.device, trainer.training_step, trainer.model, inputs, supervised)
        if args.gradient_accumulation_steps == 1:
            trainer.drop_gradients()
    trainer.drop_gradients()
    trainer.model.eval()
    eval_speed = math.inf  # where this process has no rows
    if batches := trainer.evaluation_batches(trainer.eval_dataset):
        # Of a sharded model the last batches may be empty, and a pass over one is taken nevertheless.
        rows = next(filter(None, reversed(batches)), [])
        eval_seconds = seconds_of(args.device, trainer.evaluate_rows, trainer.eval_dataset, rows)
        if rows:
            eval_speed = sum(len(trainer.eval_dataset[i]["input_ids"]) for i in rows) / eval_seconds
    del placeholder
    minutes = math.ceil(seconds_of_run(trainer, tokens / seconds, eval_speed) / 60)
    memory = f"峰值 {peak(args.device) / 1e9:.2f} GB（估算 {trainer.plan.total / 1e9:.2f}）"
    speed = f"每秒 {tokens / seconds:,.0f} 个 token，整个训练最多约 {minutes} 分钟，不算优化器、样例和保存"
    return f"预演：最大的一步（{tokens} 个 token）和评估都放得下，{memory}。{speed}。"


def seconds_of(device: torch.device, run, *args) -> float:
    """Return how long `run(*args)` takes, until the device has done all that it was asked for."""
    backend = torch.get_device_module(device)
    backend.synchronize()
    begin = time.perf_counter()
    run(*args)
    backend.synchronize()
    return time.perf_counter() - begin


def seconds_of_run(trainer, train_speed: float, eval_speed: float) -> float:
    """Estimate, from above, the whole training and its evaluations, without optimizer steps and saving. The
    speeds, of one device, are in tokens/s."""
    args, data = trainer.args, trainer.train_dataset
    epoch = math.ceil(len(data) / args.examples_per_step)  # steps
    steps = args.max_steps if args.max_steps > 0 else epoch * args.num_train_epochs
    tokens = sum(lengths_of(data)) / len(data) * args.examples_per_step * steps
    eval_tokens = sum(lengths_of(trainer.eval_dataset)) * steps / args.eval_steps
    # A speed may be infinite.
    return (tokens / train_speed + eval_tokens / eval_speed) / args.world_size
