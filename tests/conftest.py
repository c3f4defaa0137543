"""What several tests share: the tiny model, the sample data, and a way to run a script as a person would."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import hub
import pytest

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real"  # the real tokenizer and rows, where a checkout has them
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "demo")]
# Small tensors: threads cost more than they bring, and the sums stay in one order. No test needs a network.
os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", SWANLAB_MODE="local", MODELSCOPE_ENDPOINT="http://127.0.0.1:9"
)
# A shell that starts the tests in the background lets them ignore Ctrl-C, which some are about.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.update(hub.LIMITS)  # before the client's import, which reads them
for name in ("SWANLAB_PROJECT", "SWANLAB_API_KEY"):
    os.environ.pop(name, None)

SAMPLES = ROOT / "tests" / "demo" / "medical.jsonl"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a two-layer Qwen3 of random weights and the tokenizer that was trained on the samples."""
    import tiny_model

    folder = tmp_path_factory.mktemp("tiny") / "base"
    tiny_model.build(folder, tiny_model.sample_texts(), hidden_size=64)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_model):
    import inference

    return inference.load_tokenizer(str(tiny_model))


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """An empty working folder with train.jsonl (108 rows) and val.jsonl (12 rows)."""
    import data

    monkeypatch.chdir(tmp_path)
    data.prepare(str(SAMPLES))
    return tmp_path


def run_script(script: str, *flags: str, cwd: Path, env: dict[str, str] | None = None, stdin: str | None = None):
    """Run a script of the project in `cwd`; its output, standard error included, is in `.stdout`."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=cwd,
        env=(env or os.environ) | {"PYTHONUTF8": "1"},
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=300,
    )
