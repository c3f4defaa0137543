"""Which models can be trained rightly here, found out before their weights are loaded: what a configuration says of
itself, and then a proof on a small random model of that configuration. Knows no model's name."""

import contextlib
import copy
import functools
import json
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from parts import packing
from parts.loss import LinearCrossEntropy
from parts.models import head_dim
from parts.proof import attempt, difference
from parts.terminal import first_line, shorten

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
TOKENS = 128  # the small model's vocabulary
LENGTHS = (9, 5, 12)  # tokens of the examples of the proof
PLACES = 8  # of the small model's positions: what changes for longer texts has to show
ROUNDING = 1e-3  # relative difference that float32 explains; right ones stood under 2e-5


@contextlib.contextmanager
def quiet():
    """transformers keeps to itself what it thinks of odd settings."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


@quiet()
def require(path: str, name: str, tokenizer) -> None:
    """Raises SystemExit unless the model in the folder `path`, which the user calls `name`, can be trained here with
    this tokenizer. Runs no code of the model's own and reads no weights."""
    try:
        kind = json.loads(Path(path, "config.json").read_text(encoding="utf-8")).get("model_type", "")
        known = kind in CONFIG_MAPPING
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False) if known else None
    except Exception as error:  # of a field, each configuration raises its own
        raise SystemExit(
            f"错误：{path} 里的 config.json 无法读取（{first_line(error)}）；请重新下载或换一个模型。"
        ) from None
    tokens = 1 + max(tokenizer.get_vocab().values())
    why = objection(config, tokens) if known else "这个版本的 transformers 不认识它，模型自带的代码不运行"
    if why := why or disproof(config.to_json_string()):
        raise SystemExit(f"错误：{name}（{kind}）不能在这里正确训练：{why}；请换一个模型，例如 Qwen/Qwen3-1.7B。")


def objection(config, tokens: int) -> str | None:
    """What in a configuration stands against the way in which models are trained here, or None. `tokens` of the
    tokenizer: the largest id and one."""
    if config.is_encoder_decoder or config.get_text_config() is not config:
        return "它不是单纯的文本解码器"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "它不是生成文本的模型"
    if quantized := getattr(config, "quantization_config", None):
        return f"它的权重已经量化（{dict(quantized).get('quant_method', '未知方法')}），不能照原样训练"
    if [key for key, value in config.to_dict().items() if "expert" in key and value]:
        return "它由多个专家组成，显存的估算不认识这种结构"
    if not attends_to_all(config):
        return "它的注意力不是每层都看到全部上文（滑动窗口或线性注意力）"
    if missing := [size for size in SIZES if not isinstance(getattr(config, size, None), int)]:
        return f"它的结构不同，配置里没有 {'、'.join(missing)}"
    if tokens > config.vocab_size:
        return f"分词器有 {tokens} 个 token，而模型的词表只有 {config.vocab_size}"
    return None


def attends_to_all(config) -> bool:
    """Whether each layer is attention to all that came before: neither a sliding window nor linear attention."""
    if kinds := getattr(config, "layer_types", None):
        return set(kinds) == {"full_attention"}
    return not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))


def shrink(config, layers: int):
    """A configuration with fewer `layers`, the same heads, and small elsewhere."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.head_dim = layers, head_dim(config)
    small.vocab_size, small.hidden_size, small.intermediate_size = TOKENS, 256, 512
    if getattr(config, "layer_types", None):
        small.layer_types = config.layer_types[:layers]
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    return small


@functools.cache  # a process that trains again need not prove it again
def disproof(config_json: str) -> str | None:
    """Why packed examples and a loss without logits do not give what the model gives for each example alone, or None
    where losses and gradients agree."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = attempt(both_ways, config_json)
    if isinstance(found, Exception):
        return f"它不能打包计算（{shorten(f'{type(found).__name__}: {first_line(found)}')}）"
    differences = [difference(*pair) for pair in zip(*found)]
    agree = all(size < ROUNDING for size in differences)  # NaN is not smaller either
    return None if agree else f"打包、不算 logits 时，它的损失或梯度与逐条计算相差 {max(differences):.1%}"


def build_small(config_json: str):
    """A small random model of this configuration, whose weights let caps, scales and biases of logits, sinks of
    attention and positions all count."""
    settings = json.loads(config_json)
    config = shrink(CONFIG_MAPPING[settings["model_type"]].from_dict(settings), layers=2)
    config.max_position_embeddings = PLACES
    if "original_max_position_embeddings" in (rope := getattr(config, "rope_parameters", None) or {}):
        config.original_max_position_embeddings = rope["original_max_position_embeddings"] = PLACES
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():  # new ones are so small that nothing but the last token counts
            weight.normal_(std=1.5 * weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.3)
            weight += weight.ndim == 1  # of norms
    return model


def both_ways(config_json: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(sum of the losses and its gradients as a small model itself gives them for each example alone, and as they are
    worked out in training)."""
    model = build_small(config_json)
    ids = torch.randint(TOKENS, (1, sum(LENGTHS)))
    examples = ids.split(LENGTHS, dim=1)

    def gradients(total: torch.Tensor) -> list[torch.Tensor]:
        weights = list(model.parameters())
        found = torch.autograd.grad(total, weights, allow_unused=True)
        found = [torch.zeros_like(weight) if grad is None else grad for weight, grad in zip(weights, found)]
        return [total.detach(), *found]

    alone = [model(input_ids=each, labels=each, use_cache=False).loss * (each.numel() - 1) for each in examples]
    expected = gradients(sum(alone))

    packing.use(model)
    kept = []
    model.get_decoder().register_forward_hook(lambda module, args, output: kept.append(output.last_hidden_state))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    none = torch.empty(0, dtype=torch.long)
    model(input_ids=ids, position_ids=positions, lengths=LENGTHS, use_cache=False, logits_to_keep=none)
    inside = positions[0, 1:] > 0  # the first token of an example follows from nothing
    weight = model.get_output_embeddings().weight
    return expected, gradients(LinearCrossEntropy.apply(kept[0][0, :-1][inside], weight, ids[0, 1:][inside])[0])
