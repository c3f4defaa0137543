"""A trained folder behind `transformers serve`, asked by OpenAI's own client on loopback. The project has no server of
its own: what is tested here is that its folders serve as they were trained, and what this server does with bad input.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import SAMPLES, as_jsonl, load_attentive, run

import data
from parts import encoding, models, system_prompt

openai = pytest.importorskip("openai", reason='no client and no server: pip install "transformers[serving]"')

ROWS = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()][:4:2]  # two topics
LIMIT = 4096  # tokens, of the tiny model
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000_000}}


@contextlib.contextmanager
def serving(folder, *words):
    """The client of a server in `folder` that was started with these words of the README's command."""
    # Port 0: one that is free, named in the log.
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", *words, "--port", "0"]
    log = folder / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=os.environ)
    try:
        end = time.monotonic() + 120
        while not (address := re.search(r"running on (http://\S+)", log.read_text(encoding="utf-8"))):
            assert server.poll() is None and time.monotonic() < end, log.read_text(encoding="utf-8")
            time.sleep(0.05)
        with openai.OpenAI(base_url=f"{address[1]}/v1", api_key="none", timeout=120) as client:
            yield client
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def folder_of_models(tmp_path_factory, tiny_model):
    """`learnt` was trained until it knows ROWS by heart; `attentive` says something else after another prompt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("serving"))
        for name in ("train.jsonl", "val.jsonl"):
            (folder / name).write_text(as_jsonl(ROWS), encoding="utf-8")
        changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2}
        run(tiny_model, max_steps=60, eval_steps=60, output_dir="learnt", **changes)
        shutil.copytree("learnt", "attentive", ignore=shutil.ignore_patterns("checkpoint-*"))
        load_attentive(tiny_model).save_pretrained("attentive")
    return folder


@pytest.fixture(scope="module")
def pinned(folder_of_models):
    """As in the README: one model, loaded before the first request."""
    with serving(folder_of_models, "./learnt") as client:
        yield client


@pytest.fixture(scope="module")
def unpinned(folder_of_models):
    """Each request names the folder that is to answer it."""
    with serving(folder_of_models) as client:
        yield client


def ask(client, question, model="./learnt", **more):
    """The whole reply, greedy unless told."""
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    return client.chat.completions.create(model=model, messages=messages, **{"temperature": 0} | more)


def knows(client) -> bool:
    """The server answers as it was trained: thinking and answer in their own fields, ended by itself."""
    [choice] = ask(client, ROWS[0]["question"]).choices
    said = (choice.message.reasoning_content, choice.message.content, choice.finish_reason)
    return said == (ROWS[0]["think"], ROWS[0]["answer"], "stop")


def prompt_ids(folder, question: str) -> list[int]:
    """Of the training's prompt, system prompt included."""
    tokenizer = models.load_tokenizer(str(folder))
    return encoding.encode_messages(tokenizer, data.to_messages(question), prompt_only=True)


def test_thinking_is_in_a_field_of_its_own(pinned):
    assert knows(pinned)
    [model] = pinned.models.list().data
    assert model.id == "./learnt"


def test_cut_off_thinking_is_no_answer(pinned):
    [choice] = ask(pinned, ROWS[0]["question"], max_tokens=10).choices
    assert (choice.message.content, choice.finish_reason) == ("", "length")
    assert len(choice.message.reasoning_content) > 5 and ROWS[0]["think"].startswith(choice.message.reasoning_content)


def test_streamed_reply_is_the_same_in_pieces(pinned):
    *pieces, last = ask(pinned, ROWS[0]["question"], stream=True)
    deltas = [piece.choices[0].delta for piece in pieces]
    thinking = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    answer = [delta.content or "" for delta in deltas]
    assert ("".join(thinking).strip(), "".join(answer).strip()) == (ROWS[0]["think"], ROWS[0]["answer"])
    assert sum(map(bool, thinking)) > 5 < sum(map(bool, answer))
    assert max(i for i, text in enumerate(thinking) if text) < min(i for i, text in enumerate(answer) if text)
    assert last.choices[0].finish_reason == "stop"


