"""A model that DeepSpeed cuts among processes (--deepspeed): the gradients, the curve and the checkpoints of one."""

import re

import pytest
import sharded_runs
import torch
from helpers import SERVER, SMALL, build_model, card_arguments, examples, on_meta
from safetensors.torch import load_file, save_file
from sharded_runs import CPU, LORA, has_curve_of_one, has_gradients_of_one, together

import train
import train_lora
from parts import libraries, memory, memory_plan, zero

HERE = "tests/test_deepspeed.py"
IMPORTS = ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")  # what each engine imports, for two seconds
installed = pytest.mark.skipif(not libraries.has_deepspeed(), reason="needs deepspeed")


@pytest.fixture(scope="module", autouse=True)
def imported():
    SERVER.load(*IMPORTS)


# ---- what the forked processes do ---------------------------------------------------------------------------------


def halves(file: str) -> None:
    """Into `file`: weights in bfloat16 and their float32 ones after four steps; and after as many, between which all
    was written and read."""
    torch.distributed.init_process_group("gloo")
    first, found = not torch.distributed.get_rank(), {}
    for name in ("straight", "begun", "continued"):
        engine, groups, model = build_engine()
        if name == "continued":
            zero.load(model, "begun", True)
            zero.load_states(engine, groups, "states.pt")
        for _ in range(4 if name == "straight" else 2):
            take_step(engine)
        weights, states = zero.gather(model, first), zero.gather_states(engine.optimizer.optimizer, groups, first)
        if first and name == "begun":
            model.save_pretrained("begun", state_dict=weights)
            torch.save(states, "states.pt")
        elif first:
            found |= {f"{name}.{weight}": value for weight, value in weights.items()}
            found |= {
                f"{name}.{i}.{key}": value for i, state in states["state"].items() for key, value in state.items()
            }
        torch.distributed.barrier()
        engine.destroy()
    if first:
        save_file({name: value.contiguous() for name, value in found.items()}, file)


def build_engine():
    """(engine, its parameters' groups, the model): of odd sizes, which two processes do not share evenly."""
    torch.manual_seed(0)
    model = build_model(layers=1, shape=SMALL | {"head_dim": 33 * 2, "vocab_size": 4001, "hidden_size": 33})
    config = zero.shard(model, CPU, 2, 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    deepspeed = zero.start(CPU)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, groups, model


def take_step(engine) -> None:
    ids = torch.tensor([examples()[torch.distributed.get_rank()]["input_ids"]])
    positions = torch.arange(ids.shape[1])[None]
    logits = engine(input_ids=ids, position_ids=positions, lengths=(ids.shape[1],)).logits
    torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
    engine.step()


# ---- tests --------------------------------------------------------------------------------------------------------


@installed
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_and_evaluations_are_those_of_one_process(folder, tiny_model, tied):
    has_gradients_of_one("deepspeed", folder, tiny_model, tied)


@installed
@pytest.mark.parametrize("script", ["train.py", LORA])
def test_a_cut_model_follows_the_curve_of_one_process_and_continues(workspace, tiny_model, script):
    two = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    passes = two if script == LORA else sharded_runs.PASSES
    has_curve_of_one("deepspeed", workspace, tiny_model, script, passes, joins=script == LORA)


@installed
def test_weights_of_few_bits_continue_from_their_float32_ones(folder):
    together(HERE, "found", cwd=folder, call="halves")
    found = load_file("found")
    pairs = {name: name.replace("straight", "continued") for name in found if name.startswith("straight")}
    assert any(name.endswith(".master") for name in pairs) and 2 * len(pairs) == len(found)
    for name, other in pairs.items():
        assert found[name].equal(found[other]), name


@installed
def test_a_weight_that_is_no_number_in_one_part_stops_all(folder, tiny_model):
    [said, silent] = together(sharded_runs.HERE, tiny_model, "deepspeed", cwd=folder, call="ruin", status=1)
    assert "错误：到第 0 步 weights 成了 nan" in said and "错误" not in silent


def test_what_does_not_go_with_deepspeed_is_refused(monkeypatch):
    def refused(message: str, cls=train.TrainArguments, **changes) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            cls(**{"deepspeed": True, "report_to": "none"} | changes)

    refused("--deepspeed：模型分给几张卡，要用 torchrun 启动：torchrun --nproc_per_node 2 train.py --deepspeed true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("--deepspeed ds_config.json：只能是 true 或 false", deepspeed="ds_config.json")
    refused("--deepspeed {'zero_optimization'", deepspeed={"zero_optimization": {"stage": 3}})
    refused("--deepspeed 不能和 --fsdp 一起用", fsdp=True)
    refused("--load_in_4bit 不能和 --deepspeed 一起用", train_lora.LoraArguments, load_in_4bit=True)
    for name in ("8bit", "kahan", "8bit_in_backward"):
        refused("--optimizer 不能和 --deepspeed 一起用：它的优化器在 CPU 的内存里", optimizer=name)
    refused("--optim 不能和 --deepspeed 一起用", optim="adamw_torch")
    refused("--full_logits 不能和 --deepspeed 一起用", full_logits=True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refused("请去掉 accelerate launch 的 DeepSpeed 设置")


def test_a_package_that_is_missing_or_old_is_named(monkeypatch):
    args = card_arguments()
    args.deepspeed = True
    monkeypatch.setattr(libraries, "DEEPSPEED", "1000")
    with pytest.raises(ValueError, match="请先运行 pip install deepspeed==1000"):
        libraries.find_packages(args)


def test_memory_of_the_cpu_that_does_not_suffice_is_said_before_anything_is_cut():
    with pytest.raises(SystemExit, match=r"错误：--deepspeed 把优化器放在 CPU 的内存里，这台机器上要 \d+\.\d GB"):
        zero.shard(on_meta(layers=1000), CPU, 2, 1.0)


@pytest.mark.parametrize("lora", [False, True])
def test_the_plan_is_that_of_one_card(lora):
    """As with --fsdp, without states and without the part of the gradients that is kept."""
    args = card_arguments(lora, memory_gb=140)
    args.world_size, args.sharded = 4, "fsdp"
    model = zero.outline(train_lora.add_adapter(on_meta(), args) if lora else on_meta())
    args.fsdp = True
    cut = memory.estimate(model, args, True, 2048, 1, False, "kahan", 8192)
    args.fsdp, args.deepspeed, args.sharded = False, True, "deepspeed"
    [plan, *_] = memory_plan.choose(args, model, [2048] * 4, True, 140e9)
    assert plan.optimizer == "cpu"
    found = memory.estimate(model, args, True, 2048, 1, False, "cpu", 8192)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert found["优化器"] == 0 and found["权重"] == cut["权重"]
    assert 0 < cut["一步之内"] - found["一步之内"] <= trained / 4 + 1


def test_who_began_otherwise_does_not_continue():
    args = card_arguments(memory_gb=140)
    with pytest.raises(SystemExit, match="请加上 --deepspeed true 继续"):
        memory_plan.choose(args, on_meta(), [2048], True, 140e9, optimizer="cpu")
    args.deepspeed, args.sharded = True, "deepspeed"
    with pytest.raises(SystemExit, match="--optimizer kahan，它不能和 --deepspeed 一起用"):
        memory_plan.choose(args, on_meta(), [2048], True, 140e9, optimizer="kahan")
