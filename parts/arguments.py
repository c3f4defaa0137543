"""The flags of a training: transformers.TrainingArguments with what the parts add, checked at once. Knows no recipe:
its numbers and files are the script's."""

import argparse
import gc
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from parts import environment

environment.prepare()  # before the first of these imports
gc.disable()  # it would look through what these imports build again and again: a fifth of a command's start
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import HfArgumentParser, TrainingArguments  # noqa: E402

gc.enable()

from parts import card, flags, libraries, processes  # noqa: E402
from parts.optimizers import OPTIMIZERS  # noqa: E402


@dataclass
class Arguments(TrainingArguments):
    """transformers.TrainingArguments and the flags of the parts. What the user wished: nothing is written into it once
    it is made."""

    model_revision: str | None = field(default=None, metadata={"help": "of the ModelScope model; default: master"})
    model_sha256: str | None = field(default=None, metadata={"help": "that its safetensors files must have, by name"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "delete the finished run that is there"})
    memory_gb: float | None = field(
        default=None, metadata={"help": "plan for a card of this size; default: what is free"}
    )
    batch_tokens: int | None = field(default=None, metadata={"help": "most tokens in one pass; default: planned"})
    checkpoint_every: int | None = field(
        default=None, metadata={"help": "recompute every n-th layer; 0: none, 1: all; default: planned"}
    )
    offload_activations: bool | None = field(
        default=None, metadata={"help": "keep the recomputed layers' inputs in the CPU's memory; default: planned"}
    )
    optimizer: str | None = field(
        default=None,
        metadata={
            "help": "of bfloat16 weights; optim: what --optim says; default: planned",
            "choices": list(OPTIMIZERS),
        },
    )
    fast_kernels: bool = field(default=True, metadata={"help": "packed attention and fused layers where they run"})
    check: bool = field(default=False, metadata={"help": "only look whether training runs here, and how fast"})
    rehearse: bool | None = field(
        default=None, metadata={"help": "try the worst step before training; default: on a GPU"}
    )
    full_logits: bool = field(default=False, metadata={"help": "transformers' own loss, to compare with"})

    fsdp: bool = field(
        default=False,
        metadata={"help": "each GPU keeps a part of the model only (FSDP2, with torchrun): for what fits no card"},
    )
    gradient_checkpointing: bool | None = None  # planned; True or False stands for --checkpoint_every 1 or 0
    save_strategy: str | None = None  # as eval_strategy, and
    save_steps: float | None = None  # as eval_steps: each evaluated state is kept until a better or newer one comes
    restore_callback_states_from_checkpoint: bool = True  # the early-stopping count
    logging_nan_inf_filter: bool = False  # it would log 0 for a loss that is no number
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    ddp_find_unused_parameters: bool | None = False
    ddp_timeout: int = 7200  # seconds; the other processes wait while rank 0 downloads

    # No flags here: an adapter's script says otherwise.
    trains_adapter = False
    lora_dropout = 0.0
    load_in_4bit = False

    def __post_init__(self):
        flags.check_numbers(self)
        processes.refuse(self)
        flags.refuse(self)
        if self.optimizer is None and flags.is_given(self, "optim"):
            self.optimizer = "optim"
        if self.eval_strategy == "no":  # then there is no best
            self.load_best_model_at_end, self.early_stopping_patience = False, 0
        self.save_strategy = self.save_strategy or ("steps" if self.eval_strategy == "no" else self.eval_strategy)
        self.save_steps = (self.eval_steps or 500) if self.save_steps is None else self.save_steps
        self.run_name = self.run_name or Path(self.output_dir).name
        asked = flags.recomputes(self)
        if self.checkpoint_every is None and asked is not None:
            self.checkpoint_every = int(asked)
        self.gradient_checkpointing = self.activation_checkpointing = False  # until the plan says otherwise
        if self.offload_activations and self.checkpoint_every == 0:
            raise ValueError("--offload_activations：没有要重算的层（--checkpoint_every 0），也就没有什么可放")
        if not (self.use_cpu or torch.accelerator.is_available()) and (why := card.unused()):
            raise ValueError(why)
        # Without this, processes that torchrun starts on a machine without GPUs would not find each other.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.disable_tqdm is None:  # in a file each move of a bar would be a line
            self.disable_tqdm = not (sys.stderr.isatty() or transformers.utils.is_in_notebook())
        # Trainer's own way would have accelerate cut the model, on GPUs only.
        asked, self.fsdp = self.fsdp, None
        super().__post_init__()
        self.fsdp, self.fsdp_config = asked, {}
        processes.agree(self, self.facts())
        if why := card.no_kernels(self.device) or card.too_small(self.device, self.memory_gb):
            raise ValueError(why)
        libraries.try_out(self)
        self.rehearse = self.check or self.device.type == "cuda" if self.rehearse is None else self.rehearse
        if self.offload_activations and self.device.type == "cpu":
            raise ValueError("--offload_activations 要 GPU")
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type == "cuda"

    def facts(self) -> dict[str, object]:
        """What all processes have to have in common."""
        own = ("local_rank", "use_cpu", "disable_tqdm")  # are a machine's or a terminal's
        given = {f"--{each.name}": getattr(self, each.name) for each in fields(self) if each.name not in own}
        return {"设备": self.device.type} | libraries.versions() | libraries.optional_versions() | given

    @property
    def examples_per_step(self) -> int:
        """Of an optimizer step, on all devices."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def n_gpu(self) -> int:
        """At most one: libraries that were imported before may have seen all GPUs, and DataParallel would cut a packed
        batch to pieces."""
        return min(super().n_gpu, 1)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and the description as it is written."""


def parse_flags(arguments_class: type[Arguments], description: str) -> Arguments:
    """The command line as `arguments_class`. An unknown flag or a value that does not fit ends with one sentence."""
    parser = HfArgumentParser(
        arguments_class,
        description=description,
        usage="%(prog)s [--flag value ...]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    inherited = {field.name: field.metadata.get("help") for field in fields(TrainingArguments)}
    for action in parser._actions:  # a field that is declared again has lost its help
        action.help = action.help or inherited.get(action.dest)
        if action.type is transformers.hf_argparser.string_to_bool:  # of a field that may be None too: --flag is true
            action.nargs, action.const = "?", True
    values = vars(parser.parse_args())
    try:
        args = arguments_class(**values)
        libraries.find_packages(args)
        return args
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # said once on each machine: it may be that one's alone
            raise SystemExit(2) from None
        parser.error(str(error))
