"""SIGTERM, Ctrl-C and the end of the terminal (SIGHUP) while there are steps to interrupt: they are noted,
told, and turned into an exit code at the end. This file knows signals and processes, no trainer."""

import contextlib
import os
import signal
import stat

import accelerate
import torch

from parts.terminal import in_main_thread


class Interruption:
    """A context that holds the signals, which reach the main thread only. When left, it gives them back and
    exits with 143, 130 or 129 where one was `acted` upon. A second signal acts at once."""

    number = 0  # the signal that came
    acted = False  # it came while there were steps to interrupt, and not in what follows the last one

    def __enter__(self):
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
        self.previous = {}
        if in_main_thread():  # Python lets no other thread set handlers
            for number in {signal.SIGINT, signal.SIGTERM, hangup}:
                # A shell's & lets a process ignore Ctrl-C, and nohup SIGHUP; they stay ignored.
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        # Not 0: a cluster's script or `&&` would take the model for finished. 128 + N is what shells report.
        if self.acted and kind is None:
            raise SystemExit(128 + self.number)

    def note(self, number, frame):
        """Note a signal, as its handler; a second one does what it would have done without us."""
        hangs_up = number == getattr(signal, "SIGHUP", None)
        if hangs_up:
            leave_terminal()
        # A terminal may close after Ctrl-C, and the system and the shell each send a SIGHUP: none demands it.
        if self.number and not hangs_up:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)
        self.number = self.number or number
        with contextlib.suppress(OSError):
            # os.write, as print() may be under way in the very thread that the signal interrupts.
            os.write(2, "\n做完这一步就保存检查点并退出；再收到一次信号（Ctrl-C）就立即退出。\n".encode())

    def requested(self) -> bool:
        """Tell whether any process got a signal. All call this together, as all have to stop at the same
        step: one that stopped alone would leave the others waiting in their next exchange of gradients."""
        came, state = bool(self.number), accelerate.PartialState()
        if state.num_processes > 1:
            came = bool(accelerate.utils.reduce(torch.tensor(float(came), device=state.device)).item())
        # Those that got none end with the same exit code as after SIGTERM.
        self.number = self.number or came * signal.SIGTERM
        return came


def leave_terminal() -> None:
    """Let what is printed to terminals and pipes go nowhere. After SIGHUP they are gone, and so may `| tee`
    be: the next line printed would raise an error in the middle of the saving."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        with contextlib.suppress(OSError):  # one that is closed
            # A file keeps what it gets. isatty() cannot tell: a terminal that is gone is none to it.
            if not stat.S_ISREG(os.fstat(number).st_mode):
                os.dup2(nowhere, number)
    os.close(nowhere)
