"""SIGTERM, Ctrl-C and a terminal that closes: noted once, given back, and an exit code at the end."""

import os
import pty
import signal
import sys
import time
from pathlib import Path

import pytest

from parts.run.interruption import Interruption


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGXCPU, 152)])
def test_a_signal_is_noted_and_ends_with_its_status(number, status, capfd):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end, Interruption() as interruption:
        assert not interruption.requested()
        signal.raise_signal(number)
        assert interruption.requested()
        interruption.acted = True
    assert end.value.code == status and signal.getsignal(number) is before
    assert "保存检查点并退出" in capfd.readouterr().err


def test_a_signal_that_nobody_acted_upon_ends_nothing():
    with Interruption():
        signal.raise_signal(signal.SIGINT)


def test_second_ctrl_c_leaves_at_once():
    with pytest.raises(KeyboardInterrupt), Interruption():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_the_shell_ignores_is_ignored(number):
    """As in `nohup python train.py &`, where Ctrl-C is meant for another command."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(number)
            assert not interruption.requested()
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(("gone", "status"), [(True, 141), (False, 0)])
def test_output_that_is_not_taken_ends_nothing_before_it_is_saved(gone, status, monkeypatch):
    """A reader who is gone asks for the end, as SIGPIPE does; a full disk does not."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with open(writer if gone else "/dev/full", "w") as stream, pytest.raises(SystemExit) as end:
        monkeypatch.setattr(sys, "stdout", stream)
        with Interruption() as interruption:
            print("a step")
            interruption.acted = interruption.requested()
            print("saving")
        raise SystemExit(0)
    assert end.value.code == status


def train_on(terminal: str, piped: bool, *before: int) -> None:
    """A training on this terminal, as far as signals and printing go; what it saves is the file `saved`. `piped`: what
    it prints goes to a pipe whose reader is gone; `before`: signals that came before the terminal closed."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # pytest itself may run under nohup
    os.setsid()
    streams = os.open(terminal, os.O_RDWR)  # the first that a session opens is its own
    for number in range(3):
        os.dup2(streams, number)
    os.close(streams)
    if piped:
        reader, writer = os.pipe()
        os.close(reader)
        for number in (1, 2):
            os.dup2(writer, number)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
    with Interruption() as interruption:
        for number in before:
            signal.raise_signal(number)
        os.write(0, b"begun")
        time.sleep(0.2)  # in which the terminal closes
        while not interruption.requested():
            time.sleep(0.01)
        interruption.acted = True
        signal.raise_signal(signal.SIGHUP)  # the shell's own, after the system's
        print("saving", flush=True)
        Path("saved").touch()


@pytest.mark.parametrize("piped, before, status", [(False, (), 129), (True, (), 129), (False, (signal.SIGINT,), 130)])
def test_a_terminal_that_closes_ends_nothing_before_it_is_saved(folder, piped, before, status):
    ours, theirs = pty.openpty()
    process = os.fork()
    if not process:
        # Whatever happens in here, pytest's own code must not run a second time.
        code = 1
        try:
            os.close(ours)
            train_on(os.ttyname(theirs), piped, *before)
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    said = b""
    while b"begun" not in said:
        said += os.read(ours, 1000)
    os.close(theirs)
    os.close(ours)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == status and Path("saved").exists()
