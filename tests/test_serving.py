"""A trained folder behind servers of others: `transformers serve`, asked by OpenAI's own client on loopback, and
llama.cpp. The project has no server of its own: what is tested is that its folders are read as they were trained.

LLAMA_CPP names a folder of llama.cpp with its convert_hf_to_gguf.py, as in the source package of llama-cpp-python, that
one test wants installed too."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from helpers import REAL, SAMPLES, as_jsonl, load_attentive, run

import data
from parts.model import encoding, export
from parts.model.weights import load_tokenizer, load_weights

ROWS = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()][:4:2]  # two topics
LLAMA_CPP = os.environ.get("LLAMA_CPP")
QUESTIONS = ["感冒 and 0456 怎么办？", "  两边的空格\n\n\n换行\t", "It's 3,000 ml／天 😀 naïve"]


@pytest.fixture(scope="module")
def client(tmp_path_factory, tiny_model):
    """Of a server whose models are ./learnt, which knows ROWS by heart, and ./attentive, which answers otherwise after
    another prompt; `client.folder` holds them."""
    openai = pytest.importorskip("openai", reason='no client and no server: pip install "transformers[serving]"')
    folder = tmp_path_factory.mktemp("serving")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("train.jsonl", "val.jsonl"):
            Path(name).write_text(as_jsonl(ROWS), encoding="utf-8")
        changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2}
        run(tiny_model, max_steps=60, eval_steps=60, output_dir="learnt", **changes)
        shutil.copytree("learnt", "attentive", ignore=shutil.ignore_patterns("checkpoint-*"))
        load_attentive(tiny_model).save_pretrained("attentive")
    log, end = folder / "server.log", time.monotonic() + 120
    # Port 0: one that is free, named in the log.
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--port", "0"]
    with log.open("wb") as file:
        server = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
    try:
        while not (address := re.search(r"running on (http://\S+)", log.read_text(encoding="utf-8"))):
            assert server.poll() is None and time.monotonic() < end, log.read_text(encoding="utf-8")
            time.sleep(0.05)
        with openai.OpenAI(base_url=f"{address[1]}/v1", api_key="none", timeout=120) as client:
            client.folder = folder
            yield client
    finally:
        server.terminate()
        server.wait()


def ask(client, messages, model: str = "./learnt", **more):
    """The reply, greedy."""
    return client.chat.completions.create(model=model, messages=messages, temperature=0, **more)


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_thinking_is_in_a_field_of_its_own(client):
    question, think, answer = (ROWS[0][name] for name in ("question", "think", "answer"))
    [choice] = ask(client, user(question)).choices
    assert (choice.message.reasoning_content, choice.message.content, choice.finish_reason) == (think, answer, "stop")
    [choice] = ask(client, user(question), max_tokens=10).choices
    assert (choice.message.content, choice.finish_reason) == ("", "length")  # a thinking that was cut off is no answer
    assert think.startswith(choice.message.reasoning_content)


def test_request_without_a_system_prompt_is_asked_as_trained(client):
    folder, question = client.folder / "attentive", ROWS[0]["question"]
    tokenizer = load_tokenizer(str(folder))
    expected = encoding.encode_messages(tokenizer, data.to_messages(question), prompt_only=True)

    def reply(*system: str):
        messages = [{"role": "system", "content": text} for text in system] + user(question)
        said = ask(client, messages, "./attentive", max_tokens=20)
        return said.choices[0].message.content, said.usage.prompt_tokens

    assert reply() == reply(data.SYSTEM_PROMPT) != reply("别的")
    assert reply()[1] == len(expected) and encoding.default_system(tokenizer) == data.SYSTEM_PROMPT


def save_and_convert(folder: Path) -> str:
    """Save one layer of random weights as a training does it, and convert it; return the name of the file in GGUF.
    Heads of 128 as Qwen3's; weights so large that the logits hang on all tokens before."""
    settings = json.loads((REAL / "qwen3-1.7b" / "config.json").read_text(encoding="utf-8"))
    del settings["torch_dtype"], settings["architectures"]
    settings |= {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Qwen3Config(**settings | {"num_hidden_layers": 1, "max_window_layers": 1})
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim == 2 else 1)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = load_tokenizer(str(REAL / "qwen3-1.7b"))
    encoding.with_system(tokenizer, data.SYSTEM_PROMPT).save_pretrained(folder)
    export.translate(folder)
    converter, converted = Path(LLAMA_CPP, "convert_hf_to_gguf.py"), str(folder / "exact.gguf")
    subprocess.run([sys.executable, converter, folder, "--outfile", converted, "--outtype", "f32"], check=True)
    return converted


@pytest.mark.skipif(not (LLAMA_CPP and REAL.is_dir()), reason="LLAMA_CPP names no llama.cpp, or no real tokenizer")
def test_llama_cpp_reads_a_prompt_as_we_do_and_computes_the_same_logits(folder):
    """Keys and values are in float32 too: by itself it rounds them to float16."""
    cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    exact = {"type_k": cpp.GGML_TYPE_F32, "type_v": cpp.GGML_TYPE_F32, "logits_all": True}
    llama = cpp.Llama(save_and_convert(folder), n_ctx=1024, n_threads=1, verbose=False, **exact)
    model, tokenizer = load_weights(str(folder), torch.device("cpu")), load_tokenizer(str(folder))
    turns = [data.to_messages(question) for question in QUESTIONS]
    turns.append(data.to_messages("那吃什么药？", history=[["感冒了", "多休息。"]]))
    for messages in turns:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = encoding.encode_messages(tokenizer, messages, prompt_only=True)
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == ids  # True: if the model wants one
        llama.reset()
        llama.eval(ids)
        with torch.inference_mode():
            ours = model(torch.tensor([ids])).logits[0]
        assert ours.std() > 1  # else anything would be near
        torch.testing.assert_close(torch.tensor(llama.scores[: len(ids)]), ours, rtol=0, atol=1e-4 * float(ours.std()))
