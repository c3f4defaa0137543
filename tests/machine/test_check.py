"""--check says on one page whether training runs here, without a model and data too, and writes nothing."""

import pytest
import torch
import transformers
from helpers import contents, refused, run_script

import train
from parts.machine import check
from parts.model.fused import Verdict


def test_it_tries_what_is_here(workspace, tiny_model):
    before = contents(workspace)
    checked = run_script("train.py", "--check", "--model_name", tiny_model, cwd=workspace)
    assert checked.returncode == 0, checked.stdout
    parts = ["显卡：没有 GPU", "版本：torch ", f"模型：{tiny_model}", "合计（估算）", "预演：最大的一步", "通过  损失"]
    parts.append("保存：一个检查点 0.00 GB")
    assert not [part for part in parts if part not in checked.stdout], checked.stdout
    assert checked.stdout.endswith("结论：可以训练\n")
    assert contents(workspace) == before


def test_what_is_not_here_yet_is_stood_in_for(folder):
    """On a CPU by two layers of Qwen3-0.6B."""
    checked = run_script("train_lora.py", "--check", "--model_name", "Qwen/Qwen3-0.6B", cwd=folder)
    assert checked.returncode == 0, checked.stdout
    assert "模型：Qwen/Qwen3-0.6B 还没有下载" in checked.stdout and "缩到 2 层" in checked.stdout
    assert "数据：2000 条随机样本" in checked.stdout and "结论：可以训练" in checked.stdout
    assert not any(folder.iterdir())
    refused("Qwen/Qwen3-Unknown 还没有下载，也不知道它的形状~", check.shape_of, "Qwen/Qwen3-Unknown")


def test_it_fails_when_something_that_should_run_does_not(workspace, tiny_model, monkeypatch, capsys):
    verdicts = {"A": Verdict(False, "与普通算子相差 9.0%"), "B": Verdict(False, "没有", expected=False)}
    monkeypatch.setattr(check, "verdicts_of", lambda trainer: verdicts)
    with pytest.raises(SystemExit, match="1"):
        train.check(train.arguments(model_name=str(tiny_model), check=True, report_to="none"))
    printed = capsys.readouterr().out
    assert "失败  A（与普通算子相差 9.0%）\n  跳过  B（没有）\n结论：有问题：A\n" in printed


# Billions of parameters: of all, and of all but the embeddings.
PUBLISHED = {"Qwen3-0.6B": (0.6, 0.44), "Qwen3-1.7B-Base": (1.7, 1.4), "Qwen3-4B": (4.0, 3.6)}
PUBLISHED |= {"Qwen3-8B": (8.2, 6.95), "Qwen3-14B": (14.8, 13.2), "Qwen3-32B": (32.8, 31.2)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_as_many_parameters_as_published(name):
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(check.shape_of(f"Qwen/{name}"))
    inside = sum(weight.numel() for weight in model.model.layers.parameters())
    assert (model.num_parameters() / 1e9, inside / 1e9) == pytest.approx(PUBLISHED[name], abs=0.05)
