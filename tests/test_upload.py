"""The real ModelScope client sends a finished folder to a hub on loopback: what is on the list arrives byte for byte,
nothing else does, no failure costs anything, and the access token is nowhere to be read."""

import json
import shutil
import socket
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers import contents, run_script, says
from hub_server import BLOB, COMMITTED, Hub, on, silence, status
from modelscope_hub.config import HubConfig, set_default_config

import inference
from parts import upload

CARD = "README.md loss.png chat_template.jinja tokenizer.json tokenizer_config.json "
MODEL = CARD + "Modelfile config.json generation_config.json model.safetensors"
ADAPTER = CARD + "adapter_config.json adapter_model.safetensors"
TO_ME = ("--push_to", "modelscope:me/qwen3-medical")
KEPT = "模型仍完好地在 full。请检查网络、名称和令牌的权限，再运行同一命令：已传完的权重不会再传。"


@pytest.fixture
def hub(tmp_path_factory):
    with Hub() as server:
        server.inbox = tmp_path_factory.mktemp("inbox")
        yield server


@pytest.fixture
def push(finished, hub, tmp_path_factory):
    """push(*flags): the script's result; whatever came of it, this machine's folders are as before, and the token is
    neither on the screen nor in a file."""

    def command(*flags, script: str = "inference.py", **environment: str):
        before = contents(finished)
        home = tmp_path_factory.mktemp("home")
        limits = {"MODELSCOPE_API_MAX_RETRIES": "1"}
        env = hub.env(home) | limits | {"MODELSCOPE_API_TOKEN": hub.token} | environment
        ended = run_script(script, *flags, cwd=finished, env=env)
        assert contents(finished) == before
        files = [*before.values(), *contents(home).values(), *contents(hub.inbox).values()]
        assert not any(hub.token.encode() in data for data in (ended.stdout.encode(), *files))
        assert "sesame" not in ended.stdout and "Traceback" not in ended.stdout
        return ended

    return command


def received(hub: Hub) -> dict[str, bytes]:
    return contents(hub.inbox)


def sent(names: str, folder: str = "full") -> dict[str, bytes]:
    """What is received where these files of a folder have arrived."""
    return {f"me/qwen3-medical/{name}": Path(folder, name).read_bytes() for name in names.split()}


def puts(hub: Hub) -> int:
    return sum(method == "PUT" for method, _ in hub.requests)


def break_off(handler) -> bool:
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def name_base(name: str) -> None:
    """Let the adapter be one for this base."""
    config = Path("lora/adapter_config.json")
    settings = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": name}
    config.write_text(json.dumps(settings), encoding="utf-8")


def test_what_would_be_sent_is_shown_and_nothing_is(push, hub):
    ended = push("--model_path", "full", *TO_ME)
    shown = [line.split()[-1] for line in ended.stdout.splitlines() if line.startswith("  ")]
    assert ended.returncode == 0 and sorted(shown) == sorted(MODEL.split()), ended.stdout
    assert "不上传：checkpoint-2/、run.json、trainer_state.json" in ended.stdout
    assert "什么都没有上传" in ended.stdout.splitlines()[-1] and "--yes" in ended.stdout.splitlines()[-1]
    assert hub.requests == []


def test_a_model_arrives_byte_for_byte_and_nothing_else_does(push, hub):
    for name in ("optimizer.pt", "pytorch_model.bin", "notes.txt", "other.safetensors", "checkpoint-2/rng_state.pth"):
        Path("full", name).write_bytes(b"not to be sent")
    ended = push("--model_path", "full", *TO_ME, "--yes")
    assert ended.returncode == 0 and ended.stdout.endswith(f"已上传：{hub.url}/models/me/qwen3-medical\n"), ended.stdout
    assert received(hub) == sent(MODEL)
    assert hub.made["me/qwen3-medical"]["Visibility"] == 1  # private
    before = puts(hub)
    assert push("--model_path", "full", *TO_ME, "--yes").returncode == 0  # once more
    assert puts(hub) == before and received(hub) == sent(MODEL)


def test_an_adapter_arrives_and_one_for_a_local_folder_is_refused(push, hub):
    ended = push("--model_path", "lora", *TO_ME, "--yes", script="inference_lora.py")
    assert ended.returncode == 1 and hub.requests == []
    assert "python inference_lora.py --model_path lora --merge_to output/merged" in ended.stdout.splitlines()[-1]
    name_base("Qwen/Qwen3-1.7B")
    ended = push("--model_path", "lora", *TO_ME, "--yes", script="inference_lora.py")
    assert ended.returncode == 0, ended.stdout
    assert received(hub) == sent(ADAPTER, "lora")


