"""Sheets are written small and look the same; values are written short."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin

from lab.pages import save_picture, save_values, sheet
from lab.tasks import task_sets
from lab.world import draw
from sampling.images import to_tensor


def loaded(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def panels(count=12):
    drawn = [draw(one.panels[0], 64) for one in task_sets("walk", count, 0)]
    return torch.cat([to_tensor(picture) for picture in drawn])


def test_a_sheet_of_panels_is_smaller_than_a_png_and_reloads_nearly_the_same(tmp_path):
    picture = sheet([panels()])
    assert picture.size == (12 * 128, 128)
    file = save_picture(picture, tmp_path / "a.b")
    picture.save(tmp_path / "whole.png", optimize=True)
    assert file.name == "a.b.png" and file.stat().st_size < 0.7 * (tmp_path / "whole.png").stat().st_size
    apart = loaded(file) - np.asarray(picture, dtype=float)
    assert np.square(apart).mean() < 65 and np.abs(apart).mean() < 4


def test_what_needs_many_colours_becomes_a_jpeg_of_full_colour_resolution(tmp_path):
    """Every hue at every brightness: 256 colours are too few."""
    hue, value = np.meshgrid(np.arange(256), np.arange(256))
    picture = Image.merge("HSV", [Image.fromarray(c.astype(np.uint8)) for c in (hue, value * 0 + 255, value)])
    (tmp_path / "a.png").write_bytes(b"old")
    file = save_picture(picture, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"], "what was there before goes"
    with Image.open(file) as found:
        assert found.format == "JPEG" and JpegImagePlugin.get_sampling(found) == 0
    assert np.abs(loaded(file) - np.asarray(picture.convert("RGB"), dtype=float)).mean() < 3


def test_values_are_written_short(tmp_path):
    save_values({"a": [1.0, 1 / 3, float("nan")], "b": ({"c": None, "d": "x"}, 2)}, tmp_path / "v.json")
    text = (tmp_path / "v.json").read_text()
    assert text == '{"a":[1,0.3333,null],"b":[{"c":null,"d":"x"},2]}\n'
    assert json.loads(text)["a"][1] == pytest.approx(1 / 3, abs=5e-5)
