"""Small updates of bfloat16 weights are not rounded away, and states of few bits learn as well. torchao is
optional."""

import gc
import importlib
import shutil
import weakref

import pytest
import torch
import transformers
from helpers import At, build_trainer, losses, run, terminate

import train
from parts.machine import plan
from parts.model import weights as loading

STEPS = 36
FEW_BITS = ("8bit", "8bit_in_backward")


def weights_of(model) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def test_bfloat16_weights_follow_float32_training_with_kahan_sums_and_not_without(workspace, tiny_model, tokenizer):
    changes = {"learning_rate": 1e-5, "max_steps": STEPS, "eval_steps": STEPS}

    def trained(dtype: torch.dtype, **more):
        """(how the weights moved, by how much the loss fell, the trainer)."""
        trainer = build_trainer(tiny_model, tokenizer, dtype=dtype, **changes, **more)
        before = weights_of(trainer.model)
        trainer.train()
        curve = losses(trainer)
        return weights_of(trainer.model) - before, sum(curve[:5]) - sum(curve[-5:]), trainer

    way, fallen, exact = trained(torch.float32, output_dir="exact")
    kahan_way, kahan_fallen, kahan = trained(torch.bfloat16, output_dir="kahan")
    plain_way, plain_fallen, plain = trained(torch.bfloat16, output_dir="plain", optimizer="adamw")
    assert type(kahan.optimizer.optimizer).__module__.startswith("optimi")
    assert all(isinstance(trainer.optimizer.optimizer, torch.optim.AdamW) for trainer in (exact, plain))
    # How much of the exact way is gone, measured along it
    assert (kahan_way @ way / (way @ way)).item() == pytest.approx(1, abs=0.1) and plain_way @ way / (way @ way) < 0.8
    assert kahan_fallen == pytest.approx(fallen, rel=0.1)
    assert abs(plain_fallen - fallen) > abs(kahan_fallen - fallen)


has_torchao = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not has_torchao, reason="torchao is optional; .ci/run has a run with it")


@needs_torchao
def test_states_of_few_bits_and_steps_in_the_backward_pass_follow_the_kahan_curve(workspace, tiny_model, tokenizer):
    curves = {}
    for optimizer in ("kahan", *FEW_BITS):
        changes = {"optimizer": optimizer, "max_steps": 12, "eval_steps": 12, "output_dir": optimizer}
        trainer = build_trainer(tiny_model, tokenizer, dtype=torch.bfloat16, learning_rate=1e-3, **changes)
        trainer.train()
        curves[optimizer] = losses(trainer)
        assert ("grad_norm" in trainer.state.log_history[0]) != optimizer.endswith("in_backward")
    assert curves["kahan"][-1] < curves["kahan"][0] - 0.2
    for name in FEW_BITS:
        assert curves[name] == pytest.approx(curves["kahan"], rel=0.003), name


@pytest.mark.parametrize("optimizer", ["kahan", *(pytest.param(name, marks=needs_torchao) for name in FEW_BITS)])
def test_bfloat16_training_resumes_to_the_same_weights(workspace, tiny_model, tokenizer, optimizer):
    changes = {"dtype": torch.bfloat16, "output_dir": "run", "optimizer": optimizer, "max_steps": 4}
    changes |= {"eval_steps": 2, "save_steps": 2}
    straight, resumed = (build_trainer(tiny_model, tokenizer, **changes) for _ in range(2))
    straight.train()
    shutil.rmtree("run/checkpoint-4")
    resumed.train(resume_from_checkpoint="run/checkpoint-2")
    assert resumed.state.global_step == 4
    assert torch.equal(weights_of(straight.model), weights_of(resumed.model))


@needs_torchao
def test_gradients_do_not_outlive_their_own_step(workspace, tiny_model, tokenizer):
    changes = {"dtype": torch.bfloat16, "optimizer": "8bit_in_backward", "learning_rate": 0.1}
    trainer = build_trainer(tiny_model, tokenizer, **changes)
    trainer.create_optimizer()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.training_step(trainer.model, batch, num_items_in_batch=torch.tensor(100))
    assert all(p.grad is None for p in trainer.model.parameters())
    embedding = trainer.model.get_input_embeddings().weight
    assert trainer.optimizer.state[embedding]["exp_avg"].codes.nbytes == embedding.numel()


@needs_torchao
def test_training_with_steps_in_the_backward_pass_continues_and_frees_its_memory(workspace, tiny_model, monkeypatch):
    monkeypatch.setattr(loading, "best_dtype", lambda device: torch.bfloat16)
    changes = {"optimizer": "8bit_in_backward", "max_steps": 6, "eval_steps": 2}
    with pytest.raises(SystemExit, match="143"):
        run(tiny_model, callbacks=[At(3, terminate)], **changes)
    states = []

    class Watch(transformers.TrainerCallback):
        def on_train_end(self, args, state, control, optimizer=None, **kwargs):
            states.append(weakref.ref(optimizer.optimizer))

    trainer = run(tiny_model, callbacks=[Watch()], **changes)
    gc.collect()
    assert trainer.state.global_step == 6 and states[0]() is None


def test_several_processes_cannot_step_in_the_backward_pass(workspace, tiny_model, monkeypatch):
    """Each would step on its own gradients, before they are added up."""
    args = train.arguments(report_to="none", optimizer="8bit_in_backward")
    model = loading.load_weights(str(tiny_model), torch.device("cpu"))
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(SystemExit, match="只用一张 GPU"):
        plan.choose(args, model, [100] * 8, False, 1e9)


@pytest.mark.skipif(has_torchao, reason="is about its absence")
def test_without_torchao_it_says_what_to_install(workspace, tiny_model, tokenizer):
    with pytest.raises(SystemExit, match="^错误：.*（8bit）.*：没有 torchao，请先运行 pip install torchao。$"):
        build_trainer(tiny_model, tokenizer, dtype=torch.bfloat16, optimizer="8bit")
