"""What llama.cpp makes of a trained model: the same tokens, the same logits. LLAMA_CPP names a folder of llama.cpp with
its convert_hf_to_gguf.py, as in the source package of llama-cpp-python, which the later tests want installed too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import REAL

import data
from parts import encoding, models, older_readers, system_prompt

LLAMA_CPP = os.environ.get("LLAMA_CPP")
pytestmark = pytest.mark.skipif(not LLAMA_CPP, reason="LLAMA_CPP names no llama.cpp")
QUESTIONS = ["感冒 and 0456 怎么办？", "  两边的空格\n\n\n换行\t", "It's 3,000 ml／天 😀 naïve"]


def convert(model: Path, file: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(Path(LLAMA_CPP, "convert_hf_to_gguf.py")), str(model), "--outfile", str(file)]
    return subprocess.run([*command, *flags], capture_output=True, encoding="utf-8")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """One layer of random weights, saved as a training does it, and converted. Heads of 128 as Qwen3's; weights so
    large that the logits hang on all tokens before."""
    if not REAL.is_dir():
        pytest.skip("the real tokenizer is not part of the project")
    folder = tmp_path_factory.mktemp("gguf")
    settings = json.loads((REAL / "qwen3-1.7b" / "config.json").read_text(encoding="utf-8"))
    settings = {name: value for name, value in settings.items() if name not in ("torch_dtype", "architectures")}
    settings |= {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**settings | {"num_hidden_layers": 1, "max_window_layers": 1})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = models.load_tokenizer(str(REAL / "qwen3-1.7b"))
    system_prompt.with_default(tokenizer, data.SYSTEM_PROMPT).save_pretrained(folder)
    older_readers.include(folder)
    ran = convert(folder, folder / "exact.gguf", "--outtype", "f32")
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.fixture(scope="module")
def exact(saved):
    """llama.cpp with the converted weights, keys and values in float32 too: by itself it rounds them to float16."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    return load(saved / "exact.gguf", type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)


def load(file: Path, **settings):
    import llama_cpp

    return llama_cpp.Llama(str(file), n_ctx=1024, logits_all=True, n_threads=1, verbose=False, **settings)


def logits_of(llama, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.tensor(llama.scores[: len(ids)])


def prompts(tokenizer) -> list[tuple[str, list[int]]]:
    """(as the template writes it, our ids)."""
    turns = [data.to_messages(question) for question in QUESTIONS]
    turns.append(data.to_messages("那吃什么药？", history=[["感冒了", "多休息。"]]))
    return [
        (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            encoding.encode_messages(tokenizer, messages, prompt_only=True),
        )
        for messages in turns
    ]


def test_the_converter_carries_all_of_the_model(saved, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(LLAMA_CPP, "gguf-py")))
    import gguf

    read = gguf.GGUFReader(saved / "exact.gguf")
    tokenizer = models.load_tokenizer(str(saved))

    def value(name: str):
        return read.fields[name].contents()

    assert value("general.architecture") == "qwen3" and value("qwen3.rope.freq_base") == 1e6
    assert value("tokenizer.chat_template") == tokenizer.chat_template  # with the system prompt that was trained
    assert value("tokenizer.ggml.pre") == "qwen2" and value("tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert value("tokenizer.ggml.tokens")[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    there = {tensor.name: torch.tensor(tensor.data) for tensor in read.tensors}
    state = models.load_weights(str(saved), torch.device("cpu")).state_dict()
    assert there["token_embd.weight"].equal(state["model.embed_tokens.weight"].float())
    assert len(there) == len([name for name in state if name != "lm_head.weight"])


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tiny_model, tmp_path):
    """It names the reason last, and leaves no file. So the demo's model cannot be converted, Qwen3's can."""
    ran = convert(tiny_model, tmp_path / "demo.gguf")
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == (
        "NotImplementedError: BPE pre-tokenizer was not recognized - update get_vocab_base_pre()"
    )
    assert list(tmp_path.iterdir()) == []


def test_llama_cpp_reads_a_prompt_as_we_do(saved, exact):
    for text, ids in prompts(models.load_tokenizer(str(saved))):
        assert exact.tokenize(text.encode(), add_bos=True, special=True) == ids  # True: if the model wants one


def test_llama_cpp_computes_the_same_logits(saved, exact):
    model = models.load_weights(str(saved), torch.device("cpu"))
    for _, ids in prompts(models.load_tokenizer(str(saved))):
        with torch.inference_mode():
            ours = model(torch.tensor([ids])).logits[0]
        theirs = logits_of(exact, ids)
        assert ours.std() > 1  # else anything would be near
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * float(ours.std()))
        assert theirs.argmax(-1).equal(ours.argmax(-1))


def test_four_bits_are_smaller_and_near(saved, exact):
    import llama_cpp

    small = saved / "model.gguf"
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    files = (str(saved / "exact.gguf").encode(), str(small).encode())
    assert llama_cpp.llama_model_quantize(*files, settings) == 0
    assert small.stat().st_size < (saved / "exact.gguf").stat().st_size / 3
    quantized = load(small)
    for _, ids in prompts(models.load_tokenizer(str(saved))):
        pair = torch.stack([logits_of(llama, ids).flatten() for llama in (exact, quantized)])
        assert torch.corrcoef(pair)[0, 1] > 0.95
