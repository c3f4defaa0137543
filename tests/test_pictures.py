"""The READMEs' pictures: their numbers, that they are drawn from them, and that they are there."""

import re
import struct

import pictures
import PIL.Image
import pytest
from conftest import ROOT

IMAGES = ROOT / "readme_images"


def test_committed_memory_is_that_of_the_readme():
    cards = pictures.read_numbers("memory.json")["cards"]
    table = re.findall(
        r"^\| (\d+) GB.*? \| `python (.+?)` \| (.+?) GB ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert [[str(value) for value in card.values()] for card in cards] == [list(row) for row in table]


@pytest.mark.filterwarnings("ignore:Glyph")  # where there is no Chinese font
def test_committed_pictures_were_drawn_from_the_committed_numbers(tmp_path, monkeypatch):
    numbers = {
        f"{name}.png": pictures.read_numbers(f"{file}.json")
        for name, file in (("losses", "curves"), ("memory", "memory"))
    }
    monkeypatch.setattr(pictures, "IMAGES", tmp_path)
    for name, figure in (("losses.png", pictures.draw_losses()), ("memory.png", pictures.draw_memory())):
        pictures.save(figure, name, numbers[name])
        drawn, committed = (PIL.Image.open(folder / name) for folder in (tmp_path, IMAGES))
        assert drawn.size == committed.size
        assert drawn.text == committed.text and committed.text["Source"] == pictures.digest(numbers[name])


@pytest.mark.parametrize("name", ["chat.png", "compare.png", "losses.png", "memory.png", "web.png"])
def test_picture_is_there_and_small(name):
    content = (IMAGES / name).read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content.startswith(b"\x89PNG") and width > 500 and 200 < height <= 900
    assert len(content) < 200_000
    assert not any(path in content for path in (b"/work", b"/tmp/", b"/root", b"/home"))
