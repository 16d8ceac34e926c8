import gc
import re
import shutil
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import iclora.pipeline as pipeline
from golden import FLUX
from iclora.config import SampleConfig
from iclora.pipeline import Pipeline, resolve
from iclora.records import read_set
from model.autoencoder import AutoEncoder, decode_tiled
from model.weights import examples_folder, find_model
from sampling.images import fit, open_picture, to_picture
from sampling.latents import noise, pack, unpack

PROMPT = "two foxes: [IMAGE1] a fox, [IMAGE2] the fox"


def plan_for(**values):
    """A plan for small, quick pictures, and the notes on the way to it."""
    notes = []
    settings = {"device": "cpu", "grid": "1x2", "panel_size": "32", "steps": 3, **values}
    return resolve(SampleConfig(**settings), notes.append), notes


def make(seed=0, **values):
    plan, _ = plan_for(**values)
    return Pipeline(plan, print).sample(seed, lambda step, steps: None)


def pictures(folder, number, seed=0, size=(40, 30)):
    draw = np.random.default_rng(seed)
    paths = [folder / f"{name}.png" for name in range(1, number + 1)]
    for path in paths:
        Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return tuple(map(str, paths))


# what is assumed, and said


def test_without_panels_the_bundled_example_and_its_caption_are_used_and_said():
    plan, notes = plan_for(grid="2x2", mask="3")
    assert sorted(plan.sources) == [1, 2, 4] and plan.masked == (3,)
    assert notes == [f"no panels given: the bundled 2x2 example is used, with its caption: {plan.config.prompt}"]
    assert "[IMAGE4]" in plan.config.prompt


@pytest.mark.parametrize("grid", ["1x2", "2x1", "2x2", "3x1"])
def test_every_bundled_example_is_complete_and_its_caption_fits_its_grid(grid):
    rows, cols = map(int, grid.split("x"))
    found = read_set(examples_folder() / grid)
    assert [path.name for path in found.paths] == [f"{number}.png" for number in range(1, rows * cols + 1)]
    assert len(plan_for(grid=grid, mask="2")[1]) == 1  # nothing for the linter to say


def test_with_a_prompt_the_example_gives_the_panels_alone():
    plan, notes = plan_for(mask="2", prompt=PROMPT)
    assert plan.config.prompt == PROMPT
    assert notes == ["no panels given: the bundled 1x2 example is used, with the given prompt"]


def test_text_to_set_without_a_prompt_takes_the_examples_caption_and_none_of_its_panels():
    plan, notes = plan_for(grid="2x2")
    assert plan.masked == (1, 2, 3, 4) and not plan.sources
    assert notes == [f"no prompt given: the caption of the bundled 2x2 example is used: {plan.config.prompt}"]


def test_text_to_set_with_a_prompt_needs_nothing_else():
    plan, notes = plan_for(prompt=PROMPT)
    assert (plan.config.prompt, dict(plan.sources), notes) == (PROMPT, {}, [])


def test_the_kept_panels_alone_are_assigned_in_reading_order(tmp_path):
    given = pictures(tmp_path, 2)
    plan, notes = plan_for(grid="3x1", mask="2", panels=given, prompt="[IMAGE1] a [IMAGE2] b [IMAGE3] c")
    assert {panel: source.path.name for panel, source in plan.sources.items()} == {1: "1.png", 3: "2.png"}
    assert notes == []


def test_masked_panels_of_a_whole_grid_are_ignored_unread_and_said(tmp_path):
    given = pictures(tmp_path, 2)
    (tmp_path / "2.png").write_bytes(b"no picture")
    plan, notes = plan_for(mask="2", panels=given, prompt=PROMPT)
    assert list(plan.sources) == [1]
    assert notes == ["masked panels are generated, so the given ones are ignored: 2 (2.png); --strength uses them"]


def test_strength_below_one_makes_masked_panels_drafts(tmp_path):
    plan, notes = plan_for(mask="2", panels=pictures(tmp_path, 2), prompt=PROMPT, strength=0.5)
    assert (sorted(plan.pictures(drafted=False)), sorted(plan.pictures(drafted=True)), notes) == ([1], [2], [])


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
    assert plan.config.prompt == "Foxes: [IMAGE1] one [IMAGE2] two"
    assert plan.config.panel_prompt == ()


