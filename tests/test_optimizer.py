"""With bfloat16 weights small updates must not be rounded away."""

import pytest
import torch
import transformers

import data
import inference
import train

STEPS = 60


def weights_of(model) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def build(tiny_model, dtype: torch.dtype, **changes) -> packed_trainer.PackedTrainer:
    """A trainer for a few steps from the same weights, all of them bfloat16 numbers, held in `dtype`."""
    tokenizer = models.load_tokenizer(str(tiny_model))
    dataset, _ = data.load_dataset(data.TRAIN_FILE, tokenizer, 2048)
    args = train.TrainArguments(logging_steps=1, disable_tqdm=True, report_to="none", **changes)
    model = models.load_weights(str(tiny_model), torch.device("cpu")).to(torch.bfloat16).to(dtype)
    return train.build_trainer(args, model, tokenizer, dataset, dataset)


def train_at(tiny_model, dtype: torch.dtype, **changes):
    """(weights before, the trainer after STEPS steps at learning rate 1e-5)."""
    trainer = build(tiny_model, dtype, learning_rate=1e-5, max_steps=STEPS, eval_steps=STEPS, **changes)
    before = weights_of(trainer.model)
    trainer.train()
    return before, trainer


def losses(trainer) -> torch.Tensor:
    return torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log], dtype=torch.float64)


def test_bfloat16_weights_follow_float32_training_with_kahan_sums_and_not_without(workspace, tiny_model):
    before, exact = train_at(tiny_model, torch.float32)
    _, kahan = train_at(tiny_model, torch.bfloat16, output_dir="kahan")
    _, plain = train_at(tiny_model, torch.bfloat16, output_dir="plain", optimizer="optim")
    assert type(kahan.optimizer.optimizer).__module__.startswith("optimi")
    assert isinstance(plain.optimizer.optimizer, torch.optim.AdamW)
    # How much of the way from the first weights to the exact ones was gone, measured along that way.
    way = weights_of(exact.model) - before
    gone = {
        name: ((weights_of(t.model) - before) @ way / (way @ way)).item()
        for name, t in (("kahan", kahan), ("plain", plain))
    }
    assert gone["kahan"] == pytest.approx(1, abs=0.1), gone
    assert gone["plain"] < 0.8, gone
    fallen = {
        name: (losses(t)[:5].mean() - losses(t)[-5:].mean()).item()
        for name, t in (("exact", exact), ("kahan", kahan), ("plain", plain))
    }
    assert fallen["kahan"] == pytest.approx(fallen["exact"], rel=0.1), fallen
    assert abs(fallen["plain"] - fallen["exact"]) > abs(fallen["kahan"] - fallen["exact"]), fallen


def test_float32_weights_keep_the_optimizer_that_was_asked_for(workspace, tiny_model):
    trainer = build(tiny_model, torch.float32)
    assert trainer.args.optimizer == "optim" and trainer.optimizer_cls_and_kwargs is None


def test_bfloat16_training_resumes_to_the_same_weights(workspace, tiny_model):
    changes = {"max_steps": 8, "eval_steps": 4}
    straight = build(tiny_model, torch.bfloat16, output_dir="straight", **changes)
    straight.train()
    stopped = build(tiny_model, torch.bfloat16, output_dir="resumed", **changes)
    stopped.add_callback(StopAt(4))
    stopped.train()
    resumed = build(tiny_model, torch.bfloat16, output_dir="resumed", **changes)
    resumed.train(resume_from_checkpoint="resumed/checkpoint-4")
    assert resumed.state.global_step == 8
    assert torch.equal(weights_of(straight.model), weights_of(resumed.model))


class StopAt(transformers.TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
