"""The same training with a LoRA adapter on all linear layers; only the adapter is trained and saved.

    python train_lora.py                                # all defaults; everything else is as in train.py
    python train_lora.py --lora_rank 16 --output_dir output/rank16
    python train_lora.py --load_in_4bit true            # the frozen weights in 4 bits: the smallest cards
    python train_lora.py --adapter output/qwen3-medical-lora --train_file more.jsonl --output_dir output/more

`python inference_lora.py` asks the result, and merges it into a plain model.
"""

import json
from functools import partial
from pathlib import Path

import train
from data import LORA_OUTPUT_DIR
from parts import terminal
from parts.run import checkpoints
from parts.training import environment, flags

RECIPE = train.RECIPE | {
    # Where TRL and Unsloth start LoRA; published: 1e-4, as full training (tests/benchmarks/README.md)
    "learning_rate": 2e-4,
    "lora_rank": 8,
    "lora_alpha": 32,  # the adapter's output is scaled by alpha / rank
    "lora_dropout": 0.1,
    "output_dir": LORA_OUTPUT_DIR,
}
# What an adapter keeps when it is trained further, and what else its file may say: all else makes it another
# kind of adapter.
OWN = "lora_rank lora_alpha target_modules use_rslora use_dora".split()
NOTES = "lora_dropout base_model_name_or_path revision inference_mode peft_version auto_mapping".split()


def arguments(**changes):
    """Return this recipe with these changes, as train.arguments does. An adapter that is trained further
    brings its own settings along, and its base model unless one is named; a change that contradicts them
    raises SystemExit."""
    if changes.get("adapter"):
        environment.prepare()
        from parts.model import weights

        path, own = read_adapter(changes["adapter"])
        for name, value in own.items():
            given = changes.get(name, value)
            if (sorted(given) if isinstance(given, list) else given) != value:
                flags.refuse(f"--{name} {given}：适配器 {path} 是 {value}；请去掉 --{name}")
        if "model_name" not in changes:
            own["model_name"], own["model_revision"] = weights.read_base(path, changes["adapter"])
        settings = "，".join(f"{name} {value}" for name, value in own.items())
        print(f"从适配器 {path} 接着训练：{terminal.shorten(settings, 300)}")
        changes = own | changes | {"adapter": path}
    return train.arguments(**RECIPE | changes)


def read_adapter(name: str) -> tuple[str, dict]:
    """Return the folder of the adapter that `name` means, a training's folder, one that peft wrote or a hub's
    name, and its OWN, {flag: value}. Raises SystemExit unless it is a plain LoRA in safetensors."""
    import peft

    from parts.model import weights

    path = str(weights.find_local(name) or weights.find_folder(name, "检查 --adapter"))
    if not Path(path, checkpoints.ADAPTER_CONFIG).is_file():
        flags.refuse(f"--adapter {name} 不是 LoRA 适配器；如果是完整的模型，请改用 --model_name {name}")
    try:
        Path(path, checkpoints.ADAPTER_WEIGHTS).stat()  # which raises for the only weights that are read here
        plain = peft.LoraConfig(task_type="CAUSAL_LM").to_dict()
        config = plain | json.loads(Path(path, checkpoints.ADAPTER_CONFIG).read_bytes())
        config["lora_rank"] = config.pop("r")
        for key, value in config.items():
            # Newer versions of peft may know more kinds: what is not known here is refused as well.
            if value and value != plain.get(key) and key not in OWN + NOTES:
                raise ValueError(f"不是普通的 LoRA：{key} 是 {value}")
    except (OSError, ValueError, TypeError) as error:
        reason = f"--adapter {name} 不能接着训练（{terminal.first_line(error)}）"
        flags.refuse(f"{reason}；请换成 safetensors 格式的 LoRA 文件夹，或去掉 --adapter 重新训练")
    if isinstance(config["target_modules"], list):  # peft writes them in any order
        config["target_modules"].sort()
    return path, {name: config[name] for name in OWN}


def add_adapter(model, args):
    """Return a peft.PeftModel: `model`, frozen, with a trainable adapter on every linear layer but the output
    layer, or on the layers that are named. Raises SystemExit for a layer that the model does not have."""
    import peft
    import torch

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
    # float16 alone is too coarse for what is trained.
    in_float32 = model.dtype == torch.float16
    try:
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=in_float32)
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
    if args.adapter and not args.check:  # --check may have a smaller model with random weights
        load_adapter(model, args)
    model.print_trainable_parameters()
    return model


def load_adapter(model, args) -> None:
    """Put the weights of the adapter that is trained further in place of the drawn ones. Raises SystemExit
    where they do not fit."""
    from safetensors import SafetensorError

    try:
        # From the CPU: by itself peft would put them on the first GPU in each of several processes.
        loaded = model.load_adapter(args.adapter, "default", is_trainable=True, torch_device="cpu")
        others = loaded.missing_keys + loaded.unexpected_keys  # peft only returns them
        if others:
            raise ValueError(f"有 {len(others)} 个权重对不上，例如 {others[0]}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"{args.adapter} 的适配器无法加载到 {args.model_name} 上（{terminal.first_line(error)}）"
        raise SystemExit(f"错误：{reason}；请用 --model_name 指定它的基础模型。") from None


def main() -> None:
    args = arguments(**flags.parse(__doc__, RECIPE))
    if args.check:
        train.check(args, add_adapter)
    else:
        train.report(train.train(args, add_adapter), "inference_lora.py")


if __name__ == "__main__":
    terminal.run_main(main)
