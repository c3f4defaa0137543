"""Mistakes, encodings, Ctrl-C, broken pipes and a full memory, as a person at the terminal meets them."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, run_script

from parts import terminal


def test_out_of_memory_of_any_device_is_recognised():
    with pytest.raises(SystemExit, match="显存（内存）不足"), terminal.explain_out_of_memory("显存（内存）不足"):
        torch.empty(2**60)
    others = ("CUDA out of memory. Tried to", "MPS backend out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
    assert all(terminal.is_out_of_memory(RuntimeError(message)) for message in others)
    with pytest.raises(RuntimeError, match="shape"), terminal.explain_out_of_memory("显存（内存）不足"):
        raise RuntimeError("shape mismatch")


def run_main(body: str, **env: str) -> tuple[int, str, str]:
    """The exit status and the two outputs of a script whose main is `body`."""
    command = [sys.executable, "-c", f"from parts.terminal import run_main\ndef main():\n    {body}\nrun_main(main)"]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, encoding="utf-8")
    return ended.returncode, ended.stdout, ended.stderr


def test_a_script_ends_without_a_traceback_and_of_several_processes_only_the_first_speaks():
    assert run_main("raise KeyboardInterrupt") == (130, "", "\n已中断。\n")
    assert run_main("raise BrokenPipeError") == (141, "", "")
    assert run_main("open('/proc/none/x', 'w')") == (
        1,
        "",
        "错误：[Errno 2] No such file or directory: '/proc/none/x'\n",
    )
    status, _, said = run_main("from os import nothing")
    assert status == 1 and said.startswith("错误：载入 <string> 时出错（ImportError：") and said.count("\n") == 1
    assert run_main("raise SystemExit('\\x1b[2J')") == (1, "", "[U+001B][2J\n")  # what a file holds moves no cursor
    assert run_main("print('头痛')", PYTHONIOENCODING="ascii") == (0, "??\n", "")
    both = [run_main("print('so'); raise SystemExit('错误：so')", RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    assert both == [(1, "so\n", "错误：so\n"), (1, "", "（进程 1）错误：so\n")]


def test_a_reply_on_a_terminal_of_another_encoding(finished):
    flags = ("--model_path", "full", "♥ 头痛？", "--max_new_tokens", "5")
    result = run_script("inference.py", *flags, cwd=finished, encoding="gbk")
    assert result.returncode == 0 and "【问题】? 头痛？" in result.stdout, result.stdout
