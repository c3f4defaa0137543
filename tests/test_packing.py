"""Several examples in one batch: they do not see each other, and however a step is cut, its gradient is the same."""

import pytest
import torch
import transformers

import data
import inference
import train
import train_lora

LENGTHS = (40, 25, 60, 33)


def examples(vocabulary: int = 4000) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(10, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": ids, "labels": [encoding.IGNORE_INDEX] * 9 + ids[9:]} for ids in rows]


def packed(model, inputs: dict) -> torch.Tensor:
    """Hidden states [1, T, H] under packed_attention."""
    transformers.AttentionInterface.register(packing.PACKED, packing.packed_attention)
    model.set_attn_implementation(packing.PACKED)
    inputs = {name: inputs[name] for name in ("input_ids", "position_ids", "lengths")}
    return model.get_decoder()(**inputs, use_cache=False).last_hidden_state


def trainer_on(tiny_model, tokenizer, cls=train.TrainArguments, wrap=lambda model, args: model, **changes):
    args = cls(report_to="none", disable_tqdm=True, **changes)
    model = wrap(models.load_weights(str(tiny_model), torch.device("cpu")), args)
    dataset, _ = data.load_dataset("train.jsonl", tokenizer, 2048)
    return train.build_trainer(args, model, tokenizer, dataset, dataset)


def gradient(trainer, rows) -> torch.Tensor:
    batch = trainer.data_collator(rows)
    trainer.model.zero_grad()
    trainer.training_step(trainer.model, batch, num_items_in_batch=(batch["labels"] != encoding.IGNORE_INDEX).sum())
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def test_collator_packs_without_padding():
    batch = packing.PackedCollator()(examples())
    assert batch["input_ids"].shape == (1, sum(LENGTHS)) and batch["lengths"] == LENGTHS
    assert batch["position_ids"][0].tolist() == [i for length in LENGTHS for i in range(length)]
    assert (batch["labels"][0] != encoding.IGNORE_INDEX).sum() == sum(LENGTHS) - 9 * len(LENGTHS)


def test_packed_hidden_states_are_those_of_each_example_alone(tiny_model):
    model = models.load_weights(str(tiny_model), torch.device("cpu"))
    rows = examples()
    alone = [
        model.get_decoder()(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).last_hidden_state[0]
        for row in rows
    ]
    together = packed(model, packing.PackedCollator()(rows))[0]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_no_example_of_a_batch_sees_another_or_what_comes_later(tiny_model):
    """One token of the second example is changed: only that example, from there on, may change."""
    model = models.load_weights(str(tiny_model), torch.device("cpu"))
    before = packing.PackedCollator()(examples())
    after = packing.PackedCollator()(examples())
    place = LENGTHS[0] + 10
    after["input_ids"][0, place] += 1
    changed = (packed(model, before) != packed(model, after)).any(dim=-1)[0]
    assert changed[place : sum(LENGTHS[:2])].all()
    assert not changed[:place].any() and not changed[sum(LENGTHS[:2]) :].any()


def test_padding_is_refused_rather_than_read(tiny_model):
    model = models.load_weights(str(tiny_model), torch.device("cpu"))
    batch = packing.PackedCollator()(examples())
    with pytest.raises(AssertionError):
        packed(model, batch | {"lengths": LENGTHS[:-1]})


@pytest.mark.parametrize(
    ("most", "groups"),
    [(1, [(40,), (25,), (60,), (33,)]), (65, [(40, 25), (60,), (33,)]), (93, [(40, 25), (60, 33)]), (1000, [LENGTHS])],
)
def test_a_batch_is_split_between_examples(most, groups):
    batch = packing.PackedCollator()(examples())
    parts = packing.split_batch(batch, most)
    assert [part["lengths"] for part in parts] == groups
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), batch[name])


@pytest.mark.parametrize("flags", [{}, {"fast_kernels": False}, {"checkpoint_every": 1}, {"checkpoint_every": 2}])
@pytest.mark.parametrize("tokens", [1, 65, 1000])
def test_gradient_does_not_depend_on_how_a_step_is_cut_or_what_is_recomputed(
    workspace, tiny_model, tokenizer, tokens, flags
):
    """Against transformers' own attention, loss and whole logits, each example in a padded row of its own."""
    rows = examples()
    found = gradient(trainer_on(tiny_model, tokenizer, batch_tokens=tokens, **flags), rows)
    model = models.load_weights(str(tiny_model), torch.device("cpu")).train()
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
        return trainer_on(tiny_model, tokenizer, train_lora.LoraArguments, train_lora.add_adapter, **flags)

    whole, cut = (gradient(build(tokens), examples()) for tokens in (1000, 1))
    assert whole.norm() > 0 and (whole - cut).norm() / whole.norm() < 1e-4


def test_adapters_have_the_dtype_of_the_weights(workspace, tiny_model):
    model = models.load_weights(str(tiny_model), torch.device("cpu")).to(torch.bfloat16)
    model = train_lora.add_adapter(model, train_lora.LoraArguments())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_kernels_that_do_not_run_here_are_not_chosen_and_the_reason_is_said(workspace, tiny_model, tokenizer, capsys):
    trainer = trainer_on(tiny_model, tokenizer)
    assert not trainer.varlen and not trainer.args.use_liger_kernel
    assert (
        "注意力：逐条 sdpa（不用 torch varlen：它只在 sm80 及以上的 NVIDIA GPU 上）；融合算子：不用（"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("fast", "reason"),
    [
        (lambda x: 2 * x, None),
        (lambda x: 2.2 * x, "与普通算子相差"),
        (lambda x: x @ x, "mat1 and mat2"),
    ],
)
def test_a_kernel_that_fails_or_disagrees_is_found_out(fast, reason):
    hidden = torch.randn(3, 5)
    plain, found = (kernels.gradients(function, hidden) for function in (lambda x: 2 * x, fast))
    why = kernels.disagreement(plain, found)
    assert why is None if reason is None else reason in why
