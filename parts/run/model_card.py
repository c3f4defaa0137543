"""README.md and loss.png of an output folder: what a model was trained from and how, and what it is not."""

from operator import itemgetter
from pathlib import Path

import matplotlib.figure

from parts.run import checkpoints
from parts.run.folder import LORA_SETTINGS, SETTINGS

# Settings of a training whose change makes it another than the published one. Not full_logits, which is how
# the published one computed its loss.
DECISIVE = {*SETTINGS, "val_file"} - {"full_logits"}

CARD = """\
---
base_model: {base}
language: zh
pipeline_tag: text-generation
---

# {name}

由 {base} 微调的中文医学对话模型：{way}。

**它不是医生。** 回复可能有错；没有医生检查过训练数据和回复。不要用它诊断、开药、定剂量、停药、判断急症，\
或代替医生；身体不适请就医，紧急情况请拨打 120。{faults}

许可：基础模型 {base} 和训练数据各有自己的许可，公开或商用之前请自行确认（Qwen3 是 Apache-2.0；\
delicate_medical_r1_data 没有写明）。

| 训练 | |
| --- | --- |
{rows}

![损失曲线](loss.png)

对话模板在分词器里（apply_chat_template）；训练用的系统提示词：

> {system_prompt}
"""


def write(trainer, settings: dict[str, object], origin: dict, versions: dict[str, str], faults: str) -> None:
    """Write both into the trainer's output folder. `settings` are a Run's, `origin` is that of the training
    file, `versions` are those of the libraries; `faults` is what is known to be wrong with the data, or
    ""."""
    folder = Path(trainer.args.output_dir)
    # Not by pyplot, which would keep it in memory and show it in a notebook.
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    plot_losses(figure.subplots(), trainer.state.log_history, saved_step(trainer.state))
    figure.savefig(folder / "loss.png", dpi=120)
    card = describe(trainer, settings, origin, versions, faults)
    (folder / "README.md").write_text(card, encoding="utf-8")


def saved_step(state) -> int:
    """Return the step whose weights a training ends with: the best checkpoint's, or the last where none was
    evaluated."""
    best = state.best_model_checkpoint
    return checkpoints.step_of(Path(best)) if best else state.global_step


def saved_losses(state) -> dict[str, float]:
    """Return the log of the evaluation of the saved weights; it is empty where they were not evaluated."""
    step = saved_step(state)
    # The step has other logs too, such as that of the training loss.
    for log in reversed(state.log_history):
        if "eval_loss" in log and log["step"] == step:
            return log
    return {}


def describe_saved(state) -> str:
    """Say which step's weights were saved, how they were evaluated, and why they were chosen."""
    losses = saved_losses(state)
    loss = f"eval_loss {losses['eval_loss']:.4f}" if losses else "未评估"
    reason = "按 eval_loss 选出" if state.best_model_checkpoint else "最后一步"
    return f"{loss}（第 {saved_step(state)} 步），{reason}"


def datasets_of(origin: dict) -> list[str]:
    """Return the names of the data sets that a training file was made from."""
    names = []
    for source in origin.get("sources", []):
        # "ms://owner/name（files）": the hub and the files of it do not make it another set.
        names.append(source["source"].removeprefix("ms://").partition("（")[0])
    return names


def against_published(args, state, origin: dict, published: dict, changed: list[str]) -> str:
    """Compare the saved weights' eval_loss with the curve of one public run where the two were measured
    alike; else say why not. `origin` is that of the training file, `published` has dataset, steps,
    examples_per_step, best and end, `changed` are the flags that are not the recipe's."""
    losses, datasets = saved_losses(state), datasets_of(origin)
    others = "、".join(f"--{name}" for name in changed if name in DECISIVE)
    examples, theirs = args.examples_per_step, published["examples_per_step"]
    # Within 2 %, as some rows of the set may be left out.
    other_steps = abs(state.max_steps / published["steps"] - 1) > 0.02
    reasons = {  # of which the first that holds is named
        "公开方案训练了全部参数，这里只训练 LoRA": args.trains_adapter,
        "数据不同": published["dataset"] not in datasets,
        f"数据不只是 {published['dataset']}": len(datasets) > 1,
        "思考和回答是教师模型重写的": "teacher" in origin,
        # A file without the word is older than the cleaning.
        "训练文本是清理过的，不是公布的原文（python data.py --raw）": not origin.get("raw", True),
        f"设置不同（{others}）": others,
        f"每步 {examples} 条样本，公开方案是 {theirs} 条": examples != theirs,
        f"共 {state.max_steps} 步，公开方案是 {published['steps']} 步": other_steps,
        "保存的权重没有评估过": not losses,
    }
    for reason, holds in reasons.items():
        if holds:
            return f"不与公开方案的损失曲线比较：{reason}。"
    (best_step, best), (end_step, end) = published["best"], published["end"]
    curve = f"最低 {best}（第 {best_step} 步），最后 {end}（第 {end_step} 步）"
    return f"eval_loss {losses['eval_loss']:.3f}；公开方案的一次运行（全部参数，公布的原文）{curve}。"


