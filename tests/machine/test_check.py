"""--check says on one page whether training runs here, without a model and data too, and writes nothing."""

import pytest
from helpers import contents, run_script

from parts.machine import check as diagnosis
from parts.model import fused


def test_it_tries_what_is_here(workspace, tiny_model):
    before = contents(workspace)
    found = run_script("train.py", "--check", "--model_name", tiny_model, cwd=workspace)
    assert found.returncode == 0, found.stdout
    for part in (
        "显卡：没有 GPU",
        "版本：torch ",
        f"模型：{tiny_model}",
        "合计（估算）",
        "预演：最大的一步",
        "通过  损失",
    ):
        assert part in found.stdout
    assert found.stdout.endswith("结论：可以训练\n")
    assert contents(workspace) == before


def test_what_is_not_here_yet_is_stood_in_for(folder):
    """On a CPU by two layers of Qwen3-1.7B."""
    found = run_script("train_lora.py", "--check", cwd=folder)
    assert found.returncode == 0, found.stdout
    assert "模型：Qwen/Qwen3-1.7B 的形状，随机的权重（还没有下载），缩到 2 层，时间不能当真" in found.stdout
    assert "数据：2000 条随机的样本" in found.stdout and "结论：可以训练" in found.stdout
    assert not any(folder.iterdir())


def test_a_shape_that_is_not_known_is_said(folder):
    found = run_script("train.py", "--check", "--model_name", "Qwen/Qwen3-Unknown", cwd=folder)
    assert found.returncode == 1 and found.stdout.count("错误：") == 1
    assert "错误：还没有下载 Qwen/Qwen3-Unknown，也不知道它的形状" in found.stdout


@pytest.mark.parametrize(("expected", "status"), [(True, 1), (False, 0)])
def test_it_fails_when_something_that_should_run_does_not(workspace, tiny_model, monkeypatch, capsys, expected, status):
    import train

    verdict = fused.Verdict(False, "与普通算子相差 9.0%", expected)
    monkeypatch.setattr(diagnosis, "verdicts_of", lambda trainer: {"融合算子 Liger": verdict})
    args = train.arguments(model_name=str(tiny_model), check=True, report_to="none")
    if status:
        with pytest.raises(SystemExit, match="1"):
            train.check(args)
    else:
        train.check(args)
    said = capsys.readouterr().out
    assert ("结论：有问题：融合算子 Liger" in said) == bool(status)
    assert f"{'失败' if status else '不用'}  融合算子 Liger（与普通算子相差 9.0%）" in said
