"""Cross-entropy of an output layer whose logits never exist all at once. Knows tensors only."""

import torch

LOSS_BYTES = 500_000_000  # of logits and their gradient at any time; all at once are 14 bytes x vocabulary a token


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of an output layer that never holds all its logits, with their gradients made on the way.

    hidden [N, H], weight [V, H], labels [N] -> (sum of the losses, the losses [N]), both float32. Only the sum can be
    differentiated. Row chunks of LOSS_BYTES: full logits would take 6.8 GB at 3,200 tokens and Qwen3's vocabulary,
    and working them out once more in the backward pass would cost 6 % of a training step's FLOPs.
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
                    grad_weight.addmm_(grad.T, hidden[part].to(grad.dtype))  # under autocast they differ
                del grad
            del logits  # else they would live on beside the next ones
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_sum, _):
        return *(grad if grad is None else grad.mul_(grad_sum) for grad in ctx.saved_tensors), None
