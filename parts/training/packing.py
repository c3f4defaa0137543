"""Examples end to end in one batch [1, T], without padding and blind to each other; batches cut between
examples; and their loss, for which the logits never exist all at once. Does not know which kernels run here:
where `starts` come in, torch's kernel for such batches is used."""

import inspect

import torch
import transformers
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

LOSS_BYTES = 500_000_000  # of logits and their gradient at a time; all are 14 x vocabulary a token
PACKED = "packed"  # name of packed_attention among transformers' attention implementations
# Before torch 2.13 grouped heads need no word.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class PackedCollator(transformers.DataCollatorWithFlattening):
    """A batch is its examples one after another, [1, T], without padding; position ids restart at each, and
    `lengths` has their lengths in tokens, as whole numbers that stay on the CPU."""

    def __call__(self, features, **kwargs):
        lengths = tuple(len(feature["input_ids"]) for feature in features)
        return super().__call__(features, **kwargs) | {"lengths": lengths}


def split_batch(inputs: dict, most: int) -> list[dict]:
    """Cut the batch into batches of whole examples, of at most `most` tokens each, or of one example."""
    lengths = inputs["lengths"]
    groups = [tuple(lengths[i] for i in group) for group in group_rows(range(len(lengths)), lengths, most)]
    sizes = [sum(group) for group in groups]
    names = ("input_ids", "labels", "position_ids")
    tensors = zip(*(inputs[name].split(sizes, dim=1) for name in names))
    return [dict(zip(names, part)) | {"lengths": group} for part, group in zip(tensors, groups)]


def group_rows(rows, lengths, most: int) -> list[list[int]]:
    """Return the `rows` in their order, in groups of at most `most` tokens each, or of one row."""
    groups: list[list[int]] = []
    tokens = 0  # of the last group
    for row in rows:
        if not groups or tokens + lengths[row] > most:
            groups.append([])
            tokens = 0
        groups[-1].append(row)
        tokens += lengths[row]
    return groups


def lengths_of(dataset) -> list[int]:
    """Return the tokens of each example."""
    return [len(ids) for ids in dataset["input_ids"]]


def token_batches(dataset, rank: int, world_size: int, most: int) -> list[list[int]]:
    """Return this rank's share of the examples, by length, in batches of `most` tokens at most (or of one
    example)."""
    lengths = lengths_of(dataset)
    return group_rows(sorted(range(len(lengths)), key=lengths.__getitem__)[rank::world_size], lengths, most)


def packed_attention(module, query, key, value, attention_mask, scaling, lengths, starts=None, **_):
    """Attend causally within each example of a packed batch, and not between them.

    query [1, heads, T, D], key and value [1, key heads, T, D], lengths of the examples, starts [examples + 1]
    where torch's kernel for such batches runs -> ([1, T, heads, D], None). Elsewhere one example after
    another: a mask for all of them would be T x T.
    """
    assert attention_mask is None and sum(lengths) == query.shape[2], (lengths, query.shape)
    if starts is None:
        if repeats_heads(query.device, query.dtype):
            groups = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        options = {"is_causal": True, "scale": scaling, "enable_gqa": key.shape[1] < query.shape[1]}
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
        return torch.cat(
            [scaled_dot_product_attention(*part, **options).transpose(1, 2) for part in parts], 1
        ), None
    assert len(starts) == len(lengths) + 1, (len(starts), lengths)  # else it would read what is no token
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    options = {"scale": scaling, "window_size": (-1, 0)} | GROUPED
    return varlen_attn(query, key, value, starts, starts, max(lengths), max(lengths), **options)[None], None


def repeats_heads(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether each key and value head is repeated for its queries: where torch's flash kernel is
    missing, grouped heads would fall to the one that keeps all scores, 319 MB a layer for an example of 2,048
    tokens."""
    if device.type in ("mps", "npu"):  # repeated heads are right everywhere, grouped ones were not seen to be
        return True
    if device.type != "cuda" or torch.version.hip:
        return False
    return dtype == torch.float32 or torch.cuda.get_device_capability(device) < (8, 0)


def starts_of(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return [examples + 1], int32: where each example of a packed batch starts, and where the last one
    ends."""
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)


def use(model) -> None:
    """Let `model` attend with packed_attention."""
    transformers.AttentionInterface.register(PACKED, packed_attention)
    model.set_attn_implementation(PACKED)


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of an output layer that never holds all its logits, with their gradients made on the way.

    hidden [N, H], weight [V, H], labels [N] -> (sum of the losses, the losses [N]), both float32. Only the
    sum can be differentiated. Row chunks of LOSS_BYTES: full logits would take 6.8 GB at 3,200 tokens and
    Qwen3's vocabulary, and working them out once more in the backward pass would cost 6 % of a training
    step's FLOPs.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        losses = torch.empty(len(labels), device=hidden.device, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # frozen under LoRA
        rows = max(1, LOSS_BYTES // (len(weight) * 8))  # float32 logits, and as much again inside logsumexp
        for part in (slice(start, start + rows) for start in range(0, len(labels), rows)):
            logits = (hidden[part] @ weight.T).float()
            log_total = logits.logsumexp(dim=-1, keepdim=True)
            losses[part] = (log_total - logits.gather(1, labels[part, None])).squeeze(1)
            if grad_hidden is not None:
                grad = logits.sub_(log_total).exp_()  # the softmax, in the logits' place
                grad.scatter_add_(1, labels[part, None], -torch.ones_like(log_total))
                grad = grad.to(weight.dtype)
                grad_hidden[part] = grad @ weight
                if grad_weight is not None:
                    grad_weight.addmm_(grad.T, hidden[part])
                del grad
            del logits  # else they would live on beside the next ones
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_sum, _):
        return *(grad if grad is None else grad.mul_(grad_sum) for grad in ctx.saved_tensors), None
