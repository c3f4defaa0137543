"""The READMEs' pictures: their numbers, that they are drawn from them, and that they are there."""

import struct

import pictures
import PIL.Image
import pytest
from conftest import ROOT

IMAGES = ROOT / "readme_images"
PUBLISHED = [1.390, 1.303, 1.246, 1.187, 1.146, 1.199, 1.190, 1.182, 1.171, 1.163]  # evaluation losses, every 100 steps


def test_committed_curve_is_the_published_one():
    logs = pictures.read_numbers("curves.json")["published"]
    found = {log["step"]: log["eval_loss"] for log in logs if "eval_loss" in log}
    assert list(found) == list(range(100, 1001, 100))
    assert list(found.values()) == pytest.approx(PUBLISHED, abs=5e-4)


def test_losses_are_drawn_with_the_best_step_marked():
    demo, published = pictures.draw_losses().axes
    labels = [text.get_text() for text in published.get_legend().get_texts()]
    assert labels[-1] == "best: 1.146 at step 500"
    for axes, name in ((demo, "demo"), (published, "published")):
        logs = pictures.read_numbers("curves.json")[name]
        evaluations = [log["eval_loss"] for log in logs if "eval_loss" in log]
        assert list(axes.lines[1].get_ydata()) == evaluations
        assert axes.lines[2].get_ydata()[0] == min(evaluations)


def test_memory_is_the_arithmetic_of_qwen3():
    table = pictures.memory()
    published, kahan, small, backward, smallest, lora, qlora = table.values()
    parameters = 1.720574976  # in 10^9
    for name, parts in table.items():
        share = 0.4 if parts is qlora else 1
        assert parts["weights"] == pytest.approx(2 * parameters * share, rel=0.01), name
        assert min(parts.values()) >= 0 and parts["activations and loss"] > 0.5, name
    assert published["gradients"] == pytest.approx(2 * parameters)
    assert published["optimizer states"] == pytest.approx(4 * parameters)
    assert kahan["optimizer states"] == pytest.approx(6 * parameters)
    assert small["optimizer states"] == pytest.approx(2.04 * parameters)
    assert published["full logits"] == pytest.approx(14 * 151936 * 2048 / 1e9 - loss.LOSS_BYTES / 1e9)
    assert backward["gradients"] == 0 < lora["gradients"] < 0.02  # 8.7 million of the adapter, in bfloat16
    sums = [sum(parts.values()) for parts in table.values()]
    assert sums == sorted(sums, reverse=True) and qlora["gradients"] == lora["gradients"]
    assert smallest["optimizer states"] == pytest.approx(1.07 * parameters)


def test_memory_is_drawn_with_its_sums():
    [axes] = pictures.draw_memory().axes
    assert "arithmetic, not a measurement" in axes.get_title()
    sums = [f"{sum(parts.values()):.1f}" for parts in pictures.memory().values()]
    assert [text.get_text() for text in axes.texts] == sums


def test_committed_pictures_were_drawn_from_the_committed_numbers(tmp_path, monkeypatch):
    numbers = {"losses.png": pictures.read_numbers("curves.json"), "memory.png": pictures.memory()}
    monkeypatch.setattr(pictures, "IMAGES", tmp_path)
    for name, figure in (("losses.png", pictures.draw_losses()), ("memory.png", pictures.draw_memory())):
        pictures.save(figure, name, numbers[name])
        drawn, committed = (PIL.Image.open(folder / name) for folder in (tmp_path, IMAGES))
        assert drawn.size == committed.size
        assert drawn.text == committed.text and committed.text["Source"] == pictures.digest(numbers[name])


@pytest.mark.parametrize("name", ["losses.png", "memory.png", "dashboard.png", "chat.png"])
def test_picture_is_there_and_small(name):
    content = (IMAGES / name).read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content.startswith(b"\x89PNG") and width > 500 and height > 200
    assert len(content) < 200_000
    assert not any(path in content for path in (b"/work", b"/tmp/", b"/root", b"/home"))
