"""The same few questions asked at each evaluation of a training: replies as text, and what can be counted of them as
curves. Knows how to ask a model in training and leave no trace in it, not which questions these are."""

import contextlib
import time

import torch
import transformers
from tqdm import tqdm

from parts import encoding, rehearsal, replies, scores, tracking
from parts.decoding import CACHE_STEP
from parts.encoding import Reply
from parts.rows import Row
from parts.terminal import is_out_of_memory

SHARE = 0.05  # of the training's time, at most


def conversations(rows: list[Row], to_messages) -> list[list[dict[str, str]]]:
    """The questions of `rows`, each after its history, through `to_messages(question, history=…)`."""
    return [to_messages(row["question"], history=row.get("history")) for row in rows]


def answer(model, tokenizer, rows: list[Row], to_messages, tokens: int, stop=None) -> list[Reply]:
    """Replies to the questions of `rows`, in one batch; without thinking where none of the rows has any. `stop()` cuts
    them off."""
    thinking, exact = any(row["think"] for row in rows), torch.are_deterministic_algorithms_enabled()
    # Under --full_determinism top-p's sums would raise: on CUDA torch has no order for them.
    torch.use_deterministic_algorithms(False)
    try:
        return replies.generate(model, tokenizer, conversations(rows, to_messages), tokens, thinking, stop=stop)
    finally:
        torch.use_deterministic_algorithms(exact)


def show(model, tokenizer, rows: list[Row], to_messages, tokens: int) -> list[str]:
    """Replies, printed, and as one text each."""
    found = answer(model, tokenizer, rows, to_messages, tokens)
    texts = [describe(row, reply, tokens) for row, reply in zip(rows, found)]
    print(*(f"\n{text}" for text in texts), sep="\n")
    return texts


