"""One training, one folder: who may write into it, which settings decide its weights, whether it may go on
there and from which checkpoint, and when it counts as finished. It knows no Trainer: the settings are handed
in."""

import contextlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import accelerate

from parts import terminal
from parts.run import checkpoints, processes
from parts.run.checkpoints import ADAPTER_WEIGHTS, FINISHED_MARK, RUN_FILE, write_atomically
from parts.terminal import explain_failed_write

OWNER = ".lock_owner"  # the file that says who writes into the folder
# What decides the weights. Logging, samples, patience and what only saves memory may change while a run
# continues. So may --fast_kernels, the way on where a kernel fails: plain ones were seen to agree.
SETTINGS = (
    "model_name model_revision max_length num_train_epochs max_steps learning_rate lr_scheduler_type "
    "lr_scheduler_kwargs warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
    "full_logits seed data_seed full_determinism eval_steps"
).split()
LORA_SETTINGS = "lora_rank lora_alpha lora_dropout target_modules use_rslora use_dora load_in_4bit".split()
# The same content is the same, wherever it lies and whatever it is called: {name: its checksum's name}.
CONTENT = {"model_name": "model_sha256", "model_revision": "model_sha256", "adapter": "adapter (sha256)"}
RENAMED = {"optim": "adamw"}  # optimizers that an earlier version called otherwise
# What an earlier version did without noting it, so that its runs are continued too.
ADDED = {"target_modules": "all-linear", "use_rslora": False, "use_dora": False, "adapter (sha256)": None}


