import gc
import json
import os
import re
import shutil
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import iclora.fitted as fitting
import iclora.pipeline as pipeline
import sample
from golden import FLUX, GOLDEN
from iclora.cards import MemoryPlan
from iclora.cli import read_jobs
from iclora.config import SampleConfig
from iclora.fitted import Fitted
from iclora.layout import generate_mask
from iclora.pipeline import Pipeline, encode_panels
from iclora.plan import make_plan
from iclora.record import describe
from iclora.records import read_set
from model.autoencoder import AutoEncoder, decode_tiled
from model.compiled import WAIT
from model.tables import is_modulation, make_tables
from model.text import TextEncoders
from model.weights import examples_folder, find_model
from sampling.flow import euler
from sampling.images import fit, open_picture, to_picture
from sampling.latents import noise, pack, unpack

PROMPT = "two foxes: [IMAGE1] a fox, [IMAGE2] the fox"
SMALL = {"grid": "1x2", "panel_size": "32", "steps": 3, "prompt": PROMPT}


def plan_for(**values):
    """A plan on the tiny model, and the notes on the way to it."""
    notes = []
    settings = {"device": "cpu", "grid": "1x2", "steps": 3, **values}
    return make_plan(SampleConfig(**settings), notes.append), notes


def small(**values):
    """A plan for a small, quick picture."""
    return plan_for(**{**SMALL, **values})[0]


@pytest.fixture(scope="module")
def networks():
    """One pipeline for all: what is loaded stays loaded."""
    return Pipeline.load("tiny", device="cpu")


def sample_one(networks, plan, progress=lambda: None):
    (result,) = networks.run(plan, progress)
    return result


def pictures(folder, number, seed=0, size=(64, 64)):
    draw = np.random.default_rng(seed)
    paths = [folder / f"{name}.png" for name in range(1, number + 1)]
    for path in paths:
        Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return tuple(map(str, paths))


def bare_model(folder, ignore="flux1-*"):
    """A copy of the tiny model without some of its files."""
    shutil.copytree(find_model("tiny").root, folder, ignore=shutil.ignore_patterns(ignore, "examples"))
    return folder


# what is assumed, and said


def test_without_panels_the_bundled_example_and_its_caption_are_used_and_said():
    plan, notes = plan_for(grid="2x2", mask="3")
    assert sorted(plan.kept) == [1, 2, 4] and plan.generated == (3,)
    assert notes == [f"no panels given: the bundled 2x2 example is used, with its caption: {plan.caption}"]
    assert "[IMAGE4]" in plan.caption


@pytest.mark.parametrize("grid", ["1x2", "2x1", "2x2", "3x1"])
def test_every_bundled_example_is_complete_and_its_caption_fits_its_grid(grid):
    rows, cols = map(int, grid.split("x"))
    found = read_set(examples_folder() / grid)
    assert [path.name for path in found.paths] == [f"{number}.png" for number in range(1, rows * cols + 1)]
    assert len(plan_for(grid=grid, mask="2")[1]) == 1  # nothing for the linter to say


def test_with_a_prompt_the_example_gives_the_panels_alone():
    plan, notes = plan_for(mask="2", prompt=PROMPT)
    assert plan.caption == PROMPT
    assert notes == ["no panels given: the bundled 1x2 example is used, with the given prompt"]


def test_text_to_set_without_a_prompt_takes_the_examples_caption_and_none_of_its_panels():
    plan, notes = plan_for(grid="2x2")
    assert plan.generated == (1, 2, 3, 4) and not plan.kept
    assert notes == [f"no prompt given: the caption of the bundled 2x2 example is used: {plan.caption}"]


def test_text_to_set_with_a_prompt_needs_nothing_else():
    plan, notes = plan_for(prompt=PROMPT)
    assert (plan.caption, plan.kept, plan.drafts, notes) == (PROMPT, {}, {}, [])


def test_the_kept_panels_alone_are_assigned_in_reading_order(tmp_path):
    given = pictures(tmp_path, 2)
    plan, notes = plan_for(grid="3x1", mask="2", panels=given, prompt="[IMAGE1] a [IMAGE2] b [IMAGE3] c")
    assert {panel: source.path for panel, source in plan.kept.items()} == {1: given[0], 3: given[1]}
    assert notes == []


def test_masked_panels_of_a_whole_grid_are_ignored_unread_and_said(tmp_path):
    given = pictures(tmp_path, 2)
    (tmp_path / "2.png").write_bytes(b"no picture")
    plan, notes = plan_for(mask="2", panels=given, prompt=PROMPT)
    assert list(plan.kept) == [1] and not plan.drafts
    assert notes == ["masked panels are generated, so the given ones are ignored: 2 (2.png); --strength uses them"]


