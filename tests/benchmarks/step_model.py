"""A training step and a decoding step by arithmetic, without a GPU: a model, not a measurement.

    python tests/benchmarks/step_model.py                          # Qwen3-1.7B's shape; Linux, for Liger and Triton
    python tests/benchmarks/step_model.py --small                  # a small model: a check that it works

The real code runs on tensors of torch's meta device, which stand for the GPU's. Each operation that is no view is a
kernel with the FLOPs of torch.utils.flop_counter (attention by formula) and the bytes of each tensor that it reads or
writes, once. Liger's and torch-optimi's own code runs up to each launch of a Triton kernel, which is counted.

The least time of a kernel is max(FLOPs / peak, bytes / bandwidth), which no kernel reaches. Of a step it is max(sum
over kernels, launches x 10 us) + waits x 20 us: Python launches ahead of the GPU until it waits for it, as for .item().
10 us give the 60 tokens/s that Qwen publishes for plain generate. A kernel that a CUDA graph replays takes 1 us more on
the GPU and no launch. Not in it: the data loader, logging, autocast, and caches, which only help.
"""

import argparse
import contextlib
import math
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from memory_budget import NF4_BITS, card_arguments  # noqa: E402
from train_speed import PROMPT_TOKENS, build_model  # noqa: E402

CARDS = {  # name -> (FLOP/s of dense bfloat16 products summed in float32, bytes/s), as NVIDIA states them
    "H100": (989e12, 3.35e12),  # SXM; data sheet
    "H200": (989e12, 4.8e12),  # data sheet
    "4090": (165e12, 1.008e12),  # Ada white paper; 330 with sums in float16
    "3060": (25.5e12, 0.36e12),  # 12 GB; twice its 12.7 in float32, the ratio in the Ampere GA102 white paper
}
LAUNCH, SLOW_LAUNCH, WAIT, REPLAY = 10e-6, 20e-6, 20e-6, 1e-6  # seconds, assumed
LENGTHS = (620, 735, 796, 1001)  # tokens of a step's examples, as long on average as the published ones
CACHE, STEPS = 512, 16  # places of the cache that are full in the end; decoding steps that are averaged

