"""Ask the fine-tuned model; the thinking streams dimmed, the answer follows.

    python inference.py                         # the trained model in output/, the published question
    python inference.py "感冒了要吃抗生素吗？"
    python inference.py --chat                  # a conversation; an empty line ends it
    python inference.py --model_path Qwen/Qwen3-1.7B "感冒了要吃抗生素吗？"     # any other model, the untuned one too
    python inference.py --no_thinking "…"       # answer at once
    python inference.py --questions val.jsonl --replies replies.jsonl     # a file of them, also .txt, one per line

The replies are a language model's and may be wrong. They are not medical advice.
"""

import argparse
import codecs
import contextlib
import hashlib
import json
import logging
import os
import shlex
import statistics
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch.nn.functional import pad
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from data import (
    HUB_ID,
    MODEL_NAME,
    OUTPUT_DIR,
    SEED,
    SUFFIXES,
    HubUnreachable,
    Row,
    decode_all,
    encode_messages,
    first_line,
    from_hub,
    read_rows,
    run_main,
    to_messages,
)

QUESTION = "医生，我最近被诊断为糖尿病，听说碳水化合物的选择很重要，我应该选择什么样的碳水化合物呢？"
MAX_NEW_TOKENS = 2048
END_OF_TURN = "<|im_end|>"  # generation stops here
# What Qwen advises without thinking; while thinking the model's own generation settings hold.
NO_THINKING_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}
CACHE_STEP = 512  # tokens by which the key-value cache grows; attention reads all of it, each growth costs a capture
READ_EVERY = 16  # tokens from one look at what was generated to the next: each look waits for the GPU
WARM_UP = 2  # steps before a capture, which must find kernels loaded and their workspaces allocated
SHORT_REPLY = 32  # max_new_tokens below which a capture costs more than it saves
BATCH_ROWS = 64  # questions of a file answered together, at most
BATCH_TOKENS = 10_000  # of prompts and replies together, at most, where the free memory is not known: 2.3 GB in float32
BATCH_MEMORY = 0.5  # share of the free GPU memory that the cache of a batch may take
REPLIES = "replies.jsonl"
ADAPTER_CONFIG = "adapter_config.json"
NOT_DOWNLOADED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf")  # other forms of weights
BESIDE_WEIGHTS = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
FINISHED_MARK = "trainer_state.json"  # train.py writes it into the output folder last
RUN_FILE = "run.json"  # train.py writes it into the output folder first: the settings of the run
MANIFEST = "manifest.json"  # train.py writes it into a checkpoint last: {file: [bytes, sha256]}
NOT_A_DOCTOR = "提醒：回复由语言模型生成，可能有错，不能代替医生的诊断；身体不适请及时就医，紧急情况请拨打 120。"

OUT_OF_MEMORY = (
    "错误：显存（内存）不足。请关掉其他占用显存的程序，或用更小的 --max_new_tokens；"
    "还不够就在 CPU 上提问：在命令前加 CUDA_VISIBLE_DEVICES= （慢）。"
)

Messages = list[dict[str, str]]


class Reply(NamedTuple):
    thinking: str
    answer: str
    complete: bool  # False when max_new_tokens cut it off


# ---- finding and loading the model --------------------------------------------------------------------------------


def sha256(*paths: str | Path) -> str:
    """Of the files' contents, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of a model's safetensors files, by name (Qwen3-1.7B: 2 s)."""
    return sha256(*sorted(Path(folder).glob("*.safetensors")))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoint_folders(folder: str | Path) -> list[Path]:
    """All of a run's checkpoint-N below `folder`, whole or not, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(found, key=step_of)


def find_damage(checkpoint: Path, hashes: bool) -> str | None:
    """In what a checkpoint differs from the one that was written, or None: a file that is missing or of another size,
    with `hashes` also of other content (10 GB take 6 s), or no manifest, which is written when all else is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, digest) in manifest.items():
            path = checkpoint / name
            if not path.is_file():
                return f"缺少 {name}"
            if path.stat().st_size != size or hashes and sha256(path) != digest:
                return f"{name} 与 {MANIFEST} 不符"
    except FileNotFoundError:
        return f"没有写完（缺少 {MANIFEST}）"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST} 或它所列的文件无法读取（{first_line(error)}）"
    return None if FINISHED_MARK in manifest else f"{MANIFEST} 不完整"


