"""However a step is cut and an evaluation batched, losses and gradients are the same."""

import pytest
import torch
import torch.nn.functional as F
from helpers import LENGTHS, build_trainer, examples, gradient, losses, run

from parts.model import encoding, weights


@pytest.mark.parametrize("flags", [{}, {"fast_kernels": False}, {"checkpoint_every": 1}, {"checkpoint_every": 2}])
@pytest.mark.parametrize("tokens", [1, 65, 1000])
def test_gradient_does_not_depend_on_how_a_step_is_cut_or_what_is_recomputed(
    workspace, tiny_model, tokenizer, tokens, flags
):
    """Against transformers' own attention, loss and whole logits, each example in a padded row of its own."""
    rows = examples()
    found = gradient(build_trainer(tiny_model, tokenizer, batch_tokens=tokens, **flags), rows)
    model = weights.load_weights(str(tiny_model), torch.device("cpu")).train()
    longest = max(LENGTHS)
    ids, labels, mask = (
        torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])
        for name, fill in (("input_ids", 0), ("labels", encoding.IGNORE_INDEX), ("input_ids", -1))
    )
    model(input_ids=ids, attention_mask=(mask != -1).long(), labels=labels, use_cache=False).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (found - expected).norm() / expected.norm() < 1e-4


def test_lora_gradient_does_not_depend_on_how_a_step_is_cut(workspace, tiny_model, tokenizer):
    def build(tokens):
        torch.manual_seed(0)
        flags = {"lora_dropout": 0.0, "batch_tokens": tokens}
        return build_trainer(tiny_model, tokenizer, True, **flags)

    whole, cut = (gradient(build(tokens), examples()) for tokens in (1000, 1))
    assert whole.norm() > 0 and (whole - cut).norm() / whole.norm() < 1e-4


def test_no_logits_are_made_in_training_and_evaluation(workspace, tiny_model, tokenizer):
    trainer, shapes = build_trainer(tiny_model, tokenizer, file="val.jsonl"), []
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    batch = trainer.data_collator([trainer.eval_dataset[0], trainer.eval_dataset[1]])
    trainer.compute_loss(trainer.model, batch).backward()
    trainer.evaluate()
    assert shapes and set(shapes) == {0}


@pytest.mark.parametrize("tokens", [1, 300, 100_000])
def test_evaluation_losses_do_not_depend_on_the_batch(workspace, tiny_model, tokenizer, tokens):
    trainer = build_trainer(tiny_model, tokenizer, file="val.jsonl", batch_tokens=tokens)
    plain = weights.load_weights(str(tiny_model), torch.device("cpu"))
    per_example, all_tokens = [], []
    with torch.no_grad():
        for example in trainer.eval_dataset:
            logits = plain(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
            losses = F.cross_entropy(logits, torch.tensor(example["labels"][1:]), reduction="none")
            supervised = [label != encoding.IGNORE_INDEX for label in example["labels"][1:]]
            all_tokens += losses[supervised].tolist()
            per_example.append(losses[supervised].mean().item())
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(sum(per_example) / len(per_example), rel=1e-5)
    assert metrics["eval_token_loss"] == pytest.approx(sum(all_tokens) / len(all_tokens), rel=1e-5)


def test_one_by_one_accumulated_and_all_at_once_give_the_same_losses(workspace, tiny_model):
    """Four examples a step: the published four batches of one with transformers' own loss and attention, against one
    batch of four."""
    published = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "checkpoint_every": 1}
    published |= {"full_logits": True, "fast_kernels": False, "optimizer": "adamw"}
    reference = run(tiny_model, output_dir="published", **published)
    assert losses(run(tiny_model, output_dir="ours")) == pytest.approx(losses(reference), rel=1e-5)


def test_evaluation_loss_is_the_mean_over_examples_of_their_mean_token_loss(workspace, tiny_model):
    trainer = run(tiny_model)
    per_example = []
    with torch.no_grad():
        for example in trainer.eval_dataset:
            logits = trainer.model.eval()(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
            per_example.append(torch.nn.functional.cross_entropy(logits, torch.tensor(example["labels"][1:])).item())
    best = min(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert sum(per_example) / len(per_example) == pytest.approx(best, rel=1e-5)
