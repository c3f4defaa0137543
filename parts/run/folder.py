"""One training, one folder: who may write into it, which settings decide its weights, whether it may go on there and
from which checkpoint, and when it counts as finished. Knows no Trainer: the settings are handed in."""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import accelerate

from parts import terminal
from parts.run import checkpoints, processes
from parts.run.checkpoints import ADAPTER_WEIGHTS, FINISHED_MARK, RUN_FILE, write_at_once
from parts.terminal import explain_failed_write

OWNER = ".lock_owner"  # file that says who writes into the folder
# What decides the weights. Logging, samples, patience and what only saves memory may change while continuing; so may
# --fast_kernels, a way on where one fails: they were seen to agree.
SETTINGS = (
    "model_name model_revision max_length num_train_epochs max_steps learning_rate lr_scheduler_type "
    "lr_scheduler_kwargs warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm full_logits "
    "seed data_seed full_determinism eval_steps"
).split()
LORA_SETTINGS = "lora_rank lora_alpha lora_dropout target_modules use_rslora use_dora load_in_4bit".split()
RENAMED = {"optim": "adamw"}  # optimizers that an earlier version called otherwise
ADDED = {
    "target_modules": "all-linear",
    "use_rslora": False,
    "use_dora": False,
    "adapter": None,
}  # what it did without saying so


