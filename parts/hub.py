"""ModelScope: what is asked for is downloaded whole or refused in one sentence; what an earlier command downloaded is
used again. Knows names and files, not what is in them."""

import json
import logging
import os
import re
import shlex
import tempfile
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from parts.checkpoints import ADAPTER_CONFIG
from parts.row_files import SUFFIXES
from parts.terminal import first_line, shorten

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
# Names that the client would write outside its folder, on one system or another.
LEAVES_FOLDER = re.compile(r"[/\\].*|[A-Za-z]:.*|(.*[/\\])?\.\.([/\\].*)?", re.DOTALL)
# Limits of the ModelScope client, which reads them at its import; the environment's go first. A hub that is silent or
# drips is given up after 50 s for its list of files (3 x 15 s), after 150 s for the files (6 x 20 s), pauses included.
LIMITS = {
    "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "3",
    "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "5",
    "MODELSCOPE_DOWNLOAD_TIMEOUT": "20",  # seconds without a byte
    "MODELSCOPE_DOWNLOAD_LOW_SPEED_WINDOW_SECONDS": "20",
    "MODELSCOPE_DOWNLOAD_MIN_BYTES_PER_SECOND": "10240",
    "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": "21600",  # seconds a file; an hour is short for 3.4 GB
}
CAUSES = {  # what the client's errors mean, the first that fits
    "FileIntegrityError": "内容与文件列表不符",
    "NotExistError": "没有这个名称、版本或文件",
    "PermissionDeniedError": "没有权限",
    "AuthenticationError": "没有权限",
    "JSONDecodeError": "回应不是文件列表",
    "TimeoutError": "超时",
    "ConnectionError": "连接失败",
    "ServerError": "服务器出错",
}
NOT_DOWNLOADED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf")  # other forms of weights
BESIDE_WEIGHTS = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


class Unreachable(SystemExit):
    """The hub gave no list of files, and nothing was written: what an earlier command downloaded is as it was."""


def describe_error(error: Exception) -> str:
    """What went wrong, in a few words and in the client's. It raises its own, requests' and OS errors alike."""
    file = ""
    if failed := getattr(error, "failed_files", None):
        file, error = next(iter(failed.items()))
    kinds = [kind.__name__ for kind in type(error).__mro__]
    words = [file, *[cause for kind, cause in CAUSES.items() if kind in kinds][:1]]
    return "：".join([*filter(None, words), shorten(first_line(error).rpartition("Caused by ")[2], 160)])


def list_files(api, name: str, kind: str, revision: str | None) -> dict[str, dict]:
    """{name: entry} of the files in a repository. Raises ValueError when one would be written outside its folder."""
    files = {file.path: file for file in api.list_repo_files(name, kind, revision=revision) if not file.is_dir}
    if not files:
        raise ValueError("文件列表是空的")
    if outside := [path for path in (revision or "", *files) if LEAVES_FOLDER.fullmatch(path)]:
        raise ValueError(f"{outside[0]} 会写到文件夹之外，已拒绝")
    # The client takes a size of 0 at its word, but here it may also be one that the list does not tell.
    return {path: {"Path": path, "Size": file.size or None, "Sha256": file.sha256} for path, file in files.items()}


def download(name: str, kind: str, remedy: str, choose, folder: str | None = None, revision: str | None = None):
    """(folder, names) of those files of a ModelScope repository that `choose` takes from all names.

    `kind` is "dataset" or "model"; without a `folder` they go into the client's cache. Raises SystemExit with one
    sentence, Unreachable when it failed before anything was written.
    """
    for limit, value in LIMITS.items():
        os.environ.setdefault(limit, value)
    from modelscope_hub import HubApi  # modelscope itself is a shim over it whose import pulls torch in: 3 s

    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)  # it tells of every retry
    api, files = HubApi(), None
    try:
        files = list_files(api, name, kind, revision)
        names = choose(list(files))
        entries = [files[path] for path in names]  # its own list, asked for anew, would not be the one checked here
        path = api.download_repo(name, kind, revision=revision, local_dir=folder, file_list=entries, max_workers=16)
        return Path(path), names
    except Exception as error:
        unreachable = files is None and (isinstance(error, OSError) or getattr(error, "retryable", False))
        raise (Unreachable if unreachable else SystemExit)(
            f"错误：无法从 {api.legacy.endpoint} 下载{'数据集' if kind == 'dataset' else '模型'} {name}"
            f"（{describe_error(error)}）；请检查名称和网络后重试同一命令，"
            f"或用环境变量 MODELSCOPE_ENDPOINT 换一个镜像，或{remedy}。"
        ) from None


