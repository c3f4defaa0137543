"""Bytes: what a way of training takes at its peak by arithmetic, what is free, what was taken. Knows a layer of
Qwen3 and of Qwen2; the sum stood 0 to 15 % above what torch's own account of the same operations says."""

import math

import accelerate
import psutil
import torch

from parts.model.weights import head_dim
from parts.training.optimizers import state_bytes
from parts.training.packing import LOSS_BYTES, repeats_heads

DRIVER_BYTES = 500_000_000  # of a card, that the driver takes for this process; an estimate
RESERVE_BYTES = 300_000_000  # for what no formula counts: matrix products' workspace, fragments; an estimate


def layer_bytes(model, fused: bool, lora_dropout: float) -> float:
    """Bytes a token that one decoder layer keeps for its backward pass: 117 kB plain and 72 kB fused for Qwen3-1.7B.

    Counted from what the operations of a Qwen3 layer keep: norms their input (plain ones in float32, and before the
    weight), matrix products their input, SiLU and the product of the MLP theirs, attention its four tensors. Qwen2's
    has no norms of queries and keys.
    """
    config, size = model.config, model.dtype.itemsize
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = (heads * head_dim(config) for heads in (config.num_attention_heads, config.num_key_value_heads))
    norm = size if fused else 4 + size
    repeated = query if repeats_heads(model.device, model.dtype) else key
    kept = 2 * (norm + size) * hidden + size * (3 * query + 2 * repeated)
    if any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()):
        kept += norm * (query + key)
    kept += (3 if fused else 4) * size * inner + 4 * config.num_attention_heads
    if lora_dropout:  # each of the seven adapters keeps its own input and the mask; the frozen products keep nothing
        kept += (size + 1) * (5 * hidden + query + inner) - size * (2 * hidden + inner)
    return kept


def is_whole_step(args, tokens: int, worst: int) -> bool:
    """Whether a pass of at most `tokens` holds a whole optimizer step, of `worst` tokens at most."""
    return tokens >= worst and args.gradient_accumulation_steps == 1


def inner_weights(model) -> list:
    """The weights that are neither the embedding nor the output layer: nearly all are the layers'."""
    outer = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    return [p for p in model.parameters() if not any(p is each for each in outer)]


def whole_bytes(model) -> tuple[float, float]:
    """(weights, gradients) of a sharded model that are whole at once on one card: the output layer, and of the layers
    one as it is computed and one on its way in two buffers; the gradients of one, and as much again to be sent."""
    weights, layers = inner_weights(model), model.config.num_hidden_layers
    gradients = 2 * sum(p.nbytes for p in weights if p.requires_grad) / layers
    return model.get_output_embeddings().weight.nbytes + 3 * sum(p.nbytes for p in weights) / layers, gradients


def estimate(
    model, args, fused: bool, tokens: int, every: int, offload: bool, optimizer: str, worst: int
) -> dict[str, float]:
    """Bytes at the peak of training on each card, part by part. `tokens` in one pass, of the `worst` ones of a step."""
    tokens, whole_step = min(tokens, worst), is_whole_step(args, tokens, worst)
    config, size = model.config, model.dtype.itemsize
    trained = [p for p in model.parameters() if p.requires_grad]
    cards = args.world_size if args.fsdp else 1  # that share weights, states and gradients
    gradients = 0 if optimizer.endswith("in_backward") else sum(p.nbytes for p in trained) / cards
    states = state_bytes(trained, optimizer) / cards
    gradients *= 1 + (args.world_size > cards)  # DistributedDataParallel sends copies of them
    whole, whole_gradients = whole_bytes(model) if args.fsdp else (0, 0)
    output = model.get_output_embeddings().weight
    output_gradient = output.numel() * size * output.requires_grad
    layer = tokens * layer_bytes(model, fused, args.lora_dropout * (output_gradient == 0))
    checkpointed = math.ceil(config.num_hidden_layers / every) if every else 0
    kept = (config.num_hidden_layers - checkpointed) * layer
    kept += 0 if offload else checkpointed * tokens * size * config.hidden_size
    tail = tokens * (4 + 4 * size) * config.hidden_size  # last norm, and the gradient on its way down
    loss = tokens * len(output) * 14 if args.full_logits else min(LOSS_BYTES, tokens * len(output) * 8)
    # Gradients on their way down through an MLP, while its activations, kept or recomputed, are still there.
    flowing = tokens * size * (4 * config.intermediate_size + 2 * config.hidden_size)
    # Where the output layer is the embedding too, the second gradient of it is added to the first one in place, unless
    # that had to be added to the sum of earlier passes; else the embedding's own is new beside that sum alone.
    tied = output is model.get_input_embeddings().weight
    second = output_gradient * (tied + (not whole_step))
    last_recomputed = every > 0 and (config.num_hidden_layers - 1) % every == 0  # while all others are still kept
    top = kept + max(loss + tail, flowing + layer * last_recomputed)
    top += output_gradient + whole_gradients + (0 if whole_step else gradients)
    bottom = max(gradients, output_gradient) + max(second, layer + flowing)
    if args.fsdp:  # the output layer's gradient is whole to the end, and is sent after an embedding's of its own
        bottom = gradients + output_gradient + max(output_gradient * (2 - tied), layer + flowing + whole_gradients)
    return {
        "权重": model.get_memory_footprint() / cards + whole,
        "优化器": states,
        "一步之内": max(top, bottom),
        "余量": RESERVE_BYTES,
    }


def is_own(device: torch.device) -> bool:
    """Whether a device has memory of its own: a GPU or an NPU; Apple's chips share the CPU's."""
    return device.type not in ("cpu", "mps")


def free_here(device: torch.device) -> float:
    """Bytes that are free for this process now, on a card with what it holds already."""
    if not is_own(device):
        return psutil.virtual_memory().available
    backend = getattr(torch, device.type)  # torch.cuda, torch.npu
    if not backend.is_available():  # planned for one that is not here
        return math.inf
    return backend.mem_get_info()[0] + backend.memory_reserved()


def free(args, model) -> float:
    """Bytes that training may take, its weights included: what is free now in the process that has least,
    and at most --memory_gb less the driver's own."""
    most = args.memory_gb * 1e9 - DRIVER_BYTES if args.memory_gb else math.inf
    found = free_here(args.device) + (0 if is_own(args.device) else model.get_memory_footprint())
    found = accelerate.utils.gather_object([found])
    if is_own(args.device) and max(found) > 1.1 * min(found):
        print(f"各张卡空闲的显存不同（{'、'.join(f'{size / 1e9:.1f}' for size in found)} GB），都按最少的规划。")
    return min(*found, most)


def peak(device: torch.device) -> int:
    """Bytes: the most the device's allocator has reserved; elsewhere what the process holds now."""
    backend = getattr(torch, device.type, None)  # torch.cuda, torch.npu
    if hasattr(backend, "max_memory_reserved"):
        return backend.max_memory_reserved()
    return psutil.Process().memory_info().rss