def curve_of(log_history: list[dict], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of each log that has `key`."""
    return [(log["step"], log[key]) for log in log_history if key in log]


def plot_losses(axes, log_history: list[dict], saved: int | None = None) -> None:
    """Draw training and evaluation loss over the steps; a star marks the evaluation of the step that was
    `saved`, without it the best one."""
    for key, marker in (("loss", None), ("eval_loss", "o")):
        points = curve_of(log_history, key)
        if points:
            axes.plot(*zip(*points), marker=marker, markersize=4, label=key)
    evaluations = curve_of(log_history, "eval_loss")
    if saved is not None:
        evaluations = [point for point in evaluations if point[0] == saved]
    if evaluations:
        step, loss = min(evaluations, key=itemgetter(1, 0))
        name = "best" if saved is None else "saved"
        axes.plot(step, loss, "*", markersize=14, label=f"{name}: {loss:.3f} at step {step}")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()


def describe(trainer, settings: dict, origin: dict, versions: dict[str, str], faults: str) -> str:
    """Return the card's text."""
    args, state = trainer.args, trainer.state
    # A local folder by its name alone: its path means nothing on another machine.
    local = Path(args.model_name).is_dir()
    base = Path(args.model_name).name if local else args.model_name.rpartition("://")[2]
    losses, validation = saved_losses(state), []
    for key, name in (("eval_loss", "按行平均"), ("eval_think_loss", "思考"), ("eval_answer_loss", "回答")):
        if key in losses:
            validation.append(f"{name} {losses[key]:.4f}")
    rows = {
        "learning_rate": f"{args.learning_rate:g}（{settings['lr_scheduler_type']}）",
        "每步样本数": settings["examples_per_step"],
        "训练到 epoch / 步": f"{state.epoch:.2f} / {state.global_step}",
        "max_length": args.max_length,
        "训练 / 验证样本": f"{len(trainer.train_dataset)} / {len(trainer.eval_dataset)}",
        "基础模型的版本": args.model_revision or ("本地文件夹" if local else "默认版本"),
        checkpoints.BASE_SHA256: settings["model_sha256"],
        "数据": describe_origin(origin),
        f"{args.train_file} 的 SHA-256": origin["train_sha256"],
        "保存的权重": describe_saved(state),
        "验证损失": "，".join(validation),
        "优化器": trainer.plan.optimizer,
        "梯度裁剪": args.max_grad_norm or "不裁剪",
        "精度": str(trainer.model.dtype).removeprefix("torch."),
        "库（保存时）": "，".join(map(" ".join, versions.items())),
    }
    rows |= {name: settings[name] for name in LORA_SETTINGS if name in settings}
    if args.adapter:
        rows["从哪个适配器接着训练"] = f"{args.adapter}，SHA-256 {settings['adapter (sha256)']}"
    way = "先在 `<think>…</think>` 里思考，再回答"
    if not trainer.learns_thinking():
        way = "训练数据没有思考，直接回答"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value != "")
    prompt = settings["system_prompt"].replace("\n", "\n> ")
    faults = f"\n\n已知的问题：{faults}" if faults else ""
    texts = {"base": base, "name": args.run_name, "way": way, "faults": faults}
    return CARD.format(rows=table, system_prompt=prompt, **texts)


def describe_origin(origin: dict) -> str:
    """Say what the training file was made from."""
    if "sources" not in origin:
        return "不是 data.py 写的，或之后改过"
    lines = []
    for source in origin["sources"]:
        revision = f"，版本 {source['revision']}" if source["revision"] else ""
        lines.append(f"{source['source']}{revision}，SHA-256 {source['sha256']}")
    if not origin.get("raw", True):
        lines.append("训练用的思考由 data.py 清理过")
    if teacher := origin.get("teacher"):
        lines.append(f"{teacher['rows']} 行（含验证集）的思考和回答由 {teacher['model']} 重写")
    return "<br>".join(lines)  # Markdown's tables know no other line break
