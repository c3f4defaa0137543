"""What training and asking share of fast paths: whether a fast form gives here what its plain form gives, and
norms as one kernel. Knows no plan, no flag and no prompt."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from parts.terminal import first_line, shorten

ROUNDING = 0.03  # relative difference that bfloat16 explains; right kernels were under 0.01 on a CPU
COMPILER = "没有 C 编译器，Linux 上可以 apt install gcc"


class Verdict(NamedTuple):
    """What is known of a fast path on this device."""

    runs: bool
    why: str  # how far its outcome is from the plain one's, or why it is left out
    expected: bool = True  # that it runs: what the device or the installation does not have is no fault


def missing(why: str) -> Verdict:
    """The verdict on what cannot run here, and need not."""
    return Verdict(False, why, expected=False)


def attempt(run: Callable, *args, **kwargs):
    """Return what `run` returns, or the error that it raised: whatever a kernel, its compiler or the driver
    raises."""
    try:
        return run(*args, **kwargs)
    except Exception as error:
        return error


def compare(plain, fast, most: float = ROUNDING) -> Verdict:
    """Tell whether the outcome `fast` differs from `plain` by `most` at the most. Each is a list of tensors,
    or the error that came in its place."""
    for outcome in (plain, fast):
        if isinstance(outcome, Exception):
            return Verdict(False, reason(outcome))
    sizes = [difference(*pair) for pair in zip(plain, fast)]
    worst = torch.tensor(sizes).max().item()  # NaN, if one of them is: it counts as too large
    return Verdict(worst < most, f"与普通算子相差 {worst:.1%}")


def difference(plain: torch.Tensor, fast: torch.Tensor) -> float:
    """Return the norm of the difference, relative to the plain tensor's; of two tensors of zeros it is 0."""
    return 0.0 if plain.equal(fast) else ((plain - fast).float().norm() / plain.float().norm()).item()


def reason(error: Exception) -> str:
    """Return why a kernel failed, in a few words."""
    return COMPILER if "C compiler" in str(error) else shorten(first_line(error), 100)


def fuse_norms(model) -> None:
    """Replace each RMSNorm of Qwen3 or Qwen2, in place, by torch's with the same weight: one GPU kernel
    instead of eight."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (Qwen2RMSNorm, Qwen3RMSNorm)):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, device="meta")
            norm.weight = module.weight
            model.set_submodule(name, norm)
