"""Each benchmark runs its arms and fills its table; what it says of speed is not looked at here."""

import json
import subprocess
import sys
from pathlib import Path

import decode_speed
import defaults
import memory_budget
import pytest
import saving
import train_speed
from helpers import ROOT, make_row, save


def cells(output: str) -> list[list[str]]:
    """The cells of the rows that a benchmark printed, the head included."""
    return [line[2:-2].split(" | ") for line in output.splitlines() if line.startswith("| ")]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Examples of a few tokens: the vocabulary is Qwen3's, and a CPU is slow."""
    monkeypatch.setattr(train_speed, "LENGTHS", [90, 150])
    monkeypatch.setattr(memory_budget, "WORST", {name: ids[:200] for name, ids in memory_budget.WORST.items()})


@pytest.fixture
def table_of(monkeypatch, capsys):
    """What a benchmark prints when its arms run in this process, the head left out."""

    def fill(module, run_arm, *flags: str) -> list[list[str]]:
        monkeypatch.setattr(module, "in_turn", lambda arms, rounds: {name: [run_arm(name)] * rounds for name in arms})
        monkeypatch.setattr(sys, "argv", [module.__name__, "--small", *flags])
        module.main()
        return cells(capsys.readouterr().out)[2:]

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


def test_memory_budget_runs_under_a_cap():
    found = memory_budget.run_one("LoRA", cap=4, small=True, steps=1)
    assert found["tokens_per_second"] > 0 and 0 < found["estimate_gb"] < 4 and found["plan"].endswith("adamw")


def test_saving(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["saving", "--small", "--save_steps", "10"])
    saving.main()
    [*_, [size, written, waited, _, share]] = cells(capsys.readouterr().out)
    assert float(written) > 0 and float(waited) > 0 and float(share.rstrip("%")) > 0, size


def test_data_speed():
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "data_speed.py", "--rows", "200"]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 0 and cells(result.stdout)[-1][0] == "200", result.stderr


def test_defaults(folder, monkeypatch, capsys):
    """The two texts are learnt apart, and every arm has its line."""
    rows = [make_row(i, think=f"答案里已经提到了休息。思考{i}的要点是多喝水，也要按时睡觉。" * 2) for i in range(20)]
    monkeypatch.setattr(sys, "argv", ["defaults", "--small", "--data", save(rows, "rows.jsonl"), "--json", "out.json"])
    defaults.main()
    rows = {name: row for name, *row in cells(capsys.readouterr().out)}
    assert rows["explicit"][:2] == ["100%", "0%"]
    one, two, lora = (float(rows[f"{defaults.RATES[0]:g}"][place].split()[0]) for place in (0, 1, 3))
    assert one == two > 0 and lora > 0  # --small: as many steps for both
    assert len(json.loads(Path("out.json").read_text())["rows"]) == 6 * 3 + 5  # kinds, and one rate