class Samples(transformers.TrainerCallback):
    """Replies to the questions of `rows`, of at most `tokens` tokens, in one batch with the same random numbers each
    time; curves and texts of them.

    They take no more than SHARE of the training's time. A batch is begun only where the time that was spent on them,
    and once more what the last one took, is at most SHARE of the time since the training began. The first one, of which
    nothing is known, is taken at the first evaluation; it, and all others, are broken off where all samples together
    would take more than SHARE of what the whole training will take at its speed so far, and are then not logged. So the
    promise is kept by every training that runs to its last step; of one that stops early after one batch it may be
    more. What is left out is said. Where memory is not enough for them the training goes on without.
    """

    began: float | None = None  # when the training did
    spent = last = 0.0  # seconds: on all batches, on the last one
    skipping = False  # and that was said

    def __init__(self, trainer, rows: list[Row], to_messages, tokens: int):
        self.trainer, self.rows, self.to_messages, self.tokens = trainer, rows, to_messages, tokens

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first_step = time.perf_counter(), state.global_step
        if not self.rows or args.eval_strategy == "no":
            return
        if (fits := self.fitting()) < len(self.rows):
            print(f"样例：评估时内存只够同时回答 {fits} 个问题，不是 {len(self.rows)} 个。")
            self.rows = self.rows[:fits]

    def on_evaluate(self, args, state, control, **kwargs):
        if args.process_index or not self.rows or self.began is None or self.interrupted():
            return
        elapsed, done = time.perf_counter() - self.began, state.global_step - self.first_step
        if not done or self.spent + self.last > SHARE * elapsed:
            if not self.skipping:
                self.say(f"样例暂不生成：已用 {self.spent:.1f} 秒，再来一批就超过训练时间的 {SHARE:.0%}")
            self.skipping = True
            return
        limit = SHARE * elapsed * (state.max_steps - self.first_step) / done - self.spent
        if args.world_size > 1:  # the other processes wait at what they do together next
            limit = min(limit, args.ddp_timeout / 2)
        self.skipping, started = False, time.perf_counter()
        found = self.ask(started + limit)
        seconds = time.perf_counter() - started
        if found is None:
            self.rows = []
            self.say("样例：内存（显存）不足，之后不再生成；训练照常")
        elif seconds > limit:
            self.say(f"样例没有做完：给它的 {limit:.1f} 秒不够（最多占训练时间的 {SHARE:.0%}），不记录")
        elif not self.interrupted():
            self.log(found, seconds)
        self.last = time.perf_counter() - started
        self.spent += self.last

    def on_train_end(self, args, state, control, **kwargs):
        self.began = None

    def interrupted(self) -> bool:
        """Whether this process was asked to stop: then each second counts."""
        return bool(self.trainer.interruption and self.trainer.interruption.number)

    def say(self, text: str) -> None:
        """A line above the bar."""
        tqdm.write(f"第 {self.trainer.state.global_step} 步  {text}。")

    def fitting(self) -> int:
        """Questions whose keys and values fit into what a step of training takes, and which is free between steps."""
        model, plan = self.trainer.model, self.trainer.plan
        room = max(plan.free, plan.total) - plan.parts["权重"] - plan.parts["优化器"]
        longest = max(
            len(encoding.encode_messages(self.trainer.processing_class, messages, prompt_only=True))
            for messages in conversations(self.rows, self.to_messages)
        )
        return int(room / replies.token_bytes(model) / (longest + self.tokens + CACHE_STEP))

    def ask(self, end: float) -> list[Reply] | None:
        """The replies, cut off at the time `end` or by a signal. None: the memory is not enough."""
        trainer = self.trainer

        def stop() -> bool:
            return time.perf_counter() > end or self.interrupted()

        with untouched(trainer):
            transformers.set_seed(trainer.args.seed)
            try:
                return answer(trainer.model, trainer.processing_class, self.rows, self.to_messages, self.tokens, stop)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
        return None

    def log(self, found: list[Reply], seconds: float) -> None:
        """Curves for all that Trainer reports to, and texts for SwanLab."""
        trainer = self.trainer
        thinking = any(row["think"] for row in self.rows)
        shares = [measure(row, reply, thinking) for row, reply in zip(self.rows, found)]
        means = {f"eval_sample_{name}": sum(each[name] for each in shares) / len(shares) for name in shares[0]}
        trainer.log(means | {"eval_sample_seconds": round(seconds, 2)})
        texts = [describe(row, reply, self.tokens) for row, reply in zip(self.rows, found)]
        tracking.log_texts(trainer.args, "Samples", texts, trainer.state.global_step)


@contextlib.contextmanager
def untouched(trainer):
    """Inside, the trainer's model can be asked; behind it weights, gradients, random states, attention and mode are
    what they were. Layers are recomputed in training mode only, and a cache is there only where one asks for it."""
    model, device = trainer.model, trainer.args.device
    attention, mode = model.config._attn_implementation, model.training
    model.set_attn_implementation("sdpa")  # which knows padding and the cache
    model.eval()
    try:
        with rehearsal.same_random_states(device):
            yield
    finally:
        trainer.last_hidden = None
        model.set_attn_implementation(attention)
        model.train(mode)
        if device.type != "cpu":
            torch.get_device_module(device).empty_cache()


def measure(row: Row, reply: Reply, thinking: bool) -> dict[str, float]:
    """Of one reply, 0 to 1, as scores.py has them: `whole`; `leak`, a trace in the thinking; `loop`; `overlap` of the
    answer with the row's, ROUGE-L over words. `thinking`: it was asked for."""
    return {
        "whole": float(scores.whole(reply, thinking)),
        "leak": float(bool(scores.find_traces(row, reply))),
        "loop": float(scores.loops(reply.thinking) or scores.loops(reply.answer)),
        "overlap": scores.rouge(scores.written(reply), row["answer"])[2],
    }


def describe(row: Row, reply: Reply, tokens: int) -> str:
    """A question and its reply, of at most `tokens` tokens, to be read."""
    end = "" if reply.complete else f"……（到 {tokens} 个 token 为止）"
    return f"【问题】{row['question']}\n【思考】{reply.thinking}\n【回答】{reply.answer}{end}"
