"""The settings that decide a run's weights: collected, read again from its folder, and held against those of a command
that would continue it."""

import json
from pathlib import Path

from parts.model import weights
from parts.run import checkpoints
from parts.terminal import first_line, sha256

# What decides the weights. Logging, samples, patience and what only saves memory may change while continuing; so may
# --fast_kernels, a way on where one fails: they were seen to agree.
SETTINGS = (
    "model_name model_revision max_length num_train_epochs max_steps learning_rate lr_scheduler_type "
    "lr_scheduler_kwargs warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm full_logits "
    "seed data_seed full_determinism eval_steps"
).split()
LORA_SETTINGS = "lora_rank lora_alpha lora_dropout target_modules use_rslora use_dora load_in_4bit".split()


def collect(args, model_path: str, system_prompt: str) -> dict[str, object]:
    """{name: value} of the settings that decide the weights, as JSON gives them back."""
    values = values_of(args, [*SETTINGS, *(LORA_SETTINGS if args.trains_adapter else [])])
    values["model_sha256"] = checkpoints.weights_sha256(model_path)
    values["examples_per_step"] = args.examples_per_step
    values["system_prompt"], values["dtype"] = system_prompt, str(weights.best_dtype(args.device))
    for file in (args.train_file, args.val_file):
        values[f"{file} (sha256)"] = sha256(file)
    return json.loads(json.dumps(values))


def values_of(args, names: list[str]) -> dict[str, object]:
    """What `args` says of these names; an enum's value, as that is what a file can hold."""
    values = {}
    for name in names:
        value = getattr(args, name, None)
        values[name] = getattr(value, "value", value)
    return values


def complete(settings: dict[str, object], old: dict[str, object], args) -> dict[str, object]:
    """The `settings` with what an older version noted beside them, as this one has it: its names may be gone."""
    retired = [name for name in old if name not in settings and name not in ("optimizer", "batch_tokens")]
    return values_of(args, retired) | settings


def read(folder: Path) -> dict[str, object]:
    """The settings of the run in `folder`; none, and a line that says so, where they cannot be read."""
    try:
        settings = {**json.loads((folder / checkpoints.RUN_FILE).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        print(f"{folder / checkpoints.RUN_FILE} 无法读取（{first_line(error)}），无法核对设置是否与原来相同。")
        return {}
    if settings.get("optimizer") == "optim":  # its name in earlier versions
        settings["optimizer"] = "adamw"
    return settings


def refuse_changes(folder: Path, old: dict, new: dict) -> None:
    """Raises SystemExit when the run in `folder` was begun with other settings than the `new` ones."""
    changed = [name for name in old if old[name] != new.get(name)]
    if changed:
        changes = "，".join(f"{name} {str(old[name])[:80]} -> {str(new.get(name))[:80]}" for name in changed)
        finished = (folder / checkpoints.FINISHED_MARK).exists()
        run, how = "未完成的训练", "请用原来的设置继续"
        if changed == ["examples_per_step"]:  # with more or fewer processes than before
            how = f"请用 --per_device_train_batch_size 让所有进程每步仍是 {old[changed[0]]} 条"
        remedy = f"{how}，或用 --output_dir 换一个文件夹重新训练"
        if finished:
            merged = "<先用 inference_lora.py --merge_to 合并出的文件夹>" if "lora_rank" in old else folder
            run, remedy = (
                "训练完的模型",
                f"它不能再继续，可以从它开始新的训练：--model_name {merged} --output_dir <新文件夹>",
            )
        raise SystemExit(f"错误：{folder} 里{run}用的是别的设置：{changes}；{remedy}。")
