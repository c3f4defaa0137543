"""A model: where it is, whether it can be trained here, its tokenizer, its weights on this machine's device,
the adapter that is merged into them, and the settings with which it is asked. It knows Qwen3's end of turn
and peft's files, and no question."""

import json
import logging
import os
import shlex
import warnings
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import accelerate
import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from parts import hub
from parts.model.encoding import PROBE, encode_messages, has_no_thinking_mode
from parts.model.fused import best_dtype, require_range
from parts.run import checkpoints
from parts.run.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, weight_files
from parts.run.folder import read_base_sha256
from parts.terminal import explain_failed_import, first_line

# Dense decoders of text, by the model_type of their config.json, that tests/model/test_families.py proves to
# be trained rightly here. The proof fails for gemma2, granite and cohere, which scale or cap their logits,
# for phi, whose output layer has a bias, and for gpt_oss, which has sinks of attention and experts.
FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "gemma", "smollm3", "phi3", "olmo2", "glm4", "ernie4_5")
# The others, dynamic and longrope, turn by the longest of all examples in a batch, not by each one's length.
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
END_OF_TURN = "<|im_end|>"  # generation stops here
PADDING = "<|endoftext|>"  # Qwen's, for tokenizers that name none
OUTPUTS = "output/"  # below it the trainings write: a name that begins so is never a hub's
# What Qwen advises for thinking, for a model that has no settings of its own.
THINKING_SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")  # one of them
BESIDE_WEIGHTS = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
# Weights in other forms, which are neither needed nor safe to load: most of them are pickles, which run code.
NOT_DOWNLOADED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf")


class Trained(NamedTuple):
    """Where the weights of a model are that can be asked."""

    path: str  # the folder of a model, or of an adapter
    base: str | None = None  # the adapter's base model, as the adapter names it
    base_path: str | None = None  # the folder of that base model


def check_family(folder: str | Path, name: str, tokenizer=None) -> None:
    """Raise SystemExit unless the model in `folder`, which the user calls `name`, is trained rightly here,
    also with `tokenizer` if there is one. It reads nothing but config.json, so it can refuse a model before
    its weights are downloaded."""
    path = Path(folder, hub.CONFIG)
    try:
        settings = {**json.loads(path.read_text(encoding="utf-8"))}  # which raises unless it is an object
        family = settings.get("model_type")
        config = CONFIG_MAPPING[family].from_dict(settings) if family in FAMILIES else None
    except Exception as error:  # each configuration raises errors of its own for a field
        raise SystemExit(f"错误：{path} 无法读取（{first_line(error)}）；请重新下载或换一个模型。") from None

    tokens = 1 + max(tokenizer.get_vocab().values()) if tokenizer else 0
    if not config:
        reason = f"它的 model_type 是 {family}，这里只支持训练 {'、'.join(FAMILIES)}"
    elif getattr(config, "quantization_config", None):
        reason = "它的权重已经量化，不能直接训练"
    elif not attends_to_all(config):
        reason = "它有的层看不到全部上文（滑动窗口或线性注意力）"
    elif (rope := config.rope_parameters["rope_type"]) not in ROPE_TYPES:
        reason = f"它的位置编码（rope_type {rope}）随一批中最长的样本变化"
    elif tokens > config.vocab_size:
        reason = f"分词器有 {tokens} 个 token，而模型的词表只有 {config.vocab_size}"
    else:
        return
    raise SystemExit(f"错误：{name} 不能在这里正确训练：{reason}；请换一个模型，例如 Qwen/Qwen3-1.7B。")


def attends_to_all(config) -> bool:
    """Tell whether no layer has a sliding window or linear attention."""
    if kinds := getattr(config, "layer_types", None):
        return set(kinds) == {"full_attention"}
    return not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))


def quiet_libraries() -> None:
    """Keep off the screen what libraries tell each other: progress of files, deprecations, tied weights."""
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    # The Trainer misses it in a checkpoint, although it is the embedding, which is loaded.
    tied = "missing keys in the checkpoint model loaded: ['lm_head.weight']"
    logging.getLogger("transformers.trainer").addFilter(lambda record: tied not in record.getMessage())


