"""A checkpoint is undamaged to the last bit, or it is passed over and the one before it is taken."""

import json
import random
import shutil
from pathlib import Path

import pytest
from helpers import STEPS, arguments, continues_from, run_steps, same, weights

import data
from parts.run import checkpoints


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """Flips one bit, always the same one."""
    content = bytearray(path.read_bytes())
    content[random.Random(len(content)).randrange(len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["full", "lora"])
def test_damaged_checkpoint_is_passed_over_whatever_file_it_is(interrupted, tiny_model, name, damage, capsys):
    args = arguments(tiny_model, name == "lora", output_dir=name, **STEPS)
    newest, older = Path(name, "checkpoint-10"), Path(name, "checkpoint-5")
    assert continues_from(args) == str(newest)
    files = {path.name: path for path in newest.iterdir()}
    assert files.keys() >= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json"}
    for file, path in files.items():
        content = path.read_bytes()
        damage(path)
        assert continues_from(args) == str(older), path
        [line] = capsys.readouterr().out.splitlines()
        assert line.startswith(f"跳过 {newest}：") and file in line
        if damage is not flip:  # inference looks at the sizes only
            assert checkpoints.find_trained(name) == older
        path.write_bytes(content)
    assert continues_from(args) == str(newest)


def test_a_flipped_bit_in_the_manifest_never_lets_other_content_pass(interrupted):
    """Any bit of it: the checkpoint is refused, or the manifest still says the same."""
    path = Path("full", "checkpoint-10", checkpoints.MANIFEST)
    content, draw = path.read_bytes(), random.Random(0)
    for _ in range(40):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        if checkpoints.find_damage(path.parent, hashes=True) is None:
            assert json.loads(changed) == json.loads(content)


@pytest.mark.parametrize(("name", "file"), [("full", "model.safetensors"), ("lora", "optimizer.pt")])
def test_training_goes_on_from_the_older_one_and_clears_up(interrupted, tiny_model, straight, name, file, capsys):
    expected = straight(name == "lora")
    flip(Path(name, "checkpoint-10", file))
    shutil.copytree(f"{name}/checkpoint-5", f"{name}/checkpoint-7")  # a save that was cut off
    Path(name, "checkpoint-7", checkpoints.MANIFEST).unlink()
    capsys.readouterr()
    run_steps(tiny_model, name == "lora", output_dir=name)
    out = capsys.readouterr().out
    assert f"跳过 {name}/checkpoint-10：" in out and "resumed from step 5" in out.splitlines()
    assert same(weights(name), expected)
    left = checkpoints.folders(name)
    assert len(left) <= 2 and left == checkpoints.find_intact(name)


def test_no_intact_checkpoint_says_so_and_begins_anew(interrupted, tiny_model, straight, capsys):
    for number in (5, 10):
        flip(Path("full", f"checkpoint-{number}", "rng_state.pth"))
    expected = straight()
    capsys.readouterr()
    run_steps(tiny_model, output_dir="full")
    out = capsys.readouterr().out
    assert out.count("跳过 ") == 2 and "没有可用的检查点" in out
    assert same(weights("full"), expected)


def test_a_checkpoint_whose_best_is_damaged_does_not_decide_the_weights(interrupted, tiny_model, capsys):
    """The newest is undamaged, but training would end with weights read from the best."""
    path = Path("full/checkpoint-10/trainer_state.json")
    state = json.loads(path.read_text(encoding="utf-8")) | {"best_model_checkpoint": "elsewhere/checkpoint-5"}
    path.write_text(json.dumps(state), encoding="utf-8")
    path.with_name(checkpoints.MANIFEST).unlink()
    checkpoints.Sealer([path.parent], None, None).join()
    args = arguments(tiny_model, output_dir="full", **STEPS)
    assert continues_from(args) == "full/checkpoint-10"
    flip(Path("full/checkpoint-5/model.safetensors"))
    assert continues_from(args) is None
    assert "checkpoint-5 model.safetensors 与 manifest.json 不符" in capsys.readouterr().out.splitlines()[0]


def test_older_checkpoints_stay_until_the_newer_one_is_sealed(workspace, tiny_model, straight, monkeypatch):
    write = checkpoints.write_atomically

    def full_for_the_second(path, text):
        if str(path).endswith("checkpoint-10/manifest.json"):
            raise OSError(28, "No space left on device")
        write(path, text)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="写 .*checkpoint-10 失败.*No space left"):
        patch.setattr(checkpoints, "write_atomically", full_for_the_second)
        run_steps(tiny_model, save_total_limit=1)
    assert [path.name for path in checkpoints.find_intact(data.OUTPUT_DIR)] == ["checkpoint-5"]
    run_steps(tiny_model, save_total_limit=1)
    assert same(weights(data.OUTPUT_DIR), straight())
    assert len(checkpoints.folders(data.OUTPUT_DIR)) == 1


def test_too_little_room_is_said(tmp_path):
    """Three checkpoints of weights and two states each, and the final weights: (3 x 3 + 1) x 400 TB."""
    with pytest.raises(SystemExit, match=r"剩余 [\d.]+ GB，3 个检查点和最后的权重.*需要约 (3999|4000)\d{3}\.\d\d GB"):
        checkpoints.check_space(tmp_path, 3, 1200e12, 400e12)
    checkpoints.check_space(tmp_path, 3, 1200, 400)


def test_before_training_is_finished_the_best_intact_checkpoint_is_asked_also_after_a_move(finished):
    Path("full/trainer_state.json").unlink()
    for name in ("checkpoint-4", "checkpoint-7", "checkpoint-best"):  # newer ones, and a copy that a user made
        shutil.copytree("full/checkpoint-2", f"full/{name}")
    Path("full/checkpoint-7/trainer_state.json").unlink()
    shutil.move("full", "moved")
    for cut_off in ("config.json", "model.safetensors"):  # the final weights, while they were written
        assert checkpoints.find_trained("moved") == Path("moved/checkpoint-2")  # the state names full/checkpoint-2
        Path("moved", cut_off).unlink()


def test_best_weights_that_are_kept_alone_take_no_place_of_a_whole_checkpoint(tmp_path):
    """Else one damaged file would leave nothing to go on from."""
    for step in (10, 20, 30, 40):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        names = ["model.safetensors", "trainer_state.json"] + [checkpoints.OPTIMIZER] * (step != 30)
        for name in names:
            (folder / name).write_bytes(b"{}")
        best = str(tmp_path / "checkpoint-30") if step > 20 else None
        checkpoints.Sealer([folder], best, 2).join()
    assert [checkpoints.step_of(path) for path in checkpoints.folders(tmp_path)] == [20, 30, 40]
