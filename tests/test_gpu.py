"""What only a GPU shows: the kernels chosen there agree with the plain ones, and graphs with decoding step by
step. CI has none; where there is one, `pytest tests/test_gpu.py` comes before the benchmarks."""

import importlib.util
import math

import pytest
import torch
from helpers import LENGTHS, build_trainer, examples, gradient, history, losses, run_script
from transformers.models.qwen3 import modeling_qwen3

import data
from parts.machine import kernels
from parts.model import generate, weights
from parts.training import optimizers, packing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")
HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
PLAIN_ROTARY = modeling_qwen3.apply_rotary_pos_emb


@pytest.fixture(autouse=True)
def taken_for_agreeing(monkeypatch):
    """The tiny model's layers are so small that launching decides over their time: nothing is left out for it."""
    monkeypatch.setattr(kernels, "NOT_SLOWER", math.inf)


@pytest.fixture
def build(workspace, tiny_model, tokenizer):
    """A trainer of the tiny model in bfloat16, with these flags; a plain one has the plain rotary embedding,
    which an earlier trainer may have exchanged for all."""

    def build(fast_kernels=True, **changes):
        if not fast_kernels:
            modeling_qwen3.apply_rotary_pos_emb = PLAIN_ROTARY
        flags = {"eval_steps": 10**6, "fast_kernels": fast_kernels}
        return build_trainer(tiny_model, tokenizer, **flags | changes)

    return build


def curve(trainer) -> list[float]:
    trainer.train()
    return losses(trainer)


def test_the_fast_kernels_are_chosen(build, capsys):
    trainer = build()
    said = capsys.readouterr().out
    assert trainer.kernels.attention.runs == (torch.cuda.get_device_capability() >= (8, 0)), said
    assert trainer.kernels.layers.runs == HAS_LIGER and ("用时为其" in said) == HAS_LIGER, said
    assert trainer.kernels.step.runs, said


def test_the_optimizers_kernel_steps_where_a_process_has_no_rows_of_a_weight():
    cls, options = optimizers.pick("kahan", True, lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
    weight = torch.nn.Parameter(torch.empty(0, 64, dtype=torch.bfloat16, device=CUDA))
    weight.grad = torch.empty_like(weight)
    cls([weight], **options).step()


def test_losses_follow_those_of_plain_kernels_one_example_at_a_time(build):
    fast = curve(build(max_steps=20))
    plain = curve(build(max_steps=20, fast_kernels=False, batch_tokens=1, output_dir="plain"))
    assert fast == pytest.approx(plain, rel=5e-3)
    assert fast[0] == pytest.approx(plain[0], rel=1e-3)


def test_gradients_are_those_of_plain_kernels(build):
    fast, plain = (gradient(build(fast_kernels=flag), examples()).float() for flag in (True, False))
    assert (fast - plain).norm() < 0.02 * plain.norm()


def test_evaluation_losses_are_those_of_plain_kernels(build):
    fast, plain = (build(fast_kernels=flag).evaluate() for flag in (True, False))
    for name in ("eval_loss", "eval_token_loss"):
        assert fast[name] == pytest.approx(plain[name], rel=1e-3)


def test_no_example_sees_another(build):
    trainer = build()
    hidden = []
    trainer.model.get_decoder().register_forward_hook(lambda module, args, output: hidden.append(output[0][0]))
    for change in (0, 1):
        batch = trainer._prepare_inputs(packing.PackedCollator()(examples()))
        batch["input_ids"][0, LENGTHS[0] + 10] += change
        with torch.no_grad():
            trainer.supervised_losses(trainer.model, batch)
    changed = (hidden[0] != hidden[1]).any(dim=-1)
    assert changed[LENGTHS[0] + 10] and not changed[: LENGTHS[0] + 10].any() and not changed[sum(LENGTHS[:2]) :].any()


def test_offloaded_inputs_change_no_gradient(build):
    batch = packing.PackedCollator()(examples() * 20)
    found, held = [], []
    for offload in (False, True):
        trainer = build(checkpoint_every=1, offload_activations=offload)
        trainer.model.train()
        before = torch.cuda.memory_allocated()
        loss, *_ = trainer.supervised_losses(trainer.model, trainer._prepare_inputs(batch))
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        found.append(torch.cat([p.grad.float().flatten() for p in trainer.model.parameters()]))
    kept, offloaded = found
    assert (kept - offloaded).norm() < 0.01 * kept.norm()  # atomic additions vary
    inputs = batch["input_ids"].numel() * trainer.model.config.hidden_size * 2
    assert held[0] - held[1] > 0.9 * inputs  # of a layer, at least


@pytest.mark.parametrize("optimizer", ["8bit", "8bit_in_backward"])
def test_states_of_few_bits_follow_the_kahan_curve(build, optimizer):
    pytest.importorskip("torchao")
    kahan = curve(build(max_steps=20, learning_rate=1e-3, optimizer="kahan", output_dir="kahan"))
    other = curve(build(max_steps=20, learning_rate=1e-3, optimizer=optimizer, output_dir=optimizer))
    assert other == pytest.approx(kahan, rel=0.015) and kahan[-1] < kahan[0] - 0.2


def test_qlora_learns(build):
    pytest.importorskip("bitsandbytes")
    found = curve(build(lora=True, load_in_4bit=True, max_steps=30, learning_rate=3e-3))
    assert sum(found[-5:]) < sum(found[:5])


@pytest.mark.parametrize("rows", [1, 3])
def test_a_graph_decodes_what_single_steps_do(tiny_model, rows):
    """In float32, past the first growth of the cache, with padding on the left; each step's logits."""
    model = weights.load_weights(str(tiny_model), CUDA).float()
    generate.fuse(model)
    assert (modeling_qwen3.apply_rotary_pos_emb is PLAIN_ROTARY) == (not HAS_LIGER)
    ids = torch.randint(10, 4000, (rows, 30), device=CUDA)
    mask = torch.ones_like(ids)
    mask[1:, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    tokens = torch.randint(10, 4000, (generate.CACHE_STEP + 40, rows), device=CUDA)
    decoders = [generate.Decoder(model, ids, positions, mask if rows > 1 else None) for _ in range(2)]
    decoders[1].capturable = False
    with torch.inference_mode():
        for token in tokens:
            for decoder in decoders:
                decoder.advance(token)
            torch.testing.assert_close(decoders[0].logits, decoders[1].logits, rtol=1e-3, atol=1e-3)
    assert decoders[0].graph and decoders[0].room > 30 + generate.CACHE_STEP


@pytest.mark.parametrize("script", ["train.py", "train_lora.py"])
def test_all_that_should_run_here_does(folder, script):
    """On Qwen3-1.7B's shape: kernels, plan, rehearsal and a decoding graph."""
    found = run_script(script, "--check", cwd=folder, fresh=True)
    assert found.returncode == 0 and "结论：可以训练" in found.stdout, found.stdout


def test_the_whole_way_from_training_to_a_reply(workspace, tiny_model):
    flags = ("--model_name", tiny_model, "--max_steps", "20", "--eval_steps", "10", "--sample_tokens", "300")
    trained = run_script("train.py", *flags, "--report_to", "none", cwd=workspace, fresh=True)
    assert trained.returncode == 0 and "无法使用 CUDA graph" not in trained.stdout, trained.stdout
    folder = workspace / data.OUTPUT_DIR
    assert any("eval_loss" in log for log in history(folder))
    asked = run_script("inference.py", "头痛怎么办？", "--max_new_tokens", 300, cwd=workspace, fresh=True)
    assert asked.returncode == 0 and "无法使用 CUDA graph" not in asked.stdout, asked.stdout
