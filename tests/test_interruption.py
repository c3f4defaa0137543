"""SIGTERM and Ctrl-C: noted once, given back, and an exit status at the end."""

import signal
from types import SimpleNamespace

import pytest
import torch

from parts.interruption import Interruption

ARGS = SimpleNamespace(world_size=1, device=torch.device("cpu"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_noted_and_ends_with_its_status(number, status, capfd):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end, Interruption() as interruption:
        assert not interruption.requested(ARGS)
        signal.raise_signal(number)
        assert interruption.requested(ARGS)
        interruption.acted = True
    assert end.value.code == status and signal.getsignal(number) is before
    assert "做完这一步就保存检查点并退出" in capfd.readouterr().err


def test_a_signal_that_nobody_acted_upon_ends_nothing():
    with Interruption():
        signal.raise_signal(signal.SIGINT)


def test_second_ctrl_c_leaves_at_once():
    with pytest.raises(KeyboardInterrupt), Interruption():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_the_shell_ignores_is_ignored():
    """As in `nohup python train.py &`, where Ctrl-C is meant for another command."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert not interruption.requested(ARGS)
    finally:
        signal.signal(signal.SIGINT, before)