def find_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run that are whole, going by the sizes of their files, oldest first."""
    return [path for path in checkpoint_folders(folder) if find_damage(path, hashes=False) is None]


def find_trained(folder: str | Path, config: str = "config.json", train_script: str = "train.py") -> Path:
    """The best weights below `folder`: the folder itself once training is finished (or when it is any saved model),
    else the checkpoint with the best evaluation loss so far, else the newest one. Raises SystemExit without any."""
    folder = Path(folder)
    checkpoints = [path for path in find_checkpoints(folder) if (path / config).is_file()]
    unfinished = checkpoints or (folder / RUN_FILE).is_file()  # what lies beside it may be cut off
    if (folder / config).is_file() and ((folder / FINISHED_MARK).is_file() or not unfinished):
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


def is_whole(folder: Path) -> bool:
    """Whether a downloaded model is complete: what belongs beside the weights, all weight files that the index names,
    each as long as its own header says, and no download that was cut off."""
    try:
        index = folder / "model.safetensors.index.json"
        names = json.loads(index.read_bytes())["weight_map"].values() if index.is_file() else ["model.safetensors"]
        for name in set(names):
            with safe_open(folder / name, "pt"):
                pass
        return all((folder / name).stat().st_size for name in BESIDE_WEIGHTS) and not any(folder.rglob("*.incomplete"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return False


def find_downloaded(name: str, revision: str | None) -> Path | None:
    """The folder of a model that an earlier command downloaded whole, in this revision; else None."""
    from modelscope_hub import HubApi, errors

    try:
        folder = HubApi().download_repo(name, "model", revision=revision or "master", local_files_only=True)
    except errors.CacheNotFound:
        return None
    # Older clients' folders do not tell the revision.
    known = revision is None or folder.parts[-2:] == ("snapshots", revision)
    return folder if known and is_whole(folder) else None


def resolve_model(name: str, remedy: str = "用 --model_name 指定本地模型文件夹", revision: str | None = None) -> str:
    """A folder as it is; else the folder into which ModelScope's client downloads the model `name`. When the hub cannot
    be reached, what an earlier command downloaded whole."""
    if os.path.isdir(name):  # unlike Path.is_dir, False for a name too long for a folder
        if revision:
            raise SystemExit(f"错误：版本 {revision} 只用于 ModelScope 上的模型，而 {name} 是本地文件夹。")
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
    try:
        return str(from_hub(name, "model", remedy, choose_model, revision=revision)[0])
    except HubUnreachable:
        if not (folder := find_downloaded(name, revision)):
            raise
        print(f"提示：连不上 ModelScope，使用以前下载的模型 {name}：{folder}", flush=True)
        return str(folder)


def choose_model(names: list[str]) -> list[str]:
    """All files but weights in other forms than safetensors, which are neither needed nor safe to load."""
    return [name for name in names if not name.lower().endswith(NOT_DOWNLOADED)]


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
        if tokenizer.chat_template:
            encode_messages(tokenizer, to_messages("？"), prompt_only=True)
    except Exception as error:  # tokenizers raises that itself; of a broken template jinja tells only when it is used
        raise SystemExit(f"错误：{path} 里的分词器无法读取（{first_line(error)}）；请重新下载或换一个模型。") from None
    if not tokenizer.chat_template or END_OF_TURN not in tokenizer.get_vocab():
        raise SystemExit(
            f"错误：{path} 的分词器没有 {END_OF_TURN} 或对话模板；请换一个 Qwen3 模型，例如 {MODEL_NAME}。"
        )
    tokenizer.eos_token = END_OF_TURN  # a base model, Qwen3-1.7B-Base for one, names <|endoftext|>
    return tokenizer


def load_weights(path: str, device: torch.device, in_4bit: bool = False):
    """The model of a folder, in `best_dtype(device)`, on `device`, in eval mode; its linear layers in 4 bits (NF4) if
    asked, for training adapters on it."""
    quiet_libraries()
    if not any(Path(path).glob("*.safetensors")):
        raise SystemExit(f"错误：{path} 里没有 safetensors 格式的权重，其他格式可能执行代码，不读取；请换一个模型。")
    dtype = best_dtype(device)
    options = {"quantization_config": four_bits(dtype), "device_map": {"": device}} if in_4bit else {}
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
        if missing := sorted(found["missing_keys"]):  # else they would be random, with a warning at most
            raise ValueError(f"缺少 {len(missing)} 个权重，例如 {missing[0]}")
        if Path(path, "generation_config.json").is_file():
            transformers.GenerationConfig.from_pretrained(path)  # one that is broken would be passed over in silence
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:  # missing, broken, another shape
        raise SystemExit(f"错误：{path} 里的模型无法读取（{first_line(error)}）；请重新下载或重新训练。") from None
    return (model if in_4bit else model.to(device)).eval()


def four_bits(dtype: torch.dtype):
    """QLoRA's quantization: NF4, its scales quantized too, products in `dtype`. Raises SystemExit without it."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise SystemExit("错误：--load_in_4bit 要用 bitsandbytes；请先运行 pip install bitsandbytes") from None
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def pick_device() -> torch.device:
    """CUDA, NPU, MPS or the CPU: what accelerate, and so the Trainer, finds here."""
    from accelerate import PartialState

    return PartialState().device