class Run:
    """A training in its folder. What is there to go on with is known once `find` was called, the same in all
    processes."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        # Those that decide the weights, with checksums of the data and of the base model.
        self.settings: dict[str, object] = {}
        self.checkpoint: str | None = None  # to continue from
        # What an interrupted run's plan had decided on: its optimizer, the tokens of a pass.
        self.resumed_plan: dict[str, object] = {}

    def find(self, settings: dict | None, asked: Mapping[str, object], optimizers: Iterable[str]) -> None:
        """Look for what is there to continue from; write nothing. `settings` come from the first process of
        each machine, as settings_of has them, None from the others; `asked`: all that the command asks for;
        `optimizers`: those that there are. Raises SystemExit for a run that was begun with settings that give
        other weights, and for machines that have other files."""
        processes.agree(settings)
        processes.require_shared(self.folder / OWNER)
        if accelerate.PartialState().is_main_process:
            self.settings = settings
            self.checkpoint = choose_checkpoint(self.folder, asked["resume_from_checkpoint"])
            if self.checkpoint:
                self.compare(Path(self.checkpoint).parent, asked)
            optimizer = self.resumed_plan.get("optimizer")
            if optimizer not in (None, *optimizers):
                begun = f"{self.checkpoint} 是用 --optimizer {optimizer} 训练的，这个优化器已不再支持"
                remedy = "换一个文件夹重新训练（模型一张卡放不下就加 --fsdp true，或用 train_lora.py）"
                raise SystemExit(f"错误：{begun}；请用 --output_dir {remedy}。")
        # All take over what the first one decided, so that they continue alike; checkpoints are hashed once.
        [first] = accelerate.utils.broadcast_object_list([vars(self)])
        vars(self).update(first)

    def compare(self, folder: Path, asked: Mapping[str, object]) -> None:
        """Keep what the run in `folder` has decided on and the command leaves open. Raises SystemExit where
        the run was begun with other settings."""
        old, settings = by_content(read_settings(folder)), by_content(self.settings)
        if "lora_rank" in old:
            old = ADDED | old
        # Planned anew, both could change the weights: other optimizers have other states than the checkpoint,
        # passes of other sizes round otherwise. Who gives --memory_gb asks for other passes.
        optimizer, batch_tokens = old.get("optimizer"), old.pop("batch_tokens", None)
        resumed_tokens = None if asked["memory_gb"] else batch_tokens
        self.resumed_plan = {"optimizer": optimizer, "batch_tokens": resumed_tokens}
        # Names that an older version noted may be gone: then what Trainer makes of them is compared.
        retired = values_of(asked, [name for name in old if name not in settings])
        now = retired | settings | {"optimizer": asked["optimizer"] or optimizer}
        refuse_changes(folder, old, now)

    def begin(self, optimizer: str, batch_tokens: int) -> None:
        """Delete the finished run that --overwrite_output_dir gives up, and note this run's settings.

        It is called late, when all that can go wrong before training has gone right. An unfinished run is
        continued even with the flag: it may be this command's own, interrupted.
        """
        if not accelerate.PartialState().is_main_process:
            return
        finished = self.folder / FINISHED_MARK
        if finished.exists():
            for checkpoint in checkpoints.folders(self.folder):
                shutil.rmtree(checkpoint)
            # Its mark goes last: without it, what a kill in between leaves would pass for a run to continue.
            finished.unlink()
        settings = self.settings | {"optimizer": optimizer, "batch_tokens": batch_tokens}
        with explain_failed_write(self.folder):
            write_atomically(self.folder / RUN_FILE, json.dumps(settings, ensure_ascii=False, indent=1))
        if self.checkpoint:  # its name may hold no number, where the user has renamed it
            print(f"resumed from step {Path(self.checkpoint).name.rpartition('-')[2]}", flush=True)

    @contextlib.contextmanager
    def finishing(self, state):
        """Mark the run as finished, with Trainer's `state`, when the results that are written inside are all
        there. A full disk is explained."""
        with explain_failed_write(self.folder):
            yield
            # With the mark nobody asks the checkpoints any more: the results come to the disk before it.
            for path in filter(Path.is_file, self.folder.glob("[!.]*")):
                checkpoints.flush_to_disk(path, like=self.folder / RUN_FILE)
            write_atomically(self.folder / FINISHED_MARK, json.dumps(asdict(state), indent=2))


# ---- who may write -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(folder: str, overwrite: bool, model_name: str, adapter: str | None = None):
    """Give the Run of a folder, which is this run's alone meanwhile: two in one would delete each other's
    checkpoints. The first process holds it for all. Raises SystemExit where another run has it, or
    refuse_folder does."""
    run = Run(folder)
    if not accelerate.PartialState().is_main_process:
        yield run
        return
    refuse_folder(run.folder, overwrite, model_name, adapter)
    owner = run.folder / OWNER
    who = owner.read_text(encoding="utf-8") if owner.is_file() else "刚刚开始"
    message = f"错误：另一个训练（{who}）正在写入 {folder}；请等它结束，或用 --output_dir 换一个文件夹。"
    # The system lets go of this lock when the process ends, however it ends. The owner's file, which outlives
    # kill -9, only says who it was: if it were the lock, the same command could not continue.
    with terminal.hold(run.folder / ".lock", message):
        # In a notebook a second Ctrl-C ends a run but not the process: its checkpoint may be hashed still.
        for thread in threading.enumerate():
            if isinstance(thread, checkpoints.Sealer):
                thread.join()
        with explain_failed_write(owner):
            write_atomically(owner, f"进程 {os.getpid()}，开始于 {time.strftime('%Y-%m-%d %H:%M:%S')}")
        try:
            yield run
        finally:
            with contextlib.suppress(OSError):
                owner.unlink()


def refuse_folder(folder: Path, overwrite: bool, model_name: str, adapter: str | None) -> None:
    """Raise SystemExit for a finished run, for a folder that holds anything else, such as a model, also the
    one, or the adapter, that is to be trained, and for one without permission."""
    for flag, source in {"model_name": model_name, "adapter": adapter}.items():
        if source and os.path.isdir(source) and Path(source).resolve().is_relative_to(folder.resolve()):
            where = f"--{flag} {source} 在 --output_dir {folder} 里"
            raise SystemExit(f"错误：{where}，训练会覆盖它；请用 --output_dir 换一个文件夹。")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Tried out, as permissions do not tell of a disk that is mounted read-only.
        checkpoints.seconds_to_save(folder, 1)
    except OSError as error:
        remedy = "请检查权限，或用 --output_dir 换位置"
        raise SystemExit(f"错误：无法写入 {folder}（{error.strerror}）；{remedy}。") from None
    finished = (folder / FINISHED_MARK).exists()
    # Hidden files are left by a start that came to nothing, such as a draft or the lock.
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if others and not finished and RUN_FILE not in others:
        remedy = "请用 --output_dir 指定一个新文件夹"
        raise SystemExit(f"错误：{folder} 里有别的文件（{others[0]} 等）；{remedy}。")
    # Where torchrun starts the command again, the finished run may be this command's own.
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if finished and (restarted or not overwrite):
        remedy = "另存请用 --output_dir 换一个文件夹；删掉它重新训练请加 --overwrite_output_dir"
        raise SystemExit(f"错误：{folder} 里已有训练完的模型。{remedy}。")


# ---- settings ----------------------------------------------------------------------------------------------


def settings_of(args, model_path: str, system_prompt: str, dtype: object) -> dict[str, object]:
    """Return the settings that decide the weights, {name: value} as JSON gives them back, with the SHA-256 of
    the data and of the base model in `model_path`."""
    settings = values_of(vars(args), SETTINGS + LORA_SETTINGS if args.trains_adapter else SETTINGS)
    # Checksums beside the names, under which another file or another revision of the model may lie tomorrow.
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
    """Return what was asked for under these names; of an enum its value, as that is what a file can hold."""
    return {name: getattr(asked.get(name), "value", asked.get(name)) for name in names}


def read_settings(folder: Path) -> dict[str, object]:
    """Return the settings of the run in `folder`; none, and a line that says so, where they cannot be
    read."""
    try:
        settings = {**json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        # Not refused: the checkpoints are there, and have checksums of their own.
        cause = terminal.first_line(error)
        print(f"{folder / RUN_FILE} 无法读取（{cause}），无法核对设置是否与原来相同。")
        return {}
    if "optimizer" in settings:
        settings["optimizer"] = RENAMED.get(settings["optimizer"], settings["optimizer"])
    return settings


def read_base_sha256(folder: Path) -> str | None:
    """Return the SHA-256 of the weights that the adapter in `folder` was trained on, by its run or else its
    card, as run.json is not uploaded; None, with a line that says so, for an adapter from elsewhere."""
    card, told = folder / "README.md", None
    if card.is_file() and not (folder / RUN_FILE).is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        told = re.search(rf"{checkpoints.BASE_SHA256} \| (\w+)", text)
    return told[1] if told else read_settings(folder).get("model_sha256")


def by_content(settings: Mapping[str, object]) -> dict[str, object]:
    """Return those of a run's settings that are compared, with checksums in place of names and paths."""
    compared = {}
    for name, value in settings.items():
        if name.endswith(" (sha256)") and name not in CONTENT.values():
            # Those of the data are called by the files, the training file first. It may be both.
            compared.setdefault("train_file (sha256)", value)
            compared["val_file (sha256)"] = value
        elif not settings.get(CONTENT.get(name)):
            compared[name] = value
    return compared


