"""Full-parameter fine-tuning of Qwen3-1.7B into a Chinese medical chat model that thinks before it answers.

    python train.py --check                           # first on a new card: does it run here, and how fast
    python train.py                                   # fetches what is missing; run again, it continues
    python train.py --model_name Qwen/Qwen3-0.6B      # a small card
    python train.py --learning_rate 5e-5 --output_dir output/lr5e-5       # all flags: --help
    torchrun --nproc_per_node 2 train.py --per_device_train_batch_size 2  # two GPUs, still 4 examples a step
    torchrun --nproc_per_node 8 train.py --model_name Qwen/Qwen3-8B --fsdp true       # a model that fits no card

The best weights end up in the output folder itself; `python inference.py` finds them there. This file is the recipe;
what makes it fast, small and safe is in parts/, one noun a file. Those that need the heavy libraries are imported once
the flags are read.
"""

import dataclasses
import os
import shlex
from functools import partial

import data
from data import LORA_OUTPUT_DIR, MAX_LENGTH, MODEL_NAME, OUTPUT_DIR, SEED, SYSTEM_PROMPT, TRAIN_FILE, VAL_FILE
from parts import terminal
from parts.model import encoding
from parts.training import environment, flags

LEARNING_RATE = 1e-4  # linear to 0, no warm-up
NUM_EPOCHS = 2
BATCH_SIZE = 4  # examples a step on a device, about 3,150 tokens; together in one pass when memory allows
ACCUMULATION_STEPS = 1  # x BATCH_SIZE x devices = 4 examples a step
EVAL_STEPS = 100  # optimizer steps between evaluations; a checkpoint is written at each
PATIENCE = 3  # evaluations without a better eval_loss before training stops; 0: never stop early
KEPT_CHECKPOINTS = 2  # the best and the newest
LOGGING_STEPS = 10
MEAN_LENGTH = 788  # tokens of a published example, for --check where there are none
SAMPLES = 3  # validation questions answered at the end
SAMPLE_TOKENS = 1024  # at most, for each reply
# One public run of the published recipe, and its eval_loss: (step, loss)
PUBLISHED = {"dataset": data.DATASET_NAME, "steps": 1082, "examples_per_step": 4}
PUBLISHED |= {"best": (500, 1.146), "end": (1000, 1.163)}
PROJECT = "qwen3-sft-medical"  # in SwanLab

OUT_OF_MEMORY = (
    "错误：显存（内存）不足，写好的检查点都还在。请依次尝试：关掉其他占用显存的程序；--memory_gb 写得比显存小一些；"
    "--max_length 1024；python train_lora.py；python train_lora.py --load_in_4bit true；--model_name Qwen/Qwen3-0.6B。"
)
LOST = "错误：另一个进程已经结束或没有回应，训练停止；写好的检查点都还在，同一命令从最近的一个继续。"


RECIPE = {  # what the command line may change; the other flags are in parts/training/flags.py
    "model_name": MODEL_NAME,
    "train_file": TRAIN_FILE,
    "val_file": VAL_FILE,
    "max_length": MAX_LENGTH,
    "output_dir": OUTPUT_DIR,
    "learning_rate": LEARNING_RATE,
    "num_train_epochs": NUM_EPOCHS,
    "per_device_train_batch_size": BATCH_SIZE,
    "gradient_accumulation_steps": ACCUMULATION_STEPS,
    "eval_steps": EVAL_STEPS,
    "early_stopping_patience": PATIENCE,
    "save_total_limit": KEPT_CHECKPOINTS,
    "logging_steps": LOGGING_STEPS,
    "report_to": "swanlab",
    "seed": SEED,
    "eval_samples": 0,
    "sample_tokens": SAMPLE_TOKENS,
}


def arguments(**changes):
    """The recipe with these changes, as parts/arguments.Arguments. It is here that torch is imported. Raises SystemExit
    for what cannot be meant, or cannot be done here."""
    environment.prepare()
    from parts.training.arguments import Arguments

    return Arguments(**RECIPE | changes)


