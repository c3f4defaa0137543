"""Which way of training fits into the memory that is free: a ladder of plans, fastest first. Obeys what the command
line says; does not train."""

import contextlib
import importlib.util
import io
from typing import NamedTuple

import accelerate
import rich.console
import rich.table
import torch

from parts.machine import memory
from parts.training.optimizers import OPTIMIZERS

# Tokens in one pass (all of a step's, half of them, the longest example's), recompute every n-th layer (0: none), keep
# the recomputed layers' inputs in the CPU's memory, optimizer. Recomputing every layer is a forward pass more, 27 % of
# the FLOPs; more passes cost less, and 8-bit states hardly any time.
LADDER = [
    ("all", 0, False, "kahan"),
    ("half", 0, False, "kahan"),
    ("longest", 0, False, "kahan"),
    ("longest", 0, False, "8bit"),
    ("longest", 4, False, "8bit"),
    ("longest", 2, False, "kahan"),
    ("all", 1, False, "kahan"),
    ("all", 1, False, "8bit"),
    ("all", 1, False, "8bit_in_backward"),
    ("all", 1, True, "8bit_in_backward"),
    ("half", 1, False, "kahan"),
    ("longest", 1, False, "kahan"),
    ("longest", 1, True, "kahan"),
]


class Plan(NamedTuple):
    """What decides over memory and speed, the bytes that it takes at its peak, and those that are free."""

    batch_tokens: int
    checkpoint_every: int
    offload: bool
    optimizer: str
    parts: dict[str, float]  # bytes: weights, optimizer states, the peak within a step, and what no formula counts
    free: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.free


def choose(args, model, lengths: list[int], fused: bool, free: float, optimizer=None, batch_tokens=None) -> list[Plan]:
    """The rungs of the ladder that fit into `free` bytes, fastest first, the same for all processes; the smallest one
    alone when none does.

    lengths: tokens of each training example; the worst step holds the longest ones. `optimizer` and `batch_tokens` are
    an interrupted run's, kept where the command line says nothing. What asks for torchao comes last where it is not
    installed. Raises SystemExit when no rung applies.
    """
    optimizer, batch_tokens = args.optimizer or optimizer, args.batch_tokens or batch_tokens
    worst = sum(sorted(lengths)[-args.per_device_train_batch_size :])  # tokens of a step on this device
    plans = [
        Plan(*rung, memory.estimate(model, args, fused, *rung, worst), free)
        for rung in rungs(args, model, worst, max(lengths), optimizer, batch_tokens)
    ]
    if not plans and args.fsdp:
        raise SystemExit(f"错误：这个训练用的是 --optimizer {optimizer}，它不能和 --fsdp 一起用；请不分片地继续。")
    if not plans:
        raise SystemExit(
            f"错误：--optimizer {optimizer} 要一个进程把一步的样本一次算完；"
            "请去掉 --batch_tokens 和梯度累积，只用一张 GPU。"
        )
    if importlib.util.find_spec("torchao") is None:
        plans.sort(key=lambda plan: plan.optimizer not in ("kahan", "adamw"))
    plans = [plan for plan in plans if plan.fits] or [min(plans, key=lambda plan: plan.total)]
    return accelerate.utils.broadcast_object_list([plans])[0]  # whatever each process found


def rungs(args, model, worst: int, longest: int, optimizer: str | None, batch_tokens: int | None) -> list[tuple]:
    """(tokens in one pass, recompute every n-th layer, offload, optimizer) of the ladder's rungs that apply to this
    training, with what was asked for in place of what they say. Tokens of the `worst` step and `longest` example."""
    sizes = {"all": worst, "half": max(longest, worst // 2), "longest": longest}
    cuda = args.device.type == "cuda"
    rounded = any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
    found = []
    for tokens, every, offload, name in LADDER:
        if not optimizer and name != "kahan" and not (rounded and cuda and not args.trains_adapter):
            continue
        name = optimizer or (name if rounded else "adamw")
        tokens = batch_tokens or sizes[tokens]
        every = every if args.checkpoint_every is None else args.checkpoint_every
        offload = (offload and cuda) if args.offload_activations is None else args.offload_activations
        if args.fsdp and name.startswith("8bit"):  # not seen to be right on parts of weights
            continue
        whole = memory.is_whole_step(args, tokens, worst)
        in_backward = name.endswith("in_backward")
        if offload and not every or in_backward and not (whole and args.world_size == 1):
            continue
        if in_backward and not optimizer and args.max_grad_norm not in (0, 1):  # a norm that was asked for
            continue
        found.append((tokens, every, offload, name))
    return list(dict.fromkeys(found))


def describe(plan: Plan, kind: str) -> str:
    """The plan as a table: what, GB, why. `kind` of memory."""
    layers = {0: "全部保留", 1: "每层重算"}.get(plan.checkpoint_every, f"每 {plan.checkpoint_every} 层重算一层")
    layers += "，输入放内存" * plan.offload
    why = {
        "优化器": OPTIMIZERS[plan.optimizer][1],
        "一步之内": f"一次 {plan.batch_tokens} 个 token，激活{layers}；梯度；损失",
        "余量": "碎片和库自己的缓冲",
    }
    table = rich.table.Table(f"{kind}计划", rich.table.Column("GB", justify="right"), "", box=None, pad_edge=False)
    for name, size in plan.parts.items():
        table.add_row(name, f"{size / 1e9:.2f}", why.get(name, ""))
    fits = "" if plan.fits else "，可能放不下"
    table.add_row("合计（估算）", f"{plan.total / 1e9:.2f}", f"可用 {plan.free / 1e9:.2f}{fits}")
    console = rich.console.Console(width=100, record=True, file=io.StringIO(), force_jupyter=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def apply(plan: Plan, model) -> None:
    """Switch the recomputing of layers on or off, and hold the process to the memory that was planned with: beyond it
    Windows' driver would not refuse but go on in the CPU's memory, many times slower."""
    # Their names from transformers 5.23 on, and before.
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    if plan.checkpoint_every:
        getattr(model, f"{name}_enable")(every_n_layers=plan.checkpoint_every, offload=plan.offload)
    elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):  # of an earlier plan
        getattr(model, f"{name}_disable")()
    if model.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, plan.free / torch.cuda.mem_get_info()[1]))


@contextlib.contextmanager
def limited(device: torch.device):
    """Around a training: the limit that `apply` sets does not outlive it, however it ends; a notebook goes on."""
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
