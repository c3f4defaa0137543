"""Each family of models that is taken is trained rightly: packed, and without logits, it gives the losses and
gradients of each example alone. All others are refused by their config.json."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import run, weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import data
from parts.model.fused import difference
from parts.model.weights import FAMILIES, check_family
from parts.training import packing
from parts.training.packing import LinearCrossEntropy

TOKENS = 4096  # in the vocabulary
LENGTHS = (9, 5, 12)  # tokens of the examples
POSITIONS = 8  # that the small models know: what is scaled for longer texts has to show
ROUNDING = 1e-3  # relative difference that float32 explains; right ones stood under 2e-5
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": POSITIONS, "rope_theta": 1e6}
PROVEN = [(family, {}) for family in FAMILIES]
PROVEN += [("qwen3", {"rope_parameters": YARN, "tie_word_embeddings": False}), ("smollm3", {"no_rope_layers": [1, 0]})]


def small(family: str, **changes):
    """The configuration of a model of two small layers."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": TOKENS, "max_position_embeddings": POSITIONS}
    sizes |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "sliding_window": None}
    return CONFIG_MAPPING[family](**sizes | changes)


def worst_difference(config) -> float:
    """Of the losses' sum and its gradients: as a small random model gives them for each example alone, and as they are
    worked out in training."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for weight in model.parameters():  # new ones are so small that nothing but the last token counts
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=1.5 * weight.shape[-1] ** -0.5)
        else:  # of norms
            torch.nn.init.normal_(weight, mean=1, std=0.3)
    ids = torch.randint(TOKENS, (1, sum(LENGTHS)))
    total = 0
    for example in ids.split(LENGTHS, dim=1):
        total += model(input_ids=example, labels=example, use_cache=False).loss * (example.numel() - 1)
    alone = [total, *torch.autograd.grad(total, list(model.parameters()))]

    packing.use(model)
    positions = torch.cat(list(map(torch.arange, LENGTHS)))[None]
    decoder = model.get_decoder()
    hidden = decoder(ids, position_ids=positions, lengths=LENGTHS, use_cache=False).last_hidden_state
    inside = positions[0, 1:] > 0  # the first token of an example follows from nothing
    output = model.get_output_embeddings().weight
    total = LinearCrossEntropy.apply(hidden[0, :-1][inside], output, ids[0, 1:][inside])[0]
    packed = [total, *torch.autograd.grad(total, list(model.parameters()))]
    return max(map(difference, alone, packed))


@pytest.mark.parametrize(("family", "changes"), PROVEN)
def test_each_family_is_trained_rightly_and_taken(folder, tokenizer, family, changes):
    config = small(family, **changes)
    assert worst_difference(config) < ROUNDING
    config.save_pretrained(folder)
    check_family(str(folder), "它", tokenizer)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "nanochat"])
def test_the_proof_finds_out_what_is_computed_otherwise(family):
    """Caps and scales of logits."""
    assert worst_difference(small(family, sliding_window=POSITIONS, layer_types=["full_attention"] * 2)) > 10 * ROUNDING


def test_qwen2_trains_with_its_biases_and_its_own_output_layer(workspace, tiny_model):
    shutil.copytree(tiny_model, "qwen2")
    transformers.Qwen2ForCausalLM(small("qwen2", tie_word_embeddings=False)).save_pretrained("qwen2")
    run("qwen2", max_steps=2, learning_rate=1e-3)
    before, after = weights("qwen2"), weights(data.OUTPUT_DIR)
    assert before.keys() == after.keys() and not [name for name in before if before[name].equal(after[name])]


REFUSED = {
    "gemma2": {"model_type": "gemma2"},
    "qwen3_moe": {"model_type": "qwen3_moe"},
    "滑动窗口": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0},
    "dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "已经量化": {"model_type": "qwen3", "quantization_config": {"quant_method": "fp8"}},
    "词表只有 4000": {"model_type": "llama", "vocab_size": 4000},
    "hidden_size": {"model_type": "qwen3", "hidden_size": "large"},
    "无法读取": [],
}


@pytest.mark.parametrize("words", REFUSED)
def test_models_that_would_be_trained_wrongly_are_refused(folder, tokenizer, words):
    Path("config.json").write_text(json.dumps(REFUSED[words]), encoding="utf-8")
    with pytest.raises(SystemExit, match=f"^错误：.*{words}.*；请.*换一个模型") as ended:
        check_family(str(folder), "它", tokenizer)
    assert "\n" not in str(ended.value)