def test_strength_below_one_makes_masked_panels_drafts(tmp_path):
    plan, notes = plan_for(mask="2", panels=pictures(tmp_path, 2), prompt=PROMPT, strength=0.5)
    assert (list(plan.kept), list(plan.drafts), notes) == ([1], [2], [])


def test_a_set_is_read_in_natural_order_with_its_caption(tmp_path):
    pictures(tmp_path, 10)
    (tmp_path / "other.png").write_bytes(b"")
    (tmp_path / "caption.txt").write_text("\ufeffa \n caption\n", encoding="utf-8")
    (tmp_path / "set.json").write_text('{"grid": "2x1"}')  # a set may also be all that a folder for train.py holds
    found = read_set(tmp_path)
    assert [path.stem for path in found.paths] == [str(number) for number in range(1, 11)]
    assert found.caption == "a caption"


def test_panel_prompts_make_a_joint_caption_with_the_prompt_as_summary():
    plan, _ = plan_for(prompt="Foxes:", panel_prompt=("one", "two"))
    assert plan.caption == "Foxes: [IMAGE1] one [IMAGE2] two"


def test_a_preset_brings_its_markers_and_tag():
    plan, notes = plan_for(preset="film-storyboard", grid=None, panel_prompt=("a", "b", "c"))
    assert plan.caption == "[MOVIE-SHOTS] [SCENE-1] a [SCENE-2] b [SCENE-3] c"
    assert plan.config.grid == "3x1" and notes == []


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"prompt": "a fox"}, "prompt: it has no markers, but the 1x2 grid takes"),
        ({"prompt": " "}, "prompt: the prompt is empty"),
        ({"preset": "sparklers-visual-effect", "grid": None, "prompt": "[TOP] a [BOTTOM] b"}, "begin with .REAL-SPARK"),
        (
            {"preset": "film-storyboard", "grid": None, "prompt": "a fox"},
            r"takes \[SCENE-1\] to \[SCENE-3\], each once",
        ),
        ({"preset": "font-design", "grid": None, "prompt": "a fox"}, r"takes \[TOP-LEFT\] \[TOP-RIGHT\] \[BOT"),
        ({"prompt": PROMPT, "panel_size": "512"}, "tiny knows panels of 64x64; 512x512 comes out badly, try --panel-s"),
        ({"prompt": "x", "grid": "5x1"}, "tiny knows grids of 1x1, 1x2, 2x1, 2x2, 3x1; a 5x1 grid comes out badly"),
    ],
)
def test_doubts_are_noted(values, note):
    assert any(re.search(note, line) for line in plan_for(**values)[1])


def test_guidance_for_a_model_without_it_is_ignored_and_said(tmp_path):
    shutil.copy(FLUX["schnell"], bare_model(tmp_path / "m"))
    plan, notes = plan_for(model=str(tmp_path / "m"), prompt=PROMPT, guidance=2.0, steps=None)
    assert (plan.config.guidance, plan.config.steps, plan.defaults.name) == (None, 20, "tiny")
    assert notes == ["m has no guidance; --guidance 2 is ignored"]


def test_how_much_of_a_long_prompt_is_read_is_noted():
    notes, (plan, _) = [], plan_for(prompt=PROMPT + " fox" * 400)
    Pipeline(plan.config, notes.append).read_captions([plan])
    assert any(re.search("T5 reads 64 of the prompt's [0-9]+ tokens", line) for line in notes)


@pytest.mark.parametrize(
    ("size", "fit", "expected"),
    [
        ((64, 64), "crop", None),
        ((640, 640), "crop", None),
        ((70, 64), "crop", None),
        ((128, 64), "crop", "the crop cuts 50% of it away (--fit pad keeps all)"),
        ((128, 64), "pad", None),
        ((128, 64), "stretch", None),
        ((32, 32), "crop", "it is enlarged 2.0 times"),
        ((32, 16), "crop", "the crop cuts 50% of it away (--fit pad keeps all), and it is enlarged 4.0 times"),
        ((32, 16), "pad", "it is enlarged 2.0 times"),
    ],
)
def test_what_a_crop_cuts_away_and_what_is_enlarged_is_noted(tmp_path, size, fit, expected):
    given = pictures(tmp_path, 2, size=size)
    notes = plan_for(mask="2", prompt=PROMPT, panels=given[:1], fit=fit)[1]
    assert notes == ([f"1.png becomes 64x64 pixels: {expected}"] if expected else [])


def test_a_prompt_without_markers_asks_for_one_picture_unless_more_is_said(tmp_path):
    def grid(**values):
        return plan_for(**{"grid": None, "prompt": "a cat", **values})[0].config.grid

    assert grid() == "1x1" and plan_for(grid=None, prompt="a cat")[1] == []
    assert grid(prompt="[IMAGE1] a cat [IMAGE2] b [IMAGE3] c [IMAGE4] d") == grid(mask="3") == "2x2"
    assert grid(panel_prompt=("a", "b", "c", "d")) == "2x2"
    assert grid(preset="film-storyboard") == "3x1"
    assert grid(grid="1x2") == "1x2"


