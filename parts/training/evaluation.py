"""The losses of a validation set, thinking and answer apart. Knows labels and losses, no model."""

import torch

from parts.model.encoding import IGNORE_INDEX


def is_thinking(labels: torch.Tensor, end: int) -> torch.Tensor:
    """Which of the labels [T] are thinking: the supervised ones of a last reply up to and including its </think>, whose
    id is `end`. All others are answer: what follows, earlier replies, and replies without thinking, whose empty block
    is in the prompt and not supervised. Examples may stand one after another, as each begins with its prompt."""
    turn = (labels == IGNORE_INDEX).cumsum(0)  # the same number within a supervised stretch
    places = torch.arange(len(labels), device=labels.device)
    ends = torch.full((len(labels) + 1,), -1, device=labels.device)
    ends[turn[labels == end]] = places[labels == end]
    return (labels != IGNORE_INDEX) & (places <= ends[turn])


def per_row(losses: torch.Tensor, row: torch.Tensor, thinking: torch.Tensor, rows: int) -> torch.Tensor:
    """[6, rows] from the losses of the supervised tokens [N], the rows that they belong to, and whether they are
    thinking: 1, the mean loss, the thinking's sum of losses and tokens, the answer's sum of losses and tokens."""
    means = torch.zeros(rows, device=losses.device).index_add_(0, row, losses) / torch.bincount(row, minlength=rows)
    parts = []
    for part in (thinking, ~thinking):
        parts.append(torch.zeros_like(means).index_add_(0, row[part], losses[part]))
        parts.append(torch.bincount(row[part], minlength=rows))
    return torch.stack([torch.ones_like(means), means, *parts])


def losses_of(sums: list[float]) -> dict[str, float]:
    """From per_row's columns, each summed over all rows: `loss`, the mean over the rows of their mean token loss, as
    published; `token_loss`, `think_loss` and `answer_loss`, means over all tokens, and over those of one part. None for
    a thinking that no row has."""
    rows, means, think, think_tokens, answer, answer_tokens = sums
    losses = {"loss": means / rows, "token_loss": (think + answer) / (think_tokens + answer_tokens)}
    if think_tokens:
        losses["think_loss"] = think / think_tokens
    return losses | {"answer_loss": answer / answer_tokens}
