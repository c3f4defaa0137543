"""What training and asking share of fast paths: whether a fast form gives here what its plain form gives,
norms as one kernel, and Liger's layers; and in what a device computes best. It knows no plan, no flag and no
prompt."""

import copy
import functools
import importlib.util
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from parts.terminal import first_line, shorten

ROUNDING = 0.03  # relative difference that bfloat16 explains; right kernels were under 0.01 on a CPU
PROBE_VOCABULARY = 128  # of the small model on which kernels are tried
PROBE_IDS = range(100, 120)  # ordinary tokens in every vocabulary here
COMPILER = "没有 C 编译器，Linux 上可以 apt install gcc"
HEADERS = "没有 Python.h，Linux 上可以 apt install python3-dev"


class Verdict(NamedTuple):
    """What is known of a fast path on this device."""

    runs: bool
    why: str  # how far its outcome is from the plain one's, or why it is left out
    expected: bool = True  # False where the device or the installation does not have it, which is no fault
    slower: bool = False  # than the plain one, where both were timed


def missing(why: str) -> Verdict:
    """Return the verdict on what cannot run here, or is not worth it, and need not."""
    return Verdict(False, why, expected=False)


def attempt(run, *args, **kwargs):
    """Return what `run` returns, or the error that it raised."""
    try:
        return run(*args, **kwargs)
    except Exception as error:  # a kernel, its compiler and the driver each raise what they like
        return error


def compare(plain, fast, most: float = ROUNDING) -> Verdict:
    """Tell whether the outcome `fast` differs from `plain` by less than `most`, relatively, in every tensor.
    Each is a list of tensors, or the error that came in its place."""
    for outcome in (plain, fast):
        if isinstance(outcome, Exception):
            return Verdict(False, reason(outcome))
    # torch's maximum is NaN where one of them is, and NaN is never less; Python's max may pass over it.
    worst = torch.tensor(list(map(difference, plain, fast))).max().item()
    return Verdict(worst < most, f"与普通算子相差 {worst:.1%}")


def difference(plain: torch.Tensor, fast: torch.Tensor) -> float:
    """Return the norm of the difference, relative to the norm of the plain tensor."""
    if plain.equal(fast):  # two tensors of zeros would give 0/0
        return 0.0
    return ((plain - fast).float().norm() / plain.float().norm()).item()


def reason(error: Exception) -> str:
    """Return why a kernel failed, in a few words."""
    if "C compiler" in str(error):
        return COMPILER
    # Triton's error is its compiler's command and status: what it says itself goes straight to the screen.
    compiled = "exit status" in str(error) or "Python.h" in str(error)
    if compiled and not Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h").is_file():
        return HEADERS
    return shorten(first_line(error), 100)


def fuse_norms(model) -> None:
    """Replace each RMSNorm like Llama's or Qwen's, in place, by torch's with the same weight: one GPU kernel
    instead of eight."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):  # Gemma's, which adds 1 to its weight, has none
            # On "meta" it takes no memory: its weight of ones is replaced at once.
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, device="meta")
            norm.weight = module.weight
            model.set_submodule(name, norm)


def layers_missing(model) -> Verdict | None:
    """Tell why Liger's layers cannot run in place of the model's here, or None."""
    if model.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return missing("需要 GPU 和 liger-kernel")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    family = model.config.model_type
    return None if family in MODEL_TYPE_TO_APPLY_LIGER_FN else missing(f"liger-kernel 不支持 {family}")


def fuse_layers(model, norms: bool = True) -> None:
    """Put Liger's norms, unless told, rotary embedding and SwiGLU in place of transformers', in this model
    alone; but the rotary embedding is a function, which is exchanged for all models of the family."""
    from transformers.integrations.liger import apply_liger_kernel

    # The loss stays: training has one of its own, which needs no logits.
    module, loss = restore(model), {"cross_entropy": False, "fused_linear_cross_entropy": False}
    apply_liger_kernel(model, {"rms_norm": norms} | loss)
    # Liger exchanges the classes of transformers' module too, for models that are still to be made: those
    # stay plain, as what Liger gives was only compared for this one.
    vars(module).update({name: value for name, value in originals(module).items() if isinstance(value, type)})


@functools.cache
def originals(module) -> dict:
    """Return what transformers' module has, as it was before anything of Liger's was put into it."""
    return dict(vars(module))


def restore(model):
    """Give all models of this one's family transformers' own rotary embedding again; return its module."""
    module = sys.modules[class_of(model).__module__]
    vars(module).update(originals(module))
    return module


def try_layers(probe, plain, run, norms: bool = True) -> Verdict:
    """Put Liger's layers into `probe`, and tell whether the outcome of `run()` is then still `plain`."""
    error = attempt(fuse_layers, probe, norms)
    verdict = compare(plain, error or attempt(run))
    if not verdict.runs:
        restore(probe)
    return verdict


