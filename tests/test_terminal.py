"""Mistakes, encodings, Ctrl-C, broken pipes and a full memory, as a person at the terminal meets them."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, make_rows, run_script, save

from parts import terminal


def test_out_of_memory_of_any_device_is_recognised():
    with pytest.raises(SystemExit, match="显存（内存）不足"), terminal.explain_out_of_memory("显存（内存）不足"):
        torch.empty(2**60)
    others = ("CUDA out of memory. Tried to", "MPS backend out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
    assert all(terminal.is_out_of_memory(RuntimeError(message)) for message in others)
    with pytest.raises(RuntimeError, match="shape"), terminal.explain_out_of_memory("显存（内存）不足"):
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(KeyboardInterrupt, 130, "\n已中断。\n"), (BrokenPipeError, 141, ""), (None, 0, "")],
    ids=["Ctrl-C", "| head", "all well"],
)
def test_a_script_ends_without_a_traceback(error, status, said, tmp_path):
    code = f"from parts.terminal import run_main\ndef main():\n    {f'raise {error.__name__}' if error else 'pass'}\n"
    result = subprocess.run([sys.executable, "-c", f"{code}run_main(main)"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (status, "", said)


def test_of_several_processes_only_the_first_speaks():
    code = "from parts.terminal import run_main\ndef main():\n    print('so')\n"
    code += "    raise SystemExit('错误：so')\nrun_main(main)"
    said = []
    for rank in ("0", "1"):
        env = os.environ | {"RANK": rank, "LOCAL_RANK": rank}
        ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        said.append((ended.returncode, ended.stdout, ended.stderr))
    assert said == [(1, "so\n", "错误：so\n"), (1, "", "（进程 1）错误：so\n")]


@pytest.mark.parametrize("encoding", ["gbk", "ascii"])
def test_terminals_of_other_encodings(tmp_path, encoding):
    save([row | {"answer": "♥"} for row in make_rows(20)], tmp_path / "rows.jsonl")
    env = {"PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, ROOT / "data.py", "--dataset", "rows.jsonl"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
    assert result.returncode == 0 and b"?" in result.stdout, result.stderr


def test_a_reply_on_a_terminal_of_another_encoding(finished):
    flags = ("--model_path", "full", "♥ 头痛？", "--max_new_tokens", "5")
    result = run_script("inference.py", *flags, cwd=finished, encoding="gbk")
    assert result.returncode == 0 and "【问题】? 头痛？" in result.stdout, result.stdout