def test_a_preset_brings_its_markers_and_tag():
    plan, notes = plan_for(preset="film-storyboard", grid=None, panel_prompt=("a", "b", "c"))
    assert plan.config.prompt == "[MOVIE-SHOTS] [SCENE-1] a [SCENE-2] b [SCENE-3] c"
    assert plan.config.grid == "3x1" and notes == []


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"prompt": "a fox"}, "prompt: no markers for the 2 panels of the 1x2 grid"),
        ({"prompt": " "}, "prompt: the prompt is empty"),
        ({"preset": "sparklers-visual-effect", "grid": None, "prompt": "[TOP] a [BOTTOM] b"}, "begin with .REAL-SPARK"),
        ({"prompt": PROMPT, "panel_size": "512"}, "knows small panels only; try --panel-size 64"),
    ],
)
def test_doubts_are_noted(values, note):
    assert any(re.search(note, line) for line in plan_for(**values)[1])


def test_guidance_for_a_model_without_it_is_ignored_and_said(tmp_path):
    shutil.copytree(find_model("tiny").root, tmp_path / "m", ignore=shutil.ignore_patterns("flux1-*", "examples"))
    shutil.copy(FLUX["schnell"], tmp_path / "m")
    plan, notes = plan_for(model=str(tmp_path / "m"), prompt=PROMPT, guidance=2.0, steps=None)
    assert (plan.config.guidance, plan.config.steps, plan.row.name) == (None, 20, "tiny")
    assert notes == ["m has no guidance; --guidance 2 is ignored"]


def test_the_words_that_the_encoders_lose_are_noted():
    notes = []
    Pipeline(plan_for(prompt=PROMPT + " fox" * 400)[0], notes.append)
    assert any(line.startswith("T5 reads only the start of the prompt") for line in notes)


# what is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask": "5"}, "mask '5': 5 does not fit the grid"),
        ({"mask": ""}, "the mask is empty, so there is nothing to generate; name panels with --mask"),
        ({"grid": "2by2"}, "grid '2by2' is not ROWSxCOLS"),
        ({"grid": "99x99"}, "grid 99x99 has 9801 panels"),
        ({"panel_size": "33"}, "panel size 33x33 is not in multiples of 16 pixels; use 32x32 or"),
        ({"model": "flux-nowhere"}, "there is no model 'flux-nowhere'"),
        ({"strength": 0.1}, "strength 0.1 leaves 0 of 3 steps"),
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
    with pytest.raises(ValueError, match=f"{part} is damaged"):
        plan_for(model=str(tmp_path / "m"), prompt=PROMPT)


# what comes out


def test_kept_panels_come_back_bit_for_bit_and_the_others_are_generated(tmp_path):
    given = pictures(tmp_path, 2)
    result = make(mask="2", panels=given, prompt=PROMPT)
    kept = fit(open_picture(given[0]), 32, 32)
    assert result.composite.size == (64, 32) and list(result.panels) == [2]
    assert result.composite.crop((0, 0, 32, 32)).tobytes() == kept.tobytes()
    assert result.composite.crop((32, 0, 64, 32)).tobytes() == result.panels[2].tobytes()


def test_nothing_of_a_masked_panel_leaks_into_the_result(tmp_path):
    given = pictures(tmp_path, 2)
    before = make(mask="2", panels=given, prompt=PROMPT)
    Image.new("RGB", (64, 64), "red").save(given[1])
    assert make(mask="2", panels=given, prompt=PROMPT).composite.tobytes() == before.composite.tobytes()


def test_what_is_encoded_is_zero_under_the_mask_and_drafts_are_encoded_apart(tmp_path, monkeypatch):
    seen, encode = [], AutoEncoder.encode
    monkeypatch.setattr(AutoEncoder, "encode", lambda self, image: seen.append(image.clone()) or encode(self, image))
    make(mask="2", panels=pictures(tmp_path, 2), prompt=PROMPT, strength=0.5)
    drafts, kept = seen
    assert not kept[..., 32:].any() and kept[..., :32].any()
    assert not drafts[..., :32].any() and drafts[..., 32:].any()


def test_the_kept_panels_do_influence_the_generated_one(tmp_path):
    given = pictures(tmp_path, 1)
    before = make(mask="2", panels=given, prompt=PROMPT)
    Image.new("RGB", (64, 64), "red").save(given[0])
    assert make(mask="2", panels=given, prompt=PROMPT).panels[2].tobytes() != before.panels[2].tobytes()


