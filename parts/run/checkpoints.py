"""A checkpoint: whole or damaged, sealed with a manifest, found again, and whether the disk has room for it. Knows the
files of an output folder, not the training that writes them; imports no heavy library."""

import json
import os
import shutil
import sys
import threading
from pathlib import Path

from parts.terminal import first_line, sha256

ADAPTER_CONFIG = "adapter_config.json"  # peft's, and the next one
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FINISHED_MARK = (
    "trainer_state.json"  # Trainer's state: in each checkpoint, and in the folder once all else is written
)
RUN_FILE = "run.json"  # written into the output folder first: the settings of the run
MANIFEST = "manifest.json"  # written into a checkpoint last: {file: [bytes, sha256]}


def weight_files(folder: Path) -> list[str]:
    """The names of a model's safetensors files: those that the index names, where there is one."""
    index = folder / "model.safetensors.index.json"
    names = (
        json.loads(index.read_bytes())["weight_map"].values() if index.is_file() else ["model.safetensors"]
    )
    return sorted(set(names))


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of a model's safetensors files, by name (Qwen3-1.7B: 2 s)."""
    return sha256(*sorted(Path(folder).glob("*.safetensors")))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def folders(folder: str | Path) -> list[Path]:
    """All of a run's checkpoint-N below `folder`, whole or not, oldest first."""
    found = [
        path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()
    ]
    return sorted(found, key=step_of)


def find_damage(checkpoint: Path, hashes: bool) -> str | None:
    """In what a checkpoint differs from the one that was written, or None: a file that is missing or of another size,
    with `hashes` also of other content (10 GB take 6 s), or no manifest, which is written when all else is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, digest) in manifest.items():
            path = checkpoint / name
            if not path.is_file():
                return f"缺少 {name}"
            if path.stat().st_size != size or hashes and sha256(path) != digest:
                return f"{name} 与 {MANIFEST} 不符"
    except FileNotFoundError:
        return f"没有写完（缺少 {MANIFEST}）"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST} 或它所列的文件无法读取（{first_line(error)}）"
    return None if FINISHED_MARK in manifest else f"{MANIFEST} 不完整"


def find_whole(folder: str | Path) -> list[Path]:
    """The checkpoints of a run that are whole, going by the sizes of their files, oldest first."""
    return [path for path in folders(folder) if find_damage(path, hashes=False) is None]


def holds_model(folder: Path) -> bool:
    """Whether a model or an adapter lies in the folder itself."""
    return any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def find_trained(folder: str | Path) -> Path:
    """The best weights below `folder`, a model's or an adapter's: the folder itself once training is finished (or when
    it is any saved model), else the checkpoint with the best evaluation loss so far, else the newest one. Raises
    SystemExit without any."""
    folder = Path(folder)
    checkpoints = [path for path in find_whole(folder) if holds_model(path)]
    unfinished = checkpoints or (folder / RUN_FILE).is_file()  # what lies beside it may be cut off
    if holds_model(folder) and ((folder / FINISHED_MARK).is_file() or not unfinished):
        return folder
    if not checkpoints:
        remedy = "请先运行 python train.py（LoRA：python train_lora.py），或用 --model_path 指定模型的文件夹"
        raise SystemExit(f"错误：{folder} 里没有训练好的模型；{remedy}。")
    try:
        state = json.loads((checkpoints[-1] / FINISHED_MARK).read_text(encoding="utf-8"))
        best = Path(folder, Path(state["best_model_checkpoint"]).name)
    except (OSError, ValueError, KeyError, TypeError):  # no evaluation yet, or killed while writing
        best = None
    return best if best in checkpoints else checkpoints[-1]


def holds_adapter(folder: str | Path) -> bool:
    """Whether what was trained there is an adapter, going by the folder itself and by the newest checkpoint in it."""
    return any(Path(path, ADAPTER_CONFIG).is_file() for path in (folder, *find_whole(folder)[-1:]))


def write_at_once(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whenever the process or the power ends."""
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def check_space(folder: str | Path, count: int, size: float, weights: float) -> None:
    """Raises SystemExit when the disk will not hold `count` checkpoints of `size` bytes and the final weights, in bytes
    too; what is in the folder already is part of them."""
    there = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    need, free = count * size + weights - there, shutil.disk_usage(folder).free
    if need > free:
        space = f"剩余 {free / 1e9:.2f} GB，{count} 个检查点和最后的权重还需要约 {need / 1e9:.2f} GB"
        raise SystemExit(f"错误：{folder} 所在的磁盘{space}；请腾出空间，或用 --output_dir 换到别的磁盘。")


class Sealer(threading.Thread):
    """Sees a checkpoint that was just written to the disk, writes its manifest, and only then deletes older ones.

    A thread of its own: hashing 10 GB takes 6 s, in which the GPU trains on. The next save and the end of training
    wait for it. Killed before its end, the checkpoint does not count and the older ones are still there.
    """

    def __init__(self, checkpoint: Path, best: str | None, limit: int | None):
        super().__init__(daemon=True)  # a second Ctrl-C does not wait for it
        self.checkpoint, self.error = checkpoint, None
        self.kept = {checkpoint, checkpoint.with_name(Path(best or checkpoint).name)}
        self.limit = limit if limit and limit > 0 else sys.maxsize
        self.start()

    def run(self) -> None:
        try:
            manifest = {}
            for path in sorted(path for path in self.checkpoint.rglob("*") if path.is_file()):
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
                manifest[path.relative_to(self.checkpoint).as_posix()] = path.stat().st_size, sha256(path)
            write_at_once(self.checkpoint / MANIFEST, json.dumps(manifest, indent=1))
            self.sweep()
        except Exception as error:  # to be raised where it is waited for
            self.error = error

    def sweep(self) -> None:
        """Delete what an interrupted save left, and the oldest checkpoints beyond the limit."""
        folder = self.checkpoint.parent
        whole = [path for path in find_whole(folder) if path not in self.kept]
        surplus = whole[: max(0, len(whole) - max(0, self.limit - len(self.kept)))]
        cut_off = set(folders(folder)) - set(whole) - self.kept
        for path in (*cut_off, *surplus):
            shutil.rmtree(path, ignore_errors=True)