def load_tokenizer(path: str):
    """Return the tokenizer of a model folder, set to end turns with END_OF_TURN and to have padding. Raises
    SystemExit where it is not there, or its template writes no such turns."""
    try:
        # Without one of them transformers would make an empty tokenizer.
        if not any(Path(path, file).is_file() for file in TOKENIZER_FILES):
            raise ValueError(f"缺少 {'、'.join(TOKENIZER_FILES)} 之一")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if not tokenizer.chat_template:
            raise ValueError("没有对话模板，缺少 chat_template.jinja 或 tokenizer_config.json")
        if END_OF_TURN not in tokenizer.get_vocab():
            raise ValueError(f"没有 {END_OF_TURN}")
        encode_messages(tokenizer, PROBE, prompt_only=True)
    except Exception as error:  # tokenizers and jinja raise what they like
        explain_failed_import(error)
        remedy = "请补齐文件、重新下载，或换一个用 Qwen3 模板的模型。"
        raise SystemExit(f"错误：{path} 里的分词器不能用（{first_line(error)}）；{remedy}") from None
    # A base model, such as Qwen3-1.7B-Base, names <|endoftext|>, at which no reply would end.
    tokenizer.eos_token = END_OF_TURN
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PADDING if PADDING in tokenizer.get_vocab() else END_OF_TURN
    return tokenizer


def load_weights(path: str, device: torch.device | None = None, in_4bit=False, on_cpu=False, dtype=None):
    """Return the model of a folder in eval mode, on `device` or where accelerate, and so the Trainer,
    computes here.

    `in_4bit`: its linear layers are in NF4, for training adapters on it. `on_cpu`: it stays in the CPU's
    memory, from which it is cut for several devices. `dtype`: a training's; without one it is
    `best_dtype(device)`, or float32 where that is too small for the model. Raises SystemExit where the folder
    holds no complete model in safetensors, or the training's dtype is too small for it.
    """
    quiet_libraries()
    device = device or accelerate.PartialState().device
    # cuDNN's attention plans anew for each combination of lengths, 42 ms to 1 s by public reports.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Products of float16 would be added up in float16, which overflows sooner.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if not any(Path(path).glob("*.safetensors")):
        reason = "没有 safetensors 格式的权重（其他格式可能执行代码，不会读取）"
        raise SystemExit(f"错误：{path} 里{reason}；请换一个模型。")
    options = {"dtype": dtype or best_dtype(device), "output_loading_info": True}
    if in_4bit:  # QLoRA's quantization: NF4, its scales quantized too
        four_bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        four_bits |= {"load_in_4bit": True, "bnb_4bit_compute_dtype": options["dtype"]}
        quantization = transformers.BitsAndBytesConfig(**four_bits)
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, **options
        )
        if missing := sorted(report["missing_keys"]):  # else they would be random, with a warning at most
            raise ValueError(f"缺少 {len(missing)} 个权重，例如 {missing[0]}")
        if Path(path, "generation_config.json").is_file():  # a broken one was passed over without a word
            transformers.GenerationConfig.from_pretrained(path)
    except Exception as error:  # each field of a configuration has errors of its own
        explain_failed_import(error)
        reason = f"{path} 里的模型无法读取（{first_line(error)}）"
        raise SystemExit(f"错误：{reason}；请重新下载或重新训练。") from None
    if not (in_4bit or on_cpu):
        model.to(device)
    model.eval()
    if model.dtype == torch.float16:
        require_range(model, path, for_training=dtype is not None)
    return model


def load(trained: Trained, device: torch.device | None = None):
    """Return (model, tokenizer), ready to be asked. An adapter is merged into its base's weights."""
    model = load_weights(trained.base_path or trained.path, device)
    if trained.base_path:
        import peft

        try:
            if not Path(trained.path, ADAPTER_WEIGHTS).is_file():  # peft would ask the hub for it
                raise FileNotFoundError(f"缺少 {ADAPTER_WEIGHTS}")
            model = peft.PeftModel.from_pretrained(model, trained.path).merge_and_unload().eval()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = f"{trained.path} 的适配器无法加载到 {trained.base} 上（{first_line(error)}）"
            raise SystemExit(f"错误：{reason}；请换一个适配器，或重新运行 python train_lora.py") from None
    tokenizer = load_tokenizer(trained.path)
    settle_generation(model, tokenizer)
    return model, tokenizer


