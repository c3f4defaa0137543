"""Ask the model that train_lora.py made: its adapter, merged in memory into the base model that the adapter names.

    python inference_lora.py                            # as inference.py, with the same flags
    python inference_lora.py --merge_to output/merged   # write a plain model, then: python inference.py --model_path …

The replies are a language model's and may be wrong. They are not medical advice.
"""

import shlex
import shutil
from pathlib import Path

try:
    import inference
    from data import LORA_OUTPUT_DIR
    from parts import adapters, asking, checkpoints, modelfile, older_readers, terminal
except ModuleNotFoundError as error:  # python -P, a copy without parts/, or nothing installed yet
    raise SystemExit(
        f"错误：找不到 {error.name}；请在完整的项目文件夹里运行，不要用 python -P；缺的是库，就先运行 "
        "pip install -r requirements.txt"
    ) from None


def load_adapter(name: str, revision: str | None = None, thinking: bool = True, device=None):
    """(model with the adapter merged into its weights, tokenizer) from an output folder of train_lora.py, on `device`
    or where this machine computes. Raises SystemExit for another base than the one it was trained on, and when it is to
    be asked without `thinking` and cannot be."""
    return adapters.load(*adapters.find(name, revision, thinking), device)


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
    modelfile.write(folder, tokenizer, model.generation_config)
    path, run_folder = Path(adapter), adapters.run_folder(adapter)
    cards = [path / "README.md", path / "loss.png"] if path == run_folder else []  # a checkpoint's is peft's
    for file in (*cards, run_folder / checkpoints.RUN_FILE, path / checkpoints.FINISHED_MARK):
        if file.is_file():
            shutil.copy(file, folder)
    print(f"合并后的模型在 {folder}，提问：python inference.py --model_path {shlex.quote(folder)}")


def main() -> None:
    parser = inference.build_parser(__doc__, LORA_OUTPUT_DIR)
    parser.add_argument("--merge_to", metavar="DIR", help="write the merged model there instead of asking")
    args = asking.parse_flags(parser)
    if args.merge_to is None:
        return inference.ask(args, inference.ADAPTER)
    for name in vars(args).keys() - {"merge_to", "model_path", "revision"}:
        if asking.given(parser, args, name):
            parser.error(f"--merge_to 只合并，不提问；请去掉 {name}")
    refuse_unless_empty(args.merge_to)
    import torch

    with terminal.explain_out_of_memory(inference.OUT_OF_MEMORY):
        # Looked for once: a training that goes on may write a better checkpoint meanwhile. Merged on the CPU, in
        # float32: in bfloat16 the product of the adapter's matrices would be rounded.
        adapter = str(adapters.locate(args.model_path))
        merge_to(args.merge_to, *load_adapter(adapter, args.revision, device=torch.device("cpu")), adapter)


if __name__ == "__main__":
    terminal.run_main(main)
