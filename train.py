"""Full-parameter fine-tuning of Qwen3-1.7B into a Chinese medical chat model that thinks before it answers.

    python train.py --check                           # first on a new card: does it run here, and how fast
    python train.py                                   # fetches what is missing; run again, it continues
    python train.py --model_name Qwen/Qwen3-0.6B      # a small card
    python train.py --learning_rate 5e-5 --output_dir output/lr5e-5       # all flags: --help
    torchrun --nproc_per_node 2 train.py --per_device_train_batch_size 2  # two GPUs, still 4 examples a step
    torchrun --nproc_per_node 8 train.py --model_name Qwen/Qwen3-8B --fsdp true  # a model that fits no card

The best weights end up in the output folder itself; `python inference.py` finds them there. This file is the
recipe; what makes it fast, small and safe is in parts/. The heavy libraries are imported inside functions, so
that --help and a wrong flag answer at once.
"""

import dataclasses
import os
import shlex

import data
from parts import terminal
from parts.model import encoding
from parts.training import environment, flags

RECIPE = {  # what the command line may change; the other flags are in parts/training/flags.py
    "model_name": data.MODEL_NAME,
    "train_file": data.TRAIN_FILE,
    "val_file": data.VAL_FILE,
    "max_length": data.MAX_LENGTH,
    "output_dir": data.OUTPUT_DIR,
    "learning_rate": 1e-4,  # linear to 0, no warm-up
    "num_train_epochs": data.NUM_TRAIN_EPOCHS,
    # Examples a step on a device, about 3,150 tokens; in one pass when memory allows.
    # The learning rate is meant for 4 on all devices together.
    "per_device_train_batch_size": data.EXAMPLES_PER_STEP,
    "gradient_accumulation_steps": 1,
    "eval_steps": 100,  # optimizer steps between evaluations; the weights of the best one are kept
    "early_stopping_patience": 3,  # evaluations without a better eval_loss before training stops; 0: never
    "save_total_limit": 2,  # checkpoints: the best and the newest
    "logging_steps": 10,
    "report_to": "swanlab",
    "seed": data.SEED,
    "eval_samples": 0,  # validation questions answered at each evaluation
    "sample_tokens": 1024,  # at most, for each reply
}
MEAN_LENGTH = 788  # tokens of a published example, for --check where there are none
SAMPLES = 3  # validation questions answered at the end
# One public run of the published recipe, and its eval_loss: (step, loss)
PUBLISHED = {"dataset": data.DATASET_NAME, "steps": 1082, "examples_per_step": 4}
PUBLISHED |= {"best": (500, 1.146), "end": (1000, 1.163)}
# Of the published set, by its 241 validation rows: of 33 that ask whether a premise is true 31 are affirmed.
FAULTS = (
    "数据里的回答几乎总是同意提问者的前提，常以医院医生的口吻说话，很少让人拨打 120；从它学的模型也会这样。"
)
PROJECT = "qwen3-sft-medical"  # in SwanLab

OUT_OF_MEMORY = (
    "错误：显存（内存）不足，写好的检查点都还在。请依次尝试：关掉其他占用显存的程序；"
    "--memory_gb 设得比显存小一些；--max_length 1024；python train_lora.py；"
    "python train_lora.py --load_in_4bit true；--model_name Qwen/Qwen3-0.6B。"
)
LOST = "错误：另一个进程已经结束或没有响应，训练停止。已写好的检查点都还在，用同一条命令从最近的一个继续。"


def arguments(**changes):
    """Return the recipe with these changes, as parts/training/arguments.py's Arguments. Raises SystemExit for
    what cannot be meant, or cannot be done here."""
    # torch, tokenizers and CUDA read these variables of the environment once, when they are imported below.
    environment.prepare()
    from parts.training.arguments import Arguments

    return Arguments(**RECIPE | changes)


def prepare_files(args) -> str:
    """Make the default data files when neither is there; other files have to be there. Returns the folder of
    the base model, which is downloaded if it is not here yet."""
    from parts.model import weights

    files = (args.train_file, args.val_file)
    # os.path's isfile is False for a name that is too long for the system, where Path's would raise.
    missing = [file for file in files if not os.path.isfile(file)]
    # Where only one of the two is missing, a new split would not belong to the one that is there.
    if len(missing) == 2 and files == (data.TRAIN_FILE, data.VAL_FILE):
        data.prepare()
    elif missing:
        command = f"python data.py --dataset <数据> --train_file {args.train_file} --val_file {args.val_file}"
        raise SystemExit(f"错误：找不到 {'、'.join(missing)}；请先运行 {command}")
    remedy = "用 --model_name 指定本地模型文件夹"
    return weights.find_model(args.model_name, remedy, args.model_revision, to_train=True)