def load_trained(name: str, revision: str | None = None):
    """(model, tokenizer) from an output folder of train.py, any folder with a model, or a ModelScope id."""
    path = (
        str(find_trained(name))
        if (os.path.isdir(name) or name == OUTPUT_DIR) and not revision
        else resolve_model(name, "检查 --model_path", revision)
    )
    return load_weights(path, pick_device()), load_tokenizer(path)


@contextlib.contextmanager
def explain_out_of_memory(message: str):
    """Turn any device's out-of-memory error into `message`."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; MPS and the CPU raise it plain
        text = str(error).lower()
        if "out of memory" in text or "allocate memory" in text:
            raise SystemExit(message) from None
        raise


# ---- decoding -----------------------------------------------------------------------------------------------------


def fuse_norms(model) -> None:
    """Replace each of Qwen3's RMSNorms, in place, by torch's with the same weight: one GPU kernel instead of eight."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Qwen3RMSNorm):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, device="meta")
            norm.weight = module.weight
            model.set_submodule(name, norm)


class Decoder:
    """A model that has read its prompts, and goes on by one token a row with `advance`.

    Plain decoding spends its time launching more than a thousand small kernels per token from Python. Here all that
    changes from token to token, the cache included, lives in tensors of fixed addresses, so on CUDA the launches are
    recorded once as a graph and then replayed at once. When the cache is full it grows, and the graph is recorded anew.

    input_ids and position_ids are [rows, prompt], left-padded; attention_mask is the same, or None without padding.
    """

    def __init__(self, model, input_ids, position_ids, attention_mask=None):
        self.model, self.graph, self.warm_steps = model, None, 0
        self.capturable = input_ids.is_cuda
        self.used = input_ids.shape[1]  # places of the cache
        self.room = (self.used // CACHE_STEP + 1) * CACHE_STEP
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=self.room)
        self.logits = self.forward(input_ids, position_ids, attention_mask)  # [rows, vocabulary]
        self.token = torch.zeros_like(input_ids[:, -1:])
        self.position = position_ids[:, -1:].clone()
        # What is yet to come is left out by its position, so the mask is the padding alone and never changes.
        self.mask = attention_mask
        if attention_mask is not None:
            self.mask = pad(attention_mask.bool(), (0, self.room - self.used), value=True)

    def forward(self, input_ids, position_ids, attention_mask) -> torch.Tensor:
        """The logits [rows, vocabulary] after the last token of `input_ids`, whose keys and values join the cache."""
        return self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def advance(self, token: torch.Tensor) -> None:
        """Put the logits after `token` [rows] into `self.logits`."""
        if self.used == self.room:
            self.grow()
        self.token.copy_(token[:, None])
        self.position += 1
        self.used += 1
        if self.capturable and self.graph is None and self.warm_steps >= WARM_UP:
            self.capture()
        if self.graph:
            self.graph.replay()
        else:
            self.logits = self.forward(self.token, self.position, self.mask)
            self.warm_steps += 1

    def grow(self) -> None:
        """Room for CACHE_STEP more tokens. The addresses change, so the graph is of no use any more."""
        self.graph, self.warm_steps = None, 0
        self.room += CACHE_STEP
        for layer in self.cache.layers:
            layer.keys, layer.values = (pad(states, (0, 0, 0, CACHE_STEP)) for states in (layer.keys, layer.values))
            layer.max_cache_len = self.room
        if self.mask is not None:
            self.mask = pad(self.mask, (0, CACHE_STEP), value=True)

    def capture(self) -> None:
        """Record one step without running it; where that fails, say why and go on step by step."""
        stream = None
        try:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            with torch.cuda.graph(graph):
                self.logits = self.forward(self.token, self.position, self.mask)
            self.graph = graph
        except RuntimeError as error:
            self.capturable = False
            if stream:
                torch.cuda.set_stream(stream)  # a capture that fails at its end leaves its own stream set
            print(f"（CUDA graph 用不了，改为逐步计算，会慢一些：{first_line(error)}）", file=sys.stderr)


