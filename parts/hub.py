"""ModelScope, and Hugging Face where hf:// says so, each through its own client: what is asked for is
downloaded or refused in one sentence. Knows names and files, not what is in them, but for the card that says
which file of a data set is which."""

import glob
import logging
import os
import posixpath
import re
from pathlib import Path
from typing import NamedTuple

from parts.terminal import first_line, shorten

CONFIG = "config.json"  # of a model
CARD = "README.md"  # of a data set
# owner/name, perhaps with a hub before it, hf:// or ms://, and a path of it behind.
NAME = re.compile(r"(?:(hf|ms)://(?=.))?([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+))?")
# Names that a client would write outside its folder, on one system or another.
LEAVES_FOLDER = re.compile(r"[/\\].*|[A-Za-z]:.*|(.*[/\\])?\.\.([/\\].*)?", re.DOTALL)
# Limits of the ModelScope client, which reads them at its import; the environment's go first. A hub that is
# silent or drips is given up after 50 s for its list of files (3 x 15 s), after 150 s for the files
# (6 x 20 s), pauses included.
LIMITS = {
    "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "3",
    "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "5",
    "MODELSCOPE_DOWNLOAD_TIMEOUT": "20",  # seconds without a byte
    "MODELSCOPE_DOWNLOAD_LOW_SPEED_WINDOW_SECONDS": "20",
    "MODELSCOPE_DOWNLOAD_MIN_BYTES_PER_SECOND": "10240",
    "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": "21600",  # seconds a file; an hour is short for 3.4 GB
}
NOT_REACHED = "连不上，或服务器出错"
# To those who may not see it a hub does not tell whether a name is there.
NOT_ALLOWED = "没有这个名称，或没有权限：私有的需要先登录，令牌要有效，有使用条款的需要先在网页上同意"
STATUS_MEANINGS = {401: NOT_ALLOWED, 403: NOT_ALLOWED, 404: "没有这个名称、版本或文件", 429: NOT_REACHED}
NETWORK_LIBRARIES = ("requests", "urllib3", "httpx", "httpx2", "httpcore")  # one of them is under each client
# What no retry mends, by an error's class and words: what it means, and what mends it. The last is of names,
# and of addresses, proxies and tokens in the environment.
WRONG = "名称或环境变量写错了", "请按下面的报错改正名称，或地址、代理、令牌的环境变量（{variable} 等）"
SETTINGS = {
    "offline mode is enabled": ("连不上：要求离线", "请去掉环境变量 HF_HUB_OFFLINE、TRANSFORMERS_OFFLINE"),
    "(Using|dependencies for) SOCKS": ("连不上：缺少 socks 代理要的库", "请 pip install socksio pysocks"),
    "CERTIFICATE_": ("连不上：证书不对", "请校准时间；公司证书用 SSL_CERT_FILE、REQUESTS_CA_BUNDLE 指定"),
    "^(Invalid[USPH]|MissingS|UnsupportedP|LocalP|HFValidation|UnicodeE|ValueE|ImportE)": WRONG,
}


class HubName(NamedTuple):
    """The name of something on a hub."""

    scheme: str  # of HUBS
    repository: str  # owner/name
    inside: str  # a file or a folder of it, or ""


class Unreachable(SystemExit):
    """The hub gave no list of files, and nothing was written: an earlier command's download is as it was."""


class ModelScope:
    """ModelScope's client, which checks the size and the SHA-256 of each file against the hub's list."""

    title, variable, cache = "ModelScope", "MODELSCOPE_ENDPOINT", "MODELSCOPE_CACHE"

    def __init__(self):
        for limit, value in LIMITS.items():
            os.environ.setdefault(limit, value)
        # modelscope itself is a shim over this whose import pulls torch in: 3 s.
        from modelscope_hub import HubApi

        self.api = HubApi()
        self.endpoint = self.api.legacy.endpoint

    def list_files(self, repository: str, kind: str, revision: str | None) -> dict[str, dict]:
        """Return {path: what `download` wants to know of the file}."""
        files = {}
        for file in self.api.list_repo_files(repository, kind, revision=revision):
            if not file.is_dir:
                # The client takes a size of 0 at its word, but a list may also not tell the size.
                files[file.path] = {"Path": file.path, "Size": file.size or None, "Sha256": file.sha256}
        return files

    def download(self, repository: str, kind: str, revision: str | None, files: dict, folder: str | None):
        """Returns the folder of these files: in the client's cache without a `folder`."""
        # A list that the client asked for anew would not be the one that was checked.
        options = {"file_list": list(files.values()), "local_dir": folder, "max_workers": 16}
        return self.api.download_repo(repository, kind, revision=revision, **options)

    def find(self, repository: str, revision: str | None) -> Path | None:
        """Return the folder of a model in the cache, whole or not."""
        from modelscope_hub.errors import CacheNotFound

        try:
            options = {"revision": revision or "master", "local_files_only": True}
            folder = self.api.download_repo(repository, "model", **options)
        except CacheNotFound:
            return None
        # The folders of older clients do not tell the revision.
        return folder if revision is None or folder.parts[-2:] == ("snapshots", revision) else None


