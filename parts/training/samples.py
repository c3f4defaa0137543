"""A few questions asked at evaluations and at the end of a training; the replies are texts to look at. It
knows how to ask a model in training and leave no trace in it, not which questions these are."""

import time

import torch
import transformers
from tqdm import tqdm

from parts.model import generate
from parts.run import tracking
from parts.terminal import is_out_of_memory, name_unseen
from parts.training.safe_trainer import same_random_states


def answer(trainer, rows: list[dict], to_messages, tokens: int, stop=None) -> list[str]:
    """Return one text for each of `rows`: its question, and a reply of at most `tokens` tokens. A question
    comes after its history, as `to_messages(question, history=…)` puts it. All are asked in one batch,
    without thinking where no row has any; `stop()` is asked at each token, and cuts them off."""
    conversations = [to_messages(row["question"], history=row.get("history")) for row in rows]
    thinking = any(row["think"] for row in rows)
    # Under --full_determinism top-p's sums would raise: on CUDA torch has no order for them.
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        asked = (trainer.model, trainer.processing_class, conversations, tokens, thinking)
        replies = generate.generate(*asked, stop=stop, fast_kernels=trainer.args.fast_kernels)
    finally:
        torch.use_deterministic_algorithms(deterministic)

    texts = []
    for row, reply in zip(rows, replies):
        end = "" if reply.complete else "……（没有写完）"
        texts.append(f"【问题】{row['question']}\n【思考】{reply.thinking}\n【回答】{reply.answer}{end}")
    return list(map(name_unseen, texts))


class Samples(transformers.TrainerCallback):
    """At each evaluation it asks the questions of `rows`, with the same random numbers each time, and writes
    the replies as texts to SwanLab, or on the screen where there is no run of it. Weights, gradients and all
    that is drawn later are as without them."""

    def __init__(self, trainer, rows: list[dict], to_messages, tokens: int):
        self.trainer, self.rows, self.to_messages, self.tokens = trainer, rows, to_messages, tokens

    def on_evaluate(self, args, state, control, **kwargs):
        # One process is enough; and where this one was asked to stop, each second counts.
        if args.process_index or not self.rows or self.stop_requested():
            return
        try:
            texts = self.ask()
            if not tracking.log_texts("Samples", texts, state.global_step):
                tqdm.write("\n\n".join([f"第 {state.global_step} 步  样例：", *texts]))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.rows = []  # later evaluations would run out of it too
            tqdm.write(f"第 {state.global_step} 步  样例：内存（显存）不足，之后不再生成；训练照常。")

    def stop_requested(self) -> bool:
        """Return whether this process was asked to stop. Unlike the trainer's `interrupted`, this asks no
        other process: the others are not here."""
        return bool(self.trainer.interruption and self.trainer.interruption.number)

    def ask(self) -> list[str]:
        """Return the texts. They are cut off by a signal, and before other processes would give up waiting
        for this one. Afterwards weights, gradients, random states, attention and mode are what they were."""
        model, args, device = self.trainer.model, self.trainer.args, self.trainer.args.device
        end = time.monotonic() + args.ddp_timeout / 2
        attention, training = model.config._attn_implementation, model.training
        # Packed attention knows neither padding nor the cache; sdpa does.
        model.set_attn_implementation("sdpa")
        model.eval()  # so no layer is recomputed either, which would drop the cache
        try:
            with same_random_states(device):
                torch.manual_seed(args.seed)
                asked = (self.trainer, self.rows, self.to_messages, self.tokens)
                return answer(*asked, stop=lambda: self.stop_requested() or time.monotonic() > end)
        finally:
            self.trainer.last_hidden = None  # the hook has kept what the replies passed through
            model.set_attn_implementation(attention)
            model.train(training)
            # Else the allocator would keep the blocks of the replies' cache.
            if device.type != "cpu":
                torch.get_device_module(device).empty_cache()
