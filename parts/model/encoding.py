"""Messages to token ids and labels, generated ids back to thinking and answer, and the system prompt that
travels in a chat template. What people wrote is text and never control. This is the only file that renders a
prompt, for training and for asking alike. It knows no question and no text of a system prompt."""

import copy
import itertools
import json
import re
from bisect import bisect_right
from functools import lru_cache, partial
from typing import NamedTuple

from parts.terminal import first_line, highlight, shorten

IGNORE_INDEX = -100  # a label that the loss skips
THINKING_MODEL = "Qwen/Qwen3-1.7B"  # named where a template cannot do what is asked of it
# In front of a chat template: the system message of a conversation that brings none. The text is a JSON
# string, which is one of Jinja's too, so quotes, line breaks and braces in it are text.
DEFAULT_SYSTEM = """\
{%- if not messages or messages[0].role != 'system' %}
{%- set messages = [{'role': 'system', 'content': TEXT}] + messages %}
{%- endif %}
"""
DEFAULT_PATTERN = re.compile(re.escape(DEFAULT_SYSTEM).replace("TEXT", r'("(?:[^"\\]|\\.)*")'))
PROBE = [{"role": "system", "content": "系统"}, {"role": "user", "content": "问"}]


class Reply(NamedTuple):
    """What a model wrote, in its two parts. Its form says how its tokens arrange them.

    one: there is one closed thinking, and after it the answer, which may be empty. none: nothing is thinking.
    unclosed: the reply ends inside a thinking. broken: anything else, such as two thinkings, a text before
    the thinking, or a tag that closes nothing.
    """

    thinking: str
    answer: str
    complete: bool  # False when max_new_tokens cut it off
    form: str  # one, none, unclosed or broken
    tokens: int = 0  # generated, the one that ended the reply included
    seconds: float = 0.0  # its batch's divided by the batch's replies, so that a file's add up to its time


def with_system(tokenizer, text: str):
    """Return a copy of `tokenizer` whose chat template begins each conversation that has no system message
    with `text`, in place of an earlier default. A conversation that has one is rendered as before."""
    tokenizer = copy.copy(tokenizer)
    template = DEFAULT_PATTERN.sub("", tokenizer.get_chat_template(), count=1)
    tokenizer.chat_template = DEFAULT_SYSTEM.replace("TEXT", json.dumps(text, ensure_ascii=False)) + template
    return tokenizer


def default_system(tokenizer) -> str | None:
    """Return the system prompt that `with_system` put into the template, or None."""
    match = DEFAULT_PATTERN.match(tokenizer.get_chat_template())
    return json.loads(match[1]) if match else None


@lru_cache(maxsize=4)
def control_pattern(tokenizer) -> re.Pattern:
    """Return the pattern of all control tokens, such as <|im_end|> or <think>: those that the tokenizer cuts
    out of a text before it splits the rest."""
    # The longest come first: an alternation takes the first that fits, also where another goes on.
    tokens = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, tokens)) + ")")


@lru_cache(maxsize=4)
def text_tokenizer(tokenizer):
    """Return the same tokenizer without control tokens: to it, `<|im_end|>` is ten ordinary characters."""
    # transformers' split_special_tokens would not do: <think> and </think> are added tokens, yet not special.
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["added_tokens"] = []
    return type(tokenizer.backend_tokenizer).from_str(json.dumps(settings))


