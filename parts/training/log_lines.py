"""What a training says on the screen: a line of at most 80 columns for each log. Knows the names of what is logged."""

import transformers
from tqdm import tqdm

LOG_PARTS = {  # of a log, as they stand in its line
    "loss": "loss {:.4f}",
    "eval_loss": "评估 eval_loss {:.4f}",
    "eval_think_loss": "思考 {:.3f}",
    "eval_answer_loss": "回答 {:.3f}",
    "grad_norm": "梯度 {:.2f}",
    "learning_rate": "学习率 {:.3g}",
    "tokens_per_second": "{:,.0f} token/秒",
    "peak_memory_gb": "{:.2f} GB",
    "eval_runtime": "{:.1f} 秒",
    "train_runtime": "训练用时 {:.0f} 秒",
}


class LogLines(transformers.TrainerCallback):
    """Where Trainer would print a dict; the bar stays below the lines."""

    def on_train_begin(self, args, state, control, **kwargs):
        hidden = args.disable_tqdm or not state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, disable=hidden, dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        parts = [form.format(logs[name]) for name, form in LOG_PARTS.items() if name in logs]
        if state.is_world_process_zero and parts:
            tqdm.write("  ".join([f"第 {state.global_step} 步", *parts]))

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
