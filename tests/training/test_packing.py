"""Several examples in one batch: they do not see each other, and a batch is cut between them."""

from types import SimpleNamespace

import pytest
import torch
from helpers import LENGTHS, examples

from parts.model import encoding, weights
from parts.training import packing


def packed(model, inputs: dict) -> torch.Tensor:
    """Hidden states [1, T, H] under packed_attention."""
    packing.use(model)
    inputs = {name: inputs[name] for name in ("input_ids", "position_ids", "lengths")}
    return model.get_decoder()(**inputs, use_cache=False).last_hidden_state


def test_collator_packs_without_padding():
    batch = packing.PackedCollator()(examples())
    assert batch["input_ids"].shape == (1, sum(LENGTHS)) and batch["lengths"] == LENGTHS
    assert batch["position_ids"][0].tolist() == [i for length in LENGTHS for i in range(length)]
    assert (batch["labels"][0] != encoding.IGNORE_INDEX).sum() == sum(LENGTHS) - 9 * len(LENGTHS)


def test_packed_hidden_states_are_those_of_each_example_alone(tiny_model):
    model = weights.load_weights(str(tiny_model), torch.device("cpu"))
    rows = examples()
    alone = [
        model.get_decoder()(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).last_hidden_state[0]
        for row in rows
    ]
    together = packed(model, packing.PackedCollator()(rows))[0]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_no_example_of_a_batch_sees_another_or_what_comes_later(tiny_model):
    """One token of the second example is changed: only that example, from there on, may change."""
    model = weights.load_weights(str(tiny_model), torch.device("cpu"))
    before = packing.PackedCollator()(examples())
    after = packing.PackedCollator()(examples())
    place = LENGTHS[0] + 10
    after["input_ids"][0, place] += 1
    changed = (packed(model, before) != packed(model, after)).any(dim=-1)[0]
    assert changed[place : sum(LENGTHS[:2])].all()
    assert not changed[:place].any() and not changed[sum(LENGTHS[:2]) :].any()


def test_heads_are_repeated_where_flash_is_missing(monkeypatch):
    """With grouped heads torch would take the kernel that keeps all scores; what is computed is the same."""
    query, key, value = (torch.randn(1, heads, 60, 16) for heads in (4, 2, 2))
    seen, attend = [], packing.scaled_dot_product_attention

    def noting(query, key, value, **options):
        seen.append((key.shape[1], options["enable_gqa"]))
        return attend(query, key, value, **options)

    monkeypatch.setattr(packing, "scaled_dot_product_attention", noting)
    grouped, _ = packing.packed_attention(None, query, key, value, None, 0.25, (20, 40))
    monkeypatch.setattr(packing, "repeats_heads", lambda device, dtype: True)
    repeated, _ = packing.packed_attention(None, query, key, value, None, 0.25, (20, 40))
    assert seen == [(2, True)] * 2 + [(4, False)] * 2
    torch.testing.assert_close(grouped, repeated)


@pytest.mark.parametrize(
    ("capability", "dtype", "repeated"),
    [((7, 5), torch.float16, True), ((8, 6), torch.float32, True), ((8, 6), torch.bfloat16, False)],
)
def test_flash_is_for_sixteen_bits_from_sm80_on(monkeypatch, capability, dtype, repeated):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert packing.repeats_heads(torch.device("cuda"), dtype) == repeated
    assert not packing.repeats_heads(torch.device("cpu"), dtype)


@pytest.mark.parametrize("kind", ["mps", "npu"])
def test_heads_are_repeated_where_grouped_ones_were_not_seen_to_be_right(kind):
    assert packing.repeats_heads(SimpleNamespace(type=kind), torch.bfloat16)


def test_starts_that_are_not_those_of_the_batch_are_refused():
    query, key = torch.zeros(1, 4, 60, 16), torch.zeros(1, 2, 60, 16)
    with pytest.raises(AssertionError, match="3"):
        packing.packed_attention(None, query, key, key, None, 1.0, (20, 25, 15), torch.tensor([0, 20, 45]))


def test_padding_is_refused_rather_than_read(tiny_model):
    model = weights.load_weights(str(tiny_model), torch.device("cpu"))
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


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_example_is_evaluated_once(world_size):
    dataset = {"input_ids": [[0] * length for length in (9000, 10, 4000, 4200, 4100, 8192, 1)]}
    shares = [packing.token_batches(dataset, rank, world_size, 8192) for rank in range(world_size)]
    batches = [batch for share in shares for batch in share]
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    totals = [sum(len(dataset["input_ids"][i]) for i in batch) for batch in batches]
    assert all(total <= 8192 or len(batch) == 1 for total, batch in zip(totals, batches))
