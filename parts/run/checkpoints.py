"""A checkpoint: undamaged or not, sealed with a manifest, found again, and whether the disk has room for it.
It knows the files of an output folder, not the training that writes them, and imports no heavy library."""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from parts.terminal import first_line, sha256

ADAPTER_CONFIG = "adapter_config.json"  # peft's, and the next one
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Trainer's state lies in every checkpoint. In the output folder itself it is written last, and so marks the
# run as finished.
FINISHED_MARK = "trainer_state.json"
# The settings of a run, written before its first checkpoint: who continues one is compared with them.
RUN_FILE = "run.json"
BASE_SHA256 = "基础权重的 SHA-256"  # a row of the model card, which travels where run.json does not
# {file: [bytes, sha256]} of a checkpoint, written into it last: one without it was cut off.
MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.pt"  # of a checkpoint from which a training can go on


def weight_files(folder: Path) -> list[str]:
    """Return the names of a model's safetensors files: those that the index names, where there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))


def weights_sha256(folder: str | Path) -> str:
    """Return the SHA-256 of a model's safetensors files, sorted by name (Qwen3-1.7B: 2 s)."""
    return sha256(*sorted(Path(folder).glob("*.safetensors")))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def folders(folder: str | Path) -> list[Path]:
    """Return all of a run's checkpoint-N in `folder`, damaged ones too, oldest first."""
    numbered = []
    for path in Path(folder).glob("checkpoint-*"):
        # A copy of the user's, such as checkpoint-best, is not the run's to continue from or to delete.
        if path.name.removeprefix("checkpoint-").isdecimal() and path.is_dir():
            numbered.append(path)
    # By number, as checkpoint-1000 is sorted before checkpoint-500 by name.
    return sorted(numbered, key=step_of)


def files_in(folder: str | Path) -> list[Path]:
    """Return all files in `folder` and below it."""
    return sorted(filter(Path.is_file, Path(folder).rglob("*")))


def find_damage(checkpoint: Path, hashes: bool) -> str | None:
    """Say in what a checkpoint differs from the one that was written, or return None. Files are missing or of
    another size; with `hashes` (10 GB take 6 s) also of other content; or there is no manifest."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, digest) in manifest.items():
            path = checkpoint / name
            if not path.is_file():
                return f"缺少 {name}"
            if path.stat().st_size != size or (hashes and sha256(path) != digest):
                return f"{name} 与 {MANIFEST} 不符"
    except FileNotFoundError:
        return f"没有写完（缺少 {MANIFEST}）"
    # The manifest may be damaged itself: no UTF-8, no JSON, or JSON that is no table of pairs.
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST} 或它所列的文件无法读取（{first_line(error)}）"
    # Trainer's state is in every checkpoint: a table without it, such as an empty one, vouches for nothing.
    return None if FINISHED_MARK in manifest else f"{MANIFEST} 不完整"


def find_intact(folder: str | Path) -> list[Path]:
    """Return the checkpoints of a run whose files are all there and of the right size, oldest first. Their
    content is not read: this is asked at each save, and a file that was cut off shows by its size."""
    return [path for path in folders(folder) if find_damage(path, hashes=False) is None]


def holds_model(folder: Path) -> bool:
    """Tell whether a model or an adapter lies in the folder itself."""
    return (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()


def find_trained(folder: str | Path) -> Path:
    """Return where the best weights of `folder` are, a model's or an adapter's: the folder itself once
    training is finished (or when it is any saved model), else the checkpoint with the best evaluation loss so
    far, else the newest one. Raises SystemExit without any."""
    folder = Path(folder)
    checkpoints = list(filter(holds_model, find_intact(folder)))
    # A kill while the final weights are written leaves what looks like a model. In the folder of a run only
    # the mark, which comes after them, says that they are complete.
    is_run = checkpoints or (folder / RUN_FILE).is_file()
    if holds_model(folder) and ((folder / FINISHED_MARK).is_file() or not is_run):
        return folder
    if not checkpoints:
        remedy = "请先运行 python train.py（LoRA：python train_lora.py），或用 --model_path 指定模型的文件夹"
        raise SystemExit(f"错误：{folder} 里没有训练好的模型；{remedy}。")
    try:
        state = json.loads((checkpoints[-1] / FINISHED_MARK).read_text(encoding="utf-8"))
        # By its name in this folder: the state has the path of then, and a run may have been moved since.
        best = Path(folder, Path(state["best_model_checkpoint"]).name)
    # There was no evaluation yet, or the content is damaged, which sizes do not show.
    except (OSError, ValueError, KeyError, TypeError):
        best = None
    return best if best in checkpoints else checkpoints[-1]


def holds_adapter(folder: str | Path) -> bool:
    """Tell whether what was trained in `folder` is an adapter, by the folder and by its newest checkpoint."""
    newest = find_intact(folder)[-1:]
    return any(Path(path, ADAPTER_CONFIG).is_file() for path in (folder, *newest))


def flush_to_disk(path: Path, like: Path) -> None:
    """Bring a file from the system's memory to the disk, where it stays when the power ends, and let those
    read it who may read the file `like`."""
    # safetensors writes into a temporary file, which its owner alone may read whatever the umask is.
    shutil.copymode(like, path)
    with path.open("rb+") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there with all of `text` or not at all, whenever the process or the power ends."""
    # In the same folder, as a rename is atomic only inside one file system.
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()  # fsync knows only what Python has handed over
        # Before the rename: a file system may store the new name first, and the power end in between.
        os.fsync(file.fileno())
    os.replace(draft, path)  # os.rename would fail on Windows where `path` exists


