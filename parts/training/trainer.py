"""Training on packed batches: a loss without logits, an evaluation that no batch changes, and a step cut into passes.
Knows the plan and the kernels that were chosen, not how."""

import time

import torch
import transformers

from parts.machine import memory
from parts.machine import plan as memory_plan
from parts.machine.kernels import Kernels
from parts.machine.plan import Plan
from parts.model import encoding
from parts.model.encoding import IGNORE_INDEX
from parts.training import evaluation, optimizers
from parts.training.log_lines import LogLines
from parts.training.loss import LinearCrossEntropy
from parts.training.packing import PACKED, PackedCollator, split_batch, starts_of, token_batches
from parts.training.safe_trainer import SafeTrainer

EVAL_TOKENS = 8192  # at most, of whole examples in one evaluation batch, which keeps neither activations nor logits


class PackedTrainer(SafeTrainer):
    """Trainer whose loss needs no logits, whose evaluation loss does not depend on the batch, and that logs tokens
    per second and peak memory beside the training loss."""

    window_start: float | None = None  # of the steps since the last log; evaluations and saving come after a log
    window_tokens = 0
    last_hidden: torch.Tensor | None = None  # [B, T, H] of the forward pass under way
    step_hooks: tuple = ()  # that step in the backward pass
    plan: Plan | None = None  # that is followed

    def __init__(self, *args, kernels: Kernels, **kwargs):
        super().__init__(*args, data_collator=PackedCollator(), **kwargs)
        self.kernels = kernels
        # Rows that are drawn at random come without a tokenizer, and have no thinking.
        self.end_of_thinking = encoding.think_tokens(self.processing_class)[1] if self.processing_class else -1
        self.model.get_decoder().register_forward_hook(self.keep_hidden)
        # A notebook's table stays.
        if self.pop_callback(transformers.ProgressCallback) or self.pop_callback(transformers.PrinterCallback):
            self.add_callback(LogLines())

    def follow(self, plan: Plan) -> None:
        """Train by this plan from now on."""
        args, self.plan = self.args, plan
        self.state_bytes = plan.parts["优化器"]
        settings = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        self.optimizer_cls_and_kwargs = optimizers.pick(plan.optimizer, self.kernels.step.runs, **settings)
        memory_plan.apply(plan, self.model)
        for hook in self.step_hooks:  # of an earlier plan
            hook.remove()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        in_backward = plan.optimizer.endswith("in_backward")
        self.step_hooks = optimizers.step_in_backward(trained, lambda: self.optimizer) if in_backward else []

    def keep_hidden(self, module, args, output) -> None:
        self.last_hidden = output.last_hidden_state

    def supervised_losses(self, model, inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum, losses [N], where [N] the supervised tokens stand among the B x (T-1)). `model` is asked for no logits
        at all, but is called as a whole, so that DistributedDataParallel sees the pass."""
        inputs = self.for_attention(inputs)
        targets = inputs.pop("labels")[:, 1:]
        model(**inputs, logits_to_keep=torch.empty(0, dtype=torch.long, device=targets.device))
        hidden, self.last_hidden = self.last_hidden, None
        where = (targets != IGNORE_INDEX).flatten().nonzero().squeeze(1)  # waits for the device, once
        weight = self.model.get_output_embeddings().weight
        weight = weight if torch.is_grad_enabled() else weight.detach()  # else room is made for its gradient
        hidden = hidden[:, :-1].flatten(0, 1).index_select(0, where)
        return *LinearCrossEntropy.apply(hidden, weight, targets.flatten()[where]), where

    def for_attention(self, inputs: dict) -> dict:
        """A copy of `inputs` with what the attention in use wants to know of where examples begin; transformers' own
        sees it in the position ids."""
        inputs = dict(inputs)
        if self.model.config._attn_implementation != PACKED:
            inputs.pop("lengths")
        elif self.kernels.varlen:
            inputs["starts"] = starts_of(inputs["lengths"], inputs["input_ids"].device)
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over the supervised tokens of the whole optimizer step, on all devices, as Trainer's own."""
        if self.args.full_logits:
            return super().compute_loss(model, self.for_attention(inputs), return_outputs, num_items_in_batch)
        total, losses, _ = self.supervised_losses(model, inputs)
        if num_items_in_batch is None:
            return total / len(losses)
        # num_items_in_batch is that of all devices, whose gradients are averaged.
        return total * self.accelerator.num_processes / num_items_in_batch

    def eval_tokens(self) -> int:
        """At most in one evaluation batch."""
        return min(EVAL_TOKENS, self.plan.batch_tokens)

    @torch.no_grad()
    def evaluate_rows(self, dataset, rows: list[int]) -> torch.Tensor:
        """evaluation.per_row of these rows as one batch: [6, rows]."""
        inputs = self._prepare_inputs(self.data_collator([dataset[i] for i in rows]))
        with self.compute_loss_context_manager():
            _, losses, where = self.supervised_losses(self.model, inputs)
        row = ((inputs["position_ids"] == 0).cumsum(dim=1) - 1)[0, 1:][where]
        thinking = evaluation.is_thinking(inputs["labels"][0], self.end_of_thinking)[1:][where]
        return evaluation.per_row(losses, row, thinking, len(rows))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """{eval_loss, eval_token_loss, eval_think_loss, eval_answer_loss: as evaluation.losses_of has them;
        eval_runtime in seconds}. No loss depends on batch size or number of processes."""
        started = time.perf_counter()
        dataset = eval_dataset or self.eval_dataset
        self.model.eval()
        sums = torch.zeros(6, dtype=torch.float64)  # of per_row's columns
        for rows in self.evaluation_batches(dataset):
            sums += torch.stack([column.sum() for column in self.evaluate_rows(dataset, rows)]).cpu()
        sums = self.accelerator.reduce(sums.to(self.args.device, torch.float32)).tolist()
        metrics = evaluation.losses_of(sums) | {"runtime": time.perf_counter() - started}
        metrics = {f"{metric_key_prefix}_{name}": round(value, 6) for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_batches(self, dataset) -> list[list[int]]:
        """This process's share of the rows."""
        return token_batches(dataset, self.args.process_index, self.args.world_size, self.eval_tokens())

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The batch in parts of at most batch_tokens tokens; their losses and gradients add up to the batch's."""
        if self.window_start is None:
            self.window_start = time.perf_counter()
        self.window_tokens += inputs["input_ids"].numel()
        return self.take_passes(model, inputs, num_items_in_batch)

    def take_passes(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """Forward and backward of the batch; its loss."""
        assert num_items_in_batch is not None  # else the parts' means would add up
        *parts, last = self.parts_of(inputs)
        with self.between_passes(model):
            losses = [super(PackedTrainer, self).training_step(model, part, num_items_in_batch) for part in parts]
        return sum(losses, super().training_step(model, last, num_items_in_batch))

    def parts_of(self, inputs) -> list[dict]:
        """The batch, a pass each."""
        return split_batch(inputs, self.plan.batch_tokens)

    def between_passes(self, model):
        """Around all passes but the last: several GPUs add up their gradients once, after that one."""
        return self.accelerator.no_sync(model)

    def drop_gradients(self) -> None:
        """Forget passes of which no step is to come."""
        self.last_hidden = None
        self.model.zero_grad(set_to_none=True)

    def gather(self) -> dict[str, torch.Tensor] | None:
        """The trained weights, where the model does not hold them itself."""

    def release(self):
        """The model, ready to be asked. The optimizer's states are dropped: the replies need their memory."""
        self.check_weights()
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
            logs["peak_memory_gb"] = round(memory.peak(self.args.device) / 1e9, 2)
            self.window_start, self.window_tokens = None, 0
        super().log(logs, *args, **kwargs)
