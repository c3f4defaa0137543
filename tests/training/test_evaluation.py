"""Losses of thinking and answer against a model that reads each row by itself."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import as_jsonl, build_trainer, make_row, run

import data
from parts.model import encoding, weights
from parts.training import evaluation

X = encoding.IGNORE_INDEX
END = 7  # of thinking
HISTORY = [["先问？", "先答。"]]


def val_rows() -> list[dict]:
    """With and without thinking, with and without a history."""
    rows = [make_row(i, think=f"思考{i}，" * (i + 1)) for i in range(4)]
    return [*rows, make_row(4, think=""), make_row(5, history=HISTORY), make_row(6, think="", history=HISTORY)]


def expected(tiny_model, tokenizer) -> dict[str, float]:
    """The losses, from whole logits of one row at a time, split where its text says."""
    model = weights.load_weights(str(tiny_model), torch.device("cpu"))
    means, parts = [], {"think": [], "answer": []}
    for row in val_rows():
        example = encoding.encode_example(tokenizer, data.to_messages(**row))
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"][1:])
        with torch.no_grad():
            losses = F.cross_entropy(model(input_ids=ids).logits[0, :-1], labels, reduction="none")
        losses = losses[labels != X]
        reply = encoding.encode_messages(tokenizer, data.to_messages(row["question"], row["think"], row["answer"]))
        written = reply[reply.index(encoding.think_tokens(tokenizer)[0]) :]  # <think> and all behind it
        count = written.index(encoding.think_tokens(tokenizer)[1]) + 1 if row["think"] else 0
        start = len(losses) - (len(written) - 1) if row["think"] else 0  # the line break at the end is not supervised
        parts["think"] += losses[start : start + count].tolist()
        parts["answer"] += losses[:start].tolist() + losses[start + count :].tolist()
        means.append(losses.mean().item())
    mean = {name: sum(losses) / len(losses) for name, losses in parts.items()}
    return {"loss": sum(means) / len(means), "think_loss": mean["think"], "answer_loss": mean["answer"]}


def test_thinking_ends_with_its_tag_and_belongs_to_the_last_reply():
    thinking = [X, X, 3, 4, END, 5, 6]
    turns = [X, 8, 9, X, X, 3, END, 5]  # the answer of an earlier turn, and a last reply
    thinkless = [X, X, X, 5, 6]
    found = evaluation.is_thinking(torch.tensor(thinking + turns + thinkless), END).tolist()
    assert found[:7] == [False, False, True, True, True, False, False]
    assert found[7:15] == [False] * 5 + [True, True, False]
    assert found[15:] == [False] * 5


@pytest.mark.parametrize("tokens", [1, 300, 100_000])
def test_losses_are_those_of_each_row_by_itself(workspace, tiny_model, tokenizer, tokens):
    Path("val.jsonl").write_text(as_jsonl(val_rows()), encoding="utf-8")
    metrics = build_trainer(tiny_model, tokenizer, file="val.jsonl", batch_tokens=tokens).evaluate()
    for name, loss in expected(tiny_model, tokenizer).items():
        assert metrics[f"eval_{name}"] == pytest.approx(loss, rel=1e-5), name


def test_without_thinking_all_is_answer(workspace, tiny_model, tokenizer):
    Path("val.jsonl").write_text(as_jsonl([make_row(i, think="") for i in range(4)]), encoding="utf-8")
    metrics = build_trainer(tiny_model, tokenizer, file="val.jsonl").evaluate()
    assert "eval_think_loss" not in metrics and metrics["eval_answer_loss"] == metrics["eval_token_loss"]


def test_they_are_in_the_log_and_on_the_card(workspace, tiny_model):
    trainer = run(tiny_model, max_steps=2)
    [log] = [log for log in trainer.state.log_history if "eval_loss" in log]
    mean, think, answer = (log[f"eval_{name}"] for name in ("loss", "think_loss", "answer_loss"))
    card = Path(data.OUTPUT_DIR, "README.md").read_text(encoding="utf-8")
    assert f"| 验证损失 | 按行平均 {mean:.4f}，思考 {think:.4f}，回答 {answer:.4f} |" in card