def refuse_changes(folder: Path, old: dict, now: dict) -> None:
    """Raise SystemExit when the run in `folder` was begun with `old` settings, other ones than `now`."""
    changes = {}
    for name, value in old.items():
        if value != now.get(name):
            changes[name] = f"{name} {str(value)[:80]} -> {str(now.get(name))[:80]}"
    if not changes:
        return
    what, how = "未完成的训练", "请用原来的设置继续"
    if changes == {"dtype": "dtype torch.float32 -> torch.float16"}:  # begun before float16 was used
        how = "请加 --fast_kernels false 继续"
    if list(changes) == ["examples_per_step"]:  # with more or fewer processes than before
        how = f"请用 --per_device_train_batch_size 让所有进程每步合计仍是 {old['examples_per_step']} 条"
    remedy = f"{how}，或用 --output_dir 换一个文件夹重新训练"
    if (folder / FINISHED_MARK).exists():
        flag = "--adapter" if "lora_rank" in old else "--model_name"
        what = "训练完的模型"
        remedy = f"它不能再继续，可以从它开始新的训练：{flag} {folder} --output_dir <新文件夹>"
    raise SystemExit(f"错误：{folder} 里{what}用的是别的设置：{'，'.join(changes.values())}；{remedy}。")


# ---- from where it goes on ---------------------------------------------------------------------------------


def choose_checkpoint(folder: Path, wanted: str | None) -> str | None:
    """Return the checkpoint to continue from: the `wanted` one, or the newest that is undamaged to the last
    bit and whose best one is, too; None to begin anew. Prints which were passed over and why. Raises
    SystemExit where it cannot be the `wanted` one."""
    if (folder / FINISHED_MARK).exists():
        if wanted:
            refuse_wanted(wanted, folder, "的训练已经完成")
        return None  # refuse_folder has seen that this run is given up
    own = checkpoints.folders(folder)
    if wanted:
        # It would take the other run's best weights for its own, and delete its checkpoints.
        if own and Path(wanted).resolve().parent != folder.resolve():
            refuse_wanted(wanted, folder, "有另一个未完成的训练")
        fault = find_fault(Path(wanted))
        if fault:
            remedy = "不写这个参数，就会从最近的完整检查点继续"
            what = f"--resume_from_checkpoint {wanted} 不是完整的检查点（{fault}）"
            raise SystemExit(f"错误：{what}；{remedy}。")
        return str(Path(wanted))
    for checkpoint in reversed(own):
        fault = find_fault(checkpoint)
        if not fault:
            return str(checkpoint)
        print(f"跳过 {checkpoint}：{fault}。")
    if own:
        print("没有可用的检查点，从头开始训练。")
    return None


def refuse_wanted(wanted: str, folder: Path, occupied: str) -> None:
    """Raise SystemExit for a checkpoint that is wanted where the folder is `occupied` by another training."""
    raise SystemExit(f"错误：{folder} 里{occupied}；要从 {wanted} 继续，请用 --output_dir 换一个新文件夹。")


def find_fault(checkpoint: Path) -> str | None:
    """Say why training cannot continue from `checkpoint` to the same weights, or return None."""
    # With hashes: from one flipped bit Trainer continues without an error, to other weights.
    damage = checkpoints.find_damage(checkpoint, hashes=True)
    if damage:
        return damage
    # Nor is it in the manifest: the best weights are kept alone.
    if not (checkpoint / checkpoints.OPTIMIZER).is_file():
        return "只有权重，不能从它继续"
    # Training ends with the weights of the best checkpoint, which may be an older one.
    state = json.loads((checkpoint / FINISHED_MARK).read_text(encoding="utf-8"))
    best = Path(state["best_model_checkpoint"] or checkpoint)
    moved = checkpoint.with_name(best.name)  # together with this one, since the state was written
    best = moved if moved.is_dir() else best
    if best != checkpoint and (damage := checkpoints.find_damage(best, hashes=True)):
        return f"到这一步为止最好的检查点 {best.name} {damage}"
    return None
