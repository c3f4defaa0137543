"""An adapter that train_lora.py made, and the base that it was trained on: found, compared, loaded, merged in memory.
Knows peft's files."""

import json
from pathlib import Path

from parts import checkpoints, terminal
from parts.checkpoints import ADAPTER_CONFIG


def read_base(path: str) -> tuple[str, str | None]:
    """(name or folder, revision) of the base model that the adapter in `path` was made for."""
    config = Path(path, ADAPTER_CONFIG)
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        base, revision = settings["base_model_name_or_path"] or "", settings.get("revision")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"错误：{config} 无法读取（{terminal.first_line(error)}）；请重新运行 python train_lora.py"
        ) from None
    if not base or Path(base).is_absolute() and not Path(base).is_dir():
        raise SystemExit(
            f"错误：{path} 的适配器需要基础模型 {base}，但它不在那里；请放回，或改 {ADAPTER_CONFIG} 里的路径。"
        )
    return base, None if Path(base).is_dir() else revision


def check_base(path: str, base: str, base_path: str) -> None:
    """Raises SystemExit when the weights in `base_path` are not those that the adapter in `path` was trained on."""
    from parts import run_settings

    folder = run_folder(path)
    known = run_settings.read(folder) if (folder / checkpoints.RUN_FILE).is_file() else {}
    trained = known.get("model_sha256")
    if not trained:
        print(f"提示：{folder} 里没有训练的记录 {checkpoints.RUN_FILE}，无法核对 {base} 的权重是否就是训练时的。")
    elif trained != (found := checkpoints.weights_sha256(base_path)):
        raise SystemExit(
            f"错误：{path} 的适配器不是在现在的 {base} 上训练的（权重的 SHA-256 应为 {trained}，现在是 {found}）；"
            "请放回原来的基础模型。"
        )


def run_folder(path: str) -> Path:
    """The output folder to which an adapter belongs: itself, or that of a checkpoint."""
    return Path(path).parent if Path(path).name.startswith("checkpoint-") else Path(path)


def locate(name: str, revision: str | None = None) -> Path:
    """The folder with the adapter below an output folder of train_lora.py; `revision` is its base's."""
    return checkpoints.find_trained(name, ADAPTER_CONFIG, "train_lora.py")


def find(name: str, revision: str | None = None, thinking: bool = True) -> tuple[str, str, str]:
    """(folder of the adapter, its base as it names it, the base's folder) below an output folder of train_lora.py.
    Raises SystemExit for another base than the one it was trained on, and when it is to be asked without `thinking` and
    cannot be."""
    from parts import models

    path = str(locate(name))
    base, trained_revision = read_base(path)
    if not thinking:
        models.require_no_thinking(path)
    remedy = f"把 {path}/{ADAPTER_CONFIG} 里的 base_model_name_or_path 改为本地文件夹"
    base_path = models.find_model(base, remedy, revision or trained_revision)
    check_base(path, base, base_path)
    return path, base, base_path


def load(path: str, base: str, base_path: str, device=None):
    """(model with the adapter merged into its weights, tokenizer) of what `find` found, on `device` or where this
    machine computes."""
    import peft
    from safetensors import SafetensorError

    from parts import models, replies

    model = models.load_weights(base_path, device or models.pick_device())
    try:
        if not Path(path, "adapter_model.safetensors").is_file():  # peft would ask a hub for it
            raise FileNotFoundError("缺少 adapter_model.safetensors")
        model = peft.PeftModel.from_pretrained(model, path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SystemExit(
            f"错误：{path} 的适配器无法装到 {base} 上（{terminal.first_line(error)}）；请重新运行 python train_lora.py"
        ) from None
    model, tokenizer = model.merge_and_unload().eval(), models.load_tokenizer(path)
    replies.settle_generation(model, tokenizer)
    return model, tokenizer