def check_space(folder: str | Path, count: int, size: float, weights: float) -> None:
    """Raise SystemExit when the disk will not hold `count` checkpoints of `size` bytes and the final
    `weights`, in bytes too; what is in the folder already is part of them."""
    existing = sum(path.stat().st_size for path in files_in(folder))
    need = count * size + weights - existing
    free = shutil.disk_usage(folder).free
    if need > free:
        space = f"剩余 {free / 1e9:.2f} GB，{count} 个检查点和最后的权重还需要约 {need / 1e9:.2f} GB"
        raise SystemExit(f"错误：{folder} 所在的磁盘{space}；请腾出空间，或用 --output_dir 换到别的磁盘。")


def seconds_to_save(folder: str | Path, size: float) -> float:
    """Estimate how long it takes to save `size` bytes on the disk of `folder`, of which at most 200 MB are
    tried: twice as long as writing them, as they are also copied and hashed."""
    tried = os.urandom(1 << 20) * int(min(size, 200e6) / (1 << 20) + 1)  # which no disk compresses
    begun = time.perf_counter()
    with tempfile.NamedTemporaryFile(prefix=".write_test", dir=folder) as file:
        file.write(tried)
        file.flush()
        os.fsync(file.fileno())
    return 2 * (time.perf_counter() - begun) * size / len(tried)


class Sealer(threading.Thread):
    """Brings checkpoints that were just written to the disk, writes their manifests in this order, and only
    then deletes older ones: however this ends, an undamaged checkpoint is there.

    It is a thread of its own, as hashing 10 GB takes 6 s, in which the GPU trains on. The next save and the
    end of training wait for it. `best` is never deleted: training ends with its weights. `limit` says how
    many stay, the newest and the best included; None and 0 stand for all.
    """

    def __init__(self, written: list[Path], best: str | None, limit: int | None):
        # A daemon: at its end Python waits for other threads, and a second Ctrl-C is to end all at once.
        super().__init__(daemon=True)
        self.written, self.checkpoint, self.error = written, written[-1], None
        self.protected = {self.checkpoint, self.checkpoint.with_name(Path(best or self.checkpoint).name)}
        self.limit = limit if limit and limit > 0 else sys.maxsize
        self.start()

    def run(self) -> None:
        try:
            for folder in self.written:
                manifest = {}
                for path in files_in(folder):
                    # Trainer syncs nothing. Older ones are deleted soon, and the power may end after that.
                    flush_to_disk(path, like=folder / FINISHED_MARK)
                    manifest[path.relative_to(folder).as_posix()] = path.stat().st_size, sha256(path)
                # The manifest vouches for all other files, so it is the last one. Its folder is not synced:
                # until the rename is on the disk the checkpoint does not count, and file systems with a
                # journal store it before the deletions that follow.
                write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))
            self.sweep()
        # An error would end this thread alone: the main one raises it when it waits for the manifest.
        except Exception as error:
            self.error = error
        self.ended = time.perf_counter()

    def sweep(self) -> None:
        """Delete what an interrupted save left, and the oldest checkpoints beyond the limit."""
        folder = self.checkpoint.parent
        # Weights alone, as the best may be, do not count: they are small, and nothing goes on from them.
        whole = [path for path in find_intact(folder) if (path / OPTIMIZER).is_file()]
        others = [path for path in whole if path not in self.protected]
        # Those that a kill cut off, too. They would take the room of one that counts.
        useless = set(folders(folder)) - set(whole) - self.protected
        room = max(0, self.limit - (len(whole) - len(others)))
        surplus = others[: max(0, len(others) - room)]
        for path in (*useless, *surplus):
            # What stays for now lacks files, so it counts as damaged, and the next sweep takes it.
            shutil.rmtree(path, ignore_errors=True)
