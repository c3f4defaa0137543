"""The real ModelScope client against a hub on loopback, whole and faulty: what recovers, what ends in one sentence, and
that nothing half-written is trusted by the next try."""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, contents, make_row, make_rows, published, run_script, save, written
from hub_server import FILE, LIMITS, LISTING, Hub, cut, drip, on, page, silence, status, without_sizes, wrong
from modelscope_hub.config import set_default_config

import data
import inference
import train
from parts import hub as parts_hub
from parts import huggingface, models, modelscope, rows

REMEDY = "请检查名称和网络后重试同一命令，或用环境变量 MODELSCOPE_ENDPOINT 换一个镜像，或"
FAILED = "错误：无法从 {url} 下载{what} own/er（{cause}）；" + REMEDY + "{remedy}。"
DATASET = {"what": "数据集", "remedy": "用 --dataset 指定本地文件"}
MODEL = {"what": "模型", "remedy": "用 --model_name 指定本地模型文件夹"}


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """What the hub has as the model own/er: weights in three files, and some that are not to be downloaded."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    models.load_weights(str(tiny_model), torch.device("cpu")).save_pretrained(folder, max_shard_size="500KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name in ("pytorch_model.bin", "ONNX/model.ONNX"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


@pytest.fixture
def hub(tmp_path, model, monkeypatch):
    """A hub with the data set and the model own/er; the client of this process asks it, with an empty cache."""
    (tmp_path / "set").mkdir()
    save(make_rows(40), tmp_path / "set" / "rows.jsonl")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with Hub({"own/er": model}, {"own/er": tmp_path / "set"}) as server:
        use(server, tmp_path / "home", monkeypatch)
        yield server
    set_default_config(None)


def use(hub: Hub, home: Path, monkeypatch) -> None:
    for name, value in hub.env(home).items():
        monkeypatch.setenv(name, value)
    set_default_config(None)  # the client keeps the address it was first given


def find_model(name: str, revision: str | None = None) -> str:
    """As train.py asks for a model."""
    return parts_hub.find_model(name, "用 --model_name 指定本地模型文件夹", revision)


def ends(run, *args, **kwargs) -> str:
    """What a call that cannot go on says."""
    with pytest.raises(SystemExit) as ended:
        run(*args, **kwargs)
    return str(ended.value)


def matches(text: str, expected: str) -> bool:
    """Whether text is as expected; ~ stands for words of the client, on one line."""
    return bool(re.fullmatch(".*".join(map(re.escape, expected.split("~"))), text))


def downloads(hub: Hub) -> list[str]:
    return [path for _, path in hub.requests if re.search(FILE, path)]


# ---- faults -------------------------------------------------------------------------------------------------------

RECOVERED = {
    "list 500 twice": on(LISTING, partial(status, 500), 2),
    "list silent once": on(LISTING, silence, 1),
    "file 500 twice": on(FILE, partial(status, 500), 2),
    "file 429 once": on(FILE, partial(status, 429), 1),
    "file cut short": on(FILE, cut, 1),
    "file with wrong bytes": on(FILE, wrong, 1),
    "file is a page once": on(FILE, page, 1),
    "list without sizes": on(LISTING, without_sizes),
    "list without sizes, file cut short": lambda handler: CUT_UNSIZED[0](handler) or CUT_UNSIZED[1](handler),
}
CUT_UNSIZED = on(LISTING, without_sizes), on(FILE, cut, 1)


@pytest.mark.parametrize("fault", RECOVERED.values(), ids=RECOVERED)
def test_data_arrives_in_spite_of(hub, fault):
    hub.fault = fault
    data.prepare("own/er")
    assert written() == published(make_rows(40))


BROKEN = "内容与文件列表不符"
LASTING = {  # fault, what is said of it
    "list 404": (on(LISTING, partial(status, 404)), "没有这个名称、版本或文件：~404~"),
    "list 403": (on(LISTING, partial(status, 403)), "没有权限：~403~"),
    "list 401": (on(LISTING, partial(status, 401)), "没有权限：~401~"),
    "list 500": (on(LISTING, partial(status, 500)), "服务器出错：~500~"),
    "list silent": (on(LISTING, silence), "超时：~"),
    "list dripping": (on(LISTING, drip), "超时：~"),
    "list is a page": (on(LISTING, page), "回应不是文件列表：~"),
    "list cut short": (on(LISTING, cut), "连接失败：~"),
    "file 404": (on(FILE, partial(status, 404)), "{file}：没有这个名称、版本或文件：~404~"),
    "file 403": (on(FILE, partial(status, 403)), "{file}：没有权限：~403~"),
    "file 500": (on(FILE, partial(status, 500)), "{file}：服务器出错：~500~"),
    "file cut short": (on(FILE, cut), "{file}：连接失败：~"),
    "file with wrong bytes": (on(FILE, wrong), "{file}：" + BROKEN + "：~Hash mismatch~"),
    "file is a page": (on(FILE, page), "{file}：" + BROKEN + "：~39 bytes~"),
    "file silent": (on(FILE, silence), "{file}：超时：~"),
    "file dripping": (on(FILE, drip), "{file}：连接失败：~B/s~"),
}


@pytest.mark.parametrize("fault, cause", LASTING.values(), ids=LASTING)
def test_data_download_gives_up_in_time_and_leaves_nothing(hub, tmp_path, fault, cause):
    hub.fault = fault
    started = time.monotonic()
    said = ends(data.prepare, "own/er")
    assert time.monotonic() - started < 20
    assert matches(said, FAILED.format(url=hub.url, cause=cause.format(file="rows.jsonl"), **DATASET)), said
    assert contents(tmp_path / "work") == {}
    hub.fault = None
    data.prepare("own/er")
    assert written() == published(make_rows(40))


MODEL_FAULTS = ("list 404", "list is a page", "file 500", "file cut short", "file with wrong bytes")


@pytest.mark.parametrize("name", MODEL_FAULTS)
def test_model_download_gives_up_in_time_and_the_next_try_is_whole(hub, model, name):
    hub.fault, cause = LASTING[name]
    started = time.monotonic()
    said = ends(find_model, "own/er")
    assert time.monotonic() - started < 30
    assert matches(said, FAILED.format(url=hub.url, cause=cause.format(file="~"), **MODEL)), said
    hub.fault = None
    folder = Path(find_model("own/er"))
    expected = {name: content for name, content in contents(model).items() if not name.lower().endswith(("bin", "x"))}
    assert contents(folder) == expected
    models.load_weights(str(folder), torch.device("cpu"))


def test_model_weights_in_other_forms_are_not_downloaded(hub):
    find_model("own/er")
    names = " ".join(downloads(hub))
    assert "model-00001-of" in names and "pytorch_model" not in names and "ONNX" not in names


@pytest.mark.parametrize("kind", ["dataset", "model"])
def test_connection_refused(hub, kind):
    hub.__exit__()
    run, expected = {"dataset": (data.prepare, DATASET), "model": (find_model, MODEL)}[kind]
    said = ends(run, "own/er")
    assert matches(said, FAILED.format(url=hub.url, cause="连接失败：~refused~", **expected)), said


def test_empty_list(hub, tmp_path):
    (tmp_path / "set" / "rows.jsonl").unlink()
    said = ends(data.prepare, "own/er")
    assert said == FAILED.format(url=hub.url, cause="文件列表是空的", **DATASET)


def test_failed_command_prints_the_sentence_alone(hub, tmp_path):
    hub.fault = on(LISTING, partial(status, 500))
    result = run_script("data.py", "--dataset", "own/er", cwd=tmp_path / "work", env=hub.env(tmp_path / "home"))
    assert result.returncode == 1
    cause = LASTING["list 500"][1]
    assert matches(result.stdout.rstrip("\n"), FAILED.format(url=hub.url, cause=cause, **DATASET)), result.stdout


def test_page_in_place_of_a_file_that_the_list_does_not_measure_is_named_by_the_set(hub):
    hub.fault = lambda handler: on(LISTING, without_sizes)(handler) or on(FILE, page)(handler)
    assert ends(data.prepare, "own/er") == (
        "错误：own/er/rows.jsonl 第 1 行不是合法的 JSON（Expecting value，第 1 列）；请修正这一行。"
    )


@pytest.mark.parametrize("kind", ["dataset", "model"])
@pytest.mark.parametrize(
    "path",
    ["../../escaped.jsonl", "{tmp}/escaped.jsonl", "sub/../../escaped.jsonl", "..\\escaped.jsonl", "C:escaped.csv"],
)
def test_list_that_leaves_the_folder_is_refused_before_anything_is_written(hub, tmp_path, kind, path):
    path = path.format(tmp=tmp_path)
    hub.outside = {path: b"escaped"}
    (tmp_path / "home/.modelscope/credentials").mkdir(parents=True)
    (tmp_path / "home/.modelscope/credentials/session").write_text("0" * 32)  # else the client makes one
    before = contents(tmp_path)
    run, expected = {"dataset": (data.prepare, DATASET), "model": (find_model, MODEL)}[kind]
    assert ends(run, "own/er") == FAILED.format(url=hub.url, cause=f"{path} 会写到文件夹之外，已拒绝", **expected)
    assert contents(tmp_path) == before and downloads(hub) == []


@pytest.mark.parametrize("path", ["..rows.jsonl", "a..b/rows..jsonl", "rows...jsonl"])
def test_dots_that_leave_no_folder_are_names(hub, tmp_path, path):
    (tmp_path / "set" / path).parent.mkdir(exist_ok=True)
    (tmp_path / "set" / "rows.jsonl").rename(tmp_path / "set" / path)
    data.prepare("own/er")
    assert written() == published(make_rows(40))


@pytest.mark.parametrize("revision", ["../..", "/tmp/x"])
def test_revision_that_leaves_the_cache_is_refused(hub, tmp_path, revision):
    said = ends(find_model, "own/er", revision=revision)
    assert said == FAILED.format(url=hub.url, cause=f"{revision} 会写到文件夹之外，已拒绝", **MODEL)
    assert downloads(hub) == []


def test_limits_reach_the_client_and_add_up_to_what_is_stated(tmp_path):
    code = (
        "from parts import hub, modelscope\ntry: hub.download('own/er', 'dataset', '', list)\nexcept SystemExit: pass\n"
        "from modelscope_hub import constants\n"
        "print({name: getattr(constants, name.removeprefix('MODELSCOPE_')) for name in modelscope.LIMITS"
        " if name != 'MODELSCOPE_DOWNLOAD_MAX_RETRIES'})\n"
        "attempts = constants.DOWNLOAD_RETRY_TIMES + 1\n"
        "silent = max(constants.DOWNLOAD_TIMEOUT, constants.DOWNLOAD_LOW_SPEED_WINDOW_SECONDS)\n"
        "print(constants.REPO_TREE_PAGE_MAX_ATTEMPTS * constants.REPO_TREE_PAGE_TIMEOUT_SECONDS + 1 + 2)\n"
        "print(attempts * silent + sum(2 ** n for n in range(1, attempts - 1)))\n"
    )
    env = {name: value for name, value in os.environ.items() if name not in LIMITS}
    env |= {"HOME": str(tmp_path), "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8")
    limits, listing, file = result.stdout.splitlines()
    expected = {name: int(value) for name, value in modelscope.LIMITS.items()}
    del expected["MODELSCOPE_DOWNLOAD_MAX_RETRIES"]
    assert ast.literal_eval(limits) == expected
    assert (int(listing), int(file)) == (48, 150)


# ---- what is in the cache -----------------------------------------------------------------------------------------


@pytest.fixture
def downloaded(hub, capsys) -> Path:
    """The model in the cache, and the hub gone."""
    folder = Path(find_model("own/er"))
    hub.__exit__()
    capsys.readouterr()
    return folder


@pytest.mark.parametrize("fault", ["refused", "list 500", "list is a page"])
def test_model_from_an_earlier_download_is_used_when_the_hub_is_not_there(hub, capsys, fault):
    folder = find_model("own/er")
    if fault == "refused":
        hub.__exit__()
    else:
        hub.fault = LASTING[fault][0]
    capsys.readouterr()
    assert find_model("own/er") == folder
    assert capsys.readouterr().out == f"提示：连不上 ModelScope，使用以前下载的模型 own/er：{folder}\n"
    models.load_weights(folder, torch.device("cpu"))


def test_model_that_the_hub_has_taken_back_is_not_used(hub):
    find_model("own/er")
    hub.fault = LASTING["list 404"][0]
    assert "没有这个名称" in ends(find_model, "own/er")


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "a weight file missing": lambda folder: next(folder.glob("model-00002-*")).unlink(),
    "a weight file a byte short": lambda folder: shorten(next(folder.glob("model-00002-*"))),
    "a weight file empty": lambda folder: next(folder.glob("model-00001-*")).write_bytes(b""),
    "index missing": lambda folder: (folder / "model.safetensors.index.json").unlink(),
    "index cut": lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_'),
    "index a list": lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
    "configuration missing": lambda folder: (folder / "config.json").unlink(),
    "generation settings empty": lambda folder: (folder / "generation_config.json").write_bytes(b""),
    "tokenizer missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "a file half downloaded": lambda folder: (folder / "README.md.incomplete").write_bytes(b"#"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_model_that_is_not_whole_in_the_cache_is_not_used(hub, downloaded, damage):
    assert parts_hub.find_downloaded("own/er", None) == downloaded
    damage(downloaded)
    assert parts_hub.find_downloaded("own/er", None) is None


def test_model_half_downloaded_is_not_used(hub, model):
    hub.fault = on("FilePath=model-00002", partial(status, 403))
    ends(find_model, "own/er")
    hub.__exit__()
    said = ends(find_model, "own/er")
    assert matches(said, FAILED.format(url=hub.url, cause="连接失败：~", **MODEL)), said


def test_model_in_the_cache_serves_its_own_revision_only(hub, downloaded):
    assert "连接失败" in ends(find_model, "own/er", revision="v1")
    shutil.move(downloaded, downloaded.parent / "v1")
    assert parts_hub.find_downloaded("own/er", "v1") == downloaded.parent / "v1"
    assert parts_hub.find_downloaded("own/er", None) is None


def test_model_in_an_older_clients_folder_serves_no_pinned_revision(hub, downloaded, tmp_path):
    folder = tmp_path / "home" / "cache" / "models" / "own" / "er"
    shutil.move(downloaded, folder)
    assert parts_hub.find_downloaded("own/er", None) == folder
    assert parts_hub.find_downloaded("own/er", "v1") is None


# ---- revision, checksum, several files ----------------------------------------------------------------------------


def test_revision_is_what_is_asked_for(hub, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data.py", "--dataset", "own/er", "--revision", "v1.2"])
    data.main()
    assert find_model("own/er", revision="v1.2").endswith("snapshots/v1.2")
    asked = [path for _, path in hub.requests if "Revision=" in path]
    assert len(asked) > 10 and all("Revision=v1.2" in path for path in asked)


def test_inference_asks_for_its_revision(hub, monkeypatch, capsys):
    flags = ["inference.py", "--model_path", "own/er", "--revision", "v3", "--max_new_tokens", "2", "头痛？"]
    monkeypatch.setattr(sys, "argv", flags)
    inference.main()
    assert "【问题】头痛？" in capsys.readouterr().out and "Revision=v3" in hub.requests[0][1]


def test_revision_of_what_is_no_repository():
    flags = {"dataset": "here.jsonl", "revision": "v1"}
    assert ends(data.prepare, **flags) == ("错误：--revision v1 只用于 hub 上的数据集，而 here.jsonl 是本地文件。")
    said = "错误：版本 v1 只用于 hub 上的模型，而 . 是本地文件夹。"
    assert ends(find_model, ".", revision="v1") == said == ends(models.load_trained, ".", "v1")


@pytest.mark.parametrize("source", ["own/er", "local.jsonl"])
def test_checksum_is_that_of_the_files_in_order_of_their_names(hub, tmp_path, monkeypatch, capsys, source):
    save(make_rows(10), tmp_path / "set" / "b.jsonl")
    save(make_rows(20), "local.jsonl", b"\xef\xbb\xbf")
    paths = [tmp_path / "set" / name for name in ("b.jsonl", "rows.jsonl")] if "/" in source else ["local.jsonl"]
    right = hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()
    monkeypatch.setattr(sys, "argv", ["data.py", "--dataset", source, "--sha256", right.upper()])
    data.main()
    assert f"\nSHA-256   {right}\n" in capsys.readouterr().out
    wrong = right.replace(right[5], "0" if right[5] != "0" else "1")
    Path("train.jsonl").unlink()
    assert ends(data.prepare, source, sha256=wrong) == (
        f"错误：{source} 的 SHA-256 是 {right}，不是 --sha256 {wrong}；数据已变，请核对来源，或去掉 --sha256。"
    )
    assert not Path("train.jsonl").exists()


def test_problems_name_the_file_when_there_are_several(hub, tmp_path, capsys):
    (tmp_path / "set" / "more").mkdir()
    bad = [row | ({"answer": ""} if i in (2, 4) else {}) for i, row in enumerate(make_rows(60, first=41), 1)]
    save([bad[0] | {"answer": ""}, *bad[1:], make_row(7)], tmp_path / "set" / "more" / "b.JSONL")
    data.prepare("own/er")
    out = capsys.readouterr().out
    assert out.startswith("数据来源  own/er（more/b.JSONL、rows.jsonl）：共 61 行\n")
    assert "\n未采用    answer 为空：3 行（more/b.JSONL 第 1 行、more/b.JSONL 第 2 行、more/b.JSONL 第 4 行）\n" in out
    assert re.search(r"\n未采用    .+：1 行（(rows|more/b).(jsonl|JSONL) 第 (7|61) 行）\n", out)


def test_first_places_of_many_are_named():
    places = [("b.csv", 1), ("a.csv", 20), ("a.csv", 3), ("c.csv", 1)]
    assert rows.describe_problems({"x": places}, most=3) == [
        "x：4 行（a.csv 第 3 行、a.csv 第 20 行、b.csv 第 1 行 等）"
    ]


@pytest.mark.parametrize("name", ["DATA.JSONL", "Data.Json", "DATA.CSV", "data.PARQUET"])
def test_data_files_in_capitals_are_taken(hub, tmp_path, name):
    (tmp_path / "set" / "rows.jsonl").unlink()
    save(make_rows(40), tmp_path / "set" / name)
    data.prepare("own/er")
    assert written() == published(make_rows(40))


def test_card_names_revision_and_data(hub, tiny_model):
    data.prepare("own/er", revision="v6")
    changes = {"model_name": "own/er", "model_revision": "v7", "output_dir": "out", "max_steps": 1, "sample_tokens": 2}
    parts = sorted(Path(find_model("own/er", revision="v7")).glob("*.safetensors"))
    weights = hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()
    with pytest.raises(SystemExit, match=f"own/er 的权重的 SHA-256 是 {weights}，不是 --model_sha256 0123；"):
        train.train(train.TrainArguments(report_to="none", model_sha256="0123", **changes))
    train.train(train.TrainArguments(report_to="none", model_sha256=weights, **changes))
    card = Path("out/README.md").read_text(encoding="utf-8")
    checksum = hashlib.sha256(Path("train.jsonl").read_bytes()).hexdigest()
    assert "\n| 基础模型的版本 | v7 |\n" in card and f"\n| train.jsonl 的 SHA-256 | {checksum} |\n" in card
    assert f"\n| 基础权重的 SHA-256 | {weights} |\n" in card
    [origin] = data.read_origin("train.jsonl")["sources"]
    assert f"\n| 数据 | {origin['source']}，版本 v6，SHA-256 {origin['sha256']}<br>" in card
    Path("train.jsonl").write_text(Path("train.jsonl").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert list(data.read_origin("train.jsonl")) == ["train_sha256"]
    assert all("Revision=v7" in path for _, path in hub.requests if "/models/" in path)


def test_adapter_asks_for_the_revision_that_it_was_made_for(hub, tmp_path):
    settings = {"base_model_name_or_path": "own/er", "revision": "v8"}
    Path("adapter_config.json").write_text(json.dumps(settings))
    assert "无法装到 own/er 上（缺少 adapter_model.safetensors）" in ends(models.load_trained, ".")
    assert all("Revision=v8" in path for _, path in hub.requests if "/models/" in path)


# ---- Hugging Face -------------------------------------------------------------------------------------------------


@pytest.fixture
def hf(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return hub


HF_LIST, HF_FILE = r"/api/(models|datasets)/", "/resolve/"


def test_huggingface_model_and_data_arrive_and_the_model_is_used_again(hf, model, capsys):
    folder = Path(find_model("hf://own/er"))
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {k: v for k, v in contents(model).items() if not k.lower().endswith(("bin", "x"))}
    data.prepare("hf://own/er/rows.jsonl", revision="v2")
    assert written() == published(make_rows(40))
    assert any("/revision/v2" in path for _, path in hf.requests)
    hf.__exit__()
    assert find_model("hf://own/er") == str(folder) and "连不上 Hugging Face" in capsys.readouterr().out
    assert parts_hub.find_downloaded("hf://own/er", "v1") is None


@pytest.mark.parametrize(
    "place, fault, cause",
    [
        (HF_LIST, partial(status, 404), "没有这个名称"),
        (HF_LIST, partial(status, 401), "没有权限"),
        (HF_LIST, partial(status, 403), "没有权限"),
        (HF_LIST, partial(status, 429), "请求太多"),
        (HF_LIST, partial(status, 503), "服务器出错"),
        (HF_FILE, wrong, "内容与文件列表不符"),
        (HF_LIST, drip, "超时"),
    ],
)
def test_huggingface_failure_is_one_sentence_and_leaves_nothing(hf, tmp_path, monkeypatch, place, fault, cause):
    monkeypatch.setattr(huggingface, "WINDOW", 1)
    hf.fault = on(place, fault)
    for kind in ("model", "dataset"):
        said = ends(*((find_model, "hf://own/er") if kind == "model" else (data.prepare, "hf://own/er")))
        assert said.startswith(f"错误：无法从 {hf.url} 下载") and cause in said and "HF_ENDPOINT" in said
    assert contents(tmp_path / "work") == {} and parts_hub.find_downloaded("hf://own/er", None) is None


def test_file_that_could_not_be_fetched_is_not_called_missing():
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    assert parts_hub.describe_error(LocalEntryNotFoundError("x")) == "连接失败或服务器出错：x"
    assert parts_hub.describe_error(EntryNotFoundError("x")) == "没有这个名称、版本或文件：x"


def test_one_file_of_a_set_is_named_behind_it(hub, capsys):
    data.prepare("ms://own/er/rows.jsonl")
    assert written() == published(make_rows(40)) and "ms://own/er/rows.jsonl（rows.jsonl）" in capsys.readouterr().out
    assert "里没有 .jsonl、" in ends(data.prepare, "ms://own/er/other.jsonl")


def test_huggingface_list_that_leaves_the_folder_is_refused(hf):
    hf.outside = {"../../escaped.jsonl": b"x"}
    assert "会写到文件夹之外" in ends(find_model, "hf://own/er")


@pytest.mark.parametrize("name", ["hf://", "hf://a", "HF://own/er", "https://huggingface.co/own/er", "hf://own/er/x"])
def test_address_that_is_no_name_is_told_the_right_form(name):
    assert "hf://owner/name" in ends(find_model, name) or name.endswith("x")
    assert parts_hub.is_name(name) == name.endswith("x")


def test_folder_that_is_not_whole_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("Qwen/Qwen3-1.7B").mkdir(parents=True)
    Path("Qwen/Qwen3-1.7B/config.json").write_text("{}")
    assert "./Qwen/Qwen3-1.7B 是这里的一个文件夹，但不完整" in ends(find_model, "Qwen/Qwen3-1.7B")


# ---- nothing that is loaded can run code --------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted([*ROOT.glob("*.py"), *ROOT.glob("parts/*.py")]), ids=lambda path: path.name)
def test_scripts_load_no_code(script):
    """No pickle, no eval; remote code is refused at every from_pretrained of transformers' Auto classes."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    unsafe = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "read_pickle"}
    for node in ast.walk(tree):
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
