"""What of a finished output folder goes to a hub: chosen from a list of names, checked and shown before any of it is
sent. Checkpoints, optimizer states and the run's own records never are in the list. Knows files, no model.

A command of its own after training and no flag of it: the result is safe on the disk before the first byte leaves, what
failed is tried again by the same command, and any finished folder, a merged one too, goes the same way."""

import argparse
import json
import re
import shlex
from pathlib import Path

from safetensors import SafetensorError, safe_open

from parts import hub, modelscope
from parts.checkpoints import ADAPTER_CONFIG, FINISHED_MARK, RUN_FILE, weight_files
from parts.terminal import first_line

FORM = re.compile(rf"modelscope:({hub.OWNED})")
CARD = "README.md"
# Beside the weights; what of it is there. run.json and trainer_state.json name folders of this machine.
BESIDE = (
    f"{CARD} Modelfile loss.png {ADAPTER_CONFIG} config.json generation_config.json model.safetensors.index.json "
    "tokenizer.json tokenizer_config.json chat_template.jinja special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt"
).split()
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LOGIN = (
    "在 https://modelscope.cn/my/myaccesstoken 取得访问令牌，放进环境变量 MODELSCOPE_API_TOKEN，或运行 modelscope login"
)


def repository(text: str) -> str:
    """owner/name of modelscope:owner/name, for argparse."""
    if not (found := FORM.fullmatch(text)):
        raise argparse.ArgumentTypeError(f"要写成 modelscope:owner/name，不是 {text!r}")
    return found[1]


def choose(folder: Path) -> dict[str, int]:
    """{name: bytes} of what is to be sent. Raises SystemExit for a folder that is not a finished training's, whole and
    with its card, and for an adapter whose base nobody else has."""
    if not (folder / FINISHED_MARK).is_file():
        why = "还没有训练完，请用原来的命令继续训练" if (folder / RUN_FILE).is_file() else "不是训练完的输出文件夹"
        raise SystemExit(f"错误：{folder} {why}；--push_to 只上传训练完的模型，用 --model_path 指定它的文件夹。")
    if not (folder / CARD).is_file():
        raise SystemExit(f"错误：{folder} 里没有模型卡 {CARD}；请写一个（模型是什么、用什么训练、不能做什么）再上传。")
    try:
        if (folder / ADAPTER_CONFIG).is_file():
            refuse_local_base(folder)
            weights, needed = [ADAPTER_WEIGHTS], hub.BESIDE_WEIGHTS[-2:]
        else:
            weights, needed = weight_files(folder), hub.BESIDE_WEIGHTS
        for name in needed:
            (folder / name).stat()
        for name in weights:
            with safe_open(folder / name, "pt"):
                pass
        names = [name for name in BESIDE if (folder / name).is_file()] + weights
        return {name: (folder / name).stat().st_size for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise SystemExit(
            f"错误：{folder} 里的模型不完整（{first_line(error)}）；什么都没有上传，请重新训练。"
        ) from None


def refuse_local_base(folder: Path) -> None:
    """Raises SystemExit for an adapter whose base is a folder of this machine."""
    base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    if Path(base).is_absolute():
        raise SystemExit(
            f"错误：{folder} 的适配器的基础模型是本机的文件夹 {base}，别人没有；请先合并再上传："
            f"python inference_lora.py --model_path {shlex.quote(str(folder))} --merge_to output/merged"
        )


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count:,} 字节"


def describe(name: str, folder: Path, files: dict[str, int]) -> str:
    """What would be sent, and what of the folder would not be."""
    rows = "".join(f"  {size(count):>12}  {file}\n" for file, count in files.items())
    left = [path.name + "/" * path.is_dir() for path in sorted(folder.iterdir()) if path.name not in files]
    return (
        f"{folder} 里要上传到 ModelScope 模型仓库 {name} 的 {len(files)} 个文件，共 {size(sum(files.values()))}：\n"
        f"{rows}不上传：{'、'.join(left)}\n"
        f"仓库不存在就新建一个私有的。模型卡 {CARD} 里有数据来源和系统提示词，请先看一遍。"
    )


def run(name: str, folder: Path, send: bool) -> None:
    """Show what would be sent and, with `send`, send it. Nothing is written on this machine, and the access token,
    which the client takes from MODELSCOPE_API_TOKEN or its own log-in, is never shown. Raises SystemExit with one
    sentence where the folder, the log-in, the hub or the connection does not allow it."""
    files = choose(folder)
    print(describe(name, folder, files))
    api, endpoint = modelscope.open_api()
    token = (api.legacy.token or "").strip()
    if not token:
        raise SystemExit(f"错误：没有登录 ModelScope；请{LOGIN}，再运行同一命令。")
    if found := [file for file in files if (folder / file).suffix != ".safetensors" and holds(folder / file, token)]:
        raise SystemExit(f"错误：{folder / found[0]} 里有你的访问令牌，什么都没有上传；请删掉它，再运行同一命令。")
    if not send:
        print("这是预演：没有连接 ModelScope，什么都没有上传。确认无误后，在同一命令后加 --yes 上传。")
        return
    try:
        if modelscope.open_repository(api, name):
            print(f"注意：{name} 已经存在，而且是公开的，所有人都能看到这次上传的文件。", flush=True)
        modelscope.upload(api, name, str(folder), list(files))
    except Exception as error:
        why = hub.describe_error(error).replace(token, "……")
        raise SystemExit(
            f"错误：没有全部上传到 {endpoint} 的 {name}（{why}）；模型仍完好地在 {folder}。"
            "请检查网络、名称和令牌的权限，再运行同一命令：已传完的权重不会再传。"
        ) from None
    print(f"已上传：{endpoint}/models/{name}")


def holds(path: Path, token: str) -> bool:
    return token.encode() in path.read_bytes()
