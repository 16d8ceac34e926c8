"""The examples run as they stand: the method in forty lines, a training in eighty, a tour."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

import sample
from examples import minimal_sample, minimal_train

ROOT = Path(__file__).parents[2]


def test_the_minimal_sample_is_bit_for_bit_the_commands(tmp_path):
    minimal_sample.main(str(tmp_path / "minimal.png"))
    assert sample.main(["--grid", "2x2", "--mask", "3", "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "minimal.png") as mine, Image.open(tmp_path / "0001.png") as commands:
        third = (0, 64, 64, 128)
        assert mine.crop(third).tobytes() == commands.crop(third).tobytes()
        assert ImageChops.difference(mine, commands).getbbox() is None


@pytest.mark.slow
def test_the_minimal_training_learns_and_its_lora_is_used(tmp_path, capsys):
    path = tmp_path / "minimal.safetensors"
    minimal_train.main(str(path), steps=2)
    command = ["--grid", "3x1", "--steps", "1", "--lora", str(path), "--out", str(tmp_path)]
    assert sample.main(command) == 0
    assert "minimal.safetensors: diffusers names" in capsys.readouterr().err


@pytest.mark.slow
def test_the_minimal_training_reaches_a_low_loss(tmp_path, capsys):
    minimal_train.main(str(tmp_path / "minimal.safetensors"), steps=50)
    losses = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().err.splitlines()]
    assert len(losses) == 1 and losses[0] < 0.35


@pytest.mark.slow
def test_the_tour_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = json.loads((ROOT / "examples" / "tour.ipynb").read_text())["cells"]
    names, output = {"__name__": "tour"}, io.StringIO()
    with contextlib.redirect_stdout(output), torch.set_grad_enabled(True):  # which the tour turns off, for itself
        for cell in cells:
            if cell["cell_type"] == "code":
                assert not cell["outputs"], "the notebook is committed without outputs"
                exec(compile("".join(cell["source"]), "tour.ipynb", "exec"), names)
    assert names["strip"].size == (132, 192) and "walk.safetensors" in output.getvalue()
