"""Whether the libraries take what the flags ask of them: trackers, optimizer, scheduler, compiler, loader, and the
packages that only some flags need. What is tried is the real thing, on a model of one tiny layer."""

import contextlib
import copy
import importlib.metadata
import importlib.util

import packaging.version
import torch
import transformers

from parts.flags import is_given
from parts.terminal import first_line, shorten

DEEPSPEED = "0.19.8"  # the first one that was tried; before 0.18.3 no gradients came of loss.backward()
PACKAGES = {"comet_ml": "comet-ml", "azure_ml": "azureml-mlflow"}  # where the tracker's name is not the package's


def versions() -> dict[str, str]:
    """Of those that decide a training."""
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "modelscope-hub", "swanlab")
    return {name: importlib.metadata.version(name) for name in names}


def optional_versions() -> dict[str, str | None]:
    """Of those that only some cards or flags need; None where one is not installed."""
    found = dict.fromkeys(("liger-kernel", "torch-optimi", "triton", "torchao", "bitsandbytes", "deepspeed"))
    for name in found:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def try_out(args) -> None:
    """Raises ValueError where a library refuses what the flags ask of it. Once transformers has filled in what was left
    open."""
    if args.fp16 and (args.device.type == "cpu" or best_is_bfloat16(args)):
        raise ValueError("--fp16：这里的权重是 bfloat16，或没有 GPU，半精度用不上")
    if args.use_liger_kernel and (args.device.type == "cpu" or importlib.util.find_spec("liger_kernel") is None):
        raise ValueError("--use_liger_kernel 要 GPU 和 liger-kernel；请先运行 pip install liger-kernel")
    for name in args.report_to:
        find_tracker(name)
    if is_given(args, "optim") or args.optim_args or args.optim_target_modules:
        attempt(f"--optim {args.optim.value}", try_optimizer, args)
    attempt(f"--lr_scheduler_type {args.lr_scheduler_type.value}", build_scheduler, args)
    if args.torch_compile:
        options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
        attempt("--torch_compile", try_compiling, args.device, **options)
    options = ("num_workers", "prefetch_factor", "persistent_workers", "multiprocessing_context")
    options = {name: getattr(args, f"dataloader_{name}") for name in options}
    attempt("--dataloader_*", torch.utils.data.DataLoader, [0], **options)


def find_packages(args) -> None:
    """Raises ValueError where one is not installed that was asked for: of a command only, as plans for another machine
    can be made without them."""
    if args.deepspeed and not has_deepspeed():
        raise ValueError(
            f"--deepspeed 要用 deepspeed {DEEPSPEED} 或更新的；请先运行 pip install deepspeed=={DEEPSPEED}"
        )
    wanted = {
        "--load_in_4bit": ["bitsandbytes"] * args.load_in_4bit,
        f"--optimizer {args.optimizer}": ["torchao"] * str(args.optimizer).startswith("8bit"),
        # In requirements.txt since samples are: without them a run would end at its first evaluation.
        f"--eval_samples {args.eval_samples}": ["rapidfuzz", "rjieba"] * bool(args.eval_samples),
    }
    for flag, packages in wanted.items():
        if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
            raise ValueError(f"{flag} 要用 {'、'.join(missing)}；请先运行 pip install {' '.join(missing)}")


def has_deepspeed() -> bool:
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return False
    return packaging.version.parse(found) >= packaging.version.parse(DEEPSPEED)


def best_is_bfloat16(args) -> bool:
    from parts import models

    return models.best_dtype(args.device) == torch.bfloat16


def attempt(flag: str, run, *args, **kwargs) -> None:
    """Run it; whatever a library raises becomes a ValueError with the flag's name."""
    try:
        run(*args, **kwargs)
    except Exception as error:
        raise ValueError(f"{flag} 在这里用不了（{shorten(first_line(error), 300)}）") from None


def find_tracker(name: str) -> None:
    """Raises ValueError for a tracker that is not known or not installed."""
    if name == "swanlab" and importlib.util.find_spec(name):  # its import takes a second
        return
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if name not in INTEGRATION_TO_CALLBACK:
        raise ValueError(f"--report_to {name}：只有 none、{'、'.join(INTEGRATION_TO_CALLBACK)}")
    try:
        INTEGRATION_TO_CALLBACK[name]()
    except Exception as error:
        install = f"请先运行 pip install {PACKAGES.get(name, name)}，或用 --report_to none"
        raise ValueError(f"--report_to {name} 在这里用不了（{shorten(first_line(error))}）；{install}") from None


def try_compiling(device: torch.device, **options) -> None:
    """It compiles only what is called."""
    torch.compile(torch.nn.Linear(1, 1).to(device), **options)(torch.zeros(1, device=device))


def try_optimizer(args) -> None:
    """Build the optimizer of --optim and take a step with it. Raises ValueError for what does not go with a step of
    several passes or with our evaluation, and for flags of which it takes no notice."""
    from transformers import Trainer

    name = args.optim.value
    if "lomo" in name or name.endswith("layerwise"):
        raise ValueError("它在反向传播中更新，而一步可能分几次算；请用 --optimizer 8bit_in_backward")
    if name.startswith("schedule_free"):
        raise ValueError("评估和保存用的是它平均之后的权重，这里没有换")
    model = tiny_model(args)

    def ask(**changes):
        changed = copy.copy(args)
        vars(changed).update(changes)
        return Trainer.get_optimizer_cls_and_kwargs(changed, model)

    cls, options = ask()
    for flag in ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"):
        default = type(args).__dataclass_fields__[flag].default
        if is_given(args, flag) and str(ask(**{flag: default})) == str((cls, options)):
            raise ValueError(f"它不看 --{flag}")
    if args.optim_target_modules and "params" not in options:
        raise ValueError("它不看 --optim_target_modules")
    weights = options.pop("params", list(model.parameters()))
    optimizer = cls(weights, **options)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()


def tiny_model(args) -> torch.nn.Module:
    """A layer with the names of a Qwen3's."""
    config = transformers.Qwen3Config(
        num_hidden_layers=1, hidden_size=8, intermediate_size=8, head_dim=4, vocab_size=8,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).to(args.device)


def build_scheduler(args) -> None:
    """The scheduler over a weight of its own, and its first step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    steps = args.max_steps if args.max_steps > 0 else 100
    transformers.get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs
    )