def prepare_files(args) -> None:
    """Make the default data files when neither is there; other files have to be there."""
    files = (args.train_file, args.val_file)
    missing = [file for file in files if not os.path.isfile(file)]  # unlike Path's, False for a name too long
    if len(missing) == 2 and files == (TRAIN_FILE, VAL_FILE):
        data.prepare()
    elif missing:
        raise SystemExit(
            f"错误：找不到 {'、'.join(missing)}；请先运行 python data.py --dataset <数据> "
            f"--train_file {args.train_file} --val_file {args.val_file}"
        )


def build_trainer(args, model, tokenizer, train_dataset, eval_dataset, callbacks=(), **kept):
    """The Trainer over padding-free batches, with the kernels that run here and the plan that fits here, of which an
    interrupted run `kept` a part."""
    from parts.machine import kernels, plan, rehearsal
    from parts.training import packing, sharding
    from parts.training.safe_trainer import BestCheckpoint
    from parts.training.trainer import PackedTrainer

    trainer_class = PackedTrainer
    if args.fsdp:
        sharding.shard(model, args.device, args.world_size)
        trainer_class = sharding.ShardedTrainer
    kernels.require(model, args.load_in_4bit)
    fast = kernels.choose(model, args.fsdp) if args.fast_kernels else kernels.Kernels()
    lengths = packing.lengths_of(train_dataset)
    free = plan.free_bytes(args.device, model, args.memory_gb)
    plans = plan.choose(args, model, lengths, fast.layers.runs, free, **kept)
    if args.fast_kernels:
        print(kernels.describe(fast))
    if args.use_cpu:
        print("没有找到 GPU，在 CPU 上训练：Qwen3-1.7B 会非常慢。")
    trainer = trainer_class(
        model=model,
        args=args,
        kernels=fast,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=[BestCheckpoint(), *callbacks],
    )
    rehearsal.settle(trainer, plans)
    return trainer


def describe_step(args) -> str:
    """How many examples a step of several processes has, and what it does not have."""
    each, passes, published = args.train_batch_size, args.gradient_accumulation_steps, PUBLISHED["examples_per_step"]
    step = f"每步 {args.examples_per_step} 条样本：{args.world_size} 个进程，各 {each} 条，累积 {passes} 次"
    other = "" if args.examples_per_step == published else f"；公开方案是 {published} 条，学习率是照它定的"
    return f"{step}{other}。{'分片时不生成样例。' if args.fsdp else ''}"


def save(trainer, tokenizer, settings: dict) -> None:
    """The best weights, complete, into the output folder; the mark of a finished run comes last."""
    from parts.model import export
    from parts.run import folder as output_folder
    from parts.run import model_card

    args, model = trainer.args, trainer.release()
    state_dict = trainer.gather()  # by all processes together
    if args.process_index:
        return
    with output_folder.finishing(args, trainer.state):
        model.save_pretrained(args.output_dir, state_dict=state_dict)
        tokenizer.save_pretrained(args.output_dir)
        export.translate(args.output_dir)
        if not args.trains_adapter:
            export.write_modelfile(args.output_dir, tokenizer, model.generation_config)
        model_card.write(trainer, settings, data.read_origin(args.train_file), environment.versions())