def decode(
    model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=None, **model_kwargs
) -> torch.Tensor:
    """The loop of `model.generate`, which prepares these arguments (`custom_generate`) and returns what this returns:
    prompts and replies as [rows, prompt + new], padded on the right; the last tokens may all be padding."""
    prompt, longest = input_ids.shape[1], generation_config.max_length
    padding = generation_config.pad_token_id
    sequence = pad(input_ids, (0, longest - prompt), value=padding)
    finished = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
    # Arguments with names of their own would be taken for settings that generate need not prepare.
    decoder = Decoder(model, input_ids, model_kwargs["position_ids"], model_kwargs.get("attention_mask"))
    shown = prompt
    for length in range(prompt + 1, longest + 1):
        scores = logits_processor(sequence[:, : length - 1], decoder.logits.float())
        if generation_config.do_sample:
            # The largest of p / Exponential(1) is a sample of p; torch.multinomial checks p first, and so waits.
            scores = scores.softmax(-1) / torch.empty_like(scores).exponential_()
        token = scores.argmax(-1).masked_fill(finished, padding)
        sequence[:, length - 1] = token
        finished |= stopping_criteria(sequence[:, :length], None)
        if (length - prompt) % READ_EVERY == 0 or length == longest:
            if streamer:
                for new in sequence[:, shown:length].cpu().flatten():
                    if new != padding:
                        streamer.put(new[None])
            shown = length
            if finished.all():
                break
        decoder.advance(token)
    if streamer:
        streamer.end()
    return sequence[:, :length]


def choose_loop(model, max_new_tokens: int, streamer=None):
    """`decode` where its CUDA graphs pay and its static cache is known to be right, else None: transformers' loop."""
    layers = set(getattr(model.config, "layer_types", None) or ())  # a sliding window would need another cache
    fits = layers == {"full_attention"} and model.config._attn_implementation == "sdpa"
    pays = model.device.type == "cuda" and max_new_tokens >= SHORT_REPLY
    return partial(decode, streamer=streamer) if fits and pays else None  # generate keeps the streamer to itself


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
            custom_generate=choose_loop(model, max_new_tokens, streamer),
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


# ---- a file of questions ------------------------------------------------------------------------------------------


