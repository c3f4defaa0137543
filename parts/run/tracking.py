"""SwanLab, which never stops a training: what it cannot send stays on the disk, what it must not know is not
told. This file knows its run, not what is trained."""

import atexit
import contextlib
import io
import os
import signal
import sys
from pathlib import Path

from parts.run.checkpoints import write_atomically
from parts.terminal import explain_failed_write, in_main_thread, shorten

# In the output folder of an unfinished run: by it a resumed one goes on in the same SwanLab run.
RUN_ID_FILE = ".swanlab_run"
PROJECT = "SWANLAB_PROJ_NAME"  # as SwanLab's first versions named it; it still reads that
SECONDS = 20  # that SwanLab's server can delay the start at most, and again the end


class Timeout(BaseException):
    """Raised by time_limit. It is no Exception, as SwanLab catches those and tries again."""


@contextlib.contextmanager
def time_limit():
    """Raise Timeout after SECONDS; Windows has no such signal, nor have other threads than the main one.
    SwanLab's own lines stay off the screen; they are in what this gives."""

    def late(*_):
        raise Timeout(f"{SECONDS} 秒内没有结果")

    alarm = getattr(signal, "SIGALRM", None) if in_main_thread() else None
    if alarm:
        before = signal.signal(alarm, late)
        signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as its_lines:
            yield its_lines
    finally:
        if alarm:
            signal.alarm(0)
            signal.signal(alarm, before)


def configure(project: str, run_name: str, run_id: str | None = None):
    """Return SwanLab's settings for this run, and its mode. Raises SystemExit where the user has to mend
    something.

    SWANLAB_MODE is obeyed; without it the mode is online with a key or an earlier login, else local. No
    prompt blocks a run.
    """
    for name, value in list(os.environ.items()):
        if name.startswith("SWANLAB_") and not value.strip():  # empty: as unset
            del os.environ[name]
    # SwanLab >= 0.8 reads SWANLAB_PROJECT as JSON settings and raises; older tutorials set it to a name.
    if "SWANLAB_PROJECT" in os.environ:
        os.environ[PROJECT] = os.environ.pop("SWANLAB_PROJECT")
    import swanlab

    project = {"name": os.environ.get(PROJECT) or project, "workspace": os.environ.get("SWANLAB_WORKSPACE")}
    try:
        settings = swanlab.Settings(
            project=project,
            experiment={"name": run_name},
            run={"id": run_id, "resume": "allow"},
            # Off: what names people, machines and folders (command line, packages, a git remote, which may
            # hold a token), and the screen's text.
            probe={"runtime": False, "requirements": False, "git": False, "swanlab": False},
            terminal={"proxy_type": "none"},
        )
    except ValueError as error:
        cause = shorten(describe_refusal(error), 200)
        remedy = "请改正 --run_name 或 SWANLAB_ 开头的环境变量，或加 --report_to none"
        raise SystemExit(f"错误：SwanLab 的设置有误（{cause}）；{remedy}。") from None
    mode = "online" if settings.api_key else "local"
    if "mode" in settings.model_fields_set:
        mode = settings.mode
    if mode == "online" and not settings.api_key:
        remedy = "不想登录，请设 SWANLAB_MODE=local，或加 --report_to none"
        raise SystemExit(f"错误：SWANLAB_MODE=online 需要先登录：swanlab login；{remedy}。")
    return settings, mode


def describe_refusal(error: ValueError) -> str:
    """Say what SwanLab has against its settings."""
    import pydantic

    if not isinstance(error, pydantic.ValidationError):
        return str(error)
    # Its own text would show what was given, such as a key.
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}：{first['msg']}"


def start(project: str, run_name: str, folder: str, config: dict[str, object], goes_on: bool = False) -> None:
    """Begin the SwanLab run that Trainer's own callback then writes to, or go on with the unfinished one of
    this output folder. What fails here, such as the network, makes the run a local one and never ends the
    training."""
    import swanlab

    id_file = Path(folder, RUN_ID_FILE)
    run_id = id_file.read_text() if goes_on and id_file.is_file() else None
    settings, mode = configure(project, run_name, run_id)
    excepthook, on_interrupt, problem = sys.excepthook, signal.getsignal(signal.SIGINT), ""
    # "disabled" too makes a run, without which Trainer's callback raises.
    for choice in dict.fromkeys((mode, "local", "disabled")):
        try:
            with time_limit():
                run = swanlab.init(reinit=True, mode=choice, config=config, settings=settings)
            break
        except (Exception, Timeout) as error:
            problem += f"{choice} 模式无法开始（{shorten(str(error))}），训练照常；"
    # SwanLab's own would wait for its server without limit after an error or Ctrl-C.
    sys.excepthook = excepthook
    if in_main_thread():
        signal.signal(signal.SIGINT, on_interrupt)
    # For a run that does not come to its end. Python calls the last one registered first: this comes before
    # SwanLab's own, which has no limit either.
    atexit.register(end, "aborted")
    with explain_failed_write(id_file):
        # SwanLab refuses an empty id: after a write that was cut off the same command could not start again.
        write_atomically(id_file, run.id)
    where = run.dir.relative_to(Path.cwd()) if Path.cwd() in run.dir.parents else run.dir
    sync = f"swanlab login 后 swanlab sync {where}"
    how = {
        "local": f"只记录在本地。查看：swanlab watch {where.parent}；上传：{sync}",
        "offline": f"只记录在本地。上传：{sync}",
        "disabled": "不记录。",
    }
    print(f"SwanLab：{problem}{how.get(run.mode) or f'查看：{run.url}'}", flush=True)


def end(state: str = "success") -> None:
    """Close the SwanLab run, if there is one. What its server does not take in time stays on the disk
    only."""
    import swanlab

    if not swanlab.has_run():
        return
    run = swanlab.get_run()
    try:
        with time_limit() as its_lines:
            run.finish(state)
        # SwanLab gives up what its server refuses, and says so only there.
        if "| ERROR" in its_lines.getvalue():
            raise RuntimeError("服务器拒绝接收")
    except (Exception, Timeout) as error:
        cause = shorten(str(error))
        print(f"SwanLab：没有全部上传（{cause}）。补传本地的记录：swanlab sync --id {run.id} {run.dir}")


def log_texts(name: str, texts: list[str], step: int | None = None) -> bool:
    """Log texts in the SwanLab run, if this process has begun one, and tell whether it has; without a step
    they come after all that is there."""
    swanlab = sys.modules.get("swanlab")  # where there is a run it is imported
    has_run = bool(swanlab and swanlab.has_run())
    if has_run:
        swanlab.log({name: list(map(swanlab.Text, texts))}, step=step)
    return has_run


def finish(folder: str, samples: list[str]) -> None:
    """Log the replies in the SwanLab run and end it."""
    log_texts("Prediction", samples)
    end()
    # The next run in this folder is another one for SwanLab too.
    Path(folder, RUN_ID_FILE).unlink(missing_ok=True)
