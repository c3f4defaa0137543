"""Ask the model that train_lora.py made: its adapter, merged in memory into the base model that it names.

    python inference_lora.py                            # as inference.py, with the same flags
    python inference_lora.py --merge_to output/merged   # write a plain model for inference.py --model_path

The replies are a language model's and may be wrong. They are not medical advice.
"""

import os
import shlex
import shutil
from pathlib import Path

import inference
from data import LORA_OUTPUT_DIR
from parts import terminal
from parts.model import export
from parts.run import checkpoints


def merge_to(folder: str, name: str, revision: str | None = None) -> None:
    """Save the adapter `name`, merged into its base, as a model that inference.py and other tools can load.

    It has the dtype of the base, and with it what its training left. The mark of a finished run comes last.
    Raises SystemExit unless `folder` is new or empty and can be written: merging never writes over a model.
    """
    try:
        if os.path.isdir(folder):
            os.rmdir(folder)  # which only removes what is empty
        os.makedirs(folder)
    except OSError:
        raise SystemExit(f"错误：{folder} 不是可写的空文件夹；请用 --merge_to 指定一个新文件夹。") from None
    import torch  # which takes seconds, and a folder that is refused should not
    from transformers import AutoConfig

    from parts.model import weights

    trained = weights.find_trained(name, revision)
    if trained.base_path is None:
        reason = f"{name} 里是完整的模型，不是 LoRA 适配器，不需要合并"
        raise SystemExit(f"错误：{reason}；请直接用 inference.py 提问。")
    # On the CPU, in float32: in bfloat16 the product of the adapter's matrices would be rounded.
    model, tokenizer = weights.load(trained, torch.device("cpu"))
    model.to(AutoConfig.from_pretrained(trained.base_path).dtype or model.dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    export.translate(folder)
    export.write_modelfile(folder, tokenizer, model.generation_config)
    for file in filter(Path.is_file, Path(folder).iterdir()):
        checkpoints.flush_to_disk(file, like=Path(folder, "tokenizer_config.json"))
    adapter, run_folder = Path(trained.path), weights.run_folder(trained.path)
    files = [run_folder / checkpoints.RUN_FILE, adapter / checkpoints.FINISHED_MARK]
    if adapter == run_folder:  # a checkpoint's README.md is peft's, and the run's is about other weights
        files = [adapter / "README.md", adapter / "loss.png", *files]
    for file in filter(Path.is_file, files):
        shutil.copy(file, folder)
    print(f"合并后的模型已保存到 {folder}，提问：python inference.py --model_path {shlex.quote(folder)}")


def main() -> None:
    inference.main(LORA_OUTPUT_DIR, __doc__, merge_to)


if __name__ == "__main__":
    terminal.run_main(main)
