"""Each benchmark runs its arms and fills its table; what it says of speed is not looked at here."""

import json
import subprocess
import sys
from pathlib import Path

import decode_speed
import defaults
import memory_budget
import numpy as np
import pytest
import train_speed
from helpers import ROOT, make_row, save


def table(script: str, *flags: str) -> list[list[str]]:
    """The cells of the rows that a benchmark prints, in a process of its own, the head left out."""
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / script), *flags]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    assert rows[1:], result.stderr
    return rows[2:]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Examples of a few tokens: the vocabulary is Qwen3's, and a CPU is slow."""
    monkeypatch.setattr(train_speed, "LENGTHS", [90, 150])
    monkeypatch.setattr(memory_budget, "WORST", {name: ids[:200] for name, ids in memory_budget.WORST.items()})


@pytest.fixture
def table_of(monkeypatch, capsys):
    """The cells of the rows that a benchmark prints when its arms run in this process, the head left out."""

    def fill(module, run_arm, *flags: str) -> list[list[str]]:
        monkeypatch.setattr(module, "in_turn", lambda arms, rounds: {name: [run_arm(name)] * rounds for name in arms})
        monkeypatch.setattr(sys, "argv", [module.__name__, "--small", *flags])
        module.main()
        lines = capsys.readouterr().out.splitlines()
        return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]

    return fill


def test_train_speed(table_of):
    """The same examples, the same mathematics: the same loss."""
    arms = ["published recipe", "LoRA"]
    rows = table_of(train_speed, lambda arm: train_speed.run_arm(arm, True, 1, 0), "--arms", *arms)
    assert [row[0] for row in rows] == arms and all(float(row[3].replace(",", "")) > 0 for row in rows)
    assert float(rows[0][-1]) == pytest.approx(float(rows[1][-1]), rel=1e-3)


def test_decode_speed(table_of):
    arms = ["generate, 1 question", "ours, 1 question"]
    rows = table_of(decode_speed, lambda arm: decode_speed.run_arm(arm, True, 4), "--tokens", "4", "--arms", *arms)
    assert [row[0] for row in rows] == arms and all(float(row[1]) > 0 for row in rows)


def test_arms_run_in_turn_in_processes_of_their_own(capsys):
    commands = {name: [sys.executable, "-c", code] for name, code in {"a": "print('{\"x\": 1}')", "b": "1 / 0"}.items()}
    found = train_speed.in_turn(commands, rounds=2)
    assert list(found) == ["a"] and [run["x"] for run in found["a"]] == [1, 1] and found["a"][0]["wall"] > 0
    assert capsys.readouterr().err.count("b: left out") == 2


def test_memory_budget_runs_under_a_cap():
    found = memory_budget.run_one("LoRA", cap=4, small=True, steps=1)
    assert found["tokens_per_second"] > 0 and 0 < found["estimate_gb"] < 4 and found["plan"].endswith("adamw")


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


def test_defaults(folder, monkeypatch, capsys):
    """The two texts are learnt apart, and every arm has its line."""
    rows = [make_row(i, think=f"答案里已经提到了休息。思考{i}的要点是多喝水，按时睡觉。" * 2) for i in range(20)]
    monkeypatch.setattr(sys, "argv", ["defaults", "--small", "--data", save(rows, "rows.jsonl"), "--json", "out.json"])
    defaults.main()
    printed = capsys.readouterr().out.splitlines()
    cells = {line[2:-2].split(" | ")[0]: line[2:-2].split(" | ")[1:] for line in printed if line.startswith("| ")}
    assert cells["explicit"][:2] == ["100%", "0%"]
    one, two, lora = (float(cells[f"{defaults.RATES[0]:g}"][place].split()[0]) for place in (0, 1, 3))
    assert one == two > 0 and lora > 0  # --small: as many steps for both
    assert len(json.loads(Path("out.json").read_text())["rows"]) == 6 * 3 + 5  # kinds, and one rate


def test_intervals_hold_what_seeds_and_rows_make_of_it():
    values = np.arange(40.0).reshape(4, 10)  # rows differ by 9 at most, seeds by 30
    mean, low, high = defaults.interval(values)
    assert mean == 19.5 and 0 < low < 10 and 30 < high < 39
    assert defaults.interval(np.ones((3, 5))) == [1, 1, 1]
