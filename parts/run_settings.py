"""The settings that decide a run's weights: collected, read again from its folder, and held against those of a command
that would continue it."""

import json
from pathlib import Path

from parts import checkpoints, models
from parts.terminal import first_line

# What decides the weights. Logging, samples, patience and what only saves memory may change while continuing; so may
# --fast_kernels, a way on where one fails: they were seen to agree.
SETTINGS = (
    "model_name max_length num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps "
    "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim optim_args optim_target_modules full_logits "
    "label_smoothing_factor neftune_noise_alpha seed data_seed bf16 fp16 tf32 torch_compile torch_compile_backend "
    "torch_compile_mode use_liger_kernel liger_kernel_config full_determinism eval_strategy eval_steps "
    "eval_delay load_best_model_at_end metric_for_best_model model_revision ignore_data_skip train_sampling_strategy "
    "dataloader_drop_last average_tokens_across_devices"
).split()
LORA_SETTINGS = ("lora_rank", "lora_alpha", "lora_dropout", "load_in_4bit")


def collect(args, model_path: str, system_prompt: str) -> dict[str, object]:
    """{name: value} of the settings that decide the weights, as JSON gives them back. Raises SystemExit when the base
    model's weights are not those of --model_sha256."""
    names = (*SETTINGS, *LORA_SETTINGS * args.trains_adapter)
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    values = {name: getattr(value, "value", value) for name, value in values.items()}  # enums
    values["model_sha256"] = found = checkpoints.weights_sha256(model_path)
    if args.model_sha256 and args.model_sha256.lower() != found:
        raise SystemExit(
            f"错误：{args.model_name} 的权重的 SHA-256 是 {found}，不是 --model_sha256 {args.model_sha256}；"
            "请核对来源，或去掉 --model_sha256。"
        )
    values["examples_per_step"] = args.examples_per_step
    values |= {"system_prompt": system_prompt, "dtype": str(models.best_dtype(args.device))}
    files = {f"{file} (sha256)": checkpoints.sha256(file) for file in (args.train_file, args.val_file)}
    return json.loads(json.dumps(values | files))


def read(folder: Path) -> dict[str, object]:
    """The settings of the run in `folder`; none, and a line that says so, where they cannot be read."""
    try:
        return {**json.loads((folder / checkpoints.RUN_FILE).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        print(f"{folder / checkpoints.RUN_FILE} 无法读取（{first_line(error)}），无法核对设置是否与原来相同。")
        return {}


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