def read_questions(path: str) -> list[Row]:
    """Rows with `question`, perhaps also `answer`: a line each of a .txt file, or any file that data.py reads.
    Raises SystemExit when it cannot be read, has no question, or a row without one."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".txt", *SUFFIXES):
        raise SystemExit(f"错误：--questions {path} 应是 .txt（一行一个问题）或 .jsonl（每行有 question 字段）文件。")
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise SystemExit(f"错误：无法读取 --questions {path}（{error.strerror}）；请检查路径。") from None
    if suffix == ".txt":
        lines = enumerate(decode_all(Path(path), content).split("\n"), 1)
        rows = [(number, {"question": line.strip()}) for number, line in lines if line.strip()]
    else:
        rows = read_rows(path)
    if not rows:
        raise SystemExit(f"错误：--questions {path} 里没有问题；请每行写一个问题。")
    for number, row in rows:
        question = row.get("question") if isinstance(row, dict) else None
        if not isinstance(question, str) or not question.strip():
            raise SystemExit(f"错误：{path} 第 {number} 行没有问题；每行需要一个不为空的 question 字段。")
    return [row for _, row in rows]


def check_replies(path: str) -> None:
    """Raises SystemExit unless the replies can be written to `path` without losing anything that is there."""
    for taken in (path, f"{path}.part"):
        if Path(taken).exists():
            raise SystemExit(f"错误：{taken} 已经存在，不会覆盖；请移走它，或用 --replies 换一个文件名。")
    try:
        Path(path).touch()
        Path(path).unlink()
    except OSError as error:
        raise SystemExit(f"错误：无法写入 --replies {path}（{error.strerror}）；请换一个位置。") from None


def room_in_memory(model) -> int:
    """Tokens of prompts and replies that a batch may have: their keys and values have to fit into the GPU's memory."""
    if model.device.type != "cuda":
        return BATCH_TOKENS
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    return int(torch.cuda.mem_get_info(model.device)[0] * BATCH_MEMORY) // token_bytes


