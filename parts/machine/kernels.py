"""Which fast kernels run on this device and agree with the plain ones: torch's attention for packed batches, Liger's
norms, rotary embedding and SwiGLU, the optimizer's in Triton. None is used that was not seen to agree here. Knows no
plan and no flag."""

import copy
import importlib.util
import sys
from typing import NamedTuple

import torch

from parts.machine.proof import try_step
from parts.model.fused import Verdict, attempt, compare, missing
from parts.model.weights import head_dim
from parts.training import packing

# Tokens of the examples tried: from 32,768 rows on, 4,096 x 8 heads, Liger's norms run another way.
LENGTHS = (1400, 2800)
TOKENS = 128  # the vocabulary of the small model that they are tried on
OFF = Verdict(False, "--fast_kernels false", expected=False)


class Kernels(NamedTuple):
    """The fast paths of a training."""

    attention: Verdict = OFF
    layers: Verdict = OFF
    step: Verdict = OFF

    @property
    def varlen(self) -> bool:
        return self.attention.runs

    @property
    def fused(self) -> bool:
        return self.layers.runs


def choose(model, sharded: bool = False) -> Kernels:
    """Give `model` packed_attention, and those of Liger's kernels that run here."""
    packing.use(model)
    attention, layers = varlen_missing(model), fused_missing(model)
    if not (attention and layers):
        probe = shrink(model)
        plain = attempt(outcome, probe)
        attention = attention or compare(plain, attempt(outcome, probe, starts=True))
        layers = layers or try_fused(probe, plain)
    if layers.runs:
        fuse(model)
    step = missing("它不认识分片的权重") if sharded else try_step("kahan", model.device, triton=True)
    return Kernels(attention, layers, step)


def varlen_missing(model) -> Verdict | None:
    """Why torch's attention kernel for packed batches cannot run here, or None."""
    if model.device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        return missing("它只在 sm80 及以上的 NVIDIA GPU 上")
    return missing("它只算 bfloat16 和 float16") if model.dtype == torch.float32 else None


def fused_missing(model) -> Verdict | None:
    """Why Liger's kernels cannot run here, or None."""
    if model.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return missing("它要 GPU 和 liger-kernel")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    return None if kind in MODEL_TYPE_TO_APPLY_LIGER_FN else missing(f"liger-kernel 没有 {kind} 的")


def shrink(model):
    """A model of one layer with the same heads on the same device, small elsewhere: it takes 2 million weights."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.head_dim = 1, head_dim(config)
    config.vocab_size, config.hidden_size, config.intermediate_size = TOKENS, 256, 512
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None  # these may lie outside the vocabulary
    probe = class_of(model)(config).to(model.device, model.dtype)
    packing.use(probe)
    return probe


def base_of(model):
    """The model without its adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def class_of(model) -> type:
    """Of the model without its adapter; a sharded one has a class of FSDP2's before its own."""
    return next(cls for cls in type(base_of(model)).__mro__ if cls.__module__.startswith("transformers."))


def fuse(model) -> None:
    """Liger's norms, rotary embedding and SwiGLU in place of transformers'; the loss is our own. Liger exchanges the
    module's classes too, for models that are still to be made: those stay plain."""
    from transformers.integrations.liger import apply_liger_kernel

    module = vars(sys.modules[class_of(model).__module__])
    classes = {name: value for name, value in module.items() if isinstance(value, type)}
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    module.update(classes)


def try_fused(probe, plain) -> Verdict:
    """Whether Liger's kernels run, and agree with the `plain` outcome."""
    module = vars(sys.modules[type(probe).__module__])
    before = dict(module)  # the rotary embedding is a function, which Liger exchanges for all models
    verdict = compare(plain, attempt(lambda: fuse(probe) or outcome(probe)))
    if not verdict.runs:
        module.update(before)
    return verdict


def outcome(probe, starts: bool = False, lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    """What the layer gives for examples of these lengths, and the gradients of its sum along a random direction for all
    weights. `starts`: with torch's attention kernel for packed batches.

    The squared sum would not do: behind a norm it is a constant, whose gradients are nothing but rounding.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(TOKENS, (1, sum(lengths)), generator=generator).to(probe.device)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(probe.device)
    inputs = {"input_ids": ids, "position_ids": positions, "lengths": lengths, "use_cache": False}
    if starts:
        inputs["starts"] = packing.starts_of(lengths, probe.device)
    hidden = probe.get_decoder()(**inputs).last_hidden_state
    weights = list(probe.get_decoder().parameters())
    direction = torch.randn(hidden.shape, generator=generator).to(hidden.device)
    return [hidden.detach(), *torch.autograd.grad((hidden.float() * direction).sum(), weights)]


def describe(kernels: Kernels) -> str:
    """What runs, in one line."""
    attention, layers, step = kernels
    parts = [
        f"注意力：{'torch varlen' if attention.runs else f'逐条 sdpa（不用 torch varlen：{attention.why}）'}",
        f"融合算子：{'Liger' if layers.runs else f'不用（{layers.why}）'}",
    ]
    if step.expected:
        parts.append(f"优化器：{'Triton' if step.runs else f'不用 Triton（{step.why}）'}")
    return "；".join(parts)
