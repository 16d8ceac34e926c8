"""The experiments' runner: what it trains, how it judges, and what it writes; with made-up networks and readings."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from wrong import seen

import train
from iclora.checkpoint import CHECKPOINT, RESULT
from iclora.config import IN_CONTEXT as METHOD
from iclora.config import TINY_TRAINING, TRAINING
from iclora.records import Findings, read_records
from lab import experiments, judge, pairs
from lab.arms import BASE, EXPERIMENTS, Arm, Experiment, Training, on_sets, thrice
from lab.captions import panel_prompt
from lab.judge import ALL_TASKS, FIGURES, IN_CONTEXT, IN_CONTEXT_WITH_BARS, NONE, OTHERS, OWN, SILENT, SUCCESS
from lab.scores import ALL, traits_shown
from lab.tables import training_time, what_intervals_cover
from lab.tasks import COUNT, GRIDS, SEED, task_sets
from lab.truth import Reading


def test_every_trait_counts_by_itself_whoever_has_it():
    subject = task_sets("walk", 1, 0)[0].panels[0].placed[0].subject
    every = dict.fromkeys(FIGURES, 1)
    assert traits_shown(Reading("beach", (seen(subject),)), subject) == every
    other = seen(subject, shape="none", face=subject.face + 1)
    some = every | {"shape": 0, "face": 0, ALL: pytest.approx(4 / 6)}
    assert traits_shown(Reading("beach", (other,)), subject) == some
    nobody = seen(subject, shape="", colour="", pattern="", accessory="", face=-1, hue=9)
    assert traits_shown(Reading("beach", (nobody, other)), subject) == some
    assert traits_shown(Reading("beach", ()), subject) == dict.fromkeys(FIGURES, 0)


def test_identity_looks_at_the_later_panels_only(monkeypatch):
    sets = task_sets("walk", 2, 0)
    first, second = (one.panels[0].placed[0].subject for one in sets)
    nobody, bald = Reading("beach", ()), seen(first, accessory="other")
    found = [nobody, Reading("beach", (seen(first),)), Reading("beach", (bald,)), Reading("beach", (seen(second),))]
    monkeypatch.setattr(judge, "read", lambda reader, image: [*found, nobody, nobody])
    figures = judge.identity(None, torch.zeros(2, 3, 192, 64), sets, OWN)
    wanted = {f"{trait}, {OWN}": [1, 0] for trait in FIGURES}
    assert figures == wanted | {f"accessory, {OWN}": [0.5, 0], f"{ALL}, {OWN}": [pytest.approx(1 - 0.5 / 6), 0]}


@pytest.fixture
def calls(monkeypatch):
    """What was to be generated; nothing is, and nobody is seen."""
    told, empty = [], [Reading("beach", ())] * 6

    def generate(networks, captions, grid, seeds, options, kept=None, masked=()):
        told.append((captions, list(seeds), kept, masked))
        return torch.zeros(2, 3, 192, 64)

    monkeypatch.setattr(judge, "generate", generate)
    monkeypatch.setattr(judge, "read", lambda reader, image: empty[: len(image)])
    return told


def test_success_is_judged_from_text_and_with_the_first_panel_given(calls):
    sets = task_sets("walk", 2, judge.SEED, held_out=True)
    figures, rows = judge.measure("walk", None, {}, judge.Ruler(None), 2)
    told, own = [one.caption for one in sets], judge.only_first(judge.to_tensors(sets))
    assert [(call[0], call[1], call[3]) for call in calls] == [(told, [0, 1], ()), (told, [0, 1], (2, 3))]
    assert calls[0][2] is None and torch.equal(calls[1][2], own)
    assert set(figures) == set(SUCCESS) and len(rows) == 2


def test_silent_walks_are_made_from_their_own_panel_from_anothers_and_from_none(calls):
    sets = task_sets("walk", 2, judge.SEED, held_out=True)
    figures, _ = judge.measure_silent("walk", None, {}, judge.Ruler(None), 2)
    silent = [one.silent for one in sets]
    assert [(call[0], call[1], call[3]) for call in calls] == [
        (silent, [0, 1], masked) for masked in ((2, 3), (2, 3), ())
    ]
    own, wrong = judge.only_first(judge.to_tensors(sets)), judge.only_first(judge.to_tensors(sets[::-1]))
    for call, wanted in zip(calls, (own, wrong, None), strict=True):
        assert call[2] is wanted or torch.equal(call[2], wanted)
    assert set(figures) == {f"{trait}, {given}" for trait in FIGURES for given in judge.GIVEN}


def lines(judged, name, value):
    """The details of an arm of a walk: by chance 0.1 of the traits come back, of true sets 0.9."""
    figures = dict.fromkeys((*SUCCESS, *(f"{trait}, {OWN}" for trait in FIGURES)), [value] * 2)
    chance = {f"{trait}, {given}": [0.1] * 2 for trait in FIGURES for given in (OTHERS, NONE)}
    found = judged.details("walk", name, figures | chance, dict.fromkeys(figures, [0.9] * 2))
    return [line.split(" | ") for line in found]


def test_every_trait_stands_beside_chance_and_only_all_of_them_have_a_bar():
    found = lines(SILENT, "LoRA", 0.74)
    assert {len(cells) for cells in found} == {judge.AGREEMENT[0].count("|") - 1}
    assert [cells[1] for cells in found] == list(FIGURES)
    shown = [[cell.split(" ")[0] for cell in cells[2:7]] for cells in found]
    assert shown == [["74.0", "10.0", "10.0", "90.0", "80.0"]] * len(FIGURES)
    assert [cells[1] for cells in found if "at least" in cells[-2]] == [ALL]
    assert not any("at least" in cells[-2] for cells in lines(SILENT, "base", 0.74))


def test_bars_of_task_success_hold_as_they_are_and_that_of_traits_above_chance():
    def bars(judged, name, value):
        return [",".join(cells[-2:]) for cells in lines(judged, name, value) if "at " in cells[-2]]

    assert bars(IN_CONTEXT_WITH_BARS, "LoRA", 0.86) == ["at least 85%,reached |"] * 2
    assert bars(IN_CONTEXT_WITH_BARS, "LoRA", 0.84) == ["at least 85%,**missed** |"] * 2
    assert bars(IN_CONTEXT_WITH_BARS, ALL_TASKS, 0.71) == ["at least 70%,reached |"] * 2
    assert bars(IN_CONTEXT_WITH_BARS, "base", 0.2) == ["at most 20%,reached |"] * 2
    assert bars(IN_CONTEXT_WITH_BARS, "base", 0.21) == ["at most 20%,**missed** |"] * 2
    assert bars(SILENT, "LoRA", 0.75) == ["at least 80%,reached |"]
    assert bars(SILENT, "LoRA", 0.73) == ["at least 80%,**missed** |"]
    assert IN_CONTEXT.details("walk", "LoRA", {}, {}) == []


@pytest.mark.parametrize(
    ("seconds", "cell"),
    [(None, ""), (630, "10.5 min"), (1260, "21.0 min, **over 20**")],
)
def test_a_training_that_is_too_short_or_too_long_is_told(seconds, cell):
    assert training_time(seconds, 20) == cell


def test_arms_of_a_task_differ_and_none_is_left_out_of_what_is_asked_of_all():
    for name, experiment in EXPERIMENTS.items():
        if experiment.judge.name != IN_CONTEXT.name:
            continue
        if name in ("tasks", "few"):
            assert {arm.task for arm in experiment.arms} == set(GRIDS)
        for task in {arm.task for arm in experiment.arms}:
            own = [arm.training for arm in experiment.arms if arm.task == task]
            assert len(own) >= 2 and len(set(own)) == len(own)


def test_arms_without_a_training_and_no_others_are_called_base():
    """Bars are told by that name."""
    arms = [arm for experiment in EXPERIMENTS.values() for arm in experiment.arms]
    assert all((arm.name == "base") == (arm.training is BASE) for arm in arms)


def test_one_lora_of_all_tasks_is_the_users_own_command():
    """python train.py --data sets/ --rank 16, of which the rank is the default."""
    (training,) = {arm.training for arm in EXPERIMENTS["tasks"].arms if arm.name == ALL_TASKS}
    assert (training.data, training.flags, training.start) == ((), (), None)
    assert {**TRAINING[METHOD], **TINY_TRAINING[METHOD]}["rank"] == 16
    assert training in {arm.training for arm in EXPERIMENTS["knowledge"].arms}


@pytest.fixture
def made_up(monkeypatch):
    """No network is loaded and nothing is trained; what train.py is told is noted."""

    def main(flags):
        told.append(flags)
        folder = Path(flags[flags.index("--out") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CHECKPOINT).touch()
        (folder / RESULT).write_text(str(flags))
        return 0

    def measure(task, networks, settings, ruler, count):
        judged.append((task, networks))
        right = [1.0 if networks else 0.0] * count
        figures = dict.fromkeys(SUCCESS, right)
        kept = {f"{trait}, {given}": right if given == OWN else [0.0] * count
                for trait in FIGURES for given in judge.GIVEN}  # fmt: skip
        return figures | (kept if task == "walk" else {}), [torch.zeros(count, 3, 64, 64)] * 2

    def measure_truth(task, networks, ruler, count):
        figures, _ = measure(task, "true", {}, ruler, count)
        return figures, [torch.zeros(count, 3, 64, 64)]

    told, judged = [], []
    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(experiments, "load_ruler", lambda model: None)
    monkeypatch.setattr(experiments, "load_networks", lambda model: None)
    monkeypatch.setattr(experiments, "with_lora", lambda model, lora: (lora, {}))
    made_up = replace(IN_CONTEXT, measure=measure, measure_truth=measure_truth)
    arms = (Arm("walk", "base"), on_sets("walk", "LoRA"), Arm("sketch", "base"), on_sets("sketch", "few", (), 3))
    for name in ("one", "two"):
        monkeypatch.setitem(EXPERIMENTS, name, Experiment(name, arms, made_up))
    first = Training((("one", 2),), (), 1)
    later = [Training((("two", 2),), (), 2, first), Training((("two", 1), ("hat", 1)), ("--rank", "4"), 2, first)]
    arms = tuple(Arm("two", name, training, "90.0") for name, training in zip(("a", "b"), later, strict=True))
    arms = tuple(replace(arm, seeds=2) for arm in arms)
    monkeypatch.setitem(EXPERIMENTS, "chain", Experiment("chain", arms, made_up, 5, ("from text", "nothing")))
    return told, judged


def run(tmp_path, *names):
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    status = experiments.main([*names, "--count", "2", "--steps", "7", *places])
    return status, [(tmp_path / "out" / f"{name}.md").read_text() for name in names if not status]


def test_the_runner_trains_judges_and_writes_pages_values_and_sheets(made_up, tmp_path, capsys):
    told, judged = made_up
    status, (text, other) = run(tmp_path, "one", "two")
    assert status == 0 and text.startswith("# one\n") and other.startswith("# two\n")
    assert "| walk | base | 0.0 (0.0 to 65.8) | 0.0 (0.0 to 65.8) |  |" in text
    assert "| walk | LoRA, difference | +100.0 (-34.9 to +100.0) |" in text
    assert "seconds a set" not in text and "by seed" not in text and "every arm was trained once" in text
    assert text.count("![one, walk](one-walk.png)") == 1
    assert text.endswith("Made by `python -m lab.experiments one --model tiny --count 2 --steps 7`.\n")
    assert capsys.readouterr().out.count("# one\n") == 1 and str(tmp_path) not in text
    rows = json.loads((tmp_path / "out" / "one.json").read_text())["rows"]
    assert [(row["task"], row["name"]) for row in rows] == [
        ("walk", "true sets"), ("sketch", "true sets"), ("walk", "base"), ("walk", "LoRA"), ("sketch", "base"),
        ("sketch", "few"),
    ]  # fmt: skip
    (figures,) = rows[3]["figures"]
    assert figures == {name: [0, 0] if name.endswith((OTHERS, NONE)) else [1, 1] for name in figures}
    assert rows[3]["seconds"] >= 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "one-sketch.png", "one-walk.png", "two-sketch.png", "two-walk.png",
    ]  # fmt: skip
    assert len(told) == 2, "what two experiments share is trained once"
    assert told[0][:6] == ["--data", "sets/walk", "--model", "tiny", "--steps", "7"]
    few = Path(told[1][1])
    assert few == tmp_path / "work" / "sets-3" / "sketch" and len(list(few.glob("*.png"))) == 3
    assert len(judged) == 2 + 4, "arms that two experiments share are judged once"


def test_a_second_stage_starts_from_the_first_of_its_seed_which_is_trained_once(made_up, tmp_path, monkeypatch):
    told, judged = made_up
    argv = ["chain", "--count", "2", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert experiments.main(argv) == 0
    given = [dict(zip(flags[::2], flags[1::2], strict=True)) for flags in told]
    assert [(flags["--stage"], flags.get("--seed")) for flags in given] == [
        ("1", None), ("2", None), ("1", "1"), ("2", "1"), ("2", None), ("2", "1"),
    ]  # fmt: skip
    assert [flags.get("--rank") for flags in given[4:]] == ["4", "4"]
    for later, first in ((1, 0), (3, 2), (4, 0), (5, 2)):
        assert given[later]["--init-lora"] == str(Path(given[first]["--out"]) / RESULT)
    assert len({flags["--out"] for flags in given}) == 6 and {flags["--steps"] for flags in given} == {"5"}
    mixed = json.loads(Path(given[4]["--data"]).read_text())
    assert [len(row["image_paths"]) for row in mixed] == [2, 1]
    text = (tmp_path / "out" / "chain.md").read_text()
    assert "from text by seed | paper | training |" in text and "100.0, 100.0 | 90.0 | 0.0 min |" in text
    assert "trained 2 times" in text and "cover training as well" in text and "nothing" not in text
    assert "sampling only" not in text

    monkeypatch.setattr(train, "main", lambda flags: 0)
    assert experiments.main(argv) == 0 and len(judged) == 1 + 4, "what was judged is found again"
    (Path(given[4]["--out"]) / RESULT).write_text("another LoRA")
    assert experiments.main(argv) == 0 and len(judged) == 1 + 5


def test_a_failed_training_is_one_line_and_writes_no_page(made_up, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "main", lambda flags: 2)
    assert run(tmp_path, "one")[0] == 2
    assert "did not end well" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "out").iterdir())


def test_what_is_not_trained_is_judged_once_however_many_seeds(made_up, tmp_path, monkeypatch):
    told, _ = made_up
    monkeypatch.setitem(EXPERIMENTS, "one", replace(EXPERIMENTS["one"], arms=thrice(EXPERIMENTS["one"].arms)))
    status, (text,) = run(tmp_path, "one")
    rows = json.loads((tmp_path / "out" / "one.json").read_text())["rows"]
    assert [len(row["figures"]) for row in rows] == [1, 1, 1, 3, 1, 3] and len(told) == 6
    assert "| walk | base | 0.0 (0.0 to 65.8) | 0.0 (0.0 to 65.8) |  |  |" in text
    assert "| 100.0, 100.0, 100.0 |" in text and "trained 3 times" in text


@pytest.mark.parametrize(
    ("trainings", "words"),
    [
        ([], "cover sampling only: nothing was trained."),
        ([1, 1], "cover sampling only: every arm was trained once."),
        ([3, 3], "as far as 3 trainings can tell of it."),
        ([3, 1], "arms without means by seed were trained once, and theirs cover sampling only."),
    ],
)
def test_a_page_says_what_its_intervals_cover(trainings, words):
    sentence = what_intervals_cover(trainings)
    assert sentence.endswith(words) and "Wilson" in sentence


def test_the_first_sets_of_a_task_are_the_committed_ones():
    assert task_sets("walk", 3, SEED) == task_sets("walk", COUNT, SEED)[:3]


def drawn(training, tmp_path, start=None):
    return experiments.draw_data(training, start, SimpleNamespace(work=tmp_path, model="made-up"))


def test_what_a_training_learns_from_is_drawn_once_and_readable(tmp_path, monkeypatch):
    panels = drawn(Training((("panels", 3),)), tmp_path)
    findings = Findings()
    records = read_records(panels, None, findings)
    assert panels == tmp_path / "panels-3" / "sets.jsonl" and len(records) == 3 and not findings.broken
    monkeypatch.setattr(experiments, "write_sets", None)
    assert drawn(Training((("panels", 3),)), tmp_path) == panels
    assert drawn(Training((("walk", COUNT),)), tmp_path) == Path("sets", "walk")
    assert drawn(Training(), tmp_path) == Path("sets")
    of_both = drawn(Training((("one", 1), ("two", 1)), stage=2), tmp_path)
    assert [len(row["image_paths"]) for row in json.loads(of_both.read_text())] == [1, 2]


def test_second_references_are_redrawn_by_the_first_stage_from_their_crops(tmp_path, monkeypatch):
    calls = []

    def make_pictures(networks, metadata, prompts, references):
        calls.append((networks, prompts, references))
        return torch.linspace(-1, 1, 2)[:, None, None, None].expand(2, 3, 64, 64)

    monkeypatch.setattr(experiments, "with_lora", lambda model, lora: (f"{model} with {lora}", {}))
    monkeypatch.setattr(experiments.judge_uno, "make_pictures", make_pictures)
    start, training = Path("runs", "first", RESULT), Training((("redrawn", 2),), stage=2)
    path = drawn(training, tmp_path, start)
    assert drawn(training, tmp_path, start) == path and len(calls) == 1, "drawn once"
    assert drawn(training, tmp_path, Path("runs", "other", RESULT)) != path and len(calls) == 2
    (networks, prompts, references), cropped = calls[0], pairs.make_pairs("cropped", 2, 0)
    assert networks == f"made-up with {start}"
    assert [[p.tobytes() for p in crop] for crop in references] == [[p.references[1].tobytes()] for p in cropped]
    assert prompts == [panel_prompt(pairs.bare(pair.shown[1])) for pair in cropped]
    assert all(pair.shown[1].scene != pair.panel.scene for pair in cropped)
    for row, pair, grey in zip(json.loads(path.read_text()), cropped, (0, 255), strict=True):
        first, second = (Image.open(path.parent / name) for name in row["image_paths"])
        assert first.tobytes() == pair.references[0].tobytes() and set(second.tobytes()) == {grey}
        assert Image.open(path.parent / row["image_tgt_path"]).tobytes() == pair.target.tobytes()
        assert row["prompt"] == pair.prompt
