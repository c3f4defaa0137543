"""What several tests share: the tiny model's trainings, a moment in a training at which something happens, rows and
files, and a way to run a script as a person would."""

from __future__ import annotations

import atexit
import contextlib
import csv
import gc
import importlib.util
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real"  # the real tokenizer and rows, where a checkout has them
SAMPLES = ROOT / "tests" / "demo" / "medical.jsonl"
SCRIPTS = ("data.py", "train.py", "train_lora.py", "inference.py", "inference_lora.py")


# ---- rows and files -----------------------------------------------------------------------------------------------


def make_row(i: int, **changes) -> dict:
    return {"question": f"问题{i}？", "think": f"思考{i}。", "answer": f"回答{i}。"} | changes


def make_rows(last: int, first: int = 1) -> list[dict]:
    return [make_row(i) for i in range(first, last + 1)]


def as_jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_parquet(columns: dict[str, list]) -> bytes:
    import pyarrow.parquet

    # Bytes marked as text, unchecked, as another writer may leave them.
    arrays = {name: pyarrow.array(values, pyarrow.binary()).view("string") for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(arrays), sink := io.BytesIO())
    return sink.getvalue()


def as_xlsx(*sheets: list[list]) -> bytes:
    import openpyxl

    book = openpyxl.Workbook()
    for number, rows in enumerate(sheets):
        sheet = book.create_sheet(f"表{number}", number)  # before the empty one that a book begins with
        for row in rows:
            sheet.append(row)
    book.save(sink := io.BytesIO())
    return sink.getvalue()


def save(rows: list[dict], name: str | Path, mark: bytes = b"") -> str:
    """Write rows in the format of the name's ending, after a byte order mark where one is given."""
    if str(name).endswith(".xlsx"):
        Path(name).write_bytes(as_xlsx([[*rows[0]], *([*row.values()] for row in rows)]))
        return str(name)
    csv.writer(table := io.StringIO()).writerows([rows[0], *(row.values() for row in rows)])
    forms = {".jsonl": as_jsonl(rows), ".json": json.dumps(rows, indent=1), ".csv": table.getvalue()}
    text = forms.get(Path(name).suffix.lower())
    columns = {field: [row[field] for row in rows] for field in rows[0]}
    Path(name).write_bytes(mark + text.encode() if text else as_parquet(columns))
    return str(name)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, byte for byte."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        for path in files
    }


def says(text: str, expected: str) -> bool:
    """Whether a message is the expected one after 错误：; ~ stands for words of a library, on one line. What a script
    says before that it does is no part of it."""
    text = re.sub("^(正在.*……\n)+", "", text)
    return bool(re.fullmatch(".*".join(map(re.escape, f"错误：{expected}".split("~"))), text))


def refused(message: str, run, *args, **kwargs) -> None:
    """The call ends with exactly this error; ~ stands for words of a library."""
    with pytest.raises(SystemExit) as ended:
        run(*args, **kwargs)
    assert says(str(ended.value), message), ended.value


def published(rows) -> tuple[list, list]:
    """The split of the published training script, in its own words."""
    rows = list(rows)
    random.seed(42)
    random.shuffle(rows)
    cut = int(len(rows) * 0.9)
    return rows[:cut], rows[cut:]


def written(folder: Path = Path()) -> tuple[list[dict], list[dict]]:
    texts = (Path(folder, name).read_text(encoding="utf-8") for name in ("train.jsonl", "val.jsonl"))
    return tuple([json.loads(line) for line in text.split("\n")[:-1]] for text in texts)


@contextlib.contextmanager
def prepared(tmp_path_factory):
    """Inside, the working folder is a new one with the data."""
    import data

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("prepared"))
        data.prepare(str(SAMPLES))
        yield folder


