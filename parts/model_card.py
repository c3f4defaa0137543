"""README.md and loss.png of an output folder: what a model was trained from and how, and what it is not."""

from pathlib import Path

from parts import checkpoints, flags, hub, libraries
from parts.run_settings import LORA_SETTINGS, SETTINGS

AS_PUBLISHED = ("full_logits",)  # of SETTINGS: where it is given, the run is the more like the published one

CARD = """\
---
base_model: {base}
language: zh
pipeline_tag: text-generation
---

# {name}

由 {base} 微调的中文医学对话模型：先在 `<think>…</think>` 里思考，再回答。

**它不是医生。** 回复可能有错，不能用于诊断和治疗；身体不适请就医，紧急情况请拨打 120。

| 训练 | |
| --- | --- |
{rows}

![损失曲线](loss.png)

对话模板在分词器里（apply_chat_template）；训练用的系统提示词：

> {system_prompt}
"""


def write(trainer, settings: dict[str, object], origin: dict[str, str | None]) -> None:
    """Into the trainer's output folder. `settings`: output_folder.Run's; `origin`: of the training file."""
    folder = Path(trainer.args.output_dir)
    draw_losses(trainer.state.log_history, folder / "loss.png", saved_step(trainer.args, trainer.state))
    (folder / "README.md").write_text(describe(trainer, settings, origin), encoding="utf-8")


def saved_step(args, state) -> int:
    """The step whose weights a training ends with: the best checkpoint's where that was loaded, else the last."""
    if args.load_best_model_at_end and state.best_model_checkpoint:
        return checkpoints.step_of(Path(state.best_model_checkpoint))
    return state.global_step


def saved_losses(args, state) -> dict[str, float]:
    """The log of the evaluation of the saved weights; empty where they were not evaluated."""
    step = saved_step(args, state)
    return next((log for log in reversed(state.log_history) if "eval_loss" in log and log["step"] == step), {})


def describe_saved(args, state) -> str:
    """Which step's weights were saved, how they were evaluated, and why they were chosen."""
    step, losses = saved_step(args, state), saved_losses(args, state)
    text = f"eval_loss {losses['eval_loss']:.4f}（第 {step} 步）" if losses else f"未评估（第 {step} 步）"
    if args.load_best_model_at_end and state.best_model_checkpoint:
        return f"{text}，按 eval_{args.metric_for_best_model.removeprefix('eval_')} 选出"
    return f"{text}，最后一步"


def describe_parts(args, state) -> dict[str, str]:
    """{what: losses} of the saved weights, thinking and answer apart; empty where they were not evaluated."""
    losses, words = saved_losses(args, state), []
    for part, key in (("按行平均", "eval_loss"), ("思考", "eval_think_loss"), ("回答", "eval_answer_loss")):
        if key in losses:
            words.append(f"{part} {losses[key]:.4f}")
    return {"验证损失": "，".join(words)} if words else {}


def against_published(args, state, origin: dict, published: dict) -> str:
    """The saved weights' eval_loss beside the curve of one public run, where the two were measured alike; else why it
    says nothing. `origin`: of the training file; `published`: dataset, steps, examples_per_step, best, end."""
    loss, why = saved_losses(args, state).get("eval_loss"), None
    changed = [name for name in (*SETTINGS, "val_file") if flags.is_given(args, name) and name not in AS_PUBLISHED]
    step = args.examples_per_step
    sources = [source["source"].removeprefix("ms://").partition("（")[0] for source in origin.get("sources", [])]
    if args.trains_adapter:
        why = "它训练了全部参数，这里只训练 LoRA"
    elif sources != [published["dataset"]]:
        why = f"数据不只是 {published['dataset']}" if published["dataset"] in sources else "数据不同"
    elif not origin.get("raw", True):  # a file without the word is older than the cleaning
        why = "训练文本是清理过的，不是公布的原文（python data.py --raw）"
    elif changed:
        why = f"设置不同（{'、'.join(f'--{name}' for name in changed)}）"
    elif step != published["examples_per_step"]:
        why = f"每步 {step} 条样本，它是 {published['examples_per_step']} 条"
    elif abs(state.max_steps / published["steps"] - 1) > 0.02:  # some rows of the set may be left out
        why = f"共 {state.max_steps} 步，它是 {published['steps']} 步"
    elif loss is None:
        why = "保存的权重没有评估过"
    if why:
        return f"不与公开方案的损失曲线比较：{why}。"
    (best_step, best), (end_step, end) = published["best"], published["end"]
    curve = f"最低 {best}（第 {best_step} 步），最后 {end}（第 {end_step} 步）"
    return f"eval_loss {loss:.3f}；公开方案的一次运行（全部参数，公布的原文）{curve}。"


