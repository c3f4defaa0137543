"""Adapters that cannot be asked get one sentence, and merging writes over nothing."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import contents, refused, run, run_script, same, save_other_base, weights
from hub_server import Hub

import inference_lora
from parts.model.weights import find_model, load_trained, load_weights
from parts.run import checkpoints

ADAPTER = "lora 的适配器无法加载到 {} 上（{}）；~"


def name_base(adapter: str, base: str) -> None:
    """Let an adapter be one for this base."""
    config = Path(adapter, "adapter_config.json")
    settings = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    config.write_text(json.dumps(settings), encoding="utf-8")


def test_whatever_a_folder_holds_is_asked_and_an_adapter_is_not_trained(finished):
    """By its folder, by a checkpoint of it: in each the adapter, merged."""
    adapter, full = load_trained("lora")[0].state_dict(), load_trained("full")[0].state_dict()
    again = load_trained("lora/checkpoint-2")[0].state_dict()
    assert same(adapter, again) and adapter.keys() == full.keys() and not same(adapter, full)
    refused("lora 是 LoRA 适配器，不是完整的模型；~python inference_lora.py ~", find_model, "lora", "")


def test_files_that_are_cut_off_or_missing(finished):
    for file in (Path("full/model.safetensors"), Path("lora/adapter_model.safetensors")):
        file.write_bytes(file.read_bytes()[:1000])
    refused("full 里的模型无法读取（~）；~", load_trained, "full")
    base = json.loads(Path("lora/adapter_config.json").read_text())["base_model_name_or_path"]
    refused(ADAPTER.format(base, "~"), load_trained, "lora")
    Path("lora/adapter_model.safetensors").unlink()  # no hub is asked for it
    refused(ADAPTER.format(base, "缺少 adapter_model.safetensors"), load_trained, "lora")


def test_adapter_configuration_that_is_broken_or_names_no_base(finished):
    for text in ("", "[]", '{"base_model_name_or_path": null}', '{"base_model_name_or_path": "/no"}'):
        Path("lora/adapter_config.json").write_text(text, encoding="utf-8")
        refused("lora/adapter_config.json 不可用（~）；~", load_trained, "lora")


@pytest.mark.parametrize("path", ["lora", "lora/checkpoint-2"])
def test_adapter_of_another_base(finished, tiny_model, path):
    """Of the same shape: only its checksum differs."""
    save_other_base(tiny_model)
    name_base(path, "other")
    sums = map(checkpoints.weights_sha256, (tiny_model, "other"))
    message = "{} 的适配器不是在现在的 other 上训练的（权重的 SHA-256 应为 {}，现在是 {}）；~"
    refused(message.format(path, *sums), load_trained, path)


def test_another_persons_base_is_found_by_its_name_and_compared(finished, tiny_model, tmp_path_factory):
    """By its last two folders, as ModelScope's cache writes them; never another one of that name."""
    name_base("lora", "/home/a/own/er-1___7")
    save_other_base(tiny_model)
    train = ("train_lora.py", "--adapter", "lora", "--max_steps", "1", "--report_to", "none", "--output_dir", "more")
    ask = ("inference_lora.py", "头痛？", "--model_path", "lora", "--max_new_tokens", "4")
    with Hub({"own/er-1.7": Path("other").resolve()}) as hub:
        before = contents(finished)
        for command in (ask, train):
            wrong = run_script(*command, cwd=finished, env=hub.env(tmp_path_factory.mktemp("home")))
            assert wrong.returncode and "不是在现在的 own/er-1.7 上训练的" in wrong.stdout, wrong.stdout
        assert contents(finished) == before
        hub.folders["models"]["own/er-1.7"] = tiny_model
        home = tmp_path_factory.mktemp("home")
        for command in (ask, train):
            right = run_script(*command, cwd=finished, env=hub.env(home))
            assert right.returncode == 0, right.stdout
            assert "这台机器上没有 /home/a/own/er-1___7，改用 own/er-1.7" in right.stdout
    assert json.loads(Path("more/adapter_config.json").read_text())["base_model_name_or_path"] == "own/er-1.7"


def test_adapter_without_a_record_of_its_base(finished, capsys):
    """That it cannot be compared is said; one that does not fit is refused still."""
    import tiny_model

    tiny_model.build("wide", tiny_model.sample_texts(), hidden_size=128)
    for record in ("run.json", "README.md"):
        Path("lora", record).unlink()
    name_base("lora", "wide")
    refused(ADAPTER.format("wide", "~"), load_trained, "lora")
    assert "lora/run.json 无法读取" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a_file", "full", "/proc/merged", ""])
def test_merging_is_refused_into_anything_but_a_new_folder(folder, name):
    Path("a_file").write_text("x")
    Path("full").mkdir()
    Path("full", "model.safetensors").touch()
    refused(f"{name} 不是可写的空文件夹；~", inference_lora.merge_to, name, "lora")


def test_merged_model_has_its_bases_dtype_and_all_that_the_training_left(finished, tiny_model, monkeypatch):
    """bfloat16, although a CPU computes in float32: rounded once, at the end."""
    shutil.copytree(tiny_model, "half")
    model = load_weights("half", torch.device("cpu"))
    model.to(torch.bfloat16).save_pretrained("half")
    run("half", lora=True, max_steps=2, learning_rate=1e-1, output_dir="adapter")
    monkeypatch.setattr(sys, "argv", ["inference_lora.py", "--model_path", "adapter", "--merge_to", "merged"])
    inference_lora.main()
    exact = load_trained("adapter")[0].state_dict()
    merged = weights("merged")
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16 and tensor.equal(exact[name].to(torch.bfloat16))
    for name in ("run.json", "trainer_state.json", "README.md", "loss.png"):
        assert Path("merged", name).read_bytes() == Path("adapter", name).read_bytes()
    assert checkpoints.find_trained("merged") == Path("merged")


def test_a_checkpoint_is_merged_too_and_a_whole_model_is_not(finished):
    inference_lora.merge_to("merged", "lora/checkpoint-2")
    assert checkpoints.find_trained("merged") == Path("merged")  # no unfinished run, although it has its run.json
    assert not Path("merged/README.md").exists()  # the card is about the best weights
    refused("full 里是完整的模型，不是 LoRA 适配器，~", inference_lora.merge_to, "again", "full")
