"""Training on packed batches: a loss without logits, an evaluation that does not depend on the batch, a step
split into passes, and a line on the screen for each log. It knows the plan and the kernels that were chosen,
not how they were."""

import statistics
import time

import psutil
import torch
import transformers
from tqdm import tqdm

from parts.model.encoding import IGNORE_INDEX, think_tokens
from parts.training import optimizers, packing
from parts.training.safe_trainer import SafeTrainer

EVAL_TOKENS = 8192  # the most in one evaluation batch, which keeps neither activations nor logits
SLOW = "提示：速度只有预演的 {:.0%}；请看看是否有别的程序占着显卡、显卡限功率或过热、内存不够用了交换区。"
LOG_PARTS = {  # the numbers of a log that are shown, in the order of its line
    "loss": "loss {:.4f}",
    "eval_loss": "评估 eval_loss {:.4f}",
    "eval_think_loss": "思考损失 {:.3f}",
    "eval_answer_loss": "回答损失 {:.3f}",
    "grad_norm": "梯度范数 {:.1f}",
    "learning_rate": "lr {:.2g}",
    "tokens_per_second": "{:,.0f} token/s",
    "peak_memory_gb": "峰值 {:.1f} GB",
    "eval_runtime": "用时 {:.1f} 秒",
    "train_runtime": "训练用时 {:.0f} 秒",
}


