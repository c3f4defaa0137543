"""Flags that would do nothing here, or not what they say, and numbers that no training can use: each is refused by its
name. Knows what the Trainer of parts/ reads, no recipe."""

import dataclasses
import json
import os
from pathlib import Path

from transformers import SchedulerType

from parts.memory import DRIVER_BYTES

METRICS = ("eval_loss", "eval_token_loss")
WHY = {  # why these are refused
    "评估按 token 数分批，只算损失，用不到它": (
        "per_device_eval_batch_size eval_accumulation_steps batch_eval_metrics include_for_metrics "
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object bf16_full_eval fp16_full_eval"
    ),
    "总是训练，评估由 --eval_strategy 决定": "do_train do_eval do_predict",
    "数据的列是固定的": "remove_unused_columns length_column_name label_names",
    "重算哪些层用 --checkpoint_every 和 --offload_activations": (
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs"
    ),
    "训练只写在 --output_dir；训练完再上传：python inference.py --push_to modelscope:owner/name": (
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision"
    ),
    "多张卡用 torchrun，每张都放整个模型；放不下请加 --fsdp true，或用 train_lora.py": "parallelism_config",
    "DeepSpeed 已经去掉；模型一张卡放不下，请加 --fsdp true，或用 train_lora.py": "deepspeed",
    "怎样分片已经定好（FSDP2，逐层），只写 --fsdp true": "fsdp_config",
    "收到 SIGTERM 时本来就会保存检查点": "enable_jit_checkpoint",
    "一次算多少已经按显存规划好，要改用 --batch_tokens": "auto_find_batch_size",
    "这样的检查点不能继续训练，不支持": "save_only_model",
    "只有第一个进程写检查点": "save_on_each_node",
    "训练用不到 KV cache": "use_cache",
    "不是数的损失会被记成别的数，而训练要在那里停下": "logging_nan_inf_filter",
    "一步的样本怎样分批不能改": "accelerator_config",
    "样本的顺序就不再由 --seed 决定": "dataloader_in_order",
    "训练不算 logits，它没有可看的": "debug",
}
REFUSED = {name: why for why, names in WHY.items() for name in names.split()}
ABOVE_0 = (  # flags of the scripts are among them
    "max_length sample_tokens per_device_train_batch_size gradient_accumulation_steps num_train_epochs learning_rate "
    "max_steps lora_rank lora_alpha memory_gb batch_tokens adam_epsilon logging_steps eval_steps save_steps "
    "save_total_limit torch_empty_cache_steps ddp_timeout ddp_bucket_cap_mb"
).split()
BELOW_1 = ("lora_dropout", "adam_beta1", "adam_beta2", "label_smoothing_factor")
NOT_BELOW_0 = (
    "early_stopping_patience seed data_seed checkpoint_every weight_decay max_grad_norm warmup_steps eval_delay "
    "neftune_noise_alpha dataloader_num_workers eval_samples"
).split()
TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
NO_KWARGS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
NO_WARMUP = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def check_numbers(args) -> None:
    """Raises ValueError for numbers and folders with which training would fail late, or do nothing."""
    for name in (*ABOVE_0, *NOT_BELOW_0, *BELOW_1):
        value = getattr(args, name, None)
        if value is None or (name, value) == ("max_steps", -1):  # Trainer's "not set"
            continue
        if name.endswith("seed") and value >= 2**32:
            raise ValueError(f"--{name} {value}：要一个小于 {2**32} 的整数")
        if name in BELOW_1 and not 0 <= value < 1:
            raise ValueError(f"--{name} {value}：要一个从 0 到 1（不含 1）的数")
        if not 0 <= value < float("inf") or value == 0 and name in ABOVE_0:
            kind = "整数" if isinstance(value, int) else "数"
            raise ValueError(f"--{name} {value}：要一个{'大于 0 的数' if name in ABOVE_0 else f'不小于 0 的{kind}'}")
    if args.memory_gb and args.memory_gb * 1e9 <= DRIVER_BYTES:
        raise ValueError(f"--memory_gb {args.memory_gb}：驱动自己就要约 {DRIVER_BYTES / 1e9:.1f} GB")
    if not args.output_dir:
        raise ValueError("--output_dir 是空的")
    checkpoint = args.resume_from_checkpoint
    if checkpoint and not Path(checkpoint).is_dir():
        how = "不写这个参数，就会从最近的完整检查点继续"
        raise ValueError(f"--resume_from_checkpoint {checkpoint}：没有这个文件夹；{how}")


def is_given(args, name: str) -> bool:
    """Whether a flag says anything but its default. A field that this version of transformers lacks never does."""
    field = type(args).__dataclass_fields__.get(name)
    if field is None:
        return False
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    value = getattr(args, name)
    return value != default and bool(value or default)  # of a list the command line says [] where nothing is said


def recomputes(args) -> bool | None:
    """What --gradient_checkpointing says, under either of its names; None where it says nothing."""
    asked = getattr(args, "activation_checkpointing", None)  # its name from transformers 5.23 on
    return args.gradient_checkpointing if asked is None else asked


