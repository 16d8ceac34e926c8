"""UNO's experiments: batches with references, what a picture is judged by, and the rows of arms; no training."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from wrong import seen

from iclora.cli import parse
from iclora.config import TINY_TRAINING, TRAINING, SampleConfig, TrainConfig
from iclora.pipeline import Pipeline, encode_references
from iclora.plan import make_plan
from iclora.references import encode
from lab import circle, experiments, judge, judge_uno, pairs
from lab.arms import DEFAULTS, EXPERIMENTS
from lab.generate import Options, generate, load_networks
from lab.judge_uno import BARS, HEAD, NONE, UNO, UNO_WITH_BARS, controls, score
from lab.tasks import GRIDS, task_sets
from lab.truth import Reading
from model.checkpoint import fingerprint
from model.weights import find_model
from sampling.images import to_picture

ROOT = Path(__file__).parents[2]
OURS = {name: one for name, one in EXPERIMENTS.items() if one.judge.name == UNO.name}


def of(kind, seed=0):
    (pair,) = pairs.make_pairs(kind, 1, seed)
    return pair, [one.subject for one in pair.panel.placed]


# generating


@pytest.mark.parametrize("attention", ["joint", "alone"])
def test_batches_with_references_are_what_the_pipeline_makes_of_each(attention, tmp_path, monkeypatch):
    tokens = []
    monkeypatch.setattr("lab.generate.encode", lambda *given: tokens.append(encode(*given)) or tokens[-1])
    networks, drawn = load_networks("tiny"), pairs.make_pairs("two", 2, 0)
    ways = {"steps": 2, "guidance": 4.0, "offset": "w", "offset_scale": 2.0, "reference_attention": attention}
    ways |= {"ref_size": 48} if attention == "alone" else {}
    shown = [pair.references for pair in drawn]
    made = generate(networks, [pair.prompt for pair in drawn], (1, 1), [5, 6], Options(**ways), references=shown)
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path, picture in zip(paths, drawn[1].references, strict=True):
        picture.save(path)
    off = f"{find_model('tiny').root / 'loras' / 'uno.safetensors'}:0"
    config = SampleConfig(prompt=drawn[1].prompt, ref=tuple(paths), lora=(off,), device="cpu", **ways)
    plan = make_plan(replace(config, seed=6), lambda line: None)
    with torch.inference_mode():
        again = encode_references(networks.autoencoder, plan, 6)
    assert torch.equal(tokens[1], again), "the posterior's sample too"
    (result,) = Pipeline(config, lambda line: None).run(plan)
    composite = result.composite
    assert np.abs(np.asarray(composite, int) - np.asarray(to_picture(made[1:]), int)).max() <= 1
    other = generate(networks, [drawn[1].prompt], (1, 1), [6], Options(**ways), references=[shown[1][::-1]])
    assert (other[0] - made[1]).abs().mean() > 1e-4, "so the order of references, and they themselves, count"


def test_sets_with_unlike_references_are_refused():
    (first, *_), (second, *_) = (pairs.make_pairs(kind, 1, 0) for kind in ("one", "two"))
    with pytest.raises(ValueError, match="give every caption as many"):
        generate(None, ["a", "b"], (1, 1), [0, 1], references=[first.references, second.references])
    with pytest.raises(ValueError, match="2 captions with references of 1"):
        generate(None, ["a", "b"], (1, 1), [0, 1], references=[first.references])


# judging


def test_a_picture_of_the_references_has_all_and_an_empty_one_nothing():
    pair, subjects = of("two")
    best = score(Reading(pair.panel.scene, tuple(map(seen, subjects))), pair)
    assert all(best[name] == 1 for name in ("traits", "right", "all right", "scene", "colour", "face"))
    assert not any(best[name] for name in ("copied", "swapped", "confused", "missing"))
    worst = score(Reading(pair.shown[1].scene, ()), pair)
    assert worst["copied"] == worst["missing"] == 1
    assert not any(worst[name] for name in ("traits", "right", "scene", "swapped", "confused"))


def test_one_subject_in_anothers_looks_is_swapped_and_a_single_mark_of_it_only_confused():
    pair, (first, second) = of("two")
    looks = {mark: getattr(second, mark) for mark in judge_uno.MARKS}
    other = [mark for mark in looks if getattr(first, mark) != looks[mark]]
    assert len(other) >= 3, "or choose another seed"
    for count in range(len(other) + 1):
        some = {mark: looks[mark] for mark in other[:count]}
        got = score(Reading("beach", (seen(first, **some), seen(second))), pair)
        assert got["swapped"] == (count > len(other) / 2) and got["confused"] == count / len(looks) / 2
    whole = score(Reading("beach", (seen(first, **looks), seen(second))), pair)
    assert whole["mistaken"] == whole["right"] == 0.5
    part = score(Reading("beach", (seen(first, colour=second.colour), seen(second))), pair)
    assert part["all right"] == 0 and part["right"] == 0.5
    nobodys = next(c for c in ("red", "blue", "green") if c not in (first.colour, second.colour))
    assert score(Reading("beach", (seen(first, colour=nobodys), seen(second))), pair)["confused"] == 0


def test_what_the_prompt_asks_for_is_no_trait_of_the_reference():
    pair, (after,) = of("recolour")
    before = pair.shown[0].placed[0].subject
    kept = score(Reading(pair.panel.scene, (seen(before),)), pair, "colour")
    assert kept["asked for"] == 0 and kept["traits"] == 1 and "colour" not in kept
    assert score(Reading(pair.panel.scene, (seen(after),)), pair, "colour")["asked for"] == 1


def test_pasted_is_who_stands_as_in_the_reference_and_should_not():
    pair, (subject,) = of("one")
    shown, wanted = pair.shown[0].placed[0], pair.panel.placed[0]
    assert (shown.position, shown.size) != (wanted.position, wanted.size), "or choose another seed"
    for at, pasted in ((shown, 1), (wanted, 0)):
        reading = Reading(pair.panel.scene, (seen(subject, position=at.position, size=at.size),))
        assert score(reading, pair)["pasted"] == pasted
    assert score(Reading(pair.panel.scene, ()), pair)["pasted"] == 0
    same = replace(pair, shown=(replace(pair.shown[0], placed=(wanted,)),))
    assert "pasted" not in score(reading, same)


def test_look_is_the_mean_of_colour_pattern_face_and_hue():
    pair, (subject,) = of("one")
    wrong = replace(subject, accessory="hat" if subject.accessory != "hat" else "scarf")
    assert score(Reading(pair.panel.scene, (seen(wrong),)), pair)["look"] == 1
    other = seen(subject, colour="red" if subject.colour != "red" else "blue", face=(subject.face + 1) % 5)
    assert score(Reading(pair.panel.scene, (other,)), pair)["look"] == 0.5


def test_who_tries_something_on_is_told_from_who_wears_it():
    pair, (subject,) = of("try-on")
    wearer = pair.shown[1].placed[0].subject
    assert pair.shown[0].placed[0].subject == replace(subject, accessory="none")
    assert wearer.accessory == subject.accessory != "none" and len(pair.references) == 2
    assert wearer.shape != subject.shape and wearer.colour != subject.colour
    best = score(Reading(pair.panel.scene, (seen(subject),)), pair, "accessory")
    assert best["asked for"] == best["traits"] == 1 and best["swapped"] == best["confused"] == 0
    looks = {mark: getattr(wearer, mark) for mark in judge_uno.MARKS}
    assert score(Reading(pair.panel.scene, (seen(subject, **looks),)), pair, "accessory")["swapped"] == 1


def test_an_arm_is_measured_with_its_references_and_with_none(monkeypatch):
    calls = []

    def generate(networks, prompts, grid, seeds, options, references):
        calls.append((prompts, seeds, references, options))
        return torch.full((len(prompts), 3, 64, 64), float(len(calls)))

    def read(reader, image):  # the first run shows the true panels, the others nobody
        return [Reading(p.panel.scene, tuple(map(seen, [o.subject for o in p.panel.placed])) if image[0, 0, 0, 0] == 1
                        else ()) for p in drawn]  # fmt: skip

    drawn = pairs.make_pairs("two", 3, judge_uno.SEED, held_out=True)
    monkeypatch.setattr(judge_uno, "generate", generate)
    monkeypatch.setattr(judge_uno, "read", read)
    told = {"offset": "h", "offset_scale": 3.0, "posterior": "mean", "reference_attention": "alone", "ref_size": 48}
    about = {f"iclora.{name}": str(value) for name, value in told.items()}
    figures, rows = judge_uno.measure("two", None, about, judge_uno.Ruler(None), 3)
    own, none = (references for _, _, references, _ in calls)
    assert none == () and [[p.tobytes() for p in some] for some in own] == [
        [p.tobytes() for p in pair.references] for pair in drawn
    ]
    assert len({str(prompts) + str(seeds) for prompts, seeds, _, _ in calls}) == 1
    assert all(options == Options(guidance=4.0, **told) for _, _, _, options in calls)
    assert figures["all right"] == [1, 1, 1] and len(rows) == 1
    assert figures[f"traits, {NONE}"] == [0, 0, 0]


def told_of(figures, judged=UNO_WITH_BARS, trainings=()):
    """What the details of two subjects say of figures, given as own, none and ceiling: the last three cells."""
    values = {}
    for name, (own, none, _) in figures.items():
        values |= {name: own, f"{name}, {NONE}": none}
    values = {name: np.broadcast_to(each, (*trainings, len(each))) for name, each in values.items()}
    most = {name: ceiling for name, (*_, ceiling) in figures.items()}
    cells = [line.split(" | ") for line in judged.details("two", "arm", values, most)]
    assert [len(each) for each in cells] == [HEAD[2].count("|") - 1] * len(figures)
    return {each[1]: [each[-3].split(" ")[0], *each[-2:]] for each in cells}


def test_bars_are_shares_above_chance_but_for_scenes_and_for_swapping_what_it_adds_to_chance():
    low, most = [0.2, 0.2], [0.9, 0.9]
    figures = {"all right": ([0.7, 0.7], low, most), "scene": ([0.95] * 2, most, most),
               "swapped": ([0.24, 0.24], low, [0, 0]), "pasted": ([0.1, 0.1], low, [0, 0])}  # fmt: skip
    assert told_of(figures) == told_of(figures, trainings=(3,)) == {
        "all right": ["71.4", "at least 65%", "reached |"], "swapped": ["4.0", "at most 5%", "reached |"],
        "scene": ["95.0", "", " |"], "pasted": ["-10.0", "", " |"],
    }  # fmt: skip
    figures |= {"all right": ([0.6] * 2, low, most), "swapped": ([0.26] * 2, low, [0, 0])}
    found = told_of(figures)
    assert [found[name][2] for name in ("all right", "swapped")] == ["**missed** |"] * 2
    assert {each[1] for each in told_of(figures, UNO).values()} == {""}, "bars are those of the bundled LoRA"
    assert EXPERIMENTS["tiny-uno"].judge is UNO_WITH_BARS
    assert BARS == {("one", "look"): 0.8, ("one", "scene"): 0.95, ("two", "all right"): 0.65, ("two", "swapped"): 0.05}


def test_a_share_above_chance_is_not_told_where_true_pictures_have_no_more():
    figures = {"all right": ([1, 1], [0.5, 0.5], [0.5, 0.5])}
    assert told_of(figures) == {"all right": ["", "", " |"]}


def test_scores_of_the_paper_stand_beside_those_of_the_controls():
    names = ("traits", "DINO", "CLIP-I")
    figures = {name: [0.6, 0.6] for name in names} | {f"{name}, {NONE}": [0.1, 0.1] for name in names}
    lines = controls("one", "arm", figures, {name: [0.8, 0.8] for name in names})
    assert [line.split(" | ")[1] for line in lines] == list(names)
    means = [[cell.split(" ")[0] for cell in line.split(" | ")[2:4]] for line in lines]
    assert means == [["60.0", "10.0"]] * len(names)


# arms


def chain(training):
    return [] if training is None else [*chain(training.start), training]


def test_every_training_is_a_command_that_parses_and_pairs_that_exist():
    for one in OURS.values():
        for training in (step for arm in one.arms for step in chain(arm.training)):
            parse(TrainConfig, ["--method", "uno", "--stage", str(training.stage), *training.flags], "")
            made = {*circle.FILTERS, *circle.SECOND}
            assert {kind for kind, _ in training.data} <= {*pairs.KINDS, "redrawn", *made}
            enough = circle.COUNT if training.data[0][0] in made else 0.95 * 2000
            assert sum(count for _, count in training.data) >= enough
            assert training.start is None or training.stage == 2


def test_arms_of_a_case_differ_and_what_they_share_is_one_training():
    for name, one in OURS.items():
        assert len({(arm.task, arm.name) for arm in one.arms}) == len(one.arms)
        if name != "tiny-uno":
            assert len({(arm.task, arm.training) for arm in one.arms}) == len(one.arms)
    first = {step for arm in EXPERIMENTS["stages"].arms for step in chain(arm.training)}
    assert all(
        any(first & set(chain(arm.training)) for arm in EXPERIMENTS[name].arms)
        for name in ("offsets", "cropped", "cold", "scale", "rank", "number", "edits")
    )


def test_flags_that_are_left_out_are_the_trainers_defaults():
    told = {**TRAINING["uno"], **TINY_TRAINING["uno"]}
    assert {flag: float(value) if value.isdigit() else value for flag, value in DEFAULTS.items()} == {
        "--offset": told["offset"], "--offset-scale": told["offset_scale"], "--rank": told["rank"],
        "--reference-attention": told["reference_attention"],
    }  # fmt: skip


def test_the_papers_tables_are_complete_and_cold_starts_take_as_many_steps_in_all_and_of_stage_ii():
    for warm, whole, second in (EXPERIMENTS["cold"].arms[:3], EXPERIMENTS["cold"].arms[3:]):
        steps = [sum(step.length for step in chain(arm.training)) for arm in (warm, whole, second)]
        assert len(chain(warm.training)) == 2 and whole.training.start is second.training.start is None
        assert steps[0] == steps[1] and steps[2] == warm.training.length
        assert {arm.training.data for arm in (whole, second)} == {warm.training.data}
    kinds = [[kind for kind, _ in arm.training.data] for arm in EXPERIMENTS["cropped"].arms]
    assert kinds == [["redrawn"], ["two"], ["cropped"]]
    offsets = {(arm.task, *arm.training.flags) for arm in EXPERIMENTS["offsets"].arms}
    assert {flags[2:] or ("d",) for flags in offsets} == {("d",), ("h",), ("w",), ("o",)} and len(offsets) == 8
    alone = EXPERIMENTS["alone"]
    told = [(arm.task, step.flags) for arm in alone.arms for step in chain(arm.training)]
    flags = ("--reference-attention", "alone")
    assert told == [("one", ()), ("one", flags), *[("two", ())] * 2, *[("two", flags)] * 2]


# what is bundled


@pytest.mark.parametrize(("name", "experiment"), [("uno", "tiny-uno"), ("walk", "bundled")])
def test_the_figures_of_bundled_loras_are_theirs(name, experiment):
    values = ROOT / "lab" / "results" / f"{experiment}.json"
    if not values.exists():
        pytest.skip(f"{experiment} was not run on this base; python -m lab.experiments {experiment} does")
    rows = json.loads(values.read_text())["rows"]
    marks = {row["loras"][0] for row in rows if row.get("loras") and row["loras"][0]}  # of the first seed
    assert marks == {fingerprint([find_model("tiny").root / "loras" / f"{name}.safetensors"])}


def test_the_bundled_uno_takes_colours_from_references():
    networks, about = experiments.with_lora("tiny", find_model("tiny").root / "loras" / "uno.safetensors")
    reader, drawn = experiments.load_ruler("tiny"), pairs.make_pairs("one", 8, judge_uno.SEED, held_out=True)
    right = []
    for references in ([pair.references for pair in drawn], ()):
        made = judge_uno.make_pictures(networks, about, [pair.prompt for pair in drawn], references)
        figures = judge_uno.judge("one", replace(reader, eyes=None), made, drawn)
        right.append((np.mean(figures["colour"]), np.mean(figures["scene"])))
    assert right[0][0] >= 0.75 and right[1][0] <= 0.25, "with references, and without"
    assert right[0][1] == right[1][1] == 1


def test_the_bundled_walk_walks_and_the_base_does_not():
    reader, sets = experiments.load_ruler("tiny").reader, task_sets("walk", 6, judge.SEED, held_out=True)
    walked = []
    for lora in (find_model("tiny").root / "loras" / "walk.safetensors", None):
        networks, about = experiments.with_lora("tiny", lora)
        captions = [one.caption for one in sets]
        made = generate(networks, captions, GRIDS["walk"], range(6), judge.options_of(about))
        walked.append(np.mean(judge.judge("walk", reader, made, sets)))
    assert walked[0] >= 0.8 and walked[1] <= 0.2