class PackedTrainer(SafeTrainer):
    """It is a Trainer whose loss needs no logits, whose evaluation loss does not depend on the batch, and
    that logs tokens per second and peak memory beside the training loss."""

    # Time and tokens since the last log; an evaluation comes after a log, and so is not in it.
    window_start: float | None = None
    window_tokens = 0
    last_hidden: torch.Tensor | None = None  # [B, T, H] of the forward pass under way
    step_hooks = ()  # that step in the backward pass
    promised = 0.0  # tokens/s of all devices, as rehearsed
    plan = None  # that is followed: tokens in a pass, recomputed layers, optimizer, and their bytes

    def __init__(self, *args, kernels, **kwargs):
        super().__init__(*args, data_collator=packing.PackedCollator(), **kwargs)
        self.speeds: list[float] = []  # tokens/s of each log
        self.kernels = kernels  # the fast paths that run here, and agree with the plain ones
        # Rows that are drawn at random come without a tokenizer, and have no thinking.
        self.end_of_thinking = think_tokens(self.processing_class)[1] if self.processing_class else -1
        self.model.get_decoder().register_forward_hook(self.keep_hidden)
        # Trainer adds one of these three by itself.
        bar = self.pop_callback(transformers.ProgressCallback)
        if bar or self.pop_callback(transformers.PrinterCallback):
            self.add_callback(LogLines())
        else:
            self.add_callback(replace_table(self))

    def follow(self, plan) -> None:
        """Train in passes of the plan's size and with its optimizer from now on. Whether layers are
        recomputed is the model's own setting."""
        args, self.plan = self.args, plan
        # The plan is one card's; a checkpoint has the states of all processes that share a model.
        self.state_bytes = plan.parts["优化器"] * (args.world_size if args.fsdp else 1)
        betas = (args.adam_beta1, args.adam_beta2)
        settings = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
        self.optimizer_cls_and_kwargs = optimizers.pick(plan.optimizer, self.kernels.step.runs, **settings)
        for hook in self.step_hooks:  # of an earlier plan
            hook.remove()
        self.step_hooks = ()
        if plan.optimizer.endswith("in_backward"):
            self.step_hooks = optimizers.step_in_backward(self.model, lambda: self.optimizer)

    def keep_hidden(self, module, args, output) -> None:
        self.last_hidden = output.last_hidden_state

    def supervised_losses(self, model, inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the sum of the losses, the losses [N] of the supervised tokens, and their positions [N]
        among the B x (T-1) targets. `model` is asked for no logits at all, but is called as a whole, so that
        DistributedDataParallel sees the pass."""
        inputs = self.for_attention(inputs)
        targets = inputs.pop("labels")[:, 1:]  # [B, T-1]: each position predicts the next token
        with self.accelerator.autocast():  # of float16, if any: a rehearsal's model has none of its own yet
            model(**inputs, logits_to_keep=torch.empty(0, dtype=torch.long, device=targets.device))
        hidden, self.last_hidden = self.last_hidden, None
        positions = (targets != IGNORE_INDEX).flatten().nonzero().squeeze(1)  # waits for the device, once
        weight = self.model.get_output_embeddings().weight  # [V, H]
        if not torch.is_grad_enabled():
            weight = weight.detach()  # else room would be made for its gradient
        hidden = hidden[:, :-1].flatten(0, 1).index_select(0, positions)  # [N, H]
        total, losses = packing.LinearCrossEntropy.apply(hidden, weight, targets.flatten()[positions])
        return total, losses, positions

    def for_attention(self, inputs: dict) -> dict:
        """Return a copy of `inputs` with what the attention in use wants to know of where examples begin."""
        inputs = dict(inputs)
        # transformers 5 has no public name for the attention in use.
        if self.model.config._attn_implementation != packing.PACKED:
            inputs.pop("lengths")  # transformers' own sees in the position ids where examples begin
        elif self.kernels.attention.runs:
            inputs["starts"] = packing.starts_of(inputs["lengths"], inputs["input_ids"].device)
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return this batch's share of the mean loss over the supervised tokens of the whole optimizer step,
        on all devices, as Trainer's own does."""
        if self.args.full_logits:
            return super().compute_loss(model, self.for_attention(inputs), return_outputs, num_items_in_batch)
        total, _, _ = self.supervised_losses(model, inputs)
        # num_items_in_batch counts the tokens of all devices, whose gradients are then averaged.
        return total * self.accelerator.num_processes / num_items_in_batch

    @torch.no_grad()
    def evaluate_rows(self, dataset, rows: list[int]) -> torch.Tensor:
        """Return sums_of_rows of these rows as one batch: [6, rows]."""
        inputs = self._prepare_inputs(self.data_collator([dataset[i] for i in rows]))
        _, losses, positions = self.supervised_losses(self.model, inputs)
        # Position ids restart at each example: their zeros count the rows. All three are [N].
        row_ids = ((inputs["position_ids"] == 0).cumsum(dim=1) - 1)[0, 1:][positions]
        thinking = is_thinking(inputs["labels"][0], self.end_of_thinking)[1:][positions]
        return sums_of_rows(losses, row_ids, thinking, len(rows))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Return {eval_loss, eval_token_loss, eval_think_loss, eval_answer_loss: as losses_of has them;
        eval_runtime in seconds}. No loss depends on the batch size or the number of processes: Trainer's own
        mean over batches would."""
        started = time.perf_counter()
        dataset = eval_dataset or self.eval_dataset
        self.model.eval()
        sums = torch.zeros(6, dtype=torch.float64)  # on the CPU: some accelerators have no float64
        for rows in self.evaluation_batches(dataset):
            sums += torch.stack([column.sum() for column in self.evaluate_rows(dataset, rows)]).cpu()
        sums = self.accelerator.reduce(sums.to(self.args.device, torch.float32)).tolist()
        metrics = losses_of(*sums) | {"runtime": time.perf_counter() - started}
        metrics = {f"{metric_key_prefix}_{name}": round(value, 6) for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_batches(self, dataset) -> list[list[int]]:
        """Return this process's share of the rows, in batches of row numbers."""
        max_tokens = min(EVAL_TOKENS, self.plan.batch_tokens)
        return packing.token_batches(dataset, self.args.process_index, self.args.world_size, max_tokens)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Take the batch in passes of at most batch_tokens tokens; their losses and gradients add up to the
        batch's."""
        if self.window_start is None:
            self.window_start = time.perf_counter()
        self.window_tokens += inputs["input_ids"].numel()
        assert num_items_in_batch is not None  # else the passes' means would add up
        *passes, last = self.passes_of(inputs)
        losses = []
        # Several GPUs add up their gradients once, after the last pass.
        with self.accelerator.no_sync(model):
            for batch in passes:
                losses.append(super().training_step(model, batch, num_items_in_batch))
        return sum(losses, super().training_step(model, last, num_items_in_batch))

    def passes_of(self, inputs) -> list[dict]:
        """Split the batch into one batch for each pass."""
        return packing.split_batch(inputs, self.plan.batch_tokens)

    def learns_thinking(self) -> bool:
        """Tell whether any training example has a thinking that is to be learnt."""
        return any(self.end_of_thinking in labels for labels in self.train_dataset["labels"])

    def drop_gradients(self) -> None:
        """Forget the passes taken so far, of which no step is to come."""
        self.last_hidden = self.window_start = None
        self.window_tokens = 0
        self.model.zero_grad(set_to_none=True)

    def gather(self) -> dict[str, torch.Tensor] | None:
        """Return the trained weights, where the model does not hold them itself."""

    def release(self):
        """Return the model, ready to be asked. The optimizer's states are dropped: the replies need their
        memory."""
        self.check_weights()
        # The callbacks' handler holds the optimizer too, and its states would live on.
        for holder in (self, self.callback_handler):
            holder.optimizer = holder.lr_scheduler = None
        self.model_wrapped = self.model  # DistributedDataParallel holds gradients
        self.accelerator.free_memory()
        self.model.config.use_cache = True  # Trainer switched it off for training
        self.model.set_attn_implementation("sdpa")  # which knows padding and the cache
        return self.model.eval()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self.step_hooks:
            logs.pop("grad_norm", None)  # Trainer's, of the gradients that are left: none
        if "loss" in logs and self.window_start is not None:
            tokens = self.accelerator.reduce(torch.tensor(self.window_tokens, device=self.args.device)).item()
            logs["tokens_per_second"] = round(tokens / (time.perf_counter() - self.window_start), 1)
            logs["peak_memory_gb"] = round(peak(self.args.device) / 1e9, 2)
            self.window_start, self.window_tokens = None, 0
            self.speeds.append(logs["tokens_per_second"])
            # The first steps load kernels, and a single one may be of short examples.
            speed = statistics.median(self.speeds[1:] or self.speeds)
            enough = len(self.speeds) == 1 + max(1, 20 // self.args.logging_steps)
            if enough and speed < 0.6 * self.promised:
                print(SLOW.format(speed / self.promised))
        super().log(logs, *args, **kwargs)


def is_thinking(labels: torch.Tensor, end: int) -> torch.Tensor:
    """Return which of the labels [T] are thinking: the supervised ones of a last reply up to and including
    its </think>, whose id is `end`. All others are answer: what follows, earlier replies, and replies without
    thinking, whose empty block is in the prompt and not supervised. Examples may stand one after another, as
    each begins with its prompt."""
    supervised = labels != IGNORE_INDEX
    # The number of unsupervised labels so far, which is the same within a supervised stretch and names it
    stretch = (~supervised).cumsum(0)
    positions = torch.arange(len(labels), device=labels.device)
    # Where the thinking of each stretch ends; -1, before all positions, where it has none
    ends = torch.full((len(labels) + 1,), -1, device=labels.device)
    ends[stretch[labels == end]] = positions[labels == end]
    return supervised & (positions <= ends[stretch])


def sums_of_rows(losses, row_ids, thinking, rows: int) -> torch.Tensor:
    """Return [6, rows] from the losses of the supervised tokens [N], the rows that they belong to [N], and
    whether they are thinking [N]: 1, the mean loss, the thinking's sum of losses and number of tokens, the
    answer's sum of losses and number of tokens."""
    tokens = torch.bincount(row_ids, minlength=rows)
    means = torch.zeros(rows, device=losses.device).index_add_(0, row_ids, losses) / tokens
    sums = [torch.ones_like(means), means]
    for part in (thinking, ~thinking):
        sums.append(torch.zeros_like(means).index_add_(0, row_ids[part], losses[part]))
        sums.append(torch.bincount(row_ids[part], minlength=rows))
    return torch.stack(sums)


def losses_of(rows, means, think, think_tokens, answer, answer_tokens) -> dict[str, float]:
    """Return, from sums_of_rows, each summed over all rows: `loss`, the mean over the rows of their mean
    token loss, as published; `token_loss`, `think_loss` and `answer_loss`, means over all tokens, and over
    those of one part. There is no `think_loss` where no row has a thinking."""
    losses = {"loss": means / rows, "token_loss": (think + answer) / (think_tokens + answer_tokens)}
    if think_tokens:
        losses["think_loss"] = think / think_tokens
    return losses | {"answer_loss": answer / answer_tokens}


class LogLines(transformers.ProgressCallback):
    """It prints a line of at most 80 columns where Trainer would print a dict; the bar stays below the lines,
    and is there at a terminal only: in a file each of its moves would be a line."""

    def on_train_begin(self, args, state, control, **kwargs):
        # None: tqdm itself looks whether there is a terminal.
        disable = args.disable_tqdm or not state.is_world_process_zero or None
        start = self.current_step = state.global_step
        self.training_bar = tqdm(total=state.max_steps, initial=start, disable=disable, dynamic_ncols=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = f"第 {state.global_step} 步"
        shown = [name for name in LOG_PARTS if name in logs]
        for name in shown:
            line += "  " + LOG_PARTS[name].format(logs[name])
        if state.is_world_process_zero and shown:
            tqdm.write(line)


def replace_table(trainer) -> transformers.TrainerCallback:
    """Take from `trainer` the table that transformers shows in a notebook: all that an evaluation returns, in
    English. Return one with a line for each evaluation: the step and two losses."""
    # It imports IPython, which is there in a notebook only.
    from transformers.utils.notebook import NotebookProgressCallback

    class LossTable(NotebookProgressCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            self.training_tracker.inner_table = [["步", "训练损失", "验证损失"]]

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            training_loss = "—"  # an evaluation before the first log has none
            for log in state.log_history:
                training_loss = log.get("loss", training_loss)
            line = {"步": state.global_step, "训练损失": training_loss, "验证损失": metrics["eval_loss"]}
            if self.training_tracker:  # else it is evaluated without a training
                self.training_tracker.write_line(line)

    trainer.pop_callback(NotebookProgressCallback)
    return LossTable()


def peak(device: torch.device) -> int:
    """Return the most bytes that the device's allocator has reserved; without one, what the process holds
    now."""
    backend = getattr(torch, device.type, None)  # torch.cuda, torch.npu
    if hasattr(backend, "max_memory_reserved"):
        return backend.max_memory_reserved()
    return psutil.Process().memory_info().rss
