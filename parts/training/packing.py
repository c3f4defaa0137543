"""Packed batches [1, T]: examples one after another, without padding, none of which attends to another. How
such a batch is split between examples, its attention, and its loss, for which the logits never exist all at
once. It does not know which kernels run here: where it is given `starts`, torch's kernel for such batches is
used."""

import inspect

import torch
import transformers
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

# Logits and their gradients that exist at a time.
LOSS_BYTES = 500_000_000
LOGIT_BYTES = 8  # of each logit of such a chunk: float32, and as much again inside logsumexp
PACKED = "packed"  # name of packed_attention among transformers' attention implementations
# Before torch 2.13 varlen_attn takes grouped heads without being told.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class PackedCollator(transformers.DataCollatorWithFlattening):
    """It puts examples one after another, [1, T]; position ids restart at each. `lengths` has their tokens as
    Python integers: to read them from a GPU would be to wait for it."""

    def __call__(self, features, **kwargs):
        lengths = tuple(len(feature["input_ids"]) for feature in features)
        return super().__call__(features, **kwargs) | {"lengths": lengths}


def split_batch(inputs: dict, max_tokens: int) -> list[dict]:
    """Split a packed batch [1, T] into batches of whole examples, each of at most `max_tokens` tokens or of
    one example."""
    names, lengths = ("input_ids", "labels", "position_ids"), inputs["lengths"]
    batches, start = [], 0
    for rows in group_rows(range(len(lengths)), lengths, max_tokens):
        group = lengths[rows[0] : rows[-1] + 1]  # the rows of a group are consecutive
        end = start + sum(group)
        batches.append({name: inputs[name][:, start:end] for name in names} | {"lengths": group})
        start = end
    return batches


def group_rows(rows, lengths, max_tokens: int) -> list[list[int]]:
    """Return the `rows` in their order, in groups of at most `max_tokens` tokens each, or of one row."""
    groups: list[list[int]] = []
    tokens = 0  # of the last group
    for row in rows:
        if not groups or tokens + lengths[row] > max_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(row)
        tokens += lengths[row]
    return groups


def lengths_of(dataset) -> list[int]:
    """Return the number of tokens of each example."""
    return list(map(len, dataset["input_ids"]))


def token_batches(dataset, rank: int, world_size: int, max_tokens: int) -> list[list[int]]:
    """Return this rank's share of the rows, the shortest first, in batches of at most `max_tokens` tokens, or
    of one row."""
    lengths = lengths_of(dataset)
    # Every world_size-th of the sorted rows: the ranks get examples of about equal length.
    shortest_first = sorted(range(len(lengths)), key=lengths.__getitem__)
    return group_rows(shortest_first[rank::world_size], lengths, max_tokens)


def packed_attention(module, query, key, value, attention_mask, scaling, lengths, starts=None, **_):
    """Attend causally within each example of a packed batch, and not between them.

    query [1, heads, T, D], key and value [1, key heads, T, D], lengths of the examples, starts [examples + 1]
    where torch's kernel for such batches runs -> ([1, T, heads, D], None). Elsewhere it takes one example
    after another: a mask for all of them would be T x T.
    """
    # transformers makes no mask for an attention that has registered no mask function: padded input would
    # arrive without one, and be attended to.
    assert attention_mask is None and sum(lengths) == query.shape[2], (lengths, query.shape)
    if starts is None:
        if repeats_heads(query.device, query.dtype):
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        options = {"is_causal": True, "scale": scaling, "enable_gqa": key.shape[1] < query.shape[1]}
        outputs = []
        for example in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2)):
            output = scaled_dot_product_attention(*example, **options)  # [1, heads, length, D]
            outputs.append(output.transpose(1, 2))
        return torch.cat(outputs, 1), None
    # With other starts the kernel would read memory that holds no token.
    assert len(starts) == len(lengths) + 1, (len(starts), lengths)
    # It takes [T, heads, D]; a window of (-1, 0) is all that came before.
    query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    options = {"scale": scaling, "window_size": (-1, 0)} | GROUPED
    return varlen_attn(query, key, value, starts, starts, max(lengths), max(lengths), **options)[None], None


def repeats_heads(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether each key and value head is repeated for its queries: where torch's flash kernel is
    missing, grouped heads would fall to the one that keeps all scores, 319 MB a layer for an example of 2,048
    tokens."""
    # Repeated heads are right everywhere; grouped ones were not seen to be right here.
    if device.type in ("mps", "npu"):
        return True
    if device.type != "cuda" or torch.version.hip:
        return False
    return dtype == torch.float32 or torch.cuda.get_device_capability(device) < (8, 0)


def starts_of(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return [examples + 1], int32: where a packed batch's examples start, and where the last one ends."""
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)


def use(model) -> None:
    """Let `model` attend with packed_attention."""
    transformers.AttentionInterface.register(PACKED, packed_attention)
    model.set_attn_implementation(PACKED)


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of an output layer that never holds all its logits, with their gradients made on the way.

    hidden [N, H], weight [V, H], labels [N] -> (sum of the losses, the losses [N]), both float32. Only the
    sum can be differentiated. It takes chunks of rows whose logits fill LOSS_BYTES: full logits would take
    6.8 GB at 3,200 tokens and Qwen3's vocabulary, and working them out once more in the backward pass would
    cost 6 % of a training step's FLOPs.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        losses = torch.empty(len(labels), device=hidden.device, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # frozen under LoRA
        rows = max(1, LOSS_BYTES // (len(weight) * LOGIT_BYTES))
        for start in range(0, len(labels), rows):
            chunk = slice(start, start + rows)
            logits = (hidden[chunk] @ weight.T).float()  # [rows, V]
            log_total = logits.logsumexp(dim=-1, keepdim=True)  # [rows, 1]
            losses[chunk] = (log_total - logits.gather(1, labels[chunk, None])).squeeze(1)
            if grad_hidden is not None:
                # d loss / d logits = softmax - one-hot, written where the logits were
                grad = logits.sub_(log_total).exp_()
                grad.scatter_add_(1, labels[chunk, None], -torch.ones_like(log_total))
                grad = grad.to(weight.dtype)
                grad_hidden[chunk] = grad @ weight  # [rows, V] @ [V, H]
                if grad_weight is not None:
                    grad_weight.addmm_(grad.T, hidden[chunk])  # [V, rows] @ [rows, H]
                del grad
            del logits  # else they would live on beside the next chunk's
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_sum, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        for grad in (grad_hidden, grad_weight):
            if grad is not None:
                grad.mul_(grad_sum)  # in place, so once only: a copy of the weight's gradient would be 0.6 GB
        return grad_hidden, grad_weight, None
