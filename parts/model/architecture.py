"""Which models are trained rightly here, by what their config.json says of them, before their weights are read. That
each family is computed rightly is proven by tests/model/test_architecture.py, on a small random model of it."""

import json
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from parts.terminal import first_line

# Dense decoders of text, by the model_type of their config.json. Left out, as the proof fails: gemma2, granite and
# cohere scale or cap their logits, phi's output layer has a bias, gpt_oss has sinks of attention and experts.
FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "gemma", "smollm3", "phi3", "olmo2", "glm4", "ernie4_5")
# The others, dynamic and longrope, turn by the longest of all examples in a batch, not by each one's length.
ROPE_TYPES = ("default", "linear", "yarn", "llama3")


def require(folder: str, name: str, tokenizer) -> None:
    """Raises SystemExit unless the model in `folder`, which the user calls `name`, can be trained here with this
    tokenizer. Nothing is read but its config.json."""
    path = Path(folder, "config.json")
    try:
        settings = {**json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise unreadable(path, error) from None
    config = check_family(settings, name)
    tokens = 1 + max(tokenizer.get_vocab().values())
    if tokens > config.vocab_size:
        raise refusal(name, f"分词器有 {tokens} 个 token，而模型的词表只有 {config.vocab_size}")


def check_family(settings: dict, name: str):
    """The configuration of the model `name` from the `settings` of its config.json. Raises SystemExit where models of
    this kind are not trained rightly here."""
    family = settings.get("model_type")
    if family not in FAMILIES:
        raise refusal(name, f"它的 model_type 是 {family}，这里只训练 {'、'.join(FAMILIES)}")
    try:
        config = CONFIG_MAPPING[family].from_dict(settings)
    except Exception as error:  # of a field, each configuration raises its own
        raise unreadable(f"{name} 的 config.json", error) from None

    if getattr(config, "quantization_config", None):
        raise refusal(name, "它的权重已经量化，不能照原样训练")
    if not attends_to_all(config):
        raise refusal(name, "它的注意力不是每层都看到全部上文（滑动窗口或线性注意力）")
    rope = config.rope_parameters["rope_type"]
    if rope not in ROPE_TYPES:
        raise refusal(name, f"它的位置编码（rope_type {rope}）随一批里最长的样本改变")
    return config


def attends_to_all(config) -> bool:
    """Whether each layer is attention to all that came before: neither a sliding window nor linear attention."""
    if kinds := getattr(config, "layer_types", None):
        return set(kinds) == {"full_attention"}
    return not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))


def refusal(name: str, why: str) -> SystemExit:
    return SystemExit(f"错误：{name} 不能在这里正确训练：{why}；请换一个模型，例如 Qwen/Qwen3-1.7B。")


def unreadable(what, error: Exception) -> SystemExit:
    return SystemExit(f"错误：{what} 无法读取（{first_line(error)}）；请重新下载或换一个模型。")