def encode_messages(tokenizer, messages: list[dict], prompt_only=False, thinking=True) -> list[int]:
    """Return the token ids of `messages` through the tokenizer's own chat template.

    `prompt_only` adds the opening of the assistant's turn; with `thinking=False` the template puts an empty
    thinking block into it. What people wrote is text and never control: the template is rendered around
    placeholders, and only control tokens that the template itself wrote become control ids, so a question
    that contains `<|im_end|>` cannot end its own turn. For all other text the ids are those of
    `tokenizer.apply_chat_template`.
    """
    texts, skeletons = [], []
    for message in messages:
        skeleton = dict(message)
        for key, text in message.items():
            if text and key != "role":  # an empty text stays: templates look whether there is any thinking
                skeleton[key] = f"\ue000{len(texts)}\ue001"
                # A terminal may hand over half a character, which no tokenizer takes.
                texts.append(text.encode("utf-8", "replace").decode())
        skeletons.append(skeleton)
    options = {"tokenize": False, "add_generation_prompt": prompt_only, "enable_thinking": thinking}
    rendered = tokenizer.apply_chat_template(skeletons, **options)
    control = control_pattern(tokenizer)
    # Text between two control tokens is tokenized as one piece, as the tokenizer itself does it: a token may
    # reach across the border of what the template and what a person wrote.
    ids, piece = [], ""
    for part in re.split(r"(\ue000\d+\ue001)", rendered):
        if part.startswith("\ue000"):
            piece += texts[int(part[1:-1])]
            continue
        for token in control.split(part):
            if control.fullmatch(token):
                ids += encode_text(tokenizer, piece)
                ids.append(tokenizer.convert_tokens_to_ids(token))
                piece = ""
            else:
                piece += token
    return ids + encode_text(tokenizer, piece)


def encode_text(tokenizer, text: str) -> list[int]:
    """Return the ids of a text in which nothing is control."""
    return text_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids


def encode_example(tokenizer, messages: list[dict]) -> dict[str, list[int]]:
    """Return {"input_ids", "labels"}, T numbers each, of a conversation that ends in a reply.

    Supervised are the last reply with its thinking, the answers of earlier ones, which the template shows
    without theirs, and the <|im_end|> of each; all other labels are IGNORE_INDEX. A last reply without
    thinking stands behind the prompt that asks for none. Raises SystemExit where the template has no such
    prompt, or where it writes a conversation otherwise than its prompts.
    """
    ids = encode_messages(tokenizer, messages)
    labels = [IGNORE_INDEX] * len(ids)
    tags = think_tokens(tokenizer)
    roles = [message["role"] for message in messages]
    for turn, role in enumerate(roles):
        if role != "assistant":
            continue
        last = turn == len(roles) - 1
        thinking = not last or bool(messages[turn].get("reasoning_content"))
        prompt = encode_messages(tokenizer, messages[:turn], prompt_only=True, thinking=thinking)
        if not thinking and not set(tags) <= set(prompt):
            reason = "数据中有 think 为空的行，而这个模型的对话模板不能关闭思考"
            raise SystemExit(
                f"错误：{reason}；请去掉这些行，或换一个能关闭思考的模型，例如 {THINKING_MODEL}。"
            )
        if not last and opens_thinking(tokenizer, prompt):  # what the prompt opens is not in the history
            prompt = prompt[: prompt.index(tags[0])]
        # When the model is asked, it is <think> that follows an earlier turn's header, here it is the answer,
        # whose thinking was dropped. To supervise that first token would teach not to think; the rest follows
        # from it.
        start = len(prompt) + (not last)
        ends = tokenizer.eos_token_id in ids[start:]
        end = ids.index(tokenizer.eos_token_id, start) + 1 if ends else len(ids)
        # From the unsupervised token on: a template that keeps thinking in its history writes <think> there.
        thinks = not last and set(tags) & set(ids[start - 1 : end])
        if ids[: len(prompt)] != prompt or not ends or thinks:
            kind = "有思考的行" if thinking else "没有思考的行"
            kind = "多轮对话" if roles.count("assistant") > 1 else kind
            reason = f"这个模型的对话模板在训练和提问时的输出不一致，不能用于{kind}"
            raise SystemExit(f"错误：{reason}；请去掉这些行，或换一个模型，例如 {THINKING_MODEL}。")
        labels[start:end] = ids[start:end]
    return {"input_ids": ids[:end], "labels": labels[:end]}  # without the line break after <|im_end|>


def think_tokens(tokenizer) -> list[int]:
    """Return the ids of <think> and </think>."""
    return tokenizer.convert_tokens_to_ids(["<think>", "</think>"])