def make_batches(lengths: list[int], max_new_tokens: int, max_tokens: int) -> list[list[int]]:
    """The places of prompts of `lengths` tokens, in batches of at most `max_tokens` with all that may be generated.
    Longest first: there is little padding, and memory that does not suffice shows at once."""
    batches: list[list[int]] = []
    most = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if not batches or len(batches[-1]) >= most:
            most = min(BATCH_ROWS, max_tokens // (lengths[place] + max_new_tokens + CACHE_STEP))
            batches.append([])
        batches[-1].append(place)
    return batches


def answer_file(model, tokenizer, args: argparse.Namespace, console: Console) -> None:
    """Reply to all of --questions, in batches; --replies then has them in the order of the questions, one JSON object
    {question, think, answer, complete} a line. Until then what is answered is in a file beside it, `.part`."""
    conversations = [to_messages(row["question"]) for row in args.questions]
    lengths = [len(encode_messages(tokenizer, messages, prompt_only=True)) for messages in conversations]
    part, replies = Path(f"{args.replies}.part"), {}
    try:
        with part.open("x", encoding="utf-8", errors="replace", newline="\n") as file, Progress(console=console) as bar:
            task = bar.add_task("已回答", total=len(lengths))
            for batch in make_batches(lengths, args.max_new_tokens, room_in_memory(model)):
                chosen = [conversations[place] for place in batch]
                answered = generate(model, tokenizer, chosen, not args.no_thinking, args.max_new_tokens)
                replies.update(zip(batch, answered))
                file.writelines(reply_line(args.questions[place], replies[place]) for place in batch)
                file.flush()
                bar.advance(task, len(batch))
    except BaseException:  # Ctrl-C too
        console.print(f"没有答完；已答的 {len(replies)} 条在 {part}。", style="yellow", soft_wrap=True)
        raise
    in_order = [replies[place] for place in range(len(lengths))]
    with open(args.replies, "x", encoding="utf-8", errors="replace", newline="\n") as file:
        file.writelines(map(reply_line, args.questions, in_order))
    part.unlink()
    table = Table.grid(padding=(0, 2))
    for line in score(args.questions, in_order, not args.no_thinking):
        table.add_row(*line)
    console.print(table, f"回复在 {args.replies}", sep="\n")


def reply_line(row: Row, reply: Reply) -> str:
    texts = {"question": row["question"], "think": reply.thinking, "answer": reply.answer, "complete": reply.complete}
    return json.dumps(texts, ensure_ascii=False) + "\n"


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of characters, white space left out: 0 to 1."""
    text, reference = "".join(text.split()), "".join(reference.split())
    row = [0] * (len(reference) + 1)  # row[i]: length of the subsequence common to the text so far and reference[:i]
    for character in text:
        before = row
        row = [0]
        for i, other in enumerate(reference):
            row.append(before[i] + 1 if character == other else max(before[i + 1], row[i]))
    return 2 * row[-1] / max(len(text) + len(reference), 1)


def score(rows: list[Row], replies: list[Reply], thinking: bool = True) -> list[tuple[str, str]]:
    """What can be counted, as (name, value): none of it says whether a reply is medically right."""
    whole = sum(bool(reply.complete and reply.answer and (reply.thinking or not thinking)) for reply in replies)
    lines = [
        ("完整的回复" + "（有思考，有回答）" * thinking, f"{whole}/{len(replies)}（{whole / len(replies):.0%}）"),
        ("思考平均字数", f"{statistics.mean(len(reply.thinking) for reply in replies):.0f}"),
        ("回答平均字数", f"{statistics.mean(len(reply.answer) for reply in replies):.0f}"),
    ]
    pairs = [(reply.answer, row["answer"]) for row, reply in zip(rows, replies) if isinstance(row.get("answer"), str)]
    if pairs:
        mean = statistics.mean(rouge_l(*pair) for pair in pairs)
        lines.append(("与参考回答的 ROUGE-L（按字）", f"{mean:.3f}（{len(pairs)} 条；只比字面，不表示医学上正确）"))
    return lines


# ---- the command line ---------------------------------------------------------------------------------------------


def converse(model, tokenizer, args: argparse.Namespace) -> None:
    """What the command line asks for: the file of questions, the conversation, or the one question."""
    console = Console(highlight=False, emoji=False)
    transformers.set_seed(args.seed)
    if model.device.type == "cuda":
        fuse_norms(model)
    console.print(NOT_A_DOCTOR, style="yellow", soft_wrap=True)
    if args.questions:
        return answer_file(model, tokenizer, args, console)
    if args.chat:
        return chat(model, tokenizer, args, console)
    console.print(f"\n【问题】{args.question}\n", markup=False, soft_wrap=True)
    ask(model, tokenizer, to_messages(args.question), args, console)


def whole_number(least: int, text: str) -> int:
    """A whole number from `least` on, as large as seeds may be, for argparse."""
    if not text.isdecimal() or len(text) > 10 or not least <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"要一个 {least} 到 {2**32 - 1} 的整数，不是 {text!r}")
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
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument(
        "question", nargs="?", type=some_text, default=QUESTION, help="the question (default: the published one)"
    )
    one_of.add_argument("--chat", action="store_true", help="hold a conversation")
    one_of.add_argument(
        "--questions",
        metavar="FILE",
        type=read_questions,
        help="answer all of a .txt file, a question a line, or a .jsonl file with a field question; "
        "where it has a field answer, that is compared with the reply",
    )
    parser.add_argument(
        "--replies", metavar="FILE", default=REPLIES, help="where those replies go, as .jsonl (default: %(default)s)"
    )
    parser.add_argument("--model_path", default=output_dir, help="folder or ModelScope id (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of the ModelScope model (default: master)")
    parser.add_argument("--no_thinking", action="store_true", help="answer without thinking first")
    parser.add_argument(
        "--max_new_tokens", type=partial(whole_number, 1), default=MAX_NEW_TOKENS, help="default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=partial(whole_number, 0), default=SEED, help="of the sampling (default: %(default)s)"
    )
    return parser


def parse_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; what is wrong with its files is said before a model is loaded."""
    args = parser.parse_args()
    if args.questions:
        check_replies(args.replies)
    return args


def main() -> None:
    args = parse_flags(build_parser(__doc__, OUTPUT_DIR))
    with explain_out_of_memory(OUT_OF_MEMORY):
        model, tokenizer = load_trained(args.model_path, args.revision)
        converse(model, tokenizer, args)


if __name__ == "__main__":
    run_main(main)