def load_tokenizer(args, base: str):
    """Return the base model's tokenizer, in whose chat template SYSTEM_PROMPT is the default. Raises
    SystemExit for a model that cannot be trained here."""
    from parts.model import weights

    tokenizer = weights.load_tokenizer(base)
    weights.check_family(base, args.model_name, tokenizer)
    encoding.require_thinking(tokenizer, args.model_name)
    if encoding.default_system(tokenizer) not in (None, data.SYSTEM_PROMPT):
        print(f"提示：{args.model_name} 此前用的是另一个系统提示词，现在换成 data.py 里的 SYSTEM_PROMPT。")
    return encoding.with_system(tokenizer, data.SYSTEM_PROMPT)


def build_trainer(args, model, tokenizer, train_dataset, eval_dataset, callbacks=(), **resumed_plan):
    """Return the Trainer over padding-free batches, with the kernels that run here and the plan that fits;
    an interrupted run's `resumed_plan` is what the new one has to agree with."""
    from parts.machine import kernels, plan, rehearsal
    from parts.model import fused
    from parts.training import packing, sharding
    from parts.training.safe_trainer import BestCheckpoint
    from parts.training.trainer import PackedTrainer

    trainer_class = PackedTrainer
    if args.fsdp:
        # Before anything is measured: each process then holds its share of the weights alone.
        sharding.shard(model, args.device, args.world_size)
        trainer_class = sharding.ShardedTrainer

    # What is fast is taken only where it was seen to run here and to agree with its plain form.
    kernels.require(model, args.load_in_4bit)
    fast = kernels.choose(model) if args.fast_kernels else kernels.Kernels()

    # Plans from the fastest to the smallest, those left out whose bytes do not fit by the estimate.
    lengths = packing.lengths_of(train_dataset)
    free = plan.free_bytes(args.device, model, args.memory_gb)
    plans = plan.choose(args, model, lengths, fast.layers.runs, free, **resumed_plan)
    if fast.layers.slower:  # they are worth it where a faster plan needs the memory that they save
        plain = plan.choose(args, model, lengths, False, free, **resumed_plan)
        if (plain[0].rung, plain[0].fits) == (plans[0].rung, plans[0].fits):
            plans, fast = plain, fast._replace(layers=fused.missing(fast.layers.why))
    if fast.layers.runs:
        fused.fuse_layers(model)
    if args.fast_kernels:
        print(kernels.describe(fast))
    if args.use_cpu:
        print("没有找到 GPU，在 CPU 上训练：Qwen3-1.7B 会非常慢。")
    if args.mixed_precision == "fp16":
        frozen = "这张卡不支持 bfloat16：冻结的权重用 float16，适配器用 float32"
        print(f"{frozen}。溢出的一步会跳过，梯度范数显示 inf 或 nan。")

    trainer = trainer_class(
        model=model,
        args=args,
        kernels=fast,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=[BestCheckpoint(), *callbacks],
    )
    # The largest step is tried, so that what does not fit is found out now and not after an hour.
    rehearsal.settle(trainer, plans)
    return trainer


def describe_step(args) -> str:
    """Say how many examples a step of several processes has, and what such a training leaves out."""
    passes, published = args.gradient_accumulation_steps, PUBLISHED["examples_per_step"]
    total = args.examples_per_step
    step = f"每步 {total} 条样本：{args.world_size} 个进程，各 {args.train_batch_size} 条，累积 {passes} 次"
    if total != published:
        step += f"；公开方案每步 {published} 条，学习率是按它定的"
    if args.fsdp:
        step += "。分片训练时不生成示例回复"
    return step + "。"


def save(trainer, tokenizer, run) -> None:
    """Write the best weights into the run's folder, with all that asking needs; the mark of a finished run
    comes last, so that a kill in between leaves a run that continues."""
    from parts.model import export
    from parts.run import model_card

    args = trainer.args
    model = trainer.release()  # Trainer has loaded the best weights into it
    # All processes take part in gathering a sharded model; the first one alone writes.
    gathered = trainer.gather()
    if args.process_index != 0:
        return
    with run.finishing(trainer.state):
        model.save_pretrained(run.folder, state_dict=gathered)
        tokenizer.save_pretrained(run.folder)
        export.translate(run.folder)
        if not args.trains_adapter:  # Ollama takes no adapter: inference_lora.py merges it first
            export.write_modelfile(run.folder, tokenizer, model.generation_config)
        origin = data.read_origin(args.train_file)
        faults = FAULTS if data.DATASET_NAME in model_card.datasets_of(origin) else ""
        model_card.write(trainer, run.settings, origin, environment.versions(), faults)


def show_samples(trainer, rows) -> list[str]:
    """Print replies to the first questions of the validation set, and return them as text."""
    from parts.training import samples

    args = trainer.args
    if args.fsdp:  # the first process, which asks, holds a share of the model only
        return []
    no_memory = f"错误：显存不足，无法生成示例回复；但训练已经完成，模型在 {args.output_dir}。"
    with terminal.explain_out_of_memory(no_memory):
        texts = samples.answer(trainer, rows[:SAMPLES], data.to_messages, args.sample_tokens)
    print("", *texts, sep="\n\n")
    return texts