class HuggingFace:
    """Hugging Face's client, with the same methods. It checks the size of each file, and its content only
    where Xet brings it: a mirror's file of the right size with other bytes is not noticed here."""

    title, variable, cache = "Hugging Face", "HF_ENDPOINT", "HF_HOME、HF_HUB_CACHE"

    def __init__(self):
        from huggingface_hub import HfApi

        self.api = HfApi(endpoint=os.environ.get(self.variable, "").rstrip("/") or None)
        self.endpoint = self.api.endpoint

    def list_files(self, repository: str, kind: str, revision: str | None) -> dict[str, None]:
        # One try, where the client's list_repo_files would ask a hub that is down for 23 s.
        info = self.api.repo_info(repository, repo_type=kind, revision=revision, timeout=20)
        return dict.fromkeys(file.rfilename for file in info.siblings or [])

    def download(self, repository: str, kind: str, revision: str | None, files: dict, folder: str | None):
        options = {"allow_patterns": [glob.escape(path) for path in files], "local_dir": folder}
        return self.api.snapshot_download(repository, repo_type=kind, revision=revision, **options)

    def find(self, repository: str, revision: str | None) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        for file in (CONFIG, "adapter_config.json"):
            path = try_to_load_from_cache(repository, file, revision=revision)
            if isinstance(path, str):
                return Path(path).parent
        return None


HUBS = {"ms": ModelScope, "hf": HuggingFace}


def split(name: str) -> HubName | None:
    """Return the parts of a name on a hub: owner/name, which is ModelScope's, or ms:// or hf:// before it,
    and then perhaps a path behind it; None for anything else."""
    match = NAME.fullmatch(name)
    if not match or match[3] and not match[1]:
        return None
    return HubName(match[1] or "ms", match[2], match[3] or "")


def forms(text: str) -> str:
    """Return how to write the name of something on a hub where `text` looks like an address, else ""."""
    if ":/" not in text:
        return ""
    return "hub 上的请写 hf://owner/name（Hugging Face）或 ms://owner/name（ModelScope）。"


def read_card(card: Path, names: list[str]) -> tuple[dict[str, list[tuple[str, str]]], str | None]:
    """Return ({configuration: [(what tells a file's split, the file)]}, the default one) of the card of a
    data set that has these `names`. The default of none is "", that of several may be None. It raises what
    yaml and datasets do, and FileNotFoundError for a file that the hub does not have."""
    from huggingface_hub import DatasetCard

    data = DatasetCard.load(card).data
    if not data.get("configs"):
        return {}, ""
    # Not in its documentation; tried with datasets 5.2. The import takes seconds.
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from fsspec.utils import glob_translate  # whose rules datasets' patterns have

    configs = MetadataConfigs.from_dataset_card_data(data)
    told: dict[str, list[tuple[str, str]]] = {config: [] for config in configs}
    for config, parameters in configs.items():
        data_files = parameters.get("data_files") or "**"
        for split, patterns in sanitize_patterns(data_files).items():
            for pattern in patterns:
                path = posixpath.normpath(posixpath.join(parameters.get("data_dir") or "", pattern))
                matching = [name for name in names if re.fullmatch(glob_translate(path), name)]
                if not matching and not glob.has_magic(path):
                    raise FileNotFoundError(f"里面的 {path} 不在 hub 上")
                # Without splits in the card all would be "train": then the names tell.
                has_splits = isinstance(data_files[0], dict)
                told[config] += [(split if has_splits else f"{config}/{name}", name) for name in matching]
    return told, configs.get_default_config_name()