def train(args, add_adapter=None, callbacks=()):
    """From the files to a finished output folder, step by step; returns the Trainer. Called again after an interruption
    it goes on. `add_adapter(model, args)` makes the model that is trained, `callbacks` are Trainer's."""
    import transformers

    from parts.machine import plan
    from parts.model import weights
    from parts.run import folder as output_folder
    from parts.run import processes, tracking
    from parts.run.interruption import Interruption
    from parts.training import samples

    tracking.check(args, PROJECT)
    with processes.explain_loss(args, LOST), output_folder.hold(args):
        with terminal.explain_out_of_memory(OUT_OF_MEMORY), plan.limited(args.device):
            # The data and the base model, fetched where they are missing: by the first process, then by the first one
            # of each other machine, which may share its folders
            state = args.distributed_state
            with state.main_process_first(), state.local_main_process_first():
                prepare_files(args)
                remedy = "用 --model_name 指定本地模型文件夹"
                model_path = weights.find_model(args.model_name, remedy, args.model_revision, to_train=True)
            tokenizer = weights.load_tokenizer(model_path)
            weights.check_family(model_path, args.model_name, tokenizer)
            encoding.require_thinking(tokenizer, args.model_name)
            run = output_folder.find_run(args, model_path, SYSTEM_PROMPT)  # what is there to go on with; writes nothing

            # Tokenizer, training set, validation set
            if encoding.default_system(tokenizer) not in (None, SYSTEM_PROMPT):
                print(f"提示：{args.model_name} 此前用的是另一个系统提示词，现在换成 data.py 里的 SYSTEM_PROMPT。")
            tokenizer = encoding.with_system(tokenizer, SYSTEM_PROMPT)  # saved with the model
            load = partial(data.load_dataset, tokenizer=tokenizer, max_length=args.max_length)
            train_dataset, eval_dataset = load(args.train_file), load(args.val_file)
            print(encoding.describe_example(tokenizer, train_dataset[0]))
            if args.world_size > 1:
                print(describe_step(args))

            # Model, adapter, Trainer
            transformers.set_seed(args.seed)  # the adapter's first weights are drawn before Trainer sets it
            model = weights.load_weights(model_path, args.device, args.load_in_4bit, on_cpu=args.fsdp)
            weights.settle_generation(model, tokenizer)  # else Trainer would do a part of it, with a long warning
            model = add_adapter(model, args) if add_adapter else model
            trainer = build_trainer(args, model, tokenizer, train_dataset, eval_dataset, callbacks, **run.kept)
            rows = data.read_examples(args.val_file)
            if not args.fsdp:  # one process alone cannot ask a part of a model
                asked = rows[: args.eval_samples]
                trainer.add_callback(samples.Samples(trainer, asked, data.to_messages, args.sample_tokens))

            # Training; only now, when all that can go wrong before has gone right, an older finished run is given up
            config = {"model_name": args.model_name, "max_length": args.max_length, "plan": trainer.plan._asdict()}
            config |= {"model_sha256": run.settings["model_sha256"], "versions": environment.versions()}
            tracking.start(args, PROJECT, config, goes_on=run.checkpoint is not None)
            output_folder.begin(args, run, trainer.plan)
            with Interruption() as trainer.interruption:
                trainer.train(resume_from_checkpoint=run.checkpoint)
            save(trainer, tokenizer, run.settings)

        # The first questions of the validation set, to look at
        if not args.process_index:
            no_memory = f"错误：显存不足，没有示例回复；但训练已经完成，模型在 {args.output_dir}。"
            with terminal.explain_out_of_memory(no_memory):
                asked = (rows[:SAMPLES], data.to_messages, args.sample_tokens)
                # One process alone cannot ask a part of a model.
                texts = [] if args.fsdp else samples.answer(trainer.model, tokenizer, *asked)
                print("\n" + "\n\n".join(texts))
                tracking.finish(args, texts)
    return trainer


def check(args, add_adapter=None) -> None:
    """Whether a training with these arguments would run here, as a page; writes nothing."""
    from parts.machine import check as page

    with terminal.explain_out_of_memory(OUT_OF_MEMORY):
        page.run(args, build_trainer, data.load_dataset, add_adapter, MEAN_LENGTH)


def changed_flags(args) -> list[str]:
    """Names of the flags that are not the recipe's."""
    recipe = {one.name: one.default for one in dataclasses.fields(args)} | RECIPE
    return [name for name, value in recipe.items() if getattr(args, name) != value]


def report(trainer, script: str) -> None:
    """Last on the screen: how it compares with the public run, where the model is, and how to ask it."""
    from parts.run import model_card

    args, state = trainer.args, trainer.state
    default = args.output_dir in (OUTPUT_DIR, LORA_OUTPUT_DIR)
    where = "" if default else f" --model_path {shlex.quote(args.output_dir)}"
    saved = f"保存的权重：{model_card.describe_saved(state)}。模型在 {args.output_dir}"
    origin = data.read_origin(args.train_file)
    print(f"\n{model_card.against_published(args, state, origin, PUBLISHED, changed_flags(args))}")
    print(f"训练完成：{state.global_step} 步。{saved}，提问：python {script}{where}")


def main() -> None:
    args = arguments(**flags.parse(__doc__, RECIPE))
    if args.check:
        check(args)
    else:
        report(train(args), "inference.py")


if __name__ == "__main__":
    terminal.run_main(main)
