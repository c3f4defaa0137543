"""Which way of training fits into the memory that is free: a ladder of plans, fastest first, and the bytes
that each takes at its peak. Obeys what the command line says; does not train. The arithmetic is that of a
layer of Qwen3 or Qwen2; its sums stood 0 to 15 % above what torch's own account of the same operations
says."""

import contextlib
import importlib.util
import io
import math
from typing import NamedTuple

import accelerate
import psutil
import rich.console
import rich.table
import torch

from parts.model.fused import head_dim
from parts.training.optimizers import OPTIMIZERS, state_bytes
from parts.training.packing import LOGIT_BYTES, LOSS_BYTES, repeats_heads

DRIVER_BYTES = 500_000_000  # of a card, that the driver takes for this process; an estimate
RESERVE_BYTES = 300_000_000  # for what no formula counts: matrix products' workspace, fragments; an estimate


class LadderRow(NamedTuple):
    """A rung for whatever training."""

    tokens: str  # of one pass: all of a step's, half of them, or the longest example's
    checkpoint_every: int
    offload: bool
    optimizer: str


# Recomputing every layer is a forward pass more, 27 % of the FLOPs; more passes cost less, and 8-bit states
# hardly any time.
LADDER = [
    LadderRow("all", 0, False, "kahan"),
    LadderRow("half", 0, False, "kahan"),
    LadderRow("longest", 0, False, "kahan"),
    LadderRow("longest", 0, False, "8bit"),
    LadderRow("longest", 4, False, "8bit"),
    LadderRow("longest", 2, False, "kahan"),
    LadderRow("all", 1, False, "kahan"),
    LadderRow("all", 1, False, "8bit"),
    LadderRow("all", 1, False, "8bit_in_backward"),
    LadderRow("all", 1, True, "8bit_in_backward"),
    LadderRow("half", 1, False, "kahan"),
    LadderRow("longest", 1, False, "kahan"),
    LadderRow("longest", 1, True, "kahan"),
]


class Rung(NamedTuple):
    """What decides over memory and speed, for one training."""

    batch_tokens: int  # of one pass, at most
    checkpoint_every: int  # every n-th layer is recomputed in the backward pass; 0: none
    offload: bool  # the recomputed layers' inputs wait in the CPU's memory
    optimizer: str


class Plan(NamedTuple):
    """A rung of the ladder, the bytes that it takes at its peak, and those that are free."""

    batch_tokens: int
    checkpoint_every: int
    offload: bool
    optimizer: str
    parts: dict[str, float]  # what `estimate` returns
    free: float

    @property
    def rung(self) -> Rung:
        return Rung(*self[:4])

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.free


# ---- the ladder --------------------------------------------------------------------------------------------


def choose(
    args, model, lengths: list[int], fused: bool, free: float, optimizer=None, batch_tokens=None
) -> list[Plan]:
    """Return the rungs of the ladder that fit into `free` bytes, fastest first, the same for all processes;
    the smallest one alone when none does.

    lengths: tokens of each training example; the largest step holds the longest ones. `optimizer` and
    `batch_tokens` are an interrupted run's, kept where the command line says nothing. What asks for torchao
    comes last where it is not installed. Raises SystemExit when no rung applies.
    """
    optimizer = args.optimizer or optimizer
    batch_tokens = args.batch_tokens or batch_tokens
    step_tokens = sum(sorted(lengths)[-args.per_device_train_batch_size :])
    plans = []
    for rung in rungs(args, model, step_tokens, max(lengths), optimizer, batch_tokens):
        plans.append(Plan(*rung, estimate(model, args, fused, *rung, step_tokens), free))
    if not plans and args.fsdp:
        misfit = f"这次训练用的是 --optimizer {optimizer}，不能和 --fsdp 一起用"
        raise SystemExit(f"错误：{misfit}；请去掉 --fsdp 继续训练。")
    if not plans:
        remedy = "请去掉 --batch_tokens 和梯度累积，只用一张 GPU"
        raise SystemExit(f"错误：--optimizer {optimizer} 要求一个进程一次算完一步的全部样本；{remedy}。")
    if importlib.util.find_spec("torchao") is None:
        plans.sort(key=lambda plan: plan.optimizer.startswith("8bit"))
    fitting = [plan for plan in plans if plan.fits] or [min(plans, key=lambda plan: plan.total)]
    # Free memory and installed packages may differ between processes: all follow the first one's list.
    return accelerate.utils.broadcast_object_list([fitting])[0]