def load_trained(name: str, revision: str | None = None, thinking: bool = True):
    """Return (model, tokenizer) of what `find_trained` finds."""
    return load(find_trained(name, revision, thinking))


def settle_generation(model, tokenizer) -> None:
    """Make the settings that are saved with `model` those with which it is asked here.

    Generation stops at the end of turn, and at what the model's own settings name besides. A base model's
    settings would not stop there, and would think greedily, which loops.
    """
    settings, end = model.generation_config, tokenizer.eos_token_id
    stops = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    settings.eos_token_id = [end, *(token for token in stops if token not in (None, end))]
    settings.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = end
    greedy = not (settings.do_sample and settings.temperature)
    settings.do_sample = True
    for name, value in THINKING_SAMPLING.items():
        # What is left out, each tool fills in as it likes.
        if greedy or getattr(settings, name) is None:
            setattr(settings, name, value)


def is_whole(folder: Path) -> bool:
    """Tell whether a downloaded model or adapter is complete: it has what belongs beside the weights, all
    weight files of the index, each as long as its own header says, and no download of it was cut off."""
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    try:
        for name in [ADAPTER_WEIGHTS] if is_adapter else weight_files(folder):
            safe_open(folder / name, "pt")  # which compares the header with the file's length
        complete = is_adapter or all((folder / name).stat().st_size for name in BESIDE_WEIGHTS)
        return complete and not any(folder.rglob("*.incomplete"))  # clients download into these
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return False


def find_downloaded(name: str, revision: str | None) -> Path | None:
    """Return the folder of a model that an earlier command downloaded whole, in this revision, or None."""
    scheme, repository, _ = hub.split(name)
    folder = hub.HUBS[scheme]().find(repository, revision)
    return folder if folder and is_whole(folder) else None


def find_model(name: str, remedy: str, revision: str | None = None, to_train: bool = False) -> str:
    """Return the folder of the model `name`, as find_folder does. Raises SystemExit for an adapter too."""
    folder = find_folder(name, remedy, revision, to_train)
    if Path(folder, ADAPTER_CONFIG).is_file():
        command = f"python inference_lora.py --model_path {shlex.quote(name)} --merge_to output/merged"
        reason = f"{name} 是 LoRA 适配器，不是完整的模型"
        raise SystemExit(f"错误：{reason}；接着训练用 train_lora.py --adapter，其他用途先合并：{command}")
    return folder


def find_folder(name: str, remedy: str, revision: str | None = None, to_train: bool = False) -> str:
    """Return the folder of the model or the adapter `name`, which is a local folder or a hub's name.

    A hub's client downloads it; where the hub cannot be reached, a complete earlier download will do.
    `remedy` says what else could be done where that fails. A model that is `to_train` is refused before its
    weights come if `check_family` refuses it. Raises SystemExit where there is no such model.
    """
    if os.path.isdir(name):  # unlike Path.is_dir, False for a name too long for a folder
        if revision:
            raise SystemExit(f"错误：版本 {revision} 只用于 hub 上的模型，而 {name} 是本地文件夹。")
        if hub.split(name) and not any(Path(name).glob("*.safetensors")):
            # The hub's model may be meant: a folder of the same name is not passed over in silence.
            remedy = "请补全它；要下载同名的模型，请先把它移走或改名。"
            raise SystemExit(f"错误：./{name} 是一个本地文件夹，但缺少 .safetensors 权重；{remedy}")
        return str(Path(name).resolve())
    on_hub = hub.split(name)
    if not on_hub or on_hub.inside or name.startswith(OUTPUTS):
        kinds = "既不是已有的文件夹，也不是 ModelScope 模型名（形如 Qwen/Qwen3-1.7B）"
        raise SystemExit(f"错误：找不到模型 {name}：{kinds}。{hub.forms(name)}")

    def choose(names: list[str], fetch) -> list[str]:
        if to_train and hub.CONFIG in names:
            check_family(fetch(hub.CONFIG).parent, name)
        return [name for name in names if not name.lower().endswith(NOT_DOWNLOADED)]

    try:
        return str(hub.download(name, "model", remedy, choose, revision=revision)[0])
    except hub.Unreachable:
        folder = find_downloaded(name, revision)
        if not folder:
            raise
    print(f"提示：连不上 {hub.HUBS[on_hub.scheme].title}，使用以前下载的模型 {name}：{folder}", flush=True)
    return str(folder)


