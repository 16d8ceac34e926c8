"""Sets from text with a LoRA: the same captions and noise in every arm, as in the base's report."""

import numpy as np
import pytest
import torch

from lab import judge_text, report
from lab.arms import EXPERIMENTS
from lab.captions import joint_caption
from lab.generate import Options
from lab.judge import Ruler
from lab.truth import Reading, Seen
from lab.world import is_held_out


def as_drawn(panel, **other):
    """What a reader without mistakes sees of a panel; other: traits that are wrong."""
    named = ("shape", "colour", "pattern", "accessory", "face", "hue", "angle", "spacing")
    seen = [
        Seen(**{"position": p.position, "size": p.size, **{n: getattr(p.subject, n) for n in named}, **other})
        for p in panel.placed
    ]
    return Reading(panel.scene, tuple(seen))


@pytest.mark.parametrize("case", judge_text.TEXT_CASES)
def test_an_arm_makes_held_out_sets_from_their_captions_alone(case, monkeypatch):
    calls, (subjects, (rows, cols)) = [], judge_text.TEXT_CASES[case]
    sets = judge_text.held_out(case, 3)

    def generate(networks, captions, grid, seeds, options, **kept):
        calls.append((captions, grid, list(seeds), options, kept))
        return torch.zeros(3, 3, 64 * rows, 64 * cols)

    monkeypatch.setattr(judge_text, "generate", generate)
    monkeypatch.setattr(judge_text, "read_sets", lambda reader, image: [list(map(as_drawn, one)) for one in sets])
    figures, (row,) = judge_text.measure(case, None, {"iclora.text": "panel"}, Ruler(None), 3)
    captions = [joint_caption(panels, rows, cols) for panels in sets]
    assert calls == [(captions, (rows, cols), [0, 1, 2], Options(text="panel"), {})] and len(row) == 3
    assert all(len(panels) == rows * cols and len(panels[0].placed) == subjects for panels in sets)
    assert all(is_held_out(one.subject) for panels in sets for one in panels[0].placed)
    assert figures and set(figures) <= set(judge_text.NAMES) and set(map(tuple, figures.values())) == {(1, 1, 1)}


def test_the_report_has_the_bases_figures_of_every_case(monkeypatch):
    for name, value in (("measure", 0.5), ("measure_truth", 1)):
        monkeypatch.setattr(report, name, lambda case, *rest, value=value: ({case[:3]: [value] * rest[-1]}, []))
    made, true = report.text_figures(None, Ruler(None), 2)
    assert made == {f"{case}: {case[:3]}": [0.5, 0.5] for case in judge_text.TEXT_CASES}
    assert made.keys() == true.keys() and set(map(tuple, true.values())) == {(1, 1)}


def test_a_subject_is_the_same_if_no_panel_has_another_colour(monkeypatch):
    sets = judge_text.held_out("one subject, 2x2", 2)
    pages = [list(map(as_drawn, panels)) for panels in sets]
    pages[1][2] = as_drawn(sets[1][2], colour="none")
    monkeypatch.setattr(judge_text, "read_sets", lambda reader, image: pages)
    figures = judge_text.judge("one subject, 2x2", Ruler(None), torch.zeros(2, 3, 128, 128), sets)
    assert figures["colour and shape"] == [1, 0.75] and figures["same subject"] == [1, 0]
    assert np.mean(figures["pattern"]) == np.mean(figures["scene"]) == 1


def test_two_subjects_that_swap_colours_are_mixed(monkeypatch):
    sets = judge_text.held_out("two subjects, 1x1", 12)
    pages = []
    for (panel,) in sets:
        first, second = as_drawn(panel).seen
        swapped = [as_drawn(panel, colour=other.colour).seen[i] for i, other in enumerate((second, first))]
        pages.append([Reading(panel.scene, tuple(swapped))])
    alike = [float(len({one.subject.colour for one in panel.placed}) == 1) for (panel,) in sets]
    assert 0 in alike, "or choose another seed"
    monkeypatch.setattr(judge_text, "read_sets", lambda reader, image: pages)
    figures = judge_text.judge("two subjects, 1x1", Ruler(None), torch.zeros(12, 3, 64, 64), sets)
    assert figures["colours unmixed"] == alike and set(figures["scene"]) == set(figures["position"]) == {1}


def test_knowledge_is_asked_of_the_base_and_with_every_lora():
    for case in judge_text.TEXT_CASES:
        names = [arm.name for arm in EXPERIMENTS["knowledge"].arms if arm.task == case]
        assert names == ["base", *(f"LoRA of {task}" for task in ("sparkle", "sketch", "walk", "all tasks")), "UNO"]
    trained = {arm.training for arm in EXPERIMENTS["tasks"].arms} | {"loras/uno.safetensors"}
    assert {arm.training for arm in EXPERIMENTS["knowledge"].arms} <= trained