def rungs(
    args, model, step_tokens: int, longest: int, optimizer: str | None, batch_tokens: int | None
) -> list[Rung]:
    """Return the ladder's rungs that apply to this training, with what was asked for in place of what they
    say. Tokens of the largest step and of the `longest` example."""
    sizes = {"all": step_tokens, "half": max(longest, step_tokens // 2), "longest": longest}
    cuda = args.device.type == "cuda"
    # Kahan sums and stochastic rounding mend bfloat16's rounding; weights of float32 need neither.
    rounded = any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
    can_8bit = rounded and cuda and not args.trains_adapter
    clips = not optimizer and args.max_grad_norm not in (0, 1)  # a norm that was asked for
    applying = []
    for size, every, offload, name in LADDER:
        unfit = name.startswith("8bit") and not optimizer and not can_8bit
        tokens = batch_tokens or sizes[size]
        every = every if args.checkpoint_every is None else args.checkpoint_every
        offload = (offload and cuda) if args.offload_activations is None else args.offload_activations
        name = optimizer or (name if rounded else "adamw")
        one_pass_step = args.world_size == 1 and is_whole_step(args, tokens, step_tokens)
        unfit |= offload and not every  # there would be nothing to keep there
        unfit |= args.fsdp and name.startswith("8bit")  # not seen to be right on parts of weights
        # Its gradients are gone before they could be clipped, sent to other processes or added to.
        unfit |= name.endswith("in_backward") and (clips or not one_pass_step)
        if not unfit:
            applying.append(Rung(tokens, every, offload, name))
    # Flags make some rungs equal; a dict keeps the first of them, and their order.
    return list(dict.fromkeys(applying))


def is_whole_step(args, tokens: int, step_tokens: int) -> bool:
    """Tell whether a pass of at most `tokens` holds a whole optimizer step, of `step_tokens` at most."""
    return tokens >= step_tokens and args.gradient_accumulation_steps == 1


def describe(plan: Plan, kind: str) -> str:
    """Return the plan as a table: what, GB, why. `kind` of memory."""
    every = plan.checkpoint_every
    layers = {0: "全部保留", 1: "每层重算"}.get(every, f"每 {every} 层重算一层")
    if plan.offload:
        layers += "，输入放内存"
    notes = {"优化器": OPTIMIZERS[plan.optimizer][1], "余量": "碎片和库自己的缓冲"}
    notes["一步之内"] = f"一次 {plan.batch_tokens} 个 token，激活{layers}；梯度；损失"
    amount = rich.table.Column("GB", justify="right")
    table = rich.table.Table(f"{kind}计划", amount, "", box=None, pad_edge=False)
    for name, size in plan.parts.items():
        table.add_row(name, f"{size / 1e9:.2f}", notes.get(name, ""))
    fits = "" if plan.fits else "，可能放不下"
    table.add_row("合计（估算）", f"{plan.total / 1e9:.2f}", f"可用 {plan.free / 1e9:.2f}{fits}")
    # Into text, not onto the screen: a notebook would get HTML, and another terminal another width.
    console = rich.console.Console(width=100, record=True, file=io.StringIO(), force_jupyter=False)
    console.print(table)
    return "\n".join(map(str.rstrip, console.export_text().splitlines()))


def apply(plan: Plan, model) -> None:
    """Switch the recomputing of layers on or off, and hold the process to the memory that was planned with:
    beyond it Windows' driver would not refuse but go on in the CPU's memory, many times slower."""
    # The methods' names from transformers 5.23 on, and before; the modules' attribute has only the old one.
    new = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    if plan.checkpoint_every:
        getattr(model, f"{name}_enable")(every_n_layers=plan.checkpoint_every, offload=plan.offload)
    elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        # A plan that did not fit, in the rehearsal before this one, had switched it on.
        getattr(model, f"{name}_disable")()
    if model.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, plan.free / torch.cuda.mem_get_info()[1]))


