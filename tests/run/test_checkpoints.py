"""A checkpoint is whole to the last bit, or it is passed over and the one before it is taken."""

import json
import random
import shutil
from pathlib import Path

import pytest
from helpers import STEPS, arguments, continues_from, run_steps, same, weights

import data
from parts.run import checkpoints


def flip(content: bytes) -> bytes:
    """One bit of `content` flipped, always the same one."""
    place = random.Random(len(content)).randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": Path.unlink,
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes())),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize(("name", "lora"), [("full", False), ("lora", True)], ids=["full", "lora"])
def test_damaged_checkpoint_is_passed_over_whatever_file_it_is(interrupted, tiny_model, name, lora, damage, capsys):
    args = arguments(tiny_model, lora, output_dir=name, **STEPS)
    newest, older = Path(name, "checkpoint-10"), str(Path(name, "checkpoint-5"))
    assert continues_from(args) == str(newest)
    files = sorted(path for path in newest.iterdir())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        damage(path)
        assert continues_from(args) == older, path
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 1 and said[0].startswith(f"跳过 {newest}：") and path.name in said[0], said
        if not path.exists() or path.stat().st_size != len(content):  # inference looks at the sizes only
            assert checkpoints.find_trained(name) == Path(older)
        path.write_bytes(content)
    assert continues_from(args) == str(newest)


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_in_the_manifest_never_lets_other_content_pass(interrupted, seed):
    """Any bit of it: the checkpoint is refused, or the manifest still says the same."""
    checkpoint = Path("full", "checkpoint-10")
    path = checkpoint / checkpoints.MANIFEST
    content, place = path.read_bytes(), random.Random(seed)
    changed = bytearray(content)
    changed[place.randrange(len(content))] ^= 1 << place.randrange(8)
    path.write_bytes(changed)
    if checkpoints.find_damage(checkpoint, hashes=True) is None:
        assert json.loads(changed) == json.loads(content)


@pytest.mark.parametrize(
    ("name", "lora", "file", "damage"),
    [
        ("full", False, "model.safetensors", "flipped"),
        ("full", False, "manifest.json", "removed"),
        ("lora", True, "optimizer.pt", "truncated"),
    ],
)
def test_training_continues_from_the_older_one_and_clears_the_damaged(
    interrupted, tiny_model, straight, name, lora, file, damage, capsys
):
    expected = straight(lora)
    DAMAGES[damage](Path(name, "checkpoint-10", file))
    shutil.copytree(f"{name}/checkpoint-5", f"{name}/checkpoint-7")  # a save that was cut off
    Path(name, "checkpoint-7", checkpoints.MANIFEST).unlink()
    capsys.readouterr()
    run_steps(tiny_model, lora, output_dir=name)
    out = capsys.readouterr().out
    assert f"跳过 {name}/checkpoint-10：" in out and "resumed from step 5" in out.splitlines()
    assert same(weights(name), expected)
    left = checkpoints.folders(name)
    assert len(left) <= 2 and left == checkpoints.find_intact(name)


def test_no_whole_checkpoint_says_so_and_begins_anew(interrupted, tiny_model, straight, capsys):
    for number in (5, 10):
        DAMAGES["flipped"](Path("full", f"checkpoint-{number}", "rng_state.pth"))
    expected = straight()
    capsys.readouterr()
    run_steps(tiny_model, output_dir="full")
    out = capsys.readouterr().out
    assert out.count("跳过 ") == 2 and "没有可用的检查点，从头开始训练。" in out
    assert same(weights("full"), expected)


def test_a_checkpoint_whose_best_is_damaged_does_not_decide_the_weights(interrupted, tiny_model, capsys):
    """The newest is whole, but training would end with weights read from the best."""
    path = Path("full/checkpoint-10/trainer_state.json")
    state = json.loads(path.read_text(encoding="utf-8")) | {"best_model_checkpoint": "elsewhere/checkpoint-5"}
    path.write_text(json.dumps(state), encoding="utf-8")
    path.with_name(checkpoints.MANIFEST).unlink()
    checkpoints.Sealer(path.parent, None, None).join()
    args = arguments(tiny_model, output_dir="full", **STEPS)
    assert continues_from(args) == "full/checkpoint-10"
    DAMAGES["flipped"](Path("full/checkpoint-5/model.safetensors"))
    assert continues_from(args) is None
    assert "最好的 checkpoint-5 model.safetensors 与 manifest.json 不符" in capsys.readouterr().out


def test_older_checkpoints_stay_until_the_newer_one_is_whole(workspace, tiny_model, straight, monkeypatch):
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
    with pytest.raises(
        SystemExit, match=r"磁盘剩余 [\d.]+ GB，3 个检查点和最后的权重还需要约 (3999|4000)\d{3}\.\d\d GB"
    ):
        checkpoints.check_space(tmp_path, 3, 1200e12, 400e12)
    checkpoints.check_space(tmp_path, 3, 1200, 400)


def test_checkpoint_cut_off_while_it_was_written_is_not_asked(finished):
    Path("full/trainer_state.json").unlink()
    Path("full/config.json").unlink()
    shutil.copytree("full/checkpoint-2", "full/checkpoint-7")
    Path("full/checkpoint-7/trainer_state.json").unlink()
    shutil.copytree("full/checkpoint-2", "full/checkpoint-best")  # a copy that a user made
    assert checkpoints.find_trained("full") == Path("full/checkpoint-2")


def test_best_checkpoint_is_asked_before_training_is_finished_also_after_a_move(finished, tiny_model):
    Path("full/trainer_state.json").unlink()
    shutil.copytree("full/checkpoint-2", "full/checkpoint-4")
    shutil.move("full", "moved")
    assert checkpoints.find_trained("moved") == Path("moved/checkpoint-2")  # the state names full/checkpoint-2
