"""The environment of all tests, and their fixtures: the tiny model, its tokenizer, a working folder with data."""

import gc
import os
import shutil
import signal
import sys
from pathlib import Path

import hub_server
import pytest
from helpers import REAL, ROOT, SAMPLES, At, contents, crash, import_all, prepared, run, run_steps, says, weights

sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "demo"), str(ROOT / "tests" / "benchmarks")]
# Small tensors: threads cost more than they bring, and the sums stay in one order. No test needs a network.
os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", SWANLAB_MODE="local", MODELSCOPE_ENDPOINT="http://127.0.0.1:9"
)
# A shell that starts the tests in the background lets them ignore Ctrl-C, which some are about.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.update(hub_server.LIMITS)  # before the client's import, which reads them
for name in ("SWANLAB_PROJECT", "SWANLAB_API_KEY"):
    os.environ.pop(name, None)


def pytest_collection_modifyitems(items):
    """The longest files begin first: else one of them would be running alone at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_demo.py", "test_notebook.py", "test_processes.py"))


@pytest.fixture(scope="session", autouse=True)
def libraries():
    """Imported once, for all tests of this process."""
    import_all()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a two-layer Qwen3 of random weights and the tokenizer that was trained on the samples."""
    import tiny_model

    folder = tmp_path_factory.mktemp("tiny") / "base"
    tiny_model.build(folder, tiny_model.sample_texts(), hidden_size=64)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_model):
    from parts.model.weights import load_tokenizer

    return load_tokenizer(str(tiny_model))


@pytest.fixture(scope="session", params=["demo", "real"])
def any_tokenizer(request, tokenizer):
    """The demo's tokenizer, and Qwen3's own where it is at hand."""
    from parts.model.weights import load_tokenizer

    if request.param == "demo":
        return tokenizer
    if not REAL.is_dir():
        pytest.skip("the real tokenizer is not part of the project")
    return load_tokenizer(str(REAL / "qwen3-1.7b"))


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """An empty working folder with train.jsonl (108 rows) and val.jsonl (12 rows)."""
    import data

    monkeypatch.chdir(tmp_path)
    data.prepare(str(SAMPLES))
    return tmp_path


@pytest.fixture(scope="session")
def straight(tmp_path_factory, tiny_model):
    """straight(lora, **changes): the weights of a run that nothing touched, each made once."""
    known = {}

    def weights_of(lora: bool = False, **changes) -> dict:
        key = (lora, *sorted(changes.items()))
        if key not in known:
            with prepared(tmp_path_factory):
                run_steps(tiny_model, lora, output_dir="straight", **changes)
                known[key] = weights("straight")
        return known[key]

    return weights_of


@pytest.fixture(scope="session")
def cut_short(tmp_path_factory, tiny_model) -> Path:
    """A working folder with runs that ended after step 12 of 20, `full` and `lora`: checkpoint-10 is their best."""
    with prepared(tmp_path_factory) as folder:
        for lora, name in ((False, "full"), (True, "lora")):
            with pytest.raises(EOFError):
                run_steps(tiny_model, lora, [At(13, crash)], output_dir=name)
    return folder


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory, tiny_model) -> Path:
    """A working folder with finished runs of two steps, `full` and `lora`."""
    with prepared(tmp_path_factory) as folder:
        for lora, name in ((False, "full"), (True, "lora")):
            run(tiny_model, lora, max_steps=2, output_dir=name)
    return folder


@pytest.fixture
def interrupted(cut_short, folder) -> Path:
    """A working folder of its own with the runs that were cut short."""
    return shutil.copytree(cut_short, folder, dirs_exist_ok=True)


@pytest.fixture
def finished(two_steps, folder) -> Path:
    """A working folder of its own with the finished runs and the data."""
    return shutil.copytree(two_steps, folder, dirs_exist_ok=True)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fails(folder, monkeypatch):
    """Run data.py's command line in this process: it must end with one error and leave every file as it was."""

    import data

    def command(message: str, *flags: str) -> None:
        before = contents(folder)
        monkeypatch.setattr(sys, "argv", ["data.py", *flags])
        with pytest.raises(SystemExit) as ended:
            data.main()
        assert says(str(ended.value), message), ended.value
        assert contents(folder) == before  # and no draft is left behind

    return command


@pytest.fixture
def hub(tmp_path_factory):
    """A hub with one set under two names; its files are those in `.set`."""
    from hub_server import Hub

    import data

    folder = tmp_path_factory.mktemp("set")
    (folder / "README.md").write_text("# 说明", encoding="utf-8")
    with Hub(datasets={"owner/name": folder, data.DATASET_NAME: folder}) as server:
        server.set = folder
        yield server
