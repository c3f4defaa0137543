"""One run, one folder: who may write into it, whether a run may go on there and from which checkpoint, and when it
counts as finished. Knows the settings that decide the weights, not how they are trained."""

import contextlib
import json
import os
import shutil
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import accelerate

from parts import terminal
from parts.run import checkpoints, processes, run_settings
from parts.run.checkpoints import FINISHED_MARK, RUN_FILE, write_at_once
from parts.terminal import explain_failed_write
from parts.training.optimizers import OPTIMIZERS

OWNER = ".lock_owner"  # file that says who writes into the folder


class Run(NamedTuple):
    """What this training is, and what is there of it."""

    checkpoint: str | None  # to continue from
    settings: dict[str, object]  # that decide the weights, with checksums of the data and of the base model
    kept: dict[str, object]  # of an interrupted run's plan: other optimizers have other states, other passes round


def check(args) -> None:
    """Raises SystemExit for a finished run, for a folder that holds anything else, such as a model, also the one that
    is to be trained, and for one without permission."""
    folder = Path(args.output_dir)
    if Path(args.model_name).resolve().is_relative_to(folder.resolve()) and Path(args.model_name).is_dir():
        raise SystemExit(
            f"错误：--model_name {args.model_name} 在 --output_dir {folder} 里，训练会写掉它；"
            "请用 --output_dir 换一个文件夹。"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SystemExit(
            f"错误：无法写入 {folder}（{error.strerror}）；请检查权限，或用 --output_dir 换位置。"
        ) from None
    finished = folder / FINISHED_MARK
    ours = finished.exists() or (folder / RUN_FILE).exists()
    if not ours and (others := sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))):
        raise SystemExit(f"错误：{folder} 里有别的文件（{others[0]} 等）；请用 --output_dir 指定一个新文件夹。")
    # Where torchrun starts the command again, it may be this command's own.
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if finished.exists() and (again or not args.overwrite_output_dir):
        raise SystemExit(
            f"错误：{folder} 里已有训练完的模型。"
            "另存请用 --output_dir 换一个文件夹；删掉它重新训练请加 --overwrite_output_dir。"
        )


@contextlib.contextmanager
def hold(args):
    """The output folder for this run alone: two runs in it would delete each other's checkpoints. Rank 0 holds it for
    all; the system lets go of it when the process ends, however it ends."""
    if args.process_index:
        yield
        return
    check(args)
    owner = Path(args.output_dir, OWNER)
    who = owner.read_text(encoding="utf-8") if owner.is_file() else "刚刚开始"
    message = f"错误：另一个训练（{who}）正在写 {args.output_dir}；请等它结束，或用 --output_dir 换一个文件夹。"
    with terminal.hold(Path(args.output_dir, ".lock"), message):
        for thread in threading.enumerate():  # of an earlier run in this process, which a second Ctrl-C ended
            if isinstance(thread, checkpoints.Sealer):
                thread.join()
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with explain_failed_write(owner):
            write_at_once(owner, f"进程 {os.getpid()}，开始于 {now}")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                owner.unlink()


def find_run(args, model_path: str, system_prompt: str) -> Run:
    """What is there to continue from. By the first process, told to the others; writes nothing. Raises SystemExit for a
    run that was begun with settings that give other weights, and for machines that have other files."""
    run, settings = None, None
    if not args.local_process_index:  # once for each machine
        settings = run_settings.collect(args, model_path, system_prompt)
    processes.agree(args, settings)
    processes.require_shared(args, Path(args.output_dir, OWNER))
    if not args.process_index:
        checkpoint = choose_checkpoint(args)
        old = run_settings.read(Path(checkpoint).parent) if checkpoint else {}
        kept = {"optimizer": old.get("optimizer"), "batch_tokens": old.pop("batch_tokens", None)}
        if kept["optimizer"] not in (None, *OPTIMIZERS):
            raise SystemExit(
                f"错误：{checkpoint} 是用 --optimizer {kept['optimizer']} 训练的，它已不再支持；请用 --output_dir "
                "换一个文件夹重新训练（模型一张卡放不下就加 --fsdp true，或用 train_lora.py）。"
            )
        if old:
            new = run_settings.complete(settings, old, args) | {"optimizer": args.optimizer or kept["optimizer"]}
            run_settings.refuse_changes(Path(checkpoint).parent, old, new)
        if args.memory_gb:
            kept["batch_tokens"] = None  # planned anew
        run = Run(checkpoint, settings, kept)
    return accelerate.utils.broadcast_object_list([run])[0]