def find_local(name: str) -> Path | None:
    """Return the folder with the best weights below `name`, a training's folder or any model's, or None where
    `name` is a hub's."""
    is_local = os.path.isdir(name) or name.startswith(OUTPUTS)
    return checkpoints.find_trained(name) if is_local else None


def find_trained(name: str, revision: str | None = None, thinking: bool = True) -> Trained:
    """Return where the weights are that `load` loads.

    `name` is an output folder of a training, any folder with a model, an adapter or a checkpoint, or a hub's
    name. `revision` is that of the hub's model, or of a local adapter's base.

    Raises SystemExit for all that can be refused before the weights are read: a model that is not there, an
    adapter whose base is another one than it was trained on, and a model that cannot be asked without
    `thinking`.
    """
    adapter = os.path.isdir(name) and checkpoints.holds_adapter(name)
    # A local model with a revision goes on to find_model, which refuses it.
    local = find_local(name) if adapter or not revision else None
    path = str(local or find_folder(name, "检查 --model_path", revision))
    if not thinking and not has_no_thinking_mode(load_tokenizer(path)):
        raise SystemExit(f"错误：{path} 的对话模板不能关闭思考；请去掉 --no_thinking，或换一个模型。")
    if not Path(path, ADAPTER_CONFIG).is_file():
        return Trained(path)
    base, trained_revision = read_base(path, name)
    remedy = f"把 {path}/{ADAPTER_CONFIG} 里的 base_model_name_or_path 改为本地文件夹"
    base_path = find_model(base, remedy, revision if local and revision else trained_revision)
    require_base(path, base, base_path)
    return Trained(path, base, base_path)


def require_base(path: str, base: str, base_path: str, sha256: str | None = None) -> None:
    """Raise SystemExit where the adapter in `path` was trained on another base than that in `base_path`,
    which the user calls `base`. `sha256`: of its weights, where that is known already."""
    # Another base of the same shape would load without an error. An adapter from elsewhere has no record.
    expected = read_base_sha256(run_folder(path))
    if expected and (actual := sha256 or checkpoints.weights_sha256(base_path)) != expected:
        reason = f"{path} 的适配器不是在现在的 {base} 上训练的"
        sums = f"权重的 SHA-256 应为 {expected}，现在是 {actual}"
        raise SystemExit(f"错误：{reason}（{sums}）；请放回原来的基础模型（训练时用 --model_name 指定）。")


def read_base(path: str, name_of_adapter: str) -> tuple[str, str | None]:
    """Return the name or folder, and the revision, of the base model of the adapter in `path`, which the user
    calls `name_of_adapter`. A folder of another machine stands for the hub's model of that name, where
    `require_base` can compare it; what tells no hub is on the adapter's."""
    config = Path(path, ADAPTER_CONFIG)
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        name = base = settings["base_model_name_or_path"] or ""
        if not (os.path.isdir(base) or hub.split(base)):
            # Windows' paths have either slash. ModelScope's cache writes a dot as three underscores.
            name = "/".join(PureWindowsPath(base).parts[-2:]).replace("___", ".")
            if not hub.split(name) or not read_base_sha256(run_folder(path)):
                raise ValueError(f"找不到基础模型 {base}")
            print(f"提示：这台机器上没有 {base}，改用 {name}，并核对权重的 SHA-256。", flush=True)
        if name_of_adapter.startswith("hf://") and "://" not in name and not os.path.isdir(name):
            name = f"hf://{name}"
        return name, None if os.path.isdir(name) else settings.get("revision")
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "请把其中的 base_model_name_or_path 改为基础模型的文件夹或名字"
        raise SystemExit(f"错误：{config} 不可用（{first_line(error)}）；{remedy}") from None


def run_folder(path: str) -> Path:
    """Return the output folder to which an adapter belongs: its own, or that of its checkpoint."""
    return Path(path).parent if Path(path).name.startswith("checkpoint-") else Path(path)
