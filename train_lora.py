"""The same training with a LoRA adapter on all linear layers; only the adapter is trained and saved.

    python train_lora.py                                # all defaults; everything else is as in train.py
    python train_lora.py --lora_rank 16 --output_dir output/rank16
    python train_lora.py --load_in_4bit true            # the frozen weights in 4 bits: the smallest cards

`python inference_lora.py` asks the result, and merges it into a plain model.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data import LORA_OUTPUT_DIR
from parts.arguments import parse_flags
from parts.terminal import run_main
from train import TrainArguments, check, report, train

LEARNING_RATE = 2e-4  # where TRL and Unsloth start LoRA; published: 1e-4, as full training (tests/benchmarks/README.md)
LORA_RANK = 8
LORA_ALPHA = 32  # the adapter's output is scaled by alpha / rank
LORA_DROPOUT = 0.1


@dataclass
class LoraArguments(TrainArguments):
    """train.py's arguments and the adapter's."""

    learning_rate: float = LEARNING_RATE
    lora_rank: int = field(default=LORA_RANK, metadata={"help": "rank of the adapter's matrices"})
    lora_alpha: int = field(default=LORA_ALPHA, metadata={"help": "scale: alpha / rank"})
    lora_dropout: float = field(default=LORA_DROPOUT, metadata={"help": "of the adapter's input"})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: frozen weights in NF4; needs bitsandbytes"})
    output_dir: str | None = LORA_OUTPUT_DIR

    trains_adapter = True  # no flag


def add_adapter(model, args: LoraArguments):
    """`model`, frozen, with a trainable adapter on every linear layer but the output layer: a peft.PeftModel."""
    import peft

    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        target_modules="all-linear",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
    )
    # Adapters in the weights' dtype: peft's float32 ones would make float32 copies of every layer's input.
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    # The base as the user named it: peft noted the folder of the download cache, which another machine does not have.
    folder, saved = Path(args.model_name), model.active_peft_config
    saved.base_model_name_or_path = str(folder.resolve()) if folder.is_dir() else args.model_name
    saved.revision = args.model_revision
    # Else peft would ask Hugging Face's hub, by that name, for the vocabulary of the base at each save.
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    model.print_trainable_parameters()
    return model


def main() -> None:
    args = parse_flags(LoraArguments, __doc__)
    check(args, add_adapter) if args.check else report(train(args, add_adapter), "inference_lora.py")


if __name__ == "__main__":
    run_main(main)