def draw_losses(log_history: list[dict], path: Path, saved: int) -> None:
    """plot_losses as a picture."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    plot_losses(axes, log_history, saved)
    figure.savefig(path, dpi=120)


def plot_losses(axes, log_history: list[dict], saved: int | None = None) -> None:
    """Training and evaluation loss over the steps; the evaluation of the step that was `saved` is marked, without it
    the best one."""
    for key in ("loss", "eval_loss"):
        if points := [(log["step"], log[key]) for log in log_history if key in log]:
            axes.plot(*zip(*points), marker="o" if key == "eval_loss" else None, markersize=4, label=key)
    evaluations = [(log["eval_loss"], log["step"]) for log in log_history if "eval_loss" in log]
    if marked := [pair for pair in evaluations if saved in (None, pair[1])]:
        loss, step = min(marked)
        name = "best" if saved is None else "saved"
        axes.plot(step, loss, "*", markersize=14, label=f"{name}: {loss:.3f} at step {step}")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()


def describe(trainer, settings: dict[str, object], origin: dict[str, str | None]) -> str:
    """The card's text."""
    args, state, optimizer = trainer.args, trainer.state, trainer.plan.optimizer
    base = found[1] if (found := hub.split(args.model_name)) else Path(args.model_name).name
    mixed = "，混合精度 " + ("bfloat16" if args.bf16 else "float16") if args.bf16 or args.fp16 else ""
    scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    rows = {
        "learning_rate": f"{args.learning_rate:g}（{scheduler}）",
        "每步样本数": settings["examples_per_step"],
        "训练到 epoch / 步": f"{state.epoch:.2f} / {state.global_step}",
        "max_length": args.max_length,
        "训练 / 验证样本": f"{len(trainer.train_dataset)} / {len(trainer.eval_dataset)}",
        "基础模型的版本": args.model_revision or ("本地文件夹" if Path(args.model_name).is_dir() else "默认版本"),
        "基础权重的 SHA-256": settings["model_sha256"],
        "数据": describe_origin(origin),
        f"{args.train_file} 的 SHA-256": origin["train_sha256"],
        "保存的权重": describe_saved(args, state),
        **describe_parts(args, state),
        "优化器": args.optim if optimizer == "optim" else optimizer,
        "梯度裁剪": (0 if trainer.step_hooks else args.max_grad_norm) or "没有",
        "精度": str(trainer.model.dtype).removeprefix("torch.") + mixed,
        "库（保存时）": "，".join(f"{name} {version}" for name, version in libraries.versions().items()),
    }
    rows |= {name: settings[name] for name in LORA_SETTINGS if name in settings}
    table = "\n".join(f"| {name} | {getattr(value, 'value', value)} |" for name, value in rows.items())
    prompt = settings["system_prompt"].replace("\n", "\n> ")
    return CARD.format(base=base, name=args.run_name, rows=table, system_prompt=prompt)


def describe_origin(origin: dict) -> str:
    """What the training file was made from, in the model card."""
    if "sources" not in origin:
        return "不是 data.py 写的，或之后改过"
    return "<br>".join(
        f"{source['source']}{'，版本 ' + source['revision'] if source['revision'] else ''}，SHA-256 {source['sha256']}"
        for source in origin["sources"]
    ) + ("" if origin.get("raw", True) else "<br>训练用的思考由 data.py 清理过")