def train(args, add_adapter=None, callbacks=()):
    """Train from the files to a finished output folder, and return the Trainer. The same call continues an
    interrupted run. `add_adapter(model, args)` makes the model that is trained, `callbacks` are Trainer's."""
    import transformers

    from parts.machine import plan
    from parts.model import weights
    from parts.run import folder, processes, tracking
    from parts.run.interruption import Interruption
    from parts.training import samples

    state = args.distributed_state
    tracked = "swanlab" in args.report_to and state.is_main_process
    if tracked:  # wrong settings of SwanLab are said before anything is loaded
        tracking.configure(PROJECT, args.run_name)
    opened = folder.opened(args.output_dir, args.overwrite_output_dir, args.model_name, args.adapter)
    with processes.explain_loss(LOST), opened as run:
        with terminal.explain_out_of_memory(OUT_OF_MEMORY), plan.limited(args.device):
            # 1. Data and base model, fetched where they are missing: by one process, then one of each machine
            with state.main_process_first(), state.local_main_process_first():
                base = prepare_files(args)

            # 2. Tokenizer. Is there a run to go on with? Nothing is written yet
            tokenizer, settings = load_tokenizer(args, base), None
            if state.is_local_main_process:  # checksums of gigabytes are made once on each machine
                settings = folder.settings_of(args, base, data.SYSTEM_PROMPT, args.dtype)
                if args.adapter:
                    weights.require_base(args.adapter, args.model_name, base, settings["model_sha256"])
            run.find(settings, vars(args), flags.OPTIMIZERS)

            # 3. Data sets
            train_dataset = data.load_dataset(args.train_file, tokenizer, args.max_length)
            eval_dataset = data.load_dataset(args.val_file, tokenizer, args.max_length)
            rows = data.read_examples(args.val_file)
            print(encoding.describe_example(tokenizer, train_dataset[0]))
            if args.world_size > 1:
                print(describe_step(args))

            # 4. Model, adapter. The adapter's first weights are drawn before Trainer sets the seed
            transformers.set_seed(args.seed)
            model = weights.load_weights(base, args.device, args.load_in_4bit, args.fsdp, args.dtype)
            weights.settle_generation(model, tokenizer)  # Trainer would do a part of it, with a long warning
            if add_adapter:
                model = add_adapter(model, args)

            # 5. Trainer, with what this card can do
            trainer = build_trainer(
                args, model, tokenizer, train_dataset, eval_dataset, callbacks, **run.resumed_plan
            )
            if args.eval_samples:
                questions = rows[: args.eval_samples]
                asking = samples.Samples(trainer, questions, data.to_messages, args.sample_tokens)
                trainer.add_callback(asking)

            # 6. Train. An older finished run is given up only now, when all else has gone right
            if tracked:
                config = run.settings | {"plan": trainer.plan._asdict(), "versions": environment.versions()}
                continued = run.checkpoint is not None
                tracking.start(PROJECT, args.run_name, args.output_dir, config, goes_on=continued)
            run.begin(trainer.plan.optimizer, trainer.plan.batch_tokens)
            with Interruption() as interruption:
                trainer.interruption = interruption
                trainer.train(resume_from_checkpoint=run.checkpoint)

            # 7. Save the best weights
            save(trainer, tokenizer, run)

        # 8. Three answers to look at. The model is saved: what goes wrong here costs nothing
        if state.is_main_process:
            texts = show_samples(trainer, rows)
            if tracked:
                tracking.finish(args.output_dir, texts)
    return trainer


def check(args, add_adapter=None) -> None:
    """Print a page that says whether a training with these arguments would run here; nothing is written."""
    from parts.machine import check as page

    with terminal.explain_out_of_memory(OUT_OF_MEMORY):
        page.run(args, build_trainer, data.load_dataset, add_adapter, MEAN_LENGTH)


def changed_flags(args) -> list[str]:
    """Return the names of the flags that have another value than in the recipe."""
    recipe = {field.name: field.default for field in dataclasses.fields(args)} | RECIPE
    return [name for name, value in recipe.items() if getattr(args, name) != value]


def report(trainer, script: str) -> None:
    """Print last: how the run compares with the public one, where the model is, and how to ask it."""
    from parts.run import model_card

    args, state = trainer.args, trainer.state
    ask = f"python {script}"
    if args.output_dir not in (data.OUTPUT_DIR, data.LORA_OUTPUT_DIR):  # where the scripts look by themselves
        ask += f" --model_path {shlex.quote(args.output_dir)}"
    if not trainer.learns_thinking():
        ask += " --no_thinking"  # it has learnt to answer without
    saved = f"保存的权重：{model_card.describe_saved(state)}。模型在 {args.output_dir}"
    origin = data.read_origin(args.train_file)
    print(f"\n{model_card.against_published(args, state, origin, PUBLISHED, changed_flags(args))}")
    print(f"训练完成：{state.global_step} 步。{saved}，提问：{ask}")


def main() -> None:
    args = arguments(**flags.parse(__doc__, RECIPE))
    if args.check:
        check(args)
    else:
        report(train(args), "inference.py")


if __name__ == "__main__":
    terminal.run_main(main)
