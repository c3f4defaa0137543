"""The worst step of a training and its largest evaluation, tried before anything is written: does the plan fit here,
and how fast is it. No optimizer steps: weights, random states and the trainer are afterwards what they were."""

import math
import time
from typing import NamedTuple

import accelerate
import torch

from parts.machine import memory, proof
from parts.machine import plan as memory_plan
from parts.model.encoding import IGNORE_INDEX
from parts.terminal import is_out_of_memory
from parts.training.packing import lengths_of
from parts.training.safe_trainer import same_random_states


class Rehearsed(NamedTuple):
    """What the worst step and the largest evaluation took."""

    peak: int  # bytes, the optimizer's states to be included
    tokens: int  # of the worst step on this device
    train_speed: float  # tokens/s, forward and backward
    eval_speed: float  # tokens/s


def settle(trainer, plans: list[memory_plan.Plan]) -> Rehearsed | None:
    """Let `trainer` follow the first of `plans` whose optimizer and whose memory are seen to be right here, the same in
    all processes, and print it. None without a rehearsal. Raises SystemExit where an optimizer is the reason that no
    plan is left, else torch.OutOfMemoryError."""
    args = trainer.args
    while plans:
        plan = plans[0]
        if why := next(filter(None, accelerate.utils.gather_object([missing_optimizer(plan, args.device)])), None):
            plans = [other for other in plans if not other.optimizer.startswith("8bit")]
            if not plans:
                raise SystemExit(f"错误：放得下的方案都要 8 位优化器（{plan.optimizer}），它在这里用不了：{why}。")
            print(f"不用 8 位优化器：{why}。")
            continue
        trainer.follow(plan)
        kind = "显存" if memory.is_own(args.device) else "内存"
        print(memory_plan.describe(plan, f"每张卡的{kind}" if args.fsdp else kind))
        if not args.rehearse:
            return None
        found = rehearse(trainer)
        if all(accelerate.utils.gather_object([found is not None])):
            print(describe(found, trainer))
            return found
        plans = [other for other in plans if other.total < plan.total]
        print(f"预演：显存不足，这个方案在这里放不下{'；换一个小一些的。' if plans else '，也没有更小的了。'}")
    raise torch.OutOfMemoryError("out of memory in the rehearsal of the smallest plan")


def missing_optimizer(plan: memory_plan.Plan, device: torch.device) -> str | None:
    """Why the plan's optimizer cannot step here, or None."""
    if not plan.optimizer.startswith("8bit"):
        return None
    verdict = proof.try_step("8bit", device)
    return None if verdict.runs else verdict.why


def rehearse(trainer) -> Rehearsed | None:
    """None: it does not fit. Of a sharded model that ends the training, in all processes."""
    found = None
    try:
        with same_random_states(trainer.args.device):
            found = measure(trainer)
    except RuntimeError as error:
        if not is_out_of_memory(error) or trainer.args.fsdp:  # the others wait for this one's part of the model
            raise
    finally:  # an error that was caught is gone by now, and with it the graph that its traceback held
        trainer.drop_gradients()
        trainer.model.eval()
        if trainer.args.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return found


def measure(trainer) -> Rehearsed:
    """The worst step, twice, and the largest evaluation batch, beside a block as large as the optimizer's states."""
    args, data = trainer.args, trainer.train_dataset
    longest = sorted(range(len(data)), key=lengths_of(data).__getitem__)[-args.per_device_train_batch_size :]
    batch = trainer.data_collator([data[i] for i in longest])
    tokens, supervised = batch["input_ids"].numel(), (batch["labels"] != IGNORE_INDEX).sum().to(args.device)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    copies = (args.world_size > 1 and not args.fsdp) * sum(p.nbytes for p in trained)  # DistributedDataParallel's
    placeholder = torch.empty(int(trainer.plan.parts["优化器"] + copies), dtype=torch.uint8, device=args.device)
    for _ in range(2):  # the first one loads kernels
        seconds = -now(args.device)
        trainer.take_passes(trainer.model, trainer._prepare_inputs(batch), supervised)
        seconds += now(args.device)
        if args.gradient_accumulation_steps == 1:
            trainer.drop_gradients()
    trainer.drop_gradients()
    eval_speed = measure_evaluation(trainer)
    del placeholder
    return Rehearsed(memory.peak(args.device), tokens, tokens / seconds, eval_speed)


def measure_evaluation(trainer) -> float:
    """Tokens/s of the largest evaluation batch; infinite where this process has none."""
    args, data = trainer.args, trainer.eval_dataset
    trainer.model.eval()
    batches = trainer.evaluation_batches(data)
    if not batches:
        return math.inf
    rows = next((rows for rows in reversed(batches) if rows), [])  # of a sharded model the last ones may be empty
    seconds = -now(args.device)
    trainer.evaluate_rows(data, rows)
    seconds += now(args.device)
    return sum(len(data[i]["input_ids"]) for i in rows) / seconds if rows else math.inf


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was asked for."""
    torch.get_device_module(device).synchronize()
    return time.perf_counter()


def seconds_of_run(found: Rehearsed, trainer) -> float:
    """An estimate, at most, of the whole training and its evaluations, without optimizer steps and saving."""
    args, data = trainer.args, trainer.train_dataset
    steps = math.ceil(len(data) / args.examples_per_step) * args.num_train_epochs
    steps = args.max_steps if args.max_steps > 0 else steps
    tokens = sum(lengths_of(data)) / len(data) * args.examples_per_step * steps
    seconds = tokens / found.train_speed / args.world_size
    if math.isfinite(found.eval_speed):
        count = steps / args.eval_steps
        tokens = sum(lengths_of(trainer.eval_dataset))
        seconds += count * tokens / found.eval_speed / args.world_size
    return seconds


def describe(found: Rehearsed, trainer) -> str:
    """What was found, in a few words."""
    minutes = math.ceil(seconds_of_run(found, trainer) / 60)
    return (
        f"预演：最大的一步（{found.tokens} 个 token）和评估都放得下，峰值 {found.peak / 1e9:.2f} GB"
        f"（估算 {trainer.plan.total / 1e9:.2f}）。"
        f"每秒 {found.train_speed:,.0f} 个 token，整个训练最多约 {minutes} 分钟，不算优化器、样例和保存。"
    )