def find_cause(error: Exception) -> tuple[str, str, Exception]:
    """Return what an error of a client means in the user's words, what mends it unless trying again may, and
    the one among its causes that tells it: an answer's status tells most, and the library that it comes from
    whether the network failed."""
    # Clients wrap what happened in errors of their own, whose words tell less.
    link = error
    while link:
        # ModelScope's client has the status on its own errors, Hugging Face's on the answer that it keeps.
        answer = getattr(link, "response", None)
        status = getattr(link, "status_code", None) or getattr(answer, "status_code", 0)
        library = type(link).__module__.partition(".")[0]
        if status in STATUS_MEANINGS:
            return STATUS_MEANINGS[status], "", link
        # ModelScope's code for it, and how Hugging Face's sentence begins.
        if getattr(link, "error_code", "") == "E2020" or str(link).startswith("Consistency check failed"):
            return "内容与文件列表不符", "", link
        for pattern, (meaning, remedy) in SETTINGS.items():
            if re.search(pattern, f"{type(link).__name__}: {link}"):
                return meaning, remedy, link
        if status >= 500 or library in NETWORK_LIBRARIES or isinstance(link, ConnectionError | TimeoutError):
            return NOT_REACHED, "", link
        if isinstance(link, OSError) and link.errno:  # of a disk: the network's come from its libraries
            return "写不了文件", "请用环境变量 {cache}（数据集还有 TMPDIR）换到能写、空间够的位置", link
        link = link.__cause__
    return "出错", "", error


def refuse_outside(name: str, paths) -> None:
    """Raises SystemExit when one of these paths, or a revision, would be written outside the client's
    folder."""
    for path in paths:
        if LEAVES_FOLDER.fullmatch(path):
            raise SystemExit(f"错误：{name} 的 {path} 会写到文件夹之外，什么都没有下载；请换一个。")


def download(name: str, kind: str, remedy: str, choose, folder=None, revision: str | None = None):
    """Download those files of a repository that `choose(names, fetch)` takes from all names; return (folder,
    what it took).

    `kind` is "dataset" or "model"; without a `folder` they go into the client's cache. `choose` may raise
    SystemExit; `fetch(name)` downloads one file before all else, and returns its path. `remedy` is what else
    could be done where the download fails. Raises SystemExit with one sentence, Unreachable when nothing was
    written yet.
    """
    refuse_outside(name, [revision or ""])
    scheme, repository, _ = split(name)
    hub, files = HUBS[scheme](), None
    for library in ("modelscope_hub", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # they tell of every retry
    print(f"正在连接 {hub.endpoint}……", flush=True)

    def fetch(path: str) -> Path:
        return Path(hub.download(repository, kind, revision, {path: files[path]}, folder), path)

    try:
        files = hub.list_files(repository, kind, revision)
        if not files:
            raise SystemExit(f"错误：{name} 的文件列表是空的；请换一个。")
        refuse_outside(name, files)
        taken = choose(list(files), fetch)
        chosen = {path: files[path] for path in taken}
        return Path(hub.download(repository, kind, revision, chosen, folder)), taken
    except Exception as error:
        # ModelScope's client tells of each file that failed: the first is enough.
        failures = getattr(error, "failed_files", None) or {"": error}
        path, error = next(iter(failures.items()))
        meaning, advice, cause = find_cause(error)
        # Once there is a list, an earlier download may be of another version than what has come by now.
        ending = Unreachable if files is None and meaning.startswith("连不上") else SystemExit
        noun = "数据集" if kind == "dataset" else "模型"
        advice = advice or "请检查名称和网络后重试同一命令，或用环境变量 {variable} 换一个镜像，或{remedy}"
        advice = advice.format(variable=hub.variable, cache=hub.cache, remedy=remedy)
        # urllib3 names the pool, the address and the retries before what happened.
        details = shorten(f"{path} {first_line(cause).rpartition('Caused by ')[2]}", 160)
        refusal = f"错误：无法从 {hub.endpoint} 下载{noun} {name}（{meaning}）；{advice}。"
        raise ending(f"{refusal}{hub.title} 客户端的报错：{details}") from None