# what is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask": "5"}, "mask '5': 5 does not fit the grid"),
        ({"mask": ""}, "--mask is empty; give it a value"),
        ({"grid": "2by2"}, "grid '2by2' is not ROWSxCOLS"),
        ({"grid": "99x99"}, "grid 99x99 has 9801 panels"),
        ({"panel_size": "33"}, "panel size 33x33 is not in multiples of 16 pixels; use 32x32 or"),
        ({"model": "flux-nowhere"}, "there is no model 'flux-nowhere'"),
        ({"strength": 0.1}, "strength 0.1 leaves no step of 3"),
        (
            {"grid": "5x1", "mask": "3"},
            r"give panels \(--panels or --set\) and a --prompt: there is no bundled example",
        ),
        ({"grid": "5x1"}, "give a --prompt: there is no bundled example of a 5x1 grid, only 1x2, 2x1, 2x2, 3x1"),
        ({"grid": "5x1", "mask": "3", "prompt": "x"}, r"give panels \(--panels or --set\): there is no"),
        ({"panels": ("a.png",), "set": "b"}, "--panels and --set are two ways"),
        ({"set": "nowhere"}, "there is no folder 'nowhere'; --set takes one with 1.png"),
        ({"set": "sets/sketch"}, "sets/sketch holds many sets, for train.py; --set takes a folder with 1.png"),
        ({"panel_prompt": ("a", "b", "c")}, "3 --panel-prompt for the 2 panels of the 1x2 grid; give one for each"),
        ({"prompt": "a\0b"}, "the prompt is not plain text: character 2"),
        ({"prompt": "a\udcffb"}, "the prompt is not plain text"),
        (
            {"prompt": PROMPT, "panels": ("nowhere.png", "x.png"), "mask": "2"},
            "cannot read nowhere.png: there is no such",
        ),
        (
            {"prompt": PROMPT, "panels": ("a", "b", "c"), "mask": "2"},
            r"3 panels given; mask 2 in a 1x2 grid takes the 1 kept ones \(1\) or all 2; --mask says",
        ),
        ({"prompt": PROMPT, "panels": ("a",)}, "1 panels given; mask 1,2 in a 1x2 grid takes none, as all are gen"),
        (
            {"prompt": PROMPT, "panels": ("a",), "mask": "2", "strength": 0.5},
            "1 panels given; --strength 0.5 starts from drafts and needs all 2 of the 1x2 grid",
        ),
        ({"preset": "film-storyboard", "grid": "2x3", "prompt": None}, "there is no bundled example of a 2x3"),
        ({"preset": "font-design", "grid": "2x3", "panel_prompt": tuple("abcdef")}, "2x3 grid has no position markers"),
    ],
)
def test_what_cannot_work_is_refused_before_a_network_loads(monkeypatch, values, message):
    monkeypatch.setattr(pipeline, "load_text_encoders", None)
    with pytest.raises(ValueError, match=message) as caught:
        plan_for(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"--device {name} is not available .*; use cpu, or auto"):
        plan_for(device=name)
    assert plan_for(device="auto")[0].config.device == "cpu"


