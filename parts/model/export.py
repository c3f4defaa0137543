"""What other programs read in a saved folder: transformers 4 its own words for some settings, Ollama a
Modelfile. It knows these forms and how Qwen3 writes a conversation. It converts no weights, and knows no text
of a system prompt."""

import json
from functools import partial
from pathlib import Path

from parts.model import encoding

# Ollama's context in tokens: the longest example and reply, 2,048 each, and the turns before them. Qwen3-1.7B
# takes 0.9 GB of cache for it.
NUM_CTX = 8192

# Qwen3's chat template in the language of Go's text/template. Its result has to be the same to the last line
# break: Ollama's own for qwen3 puts another after "system" and writes /think behind the question, neither of
# which was trained. {{- swallows the line break before it. Thinking of earlier turns is left out, as in
# training. Ollama takes the two tags by which it tells thinking from answer out of the branch with .Thinking,
# so that branch has to hold nothing else; .Think is its switch. The last message is the assistant's where a
# reply is to be continued.
TEMPLATE = Path(__file__).with_name("ollama.gotmpl").read_text(encoding="utf-8").removesuffix("\n")

# What TEMPLATE makes of a conversation, for comparison with a tokenizer's own: there is no Go here.
CONVERSATION = [*encoding.PROBE, {"role": "assistant", "content": "答"}, {"role": "user", "content": "再问"}]
PROMPT = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in CONVERSATION)
PROMPT += "<|im_start|>assistant\n"

MODELFILE = '''\
# 对话模板、系统提示词和采样参数与训练时相同。命令见 README“GGUF 与 Ollama”。
# 它不是医生：回复可能有错，不能用于诊断和治疗；身体不适请就医，紧急情况请拨打 120。
FROM ./model.gguf

TEMPLATE """{template}"""
{system}
{parameters}
'''


def translate(folder: str | Path) -> None:
    """Add to config.json and tokenizer_config.json in `folder`, if there, what transformers 4 looks for.

    Many engines stand on it. Without this it would silently take a rotary base of 10,000 instead of the
    model's, and not read the tokenizer. Newer versions read the same as before.
    """
    folder = Path(folder)
    converters = {"config.json": older_config, "tokenizer_config.json": partial(older_tokenizer, folder)}
    for name, convert in converters.items():
        if (folder / name).is_file():
            settings = convert(json.loads((folder / name).read_text(encoding="utf-8")))
            text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")


def older_config(config: dict) -> dict:
    """Return `config` with rope_theta, rope_scaling and torch_dtype beside rope_parameters and dtype."""
    config, rope = dict(config), dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    return config


def older_tokenizer(folder: Path, settings: dict) -> dict:
    """Return the tokenizer's `settings` with special tokens and class under their older names, which newer
    libraries know too."""
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    settings = settings | {"added_tokens_decoder": {str(token.pop("id")): token for token in added}}
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return settings


def write_modelfile(folder: str | Path, tokenizer, generation_config) -> None:
    """Write what Ollama needs beside the weights in GGUF into the folder of a full model.

    It is made from the tokenizer and the transformers.GenerationConfig saved there. Where a Modelfile could
    not say what was trained, none is written, and one line says why.
    """
    path = Path(folder, "Modelfile")
    if reason := objection(tokenizer):
        path.unlink(missing_ok=True)  # one of an earlier training would be wrong in silence
        print(f"提示：没有生成 {path}（供 Ollama 使用）：{reason}。")
        return
    text = encoding.default_system(tokenizer)
    system = f'\nSYSTEM """{text}"""\n' if text else ""
    stops = tokenizer.convert_ids_to_tokens(generation_config.eos_token_id)
    lines = [f'PARAMETER stop "{stop}"' for stop in stops]
    for name in ("temperature", "top_p", "top_k"):
        lines.append(f"PARAMETER {name} {getattr(generation_config, name)}")
    # What Ollama would otherwise fill in differently.
    lines.append(f"PARAMETER repeat_penalty {generation_config.repetition_penalty or 1.0}")
    lines.append(f"PARAMETER num_ctx {NUM_CTX}")
    modelfile = MODELFILE.format(template=TEMPLATE, system=system, parameters="\n".join(lines))
    path.write_text(modelfile, encoding="utf-8")


def objection(tokenizer) -> str | None:
    """Return why a Modelfile would ask this model otherwise than it was trained, or None."""
    for thinking, ending in ((True, ""), (False, "<think>\n\n</think>\n\n")):
        ids = encoding.encode_messages(tokenizer, CONVERSATION, prompt_only=True, thinking=thinking)
        if tokenizer.decode(ids) != PROMPT + ending:
            return "它的对话模板与 Qwen3 的不同"
    text = encoding.default_system(tokenizer) or ""
    # Ollama ends a text at three quotes, for which it knows no escape, and drops unprintable characters.
    if '"""' in text or not text.replace("\n", "").replace("\t", "").isprintable():
        return "系统提示词里有 Modelfile 无法表示的字符（连续三个双引号、全角空格或不可见字符）"
    return None