# Kernels of an operation that CUDA does not do in one, read off ATen's sources; those of sorting only about.
KERNELS = {"_index_put_impl": 10, "embedding_dense_backward": 8, "select_backward": 2, "slice_backward": 2, "equal": 2}
KERNELS |= {"sort": 8, "topk": 4, "nonzero": 3, "cumsum": 2, "_varlen_attn_backward": 5}
KERNELS |= {"_scaled_dot_product_flash_attention_backward": 5, "_scaled_dot_product_efficient_attention_backward": 2}
# Numbers and tensors at most in one launch over lists: ATen/native/cuda/MultiTensorApply.cuh
MULTI_TENSOR = (320 * 65536, 36)
# Arguments of Triton kernels that are touched more than once: read and written.
TOUCHED = {"_triton_rope": {"q_ptr": 2, "k_ptr": 2}, "_swiglu_backward_kernel": {"a_ptr": 2, "b_ptr": 2}}
TOUCHED |= {"_adam_kernel": dict.fromkeys(("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "kahan_ptr"), 2)}
PICK = ("embedding", "gather", "index", "index_select")  # read as much of their source as they write
PUT = ("scatter", "scatter_add", "index_add", "index_copy", "_index_put_impl")  # read and write what they are given
FILL = ("fill", "zero", "copy", "exponential")  # in place, without reading what was there


class Op(NamedTuple):
    """A kind of operation; the same ones are counted together."""

    name: str
    flops: float = 0
    bytes: float = 0
    kernels: float = 1
    waits: int = 0
    replayed: bool = False  # by a CUDA graph

    def seconds(self, card: str) -> float:
        """The least on the GPU."""
        peak, bandwidth = CARDS[card]
        return max(self.flops / peak, self.bytes / bandwidth) + self.kernels * REPLAY * self.replayed


def tensors(*values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def size(*values) -> int:
    """Bytes of the GPU's tensors among the values; of an expanded one those that are there."""
    return sum(
        math.prod(n for n, stride in zip(t.shape, t.stride()) if stride) * t.itemsize
        for t in tensors(values)
        if t.is_meta
    )


class Tracer(TorchDispatchMode):
    """Counts what runs on the GPU's tensors. `lengths`: of the examples in a packed batch. `true`: how many tokens any
    mask leaves."""

    def __init__(self, lengths=(), true: int = 0):
        super().__init__()
        self.lengths, self.true = lengths, true
        self.ops, self.replayed, self.last = Counter(), False, ("", "")
        self.left = 0  # tokens that generate is still to make

    def add(self, name: str, flops: float = 0, bytes: float = 0, kernels: float = 1, waits: int = 0) -> None:
        self.ops[Op(name, flops, bytes, kernels, waits, self.replayed)] += 1
        self.last = self.last[1], name

    def launch(self, kernel, *args, grid=None, warmup=False, **options) -> None:
        """In place of a Triton kernel's launch."""
        name, given = kernel.fn.__name__, dict(zip(kernel.arg_names, args)) | options
        touched = TOUCHED.get(name, {})
        self.add(name, bytes=sum(touched.get(key, 1) * size(value) for key, value in given.items()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1].removesuffix("_")
        if name in EXPANDED:
            with self:
                return EXPANDED[name](*args, **kwargs)
        before = tensors(args, kwargs)
        on_gpu = any(tensor.is_meta for tensor in before)
        if on_gpu and name in ("_local_scalar_dense", "item", "equal"):  # no two tensors are equal
            # The answer to whether a mask has no padding, a batch no second example; all else is 0.
            true = self.last in (("sum", "eq"), ("eq", "all"))
            if self.last == ("max", "eq"):  # generate asks whether all rows have ended
                self.left -= 1
                true = not self.left
            self.add(name, 0, size(before), KERNELS.get(name, 1), waits=1)
            return name != "equal" and (bool(true) if before[0].dtype == torch.bool else 0)
        if name == "nonzero":
            return self.nonzero(args[0])
        out = args[0] if name == "exponential" else func(*args, **kwargs)
        stores = {tensor.untyped_storage()._cdata for tensor in before}
        fresh = [tensor for tensor in tensors(out) if tensor.untyped_storage()._cdata not in stores]
        changed = [value for value, slot in zip(args, func._schema.arguments) if is_written(slot)]
        written = size(fresh, changed, kwargs.get("out"))
        if written and "empty" not in name:
            reads = self.read(name, args, kwargs, fresh, changed)
            kernels = KERNELS.get(name, launches(args[0]) if name.startswith(("_foreach", "_fused_adam")) else 1)
            # From the CPU's memory: PyTorch waits for the copy, and so for all before it.
            copied = name == "_to_copy" and not on_gpu and not kwargs.get("non_blocking")
            self.add(name, self.flops(name, args, out), reads + written, kernels, int(copied))
        return out

    def nonzero(self, mask) -> torch.Tensor:
        """[true, dimensions]; the CPU waits to know how many."""
        self.add("nonzero", 0, size(mask) + 8 * mask.ndim * self.true, KERNELS["nonzero"], waits=1)
        return torch.empty(self.true, mask.ndim, dtype=torch.long, device="meta")

    def read(self, name: str, args, kwargs, fresh, changed) -> int:
        """Bytes; for PUT what is written is put right too."""
        if name.endswith("_like") or name.startswith("new_"):
            return 0  # asks for the shape
        everything = size(args, {key: value for key, value in kwargs.items() if key != "out"})
        if name in PICK:
            return everything - size(args[0]) + size(fresh)
        if name in PUT and changed:
            return everything - 2 * size(args[0]) + 2 * size(tensors(args)[-1])
        return everything - size(args[0]) if name in FILL and changed else everything

    def flops(self, name: str, args, out) -> float:
        if "attention" not in name and "attn" not in name:
            formula = flop_registry.get(getattr(torch.ops.aten, name, None))
            return formula(*args, out_val=out) if formula else 0
        query, key = tensors(args)["backward" in name :][:2]  # a backward pass has the gradient first
        if "varlen" in name:
            pairs, (_, heads, dim) = sum(length**2 for length in self.lengths) / 2, query.shape
        else:
            batch, heads, long, dim = query.shape
            causal = "flash" in name and any(arg is True for arg in args)
            pairs = batch * long * key.shape[2] / (2 if causal else 1)
        return pairs * heads * dim * (10 if "backward" in name else 4)  # five products of the scores' size, or two


def is_written(slot) -> bool:
    """An argument of an operator, by its schema; fused AdamW writes gradients only when it scales them."""
    return slot.alias_info is not None and slot.alias_info.is_write and slot.name != "grads"


def launches(items: list) -> int:
    numbers, most = MULTI_TENSOR
    return math.ceil(max(sum(item.numel() for item in items) / numbers, len(items) / most))


# ---- what CUDA does where the meta device does otherwise, in operations that the tracer sees -------------------------


def logsumexp(x, dim, keepdim=False):
    """As ATen's ReduceOps.cpp."""
    most = x.amax(dim, True)
    most.masked_fill_(most.abs() == math.inf, 0)
    return (x - most).exp_().sum(dim, keepdim).log_().add_(most)


def multinomial(p, count, replacement=False, generator=None):
    """One sample a row; as ATen's Distributions.cpp, which looks at p first."""
    ((p.max() < math.inf) & (p.min() >= 0)).item()
    (p.sum(1) == 0).sum().item()
    return p.div(torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)


EXPANDED = {"logsumexp": logsumexp, "multinomial": multinomial}


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Flash, or with a mask the memory-efficient kernel, for which sdpa makes a bias of the mask."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, torch.full((), -math.inf, dtype=q.dtype, device=q.device))
    bias = attn_mask.expand(*q.shape[:3], k.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, bias, torch.is_grad_enabled(), dropout_p, False, scale=scale)[0]


def dropout(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, True)[0] if training and p else x


@contextlib.contextmanager
def tracing(trace: Tracer):
    """Inside, kernels are counted, and libraries take the meta device for a GPU. What Liger exchanges is put back."""
    from transformers.models.qwen3 import modeling_qwen3
    from triton.runtime.jit import JITFunction

    from parts.training import packing

    def rms_norm(x, shape, weight=None, eps=None):
        """Forward only."""
        out = torch.empty_like(x)
        trace.add("_fused_rms_norm", bytes=size(x, weight, out))
        return out

    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (F, "scaled_dot_product_attention", attention),
            (packing, "scaled_dot_product_attention", attention),
            (F, "dropout", dropout),
            (F, "rms_norm", rms_norm),
            (JITFunction, "run", lambda kernel, *args, **options: trace.launch(kernel, *args, **options)),
            (sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"]),
            (torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),
            (torch, "Generator", lambda device, make=torch.Generator: make()),
            (modeling_qwen3, "apply_rotary_pos_emb", modeling_qwen3.apply_rotary_pos_emb),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(trace)
        yield


# ---- a training step -------------------------------------------------------------------------------------------------


def packed_batch() -> dict:
    """A step's examples end to end, as PackedCollator gives them, on the GPU."""
    ids = torch.zeros(1, sum(LENGTHS), dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids, "position_ids": ids, "lengths": LENGTHS}


def supervised(lengths) -> int:
    return sum(lengths) - PROMPT_TOKENS * len(lengths)


def step(trace: Tracer, losses: list, optimizer, checked: bool) -> None:
    """Trainer's step: `losses` of its passes, each made and differentiated in turn. `checked` for NaN, its default."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # makes its states
    optimizer.zero_grad()
    trace.ops.clear()
    total = torch.zeros((), device="meta")
    for make in losses:
        loss = make()
        loss.backward()
        if not checked or not (torch.isnan(loss) or torch.isinf(loss)):
            total += loss.detach()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()


def adamw(model, fused: bool | None):
    """torch's, Trainer's default; or torch-optimi's Kahan AdamW, with its Triton kernel where `fused`."""
    from parts.training import optimizers

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if fused is None:
        return torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0, fused=True)
    cls, options = optimizers.pick("kahan", triton=fused, lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
    return cls([{"params": weights, "weight_decay": 0.0}], **options)


def ours(small, fused=True, every=0, lora=False, in_4bit=False, published=False) -> Counter:
    """This project's step; `published`: as its flags make it the published recipe, see train_speed.PUBLISHED."""
    import train_lora
    from parts.machine import plan
    from parts.model.fused import fuse_layers
    from parts.training import packing
    from parts.training.trainer import PackedTrainer

    trace, batch = Tracer(LENGTHS, supervised(LENGTHS)), packed_batch()
    with tracing(trace):
        model = build_model(small, "meta").train()
        model.config.use_cache = False
        if lora:
            with contextlib.redirect_stdout(sys.stderr):  # peft's line is no row of the table
                model = train_lora.add_adapter(model, card_arguments(train_lora.arguments))
        if not published:
            packing.use(model)
        if fused:
            fuse_layers(model)
        plan.apply(SimpleNamespace(checkpoint_every=every, offload=False), model)
        trainer = PackedTrainer.__new__(PackedTrainer)  # without what Trainer sets up
        trainer.model, trainer.kernels = model, SimpleNamespace(attention=SimpleNamespace(runs=fused))
        trainer.args = SimpleNamespace(full_logits=False)
        trainer.accelerator = SimpleNamespace(num_processes=1, autocast=contextlib.nullcontext)
        model.get_decoder().register_forward_hook(trainer.keep_hidden)
        count = torch.ones((), dtype=torch.long, device="meta")
        losses = [lambda: trainer.compute_loss(model, batch, num_items_in_batch=count)]
        if published:
            passes = [trainer.for_attention(part) for part in packing.split_batch(batch, 1)]
            losses = [lambda part=part: model(**part, num_items_in_batch=count).loss for part in passes]
        step(trace, losses, adamw(model, None if published else fused), published)
    if in_4bit:
        for layer in (layer.base_layer for layer in model.modules() if hasattr(layer, "base_layer")):
            number = layer.weight.numel()  # forward and backward; two small kernels for the scales, which are 8 bits
            trace.ops[Op("dequantize", 0, (NF4_BITS / 8 + 2) * number, 3)] += 2
    return trace.ops


TRAINING = {
    "published recipe": partial(ours, published=True, fused=False, every=1),
    "ours, full": ours,
    "ours, full, plain kernels": partial(ours, fused=False),
    "ours, full, every layer recomputed": partial(ours, every=1),
    "ours, LoRA": partial(ours, lora=True),
    "ours, QLoRA": partial(ours, lora=True, in_4bit=True),
}


# ---- a decoding step -------------------------------------------------------------------------------------------------


def decoding(small, rows: int, our_own: bool) -> Counter:
    """One step of generate, sampled as Qwen3 wants it: the mean of the last 16 of 32, at a cache of 512."""
    from decode_speed import SAMPLING

    from parts.model import fused, generate

    trace, counts = Tracer(true=rows), []  # none is finished before the last token
    plain_forward = generate.Decoder.forward

    def forward(decoder, *args):
        trace.replayed = decoder.used > CACHE - 2 * STEPS  # after the prompt
        try:
            return plain_forward(decoder, *args)
        finally:
            trace.replayed = False

    with tracing(trace), mock.patch.object(generate.Decoder, "forward", forward), torch.no_grad():
        model = build_model(small, "meta").eval()
        if our_own:
            fused.fuse_norms(model)
            fused.fuse_layers(model, norms=False)
        ids = torch.zeros(rows, CACHE - 2 * STEPS, dtype=torch.long, device="meta")
        for tokens in (STEPS, 2 * STEPS):
            trace.ops.clear()
            trace.left = tokens
            options = {"max_new_tokens": tokens, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
            model.generate(ids, custom_generate=generate.decode if our_own else None, **options, **SAMPLING)
            counts.append(trace.ops.copy())
    mean = {op: number / STEPS for op, number in (counts[1] - counts[0]).items()}
    return Counter(mean | ({Op("replay of the graph"): 1} if our_own else {}))


DECODING = {
    f"{name}, {rows} row{'s' * (rows > 1)}": partial(decoding, rows=rows, our_own=our_own)
    for rows in (1, 64)
    for name, our_own in (("generate", False), ("ours", True))
}


# ---- tables ----------------------------------------------------------------------------------------------------------


def total(ops: Counter, key: str) -> float:
    return sum(number * getattr(op, key) for op, number in ops.items())


def busy(ops: Counter, card: str) -> float:
    """Seconds that the GPU works at least."""
    return sum(number * op.seconds(card) for op, number in ops.items())


def launching(ops: Counter, launch: float) -> float:
    """Seconds that Python takes to launch a step."""
    return launch * sum(number * op.kernels for op, number in ops.items() if not op.replayed)


def least(ops: Counter, card: str, launch: float = LAUNCH) -> float:
    """Seconds that a step takes at least."""
    return max(busy(ops, card), launching(ops, launch)) + total(ops, "waits") * WAIT


def table(arms: dict, small: bool, tokens: dict[str, int], first: str) -> None:
    cards = " | ".join(f"ms {card}" for card in CARDS)
    print(f"\n| {first} | TFLOP | GB moved | kernels | waits | {cards} | H100, 20 us | tokens/s H100 | x first |")
    print("| --- " * (8 + len(CARDS)) + "|")
    speeds: dict[int, float] = {}
    limited = []  # by Python
    for name, arm in arms.items():
        ops = arm(small)
        speed = tokens[name] / least(ops, "H100")
        ratio = speed / speeds.setdefault(tokens[name], speed)
        sums = f"{total(ops, 'flops') / 1e12:.3f} | {total(ops, 'bytes') / 1e9:.2f} | {total(ops, 'kernels'):.0f}"
        times = " | ".join(f"{1e3 * least(ops, card):.2f}" for card in CARDS)
        slow = f"{1e3 * least(ops, 'H100', SLOW_LAUNCH):.2f}"
        print(
            f"| {name} | {sums} | {total(ops, 'waits'):.2g} | {times} | {slow} | {speed:.0f} | {ratio:.2f} |",
            flush=True,
        )
        slower = [card for card in CARDS if launching(ops, SLOW_LAUNCH) > busy(ops, card)]
        limited += [f"{name} ({', '.join(slower)})"] * bool(slower)
    print(f"\nWhere a launch takes 20 us, Python is the limit of: {'; '.join(limited) or 'none'}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a two-layer model")
    args = parser.parse_args()
    print("# Least times by arithmetic: a model, not a measurement")
    table(TRAINING, args.small, dict.fromkeys(TRAINING, sum(LENGTHS)), "training step")
    table(DECODING, args.small, {name: arm.keywords["rows"] for name, arm in DECODING.items()}, "decoding step")


if __name__ == "__main__":
    main()
