"""The same training with a LoRA adapter on all linear layers; only the adapter is trained and saved.

    python train_lora.py                                # all defaults; everything else is as in train.py
    python train_lora.py --lora_rank 16 --output_dir output/rank16
    python train_lora.py --load_in_4bit true            # the frozen weights in 4 bits: the smallest cards

`python inference_lora.py` asks the result, and merges it into a plain model.
"""

from dataclasses import dataclass, field
from pathlib import Path

import peft

import data
import train

LORA_RANK = 8
LORA_ALPHA = 32  # the adapter's output is scaled by alpha / rank
LORA_DROPOUT = 0.1


@dataclass
class LoraArguments(train.TrainArguments):
    """train.py's arguments and the adapter's."""

    lora_rank: int = field(default=LORA_RANK, metadata={"help": "rank of the adapter's matrices"})
    lora_alpha: int = field(default=LORA_ALPHA, metadata={"help": "scale: alpha / rank"})
    lora_dropout: float = field(default=LORA_DROPOUT, metadata={"help": "of the adapter's input"})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: frozen weights in NF4; needs bitsandbytes"})
    output_dir: str | None = data.LORA_OUTPUT_DIR


def add_adapter(model, args: LoraArguments) -> peft.PeftModel:
    """`model`, frozen, with a trainable adapter on every linear layer but the output layer."""
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        target_modules="all-linear",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
    )
    # Adapters in the weights' dtype: peft's float32 ones would make float32 copies of every layer's input.
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    if not args.process_index:
        model.print_trainable_parameters()
    return model


def name_base(args: LoraArguments) -> None:
    """Let the saved adapter name its base as the user did: an id, or a folder as absolute path.

    Until now it held the folder of the download cache, which means nothing on another machine.
    """
    config = peft.PeftConfig.from_pretrained(args.output_dir)
    folder = Path(args.model_name)
    config.base_model_name_or_path = str(folder.resolve()) if folder.is_dir() else args.model_name
    config.revision = args.model_revision
    config.save_pretrained(args.output_dir)


def run(args: LoraArguments) -> None:
    """train.run with the adapter."""
    train.run(args, add_adapter, name_base)


def main() -> None:
    args = train.parse_args(LoraArguments, __doc__)
    run(args)
    train.report(args, "inference_lora.py")


if __name__ == "__main__":
    data.run_main(main)
