"""How the project speaks to the person at the terminal: one sentence for each mistake, in any encoding, from
the first of several processes only; and checksums of files. Knows no model, no data and no flag's name."""

import argparse
import atexit
import contextlib
import difflib
import hashlib
import os
import re
import shutil
import sys
import threading
import traceback
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

# What would not be seen, would turn the order of the letters around it, would move the cursor or colour what
# follows, or cannot be written at all: control characters but for line ends and tabs, marks of direction,
# halves of surrogate pairs.
CONTROLS = "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)"
UNSEEN = re.compile(CONTROLS + "|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]|[\ud800-\udfff]")


def first_line(error: Exception) -> str:
    """Return what an error says in one line; its class when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shorten(text: str, most: int = 120) -> str:
    """Return `text` in one line, of at most `most` characters and two more dots; what is not seen has its
    name."""
    text = name_unseen(" ".join(text.split()))
    return text if len(text) <= most else text[:most] + "……"


def name_unseen(value: object) -> object:
    """Put into a text, for what is not seen of it, its name: [U+202E]. Texts of models and of data come
    through here before a person reads them."""
    if not isinstance(value, str):
        return value
    return UNSEEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", value)


def highlight(text: str) -> str:
    """Return `text` in yellow where standard output is a terminal, else as it is."""
    return f"\033[33m{text}\033[0m" if sys.stdout.isatty() else text


def progress(items, what: str):
    """Return `items`, with a bar on standard error for a person at a terminal who would wait."""
    return tqdm(items, desc=what, delay=1, leave=False, disable=None)  # None: hidden where it is piped


def sha256(*paths: str | Path) -> str:
    """Return the SHA-256 of the files' contents, one after another. A person at a terminal who would wait,
    with several GB, sees a bar."""
    digest, size = hashlib.sha256(), sum(Path(path).stat().st_size for path in paths)
    hidden = size < 4e9 or not sys.stderr.isatty()  # 4 GB take two seconds or three
    with tqdm(desc="SHA-256", total=size, unit="B", unit_scale=True, disable=hidden) as progress:
        for path in paths:
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    progress.update(len(block))
    return digest.hexdigest()


def in_main_thread() -> bool:
    """Tell whether this is the main thread, which alone hears signals."""
    return threading.current_thread() is threading.main_thread()


def run_main(main) -> None:
    """Run a script's `main`: on terminals of any encoding, without a traceback after Ctrl-C or `| head`. Of
    several processes (torchrun's RANK) only the first one speaks; of the others one hears what ends them."""
    # Launchers set both; RANK alone may be left over from something else.
    rank = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ else "0"
    if rank != "0" or sys.stdout is None:  # as after >&-
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    # A reply may hold what a terminal in GBK or ASCII cannot show: a question mark, and no traceback.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")
    # A shell reports a process that a signal ended as 128 + its number: SIGINT is 2, SIGPIPE 13.
    try:
        main()
    except KeyboardInterrupt:
        print("\n已中断。", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # Python flushes once more as it ends, and nobody reads that either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except SystemExit as error:
        alone = rank == "0" or not isinstance(error.code, str)
        code = error.code if alone else f"（进程 {rank}）{error.code}"
        raise SystemExit(name_unseen(code)) from None
    except Exception as error:
        explain_failed_import(error)
        if not isinstance(error, OSError):
            raise
        # What is said names the file: a folder without permission, a disk that is full.
        raise SystemExit(f"错误：{first_line(error)}") from None


def explain_failed_import(error: Exception) -> None:
    """Raise SystemExit with the file and the remedy where `error` is that of a library that cannot be
    imported: a broken one, one that does not go with another, or a file of the user's with its name."""
    while error.__cause__:  # transformers hides it behind an error of its own
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ImportError) or any(frame.name == "<module>" for frame in frames):
        cause = f"{type(error).__name__}：{first_line(error)}"
        remedy = "缺库请补装，或运行 pip install -r requirements.txt；用不到的请卸载，与库同名的文件请改名"
        raise SystemExit(f"错误：载入 {frames[-1].filename} 时出错（{cause}）；{remedy}。") from None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether memory ran out, on any device: torch.OutOfMemoryError is a RuntimeError; MPS and the CPU
    raise a plain one."""
    text = str(error).lower()
    return any(words in text for words in ("out of memory", "allocate memory", "cublas_status_alloc_failed"))


@contextlib.contextmanager
def explain_out_of_memory(message: str):
    """Turn any device's out-of-memory error into SystemExit(message)."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise SystemExit(message) from None
        raise


@contextlib.contextmanager
def explain_failed_write(path: str | Path, intact: str = "此前的检查点"):
    """Turn a write that failed, on a full disk say, into one sentence. `intact`: what is there still."""
    try:
        yield
    except Exception as error:
        # safetensors has a class of its own for it; torch.save and tokenizers have only words.
        known = isinstance(error, OSError | SafetensorError)
        if not known and not re.search("inline_container|os error", str(error)):
            raise
        free = shutil.disk_usage(Path(path).parent).free / 1e9
        failure = f"错误：写 {path} 失败（{shorten(str(error))}），磁盘剩余 {free:.2f} GB"
        raise SystemExit(f"{failure}。{intact}都还在；请按原因处理（如腾出空间），再用同一命令继续") from None


@contextlib.contextmanager
def hold(lock: str | Path, message: str):
    """Keep for this process alone what the file `lock` stands for; who comes second ends with `message`. The
    system lets go of it when the process ends, however it ends."""
    import filelock

    # A file that is merely there holds nothing: after a crash nobody has to delete it by hand.
    try:
        lock_held = filelock.FileLock(lock).acquire(timeout=0)
    except filelock.Timeout:
        raise SystemExit(message) from None
    with lock_held:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows deletes no open file
                os.unlink(lock)


def line_reader(prompt: str):
    """Return what asks a person for a line after `prompt`, which may raise EOFError and KeyboardInterrupt. At
    a terminal keys edit, ↑ brings earlier lines back, and what is pasted is one line, with line breaks."""
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        return partial(input, prompt)
    from prompt_toolkit import PromptSession

    session = PromptSession([("bold", prompt)])

    def mark_pastes(line: str = "") -> str:
        session.output.enable_bracketed_paste()
        session.output.flush()
        return line

    # Also what is pasted before the first prompt and between two: else each of its lines would be one that
    # was typed, and what follows an empty one, which ends a chat, a command for the shell.
    mark_pastes()
    atexit.register(lambda: (session.output.disable_bracketed_paste(), session.output.flush()))
    return lambda: mark_pastes(session.prompt())


def say_loading() -> None:
    """Print the first word, once the flags are seen to be right: torch and its libraries take 5 to 20 s to
    import. It is the first process's, and goes to standard error, as the output may be piped."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("正在载入……", file=sys.stderr, flush=True)


NOT_GIVEN = argparse.SUPPRESS  # as a flag's default: what is not given is not in the result


class Parser(argparse.ArgumentParser):
    """argparse in Chinese: a wrong flag names the nearest one, and a flag that is gone says what there is
    instead."""

    # What argparse says, and what is said here; its words are the same in Python 3.11 to 3.15. The last line
    # takes what is left: errors of the functions below, which are in Chinese already.
    WORDS = (
        ("argument ([^:]+): not allowed with argument (.+)", r"\1 和 \2 不能同时使用"),
        ("argument ([^:]+): expected (at least )?one argument", r"\1 后面要有一个值"),
        ("argument ([^:]+): invalid int value: (.+)", r"\1：要一个整数，不是 \2"),
        ("argument ([^:]+): invalid float value: (.+)", r"\1：要一个数，不是 \2"),
        ("argument ([^:]+): ", r"\1："),
    )

    def __init__(self, **options):
        formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=110)
        # argparse's own line for --help is in English.
        super().__init__(formatter_class=formatter, allow_abbrev=False, add_help=False, **options)
        self.add_argument_group("帮助").add_argument("-h", "--help", action="help", help="显示这些说明")
        self.gone: dict[str, str] = {}  # {flag: what to do instead}

    def parse_args(self, args=None, namespace=None):
        # A shell leaves the ~ of --flag=~/file as it is.
        args = list(map(expand_home, sys.argv[1:] if args is None else args))
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if not flag.startswith("-"):
                self.error(f"多了一个 {flag}：它前面的参数只要一个值；有空格的值请放在引号里")
            # argparse keeps a table of its flags, but has no public way to it.
            names = [name.lstrip("-") for name in self._option_string_actions]
            nearest = difflib.get_close_matches(flag.lstrip("-"), names, n=1)
            hint = f"你是不是想写 --{nearest[0]}？" if nearest else ""
            self.error(f"{flag}：{self.gone.get(flag, f'没有这个参数。{hint}全部参数见 --help')}")
        return values

    def error(self, message: str):
        """Ends with exit status 2, argparse's own. Of several processes on a machine the first one speaks."""
        for pattern, words in self.WORDS:
            message = re.sub(f"^{pattern}", words, message)
        self.exit(2, f"错误：{message}\n" if os.environ.get("LOCAL_RANK", "0") == "0" else None)


def expand_home(word: str) -> str:
    """Return a word of a command line, --flag=~/file with the path of the home folder."""
    flag, equals, value = word.partition("=")
    return f"{flag}={os.path.expanduser(value)}" if equals and flag.startswith("--") else word


def true_or_false(text: str) -> bool:
    """Return what a switch says, for argparse. Raises ArgumentTypeError."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"只能是 true 或 false，不是 {text!r}")
    return words[text.lower()]


def one_of(words: tuple[str, ...], text: str) -> str:
    """Return `text` where it is one of these words, for argparse: its own `choices` would be told in
    English. Raises ArgumentTypeError."""
    if text not in words:
        raise argparse.ArgumentTypeError(f"只能是 {'、'.join(words)} 之一，不是 {text!r}")
    return text


def whole_number(least: int, text: str) -> int:
    """Return a whole number from `least` on, as large as seeds may be, for argparse. Raises
    ArgumentTypeError."""
    # The length first: int() refuses thousands of digits with an error of its own.
    if not text.isdecimal() or len(text) > 10 or not least <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"要一个 {least} 到 {2**32 - 1} 的整数，不是 {text!r}")
    return int(text)


def some_text(text: str) -> str:
    """Return a text that is not empty, without the space around it, for argparse. Raises
    ArgumentTypeError."""
    if not text.strip():
        raise argparse.ArgumentTypeError("问题是空的")
    return text.strip()