def test_sets_that_say_too_little_or_too_much_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures named 1.png, 2.png"):
        plan_for(set=str(tmp_path), mask="2")
    pictures(tmp_path, 2)
    with pytest.raises(ValueError, match="there is no prompt; give --prompt, or --panel-prompt for each panel"):
        plan_for(set=str(tmp_path), mask="2")
    (tmp_path / "caption.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="cannot read .*caption.txt: it is not UTF-8 text"):
        plan_for(set=str(tmp_path), mask="2")
    (tmp_path / "caption.txt").write_text(PROMPT)
    shutil.copy(tmp_path / "1.png", tmp_path / "01.png")
    with pytest.raises(ValueError, match="holds 01.png and 1.png, the same number twice"):
        plan_for(set=str(tmp_path), mask="2")


@pytest.mark.parametrize("part", ["flux1-tiny.safetensors", "ae.safetensors", "text_encoder_2/model.safetensors"])
def test_a_cut_off_weight_file_is_refused_before_a_network_loads(tmp_path, monkeypatch, part):
    monkeypatch.setattr(pipeline, "load_text_encoders", None)
    root = find_model("tiny").root
    part = next(root.glob("flux1-*")).name if part.startswith("flux1") else part
    shutil.copytree(root, tmp_path / "m", ignore=shutil.ignore_patterns("examples"))
    data = (root / part).read_bytes()
    (tmp_path / "m" / part).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{part} is no safetensors file, or it is cut short"):
        describe(plan_for(model=str(tmp_path / "m"), prompt=PROMPT)[0])  # sample.py records it before it loads any


# what comes out


def test_kept_panels_come_back_bit_for_bit_and_the_others_are_generated(networks, tmp_path):
    given = pictures(tmp_path, 2, size=(40, 30))
    result = sample_one(networks, small(mask="2", panels=given))
    kept = fit(open_picture(given[0]), 32, 32)
    assert result.composite.size == (64, 32) and list(result.panels) == [2]
    assert result.composite.crop((0, 0, 32, 32)).tobytes() == kept.tobytes()
    assert result.composite.crop((32, 0, 64, 32)).tobytes() == result.panels[2].tobytes()
    assert {"text", "panels", "transformer", "sampling", "decoding"} <= result.seconds.keys()


def test_nothing_of_a_masked_panel_leaks_into_the_result(networks, tmp_path):
    given = pictures(tmp_path, 2)
    before = sample_one(networks, small(mask="2", panels=given)).composite
    Image.new("RGB", (64, 64), "red").save(given[1])
    assert sample_one(networks, small(mask="2", panels=given)).composite.tobytes() == before.tobytes()


def test_what_is_encoded_is_zero_under_the_mask_and_drafts_are_encoded_apart(networks, tmp_path, monkeypatch):
    seen, encode = [], AutoEncoder.encode
    monkeypatch.setattr(AutoEncoder, "encode", lambda self, image: seen.append(image.clone()) or encode(self, image))
    sample_one(networks, small(mask="2", panels=pictures(tmp_path, 2), strength=0.5))
    drafts, kept = (image for image in seen if image.shape[-1] == 64)  # and not a panel alone
    assert not kept[..., 32:].any() and kept[..., :32].any()
    assert not drafts[..., :32].any() and drafts[..., 32:].any()


def test_the_kept_panels_do_influence_the_generated_one(networks, tmp_path):
    given = pictures(tmp_path, 1)
    before = sample_one(networks, small(mask="2", panels=given)).panels[2]
    Image.new("RGB", (64, 64), "red").save(given[0])
    assert sample_one(networks, small(mask="2", panels=given)).panels[2].tobytes() != before.tobytes()


def test_the_seed_decides_and_nothing_else(networks):
    results = list(networks.run(small(seed=1, num=2)))
    again = sample_one(Pipeline.load("tiny", device="cpu"), small(seed=1))
    assert [result.seed for result in results] == [1, 2]
    first, second = (result.composite.tobytes() for result in results)
    assert first == again.composite.tobytes() != second


def test_strength_one_is_plain_sampling_whatever_the_drafts(networks, tmp_path):
    given = pictures(tmp_path, 2)
    plain = sample_one(networks, small(mask="2", panels=given[:1])).composite
    assert sample_one(networks, small(mask="2", panels=given, strength=1.0)).composite.tobytes() == plain.tobytes()


def encoded(networks, plan):
    """The tokens of kept panels and drafts, and the mask, which is 1 where tokens are generated."""
    mask = generate_mask(plan.generated, plan.layout)
    with torch.inference_mode():
        return encode_panels(networks.autoencoder, plan, mask), mask


def test_below_full_strength_the_path_starts_between_draft_and_noise(networks, tmp_path, monkeypatch):
    plan = small(mask="2", panels=pictures(tmp_path, 2), strength=0.7, seed=5)
    sample_one(networks, plan)  # loads what is missing
    (data, _), eps = encoded(networks, plan), pack(noise(32, 64, seed=5))

    def straight_to_the_draft(flux, x, times, *more):
        return euler(lambda x, t: eps - data, x, times, more[-1])

    monkeypatch.setattr(pipeline, "denoise", straight_to_the_draft)
    panel = sample_one(networks, plan).panels[2]
    with torch.inference_mode():
        draft = to_picture(networks.autoencoder.decode(unpack(data, 4, 8))).crop((32, 0, 64, 32))
    assert abs(np.asarray(panel, dtype=float) - np.asarray(draft)).max() <= 1


def test_only_the_last_part_of_the_steps_is_made_from_a_draft(networks, tmp_path):
    calls = []
    plan = small(mask="2", panels=pictures(tmp_path, 2), steps=10, strength=0.35)
    sample_one(networks, plan, lambda: calls.append(1))
    assert len(calls) == 3


def test_a_kept_panel_never_sees_the_draft_beside_it(networks, tmp_path):
    given = pictures(tmp_path, 2)
    plan = small(mask="2", panels=given, strength=0.5)
    sample_one(networks, plan)
    before, mask = encoded(networks, plan)
    Image.new("RGB", (64, 64), "red").save(given[1])
    after, _ = encoded(networks, small(mask="2", panels=given, strength=0.5))
    drafted = mask.bool().expand_as(before)
    assert torch.equal(after[~drafted], before[~drafted])
    assert not torch.equal(after[drafted], before[drafted])


def test_the_point_stays_in_float32_between_the_steps_of_a_bfloat16_model(monkeypatch):
    points, denoise = [], pipeline.denoise

    def watched(flux, x, *more):
        *more, after_step = more
        points.append(x)
        return denoise(flux, x, *more, lambda x, t: points.append(x) or after_step(x, t))

    monkeypatch.setattr(pipeline, "denoise", watched)
    networks = Pipeline.load("tiny", device="cpu", dtype="bfloat16")
    sample_one(networks, small(dtype="bfloat16"))
    assert networks.flux.img_in.weight.dtype == torch.bfloat16
    assert len(points) == 4 and {x.dtype for x in points} == {torch.float32}


def test_tiles_are_used_when_asked_for(networks, monkeypatch):
    monkeypatch.setattr(pipeline, "decode_tiled", partial(decode_tiled, tile=3, overlap=1))
    whole, tiled = (sample_one(networks, small(tile=tile)).composite for tile in (False, True))
    assert whole.size == tiled.size and whole.tobytes() != tiled.tobytes()


def test_a_transformer_beside_encoders_of_another_model_is_refused(tmp_path):
    shutil.copy(FLUX["schnell"], bare_model(tmp_path / "m"))
    plan = small(model=str(tmp_path / "m"))
    with pytest.raises(ValueError, match="encoders beside m give widths .* use the encoders that belong to it"):
        sample_one(Pipeline(plan.config), plan)


# what is loaded, and what stays


class Counted:
    """Counts what a pipeline loads and reads."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name in ("load_text_encoders", "load_autoencoder", "load_flux"):
            monkeypatch.setattr(pipeline, name, self.counting(name, getattr(pipeline, name)))
        monkeypatch.setattr(TextEncoders, "encode", self.counting("encode", TextEncoders.encode))

    def counting(self, name, real):
        return lambda *args: self.calls.append(name) or real(*args)


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


LOADED = ["load_text_encoders", "encode", "load_autoencoder", "load_flux"]


def test_a_second_request_loads_no_network_again(counted):
    networks = Pipeline.load("tiny", device="cpu")
    assert counted.calls == [], "networks load with the first request"
    first = networks(**SMALL)
    assert counted.calls == LOADED
    second = networks(**{**SMALL, "prompt": PROMPT + " in the snow", "seed": 1})
    assert counted.calls == [*LOADED, "encode"]
    assert first.composite.tobytes() != second.composite.tobytes()


def test_a_caption_is_read_once_whatever_else_changes(counted, tmp_path):
    networks = Pipeline.load("tiny", device="cpu")
    networks(**SMALL)
    networks(**{**SMALL, "seed": 1, "panel_size": "16"})
    networks(**SMALL, mask="2", panels=list(pictures(tmp_path, 1)))
    assert counted.calls == LOADED and len(networks.texts) == 1
    networks(**{**SMALL, "grid": "2x1"})
    assert len(networks.texts) == 2, "of another grid, as panels may read their own parts"


FittedPipeline = type("FittedPipeline", (Fitted, Pipeline), {})


def with_fit(plan, **techniques):
    return replace(plan, memory_plan=MemoryPlan(**techniques))


def test_captions_of_large_models_are_read_once_whatever_process_asks(counted, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "BIG", 0)
    monkeypatch.setattr(fitting, "load_text_encoders", pipeline.load_text_encoders)  # which is counted
    captions = [PROMPT, "[IMAGE1] a quincunx, [IMAGE2] " + "a very long caption, " * 200]
    plans, made, notes = [with_fit(small(prompt=caption, out=str(tmp_path))) for caption in captions], [], ([], [], [])
    for told in notes[:2]:
        networks = FittedPipeline(plans[0].config, told.append)
        networks.read_captions(plans)
        made.append(networks.texts)
    assert counted.calls == ["load_text_encoders", "encode", "encode"]
    assert notes[0] == notes[1] and len(notes[0]) > 1, "what was told of a caption is told again"
    for key, tensors in made[0].items():
        assert all(torch.equal(*pair) for pair in zip(tensors, made[1][key], strict=True))
    entry = next((tmp_path / ".cache").glob("*/*/*.safetensors"))
    entry.write_bytes(entry.read_bytes()[:-1])  # damaged: read anew
    FittedPipeline(plans[0].config, notes[2].append).read_captions(plans)
    assert len(counted.calls) == 5 and sorted(notes[2]) == sorted(notes[0])
    half = with_fit(small(dtype="bfloat16", out=str(tmp_path)))
    FittedPipeline(half.config, notes[2].append).read_captions([half])
    assert len(counted.calls) == 7, "another type gives other features"


def test_features_that_were_not_used_for_longest_go_first(counted, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "BIG", 0)
    monkeypatch.setattr(fitting, "MOST", 2)
    texts = [f"[IMAGE1] a {word}, [IMAGE2] it" for word in ("cat", "dog", "fox")]
    plans = [with_fit(small(prompt=text, out=str(tmp_path))) for text in texts]
    for number in (0, 1, 0, 2):
        FittedPipeline(plans[0].config).read_captions([plans[number]])
        for path in tmp_path.glob(".cache/*/*/*.safetensors"):
            os.utime(path, (path.stat().st_mtime - 10,) * 2)  # each request lies ten seconds behind the next
    known = []
    for plan in plans[::2] + plans[1:2]:
        counted.calls.clear()
        FittedPipeline(plans[0].config).read_captions([plan])
        known.append(not counted.calls)
    assert known == [True, True, False]


def test_small_models_keep_no_captions_on_disk(tmp_path):
    FittedPipeline(SampleConfig(out=str(tmp_path / "out"))).read_captions([with_fit(small())])
    assert not (tmp_path / "out").exists()


def test_another_lora_loads_the_transformer_alone_and_the_same_one_nothing(counted, tmp_path):
    networks, lora = Pipeline.load("tiny", device="cpu"), str(find_model("tiny").root / "loras" / "uno.safetensors")
    plain = networks(**SMALL)
    networks(**SMALL, lora=[lora])
    assert counted.calls == [*LOADED, "load_flux"]
    networks(**SMALL, lora=[lora], seed=1)
    assert counted.calls == [*LOADED, "load_flux"]
    networks(**SMALL, lora=[f"{lora}:0.5"])
    assert counted.calls == [*LOADED, "load_flux", "load_flux"]
    assert networks(**SMALL).composite.tobytes() == plain.composite.tobytes()


def test_a_lora_that_was_written_anew_is_loaded_anew(tmp_path):
    first, second = (find_model("tiny").root / "loras" / f"{name}.safetensors" for name in ("uno", "walk"))
    networks, file = Pipeline.load("tiny", device="cpu", steps=1), tmp_path / "lora.safetensors"
    made = []
    for source in (first, second):
        file.write_bytes(source.read_bytes())
        made.append(networks(**SMALL, lora=str(file)).composite.tobytes())
    assert made[1] == networks(**SMALL, lora=str(second)).composite.tobytes() != made[0]


def test_a_transformer_that_could_not_be_loaded_does_not_count_as_there(monkeypatch):
    networks, lora = Pipeline.load("tiny", device="cpu"), str(find_model("tiny").root / "loras" / "uno.safetensors")
    plain = networks(**SMALL)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("iclora.pipeline.load_flux", lambda *given: open("/nowhere"))
        networks(**SMALL, lora=[lora])
    assert networks(**SMALL).composite.tobytes() == plain.composite.tobytes()


def make_fitted(monkeypatch, **techniques):
    """A pipeline with techniques of a card, on the CPU."""
    monkeypatch.setattr(fitting, "add_memory_plans", lambda plans: [with_fit(plan, **techniques) for plan in plans])
    return FittedPipeline(SampleConfig(device="cpu"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_large_model_on_a_gpu_has_tables_of_modulations_and_on_a_cpu_none(monkeypatch, device):
    made = []
    for name in ("make_tables", "move", "offload"):
        monkeypatch.setattr(fitting, name, lambda *given, name=name: made.append(name))
    fitting.prepare(None, SampleConfig(device=device), MemoryPlan(tables=True), None)
    assert made == ["make_tables"] * (device == "cuda") + ["move"]


def test_captions_of_plans_that_nobody_fitted_are_read_and_none_are_nothing():
    networks = Pipeline.load("tiny", device="cpu", quantize="fp8")
    networks.read_captions([])
    assert networks.encoders is None
    networks.read_captions([small(quantize="fp8")])
    assert len(networks.texts) == 1


def test_fp8_that_a_plan_chooses_is_what_is_loaded():
    flux = fitting.load_fitted(
        find_model("tiny").flux, SampleConfig(device="cpu", dtype="float32"), MemoryPlan(quantize="fp8"), (), None
    )
    assert flux.double_blocks[0].img_attn.qkv.weight.itemsize == 1


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_modulations_that_become_tables_never_come_to_the_card(quantize):
    config, plan = SimpleNamespace(device="meta", dtype="float32"), MemoryPlan(quantize=quantize, tables=True)
    flux = fitting.load_fitted(find_model("tiny").flux, config, plan, (), None)  # no card, but another device
    places = {(is_modulation(name), tensor.device.type) for name, tensor in flux.state_dict().items()}
    assert places == {(True, "cpu"), (False, "meta")}


def test_all_that_is_exact_gives_the_same_pixels_together(monkeypatch):
    lora = str(find_model("tiny").root / "loras" / "uno.safetensors")
    plain = [Pipeline.load("tiny", device="cpu")(**SMALL, **more) for more in ({}, {"lora": [lora]})]
    everything = {"free_text": True, "text_on_cpu": True, "load_on_cpu": True, "offload": True, "tables": True}
    networks, prepare = make_fitted(monkeypatch, **everything), fitting.prepare

    def on_a_card(network, config, fit, note):
        make_tables(network)
        prepare(network, config, fit, note)

    monkeypatch.setattr(fitting, "prepare", on_a_card)
    for result, more in zip(plain, ({}, {"lora": [lora]}), strict=True):
        assert networks(**SMALL, **more).composite.tobytes() == result.composite.tobytes()
        assert networks.encoders is None and networks.flux.tables.passes == 1
    networks(**SMALL, lora=[lora], seed=5)
    assert networks.flux.tables.passes == 1, "the same caption and times"


def test_compile_is_that_of_all_requests_and_told_of(monkeypatch, tmp_path):
    compiled, notes = [], []
    monkeypatch.setattr(fitting, "compile_blocks", compiled.append)
    monkeypatch.setattr("iclora.cards.check_compiler", lambda device: notes.append(device))
    networks = Pipeline.load("tiny", device="cpu", compile=True)
    networks.note = notes.append
    networks(**SMALL), networks(**SMALL, seed=1)
    assert len(compiled) == 1 and notes.count(WAIT) == 1
    with pytest.raises(ValueError, match="compile is no option of one set"):
        networks(**SMALL, compile=False)
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"compile": true}\n')
    with pytest.raises(ValueError, match="sets compile, which holds for the whole job; give --compile"):
        read_jobs(SampleConfig(jobs=str(jobs)))


@pytest.mark.slow
@pytest.mark.parametrize("short", [True, False], ids=["short", "plenty"])
def test_where_memory_is_short_encoders_and_transformer_are_never_there_together(monkeypatch, short):
    alive, seen, order = {"encoders": [], "flux": []}, [], []
    load_text, load_flux = pipeline.load_text_encoders, pipeline.load_flux

    def watched(name, load):
        def loads(*args):
            order.append(name)
            seen.append([other for other in alive if any(ref() is not None for ref in alive[other])])
            network = load(*args)
            modules = (network.t5, network.clip) if name == "encoders" else (network,)
            alive[name] = [weakref.ref(module) for module in modules]
            return network

        return loads

    monkeypatch.setattr(pipeline, "load_text_encoders", watched("encoders", load_text))
    monkeypatch.setattr(pipeline, "load_flux", watched("flux", load_flux))
    if short:
        monkeypatch.setattr(fitting, "load_text_encoders", watched("encoders", load_text))
        monkeypatch.setattr(fitting, "load_fitted", watched("flux", fitting.load_fitted))
    networks = make_fitted(monkeypatch, free_text=True) if short else Pipeline.load("tiny", device="cpu")
    gc.disable()  # so that nothing is freed by chance
    try:
        first = networks(**SMALL)
        networks(**{**SMALL, "prompt": PROMPT + " in the snow"})
        networks(**SMALL)
    finally:
        gc.enable()
    if short:
        assert order == ["encoders", "flux", "encoders", "flux"] and seen == [[], [], [], []]
    else:
        assert order == ["encoders", "flux"] and seen == [[], ["encoders"]]
    assert networks(**SMALL).composite.tobytes() == first.composite.tobytes()


# the public API


def run_command(tmp_path, *argv):
    out = tmp_path / "out"
    assert sample.main(["--device", "cpu", "--steps", "3", "--out", str(out), *map(str, argv)]) == 0
    return open_picture(out / "0001.png")


def test_pictures_from_python_give_the_commands_pixels(networks, tmp_path):
    given = pictures(tmp_path, 3, size=(80, 70))
    flags = ["--grid", "2x2", "--mask", "2", "--prompt", "[IMAGE1] a [IMAGE2] b [IMAGE3] c [IMAGE4] d", "--seed", "7"]
    made = run_command(tmp_path, *flags, "--panels", *given)
    options = {"grid": "2x2", "mask": "2", "prompt": flags[5], "seed": 7, "steps": 3}
    opened = [Image.open(path) for path in given]
    for panels in (opened, [given[0], *opened[1:]], given):
        result = networks(**options, panels=panels)
        assert result.composite.tobytes() == made.tobytes() and list(result.panels) == [2] and result.seed == 7


@pytest.mark.parametrize("name", ["references", "ref"])
def test_references_from_python_give_the_commands_pixels(networks, tmp_path, name):
    paths = sorted((find_model("tiny").root / "examples" / "references").glob("*.png"))[:2]
    made = run_command(tmp_path, "--ref", *paths, "--prompt", "a cat beside a robot")
    result = networks(**{name: [Image.open(path) for path in paths]}, prompt="a cat beside a robot", steps=3)
    assert made.size == (64, 64) and result.composite.tobytes() == made.tobytes()


def test_a_transparent_or_turned_picture_from_python_is_read_as_a_file_is(networks, tmp_path):
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (64, 64, 4), dtype=np.uint8), "RGBA").save(tmp_path / "clear.png")
    turned = Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    for path in (tmp_path / "clear.png", tmp_path / "turned.png"):
        sources = [plan_for(mask="2", prompt=PROMPT, panels=(item,))[0].kept[1] for item in (path, Image.open(path))]
        assert sources[0].picture.tobytes() == sources[1].picture.tobytes()


def test_what_python_gave_is_recorded_as_such(tmp_path):
    picture = Image.new("RGB", (64, 64), "red")
    record = json.loads(json.dumps(describe(plan_for(mask="2", panels=(picture,), prompt=PROMPT)[0])))
    assert record["config"]["panels"] == ["a PIL image"]
    assert [(entry["file"], len(entry["sha256"])) for entry in record["inputs"]] == [("a PIL image", 64)]


def test_python_may_leave_out_everything(networks):
    result = networks(steps=1)
    assert result.composite.size == (128, 128) and list(result.panels) == [1, 2, 3, 4]
    assert networks(prompt="a red cat", steps=1).composite.size == (64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "9"}, "mask '9': 9 does not fit the grid"),
        ({"steps": 0}, "--steps 0 is out of range"),
        ({"panels": ["nowhere.png"], "mask": "2"}, "cannot read nowhere.png"),
        ({"stpes": 3}, "the request sets 'stpes', which is unknown; did you mean steps"),
        ({"mask": 3}, "the request sets mask to '3', which is not a text"),
        ({"seed": "1"}, "the request sets seed to '1', which is not a whole number"),
        ({"model": "flux-dev"}, "model .*Pipeline.load"),
        ({"dtype": "bfloat16"}, "dtype .*Pipeline.load"),
        ({"num": 3}, "num is no option of one set"),
        ({"config": "out/0001.json"}, "config is no option of one set"),
        ({"ref": "nowhere.png"}, "cannot read nowhere.png"),
        ({"ref": (), "references": ()}, "references is another name for ref"),
        ({"ref": Image.new("RGB", (0, 0)), "prompt": "a cat"}, "0x0 is narrower than 32:1"),
        ({"panels": [Image.new("RGB", (1, 64))], "mask": "2", "grid": "1x2"}, "1x64 is narrower than 32:1"),
        ({"lora": "nowhere.safetensors"}, "there is no such file"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_loads(counted, options, message):
    networks = Pipeline.load("tiny", device="cpu")
    with pytest.raises(ValueError, match=message):
        networks(**{**SMALL, **options})
    assert counted.calls == []


def test_what_cannot_be_loaded_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="there is no model 'nowhere'"):
        Pipeline.load("nowhere")
    with pytest.raises(ValueError, match="there is no such file"):
        Pipeline.load("tiny", loras=["nowhere.safetensors"])
    with pytest.raises(ValueError, match="DoRA"):
        Pipeline.load("tiny", loras=[str(GOLDEN / "lora" / "refuse_dora.safetensors")])
    with pytest.raises(ValueError, match="--dtype 'int8' is unknown"):
        Pipeline.load("tiny", dtype="int8")
    for option in ({"num": 7}, {"jobs": "x"}, {"config": "x"}, {"dry_run": True}):
        with pytest.raises(ValueError, match=f"{min(option)} is an option of sample.py alone"):
            Pipeline.load("tiny", **option)
    with pytest.raises(ValueError, match="cannot read nowhere.png"):
        Pipeline.load("tiny", ref="nowhere.png")(prompt="a cat.")
    with pytest.raises(ValueError, match="Pipeline.load sets steps to '4', which is not a whole number"):
        Pipeline.load("tiny", steps="4")
    with pytest.raises(ValueError, match="Pipeline.load sets device to 'None', which is not a text"):
        Pipeline.load("tiny", device=None)


def test_options_of_all_requests_need_not_fit_a_single_panel():
    networks = Pipeline.load(
        "tiny", loras=str(find_model("tiny").root / "loras" / "walk.safetensors"), mask="2", steps=1
    )
    assert [*networks(grid="1x2").panels] == [2]
