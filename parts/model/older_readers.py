"""A saved folder also in the words of transformers 4, which many engines stand on: it would take transformers 5's for
a rotary base of 10,000 without a word, and not read its tokenizer. Knows files, no model."""

import json
from pathlib import Path

TOKEN_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def include(folder: str | Path) -> None:
    """Add to config.json and tokenizer_config.json in `folder`, where they are, what older libraries look for. Newer
    ones read the same as before."""
    for name, translate in (("config.json", translate_config), ("tokenizer_config.json", translate_tokenizer)):
        path = Path(folder, name)
        if path.is_file():
            settings = translate(json.loads(path.read_text(encoding="utf-8")), path.parent)
            path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def translate_config(config: dict, folder: Path) -> dict:
    """With rope_theta, rope_scaling and torch_dtype beside rope_parameters and dtype."""
    rope = dict(config.get("rope_parameters") or {})
    found = {}
    if "rope_theta" in rope:
        found["rope_theta"] = rope.pop("rope_theta")
        found["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if "dtype" in config:
        found["torch_dtype"] = config["dtype"]
    return config | found


def translate_tokenizer(settings: dict, folder: Path) -> dict:
    """With the special tokens and the class under their older names, which the newer libraries know too."""
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    settings = settings | {
        "added_tokens_decoder": {str(token["id"]): {name: token[name] for name in TOKEN_FIELDS} for token in tokens}
    }
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return settings