def opens_thinking(tokenizer, prompt: list[int]) -> bool:
    """Tell whether the reply to a prompt begins inside the thinking, as with models that always think."""
    start, end = think_tokens(tokenizer)
    for token in reversed(prompt):
        if token in (start, end):
            return token == start
    return False


def require_thinking(tokenizer, name: str) -> None:
    """Raise SystemExit unless the chat template of the model `name` writes thinking and answer as they are
    trained."""
    reply = {"role": "assistant", "reasoning_content": "想", "content": "答"}
    start, end = think_tokens(tokenizer)
    reason = "不支持思考"
    try:
        ids, labels = encode_example(tokenizer, [*PROBE, reply]).values()
        once = ids.count(start) == ids.count(end) == 1
        supervised = [label for label in labels if label != IGNORE_INDEX]
        if once and split_reply(tokenizer, supervised, opened=True)[:4] == ("想", "答", True, "one"):
            return
    except SystemExit:  # the prompt is no beginning of the example, or there is no end of turn
        pass
    except Exception as error:  # templates raise what they like
        reason = f"不能用来训练（{first_line(error)}）"
    raise SystemExit(f"错误：{name} 的对话模板{reason}；请换一个会思考的模型，例如 {THINKING_MODEL}。")


def has_no_thinking_mode(tokenizer) -> bool:
    """Tell whether the template, asked for no thinking, puts an empty thinking block into the prompt."""
    return set(think_tokens(tokenizer)) <= set(encode_messages(tokenizer, PROBE, True, thinking=False))


def describe_lengths(path: str, lengths: list[int], max_length: int) -> str:
    """Return lengths in tokens, and how many examples were left out for theirs, in one line; where
    they are many, that is in yellow."""
    ordered, count = sorted(lengths), len(lengths)
    over = count - bisect_right(ordered, max_length)
    middle, high = ordered[count // 2], ordered[int(count * 0.95)]
    numbers = f"token 数平均 {sum(lengths) / count:.0f}，p50 {middle}，p95 {high}，最长 {ordered[-1]}"
    left_out = f"超过 --max_length {max_length} 而未采用的 {over} 条（{over / count:.1%}）"
    if over >= 0.05 * count:  # more than a person expects who did not choose the length
        left_out = highlight(f"{left_out}，要用上它们请加大 --max_length")
    return f"{path}：{count} 条，{numbers}；{left_out}"


def describe_example(tokenizer, example: dict[str, list[int]]) -> str:
    """Return one example as the model sees it, a line for each prompt and each supervised part."""
    lines = ["示例（⏎ 为换行）"]
    for masked, run in itertools.groupby(zip(*example.values()), lambda pair: pair[1] == IGNORE_INDEX):
        ids, _ = zip(*run)
        kind = "提示（不计损失）" if masked else "监督部分"
        text = tokenizer.decode(list(ids)).replace("\n", "⏎")
        lines.append(f"  {kind}：{shorten(text, 300)}")
    return "\n".join(lines)


def split_reply(tokenizer, ids: list[int], complete: bool = True, opened: bool = False) -> Reply:
    """Return thinking and answer of the generated `ids`, wherever the thinking begins and ends. `opened` says
    that it begins in the prompt. Of a reply that was cut off inside the thinking, the answer is what stood
    before it, as a rule nothing."""
    start, end = think_tokens(tokenizer)
    tags = [token for token in ids if token in (start, end)]
    # A thinking that is closed although it was never opened began with the reply.
    inside = opened or tags[:1] == [end]
    begins_thinking = inside or ids[:1] == [start]
    thinking, answer = [], []
    for token in ids:
        if token in (start, end):
            inside = token == start
        elif inside:
            thinking.append(token)
        else:
            answer.append(token)
    if inside:
        form = "unclosed"
    elif begins_thinking and tags in ([start, end], [end]):
        form = "one"
    else:
        form = "broken" if tags else "none"
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    return Reply(decode(thinking).strip(), decode(answer).strip(), complete, form)
