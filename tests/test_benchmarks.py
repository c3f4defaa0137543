"""Each benchmark starts and fills its table; what it says of speed is not looked at here."""

import subprocess
import sys

import pytest
from conftest import ROOT

FOLDER = ROOT / "tests" / "benchmarks"


def table(script: str, *flags: str) -> list[list[str]]:
    """The cells of the rows that a benchmark prints, the head left out."""
    command = [sys.executable, str(FOLDER / script), *flags]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    assert rows[1:], result.stderr
    return rows[2:]


def test_train_speed():
    arms = ["published recipe", "full", "LoRA"]
    rows = table("train_speed.py", *"--small --steps 1 --warmup 0 --rounds 1 --arms".split(), *arms)
    assert [row[0] for row in rows] == arms
    losses = [float(row[-1]) for row in rows]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)  # the same examples, the same mathematics


def test_decode_speed():
    arms = ["generate, 1 question", "ours, 1 question"]
    rows = table("decode_speed.py", *"--small --rounds 1 --tokens 4 --arms".split(), *arms)
    assert [row[0] for row in rows] == arms and all(float(row[1]) > 0 for row in rows)


def test_memory_budget_runs_under_a_cap():
    [row] = table("memory_budget.py", *"--small --steps 1 --caps 4 --kinds LoRA".split())
    assert row[:2] == ["4", "LoRA"] and float(row[2]) > 0 and row[-1].endswith("optim")


def test_memory_budget_plans_for_cards_that_are_not_here():
    rows = table("memory_budget.py", "--plans", "--caps", "4", "12")
    fits = {(cap, kind): fit for cap, kind, fit, *_ in rows}
    assert fits == {
        ("4", "full"): "no",
        ("4", "LoRA"): "no",
        ("4", "QLoRA"): "yes",
        ("12", "full"): "yes",
        ("12", "LoRA"): "yes",
        ("12", "QLoRA"): "yes",
    }


def test_data_speed():
    [row] = table("data_speed.py", "--rows", "200")
    assert row[0] == "200"
