"""The losses of a validation set: thinking and answer apart, and those of a second text of the same rows, in which
what both share is not computed again. Knows labels and losses, no model."""

from pathlib import Path
from typing import NamedTuple

import torch

from parts import row_files
from parts.encoding import IGNORE_INDEX


class CleanText(NamedTuple):
    """The rows of a validation set with cleaned thinking, as far as they differ from it."""

    changed: object  # datasets.Dataset of the rows that are not in the validation set as they are
    shared: torch.Tensor  # [rows of the validation set]: how many of the clean rows each of them is


def load_clean(val_file: str, eval_dataset, read, load) -> CleanText | None:
    """From the file that data.py writes beside `val_file`, or None where there is none. Where it has other questions,
    None too, and a line that says so. `read(file)` gives its rows, `load(file)` the examples that are short enough."""
    path = row_files.clean_path(val_file)
    if not Path(path).is_file():
        return None
    asked, others = ([(row["question"], row.get("history")) for row in read(file)] for file in (val_file, path))
    if asked != others:
        print(f"不评估 {path}：它的问题和 {val_file} 的不同；请重新运行 python data.py。")
        return None
    dataset = load(path)
    places = {tuple(ids): place for place, ids in enumerate(eval_dataset["input_ids"])}
    shared, changed = torch.zeros(len(eval_dataset), dtype=torch.float64), []
    for i, ids in enumerate(dataset["input_ids"]):
        if (place := places.get(tuple(ids))) is None:
            changed.append(i)
        else:
            shared[place] += 1
    return CleanText(dataset.select(changed), shared)


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
    found = {"loss": means / rows, "token_loss": (think + answer) / (think_tokens + answer_tokens)}
    found |= {"think_loss": think / think_tokens} if think_tokens else {}
    return found | {"answer_loss": answer / answer_tokens}
