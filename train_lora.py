"""The same training with a LoRA adapter on all linear layers; only the adapter is trained and saved.

    python train_lora.py                                # all defaults; everything else is as in train.py
    python train_lora.py --lora_rank 16 --output_dir output/rank16
    python train_lora.py --load_in_4bit true            # the frozen weights in 4 bits: the smallest cards

`python inference_lora.py` asks the result, and merges it into a plain model.
"""

from functools import partial
from pathlib import Path

import train
from data import LORA_OUTPUT_DIR
from parts import terminal
from parts.training import flags

RECIPE = train.RECIPE | {
    # Where TRL and Unsloth start LoRA; published: 1e-4, as full training (tests/benchmarks/README.md)
    "learning_rate": 2e-4,
    "lora_rank": 8,
    "lora_alpha": 32,  # the adapter's output is scaled by alpha / rank
    "lora_dropout": 0.1,
    "output_dir": LORA_OUTPUT_DIR,
}


def arguments(**changes):
    """Return this recipe with these changes, as train.arguments does."""
    return train.arguments(**RECIPE | changes)


def add_adapter(model, args):
    """Return a peft.PeftModel: `model`, frozen, with a trainable adapter on every linear layer but the output
    layer, or on the layers that are named. Raises SystemExit for a layer that the model does not have."""
    import peft

    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        target_modules=args.target_modules,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
    )
    # Adapters in the weights' dtype: peft's float32 ones would make float32 copies of every layer's input.
    try:
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        cause = terminal.first_line(error)
        raise SystemExit(f"错误：--target_modules 无法使用（{cause}）；请改正层的名字。") from None
    # The base as the user named it: peft noted the folder of the download cache, which exists here only.
    folder, saved = Path(args.model_name), model.active_peft_config
    saved.base_model_name_or_path = str(folder.resolve()) if folder.is_dir() else args.model_name
    saved.revision = args.model_revision
    # Else peft would ask Hugging Face's hub, by that name, for the vocabulary of the base at each save.
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    # Else peft would load a checkpoint's bfloat16 weights as float32, and round otherwise from there on.
    model.load_adapter = partial(model.load_adapter, autocast_adapter_dtype=False)
    model.print_trainable_parameters()
    return model


def main() -> None:
    args = arguments(**flags.parse(__doc__, RECIPE))
    if args.check:
        train.check(args, add_adapter)
    else:
        train.report(train.train(args, add_adapter), "inference_lora.py")


if __name__ == "__main__":
    terminal.run_main(main)
