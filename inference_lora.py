"""Ask the model that train_lora.py made: its adapter, merged in memory into the base model that the adapter names.

    python inference_lora.py                            # as inference.py, with the same flags
    python inference_lora.py --merge_to output/merged   # write a plain model, then: python inference.py --model_path …

The replies are a language model's and may be wrong. They are not medical advice.
"""

import json
import shlex
import shutil
from pathlib import Path

try:
    import inference
    from data import LORA_OUTPUT_DIR
    from parts import checkpoints, older_readers, terminal
    from parts.checkpoints import ADAPTER_CONFIG
except ModuleNotFoundError as error:  # python -P, a copy without parts/, or nothing installed yet
    raise SystemExit(
        f"错误：找不到 {error.name}；请在完整的项目文件夹里运行，不要用 python -P；缺的是库，就先运行 "
        "pip install -r requirements.txt"
    ) from None


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


def load_adapter(name: str, revision: str | None = None, thinking: bool = True, device=None):
    """(model with the adapter merged into its weights, tokenizer) from an output folder of train_lora.py, on `device`
    or where this machine computes. Raises SystemExit for another base than the one it was trained on, and when it is to
    be asked without `thinking` and cannot be."""
    import peft
    from safetensors import SafetensorError

    from parts import hub, models, replies

    path = str(checkpoints.find_trained(name, ADAPTER_CONFIG, "train_lora.py"))
    base, trained_revision = read_base(path)
    if not thinking:
        inference.require_no_thinking(path)
    remedy = f"把 {path}/{ADAPTER_CONFIG} 里的 base_model_name_or_path 改为本地文件夹"
    base_path = hub.find_model(base, remedy, revision or trained_revision)
    check_base(path, base, base_path)
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


def refuse_unless_empty(folder: str) -> None:
    """Raises SystemExit unless `folder` is new or empty and can be written: merging never writes over a model."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        free = not any(Path(folder).iterdir())
    except OSError:
        free = False
    if not folder or not free:
        raise SystemExit(f"错误：{folder} 不是可写的空文件夹；请用 --merge_to 指定一个新文件夹。")


def merge_to(folder: str, model, tokenizer, adapter: str) -> None:
    """Save the merged model in the dtype of its base, so that inference.py and any other tool can load it, with what
    its training left; the mark of a finished run comes last."""
    from transformers import AutoConfig

    model.to(AutoConfig.from_pretrained(model.name_or_path).dtype or model.dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    older_readers.include(folder)
    path = Path(adapter)
    cards = [path / "README.md", path / "loss.png"] if path == run_folder(path) else []  # a checkpoint's is peft's
    for file in (*cards, run_folder(path) / checkpoints.RUN_FILE, path / checkpoints.FINISHED_MARK):
        if file.is_file():
            shutil.copy(file, folder)
    print(f"合并后的模型在 {folder}，提问：python inference.py --model_path {shlex.quote(folder)}")


def main() -> None:
    parser = inference.build_parser(__doc__, LORA_OUTPUT_DIR)
    parser.add_argument("--merge_to", metavar="DIR", help="write the merged model there instead of asking")
    args = inference.parse_flags(parser)
    if args.merge_to is not None:
        for name in vars(args).keys() - {"merge_to", "model_path", "revision"}:
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--merge_to 只合并，不提问；请去掉 {name}")
        refuse_unless_empty(args.merge_to)
    with terminal.explain_out_of_memory(inference.OUT_OF_MEMORY):
        if args.merge_to:  # on the CPU, in float32: in bfloat16 the product of the adapter's matrices would be rounded
            import torch

            # Looked for once: a training that goes on may write a better checkpoint meanwhile.
            adapter = str(checkpoints.find_trained(args.model_path, ADAPTER_CONFIG, "train_lora.py"))
            merged = load_adapter(adapter, args.revision, device=torch.device("cpu"))
            merge_to(args.merge_to, *merged, adapter)
        else:
            inference.predict(*load_adapter(args.model_path, args.revision, not args.no_thinking), args)


if __name__ == "__main__":
    terminal.run_main(main)