def choose_data(dataset: str, names: list[str]) -> list[str]:
    """The data files among `names`; when there are several formats, those of one."""
    # Metadata that the hub keeps beside the data has these names.
    names = [name for name in sorted(names) if not Path(name).name.startswith(("dataset_info", "configuration"))]
    for suffix in SUFFIXES:
        if found := [name for name in names if name.lower().endswith(suffix)]:
            return found
    raise SystemExit(f"错误：数据集 {dataset} 里没有 .jsonl、.json、.csv 或 .parquet 文件；请用 --dataset 换一个。")


def download_dataset(dataset: str, revision: str | None) -> dict[str, bytes]:
    """{name: content} of the data files of a ModelScope data set, by name.

    Not through the client's cache: there it keeps, and would hand out, files that the hub has renamed or dropped since.
    """
    with tempfile.TemporaryDirectory() as folder:
        choose = partial(choose_data, dataset)
        path, names = download(dataset, "dataset", "用 --dataset 指定本地文件", choose, folder, revision)
        return {name: (path / name).read_bytes() for name in names}


def is_whole(folder: Path) -> bool:
    """Whether a downloaded model is complete: what belongs beside the weights, all weight files that the index names,
    each as long as its own header says, and no download that was cut off."""
    try:
        index = folder / "model.safetensors.index.json"
        names = json.loads(index.read_bytes())["weight_map"].values() if index.is_file() else ["model.safetensors"]
        for name in set(names):
            with safe_open(folder / name, "pt"):
                pass
        return all((folder / name).stat().st_size for name in BESIDE_WEIGHTS) and not any(folder.rglob("*.incomplete"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return False


def find_downloaded(name: str, revision: str | None) -> Path | None:
    """The folder of a model that an earlier command downloaded whole, in this revision; else None."""
    from modelscope_hub import HubApi, errors

    try:
        folder = HubApi().download_repo(name, "model", revision=revision or "master", local_files_only=True)
    except errors.CacheNotFound:
        return None
    # Older clients' folders do not tell the revision.
    known = revision is None or folder.parts[-2:] == ("snapshots", revision)
    return folder if known and is_whole(folder) else None


def find_model(name: str, remedy: str, revision: str | None = None) -> str:
    """A folder as it is; else the folder into which ModelScope's client downloads the model `name`. When the hub cannot
    be reached, what an earlier command downloaded whole."""
    if os.path.isdir(name):  # unlike Path.is_dir, False for a name too long for a folder
        if revision:
            raise SystemExit(f"错误：版本 {revision} 只用于 ModelScope 上的模型，而 {name} 是本地文件夹。")
        if Path(name, ADAPTER_CONFIG).is_file():
            raise SystemExit(
                f"错误：{name} 是 LoRA 适配器，不是完整的模型；"
                f"请先合并：python inference_lora.py --model_path {shlex.quote(name)} --merge_to output/merged"
            )
        return str(Path(name).resolve())
    if not HUB_ID.fullmatch(name) or name.startswith("output/"):
        raise SystemExit(
            f"错误：找不到模型 {name}：既不是已有的文件夹，也不是 ModelScope 模型名（形如 Qwen/Qwen3-1.7B）。"
        )
    try:
        return str(download(name, "model", remedy, choose_model, revision=revision)[0])
    except Unreachable:
        if not (folder := find_downloaded(name, revision)):
            raise
        print(f"提示：连不上 ModelScope，使用以前下载的模型 {name}：{folder}", flush=True)
        return str(folder)


def choose_model(names: list[str]) -> list[str]:
    """All files but weights in other forms than safetensors, which are neither needed nor safe to load."""
    return [name for name in names if not name.lower().endswith(NOT_DOWNLOADED)]