class Run:
    """A training in its folder. What is there to go on with is known once `find` was called, the same in all
    processes."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.settings: dict[
            str, object
        ] = {}  # that decide the weights, with checksums of the data and the base model
        self.checkpoint: str | None = None  # to continue from
        self.kept: dict[str, object] = {}  # of an interrupted run's plan: its optimizer, the tokens of a pass

    def find(self, settings: dict | None, asked: Mapping[str, object], optimizers: Iterable[str]) -> None:
        """Look for what is there to continue from; write nothing. `settings` come from the first process of each
        machine, as settings_of has them; `asked`: all that the command asks for; `optimizers` that there are. Raises
        SystemExit for a run that was begun with settings that give other weights, and for machines that have other
        files."""
        processes.agree(settings)
        processes.require_shared(self.folder / OWNER)
        if accelerate.PartialState().is_main_process:
            self.settings = settings
            self.checkpoint = choose_checkpoint(self.folder, asked["resume_from_checkpoint"])
            if self.checkpoint:
                self.compare(Path(self.checkpoint).parent, asked)
            optimizer = self.kept.get("optimizer")
            if optimizer not in (None, *optimizers):
                begun = f"{self.checkpoint} 是用 --optimizer {optimizer} 训练的，它已不再支持"
                remedy = "换一个文件夹重新训练（模型一张卡放不下就加 --fsdp true，或用 train_lora.py）"
                raise SystemExit(f"错误：{begun}；请用 --output_dir {remedy}。")
        [found] = accelerate.utils.broadcast_object_list([vars(self)])
        vars(self).update(found)

    def compare(self, folder: Path, asked: Mapping[str, object]) -> None:
        """Keep what the run in `folder` has decided on and the command leaves open. Raises SystemExit where the run was
        begun with other settings."""
        old = read_settings(folder)
        if "lora_rank" in old:
            old = ADDED | old
        optimizer, batch_tokens = old.get("optimizer"), old.pop("batch_tokens", None)
        self.kept = {"optimizer": optimizer, "batch_tokens": None if asked["memory_gb"] else batch_tokens}
        # Names that an older version noted may be gone: then what Trainer makes of them is compared.
        retired = values_of(asked, [name for name in old if name not in self.settings])
        now = retired | self.settings | {"optimizer": asked["optimizer"] or optimizer}
        refuse_changes(folder, old, now)

    def begin(self, optimizer: str, batch_tokens: int) -> None:
        """Delete the finished run that --overwrite_output_dir gives up, its mark last, and note this run's settings.

        Late, when all that can go wrong before training has gone right. An unfinished run is continued even with the
        flag: it may be this command's own, interrupted.
        """
        if not accelerate.PartialState().is_main_process:
            return
        finished = self.folder / FINISHED_MARK
        if finished.exists():
            for checkpoint in checkpoints.folders(self.folder):
                shutil.rmtree(checkpoint)
            finished.unlink()
        settings = self.settings | {"optimizer": optimizer, "batch_tokens": batch_tokens}
        with explain_failed_write(self.folder):
            write_at_once(self.folder / RUN_FILE, json.dumps(settings, ensure_ascii=False, indent=1))
        if self.checkpoint:  # which may be renamed
            print(f"resumed from step {Path(self.checkpoint).name.rpartition('-')[2]}", flush=True)

    @contextlib.contextmanager
    def finishing(self, state):
        """Around the writing of the results: a full disk is explained, and the mark of a finished run, Trainer's
        `state`, comes last."""
        with explain_failed_write(self.folder):
            yield
            write_at_once(self.folder / FINISHED_MARK, json.dumps(asdict(state), indent=2))


# ---- who may write ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(folder: str, overwrite: bool, model_name: str, adapter: str | None = None):
    """Give the Run of a folder, which is this run's alone meanwhile: two in one would delete each other's checkpoints.
    The first process holds it for all; the system lets go of it when the process ends, however it ends."""
    run = Run(folder)
    if not accelerate.PartialState().is_main_process:
        yield run
        return
    refuse_folder(run.folder, overwrite, model_name, adapter)
    owner = run.folder / OWNER
    who = owner.read_text(encoding="utf-8") if owner.is_file() else "刚刚开始"
    message = f"错误：另一个训练（{who}）正在写 {folder}；请等它结束，或用 --output_dir 换一个文件夹。"
    with terminal.hold(run.folder / ".lock", message):
        for thread in threading.enumerate():  # of an earlier run in this process, which a second Ctrl-C ended
            if isinstance(thread, checkpoints.Sealer):
                thread.join()
        with explain_failed_write(owner):
            write_at_once(owner, f"进程 {os.getpid()}，开始于 {time.strftime('%Y-%m-%d %H:%M:%S')}")
        try:
            yield run
        finally:
            with contextlib.suppress(OSError):
                owner.unlink()


def refuse_folder(folder: Path, overwrite: bool, model_name: str, adapter: str | None = None) -> None:
    """Raise SystemExit for a finished run, for a folder that holds anything else, such as a model, also the one that
    is to be trained, and for one without permission."""
    for flag, source in {"model_name": model_name, "adapter": adapter}.items():
        if source and os.path.isdir(source) and Path(source).resolve().is_relative_to(folder.resolve()):
            where = f"--{flag} {source} 在 --output_dir {folder} 里"
            raise SystemExit(f"错误：{where}，训练会写掉它；请用 --output_dir 换一个文件夹。")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        why = error.strerror
        raise SystemExit(
            f"错误：无法写入 {folder}（{why}）；请检查权限，或用 --output_dir 换位置。"
        ) from None
    finished = (folder / FINISHED_MARK).exists()
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if others and not finished and RUN_FILE not in others:
        raise SystemExit(
            f"错误：{folder} 里有别的文件（{others[0]} 等）；请用 --output_dir 指定一个新文件夹。"
        )
    # Where torchrun starts the command again, it may be this command's own.
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if finished and (again or not overwrite):
        remedy = "另存请用 --output_dir 换一个文件夹；删掉它重新训练请加 --overwrite_output_dir"
        raise SystemExit(f"错误：{folder} 里已有训练完的模型。{remedy}。")


# ---- settings -----------------------------------------------------------------------------------------------------


def settings_of(args, model_path: str, system_prompt: str, dtype: object) -> dict[str, object]:
    """The settings that decide the weights, {name: value} as JSON gives them back, with the SHA-256 of the data and of
    the base model in `model_path`."""
    names = [*SETTINGS, *(LORA_SETTINGS if args.trains_adapter else [])]
    settings = values_of(vars(args), names)
    settings["model_sha256"] = checkpoints.weights_sha256(model_path)
    settings["examples_per_step"] = args.examples_per_step
    settings["system_prompt"], settings["dtype"] = system_prompt, str(dtype)
    if args.adapter:
        settings["adapter"] = args.adapter
        settings["adapter (sha256)"] = terminal.sha256(Path(args.adapter, ADAPTER_WEIGHTS))
    for file in (args.train_file, args.val_file):
        settings[f"{file} (sha256)"] = terminal.sha256(file)
    return json.loads(json.dumps(settings))


def values_of(asked: Mapping[str, object], names: Iterable[str]) -> dict[str, object]:
    """What was asked for under these names; an enum's value, as that is what a file can hold."""
    return {name: getattr(asked.get(name), "value", asked.get(name)) for name in names}