def refuse(args) -> None:
    """Raises ValueError for a flag that would do nothing, or not what it says; never with its value, which may be a
    secret. Before transformers has filled in what was left open."""
    given = {name for name in vars(args) if is_given(args, name)}
    for name in sorted(given & REFUSED.keys()):
        raise ValueError(f"--{name}：{REFUSED[name]}")
    kept_best = args.load_best_model_at_end and args.eval_strategy != "no"
    patience = "early_stopping_patience" in given and args.early_stopping_patience
    optim = sorted(given & {"optim", "optim_args", "optim_target_modules"})
    clipped = "max_grad_norm" in given and args.max_grad_norm and str(args.optimizer).endswith("in_backward")
    trackio = sorted(given.intersection(TRACKIO)) if "trackio" not in (args.report_to or ()) else []
    scheduler = SchedulerType(args.lr_scheduler_type)
    samples = {"eval_samples"} if getattr(args, "eval_samples", 0) else set()  # none are wanted: none are missed
    unseen = sorted(given & {"eval_delay", "eval_on_start", "metric_for_best_model", *samples})
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    evaluation = getattr(args.eval_strategy, "value", args.eval_strategy)
    logging = getattr(args.logging_strategy, "value", args.logging_strategy)
    every = (args.eval_steps or 0) if evaluation == "steps" and (args.save_steps or 0) >= 1 else 0
    recompute = recomputes(args)
    rules = {
        f"--{unseen[0] if unseen else ''}：--eval_strategy no 时没有评估": unseen and evaluation == "no",
        "--metric_for_best_model：只和 --load_best_model_at_end true 一起起作用": (
            "metric_for_best_model" in given
            and not args.load_best_model_at_end
            and scheduler != SchedulerType.REDUCE_ON_PLATEAU
        ),
        "--eval_steps：--eval_strategy epoch 时不按步评估": "eval_steps" in given and evaluation == "epoch",
        "--save_steps：只和 --save_strategy steps 一起起作用": args.save_steps is not None
        and (strategy or evaluation) not in ("steps", *(["no"] if not strategy else [])),
        "--logging_steps：只和 --logging_strategy steps 一起起作用": "logging_steps" in given and logging != "steps",
        f"--save_strategy {strategy}：要和 --eval_strategy 一样，或是 best，或加 --load_best_model_at_end false": (
            kept_best and strategy not in (None, "best", evaluation)
        ),
        f"--save_steps {args.save_steps or 0:g}：要是 --eval_steps {args.eval_steps or 0:g} 的倍数": (
            kept_best and every >= 1 and args.save_steps % every
        ),
        "--gradient_checkpointing 和 --checkpoint_every 说的不一样；请只写 --checkpoint_every": (
            None not in (recompute, args.checkpoint_every) and recompute != bool(args.checkpoint_every)
        ),
        "--ddp_backend：只和 torchrun 一起起作用": "ddp_backend" in given and "LOCAL_RANK" not in os.environ,
        "--label_smoothing_factor：只和 --full_logits true 一起起作用": args.label_smoothing_factor
        and not args.full_logits,
        "--use_liger_kernel：只和 --fast_kernels false 一起起作用；不写它，能用的 Liger 算子已经在用": (
            args.use_liger_kernel and args.fast_kernels
        ),
        "--liger_kernel_config：只和 --use_liger_kernel 一起起作用": args.liger_kernel_config
        and not args.use_liger_kernel,
        "--greater_is_better：这里能选的都是损失，越小越好": args.greater_is_better,
        f"--metric_for_best_model {args.metric_for_best_model}：只有 {'、'.join(METRICS)}": (
            args.metric_for_best_model not in (None, *METRICS, *(name.removeprefix("eval_") for name in METRICS))
        ),
        "--early_stopping_patience：只和 --load_best_model_at_end true 及评估一起起作用": patience and not kept_best,
        f"--{optim[0] if optim else ''}：只和 --optimizer optim 一起起作用，不和 --optimizer {args.optimizer}": (
            optim and args.optimizer not in (None, "optim")
        ),
        f"--max_grad_norm：--optimizer {args.optimizer} 不裁剪梯度": clipped,
        f"--{trackio[0] if trackio else ''}：只和 --report_to trackio 一起起作用；SwanLab 的项目名用 SWANLAB_PROJECT": (
            trackio
        ),
        f"--lr_scheduler_kwargs：{scheduler.value} 没有参数": args.lr_scheduler_kwargs and scheduler in NO_KWARGS,
        f"--warmup_steps：{scheduler.value} 不预热，constant_with_warmup 才预热": args.warmup_steps
        and scheduler in NO_WARMUP,
    }
    if isinstance(args.lr_scheduler_kwargs, str):
        rules['--lr_scheduler_kwargs：要写成 JSON，例如 {"min_lr_rate": 0.1}'] = not is_json(args.lr_scheduler_kwargs)
    for message, holds in rules.items():
        if holds:
            raise ValueError(message)


def is_json(text: str) -> bool:
    """Whether it is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
