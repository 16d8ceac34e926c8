"""The factory's whole way, with a few pairs: what filters keep, what the reader says of it, and second pictures."""

import argparse
import json

import pytest

from lab import circle
from model.weights import find_model


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder whose factory has made eight pairs in two steps each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circle, "COUNT", 8)
        patch.setattr(circle, "STEPS", 2)
        yield tmp_path_factory.mktemp("work")


def rows(path):
    return json.loads(path.read_text())


def test_filters_keep_less_and_less_and_captions_name_shapes_only(work):
    kept = [rows(circle.made_pairs(what, None, work, "tiny")) for what in circle.FILTERS]
    for more, fewer in zip(kept[:-1], kept[1:], strict=True):
        assert len(fewer) <= len(more) and all(row in more for row in fewer)
    assert kept[0] and all((work / "factory" / row["image_tgt_path"]).is_file() for row in kept[0])
    assert not any(word in row["prompt"] for row in kept[0] for word in ("red", "striped", "hat"))
    assert rows(circle.made_pairs("made", None, work, "tiny")) == kept[0], "made once"


def test_the_page_tells_what_the_reader_says(work, tmp_path, capsys):
    circle.report(argparse.Namespace(model="tiny", count=20, work=work, out=tmp_path))
    values, page = rows(tmp_path / "factory.json"), (tmp_path / "factory.md").read_text()
    assert values["true"] == [score == 4 for score in values["scores"]] and len(values["ids"]) == 8
    assert page == capsys.readouterr().out.rstrip("\n") + "\n" and "| none at all, not even the seam | 8 |" in page


def test_second_pictures_are_drawn_by_the_lora_of_stage_one(work):
    lora = find_model("tiny").root / "loras/uno.safetensors"
    kept, drawn = (rows(circle.made_pairs(what, lora, work, "tiny")) for what in circle.SECOND)
    assert all(row in drawn for row in kept) and all(len(row["image_paths"]) > 1 for row in drawn)
    assert len(list((work / "factory" / "redrawn").iterdir())) == sum(len(row["image_paths"]) for row in drawn) > 0
