"""What a training was asked to do: transformers.TrainingArguments with the flags of the table, checked at
once. It knows no recipe: its numbers and files are the script's."""

import gc
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from parts.run import processes
from parts.training import environment, flags

gc.disable()  # it would look through what these imports build again and again: a fifth of a command's start
import torch  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

from parts.model import weights  # noqa: E402

gc.enable()

# Fields of TrainingArguments that are no flags, and act for those who call the training from Python
ACTS_FROM_PYTHON = (
    "adam_beta1 adam_epsilon lr_scheduler_kwargs data_seed full_determinism train_sampling_strategy "
    "disable_tqdm dataloader_num_workers log_level logging_first_step"
).split()


@dataclass
class Arguments(TrainingArguments):
    """What the user wished: nothing is written into it once it is made. Raises SystemExit for what cannot be
    meant, or cannot be done here."""

    model_name: str = ""
    model_revision: str | None = None  # of a model on a hub; its default branch
    train_file: str = ""
    val_file: str = ""
    max_length: int = 2048  # tokens of an example
    overwrite_output_dir: bool = False
    early_stopping_patience: int = 0  # evaluations; 0: never
    eval_samples: int = 0  # questions at each evaluation
    sample_tokens: int = 1024  # of a sample reply, at most
    memory_gb: float | None = None  # the following: None is planned
    batch_tokens: int | None = None
    checkpoint_every: int | None = None
    offload_activations: bool | None = None
    optimizer: str | None = None
    rehearse: bool | None = None  # None: on a GPU
    fast_kernels: bool = True
    full_logits: bool = False
    check: bool = False
    fsdp: bool = False
    lora_rank: int | None = None  # None: all weights are trained, and the next seven say nothing
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    load_in_4bit: bool = False
    adapter: str | None = None  # the folder of an adapter to start from

    # Trainer's own settings, as the parts rely on them
    eval_strategy: str = "steps"
    save_steps: float = 0  # as often as its share of the time allows: training/safe_trainer.py
    metric_for_best_model: str | None = "eval_loss"  # as earlier versions noted it among a run's settings
    restore_callback_states_from_checkpoint: bool = True  # the early-stopping count
    logging_nan_inf_filter: bool = False  # it would log 0 for a loss that is no number
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    ddp_find_unused_parameters: bool | None = False
    ddp_timeout: int = 7200  # seconds; the other processes wait while rank 0 downloads

    def __post_init__(self):
        flags.check(vars(self))
        self.refuse_unread()
        self.run_name = self.run_name or Path(self.output_dir).name
        has_gpu = torch.accelerator.is_available()
        if not (self.use_cpu or has_gpu) and (reason := environment.unused_card()):
            flags.refuse(reason)
        # Without this, processes that torchrun starts on a machine without GPUs would not find each other.
        self.use_cpu = self.use_cpu or not has_gpu
        sharded, self.fsdp = self.fsdp, None  # accelerate would cut the model its own way, on GPUs only
        super().__post_init__()
        self.fsdp, self.fsdp_config = sharded, {}
        # Derived, as Trainer's own class does it from its flag: float16 autocast, with a scaler of the loss.
        self.mixed_precision = "fp16" if self.dtype == torch.float16 else "no"
        if self.world_size > 1:
            processes.agree(self.facts())
        if reason := environment.unusable(self.device, self.memory_gb):
            flags.refuse(reason)
        if self.offload_activations and self.device.type == "cpu":
            flags.refuse("--offload_activations 要 GPU")
        if self.rehearse is None:
            self.rehearse = self.check or self.device.type == "cuda"
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type == "cuda"

    def refuse_unread(self) -> None:
        """Raise SystemExit for a changed field of TrainingArguments of which nothing here takes notice. Its
        value, which may be a secret, is never said."""
        for setting in fields(self):
            name, default = setting.name, setting.default
            if setting.default_factory is not MISSING:
                default = setting.default_factory()
            value = getattr(self, name)
            known = name in flags.FLAGS or name in ACTS_FROM_PYTHON
            if not known and value != default and (value or default):
                flags.refuse(f"{name}：这里的训练会忽略这个设置，请去掉")

    def facts(self) -> dict[str, object]:
        """Return what all processes have to have in common."""
        facts = {"设备": self.device.type} | environment.versions(environment.LIBRARIES)
        for setting in fields(self):
            if setting.name not in ("local_rank", "use_cpu"):  # these are a machine's own
                facts[f"--{setting.name}"] = getattr(self, setting.name)
        return facts

    @property
    def trains_adapter(self) -> bool:
        return self.lora_rank is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model's weights are loaded: float16 only for frozen ones."""
        best = weights.best_dtype(self.device)
        frozen = self.trains_adapter and not self.fsdp  # which wants one dtype for base and adapter
        if best == torch.float16 and not (frozen and self.fast_kernels):
            return torch.float32
        return best

    @property
    def examples_per_step(self) -> int:
        """The number of examples of an optimizer step, on all devices."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def n_gpu(self) -> int:
        """The number of GPUs of this process is at most one: libraries that were imported before may have
        seen all of them, and DataParallel would cut a packed batch to pieces."""
        return min(super().n_gpu, 1)
