"""The experiments' runner: what it trains, how it judges, and what it writes; with made-up networks and readings."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from iclora.checkpoint import CHECKPOINT, RESULT
from iclora.records import Findings, read_records
from lab import experiments, judge
from lab.arms import BASE, EXPERIMENTS, Arm, Experiment, Training, on_sets
from lab.scores import ratio
from lab.tables import training_time, what_intervals_cover
from lab.tasks import COUNT, GRIDS, SEED, task_sets
from lab.truth import Reading, Seen


def seen(subject, **other):
    traits = {name: getattr(subject, name) for name in ("shape", "colour", "pattern", "accessory", "face", "hue")}
    traits |= {"position": "left", "size": "big", "angle": subject.angle, "spacing": subject.spacing}
    return Seen(**{**traits, **other})


def test_traits_count_only_with_somebody_of_the_subjects_shape():
    subject = task_sets("walk", 1, 0)[0].panels[0].placed[0].subject
    face = subject.face + 1
    assert judge.traits(Reading("beach", (seen(subject),)), subject) == (1, 1)
    assert judge.traits(Reading("beach", (seen(subject, colour="none", face=face),)), subject) == (
        0.75, pytest.approx(1 - 1 / (2 if subject.pattern == "plain" else 4)),
    )  # fmt: skip
    assert judge.traits(Reading("beach", (seen(subject, shape="none"),)), subject) == (0, 0)
    assert judge.traits(Reading("beach", ()), subject) == (0, 0)


def test_identity_looks_at_the_later_panels_only(monkeypatch):
    sets = task_sets("walk", 2, 0)
    subjects = [one.panels[0].placed[0].subject for one in sets]
    nobody = Reading("beach", ())
    first, second = (Reading("beach", (seen(subject),)) for subject in subjects)
    found = [nobody, first, first, second, nobody, nobody]
    monkeypatch.setattr(judge, "read", lambda reader, image: found)
    figures = judge.identity(None, torch.zeros(2, 3, 192, 64), sets, "own panel")
    assert figures == {"named, own panel": [1, 0], "unnamed, own panel": [1, 0]}


def test_panels_are_alike_if_the_first_ones_unnamed_traits_come_back(monkeypatch):
    sets = task_sets("walk", 3, 0)
    subjects = [one.panels[0].placed[0].subject for one in sets]
    page = [Reading("beach", (seen(subject),)) for subject in subjects for _ in range(3)]
    page[1] = Reading("beach", (seen(subjects[0], face=subjects[0].face + 1, hue=subjects[0].hue + 2),))
    page[5] = page[6] = Reading("beach", ())  # a later panel of the second set, and the first of the third
    share = 1 - 2 / (2 if subjects[0].pattern == "plain" else 4)
    monkeypatch.setattr(judge, "read", lambda reader, image: page)
    image = torch.zeros(3, 3, 192, 64)
    assert judge.alike(None, image, image, sets, "own panel") == {f"{judge.ALIKE}, own panel": [
        pytest.approx((share + 1) / 2), 0.5, 0,
    ]}  # fmt: skip
    other = [seen(subject, face=subject.face + 1, hue=subject.hue + 2, angle=subject.angle + 45, spacing=9)
             for subject in subjects]  # fmt: skip
    pages = iter([page, [Reading("beach", (one,)) for one in other for _ in range(3)]])
    monkeypatch.setattr(judge, "read", lambda reader, image: next(pages))
    (values,) = judge.alike(None, image, image, sets, "another's panel").values()
    assert values[1:] == [0, 0], "the first panel is the other picture's"


def test_a_walk_from_text_is_made_twice_to_tell_what_agrees_by_chance(monkeypatch):
    calls, sets = [], task_sets("walk", 2, judge.SEED, held_out=True)
    empty = [Reading("beach", ())] * 6

    def generate(networks, captions, grid, seeds, options, **kept):
        calls.append((captions, seeds, "kept" in kept))
        return torch.zeros(2, 3, 192, 64)

    monkeypatch.setattr(judge, "generate", generate)
    monkeypatch.setattr(judge, "read", lambda reader, image: empty[: len(image)])
    figures, _ = judge.measure("walk", None, {}, judge.Ruler(None), 2)
    told, silent = [one.caption for one in sets], [one.silent for one in sets]
    assert calls == [
        (told, [0, 1], False), (told, [0, 1], True), (silent, [0, 1], True), (silent, [0, 1], True),
        (told, [2, 3], False),
    ]  # fmt: skip
    kinds = (*judge.KINDS, judge.ALIKE)
    wanted = {f"{kind}, {whose}" for kind in kinds for whose in ("own panel", "another's panel")}
    assert set(figures) == {*judge.SUCCESS, *wanted}


def test_bars_of_task_success_hold_as_they_are_and_those_of_traits_as_shares_of_the_ceiling():
    def lines(name, success, share):
        figures = dict.fromkeys(judge.SUCCESS, [success] * 2)
        kept = {f"{kind}, {whose} panel": [share] * 2 for kind in judge.KINDS for whose in ("own", "another's")}
        most = dict.fromkeys((*figures, *kept), [0.9] * 2)
        return EXPERIMENTS["tasks"].judge.details("walk", name, figures | kept, most)

    def ends(found):
        return [line.split(" | ", 1)[0][2:] + ":" + ",".join(line.split(" | ")[-2:]) for line in found]

    wanted = [f"walk: LoRA:at least {bar}%,reached |" for bar in (85, 85, 80, 80)]
    assert ends(lines("LoRA", 0.86, 0.73)) == wanted
    assert [line.count("**missed**") for line in lines("LoRA", 0.84, 0.71)] == [1] * 4
    base = lines("base", 0.2, 0.1)
    assert ends(base)[:2] == ["walk: base:at most 20%,reached |"] * 2 and "at least" not in "".join(base)
    assert [line.count("**missed**") for line in lines("base", 0.21, 0.1)] == [1, 1, 0, 0]
    plain = judge.IN_CONTEXT.details("walk", "LoRA", dict.fromkeys(judge.SUCCESS, [0.0]), {})
    assert plain == [] and {arm.name for arm in EXPERIMENTS["tasks"].arms if arm.training is None} == {"base"}


@pytest.mark.parametrize(
    ("seconds", "cell"),
    [(None, ""), (300, "5.0 min, **under 10**"), (630, "10.5 min"), (1260, "21.0 min, **over 20**")],
)
def test_a_training_that_is_too_short_or_too_long_is_told(seconds, cell):
    assert training_time(seconds, 10, 20) == cell


def test_a_ratio_is_that_of_the_means_and_its_interval_holds_it():
    mean, low, high = ratio([0.5, 0.0, 1.0, 0.5], [1.0, 0.5, 1.0, 0.5])
    assert mean == pytest.approx(2 / 3) and 0 <= low < mean < high <= 1.01
    assert ratio([1.0, 1.0], [1.0, 1.0]) == (1, 1, 1)


def test_every_experiment_compares_arms_of_every_task():
    for name, experiment in EXPERIMENTS.items():
        if experiment.judge.name != judge.IN_CONTEXT.name:
            continue
        if name != "bundled":
            assert {arm.task for arm in experiment.arms} == set(GRIDS)
        for task in {arm.task for arm in experiment.arms}:
            own = [arm.training for arm in experiment.arms if arm.task == task]
            assert len(own) >= 2 and len(set(own)) == len(own)


def test_arms_without_a_training_and_no_others_are_called_base():
    """Bars are told by that name."""
    arms = [arm for experiment in EXPERIMENTS.values() for arm in experiment.arms]
    assert all((arm.name == "base") == (arm.training is BASE) for arm in arms)


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
        figures = dict.fromkeys(judge.SUCCESS, right)
        kept = {f"{kind}, {whose} panel": right for kind in judge.KINDS for whose in ("own", "another's")}
        return figures | (kept if task == "walk" else {}), [torch.zeros(count, 3, 64, 64)] * 2

    def measure_truth(task, networks, ruler, count):
        figures, _ = measure(task, "true", {}, ruler, count)
        return figures, [torch.zeros(count, 3, 64, 64)]

    told, judged = [], []
    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(experiments, "load_ruler", lambda model: None)
    monkeypatch.setattr(experiments, "load_networks", lambda model: None)
    monkeypatch.setattr(experiments, "with_lora", lambda model, lora: (lora, {}))
    made_up = replace(judge.IN_CONTEXT, measure=measure, measure_truth=measure_truth)
    arms = (Arm("walk", "base"), on_sets("walk", "LoRA"), Arm("sketch", "base"), on_sets("sketch", "few", (), 3))
    for name in ("one", "two"):
        monkeypatch.setitem(EXPERIMENTS, name, Experiment(name, arms, made_up))
    first = Training((("one", 2),), (), 1)
    later = [Training((("two", 2),), (), 2, first), Training((("two", 1), ("hat", 1)), ("--rank", "4"), 2, first)]
    arms = tuple(Arm("two", name, training, "90.0") for name, training in zip(("a", "b"), later, strict=True))
    monkeypatch.setitem(EXPERIMENTS, "chain", Experiment("chain", arms, made_up, 5, 2, ("from text", "nothing")))
    return told, judged


def run(tmp_path, *names):
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    status = experiments.main([*names, "--count", "2", "--steps", "7", *places])
    return status, [(tmp_path / "out" / f"{name}.md").read_text() for name in names if not status]


def test_the_runner_trains_judges_and_writes_pages_values_and_sheets(made_up, tmp_path, capsys):
    told, judged = made_up
    status, (text, other) = run(tmp_path, "one", "two")
    assert status == 0 and text.startswith("# one\n") and other.startswith("# two\n")
    assert "| walk | base | 0.0 (0.0 to 65.8) | 0.0 (0.0 to 65.8) | 0.0 (0.0 to 65.8) |  |" in text
    assert "| walk | LoRA, difference | +100.0 (-34.9 to +100.0) |" in text
    assert "| walk: LoRA | unnamed | 100.0 (34.2 to 100.0) |" in text and "few | named" not in text
    assert "seconds a set" not in text and "by seed" not in text and "every arm was trained once" in text
    assert text.count("![one, walk](one-walk.png)") == 1
    assert text.endswith("Made by `python -m lab.experiments one --model tiny --count 2 --steps 7`.\n")
    assert capsys.readouterr().out.count("# one\n") == 1 and str(tmp_path) not in text
    rows = json.loads((tmp_path / "out" / "one.json").read_text())["rows"]
    assert [(row["task"], row["name"]) for row in rows] == [
        ("walk", "true sets"), ("sketch", "true sets"), ("walk", "base"), ("walk", "LoRA"), ("sketch", "base"),
        ("sketch", "few"),
    ]  # fmt: skip
    assert rows[3]["figures"] == [{name: [1, 1] for name in rows[3]["figures"][0]}] and rows[3]["seconds"] >= 0
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


def test_arms_that_are_timed_take_turns_with_those_of_their_task(made_up, tmp_path, monkeypatch):
    def one(task, networks, about):
        return lambda: (task, networks)

    def take_turns(calls, rounds, device):
        turns.append({name: call() for name, call in calls.items()})
        return {name: [1.0 / (1 + i), 3.0 / (1 + i)] for i, name in enumerate(calls)}

    turns, plain = [], EXPERIMENTS["one"]
    monkeypatch.setitem(EXPERIMENTS, "one", replace(plain, timed=True, judge=replace(plain.judge, one=one)))
    monkeypatch.setattr(experiments, "take_turns", take_turns)
    status, (text,) = run(tmp_path, "one")
    assert status == 0 and [list(each) for each in turns] == [["base", "LoRA"], ["base", "few"]]
    assert turns[0]["base"] == ("walk", None) and turns[0]["LoRA"][1].name == RESULT
    assert "| seconds a set | training |" in text and "| 2.00 (1.50 to 2.50) |  |" in text
    assert "| 1.00 (0.75 to 1.25) | 0.0 min |" in text and "| 2.00 (2.00 to 2.00) times as fast |  |" in text
    rows = json.loads((tmp_path / "out" / "one.json").read_text())["rows"]
    assert rows[3]["seconds a set"] == [0.5, 1.5]


def test_a_failed_training_is_one_line_and_writes_no_page(made_up, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "main", lambda flags: 2)
    assert run(tmp_path, "one")[0] == 2
    assert "did not end well" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "out").iterdir())


def test_what_is_not_trained_is_judged_once_however_many_seeds(made_up, tmp_path, monkeypatch):
    told, _ = made_up
    monkeypatch.setitem(EXPERIMENTS, "one", replace(EXPERIMENTS["one"], seeds=3))
    status, (text,) = run(tmp_path, "one")
    rows = json.loads((tmp_path / "out" / "one.json").read_text())["rows"]
    assert [len(row["figures"]) for row in rows] == [1, 1, 1, 3, 1, 3] and len(told) == 6
    assert "| walk | base | 0.0 (0.0 to 65.8) | 0.0 (0.0 to 65.8) | 0.0 (0.0 to 65.8) |  |  |" in text
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


def test_what_a_training_learns_from_is_drawn_once_and_readable(tmp_path, monkeypatch):
    panels = experiments.draw_data(Training((("panels", 3),)), tmp_path)
    findings = Findings()
    records = read_records(panels, None, findings)
    assert panels == tmp_path / "panels-3" / "sets.jsonl" and len(records) == 3 and not findings.broken
    monkeypatch.setattr(experiments, "write_sets", None)
    assert experiments.draw_data(Training((("panels", 3),)), tmp_path) == panels
    assert experiments.draw_data(Training((("walk", COUNT),)), tmp_path) == Path("sets", "walk")
    pairs = experiments.draw_data(Training((("one", 1), ("two", 1)), stage=2), tmp_path)
    assert [len(row["image_paths"]) for row in json.loads(pairs.read_text())] == [1, 2]
