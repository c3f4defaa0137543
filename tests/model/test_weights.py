"""A model that cannot be loaded gets one sentence, whatever file of it is broken; its turns end where Qwen3's do."""

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import refused

import data
from parts.model import encoding
from parts.model.weights import best_dtype, load_tokenizer, load_trained, load_weights

MODEL = "bad 里的模型无法读取（~）；~"
NO_WEIGHTS = "bad 里的模型无法读取（缺少 ~ 个权重，例如 bert.~）；~"
TOKENIZER = "~bad 里的分词器不能用（~）；~"
NO_TEMPLATE = "bad 里的分词器不能用（没有对话模板，~）；~"
NO_TOKENIZER = "bad 里的分词器不能用（缺少 tokenizer.json、~）；~"
UNTRAINED = "{} 里没有训练好的模型；请先运行 python train.py~"
NO_MODEL = "找不到模型 {}：~"
BAD_MODELS = {  # a file of the model, its content (None: not there), the message
    "configuration missing": ("config.json", None, UNTRAINED.format("bad")),
    "configuration cut": ("config.json", b"{", MODEL),
    "configuration an array": ("config.json", b"[]", MODEL),
    "configuration in GBK": ("config.json", '{"a": "我"}'.encode("gbk"), MODEL),
    "code of its own": ("config.json", b'{"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}', MODEL),
    "another architecture": ("config.json", b'{"model_type": "bert"}', NO_WEIGHTS),
    "generation settings cut": ("generation_config.json", b"{", MODEL),
    "tokenizer missing": ("tokenizer.json", None, NO_TOKENIZER),
    "tokenizer empty": ("tokenizer.json", b"{}", TOKENIZER),
    "tokenizer an array": ("tokenizer.json", b"[]", TOKENIZER),
    "tokenizer settings cut": ("tokenizer_config.json", b"[", TOKENIZER),
    "template missing": ("chat_template.jinja", None, NO_TEMPLATE),
    "template broken": ("chat_template.jinja", b"{% if %}", TOKENIZER),
    "template fails": ("chat_template.jinja", b"{{ 1 / 0 }}", TOKENIZER),
    "weights empty": ("model.safetensors", b"", MODEL),
    "weights a page": ("model.safetensors", b"<html>" * 99, MODEL),
}


@pytest.mark.parametrize(("file", "content", "message"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_model_that_cannot_be_asked(tiny_model, folder, file, content, message):
    shutil.copytree(tiny_model, "bad")
    Path("bad", file).unlink()
    if content is not None:
        Path("bad", file).write_bytes(content)
    refused(message, load_trained, "bad")


@pytest.mark.parametrize("name", ["no model", "a/b/c", "a_file", "n" * 300, "output/qwen3-medical", "a_folder"])
def test_model_that_is_not_there(folder, name):
    Path("a_file").touch()
    Path("a_folder").mkdir()
    message = UNTRAINED if name in ("output/qwen3-medical", "a_folder") else NO_MODEL
    refused(message.format(name), load_trained, name)


def change_tokens(folder: Path, old: str, new: str, **settings) -> str:
    """Give a token of the model in `folder` another name, and its tokenizer these settings."""
    file, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    file.write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    known = json.loads(config.read_text(encoding="utf-8")) | settings
    config.write_text(json.dumps({name: value for name, value in known.items() if value}), encoding="utf-8")
    return str(folder)


def test_tokens_that_end_turns_and_fill_batches(tiny_model, tmp_path):
    """A base model's tokenizer names <|endoftext|> as the end; its replies have to end with the turn all the same."""
    copies = (shutil.copytree(tiny_model, tmp_path / str(i)) for i in range(4))
    path = change_tokens(next(copies), "<|im_end|>", "<|eot|>", eos_token="<|eot|>")
    refused("~ 里的分词器不能用（没有 <|im_end|>）；~", load_tokenizer, path)
    for there, padding in (("<|endoftext|>", "<|endoftext|>"), ("<|other|>", "<|im_end|>")):
        path = change_tokens(next(copies), "<|endoftext|>", there, pad_token=None)
        assert load_tokenizer(path).pad_token == padding
    tokenizer = load_tokenizer(change_tokens(next(copies), "", "", eos_token="<|endoftext|>"))
    example = encoding.encode_example(tokenizer, data.to_messages("问", "想", "答"))
    assert tokenizer.decode(example["labels"][-1]) == "<|im_end|>" == tokenizer.eos_token


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.pt", None])
def test_model_without_safetensors_is_refused_and_not_unpickled(tiny_model, folder, weights):
    shutil.copytree(tiny_model, "bin")
    Path("bin/model.safetensors").unlink()
    if weights:
        Path("bin", weights).write_bytes(pickle.dumps(Bomb()))
    refused("bin 里没有 safetensors 格式的权重（~）；~", load_trained, "bin")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("kind", "has_bfloat16", "dtype"),
    [
        ("npu", False, torch.bfloat16),
        ("mps", True, torch.bfloat16),
        ("mps", False, torch.float32),
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
    ],
)
def test_each_device_computes_in_bfloat16_where_it_can(monkeypatch, kind, has_bfloat16, dtype):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: has_bfloat16 and version == (14, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert best_dtype(SimpleNamespace(type=kind)) == dtype


def test_attention_is_not_left_to_cudnn(tiny_model):
    """It would plan anew for nearly each batch."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_weights(str(tiny_model), torch.device("cpu"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