def choose_checkpoint(args) -> str | None:
    """The checkpoint to continue from, or None: the newest that is whole to the last bit, and whose best one is, as the
    weights that training ends with may be read from there. Prints which were passed over and why."""
    if Path(args.output_dir, FINISHED_MARK).exists():
        if args.resume_from_checkpoint:
            raise SystemExit(
                f"错误：{args.output_dir} 里的训练已经完成；从 {args.resume_from_checkpoint} 继续，"
                "请用 --output_dir 换一个新文件夹。"
            )
        return None
    wanted, own = args.resume_from_checkpoint, checkpoints.folders(args.output_dir)
    if wanted and own and Path(wanted).resolve().parent != Path(args.output_dir).resolve():
        raise SystemExit(
            f"错误：{args.output_dir} 里有另一个未完成的训练；从 {wanted} 继续，请用 --output_dir 换一个新文件夹。"
        )
    folders = [Path(wanted)] if wanted else own
    for checkpoint in reversed(folders):
        fault = find_fault(checkpoint)
        if wanted and fault:
            raise SystemExit(
                f"错误：--resume_from_checkpoint {wanted} 不是完整的检查点（{fault}）；"
                "不写这个参数，就会从最近的完整检查点继续。"
            )
        if not fault:
            return str(checkpoint)
        print(f"跳过 {checkpoint}：{fault}。")
    if folders:
        print("没有可用的检查点，从头开始训练。")
    return None


def find_fault(checkpoint: Path) -> str | None:
    """Why training cannot continue from `checkpoint` to the same weights, or None."""
    damage = checkpoints.find_damage(checkpoint, hashes=True)
    if damage:
        return damage
    state = json.loads((checkpoint / FINISHED_MARK).read_text(encoding="utf-8"))
    best = Path(state["best_model_checkpoint"] or checkpoint)
    moved = checkpoint.with_name(best.name)  # with the whole folder
    best = moved if moved.is_dir() else best
    if best != checkpoint and (damage := checkpoints.find_damage(best, hashes=True)):
        return f"到它为止最好的 {best.name} {damage}"
    return None


def begin(args, run: Run, plan) -> None:
    """Delete the finished run that --overwrite_output_dir gives up, its mark last, and note this run's settings.

    Late, when all that can go wrong before training has gone right. An unfinished run is continued even with the
    flag: it may be this command's own, interrupted.
    """
    if args.process_index:
        return
    finished = Path(args.output_dir, FINISHED_MARK)
    if finished.exists():
        for folder in checkpoints.folders(args.output_dir):
            shutil.rmtree(folder)
        finished.unlink()
    settings = run.settings | {"optimizer": plan.optimizer, "batch_tokens": plan.batch_tokens}
    with explain_failed_write(args.output_dir):
        write_at_once(Path(args.output_dir, RUN_FILE), json.dumps(settings, ensure_ascii=False, indent=1))
    if run.checkpoint:
        print(f"resumed from step {Path(run.checkpoint).name.rpartition('-')[2]}", flush=True)  # it may be renamed


@contextlib.contextmanager
def finishing(args, state):
    """Around the writing of the results: a full disk is explained, and the mark of a finished run comes last."""
    with explain_failed_write(args.output_dir):
        yield
        write_at_once(Path(args.output_dir, FINISHED_MARK), json.dumps(asdict(state), indent=2))
