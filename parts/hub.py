"""ModelScope, and Hugging Face where hf:// says so: what is asked for is downloaded whole or refused in one sentence;
what an earlier command downloaded is used again. Knows names and files, not what is in them."""

import os
import re
import shlex
from pathlib import Path

from safetensors import SafetensorError, safe_open

from parts import huggingface, modelscope
from parts.checkpoints import ADAPTER_CONFIG, weight_files
from parts.terminal import first_line, shorten

OWNED = r"[\w-][\w.-]*/[\w-][\w.-]*"  # owner/name
NAME = re.compile(rf"(?:(hf|ms)://(?=.))?({OWNED})(?:/(.+))?")  # a path after hf://, ms://
# Names that the client would write outside its folder, on one system or another.
LEAVES_FOLDER = re.compile(r"[/\\].*|[A-Za-z]:.*|(.*[/\\])?\.\.([/\\].*)?", re.DOTALL)
HUBS = {"hf": huggingface, "ms": modelscope}
CAUSES = {  # what the client's errors mean, the first that fits
    "FileIntegrityError": "内容与文件列表不符",
    "GatedRepoError": "没有权限：先在网页上同意它的条款，再用 hf auth login 登录",
    "RepositoryNotFoundError": "没有这个名称，或没有权限（先用 hf auth login 登录）",
    "LocalEntryNotFoundError": "连接失败或服务器出错",  # one of the next kind too
    "TimeoutException": "超时",
    "TransportError": "连接失败",
    "OfflineModeIsEnabled": "连接失败",
    **dict.fromkeys(("RevisionNotFoundError", "EntryNotFoundError", "NotExistError"), "没有这个名称、版本或文件"),
    "PermissionDeniedError": "没有权限",
    "AuthenticationError": "没有权限",
    "AlreadyExistsError": "已有这个名称，而且不是你能看到的",
    "JSONDecodeError": "回应不是文件列表",
    "TimeoutError": "超时",
    "ConnectionError": "连接失败",
    "ServerError": "服务器出错",
}
NOT_DOWNLOADED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf")  # other forms of weights
BESIDE_WEIGHTS = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


class Unreachable(SystemExit):
    """The hub gave no list of files, and nothing was written: what an earlier command downloaded is as it was."""


def split(name: str) -> tuple[str, str, str] | None:
    """("hf" or "ms", owner/name, path inside or "") of a name on a hub; else None."""
    found = NAME.fullmatch(name)
    return (found[1] or "ms", found[2], found[3] or "") if found and (found[1] or not found[3]) else None


def forms(text: str) -> str:
    """How to write the name of something on a hub, where an address was meant."""
    return "hub 上的请写 hf://owner/name（Hugging Face）或 ms://owner/name（ModelScope）。" if ":/" in text else ""


def is_name(text: str) -> bool:
    return split(text) is not None


def kinds_of(error: Exception) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def status_of(error: Exception) -> int:
    return getattr(getattr(error, "response", None), "status_code", 0)


def describe_error(error: Exception) -> str:
    """What went wrong, in a few words and in the client's. It raises its own, requests' and OS errors alike."""
    file = ""
    if failed := getattr(error, "failed_files", None):
        file, error = next(iter(failed.items()))
    kinds, code = kinds_of(error), status_of(error)
    words = [file, *[cause for kind, cause in CAUSES.items() if kind in kinds][:1]]
    if not words[1:] and code >= 400:
        told = {401: "没有权限", 403: "没有权限", 404: "没有这个名称、版本或文件", 429: "请求太多"}
        words.append(told.get(code, "服务器出错" if code >= 500 else "被拒绝"))
    return "：".join([*filter(None, words), shorten(first_line(error).rpartition("Caused by ")[2], 160)])


def check_paths(files, revision: str | None) -> None:
    """Raises ValueError when there is none, or one would be written outside its folder."""
    if not files:
        raise ValueError("文件列表是空的")
    if outside := [path for path in (revision or "", *files) if LEAVES_FOLDER.fullmatch(path)]:
        raise ValueError(f"{outside[0]} 会写到文件夹之外，已拒绝")


