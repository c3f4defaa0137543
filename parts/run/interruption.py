"""SIGTERM, Ctrl-C and the end of the terminal (SIGHUP) while there are steps to interrupt: noted, told, and turned into
an exit status at the end. Knows signals and processes, no trainer."""

import contextlib
import os
import signal
import stat

import accelerate
import torch

from parts.terminal import in_main_thread


class Interruption:
    """Entered, it holds the signals, which reach the main thread only; left, it gives them back and exits with 143, 130
    or 129 where one was `acted` upon. A second signal acts at once."""

    number = 0  # the signal that came
    acted = False  # it came while there were steps to interrupt, and not in what follows the last one

    def __enter__(self):
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
        numbers = {signal.SIGINT, signal.SIGTERM, hangup} if in_main_thread() else ()
        # A shell's & lets a process ignore Ctrl-C, and nohup SIGHUP; they stay ignored.
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self.note) for number in heard}
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.acted and kind is None:
            raise SystemExit(128 + self.number)

    def note(self, number, frame):
        """The handler: at a second signal what would have happened without us."""
        closed = number == getattr(signal, "SIGHUP", None)
        if closed:
            leave_terminal()
        if (
            self.number and not closed
        ):  # a terminal may close after Ctrl-C; the system and the shell each send one
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)
        self.number = self.number or number
        with contextlib.suppress(OSError):
            # print() may be under way in the very thread that the signal interrupts
            os.write(2, "\n做完这一步就保存检查点并退出；再来一次信号（Ctrl-C）立即退出。\n".encode())

    def requested(self) -> bool:
        """Whether any process got a signal: all have to stop at the same step, and call this together."""
        came, state = bool(self.number), accelerate.PartialState()
        if state.num_processes > 1:
            came = bool(accelerate.utils.reduce(torch.tensor(float(came), device=state.device)).item())
        self.number = self.number or came * signal.SIGTERM
        return came


def leave_terminal() -> None:
    """Let what is printed to terminals and pipes go nowhere: after SIGHUP they are gone, and so may `| tee` be; a line
    could end the saving."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        with contextlib.suppress(OSError):  # one that is closed
            if not stat.S_ISREG(os.fstat(number).st_mode):  # a terminal that is gone is none to isatty()
                os.dup2(nowhere, number)
    os.close(nowhere)