def shrink(model):
    """Return a model of one layer on the same device, with random weights and a small vocabulary, on which
    kernels are tried: its plain form. The layer is as wide as the model's, as that decides which kernels run
    and how fast they are."""
    restore(model)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.head_dim = 1, head_dim(config)
    config.vocab_size = PROBE_VOCABULARY
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    # These may lie outside the small vocabulary.
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    with model.device:  # where drawing half a billion numbers takes no time
        probe = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    # Set anew: it lies in a private field, and with another attention the trial would prove nothing.
    probe.set_attn_implementation(model.config._attn_implementation)
    return probe


def class_of(model) -> type:
    """Return transformers' class of the model, without its adapter."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # FSDP2 gives a sharded model a class of its own, which stands before transformers'.
    return next(cls for cls in type(base).__mro__ if cls.__module__.startswith("transformers."))


def outcome(probe, sizes: tuple[int, ...], **attention) -> list[torch.Tensor]:
    """Return the hidden states [1, T, hidden] of random examples of `sizes` tokens, end to end in [1, T], and
    the gradients of all weights along a random direction. `attention` is handed to its attention."""
    # Drawn on the CPU, so that every device is asked the same.
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(PROBE_VOCABULARY, (1, sum(sizes)), generator=generator).to(probe.device)
    positions = torch.cat(list(map(torch.arange, sizes)))[None].to(probe.device)  # [1, T], from 0 in each
    decoder = probe.get_decoder()
    hidden = decoder(input_ids=ids, position_ids=positions, use_cache=False, **attention).last_hidden_state
    # The squared sum would not do: behind a norm it is a constant, whose gradients are nothing but rounding.
    direction = torch.randn(hidden.shape, generator=generator).to(hidden.device)
    total = (hidden.float() * direction).sum()
    return [hidden.detach(), *torch.autograd.grad(total, list(decoder.parameters()))]


def head_dim(config) -> int:
    """Return the size of one attention head, which Qwen2's configuration does not give."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def best_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device computes in it; else float16 on a GPU, for weights that are not
    trained, and float32 elsewhere."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        has_bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        has_bf16 = device.type == "npu"
    if has_bf16:
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def require_range(model, path: str, for_training: bool) -> None:
    """Make a float16 model that is to be asked float32 where its numbers are too large. Raises SystemExit
    where it is to be trained: the dtype stands among the run's settings by then.

    float16 ends at 65,504, which is too little for Qwen2-1.5B (QwenLM/Qwen3#826).
    """
    # The largest numbers belong to the first token, whatever it is, and from there spoil all others.
    ids = torch.tensor([PROBE_IDS], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, logits_to_keep=1).logits
    if logits.isfinite().all():
        return
    problem = f"{path} 的中间结果超出 float16 的范围"
    if for_training:
        remedy = "请加 --fast_kernels false，用 float32 训练，或换一个模型"
        raise SystemExit(f"错误：{problem}；{remedy}。")
    print(f"提示：{problem}，改用 float32。", flush=True)
    model.float()
