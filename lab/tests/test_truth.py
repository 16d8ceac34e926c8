"""The ruler of the experiments, checked with a reader that knows the truth."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lab import generate, report, scores, train_truth, truth
from lab.captions import joint_caption
from lab.world import PATTERNS, POSITIONS, SCENES, box, random_set


def sets(count=6, subjects=1):
    rng = np.random.default_rng(4)
    return [random_set(rng, 2, 2, subjects, held_out=True) for _ in range(count)]


class Oracle(nn.Module):
    """Gives the logits of the panels it was told of, in order."""

    def __init__(self, panels, sure=12.0):
        super().__init__()
        told = torch.tensor([truth.labels(panel) for panel in panels])
        sizes = [len(SCENES), *[size for _ in POSITIONS for size in truth.TRAITS.values()]]
        parts = [sure * nn.functional.one_hot(told[:, i].clamp(min=0), size).float() for i, size in enumerate(sizes)]
        self.logits, self.next = torch.cat(parts, dim=1), 0

    def forward(self, image):
        first, self.next = self.next, (self.next + len(image)) % len(self.logits)
        return self.logits[first : first + len(image)]


@pytest.mark.parametrize("subjects", [1, 2, 4])
def test_what_labels_say_is_read_back(subjects):
    panels = [panel for group in sets(5, subjects) for panel in group]
    for reading, panel in zip(truth.read(Oracle(panels), torch.zeros(len(panels), 3, 64, 64)), panels, strict=True):
        assert reading.scene == panel.scene and len(reading.seen) == subjects
        for placed in panel.placed:
            (seen,) = [one for one in reading.seen if one.position == placed.position]
            subject = placed.subject
            assert (seen.shape, seen.colour, seen.pattern, seen.accessory, seen.size) == (
                subject.shape, subject.colour, subject.pattern, subject.accessory, placed.size,
            )  # fmt: skip
            agreement = truth.same_hidden(seen, subject)
            assert all(agreement.values()) and len(agreement) == (2 if subject.pattern == "plain" else 4)


def test_a_network_that_was_never_trained_reads_nothing_right_by_design():
    torch.manual_seed(0)
    reader = truth.Reader().eval()
    panels = [panel for group in sets() for panel in group]
    with torch.no_grad():
        found = truth.read(reader, scores.tiles(scores.to_tensors(sets())))
    assert reader(torch.zeros(2, 3, 64, 64)).shape == (2, truth.OUTPUTS)
    right = [scores.position_right(r, p) for r, p in zip(found, panels, strict=True)]
    assert np.mean(right) < 0.5


def test_a_reader_learns_and_survives_its_file(tmp_path):
    pictures, told = (torch.from_numpy(array) for array in train_truth.draw_some((1, 8, 1, None)))
    torch.manual_seed(0)
    reader = truth.Reader((8, 8, 16), 32)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    first = None
    for _ in range(30):
        loss = train_truth.losses(reader, pictures.float() / 127.5 - 1, told)["loss"]
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * first


def seen(subject, **other):
    """What a reader without mistakes sees of somebody on the left."""
    traits = {name: getattr(subject, name) for name in (*truth.SHOWN, "angle", "spacing")}
    return truth.Seen(**{"position": "left", "size": "big", **traits, **other})


def test_angle_and_spacing_are_told_only_of_patterns_with_the_same_turn():
    subject = sets(1)[0][0].placed[0].subject
    told = {
        (a, b): set(truth.same_hidden(seen(subject, pattern=a), replace(subject, pattern=b))) - {"face", "hue"}
        for a in PATTERNS
        for b in PATTERNS
    }
    both = {pair for pair, traits in told.items() if traits == {"angle", "spacing"}}
    assert both == {("striped", "striped"), *((a, b) for a in ("dotted", "checked") for b in ("dotted", "checked"))}
    assert not any(traits for pair, traits in told.items() if pair not in both)


@pytest.mark.parametrize(("pattern", "period"), [("striped", 180), ("dotted", 90), ("checked", 90)])
def test_angles_agree_up_to_a_turn_of_the_pattern(pattern, period):
    subject = replace(sets(1)[0][0].placed[0].subject, pattern=pattern, angle=0.05 * period)
    for turned, same in ((0, True), (0.9, True), (0.3, False), (0.7, False), (1, True)):
        assert truth.same_hidden(seen(subject, angle=(turned + 0.05) * period), subject)["angle"] == same, turned


def test_the_traits_that_everybody_has_are_told_one_by_one():
    subject = sets(1)[0][0].placed[0].subject
    assert truth.same_traits(seen(subject), subject) == dict.fromkeys(truth.SHOWN, True)
    changed = {"shape": "", "colour": "", "pattern": "", "accessory": "", "face": subject.face + 1, "hue": 9.0}
    for trait in truth.SHOWN:
        found = truth.same_traits(seen(subject, **{trait: changed[trait]}), subject)
        assert found == {other: other != trait for other in truth.SHOWN}


def test_the_truth_scores_full_marks_and_another_set_does_not():
    ours, others = sets(6), sets(7)[1:]
    panels = [panel for group in ours for panel in group]
    found = scores.read_sets(Oracle(panels), torch.zeros(6, 3, 128, 128))
    for name, score in scores.TEXT_SCORES[1].items():
        assert scores.per_set(found, ours, score) == [1.0] * 6, name
        assert np.mean(scores.per_set(found, others, score)) < 0.9, name


def test_accuracy_counts_what_a_reader_gets_right():
    panels = [panel for group in sets(4) for panel in group]
    told = torch.tensor([truth.labels(panel) for panel in panels])
    pictures = torch.zeros(len(panels), 3, 64, 64, dtype=torch.uint8)
    assert set(report.accuracy(Oracle(panels), pictures, told).values()) == {1.0}
    assert report.accuracy(Oracle(panels[::-1]), pictures, told)["scene"] < 0.5


def test_a_row_says_whether_its_bar_is_reached():
    assert "| reached |" in scores.row("a", [1, 1, 0, 1], bar=0.7)
    assert "| **missed** |" in scores.row("a", [1, 1, 0, 1], bar=0.8)


def test_tiles_are_the_panels_in_reading_order_and_without_empties_one():
    image = scores.to_tensors(sets(2))
    cut = scores.tiles(generate.without(image, 3))
    assert torch.equal(cut[0], image[0, :, :64, :64]) and torch.equal(cut[1], image[0, :, :64, 64:])
    assert torch.equal(cut[7], image[1, :, 64:, 64:]) and not cut[2].any() and not cut[6].any()


def test_batches_of_sets_keep_what_is_kept_and_repeat():
    networks, image = generate.load_networks("tiny"), scores.to_tensors(sets(3))
    captions = [joint_caption(panels, 2, 2) for panels in sets(3)]
    kept, two = generate.without(image, 2), generate.Options(steps=2)
    made = generate.generate(networks, captions, (2, 2), [5, 6, 7], two, kept=kept, masked=(2,), batch=2)
    assert torch.equal(generate.without(made, 2), kept) and made[:, :, :64, 64:].std() > 0.1
    alone = generate.generate(networks, captions[2:], (2, 2), [7], two, kept=kept[2:], masked=(2,))
    assert torch.allclose(alone[0], made[2], atol=1e-4)


def test_the_report_measures_with_the_models_own_reader_and_writes_everything(tmp_path, monkeypatch):
    readers = []

    def table(networks, reader=None, *rest):
        readers.append(reader)
        return ["a line"]

    for name in ("autoencoder_rows", "from_text", "from_kept", "by_guidance", "borders", "survival", "tiling"):
        monkeypatch.setattr(report, name, table)
    monkeypatch.setattr(report.eyes, "tables", table)
    monkeypatch.setattr(report, "generate", lambda networks, captions, *rest, **more: torch.zeros(1, 3, 128, 128))
    monkeypatch.setattr(report, "text_figures", lambda *rest: ({"scene": [1.0]}, {"scene": [0.5]}))
    monkeypatch.setattr(report, "kept_figures", lambda *rest: {report.TRUE: {"face": [np.nan]}})
    assert report.main(["--model", "tiny", "--columns", "1", "--out", str(tmp_path)]) == 0
    assert sum(isinstance(reader, truth.Reader) for reader in readers) == 2 and len(readers) == 8
    text = (tmp_path / "base.md").read_text()
    assert text.startswith("# The base tiny\n") and text.count("a line") == 8
    assert text.endswith("Made by `python -m lab.report --model tiny --sets 200 --columns 1`.\n")
    pictures = re.findall(r"\]\((.*)\)", text)
    assert [Path(name).stem for name in pictures] == ["base-from-text", "base-panel-3"]
    assert all((tmp_path / name).exists() for name in pictures)
    rows = json.loads((tmp_path / "base.json").read_text())["rows"]
    assert [(row["task"], row["name"], row["figures"]) for row in rows] == [
        ("text", "base", [{"scene": [1]}]), ("text", report.TRUE, [{"scene": [0.5]}]),
        ("kept", report.TRUE, [{"face": [None]}]),
    ]  # fmt: skip


def test_tables_of_the_base_have_a_line_for_each_figure():
    made, true = (
        {"a: scene": [1.0, 1.0], "b: same subject": [1.0, 0.0]},
        {"a: scene": [1.0, 0.5], "b: same subject": [1]},
    )
    assert report.from_text(made, true)[2:] == [
        "| a: scene | 100.0% | 34.2% to 100.0% | 75.0% | 95% | reached |",
        "| b: same subject | 50.0% | 9.5% to 90.5% | 100.0% | 85% | **missed** |",
    ]
    hidden = {trait: [1.0, np.nan] for trait in report.HIDDEN}
    kept = {name: {**dict.fromkeys(report.KEPT_SCORES, [1.0, 0.0]), **hidden} for name in (report.OWN, report.TRUE)}
    kept[report.OTHER] = {trait: [0.0, np.nan] for trait in report.HIDDEN}
    lines = report.from_kept(kept)
    assert len(lines) == 2 + 2 + 3 + 5 and lines[2].startswith("| masked panel: its own scene | 50.0% |")
    assert lines[-1] == "| face and hue | 100.0% | 0.0% | +100.0% | -73.4% to +100.0% | 100.0% |"


@pytest.mark.parametrize("subjects", [1, 2, 3, 4])
def test_every_subject_stands_in_the_window_of_its_place(subjects):
    height, width = truth.WINDOW
    for panel in (panel for group in sets(20, subjects) for panel in group):
        for which, one in enumerate(panel.placed):
            left, top, right, bottom = box(panel, which)
            x, y = (left + right) / 2, (top + bottom) / 2
            row, column = truth.CORNERS[one.position]
            assert 4 * column < x < 4 * (column + width) and 4 * row < y < 4 * (row + height)
            assert min(right, 4 * (column + width)) - max(left, 4 * column) > 0.75 * (right - left)
