"""Signals that would end the process, and a reader of its output who is gone, while there are steps to
interrupt: they are noted, told, and turned into an exit code at the end. This file knows signals, streams
and processes, no trainer.

What a signal does, in order: `note` takes it down and says so; the step that is under way ends; all processes
agree in `requested` to stop there (training/safe_trainer.py); an evaluation or a checkpoint that is due at
this step is made, else a checkpoint is written now; its manifest is waited for; the context ends with the
exit code. Before there are steps, a signal ends the command at once: there is nothing to save.
"""

import contextlib
import io
import os
import signal
import sys

import accelerate
import torch

from parts.terminal import in_main_thread

# Those that end a process by default; a system has some of them. Clusters send USR1, USR2 or XCPU before a
# limit. Not those that tell of a fault of the process itself.
ENDING = "HUP INT QUIT TERM BREAK USR1 USR2 ALRM VTALRM PROF XCPU PWR".split()


class Interruption:
    """A context that holds the signals, which reach the main thread only. When left, it gives them back and
    exits with 128 and the signal's number where one was `acted` upon. A second Ctrl-C acts at once.

    From its beginning on nothing printed raises an error, to the process's end: a training is worth more than
    what it prints."""

    number = 0  # the signal that came
    acted = False  # it came while there were steps to interrupt, and not in what follows the last one

    def __enter__(self):
        sys.stdout, sys.stderr = self.keep(sys.stdout), self.keep(sys.stderr)
        self.previous = {}
        if in_main_thread():  # Python lets no other thread set handlers
            for number in {getattr(signal, f"SIG{name}", signal.SIGTERM) for name in ENDING}:
                # A shell's & lets a process ignore Ctrl-C, and nohup SIGHUP; they stay ignored. And what else
                # somebody handles, such as a job's own SIGUSR1, is not ours.
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self.previous[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        # Not 0: a cluster's script or `&&` would take the model for finished. 128 + N is what shells report.
        if self.acted and kind is None:
            raise SystemExit(128 + self.number)

    def note(self, number, frame):
        """Note a signal, as its handler; a second Ctrl-C does what it would have done without us."""
        # No other signal is in a hurry when it comes again: the shell and the system each send a SIGHUP when
        # a terminal closes, Slurm and torchrun each a SIGTERM, and the system a SIGXCPU every second.
        if self.number and number == signal.SIGINT:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)
        self.number = self.number or number
        with contextlib.suppress(OSError):
            # os.write, as print() may be under way in the very thread that the signal interrupts.
            os.write(2, "\n做完这一步就保存检查点并退出；再按一次 Ctrl-C 就立即退出。\n".encode())

    def keep(self, stream):
        """Return what takes the place of standard output or error: the same file as an Output. Windows'
        terminals and notebooks have no such file, and stay as they are."""
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)  # `python -u` has no buffer in between
        if type(raw) is not io.FileIO:
            return stream
        stream.flush()
        output = Output(raw.fileno(), "w", closefd=False)
        output.interruption = self
        buffer = io.BufferedWriter(output)
        return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)

    def requested(self) -> bool:
        """Tell whether any process got a signal. All call this together, as all have to stop at the same
        step: one that stopped alone would leave the others waiting in their next exchange of gradients."""
        came, state = bool(self.number), accelerate.PartialState()
        if state.num_processes > 1:
            came = bool(accelerate.utils.reduce(torch.tensor(float(came), device=state.device)).item())
        # Those that got none end with the same exit code as after SIGTERM.
        self.number = self.number or came * signal.SIGTERM
        return came


class Output(io.FileIO):
    """A file, pipe or terminal in which no write fails: what it does not take is dropped. A reader who is
    gone (`| head`) counts as the signal that is meant for this."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            self.interruption.number = self.interruption.number or 13  # SIGPIPE, which Windows does not have
        except OSError:
            pass  # a terminal that is gone without SIGHUP was left on purpose; a disk may be full
        return len(data)