@contextlib.contextmanager
def limited(device: torch.device):
    """Lift the limit on memory that `apply` sets when the training inside ends, however it ends: a notebook
    goes on with the whole card."""
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)


# ---- the bytes of a plan -----------------------------------------------------------------------------------


def estimate(
    model, args, fused: bool, tokens: int, every: int, offload: bool, optimizer: str, step_tokens: int
) -> dict[str, float]:
    """Return {part: bytes} at the peak of training on each card: weights, optimizer states, what comes and
    goes within a step, and what no formula counts. `tokens` in one pass, of the `step_tokens` of a step;
    every n-th layer is recomputed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    cards = args.world_size if args.fsdp else 1  # that share weights, states and gradients
    # A step inside the backward pass drops each gradient as soon as it is there.
    gradients = 0 if optimizer.endswith("in_backward") else sum(p.nbytes for p in trained) / cards
    if args.world_size > cards:
        gradients *= 2  # DistributedDataParallel sends copies of them
    complete, complete_gradients = complete_bytes(model) if args.fsdp else (0, 0)
    tokens, whole_step = min(tokens, step_tokens), is_whole_step(args, tokens, step_tokens)
    peak = step_bytes(model, args, fused, tokens, every, offload, whole_step, gradients, complete_gradients)
    if model.dtype == torch.float16:  # autocast's copies of the adapters, which are float32
        peak += sum(p.numel() for p in trained) * model.dtype.itemsize
    return {
        "权重": model.get_memory_footprint() / cards + complete,
        "优化器": state_bytes(trained, optimizer) / cards,
        "一步之内": peak,
        "余量": RESERVE_BYTES,
    }


def step_bytes(
    model, args, fused, tokens, every, offload, whole_step, gradients: float, complete_gradients: float
) -> float:
    """Return the bytes that come and go within a step, at their peak. `gradients` of all trained weights,
    `complete_gradients` of a sharded model's; the other arguments are those of `estimate`.

    The peak is at one of two moments of the backward pass: at the top, where the loss is made or the last
    layer computed once more while the activations of all others are still there; or at the bottom, where all
    gradients are there.
    """
    config, size = model.config, model.dtype.itemsize
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    output = model.get_output_embeddings().weight
    output_gradient = output.nbytes if output.requires_grad else 0  # an adapter leaves it frozen

    # From the forward pass: all that a layer keeps, or, where it is recomputed, its input alone.
    layer = tokens * layer_bytes(model, fused, 0 if output_gradient else args.lora_dropout)
    recomputed = math.ceil(layers / every) if every else 0
    activations = (layers - recomputed) * layer
    if not offload:
        activations += recomputed * tokens * size * hidden

    # Last norm, one of its tensors in float32, and the gradient on its way down; beside them the logits, all
    # at once, or a chunk of them in float32 and as much again inside logsumexp.
    tail = tokens * (4 + 4 * size) * hidden
    logits = tokens * len(output)
    loss = logits * 14 if args.full_logits else min(LOSS_BYTES, logits * LOGIT_BYTES)
    # Gradients on their way down through an MLP, while its activations, kept or recomputed, are still there.
    flowing = tokens * size * (4 * inner + 2 * hidden)
    if model.dtype == torch.float16:  # the same for the adapter of its last product, in float32
        flowing += tokens * 2 * torch.float32.itemsize * inner

    # Layers 0, n, 2n… are recomputed: where the last one is, its activations come back on top of all others.
    last_recomputed = every > 0 and (layers - 1) % every == 0
    top = activations + max(loss + tail, flowing + layer * last_recomputed)
    # The output layer's gradient is made with the loss; those of earlier passes are there already.
    top += output_gradient + complete_gradients + (0 if whole_step else gradients)

    tied = output is model.get_input_embeddings().weight
    if args.fsdp:
        # The output layer's gradient is whole to the end, and is sent after an embedding's of its own.
        second = output_gradient * (2 - tied)
        bottom = gradients + output_gradient + max(second, layer + flowing + complete_gradients)
    else:
        # An output layer that is the embedding too gets a second gradient, which is made beside the first one
        # and added to it. Where earlier passes have left a sum, the first one is not that sum, but one more.
        second = output_gradient * (tied + (not whole_step))
        # Without other gradients, a tied output layer's still waits for the embedding's.
        bottom = max(gradients, output_gradient) + max(second, layer + flowing)
    return max(top, bottom)


def layer_bytes(model, fused: bool, lora_dropout: float) -> float:
    """Return the bytes a token that one decoder layer keeps for its backward pass: 117 kB plain and 72 kB
    fused for Qwen3-1.7B. They are counted from what the operations of a Qwen3 layer save; Qwen2's has no
    norms of queries and keys."""
    config, size = model.config, model.dtype.itemsize
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * head_dim(config)
    key = config.num_key_value_heads * head_dim(config)
    repeated = query if repeats_heads(model.device, model.dtype) else key
    # A plain norm saves its input in float32, and what it multiplies with its weight; a fused one its input.
    norm = size if fused else 4 + size
    # Two norms, and their outputs, which are the inputs of the matrix products behind them.
    saved = 2 * (norm + size) * hidden
    # Attention's queries, keys, values and output, that once more as the input of the product behind it, and
    # in float32 one number a head, the logarithm of its scores' sum.
    saved += size * (3 * query + 2 * repeated) + 4 * config.num_attention_heads
    if any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()):
        saved += norm * (query + key)
    # SiLU's input, both factors of the MLP's product, and the product; fused, SiLU is computed once more.
    saved += (3 if fused else 4) * size * inner
    if lora_dropout:
        # Each of the seven adapters saves its own input and the mask; the frozen products save nothing.
        saved += (size + 1) * (5 * hidden + query + inner) - size * (2 * hidden + inner)
    return saved


def complete_bytes(model) -> tuple[float, float]:
    """Return (weights, gradients) of a sharded model that are complete at once on one card, in bytes: the
    output layer, and of the layers one as it is computed and one on its way in two buffers; the gradients of
    one, and as much again to be sent."""
    output, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    inner = inner_gradients = 0  # of all but these two: nearly all of it is the layers'
    for p in model.parameters():
        if p is not output and p is not embedding:
            inner += p.nbytes
            inner_gradients += p.nbytes * p.requires_grad
    layers = model.config.num_hidden_layers
    return output.nbytes + 3 * inner / layers, 2 * inner_gradients / layers


# ---- the memory that is there ------------------------------------------------------------------------------


def has_own_memory(device: torch.device) -> bool:
    """Tell whether a device has memory of its own: a GPU or an NPU; Apple's chips share the CPU's."""
    return device.type not in ("cpu", "mps")


def free_bytes(device: torch.device, model, memory_gb: float | None) -> float:
    """Return the bytes that training may take, its weights included: what is free now in the process that has
    least, and at most `memory_gb` less the driver's own."""
    limit = memory_gb * 1e9 - DRIVER_BYTES if memory_gb else math.inf
    here = math.inf  # planned for a card that is not here
    if not has_own_memory(device):
        here = psutil.virtual_memory().available + model.get_memory_footprint()
    elif (backend := getattr(torch, device.type)).is_available():  # torch.cuda, torch.npu
        here = backend.mem_get_info()[0] + backend.memory_reserved()  # with what this process holds already
    free = accelerate.utils.gather_object([here])
    # The smallest one decides in any case; a few per cent of difference are not worth a line.
    if has_own_memory(device) and max(free) > 1.1 * min(free):
        sizes = "、".join(f"{size / 1e9:.1f}" for size in free)
        print(f"各张卡空闲的显存不同（{sizes} GB），都按最少的规划。")
    return min(*free, limit)
