"""Losses of thinking and answer, and of a clean text, against a model that reads each row by itself."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import At, as_jsonl, build_trainer, crash, make_row, run, run_steps, same, weights

import data
from parts import encoding, evaluation, models

X = encoding.IGNORE_INDEX
END = 7  # of thinking
HISTORY = [["先问？", "先答。"]]


def val_rows() -> list[dict]:
    """With and without thinking, with and without a history."""
    rows = [make_row(i, think=f"思考{i}，" * (i + 1) + "用户给的答案。") for i in range(4)]
    return [*rows, make_row(4, think=""), make_row(5, history=HISTORY), make_row(6, think="", history=HISTORY)]


def clean_rows() -> list[dict]:
    return [row | {"think": row["think"].replace("用户给的答案。", "")} for row in val_rows()]


@pytest.fixture
def texts(workspace) -> None:
    Path("val.jsonl").write_text(as_jsonl(val_rows()), encoding="utf-8")
    Path("val.clean.jsonl").write_text(as_jsonl(clean_rows()), encoding="utf-8")


def expected(tiny_model, tokenizer, rows) -> dict[str, float]:
    """The losses, from whole logits of one row at a time, split where its text says."""
    model = models.load_weights(str(tiny_model), torch.device("cpu"))
    means, parts = [], {"think": [], "answer": []}
    for row in rows:
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


def with_clean(tiny_model, tokenizer, **changes):
    """A trainer that evaluates both texts."""
    trainer = build_trainer(tiny_model, tokenizer, file="val.jsonl", **changes)
    trainer.clean = evaluation.load_clean(
        "val.jsonl", trainer.eval_dataset, data.read_examples, lambda file: data.load_dataset(file, tokenizer, 2048)
    )
    return trainer


def test_thinking_ends_with_its_tag_and_belongs_to_the_last_reply():
    thinking = [X, X, 3, 4, END, 5, 6]
    turns = [X, 8, 9, X, X, 3, END, 5]  # the answer of an earlier turn, and a last reply
    thinkless = [X, X, X, 5, 6]
    found = evaluation.is_thinking(torch.tensor(thinking + turns + thinkless), END).tolist()
    assert found[:7] == [False, False, True, True, True, False, False]
    assert found[7:15] == [False] * 5 + [True, True, False]
    assert found[15:] == [False] * 5


@pytest.mark.parametrize("tokens", [1, 300, 100_000])
def test_losses_of_both_texts_are_those_of_each_row_by_itself(texts, tiny_model, tokenizer, tokens):
    metrics = with_clean(tiny_model, tokenizer, batch_tokens=tokens).evaluate()
    for prefix, rows in (("eval", val_rows()), ("eval_clean", clean_rows())):
        for name, loss in expected(tiny_model, tokenizer, rows).items():
            assert metrics[f"{prefix}_{name}"] == pytest.approx(loss, rel=1e-5), (prefix, name)
    assert metrics["eval_loss"] != metrics["eval_clean_loss"]


def test_what_both_texts_share_is_computed_once_and_the_published_loss_is_not_touched(texts, tiny_model, tokenizer):
    trainer, tokens = with_clean(tiny_model, tokenizer), []
    hook = trainer.model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    metrics = trainer.evaluate()
    changed = sum(map(len, trainer.clean.changed["input_ids"]))
    assert len(trainer.clean.changed) == 4
    assert sum(tokens) == sum(map(len, trainer.eval_dataset["input_ids"])) + changed
    hook.remove()
    trainer.clean = None
    alone = trainer.evaluate()
    assert {name for name in metrics if "clean" in name} == metrics.keys() - alone.keys()
    assert all(metrics[name] == loss for name, loss in alone.items() if name != "eval_runtime")


def test_without_thinking_all_is_answer(workspace, tiny_model, tokenizer):
    Path("val.jsonl").write_text(as_jsonl([make_row(i, think="") for i in range(4)]), encoding="utf-8")
    metrics = build_trainer(tiny_model, tokenizer, file="val.jsonl").evaluate()
    assert "eval_think_loss" not in metrics and metrics["eval_answer_loss"] == metrics["eval_token_loss"]


def test_a_clean_text_with_other_questions_is_not_evaluated_and_that_is_said(texts, tiny_model, capsys):
    Path("val.clean.jsonl").write_text(as_jsonl(clean_rows()[1:]), encoding="utf-8")
    trainer = run(tiny_model, max_steps=2)
    said = "不评估 val.clean.jsonl：它的问题和 val.jsonl 的不同；请重新运行 python data.py。"
    assert capsys.readouterr().out.count(said) == 1
    assert not any("eval_clean_loss" in log for log in trainer.state.log_history)


def test_it_is_in_the_log_and_on_the_card_and_changes_no_weight(texts, tiny_model, capsys):
    trainer = run(tiny_model, max_steps=2)
    [log] = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert f"  清理 {log['eval_clean_loss']:.3f}  " in capsys.readouterr().out
    card = Path(data.OUTPUT_DIR, "README.md").read_text(encoding="utf-8")
    for row, name in (("验证损失", "eval"), ("清理过的验证文本的损失", "eval_clean")):
        mean, think, answer = (log[f"{name}_{key}"] for key in ("loss", "think_loss", "answer_loss"))
        assert f"| {row} | 按行平均 {mean:.4f}，思考 {think:.4f}，回答 {answer:.4f} |" in card
    Path("val.clean.jsonl").unlink()
    run(tiny_model, max_steps=2, output_dir="without")
    assert same(weights(data.OUTPUT_DIR), weights("without"))


def test_a_run_goes_on_where_a_clean_text_has_come(workspace, tiny_model, straight):
    """It decides nothing, so it is no other setting."""
    with pytest.raises(EOFError):
        run_steps(tiny_model, callbacks=[At(13, crash)])
    Path("val.clean.jsonl").write_bytes(Path("val.jsonl").read_bytes())
    trainer = run_steps(tiny_model)
    assert same(weights(data.OUTPUT_DIR), straight())
    last = [log for log in trainer.state.log_history if "eval_loss" in log][-1]
    assert last["eval_clean_loss"] == last["eval_loss"]
