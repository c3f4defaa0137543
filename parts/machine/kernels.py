"""Which fast paths of a training run on this device and agree with their plain forms: torch's attention for
packed batches, Liger's layers, the optimizer's step, the loss, 4-bit layers. None is used that was not seen
to agree here. Knows no plan and no flag."""

import functools
import importlib.util
from functools import partial
from typing import NamedTuple

import accelerate
import torch
from torch.utils.benchmark import Timer

from parts.model import fused
from parts.model.fused import ROUNDING, Verdict, attempt, compare, missing
from parts.training import optimizers, packing
from parts.training.packing import LinearCrossEntropy

# Tokens of the examples tried: from 32,768 rows on, 4,096 x 8 heads, Liger's norms run another way.
LENGTHS = (1400, 2800)
NOT_SLOWER = 1.05  # of the plain form's time: what is measured varies by some per cent
FOUR_BITS = 0.15  # relative difference that NF4 explains, 0.1 of random weights, and bfloat16's rounding
OFF = Verdict(False, "--fast_kernels false", expected=False)


class Kernels(NamedTuple):
    """The fast paths of a training that have a plain form to fall back to."""

    attention: Verdict = OFF
    layers: Verdict = OFF
    step: Verdict = OFF


def choose(model) -> Kernels:
    """Give `model` packed_attention; return what runs here and agrees with its plain form. Liger's layers are
    not put in yet: they may be slower."""
    packing.use(model)
    attention, layers = varlen_missing(model), fused.layers_missing(model)
    if not (attention and layers):
        # Without this line a person would take the program for hung.
        print("检查这块卡上的快速算子：第一次要编译，可能要半分钟……", flush=True)
        # On a model of one layer: the model itself would keep gradients of all its weights.
        probe = fused.shrink(model)
        run = partial(fused.outcome, probe, LENGTHS, lengths=LENGTHS)
        plain = attempt(run)
        if not attention:
            attention = compare(plain, attempt(run, starts=packing.starts_of(LENGTHS, probe.device)))
        # Last, as the probe's layers are exchanged for good.
        layers = layers or time_layers(probe, plain, run)
    return Kernels(attention, layers, try_step("kahan", model.device, triton=True))


def time_layers(probe, plain, run) -> Verdict:
    """Tell whether Liger's layers in `probe` leave the outcome of `run()` as it is, `plain`, and how long it
    then takes: by the first process's clock, as all wait for each other at each step."""
    plain_seconds = attempt(seconds_of, run)
    verdict = fused.try_layers(probe, plain, run)
    time = seconds_of(run) / plain_seconds if verdict.runs else 0.0
    fused.restore(probe)  # the rotary embedding, which Liger exchanges for all models
    [time] = accelerate.utils.broadcast_object_list([time])
    why = f"{verdict.why}，用时为其 {time:.0%}" if verdict.runs else verdict.why
    return verdict._replace(slower=time > NOT_SLOWER, why=why)


def seconds_of(run) -> float:
    """Return the median seconds of `run()`, which has run before, of as many as fit into 0.2 seconds."""
    return Timer("run()", globals={"run": run}).blocked_autorange().median


def varlen_missing(model) -> Verdict | None:
    """Tell why torch's attention kernel for packed batches cannot run here, or None."""
    if model.device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        return missing("只支持 sm80 及以上的 NVIDIA GPU")
    return missing("只支持 bfloat16 和 float16") if model.dtype == torch.float32 else None


def describe(kernels: Kernels) -> str:
    """Return what runs, in one line."""
    attention, layers, step = kernels
    plain = f"逐条 sdpa（未启用 torch varlen：{attention.why}）"
    line = f"注意力：{'torch varlen' if attention.runs else plain}"
    line += f"；融合算子：{f'Liger（{layers.why}）' if layers.runs else f'未启用（{layers.why}）'}"
    # What cannot be there, on a CPU say, is not worth a word.
    if step.expected:
        line += f"；优化器：{'Triton' if step.runs else f'未启用 Triton（{step.why}）'}"
    return line


def require(model, in_4bit: bool) -> dict[str, Verdict]:
    """Try what has no other form to fall back to. Raises SystemExit where it is wrong here."""
    verdicts = {"损失": try_loss(model.device, model.dtype)}
    if in_4bit:
        verdicts["4 位层"] = try_4bit_layer(model.device, model.dtype)
    for name, verdict in verdicts.items():
        if not verdict.runs:
            remedy = "请升级驱动，或更换 torch、bitsandbytes 的版本"
            raise SystemExit(f"错误：{name}在这台机器上的结果不对（{verdict.why}）；{remedy}。")
    return verdicts


@functools.cache  # compiled once a process
def try_step(name: str, device: torch.device, triton: bool = False) -> Verdict:
    """Tell whether the steps of this optimizer (its name in OPTIMIZERS) run here, and are AdamW's. `triton`:
    with its kernel."""
    package = "triton" if triton else "torchao" if name.startswith("8bit") else "optimi"
    if importlib.util.find_spec(package) is None or triton and device.type != "cuda":
        return missing("需要 GPU 和 triton" if triton else f"没有 {package}，请先运行 pip install {package}")
    if device.type == "cuda" and fused.best_dtype(device) != torch.bfloat16:
        return missing("这张卡不支持 bfloat16")
    if package == "torchao":
        # torchao compiles its step; without this line a person would take the program for hung.
        print("检查 8 位优化器：第一次要编译，可能要一两分钟……", flush=True)
    deviation = attempt(optimizers.deviation, name, device, triton)
    if isinstance(deviation, Exception):
        return Verdict(False, fused.reason(deviation))
    # bfloat16's moments explain 0.1 %, which was seen on a CPU; 8-bit states round more.
    most = 0.005 if name == "kahan" else ROUNDING
    return Verdict(deviation < most, f"与算式相差 {deviation:.1%}")


def try_loss(device: torch.device, dtype: torch.dtype) -> Verdict:
    """Tell whether the loss without logits is that of all logits here, its gradients too: of 128 tokens of 64
    dimensions and a vocabulary of 1,024."""
    tensors = draw((128 + 1024, 64), dtype).to(device).split((128, 1024))  # hidden states, weight
    labels = (torch.arange(128) * 7).to(device)

    # Logits are sums of 64 products, with a standard deviation of 8; divided by it they have one of 1.
    def plain(hidden, weight):
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float() / 8, labels, reduction="sum")

    def ours(hidden, weight):
        return LinearCrossEntropy.apply(hidden / 8, weight, labels)[0]

    return compare(attempt(gradients, plain, tensors), attempt(gradients, ours, tensors))


def try_4bit_layer(device: torch.device, dtype: torch.dtype) -> Verdict:
    """Tell whether a linear layer in NF4 gives here what it gives in `dtype`, but for the four bits."""
    # Not at the top: it is installed only where it is wanted, and its import starts CUDA.
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight, inputs, direction = draw((3, 256, 256), dtype)
    layer = Linear4bit(256, 256, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer, weight = layer.to(device), weight.to(device)  # the layer is quantized on its way to the device
    given = ([inputs.to(device)], direction.to(device))
    plain = attempt(gradients, lambda x: x @ weight.T, *given)
    return compare(plain, attempt(gradients, layer, *given), FOUR_BITS)


def gradients(function, inputs, direction=None) -> list[torch.Tensor]:
    """Return what `function` makes of the inputs, and its gradients to each of them: those of its sum along
    `direction`, which a function of one number does not need."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, direction)]


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return standard normal numbers, always the same, in the CPU's memory."""
    # A generator of their own: the training's random numbers are the same with and without these checks.
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
