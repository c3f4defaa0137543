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


def load_adapter(name: str, revision: str | None = None):
    """(model with the adapter merged into its weights, tokenizer) from an output folder of train_lora.py."""
    import peft
    from safetensors import SafetensorError

    from parts import hub, models

    path = str(checkpoints.find_trained(name, ADAPTER_CONFIG, "train_lora.py"))
    base, trained_revision = read_base(path)
    remedy = f"把 {path}/{ADAPTER_CONFIG} 里的 base_model_name_or_path 改为本地文件夹"
    base_path = hub.find_model(base, remedy, revision or trained_revision)
    model = models.load_weights(base_path, models.pick_device())
    try:
        if not Path(path, "adapter_model.safetensors").is_file():  # peft would ask a hub for it
            raise FileNotFoundError("缺少 adapter_model.safetensors")
        model = peft.PeftModel.from_pretrained(model, path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SystemExit(
            f"错误：{path} 的适配器无法装到 {base} 上（{terminal.first_line(error)}）；请重新运行 python train_lora.py"
        ) from None
    return model.merge_and_unload().eval(), models.load_tokenizer(path)


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
    """Save the merged model, so that inference.py and any other tool can load it, with the card of its training."""
    from parts import replies

    # A base model names another token: tools that read its settings alone would go on behind the reply.
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = replies.stops_of(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    older_readers.include(folder)
    if Path(adapter, checkpoints.FINISHED_MARK).is_file():
        for card in ("README.md", "loss.png"):
            shutil.copy(Path(adapter, card), folder)
    print(f"合并后的模型在 {folder}，提问：python inference.py --model_path {shlex.quote(folder)}")


def main() -> None:
    parser = inference.build_parser(__doc__, LORA_OUTPUT_DIR)
    parser.add_argument("--merge_to", metavar="DIR", help="write the merged model there instead of asking")
    args = inference.parse_flags(parser)
    if args.merge_to is not None:
        refuse_unless_empty(args.merge_to)
    with terminal.explain_out_of_memory(inference.OUT_OF_MEMORY):
        model, tokenizer = load_adapter(args.model_path, args.revision)
        if args.merge_to:
            merge_to(args.merge_to, model, tokenizer, args.model_path)
        else:
            inference.predict(model, tokenizer, args)


if __name__ == "__main__":
    terminal.run_main(main)
