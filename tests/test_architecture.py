"""Models that would be trained wrongly are refused before their weights are loaded, by what they are; others train."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import refused, run, weights

import data
from parts import architecture, models

REFUSED = "{}（{}）不能在这里正确训练：{}；请换一个模型，例如 Qwen/Qwen3-1.7B。"
SMALL = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 128}
SMALL |= {"num_hidden_layers": 2, "vocab_size": 8192}
ALL = {"layer_types": ["full_attention"] * 2}
DECODER, TEXT = "它不是单纯的文本解码器", "它不是生成文本的模型"
EXPERTS, WINDOW = (
    "它由多个专家组成，显存的估算不认识这种结构",
    "它的注意力不是每层都看到全部上文（滑动窗口或线性注意力）",
)
UNEQUAL = "打包、不算 logits 时，它的损失或梯度与逐条计算相差 ~%"
UNTIED = {"tie_word_embeddings": False}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 1e6}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
LONG |= {"original_max_position_embeddings": 4096}


def small(kind: str, **changes):
    """The configuration of a small model of this kind."""
    cls = transformers.models.auto.configuration_auto.CONFIG_MAPPING[kind]
    known = vars(cls())
    return cls(**{name: size for name, size in SMALL.items() if name in known} | changes)


def write(kind: str, **changes) -> str:
    """The folder with such a configuration."""
    small(kind, **changes).save_pretrained(kind)
    return kind


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3", {"head_dim": 32}),
        ("qwen3", UNTIED | {"num_key_value_heads": 1, "rope_parameters": YARN}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4096}),
        ("llama", {}),
        ("mistral", {"sliding_window": None}),
        ("gemma", {"head_dim": 32}),
        ("smollm3", {"no_rope_layers": [1, 0]}),
    ],
)
def test_models_that_are_computed_rightly_are_taken(folder, tokenizer, kind, changes):
    """Embeddings that are scaled and layers without positions too: what is proved is the outcome."""
    before = torch.get_rng_state()
    architecture.require(write(kind, **changes), kind, tokenizer)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("gemma2", {}, WINDOW),
        ("gemma2", ALL | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": None}, UNEQUAL),
        ("gemma2", ALL | {"final_logit_softcapping": None, "attn_logit_softcapping": 50.0}, UNEQUAL),
        ("granite", {"logits_scaling": 8.0}, UNEQUAL),
        ("cohere", {"logit_scale": 0.0625}, UNEQUAL),
        ("phi", {}, UNEQUAL),  # the output layer has a bias
        ("llama", {"rope_parameters": YARN | {"rope_type": "dynamic"}}, UNEQUAL),  # by the longest of a batch
        ("phi3", {"rope_parameters": LONG}, UNEQUAL),
        ("gpt_oss", {}, EXPERTS),
        ("qwen3_moe", {}, EXPERTS),
        ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"]}, WINDOW),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}, WINDOW),
        ("mistral", {"sliding_window": 4096}, WINDOW),
        ("gpt2", {}, "它的结构不同，配置里没有 intermediate_size、num_key_value_heads"),
        ("opt", {}, "它的结构不同，配置里没有 intermediate_size、num_key_value_heads"),
        ("mbart", {}, DECODER),
        ("gemma3", {}, DECODER),
        ("vit", {}, TEXT),
        ("llama", {"vocab_size": 4000}, "分词器有 4096 个 token，而模型的词表只有 4000"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "它的权重已经量化（fp8），不能照原样训练"),
    ],
)
def test_models_that_would_be_trained_wrongly_are_refused(folder, tokenizer, kind, changes, why):
    path = write(kind, **changes)
    refused(REFUSED.format("它", kind, why), architecture.require, path, "它", tokenizer)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("gpt_oss", ALL | {"num_local_experts": 2, "num_experts_per_tok": 2}), ("bloom", {"n_head": 4})],
)
def test_attention_sinks_and_positions_by_distance_are_found_out(kind, changes):
    """By the proof alone, whatever the configuration is asked before."""
    config = small(kind, **changes)
    assert architecture.disproof(config.to_json_string()).startswith(UNEQUAL.partition("~")[0])


@pytest.mark.parametrize("text", ['{"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}', "{}", "[]", "{"])
def test_what_is_not_known_and_what_cannot_be_read(folder, tokenizer, text):
    Path("config.json").write_text(text, encoding="utf-8")
    kind = {"{}": "", "[]": None, "{": None}.get(text, "x")
    why = "这个版本的 transformers 不认识它，模型自带的代码不运行"
    unreadable = ". 里的 config.json 无法读取（~）；请重新下载或换一个模型。"
    message = unreadable if kind is None else REFUSED.format("它", kind, why)
    refused(message, architecture.require, ".", "它", tokenizer)


@pytest.mark.parametrize("lora", [False, True])
def test_qwen2_trains_with_its_biases_and_its_own_output_layer(workspace, tiny_model, lora):
    """Its configuration has no head_dim, its attention biases and no norms; its embeddings are not tied."""
    shutil.copytree(tiny_model, "qwen2")
    tokens = models.load_tokenizer("qwen2")
    ids = {"eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL | UNTIED | ids, use_sliding_window=False))
    model.save_pretrained("qwen2")
    trainer = run("qwen2", lora, max_steps=2, learning_rate=1e-3)
    after = weights(data.LORA_OUTPUT_DIR if lora else data.OUTPUT_DIR)
    assert trainer.state.global_step == 2
    if lora:
        assert all(weight.any() for weight in after.values()) and len(after) == 2 * 2 * 7
    else:
        before = weights("qwen2")
        assert before.keys() == after.keys() and "lm_head.weight" in after
        assert [name for name in before if before[name].equal(after[name])] == []