def read_settings(folder: Path) -> dict[str, object]:
    """The settings of the run in `folder`; none, and a line that says so, where they cannot be read."""
    try:
        settings = {**json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        why = terminal.first_line(error)
        print(f"{folder / RUN_FILE} 无法读取（{why}），无法核对设置是否与原来相同。")
        return {}
    if "optimizer" in settings:
        settings["optimizer"] = RENAMED.get(settings["optimizer"], settings["optimizer"])
    return settings


def refuse_changes(folder: Path, old: dict, now: dict) -> None:
    """Raise SystemExit when the run in `folder` was begun with `old` settings, other ones than `now`."""
    changed = [name for name in old if old[name] != now.get(name)]
    if not changed:
        return
    changes = "，".join(f"{name} {str(old[name])[:80]} -> {str(now.get(name))[:80]}" for name in changed)
    what, how = "未完成的训练", "请用原来的设置继续"
    if changed == ["examples_per_step"]:  # with more or fewer processes than before
        how = f"请用 --per_device_train_batch_size 让所有进程每步仍是 {old[changed[0]]} 条"
    remedy = f"{how}，或用 --output_dir 换一个文件夹重新训练"
    if (folder / FINISHED_MARK).exists():
        flag = "--adapter" if "lora_rank" in old else "--model_name"
        what = "训练完的模型"
        remedy = f"它不能再继续，可以从它开始新的训练：{flag} {folder} --output_dir <新文件夹>"
    raise SystemExit(f"错误：{folder} 里{what}用的是别的设置：{changes}；{remedy}。")


# ---- from where it goes on ----------------------------------------------------------------------------------------


def choose_checkpoint(folder: Path, wanted: str | None) -> str | None:
    """The checkpoint to continue from, the `wanted` one if that is told, or None: the newest that is undamaged to the
    last bit, and whose best one is, as the weights that training ends with may be read from there. Prints which were
    passed over and why."""
    if (folder / FINISHED_MARK).exists():
        if wanted:
            raise SystemExit(
                f"错误：{folder} 里的训练已经完成；从 {wanted} 继续，请用 --output_dir 换一个新文件夹。"
            )
        return None
    own = checkpoints.folders(folder)
    if wanted and own and Path(wanted).resolve().parent != folder.resolve():
        raise SystemExit(
            f"错误：{folder} 里有另一个未完成的训练；从 {wanted} 继续，请用 --output_dir 换一个新文件夹。"
        )
    for checkpoint in [Path(wanted)] if wanted else reversed(own):
        fault = find_fault(checkpoint)
        if not fault:
            return str(checkpoint)
        if wanted:
            remedy = "不写这个参数，就会从最近的完整检查点继续"
            raise SystemExit(
                f"错误：--resume_from_checkpoint {wanted} 不是完整的检查点（{fault}）；{remedy}。"
            )
        print(f"跳过 {checkpoint}：{fault}。")
    if own:
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
