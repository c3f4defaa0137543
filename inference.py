"""Ask the fine-tuned model; the thinking streams dimmed, the answer follows.

    python inference.py                         # the trained model in output/, the published question
    python inference.py "感冒了要吃抗生素吗？"
    python inference.py --chat                  # a conversation; an empty line ends it
    python inference.py --model_path Qwen/Qwen3-1.7B "感冒了要吃抗生素吗？"     # any other model, the untuned one too
    python inference.py --no_thinking "…"       # answer at once

The replies are a language model's and may be wrong. They are not medical advice.
"""

import argparse
import json
import logging
import shlex
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from rich.console import Console
from safetensors import SafetensorError

from data import HUB_ID, MODEL_NAME, OUTPUT_DIR, SEED, encode_messages, first_line, from_hub, run_main, to_messages

QUESTION = "医生，我最近被诊断为糖尿病，听说碳水化合物的选择很重要，我应该选择什么样的碳水化合物呢？"
MAX_NEW_TOKENS = 2048
END_OF_TURN = "<|im_end|>"  # generation stops here
# What Qwen advises without thinking; while thinking the model's own generation settings hold.
NO_THINKING_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}
ADAPTER_CONFIG = "adapter_config.json"
FINISHED_MARK = "trainer_state.json"  # train.py writes it into the output folder last
NOT_A_DOCTOR = "提醒：回复由语言模型生成，可能有错，不能代替医生的诊断；身体不适请及时就医，紧急情况请拨打 120。"

Messages = list[dict[str, str]]


class Reply(NamedTuple):
    thinking: str
    answer: str
    complete: bool  # False when max_new_tokens cut it off


# ---- finding and loading the model --------------------------------------------------------------------------------


