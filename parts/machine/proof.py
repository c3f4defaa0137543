"""Whether what is fast gives on this device what its plain form gives: optimizer steps, the loss, 4-bit layers, and any
two outcomes. Knows no model and no plan."""

import functools
import importlib.util

import torch

from parts.model.fused import ROUNDING, Verdict, attempt, compare, missing, reason
from parts.training import optimizers
from parts.training.loss import LinearCrossEntropy

FOUR_BITS = 0.15  # and NF4, 0.1 of random weights


def require(model, in_4bit: bool) -> dict[str, Verdict]:
    """What has no other form to fall back to. Raises SystemExit where it is wrong here."""
    verdicts = {"损失": try_loss(model.device, model.dtype)}
    if in_4bit:
        verdicts["4 位层"] = try_4bit_layer(model.device, model.dtype)
    for name, verdict in verdicts.items():
        if not verdict.runs:
            raise SystemExit(
                f"错误：{name}在这里算不对（{verdict.why}）；请升级驱动，或换一个版本的 torch、bitsandbytes。"
            )
    return verdicts


@functools.cache  # compiled once a process
def try_step(name: str, device: torch.device, triton: bool = False) -> Verdict:
    """Whether this optimizer's steps run here, and are AdamW's. `triton`: with its kernel."""
    package = "triton" if triton else "torchao" if name.startswith("8bit") else "optimi"
    if importlib.util.find_spec(package) is None or triton and device.type != "cuda":
        return missing("它要 GPU 和 triton" if triton else f"没有 {package}，请先运行 pip install {package}")
    if package == "torchao":
        print("检查 8 位优化器：第一次要编译，可能要一两分钟……", flush=True)
    share = attempt(optimizers.share_of_way, name, device, triton)
    if isinstance(share, Exception):
        return Verdict(False, reason(share))
    return Verdict(abs(share - 1) < ROUNDING, f"与算式相差 {abs(share - 1):.1%}")


def try_loss(device: torch.device, dtype: torch.dtype) -> Verdict:
    """Whether the loss without logits is that of all logits here, its gradients too."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 64, generator=generator).to(device, dtype) for rows in (128, 1024))
    labels = torch.randint(1024, (128,), generator=generator).to(device)

    def plain(hidden, weight, labels):
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float() / 8, labels, reduction="sum")

    def ours(hidden, weight, labels):
        return LinearCrossEntropy.apply(hidden / 8, weight, labels)[0]

    def gradients(loss):
        tensors = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        total = loss(*tensors, labels)
        return [total.detach(), *torch.autograd.grad(total, tensors)]

    return compare(attempt(gradients, plain), attempt(gradients, ours))


def try_4bit_layer(device: torch.device, dtype: torch.dtype) -> Verdict:
    """Whether a linear layer in NF4 gives here what it gives in `dtype`, but for the four bits."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    generator = torch.Generator().manual_seed(0)
    weight, inputs, direction = (torch.randn(256, 256, generator=generator).to(dtype) for _ in range(3))
    layer = Linear4bit(256, 256, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer, weight = layer.to(device), weight.to(device)
    inputs, direction = inputs.to(device).requires_grad_(), direction.to(device)

    def run(layer):
        output = layer(inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, direction)]

    return compare(attempt(run, lambda x: x @ weight.T), attempt(run, layer), FOUR_BITS)
