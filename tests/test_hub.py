"""The real clients of ModelScope and Hugging Face against a hub on loopback, whole and faulty: what recovers, what ends
in one sentence, and that nothing half-written is trusted by the next try."""

import ast
import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, contents, make_rows, published, run, same, save, written
from hub_server import FILE, LISTING, Hub, cut, on, page, status, wrong
from modelscope_hub.config import set_default_config

import data
import train_lora
from parts import hub as parts_hub
from parts.model import weights


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """What the hub has as the model own/er: weights in several files, and some that are not to be downloaded."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights.load_weights(str(tiny_model), torch.device("cpu")).save_pretrained(folder, max_shard_size="500KB")
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "ONNX/model.ONNX"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


@pytest.fixture
def hub(tmp_path, model, monkeypatch):
    """A hub with the data set and the model own/er; the clients of this process ask it, with empty caches."""
    from huggingface_hub import constants

    (tmp_path / "set").mkdir()
    save(make_rows(40), tmp_path / "set" / "rows.jsonl")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with Hub({"own/er": model}, {"own/er": tmp_path / "set"}) as server:
        for name, value in server.env(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        set_default_config(None)  # ModelScope's client keeps the address it was first given
        # Clients pause before they try again; here a test of a fault would take seconds for it.
        monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
        yield server
    set_default_config(None)


def find_model(name: str, revision: str | None = None) -> str:
    """As train.py asks for a model."""
    return weights.find_model(name, "用 --model_name 指定本地模型文件夹", revision, to_train=True)


def fetch(kind: str, name: str) -> None:
    """Fetch the data set or the model, and see that it has come as the hub has it."""
    if kind == "dataset":
        data.prepare(name)
        assert written() == published(make_rows(40))
        return
    folder = Path(find_model(name))
    expected = contents(Path.cwd().parent / "model")
    del expected["pytorch_model.bin"], expected["ONNX/model.ONNX"]
    assert {path: (folder / path).read_bytes() for path in contents(folder)} == expected
    weights.load_weights(str(folder), torch.device("cpu"))


def ends(call, *args, **kwargs) -> str:
    """What a call that cannot go on says."""
    with pytest.raises(SystemExit) as ended:
        call(*args, **kwargs)
    assert "\n" not in str(ended.value)
    return str(ended.value)


NAMES = pytest.mark.parametrize("name", ["own/er", "hf://own/er"], ids=["modelscope", "huggingface"])
KINDS = pytest.mark.parametrize("kind", ["dataset", "model"])


# ---- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault, times", [(partial(status, 500), 2), (cut, 1)], ids=["500 twice", "cut body"])
@NAMES
@KINDS
def test_what_is_fetched_arrives_in_spite_of(hub, kind, name, fault, times):
    hub.fault = on(FILE, fault, times)
    fetch(kind, name)


LASTING = {  # fault, what is said of it
    "no such name": (on(LISTING, partial(status, 404)), "没有这个名称、版本或文件"),
    "not allowed": (on(LISTING, partial(status, 403)), "没有权限"),
    "server error": (on(LISTING, partial(status, 500)), "连不上，或服务器出错"),
    "body cut short": (on(FILE, cut), "连不上，或服务器出错"),
    "a page in place of a file": (on(FILE, page), "内容与文件列表不符"),
    "wrong bytes": (on(FILE, wrong), "内容与文件列表不符"),
    "refused": (None, "连不上，或服务器出错"),
}


@pytest.mark.parametrize("fault", LASTING)
@NAMES
@KINDS
def test_a_download_that_fails_is_one_sentence_and_the_next_try_is_whole(hub, tmp_path, kind, name, fault):
    if fault == "wrong bytes" and name.startswith("hf"):
        pytest.skip("Hugging Face's client compares sizes")
    hub.fault, cause = LASTING[fault]
    if fault == "refused":
        hub.__exit__()
    said = ends(fetch, kind, name)
    what, remedy = ("数据集", "--dataset") if kind == "dataset" else ("模型", "--model_name")
    assert said.startswith(f"错误：无法从 {hub.url} 下载{what} {name}（") and cause in said.split("；")[0]
    assert ("HF_ENDPOINT" if "hf" in name else "MODELSCOPE_ENDPOINT") in said and remedy in said
    assert contents(tmp_path / "work") == {} and weights.find_downloaded(name, None) is None
    if fault != "refused":
        hub.fault = None
        fetch(kind, name)


@NAMES
@KINDS
@pytest.mark.parametrize("path", ["../../escaped.jsonl", "{tmp}/escaped.jsonl", "..\\escaped.jsonl", "C:escaped.csv"])
def test_list_that_leaves_the_folder_is_refused_before_anything_is_written(hub, tmp_path, kind, name, path):
    path = path.format(tmp=tmp_path)
    hub.outside = {path: b"escaped"}
    (tmp_path / "home/.modelscope/credentials").mkdir(parents=True)
    (tmp_path / "home/.modelscope/credentials/session").write_text("0" * 32)  # else the client makes one
    before = contents(tmp_path)
    assert f"{path} 会写到文件夹之外" in ends(fetch, kind, name)
    assert "../.. 会写到文件夹之外" in ends(find_model, name, revision="../..")
    assert contents(tmp_path) == before and not re.search(FILE, " ".join(hub.requests))


@NAMES
def test_a_model_of_an_unknown_family_is_refused_before_its_weights_are_asked_for(hub, model, name):
    config = model / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"qwen3"', '"gemma2"'), encoding="utf-8")
    assert f"{name} 不能在这里正确训练：它的 model_type 是 gemma2" in ends(find_model, name)
    assert "config.json" in " ".join(hub.requests) and ".safetensors" not in " ".join(hub.requests)
    assert weights.find_downloaded(name, None) is None
    assert weights.find_model(name, "")  # to be asked it may come


HERE = {  # what is wrong on this machine: the environment, and what is said of it
    "proxy": ({"HTTP_PROXY": "http://127.0.0.1:port"}, "名称或环境变量写错了）；"),
    "token": ({"HF_TOKEN": "令牌", "MODELSCOPE_API_TOKEN": "令牌"}, "名称或环境变量写错了）；"),
    "cache": ({"HF_HUB_CACHE": "/proc/no", "MODELSCOPE_CACHE": "/proc/no"}, "写不了文件）；请用环境变量 {}"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, "连不上：要求离线）；请去掉环境变量 HF_HUB_OFFLINE"),
}


@pytest.mark.parametrize("wrong_here", HERE)
@NAMES
def test_what_is_wrong_on_this_machine_is_not_put_on_the_network(hub, monkeypatch, name, wrong_here):
    import huggingface_hub

    env, said = HERE[wrong_here]
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
        if hasattr(huggingface_hub.constants, variable):
            monkeypatch.setattr(huggingface_hub.constants, variable, value)
    huggingface_hub.close_session()  # it keeps the proxy that it was made with
    set_default_config(None)
    if wrong_here == "offline" and name == "own/er":
        return fetch("model", name)
    message = ends(fetch, "model", name)
    assert said.format("HF_HOME、HF_HUB_CACHE" if "hf" in name else "MODELSCOPE_CACHE") in message
    assert "网络" not in message and "镜像" not in message
    huggingface_hub.close_session()


@pytest.mark.parametrize(
    "error", ["Missing dependencies for SOCKS support.", "Using SOCKS proxy, but 'socksio' is not"]
)
def test_socks_without_its_library_is_told_the_command(error):
    assert parts_hub.find_cause(ImportError(error))[1] == "请 pip install socksio pysocks"


# ---- what is in the cache -----------------------------------------------------------------------------------------


@NAMES
def test_model_from_an_earlier_download_is_used_when_the_hub_is_not_there(hub, capsys, name):
    folder = find_model(name)
    hub.fault, _ = LASTING["server error"]
    for failing in (True, False):
        capsys.readouterr()
        assert find_model(name) == folder and "\n提示：连不上 " in capsys.readouterr().out
        assert "连不上" in ends(find_model, name, revision="v1")
        if failing:
            hub.__exit__()


@NAMES
def test_model_that_the_hub_has_taken_back_or_that_is_not_whole_is_not_used(hub, name):
    folder = Path(find_model(name))
    hub.fault = LASTING["no such name"][0]
    assert "没有这个名称" in ends(find_model, name)
    part = next(folder.glob("model-00002-*"))
    damages = [(folder / "config.json", None), (folder / "model.safetensors.index.json", None), (part, None)]
    for path, content in [*damages, (part, part.read_bytes()[:-1]), (folder / "tokenizer.json", b"")]:
        kept = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert weights.find_downloaded(name, None) is None
        path.write_bytes(kept)
    assert weights.find_downloaded(name, None) == folder
    (folder / "README.md.incomplete").touch()
    assert weights.find_downloaded(name, None) is None


def test_model_that_has_changed_and_cannot_be_fetched_is_not_mixed_from_two_versions(hub, model):
    find_model("own/er")
    (model / "chat_template.jinja").write_text("another")
    hub.fault = on(FILE, partial(status, 500))
    assert "连不上" in ends(find_model, "own/er")


# ---- names, revisions, checksums ----------------------------------------------------------------------------------


def test_revision_is_what_is_asked_for(hub):
    data.prepare("hf://own/er", revision="v2")
    find_model("hf://own/er", revision="v2")
    assert all("/revision/v2" in address for address in hub.requests if "/api/" in address and "/tree/" not in address)
    assert "版本 v1 只用于 hub 上的模型" in ends(find_model, ".", revision="v1")


def test_card_names_revision_and_data(hub):
    data.prepare("own/er", revision="v6")
    run("own/er", model_revision="v7", output_dir="out", max_steps=1)
    asked = [address for address in hub.requests if "Revision=" in address]
    assert asked and all(("Revision=v7" if "/models/" in address else "Revision=v6") in address for address in asked)
    parts = sorted(Path(find_model("own/er", revision="v7")).glob("*.safetensors"))
    checksum = hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert "\n| 基础模型的版本 | v7 |\n" in card and f"\n| 基础权重的 SHA-256 | {checksum} |\n" in card
    [origin] = data.read_origin("train.jsonl")["sources"]
    assert f"\n| 数据 | {origin['source']}，版本 v6，SHA-256 {origin['sha256']}<br>" in card


def test_checksum_is_that_of_the_files_in_order_of_their_names(hub, tmp_path, capsys):
    save(make_rows(10), tmp_path / "set" / "b.jsonl")
    files = (tmp_path / "set" / name for name in ("b.jsonl", "rows.jsonl"))
    right = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    data.prepare("own/er", sha256=right.upper())
    assert f"\nSHA-256   {right}\n" in capsys.readouterr().out
    assert f"的 SHA-256 是 {right}，不是 --sha256 0123；" in ends(data.prepare, "own/er", sha256="0123")


def test_one_file_of_a_set_is_named_behind_it(hub, tmp_path, capsys):
    save(make_rows(9), tmp_path / "set" / "more.jsonl")
    for scheme in ("ms://", "hf://"):
        fetch("dataset", f"{scheme}own/er/rows.jsonl")
        assert f"{scheme}own/er/rows.jsonl（rows.jsonl）" in capsys.readouterr().out
    assert "里没有 .jsonl、" in ends(data.prepare, "ms://own/er/other.jsonl")


SPLIT = "- config_name: main\n  data_files:\n  - {split: train, path: %s}\n  - {split: %s, path: %s}\n"
ONE = "- config_name: %s\n  data_files: %s\n"
TWO = ONE % ("en", "b.jsonl") + ONE % ("zh", "a.jsonl")
CARDS = {  # what the card has, what is asked for behind the name, and whether b.jsonl is there to validate with
    "neutral names": (SPLIT % ("a.jsonl", "test", "b.jsonl"), "", True),
    "patterns": (SPLIT % ('"./[a].*"', "validation", '["no*", "**/b.*"]'), "", True),
    "in two splits": (
        (SPLIT % ("b.jsonl", "x", '"*.jsonl"')).replace("train", "test").replace("x,", "train,"),
        "",
        True,
    ),
    "a file of it": (SPLIT % ("a.jsonl", "test", "b.jsonl"), "/a.jsonl", False),
    "without splits": (ONE % ("main", "[a.jsonl, in/test.jsonl]"), "", True),
    "one by its name": (TWO, "/zh", False),
    "a default one": (TWO + "  default: true\n", "", False),
    "one of that name": (TWO.replace("zh", "default"), "", False),
    "a folder": (ONE % ("en", "b.jsonl") + "- config_name: zh\n  data_dir: in\n", "/zh", True),
}


def card_set(tmp_path: Path, card: str) -> None:
    """Let the set own/er be a.jsonl and b.jsonl, both in `in` under other names too, with these configs."""
    (tmp_path / "set/rows.jsonl").unlink()
    (tmp_path / "set/in").mkdir()
    for name, rows in (("a", make_rows(30)), ("b", make_rows(109, first=101))):
        save(rows, tmp_path / f"set/{name}.jsonl")
        save(rows, tmp_path / f"set/in/{'train' if name == 'a' else 'test'}.jsonl")
    (tmp_path / "set/README.md").write_text(f"---\nconfigs:\n{card}---\n# 数据\n", encoding="utf-8")


@pytest.mark.parametrize("scheme", ["ms://", "hf://"])
@pytest.mark.parametrize("card, asked, has_val", CARDS.values(), ids=CARDS)
def test_card_says_which_file_is_which(hub, tmp_path, card, asked, has_val, scheme):
    card_set(tmp_path, card)
    data.prepare(f"{scheme}own/er{asked}")
    train, val = map(partial(map, str), written())
    expected = (make_rows(30), make_rows(109, first=101)) if has_val else published(make_rows(30))
    assert tuple(map(sorted, (train, val))) == tuple(sorted(map(str, part)) for part in expected)


UNCLEAR = {
    TWO: "hf://own/er 有 2 个配置（en、zh）；请写明要哪一个，形如 --dataset hf://own/er/en",
    "a: b: c\n": "hf://own/er 的 README.md 写得不对（",
    SPLIT % ("a.jsonl", "test", "gone.jsonl"): "写得不对（里面的 gone.jsonl 不在 hub 上），",
    SPLIT % ("a.jsonl", "zh-test", "b.jsonl"): "写得不对（Expected data_files",
}


@pytest.mark.parametrize("card, said", UNCLEAR.items())
def test_card_that_leaves_it_open_is_refused(hub, tmp_path, card, said):
    card_set(tmp_path, card)
    assert said in ends(data.prepare, "hf://own/er") and not contents(Path())
    if card == TWO:
        assert said.partition(" 有")[2] in ends(data.prepare, "hf://own/er/xx")


@pytest.mark.parametrize("name", ["hf://", "hf://a", "HF://own/er", "https://huggingface.co/own/er", "hf://own/er/x"])
def test_address_that_is_no_name_is_told_the_right_form(name):
    assert "hf://owner/name" in ends(find_model, name)
    assert bool(parts_hub.split(name)) == name.endswith("x")


def test_folder_that_is_not_whole_is_named(folder):
    Path("Qwen/Qwen3-1.7B").mkdir(parents=True)
    assert "./Qwen/Qwen3-1.7B 是一个本地文件夹，但缺少 .safetensors" in ends(find_model, "Qwen/Qwen3-1.7B")


# ---- uploading, by the client's own commands ----------------------------------------------------------------------


UPLOADED = {"full": "Modelfile config.json generation_config.json model.safetensors"}
UPLOADED["lora"] = "adapter_config.json adapter_model.safetensors"


@pytest.mark.parametrize("trained", UPLOADED)
def test_the_readmes_two_commands_upload_a_model_and_nothing_else(finished, tmp_path_factory, trained):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^modelscope (?:create|upload) .+$", text, re.MULTILINE)
    uploaded = "README.md loss.png chat_template.jinja tokenizer.json tokenizer_config.json".split()
    uploaded += UPLOADED[trained].split()
    shutil.copytree(trained, data.OUTPUT_DIR)
    for name in ("optimizer.pt", "model.gguf", "replies.jsonl", "scores.json", "checkpoint-2/README.md"):
        Path(data.OUTPUT_DIR, name).write_bytes(b"not to be sent")
    with Hub() as server:
        server.inbox = tmp_path_factory.mktemp("inbox")
        env = server.env(tmp_path_factory.mktemp("home")) | {"MODELSCOPE_API_TOKEN": "ms-a-token"}
        for command in commands:
            words = [str(Path(sys.executable).with_name("modelscope")), *shlex.split(command)[1:]]
            ended = subprocess.run(words, env=env, capture_output=True, encoding="utf-8", timeout=120)
            assert ended.returncode == 0, ended.stdout + ended.stderr
    sent = {f"owner/name/{name}": Path(data.OUTPUT_DIR, name).read_bytes() for name in uploaded}
    assert contents(server.inbox) == sent
    assert server.made["owner/name"]["Visibility"] == 1  # private


@pytest.mark.parametrize("scheme", ["", "hf://"], ids=["modelscope", "huggingface"])
def test_what_was_uploaded_is_taken_back_by_its_name(hub, two_steps, tiny_model, tmp_path, scheme):
    """The adapter alone names its base, on its own hub, and its card the base's checksum."""
    adapter, full = f"{scheme}own/lora", f"{scheme}own/full"
    sent = "README.md chat_template.jinja tokenizer.json tokenizer_config.json"
    for kind, files in UPLOADED.items():
        (tmp_path / kind).mkdir()
        for file in f"{sent} {files}".split():
            shutil.copy(two_steps / kind / file, tmp_path / kind)
        hub.folders["models"][f"own/{kind}"] = tmp_path / kind
    config = tmp_path / "lora/adapter_config.json"
    config.write_text(config.read_text().replace(f'"{tiny_model}"', '"own/base"'))
    hub.folders["models"]["own/base"] = tiny_model
    for name, local in ((adapter, two_steps / "lora"), (full, two_steps / "full")):
        model, expected = weights.load_trained(name)[0], weights.load_trained(str(local))[0]
        assert same(model.state_dict(), expected.state_dict())
    assert train_lora.arguments(adapter=adapter, report_to="none").model_name == f"{scheme}own/base"
    assert find_model(full)
    assert f"{adapter} 是 LoRA 适配器，不是完整的模型；" in ends(find_model, adapter)
    assert f"--adapter {full} 不是 LoRA 适配器；" in ends(train_lora.arguments, adapter=full)
    hub.fault = LASTING["server error"][0]
    assert weights.find_trained(adapter).base == f"{scheme}own/base"
    hub.fault, hub.folders["models"]["own/base"] = None, tmp_path / "full"
    if not scheme:  # of the other hub the client has this commit already
        assert "的适配器不是在现在的 own/base 上训练的" in ends(weights.find_trained, adapter)


# ---- nothing that is loaded can run code --------------------------------------------------------------------------


SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("parts/**/*.py")])


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_load_no_code(source):
    """No pickle, no eval; remote code is refused at every from_pretrained of transformers' Auto classes."""
    unsafe = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "read_pickle"}
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
            assert not names & unsafe, ast.unparse(node)
        if isinstance(node, ast.Call):
            called, flags = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert called.split(".")[-1] not in unsafe and called not in ("eval", "exec"), ast.unparse(node)
            assert called != "torch.load" or flags.get("weights_only") == "True", ast.unparse(node)
            assert flags.get("trust_remote_code", "False") == "False", ast.unparse(node)
            assert flags.get("weights_only", "True") == "True", ast.unparse(node)
            if re.search(r"\.Auto\w+\.from_pretrained$", called):
                assert "trust_remote_code" in flags, ast.unparse(node)
            if re.search(r"\.AutoModel\w*\.from_pretrained$", called):
                assert flags.get("use_safetensors") == "True", ast.unparse(node)
