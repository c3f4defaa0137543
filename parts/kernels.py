"""Which fast kernels run on this device and agree with the plain ones: torch's attention for packed batches, Liger's
norms, rotary embedding and SwiGLU. None is used that was not seen to agree here. Knows no plan and no flag."""

import copy
import importlib.util
from typing import NamedTuple

import torch

from parts import packing
from parts.terminal import first_line, shorten

LENGTHS = (37, 91)  # tokens of the two examples that the kernels are tried on


class Kernels(NamedTuple):
    """What runs here: None for a kernel that does, else why it does not."""

    no_varlen: str | None = "--fast_kernels false"
    no_fused: str | None = "--fast_kernels false"

    @property
    def varlen(self) -> bool:
        return self.no_varlen is None

    @property
    def fused(self) -> bool:
        return self.no_fused is None


def choose(model) -> Kernels:
    """Give `model` packed_attention, and those of Liger's kernels that run here."""
    packing.use(model)
    no_varlen, no_fused = varlen_missing(model), fused_missing(model)
    if not (no_varlen and no_fused):
        probe = shrink(model)
        plain = outcome(probe, starts=False)
        no_varlen = no_varlen or disagreement(plain, outcome(probe, starts=True))
        no_fused = no_fused or try_fused(probe, plain)
    if no_fused is None:
        fuse(model)
    return Kernels(no_varlen, no_fused)


def varlen_missing(model) -> str | None:
    """Why torch's attention kernel for packed batches cannot run here, or None."""
    if model.device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        return "它只在 sm80 及以上的 NVIDIA GPU 上"
    return "它只算 bfloat16 和 float16" if model.dtype == torch.float32 else None


def fused_missing(model) -> str | None:
    """Why Liger's kernels cannot run here, or None."""
    there = model.device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    return None if there else "它要 GPU 和 liger-kernel"


def shrink(model):
    """A model of one layer with the same heads on the same device, small elsewhere: it takes 2 million weights."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    config.vocab_size, config.hidden_size, config.intermediate_size = 128, 256, 512
    config.pad_token_id = None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    probe = type(base)(config).to(model.device, model.dtype)
    packing.use(probe)
    return probe


def fuse(model) -> None:
    """Liger's norms, rotary embedding and SwiGLU in place of transformers'; the loss is our own. Liger exchanges the
    module's classes too, for models that are still to be made: those stay plain."""
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.models.qwen3 import modeling_qwen3

    plain = modeling_qwen3.Qwen3RMSNorm, modeling_qwen3.Qwen3MLP
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    modeling_qwen3.Qwen3RMSNorm, modeling_qwen3.Qwen3MLP = plain


def try_fused(probe, plain) -> str | None:
    """Why Liger's kernels are not used; None: they run, and agree with the `plain` outcome."""
    from transformers.models.qwen3 import modeling_qwen3

    rotary = modeling_qwen3.apply_rotary_pos_emb  # a function, which Liger exchanges for all models
    fuse(probe)
    why = disagreement(plain, outcome(probe, starts=False))
    if why:
        modeling_qwen3.apply_rotary_pos_emb = rotary
    return why


def outcome(probe, starts: bool) -> list[torch.Tensor] | Exception:
    """What the layer gives for two short examples, and the gradients of its sum along a random direction for all
    weights, or the error that it raised. `starts`: with torch's attention kernel for packed batches.

    The squared sum would not do: behind a norm it is a constant, whose gradients are nothing but rounding.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(128, (1, sum(LENGTHS)), generator=generator).to(probe.device)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].to(probe.device)
    inputs = {"input_ids": ids, "position_ids": positions, "lengths": LENGTHS, "use_cache": False}
    if starts:
        inputs["starts"] = packing.starts_of(LENGTHS, probe.device)
    try:
        hidden = probe.get_decoder()(**inputs).last_hidden_state
        weights = list(probe.get_decoder().parameters())
        direction = torch.randn(hidden.shape, generator=generator).to(hidden.device)
        return [hidden.detach(), *torch.autograd.grad((hidden.float() * direction).sum(), weights)]
    except Exception as error:  # whatever a kernel, its compiler or the driver raises: then it is not used
        return error


def disagreement(plain, fast) -> str | None:
    """What is wrong with `fast` beside `plain`, of `outcome`; None when they differ by rounding alone."""
    for found in (plain, fast):
        if isinstance(found, Exception):
            return shorten(first_line(found), 100)
    differences = [((a - b).float().norm() / a.float().norm()).item() for a, b in zip(plain, fast)]
    worst = next((size for size in differences if not size < 0.03), None)  # NaN is not smaller either
    return None if worst is None else f"与普通算子相差 {worst:.1%}"


def describe(kernels: Kernels) -> str:
    """What runs, in one line."""
    attention = f"逐条 sdpa（不用 torch varlen：{kernels.no_varlen}）" if kernels.no_varlen else "torch varlen"
    return f"注意力：{attention}；融合算子：{f'不用（{kernels.no_fused}）' if kernels.no_fused else 'Liger'}"