def download(name: str, kind: str, remedy: str, choose, folder: str | None = None, revision: str | None = None):
    """(folder, names) of those files of a repository that `choose` takes from all names.

    `kind` is "dataset" or "model"; without a `folder` they go into the client's cache. Raises SystemExit with one
    sentence, Unreachable when it failed before anything was written.
    """
    scheme, repository, _ = split(name)
    hub, files = HUBS[scheme], None
    api, endpoint = hub.open_api()
    try:
        commit, files = hub.list_files(api, repository, kind, revision)
        check_paths(files, revision)
        names = choose(list(files))
        chosen = {path: files[path] for path in names}
        return hub.fetch(api, repository, kind, revision, commit, chosen, folder), names
    except Exception as error:
        kinds, code = kinds_of(error), status_of(error) if hub is huggingface else 0
        gone = (isinstance(error, OSError) or "TransportError" in kinds) and not 400 <= code < 429
        unreachable = files is None and (gone or getattr(error, "retryable", False))
        raise (Unreachable if unreachable else SystemExit)(
            f"错误：无法从 {endpoint} 下载{'数据集' if kind == 'dataset' else '模型'} {name}"
            f"（{describe_error(error)}）；请检查名称和网络后重试同一命令，"
            f"或用环境变量 {hub.VARIABLE} 换一个镜像，或{remedy}。"
        ) from None


def is_whole(folder: Path) -> bool:
    """Whether a downloaded model is complete: what belongs beside the weights, all weight files that the index names,
    each as long as its own header says, and no download that was cut off."""
    try:
        for name in weight_files(folder):
            with safe_open(folder / name, "pt"):
                pass
        return all((folder / name).stat().st_size for name in BESIDE_WEIGHTS) and not any(folder.rglob("*.incomplete"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return False


def find_downloaded(name: str, revision: str | None) -> Path | None:
    """The folder of a model that an earlier command downloaded whole, in this revision; else None."""
    scheme, repository, _ = split(name)
    folder = HUBS[scheme].find(repository, revision)
    return folder if folder and is_whole(folder) else None


def find_model(name: str, remedy: str, revision: str | None = None) -> str:
    """A folder as it is; else the folder into which ModelScope's client downloads the model `name`. When the hub cannot
    be reached, what an earlier command downloaded whole."""
    if os.path.isdir(name):  # unlike Path.is_dir, False for a name too long for a folder
        if revision:
            raise SystemExit(f"错误：版本 {revision} 只用于 hub 上的模型，而 {name} 是本地文件夹。")
        if Path(name, ADAPTER_CONFIG).is_file():
            raise SystemExit(
                f"错误：{name} 是 LoRA 适配器，不是完整的模型；"
                f"请先合并：python inference_lora.py --model_path {shlex.quote(name)} --merge_to output/merged"
            )
        if is_name(name) and not any(Path(name).glob("*.safetensors")):
            raise SystemExit(
                f"错误：./{name} 是这里的一个文件夹，但不完整（缺少 .safetensors 权重）；"
                "要下载同名的模型，请先移走或改名；要用这个文件夹，请补全它。"
            )
        return str(Path(name).resolve())
    if not (found := split(name)) or found[2] or name.startswith("output/"):
        raise SystemExit(
            f"错误：找不到模型 {name}：既不是已有的文件夹，也不是 ModelScope 模型名（形如 Qwen/Qwen3-1.7B）。"
            f"{forms(name)}"
        )
    try:
        return str(download(name, "model", remedy, choose_model, revision=revision)[0])
    except Unreachable:
        if not (folder := find_downloaded(name, revision)):
            raise
        print(
            f"提示：连不上 {HUBS[found[0]].NAME}，使用以前下载的模型 {name}：{folder}",
            flush=True,
        )
        return str(folder)


def choose_model(names: list[str]) -> list[str]:
    """All files but weights in other forms than safetensors, which are neither needed nor safe to load."""
    return [name for name in names if not name.lower().endswith(NOT_DOWNLOADED)]
