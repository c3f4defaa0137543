"""The whole path: the demo as a new user runs it, what it asks, and real rows with the real tokenizer, if at hand."""

import subprocess
import sys

import pytest
from helpers import REAL, SAMPLES, run_script

import data


def test_demo_ends_with_replies_that_think(tmp_path):
    result = run_script("tests/demo/demo.py", cwd=tmp_path, fresh=True)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("【思考】\n") >= 2 and "演示完成" in result.stdout
    assert "没有训练过的 12 种问法，答对 1" in result.stdout  # else the demo would have failed
    for command in ("data.py", "train.py", "inference.py", "train_lora.py", "inference_lora.py"):
        assert f"$ python {command}" in result.stdout


def test_each_question_that_the_demo_asks_is_of_another_topic_with_three_trained_wordings(workspace):
    """Whose answers are the same. The split is data.py's: where the rows stand in their file decides it."""
    trained, asked = ([row["answer"] for row in data.read_examples(file)] for file in ("train.jsonl", "val.jsonl"))
    assert len(set(asked)) == len(asked) == 12 and {trained.count(answer) for answer in asked} == {3}
    assert len({row["question"] for row in data.read_examples(SAMPLES)}) == 4 * len({*trained, *asked}) == 120


@pytest.mark.skipif(not REAL.is_dir(), reason="the real rows and tokenizer are not part of the project")
def test_the_path_runs_on_real_rows_with_the_real_tokenizer(tmp_path):
    """On the twelve shortest rows: with a vocabulary of 151,936 a CPU is slow."""
    subprocess.run([sys.executable, REAL / "build_model.py", tmp_path / "real"], check=True)
    rows = sorted((REAL / "medical_r1_120.jsonl").read_text(encoding="utf-8").splitlines(), key=len)[:12]
    (tmp_path / "short.jsonl").write_text("\n".join(rows), encoding="utf-8")
    one_step = ("--model_name", "real", "--max_steps", "1", "--sample_tokens", "8", "--report_to", "none")
    for command in (
        ("data.py", "--dataset", "short.jsonl"),
        ("train.py", *one_step),
        ("inference.py", "--max_new_tokens", "8"),
    ):
        result = run_script(*command, cwd=tmp_path)
        assert result.returncode == 0, result.stdout
