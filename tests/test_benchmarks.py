"""Each benchmark runs its arms and fills its table; what it says of speed is not looked at here."""

import subprocess
import sys

import decode_speed
import memory_budget
import pytest
import train_speed
from helpers import ROOT


def table(script: str, *flags: str) -> list[list[str]]:
    """The cells of the rows that a benchmark prints, in a process of its own, the head left out."""
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / script), *flags]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    assert rows[1:], result.stderr
    return rows[2:]


def test_train_speed():
    """The same examples, the same mathematics: the same loss."""
    found = [train_speed.run_arm(arm, small=True, steps=1, warmup=0) for arm in ("published recipe", "full", "LoRA")]
    assert [arm["loss"] for arm in found] == pytest.approx([found[0]["loss"]] * 3, rel=1e-3)
    assert all(arm["seconds"] > 0 and arm["tokens"] > arm["supervised"] > 0 for arm in found)


def test_decode_speed(monkeypatch, capsys):
    """With its table; the arms run in this process."""

    def in_turn(commands, rounds):
        return {name: [decode_speed.run_arm(name, small=True, tokens=4)] * rounds for name in commands}

    arms = ["generate, 1 question", "ours, 1 question"]
    monkeypatch.setattr(decode_speed, "in_turn", in_turn)
    monkeypatch.setattr(sys, "argv", ["decode_speed.py", "--small", "--tokens", "4", "--arms", *arms])
    decode_speed.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == arms and all(float(row[1]) > 0 for row in rows)


def test_memory_budget_runs_under_a_cap():
    found = memory_budget.run_one("LoRA", cap=4, small=True, steps=1)
    assert found["tokens_per_second"] > 0 and 0 < found["estimate_gb"] < 4 and found["plan"].endswith("optim")


def test_memory_budget_plans_for_cards_that_are_not_here(capsys):
    for cap in (4.0, 12.0):
        memory_budget.plan_only(cap)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
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


def test_a_whole_table_comes_from_processes_of_its_own():
    [row] = table("train_speed.py", *"--small --steps 1 --warmup 0 --rounds 1 --arms LoRA".split())
    assert row[0] == "LoRA" and float(row[-1]) > 0