def test_many_at_once_each_get_their_own(pinned):
    """They are computed one after another."""
    with ThreadPoolExecutor(64) as pool:
        replies = list(pool.map(lambda i: ask(pinned, ROWS[i % 2]["question"], max_tokens=12), range(64)))
    said = [reply.choices[0].message.reasoning_content for reply in replies]
    assert all(text and ROWS[i % 2]["think"].startswith(text) for i, text in enumerate(said)) and said[0] != said[1]


def test_request_without_a_system_prompt_is_asked_as_trained(folder_of_models, unpinned):
    from transformers import AutoTokenizer

    folder, question = folder_of_models / "attentive", ROWS[0]["question"]
    expected, user = prompt_ids(folder, question), [{"role": "user", "content": question}]
    saved = AutoTokenizer.from_pretrained(folder)
    assert saved.apply_chat_template(user, add_generation_prompt=True)["input_ids"] == expected

    def reply(system: str | None):
        messages = user if system is None else [{"role": "system", "content": system}, *user]
        said = ask(unpinned, messages, "./attentive", max_tokens=20)
        return said.choices[0].message.content, said.usage.prompt_tokens

    assert reply(None) == reply(data.SYSTEM_PROMPT) != reply("别的")
    assert reply(None)[1] == len(expected)
    assert system_prompt.default(models.load_tokenizer(str(folder))) == data.SYSTEM_PROMPT


def test_one_that_hangs_up_holds_nobody_up(unpinned):
    """What it had asked for would take this machine far longer than a client waits."""
    with ask(unpinned, "问", "./attentive", stream=True, max_tokens=100_000) as stream:
        assert next(stream) and next(stream)
    assert ask(unpinned, "问", "./attentive", max_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "gpt-5"},
        {"messages": []},
        {"messages": "问"},
        {"messages": [{"content": "问"}]},
        {"max_tokens": -1},
        {"temperature": -1},
        {"extra_body": {"top_k": 20}},
        {"extra_body": {"chat_template_kwargs": 1}},
    ],
    ids=lambda wrong: json.dumps(wrong, ensure_ascii=False),
)
def test_wrong_request_is_an_http_error_and_the_server_lives_on(pinned, wrong):
    request = {"model": "./learnt", "messages": [{"role": "user", "content": "问"}], "max_tokens": 3} | wrong
    with pytest.raises(openai.APIStatusError):
        pinned.with_options(max_retries=0).chat.completions.create(**request)
    assert knows(pinned)


def test_what_is_too_long_for_the_model_is_not_cut(folder_of_models, pinned):
    """Nor refused: it is computed beyond what the model knows."""
    question = "感冒了，" * 3000
    expected = len(prompt_ids(folder_of_models / "learnt", question))
    assert ask(pinned, question, max_tokens=1).usage.prompt_tokens == expected > LIMIT
    assert knows(pinned)


def test_ten_megabytes_of_a_picture_are_left_out(folder_of_models, pinned):
    question = ROWS[0]["question"]
    content = [PICTURE, {"type": "text", "text": question}]
    reply = ask(pinned, [{"role": "user", "content": content}])
    assert reply.choices[0].message.content == ROWS[0]["answer"]
    assert reply.usage.prompt_tokens == len(prompt_ids(folder_of_models / "learnt", question))


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def only_checkpoints(folder):
    """As in a run that goes on."""
    for path in folder.iterdir():
        if path.is_file() and path.name != "run.json":
            path.unlink()


def no_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize("spoil", [cut_weights, only_checkpoints, no_config])
def test_half_written_folder_is_an_http_error_and_the_server_lives_on(folder_of_models, unpinned, spoil):
    half = folder_of_models / spoil.__name__
    spoil(shutil.copytree(folder_of_models / "learnt", half))
    with pytest.raises(openai.APIStatusError):
        ask(unpinned.with_options(max_retries=0), "问", f"./{half.name}", max_tokens=3)
    assert knows(unpinned)
    checkpoint = next(half.glob("checkpoint-*"))  # while it trains, the newest checkpoint can be served
    assert ask(unpinned, ROWS[0]["question"], str(checkpoint)).choices[0].message.content == ROWS[0]["answer"]