def find_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Their last file is trainer_state.json: one without it was cut off."""
    found = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return sorted((path for path in found if path.name[11:].isdecimal()), key=lambda path: int(path.name[11:]))


def find_trained(folder: str | Path, config: str = "config.json", train_script: str = "train.py") -> Path:
    """The best weights below `folder`: the folder itself once training is finished (or when it is any saved model),
    else the checkpoint with the best evaluation loss so far, else the newest one. Raises SystemExit without any."""
    folder = Path(folder)
    checkpoints = [path for path in find_checkpoints(folder) if (path / config).is_file()]
    if (folder / config).is_file() and ((folder / FINISHED_MARK).is_file() or not checkpoints):
        return folder
    if not checkpoints:
        other = {"config.json": ADAPTER_CONFIG, ADAPTER_CONFIG: "config.json"}[config]
        if (folder / other).is_file():
            script = "inference_lora.py" if other == ADAPTER_CONFIG else "inference.py"
            raise SystemExit(
                f"错误：{folder} 要用另一个脚本来问：python {script} --model_path {shlex.quote(str(folder))}"
            )
        raise SystemExit(
            f"错误：{folder} 里没有训练好的模型；请先运行 python {train_script}，或用 --model_path 指定模型的文件夹。"
        )
    try:
        state = json.loads((checkpoints[-1] / FINISHED_MARK).read_text(encoding="utf-8"))
        best = Path(folder, Path(state["best_model_checkpoint"]).name)
    except (OSError, ValueError, KeyError, TypeError):  # no evaluation yet, or killed while writing
        best = None
    return best if best in checkpoints else checkpoints[-1]


def resolve_model(name: str, remedy: str = "用 --model_name 指定本地模型文件夹") -> str:
    """A folder as it is; else the folder into which ModelScope's client downloads the model `name`."""
    if Path(name).is_dir():
        if Path(name, ADAPTER_CONFIG).is_file():
            raise SystemExit(
                f"错误：{name} 是 LoRA 适配器，不是完整的模型；"
                f"请先合并：python inference_lora.py --model_path {shlex.quote(name)} --merge_to output/merged"
            )
        return str(Path(name).resolve())
    if not HUB_ID.fullmatch(name) or name.startswith("output/"):
        raise SystemExit(
            f"错误：找不到模型 {name}：既不是已有的文件夹，也不是 ModelScope 模型名（形如 {MODEL_NAME}）。"
        )
    from modelscope import snapshot_download

    # Weights as safetensors only; the repository's other formats are neither needed nor safe to load.
    return str(from_hub(snapshot_download, name, "模型", remedy, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.onnx"]))


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, else float32."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        has_bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        has_bf16 = device.type == "npu"
    return torch.bfloat16 if has_bf16 else torch.float32


def quiet_libraries() -> None:
    """Keep off the screen what libraries tell each other: weight-file progress bars, deprecations, tied weights."""
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    tied = "missing keys in the checkpoint model loaded: ['lm_head.weight']"  # it is the embedding, and is loaded
    logging.getLogger("transformers.trainer").addFilter(lambda record: tied not in record.getMessage())


def load_tokenizer(path: str):
    """The tokenizer of a model folder. Raises SystemExit when it has no chat template."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SystemExit(f"错误：{path} 里的分词器无法读取（{first_line(error)}）；请重新下载或换一个模型。") from None
    if not tokenizer.chat_template or END_OF_TURN not in tokenizer.get_vocab():
        raise SystemExit(
            f"错误：{path} 的分词器没有 {END_OF_TURN} 或对话模板；请换一个 Qwen3 模型，例如 {MODEL_NAME}。"
        )
    tokenizer.eos_token = END_OF_TURN  # a base model, Qwen3-1.7B-Base for one, names <|endoftext|>
    return tokenizer


def load_weights(path: str, device: torch.device):
    """The model of a folder, in `best_dtype(device)`, on `device`, in eval mode."""
    quiet_libraries()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=best_dtype(device), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # missing, cut off, or of another shape
        raise SystemExit(f"错误：{path} 里的模型无法读取（{first_line(error)}）；请重新下载或重新训练。") from None
    return model.to(device).eval()


def pick_device() -> torch.device:
    """CUDA, NPU, MPS or the CPU: what accelerate, and so the Trainer, finds here."""
    from accelerate import PartialState

    return PartialState().device


def load_trained(name: str):
    """(model, tokenizer) from an output folder of train.py, any folder with a model, or a ModelScope id."""
    path = (
        str(find_trained(name))
        if Path(name).is_dir() or name == OUTPUT_DIR
        else resolve_model(name, "检查 --model_path")
    )
    return load_weights(path, pick_device()), load_tokenizer(path)


# ---- replying -----------------------------------------------------------------------------------------------------


def split_reply(tokenizer, ids: list[int], complete: bool = True) -> Reply:
    """Thinking and answer of the generated `ids`. Cut off inside the thinking, the answer is empty."""
    start, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    if end in ids:
        thinking, answer = ids[: ids.index(end)], ids[ids.index(end) + 1 :]
    elif start in ids:
        thinking, answer = ids, []
    else:
        thinking, answer = [], ids
    thinking = [token for token in thinking if token != start]
    texts = (tokenizer.decode(part, skip_special_tokens=True).strip() for part in (thinking, answer))
    return Reply(*texts, complete)


def generate(
    model, tokenizer, conversations: list[Messages], thinking=True, max_new_tokens=MAX_NEW_TOKENS, streamer=None
):
    """A Reply for each conversation, sampled as one left-padded batch: never greedy, which makes thinking loop."""
    prompts = [encode_messages(tokenizer, messages, prompt_only=True, thinking=thinking) for messages in conversations]
    longest = max(map(len, prompts))
    pad, device = tokenizer.pad_token_id, model.device
    stops = model.generation_config.eos_token_id or []
    stops = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])}
    sampling = {"do_sample": True} | ({} if thinking else NO_THINKING_SAMPLING)
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=device),
            attention_mask=torch.tensor(
                [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device
            ),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            streamer=streamer,
            pad_token_id=pad,
            eos_token_id=list(stops),
            **sampling,
        )
    replies = []
    for ids in output[:, longest:].tolist():
        length = next((place for place, token in enumerate(ids) if token in stops), len(ids))
        replies.append(split_reply(tokenizer, ids[:length], complete=length < len(ids)))
    return replies


class ReplyStreamer(transformers.TextStreamer):
    """Prints one reply as it is generated: the thinking dimmed, the answer plain, each under its heading."""

    def __init__(self, tokenizer, console: Console):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console, self.style, self.started = console, None, False
        self.start, self.stop = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])

    def put(self, value):
        token = value.flatten()[-1].item()
        if self.next_tokens_are_prompt or token not in (self.start, self.stop):
            return super().put(value)
        self.flush()
        thinking = token == self.start
        self.console.print("【思考】" if thinking else "\n【回答】", style="dim" if thinking else "bold")
        self.style, self.started = "dim" if thinking else None, False

    def flush(self):
        self.on_finalized_text(self.tokenizer.decode(self.token_cache, **self.decode_kwargs)[self.print_len :])
        self.token_cache, self.print_len = [], 0

    def on_finalized_text(self, text: str, stream_end: bool = False):
        text = text if self.started else text.lstrip()  # the template's line breaks around the thinking
        self.started = self.started or bool(text)
        self.console.print(text, end="\n" if stream_end else "", style=self.style, markup=False, soft_wrap=True)


def ask(model, tokenizer, messages: Messages, args: argparse.Namespace, console: Console) -> Reply:
    """Stream one reply, and say so when it was cut off."""
    streamer = ReplyStreamer(tokenizer, console)
    [reply] = generate(model, tokenizer, [messages], not args.no_thinking, args.max_new_tokens, streamer)
    if not reply.complete:
        console.print(
            f"（到 {args.max_new_tokens} 个 token 为止，回复未完；可加大 --max_new_tokens。）", style="yellow"
        )
    return reply


def chat(model, tokenizer, args: argparse.Namespace, console: Console) -> None:
    """A conversation until an empty line or the end of input. Earlier thinking is not fed back."""
    console.print("输入问题后回车；空行结束。")
    history: Messages = []
    while True:
        try:
            question = console.input("\n[bold]问：[/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not question:
            break
        messages = to_messages(question)
        messages[1:1] = history
        try:
            reply = ask(model, tokenizer, messages, args, console)
        except KeyboardInterrupt:
            console.print("\n（已停止这次回复。）", style="yellow")
            continue
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": reply.answer}]


def converse(model, tokenizer, args: argparse.Namespace) -> None:
    """What the command line asks for: the conversation, or the one question."""
    console = Console(highlight=False, emoji=False)
    transformers.set_seed(args.seed)
    console.print(NOT_A_DOCTOR, style="yellow", soft_wrap=True)
    if args.chat:
        return chat(model, tokenizer, args, console)
    console.print(f"\n【问题】{args.question}\n", markup=False, soft_wrap=True)
    ask(model, tokenizer, to_messages(args.question), args, console)


def whole_number(least: int, text: str) -> int:
    """A whole number from `least` on, for argparse."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"要一个不小于 {least} 的整数，不是 {text!r}")
    return int(text)


def some_text(text: str) -> str:
    """A text that is not empty, for argparse."""
    if not text.strip():
        raise argparse.ArgumentTypeError("问题是空的")
    return text.strip()


def build_parser(description: str, output_dir: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "question", nargs="?", type=some_text, default=QUESTION, help="the question (default: the published one)"
    )
    parser.add_argument("--chat", action="store_true", help="hold a conversation")
    parser.add_argument("--model_path", default=output_dir, help="folder or ModelScope id (default: %(default)s)")
    parser.add_argument("--no_thinking", action="store_true", help="answer without thinking first")
    parser.add_argument(
        "--max_new_tokens", type=partial(whole_number, 1), default=MAX_NEW_TOKENS, help="default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=partial(whole_number, 0), default=SEED, help="of the sampling (default: %(default)s)"
    )
    return parser


def main() -> None:
    args = build_parser(__doc__, OUTPUT_DIR).parse_args()
    model, tokenizer = load_trained(args.model_path)
    converse(model, tokenizer, args)


if __name__ == "__main__":
    run_main(main)
