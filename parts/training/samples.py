"""A few questions asked at evaluations and at the end of a training; the replies are texts to look at. Knows
how to ask a model in training and leave no trace in it, not which questions these are."""

import time

import torch
import transformers
from tqdm import tqdm

from parts.model import generate
from parts.run import tracking
from parts.terminal import is_out_of_memory
from parts.training.safe_trainer import same_random_states


def answer(model, tokenizer, rows: list[dict], to_messages, tokens: int, stop=None) -> list[str]:
    """Return the questions of `rows`, each after its history through `to_messages(question, history=…)`, with
    their replies of at most `tokens` tokens, as texts. They are asked in one batch, without thinking where no
    row has any; `stop()` cuts them off."""
    conversations = [to_messages(row["question"], history=row.get("history")) for row in rows]
    thinking = any(row["think"] for row in rows)
    # Under --full_determinism top-p's sums would raise: on CUDA torch has no order for them.
    exact = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        replies = generate.generate(model, tokenizer, conversations, tokens, thinking, stop=stop)
    finally:
        torch.use_deterministic_algorithms(exact)

    texts = []
    for row, reply in zip(rows, replies):
        end = "" if reply.complete else "……（没有写完）"
        texts.append(f"【问题】{row['question']}\n【思考】{reply.thinking}\n【回答】{reply.answer}{end}")
    return texts


class Samples(transformers.TrainerCallback):
    """At each evaluation the replies to the questions of `rows`, drawn with the same random numbers each
    time, become texts in SwanLab, or on the screen where there is no run of it. Weights, gradients and all
    that is drawn later are as without them."""

    def __init__(self, trainer, rows: list[dict], to_messages, tokens: int):
        self.trainer, self.rows, self.to_messages, self.tokens = trainer, rows, to_messages, tokens

    def on_evaluate(self, args, state, control, **kwargs):
        if args.process_index or not self.rows or self.interrupted():
            return
        try:
            texts = self.ask()
            if not tracking.log_texts("Samples", texts, state.global_step):
                tqdm.write("\n\n".join([f"第 {state.global_step} 步  样例：", *texts]))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.rows = []
            tqdm.write(f"第 {state.global_step} 步  样例：内存（显存）不足，之后不再生成；训练照常。")

    def interrupted(self) -> bool:
        """Return whether this process was asked to stop: then each second counts."""
        return bool(self.trainer.interruption and self.trainer.interruption.number)

    def ask(self) -> list[str]:
        """Return the texts, cut off by a signal, and before other processes would give up waiting for this
        one. Afterwards weights, gradients, random states, attention and mode are what they were: layers are
        recomputed in training mode only, and a cache is there only where one asks for it."""
        model, args, device = self.trainer.model, self.trainer.args, self.trainer.args.device
        end = time.monotonic() + args.ddp_timeout / 2
        attention, training = model.config._attn_implementation, model.training
        model.set_attn_implementation("sdpa")  # which knows padding and the cache
        model.eval()
        try:
            with same_random_states(device):
                torch.manual_seed(args.seed)
                asked = (model, self.trainer.processing_class, self.rows, self.to_messages, self.tokens)
                return answer(*asked, stop=lambda: self.interrupted() or time.monotonic() > end)
        finally:
            self.trainer.last_hidden = None
            model.set_attn_implementation(attention)
            model.train(training)
            if device.type != "cpu":
                torch.get_device_module(device).empty_cache()