def test_a_public_repository_is_named_as_such(push, hub):
    hub.made["me/qwen3-medical"] = {"Path": "me", "Name": "qwen3-medical", "Visibility": 5}
    ended = push("--model_path", "full", *TO_ME, "--yes")
    assert "注意：me/qwen3-medical 已经存在，而且是公开的" in ended.stdout and ended.returncode == 0


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (on(BLOB, break_off), "连接失败"),
        (on(BLOB, silence), "超时"),
        (on(BLOB, partial(status, 403)), "没有权限"),
        (on(COMMITTED, partial(status, 403)), "没有权限"),
        (on(COMMITTED, partial(status, 500)), "服务器出错"),
        (on("/models$", partial(status, 500)), "服务器出错"),
    ],
    ids="broken silent refused commit_refused commit_error creation_error".split(),
)
def test_a_failure_is_one_sentence_and_the_next_try_completes_it(push, hub, fault, cause):
    hub.fault = fault
    ended = push("--model_path", "full", *TO_ME, "--yes")
    last = ended.stdout.splitlines()[-1]
    assert ended.returncode == 1 and says(last, f"没有全部上传到 {hub.url} 的 me/qwen3-medical（{cause}~）；{KEPT}"), (
        last
    )
    hub.fault = None
    assert push("--model_path", "full", *TO_ME, "--yes").returncode == 0
    assert received(hub) == sent(MODEL)


def test_a_connection_that_breaks_once_is_no_failure(push, hub):
    hub.fault = on(BLOB, break_off, times=1)
    assert push("--model_path", "full", *TO_ME, "--yes").returncode == 0
    assert received(hub) == sent(MODEL)


def test_repositories_of_others_and_other_tokens_are_refused(push, hub):
    hub.hidden.add("me/qwen3-medical")
    for flags, environment, cause in (
        (TO_ME, {}, "已有这个名称"),
        (("--push_to", "modelscope:other/model"), {}, "没有权限"),
        (TO_ME, {"MODELSCOPE_API_TOKEN": "ms-another"}, "没有权限"),
        (TO_ME, {"MODELSCOPE_API_TOKEN": "ms-another\n"}, ""),
        (TO_ME, {"MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}, "连接失败"),
    ):
        ended = push("--model_path", "full", *flags, "--yes", **environment)
        last = ended.stdout.splitlines()[-1]
        assert ended.returncode == 1 and says(last, f"没有全部上传到 ~ 的 ~（{cause}~）；{KEPT}"), last
        assert "ms-another" not in ended.stdout
    assert received(hub) == {}


def remove(name: str) -> None:
    Path("full", name).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (partial(remove, "trainer_state.json"), "full 还没有训练完，请用原来的命令继续训练；"),
        (partial(remove, "README.md"), "full 里没有模型卡 README.md；"),
        (partial(remove, "model.safetensors"), "full 里的模型不完整（"),
        (lambda: Path("full/model.safetensors").write_bytes(b"cut off"), "full 里的模型不完整（"),
        (partial(remove, "tokenizer.json"), "full 里的模型不完整（"),
        (lambda: shutil.rmtree("full"), "full 不是训练完的输出文件夹；"),
        (lambda: Path("full/README.md").write_text(Hub.token), "full/README.md 里有你的访问令牌，"),
    ],
)
def test_folders_that_are_refused_before_anything_is_sent(finished, hub, monkeypatch, spoil, message):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", hub.token)
    spoil()
    set_default_config(HubConfig())
    with pytest.raises(SystemExit) as ended:
        upload.run("me/qwen3-medical", Path("full"), send=True)
    set_default_config(None)
    assert str(ended.value).startswith(f"错误：{message}") and hub.requests == []


def test_without_a_login_it_says_how(push, hub):
    ended = push("--model_path", "full", *TO_ME, MODELSCOPE_API_TOKEN="")
    assert ended.returncode == 1 and "没有登录 ModelScope；" in ended.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--push_to", "me/qwen3-medical"], "要写成 modelscope:owner/name，不是"),
        (["--push_to", "hf:me/qwen3-medical"], "要写成 modelscope:owner/name，不是"),
        ([*TO_ME, "--chat"], "--push_to 只上传，不提问；请去掉 chat"),
        (["--yes"], "--yes 只和 --push_to 一起起作用"),
    ],
)
def test_flags_that_do_not_fit(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["inference.py", *flags])
    with pytest.raises(SystemExit):
        inference.main()
    assert message in capsys.readouterr().err