def test_the_seed_decides_and_nothing_else():
    plan, _ = plan_for(prompt=PROMPT)
    networks = Pipeline(plan, print)
    first, second, again = (networks.sample(seed, lambda *_: None).composite.tobytes() for seed in (1, 2, 1))
    assert first == again == make(seed=1, prompt=PROMPT).composite.tobytes()
    assert first != second


def test_strength_one_is_plain_sampling_whatever_the_drafts(tmp_path):
    given = pictures(tmp_path, 2)
    plain = make(mask="2", panels=given[:1], prompt=PROMPT)
    assert make(mask="2", panels=given, prompt=PROMPT, strength=1.0).composite.tobytes() == plain.composite.tobytes()


def test_below_full_strength_the_path_starts_between_draft_and_noise(tmp_path, monkeypatch):
    plan, _ = plan_for(mask="2", panels=pictures(tmp_path, 2), prompt=PROMPT, strength=0.7)
    networks = Pipeline(plan, print)
    eps = pack(noise(32, 64, seed=5))
    monkeypatch.setattr(networks, "velocity", lambda _: lambda x, t: eps - networks.data)  # straight to the draft
    panel = networks.sample(5, lambda *_: None).panels[2]
    with torch.inference_mode():
        draft = to_picture(networks.autoencoder.decode(unpack(networks.data, 4, 8))).crop((32, 0, 64, 32))
    assert abs(np.asarray(panel, dtype=float) - np.asarray(draft)).max() <= 1


def test_only_the_last_part_of_the_steps_is_made_from_a_draft(tmp_path):
    plan, _ = plan_for(mask="2", panels=pictures(tmp_path, 2), prompt=PROMPT, steps=10, strength=0.35)
    calls = []
    Pipeline(plan, print).sample(0, lambda *step: calls.append(step))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_a_kept_panel_never_sees_the_draft_beside_it(tmp_path):
    given = pictures(tmp_path, 2)
    plan, _ = plan_for(mask="2", panels=given, prompt=PROMPT, strength=0.5)
    before = Pipeline(plan, print)
    Image.new("RGB", (64, 64), "red").save(given[1])
    plan, _ = plan_for(mask="2", panels=given, prompt=PROMPT, strength=0.5)
    after, drafted = Pipeline(plan, print), before.mask.bool().expand_as(before.data)
    assert torch.equal(after.data[~drafted], before.data[~drafted])
    assert not torch.equal(after.data[drafted], before.data[drafted])


def test_the_point_stays_in_float32_between_the_steps_of_a_bfloat16_model():
    networks = Pipeline(plan_for(prompt=PROMPT, dtype="bfloat16")[0], print)
    with torch.inference_mode():
        v = networks.velocity(networks.encode_references(0))(torch.zeros(1, 8, 64), 0.5)
    assert v.dtype == torch.float32 and networks.flux.img_in.weight.dtype == torch.bfloat16
    assert networks.data.dtype == torch.float32


def test_the_text_encoders_are_gone_before_the_transformer_loads(monkeypatch):
    alive, seen = [], []
    load_text, load_flux = pipeline.load_text_encoders, pipeline.load_flux

    def watched_text(*args):
        encoders = load_text(*args)
        alive.extend(weakref.ref(module) for module in (encoders.t5, encoders.clip))
        return encoders

    def watched_flux(*args):
        seen.append([ref() for ref in alive])
        return load_flux(*args)

    monkeypatch.setattr(pipeline, "load_text_encoders", watched_text)
    monkeypatch.setattr(pipeline, "load_flux", watched_flux)
    gc.disable()
    try:
        Pipeline(plan_for(prompt=PROMPT)[0], print)
    finally:
        gc.enable()
    assert seen == [[None, None]]


def test_tiles_are_used_when_asked_for(monkeypatch):
    monkeypatch.setattr(pipeline, "decode_tiled", partial(decode_tiled, tile=3, overlap=1))
    whole, tiled = (make(prompt=PROMPT, tile=tile).composite for tile in (False, True))
    assert whole.size == tiled.size and whole.tobytes() != tiled.tobytes()


def test_a_transformer_beside_encoders_of_another_model_is_refused(tmp_path):
    shutil.copytree(find_model("tiny").root, tmp_path / "m", ignore=shutil.ignore_patterns("flux1-*", "examples"))
    shutil.copy(FLUX["schnell"], tmp_path / "m")
    with pytest.raises(ValueError, match="encoders beside m give widths .* use the encoders that belong to it"):
        make(model=str(tmp_path / "m"), prompt=PROMPT)