# ---- several processes --------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_flags(values: dict) -> list[str]:
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def together(script: str, *flags, cwds, own=((), ()), machines: int = 1, status: int = 0, **more) -> list[str]:
    """What each of two processes says that are started as torchrun starts them, but forked, in these folders; both end
    with `status`. `own`: flags of each. On two machines each is the first one of its own."""
    started = []
    port = str(free_port())
    for rank in range(2):
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank)}
        world |= {"LOCAL_RANK": str(rank // machines), "LOCAL_WORLD_SIZE": str(2 // machines)}
        started.append(Started(script, [*flags, *own[rank]], cwds[rank], os.environ | world, **more))
    ends = [process.wait(100) for process in started]
    assert ends == [status] * 2, "\n".join(process.stdout for process in started)
    return [process.stdout for process in started]


# ---- trainings ----------------------------------------------------------------------------------------------------


def arguments(model: str | Path, lora: bool = False, **changes):
    """Arguments for a few steps on the CPU; all else is the recipe."""
    import train
    import train_lora

    values = {"max_steps": 4, "eval_steps": 2, "logging_steps": 1, "report_to": "none"}
    # Most are about what is found on the disk: it is saved at each evaluation, unless `changes` say otherwise.
    values |= {"sample_tokens": 4, "save_steps": changes.get("eval_steps", 2)}
    make = train_lora.arguments if lora else train.arguments
    return make(model_name=str(model), **values | {"disable_tqdm": True} | changes)


def run(model: str | Path, lora: bool = False, callbacks=(), **changes):
    """The Trainer after train.train with these arguments."""
    import train
    import train_lora

    return train.train(arguments(model, lora, **changes), train_lora.add_adapter if lora else None, callbacks)


# Twenty steps with a checkpoint at every fifth: what interruptions are tried on.
STEPS = {"max_steps": 20, "eval_steps": 5, "learning_rate": 1e-3, "gradient_accumulation_steps": 1, "logging_steps": 5}


def run_steps(model: str | Path, lora: bool = False, callbacks=(), **changes):
    """`run` of STEPS."""
    return run(model, lora, callbacks, **STEPS | changes)


def continues_from(args) -> str | None:
    """The checkpoint from which a command with these arguments would go on."""
    import data
    from parts.run import folder
    from parts.training import flags

    run = folder.Run(args.output_dir)
    settings = folder.settings_of(args, args.model_name, data.SYSTEM_PROMPT, "torch.float32")
    run.find(settings, vars(args), flags.OPTIMIZERS)
    return run.checkpoint


def build_trainer(model_path, tokenizer, lora=False, dtype=None, file="train.jsonl", **changes):
    """A trainer on the tiny model as train.train would build it, from the rows of `file`."""
    import data
    import train
    import train_lora
    from parts.model.weights import load_weights

    make = train_lora.arguments if lora else train.arguments
    args = make(**{"report_to": "none", "disable_tqdm": True, "logging_steps": 1} | changes)
    model = load_weights(str(model_path), args.device, args.load_in_4bit, dtype=args.dtype)
    model = model.to(dtype) if dtype else model
    model = train_lora.add_adapter(model, args) if lora else model
    dataset = data.load_dataset(file, tokenizer, 2048)
    return train.build_trainer(args, model, tokenizer, dataset, dataset)


def At(step: int | None, act):
    """A callback of Trainer: `act()` happens once while step `step` is computed; None: after the last one."""
    import transformers

    class At(transformers.TrainerCallback):
        acted = False

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 == step and not self.acted:
                self.acted = True
                act()

        def on_train_end(self, args, state, control, **kwargs):
            if step is None:
                act()

    return At()


def crash() -> None:
    """Ends a training as no part of it does."""
    raise EOFError


def terminate() -> None:
    """What a cluster sends before it takes a machine away."""
    signal.raise_signal(signal.SIGTERM)


def weights(folder: str | Path) -> dict:
    """{name: tensor} of what was trained."""
    from safetensors.torch import load_file

    adapter = Path(folder, "adapter_model.safetensors")
    return load_file(adapter if adapter.is_file() else Path(folder, "model.safetensors"))


def save_other_base(model: str | Path) -> None:
    """Save a model of the same shape with other weights in the folder `other`."""
    from safetensors.torch import save_file

    shutil.copytree(model, "other")
    tensors = {name: tensor + 1 for name, tensor in weights(model).items()}
    save_file(tensors, "other/model.safetensors", {"format": "pt"})


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def history(folder: str | Path) -> list[dict]:
    """The log of a finished run."""
    return json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


# ---- models of a real shape --------------------------------------------------------------------------------------

QWEN = {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16}
QWEN |= {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
SMALL = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}


def build_model(dtype=None, layers: int = 28, shape=QWEN, kind: str = "Qwen3"):
    """A Qwen3 in training mode with packed_attention, in bfloat16 unless told; or another `kind` of that shape."""
    import torch
    import transformers

    from parts.training import packing

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.bfloat16)
    config = getattr(transformers, f"{kind}Config")(num_hidden_layers=layers, **shape)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    torch.set_default_dtype(before)
    packing.use(model)
    return model.train()


def on_meta(**changes):
    """A model that takes no memory: the plan asks for shapes and dtypes alone."""
    import torch

    with torch.device("meta"):
        return build_model(**changes)


def card_arguments(lora=False, **changes):
    """The recipe's arguments as the plan reads them, on a card that this machine need not have."""
    import memory_budget

    import train
    import train_lora

    return memory_budget.card_arguments(train_lora.arguments if lora else train.arguments, **changes)


def load_attentive(tiny_model, device: str = "cpu"):
    """The tiny model with weights so large that its tokens hang on all that came before: else it repeats one token."""
    import torch

    from parts.model.weights import load_weights

    model = load_weights(str(tiny_model), torch.device("cpu")).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


def opening(template: str) -> str:
    """A chat template like that of Qwen3's thinking-only models: the prompt opens <think>, and thinking cannot be
    switched off."""
    opened = template.replace(r"'<|im_start|>assistant\n'", r"'<|im_start|>assistant\n<think>\n'")
    return opened.replace("if enable_thinking is defined", "if false")


def recite(model, tokenizer, replies: list[str], pause: float = 0.0) -> list[list[int]]:
    """Let the model say these, one after another, and the last of them ever after, a token each `pause` seconds or
    more; returns the prompts' ids, as they come."""
    prompts, left = [], []
    texts = [tokenizer(reply)["input_ids"] + [tokenizer.eos_token_id] for reply in replies]

    def say(_, args, kwargs, output):
        ids = kwargs["input_ids"][0].tolist()
        if len(ids) > 1:
            left[:] = texts[min(len(prompts), len(texts) - 1)]
            prompts.append(ids)
        time.sleep(pause)
        output.logits[:, -1] = -1e9
        output.logits[:, -1, left.pop(0)] = 1e9

    model.register_forward_hook(say, with_kwargs=True)
    return prompts


# ---- packed batches -----------------------------------------------------------------------------------------------

LENGTHS = (40, 25, 60, 33)  # tokens of `examples`


def examples() -> list[dict[str, list[int]]]:
    """Random ids; of each example the first nine are its prompt."""
    import torch

    from parts.model.encoding import IGNORE_INDEX

    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(10, 4000, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": ids, "labels": [IGNORE_INDEX] * 9 + ids[9:]} for ids in rows]


def gradient(trainer, rows):
    """[parameters] after one step of `rows`."""
    import torch

    from parts.model.encoding import IGNORE_INDEX

    batch = trainer.data_collator(rows)
    trainer.model.zero_grad()
    trainer.training_step(trainer.model, batch, num_items_in_batch=(batch["labels"] != IGNORE_INDEX).sum())
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


# ---- scripts ------------------------------------------------------------------------------------------------------


class Server:
    """A process that has imported the scripts and forks for each that is run: an import takes 8 s. Started at the first
    run, it ends with this process."""

    process: subprocess.Popen | None = None

    def fork(self, request: dict) -> int:
        """The process id of the child that does what `request` says."""
        return self.ask(request)

    def load(self, *modules: str) -> None:
        """Let the children find these imported, as far as they are installed."""
        self.ask({"modules": [name for name in modules if importlib.util.find_spec(name.partition(".")[0])]})

    def ask(self, request: dict):
        if self.process is None:
            code = f"import sys; sys.path[:0] = {sys.path!r}; import helpers; helpers.serve()"
            env = os.environ | {"PYTHONUTF8": "1", "TOKENIZERS_PARALLELISM": "false"}
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


SERVER = Server()


def import_all() -> None:
    """What trainings and replies import, out of the collector's sight: a round through it takes half a second."""
    import matplotlib.figure  # noqa: F401
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    from transformers import Trainer  # noqa: F401

    import inference_lora  # noqa: F401
    import train_lora  # noqa: F401
    from parts.training import arguments  # noqa: F401

    gc.freeze()


def serve() -> None:
    """In the server: a line of JSON in, one out."""
    import_all()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer = None if pid == 0 else os.waitstatus_to_exitcode(status)
        elif "modules" in request:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for the answers
                answer = [importlib.import_module(name).__name__ for name in request["modules"]]
            gc.freeze()
        else:
            answer = os.fork()
            if not answer:
                begin(request)
        print(json.dumps(answer), flush=True)


def begin(request: dict) -> None:
    """In the child: run the script, or the function of a test file, as a process of its own would."""
    os.setpgrp()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = [request["script"], *request["flags"]]
    os.dup2(os.open(request["stdin"], os.O_RDONLY), 0)
    os.dup2(os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding=request.get("encoding", "utf-8"), closefd=False, buffering=1)
        for number, mode in enumerate("rww")
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from parts import terminal

    status = 0
    try:
        sys.path.insert(0, str(Path(request["script"]).parent))
        module = __import__(Path(request["script"]).stem)
        if "call" in request:
            getattr(module, request["call"])(*request["flags"])
        else:
            terminal.run_main(module.main)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


class Started:
    """A script that runs; what it printed, standard error included, is in `stdout`."""

    def __init__(self, script: str, flags, cwd, env=None, stdin=None, **more):
        folder = Path(tempfile.mkdtemp())
        self.output, given = folder / "output.txt", folder / "stdin.txt"
        given.write_text(stdin or "", encoding="utf-8")
        environment = dict(env or os.environ) | {"PYTHONUTF8": "1"}
        request = {"script": str(ROOT / script), "flags": [*map(str, flags)], "cwd": str(cwd), "env": environment}
        self.pid = SERVER.fork(request | {"stdin": str(given), "output": str(self.output)} | more)
        self.returncode, self.encoding = None, more.get("encoding", "utf-8")

    @property
    def stdout(self) -> str:
        return self.output.read_text(encoding=self.encoding, errors="replace") if self.output.exists() else ""

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = SERVER.ask({"wait": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(self.stdout[-3000:])
            time.sleep(0.01)
        return self.returncode


def run_script(script: str, *flags, cwd: Path, env=None, stdin: str | None = None, fresh: bool = False, **more):
    """Run a script of the project in `cwd`; its exit status is in `.returncode`, its output, standard error included,
    in `.stdout`. `fresh`: in a process that imports all anew, as a person's. `call`: a function of it, not its main.
    `encoding`: of its terminal."""
    if not fresh:
        (started := Started(script, flags, cwd, env, stdin, **more)).wait()
        return started
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=cwd,
        env=dict(env or os.environ) | {"PYTHONUTF8": "1"},
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=900,
    )
