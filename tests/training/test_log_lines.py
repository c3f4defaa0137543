"""Each log is one line that fits a terminal."""

import re

import pytest
import rich.cells
import transformers
from helpers import run

from parts.training import log_lines

EVALUATION = {"loss": 1.1234, "token_loss": 1.1234, "think_loss": 1.1234, "answer_loss": 1.1234, "runtime": 123.4}
LONGEST = [
    {"loss": 1.1234, "grad_norm": 12.34, "learning_rate": 9.88e-5, "tokens_per_second": 4e4, "peak_memory_gb": 12.34},
    {f"eval_{name}": value for name, value in EVALUATION.items()},
]


@pytest.mark.parametrize("bar", [True, False], ids=["bar", "no bar"])
def test_each_log_is_one_line_that_fits_a_terminal(workspace, tiny_model, bar, capsys):
    run(tiny_model, max_steps=2, logging_steps=1, eval_steps=2, disable_tqdm=not bar)
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("第 ")]
    assert [re.match(r"第 (\d) 步  (loss|评估 eval_loss|训练用时) ", line).groups() for line in lines] == [
        ("1", "loss"),
        ("2", "loss"),
        ("2", "评估 eval_loss"),
        ("2", "训练用时"),
    ]
    assert "{'loss'" not in out and ("2/2" in err) == bar


@pytest.mark.parametrize("logs", LONGEST)
def test_the_longest_lines_fit_too(logs, capsys):
    log_lines.LogLines().on_log(None, transformers.TrainerState(global_step=1000), None, logs)
    line = capsys.readouterr().out.rstrip()
    assert line.startswith("第 1000 步  ") and rich.cells.cell_len(line) <= 80, line
