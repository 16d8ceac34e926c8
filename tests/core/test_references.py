"""References: parity with the official UNO on the reference numbers, then what --ref does on the tiny model."""

import contextlib
import json
import re
from copy import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import iclora.references
import sample
from golden import EXACT, FLUX, GOLDEN, WHOLE, case, far
from iclora.config import DEV, SCHNELL, TINY, SampleConfig
from iclora.layout import Layout
from iclora.pipeline import Pipeline, resolve
from iclora.plan import choose_loras, pick_device, read_references
from iclora.references import encode, fit_reference, follow_loras
from lab.export import REFERENCES, write_references
from model.checkpoint import save_safetensors
from model.lora import attach, load_lora, merge, save_lora
from model.position import MODES, grid_ids, reference_ids
from model.weights import examples_folder, find_model, load_autoencoder, load_flux
from sampling.flow import euler
from sampling.images import open_picture, to_tensor
from sampling.latents import noise, pack

BUNDLED = examples_folder() / "references"
CAT, MUSHROOM, ROBOT = (str(BUNDLED / f"{name}.png") for name in REFERENCES)
PROMPT = "a cat on a beach."
OWN, WALK = (find_model("tiny").root / "loras" / f"{name}.safetensors" for name in ("uno", "walk"))


def plan_for(*ref, **values):
    """A plan for small, quick pictures, and the notes on the way to it."""
    notes = []
    settings = {"device": "cpu", "panel_size": "32", "ref_size": 32, "steps": 2, "grid": "1x1", "prompt": PROMPT}
    return resolve(SampleConfig(ref=ref, **{**settings, **values}), notes.append), notes


@lru_cache(maxsize=1)
def networks():
    """The networks without a LoRA, for every plan with the same prompt and panel; tiny's own is left out too."""
    return Pipeline(plan_for()[0], lambda line: None)


def with_plan(*ref, **values):
    other = copy(networks())
    other.plan = plan_for(*ref, **values)[0]
    return other


def quickly(*ref, **values):
    return with_plan(*ref, **values).sample(0, lambda step, steps: None).composite.tobytes()


def make(*ref, **values):
    return Pipeline(plan_for(*ref, **values)[0], lambda line: None).sample(0, lambda step, steps: None)


def picture(folder, size, name="a.png", seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name, **options)
    return str(folder / name)


# parity


@pytest.fixture(scope="module")
def uno():
    flux = load_flux(FLUX["dev"], dtype=torch.float32)
    load_lora(flux, GOLDEN / "uno" / "dit_lora.safetensors")
    merge(flux)
    return flux


def velocity_of(flux, golden, count, mode):
    """The official case with so many references, as Pipeline.velocity computes it, and the target's tokens."""
    tokens = [pack(golden[name]) for name in ("noise", *(f"ref{k}" for k in range(1, count + 1)))]
    target, *sizes = [tuple(side // 2 for side in golden[name].shape[2:]) for name in ("noise", "ref1", "ref2", "ref3")]
    ids = torch.cat([grid_ids(*target), *reference_ids(target, sizes[:count], mode)])[None]
    references = torch.cat([tokens[0][:, :0], *tokens[1:]], dim=1)
    fixed = flux.prefill(torch.cat((torch.zeros(1, 7, 3), ids), dim=1), golden["txt"], references)

    @torch.no_grad()
    def velocity(x, t):
        return flux.velocity(x, fixed, flux.conditioning(torch.tensor([t]), golden["y"], torch.tensor([4.0])))

    return velocity, tokens[0], ids


CASES = [key for key in case("uno") if key.endswith(".out")]


@torch.no_grad()
@pytest.mark.parametrize("key", CASES)
def test_every_official_output_is_met(uno, key):
    golden, count, mode = case("uno"), int(key[4]), key[key.index("pe_") + 3]
    velocity, noise, ids = velocity_of(uno, golden, count, mode)
    assert far(velocity(noise, 0.6), golden[key]) < WHOLE
    wanted = [golden[f"refs{count}.pe_{mode}.ref{k}_ids"][0] for k in range(1, count + 1)]
    assert torch.equal(ids[0, noise.shape[1] :], torch.cat(wanted) if wanted else ids[0, :0])


def test_the_cases_are_all_modes_with_up_to_three_references():
    assert len(CASES) == 13 and {key[4] for key in CASES} == set("0123")
    assert {key[key.index("pe_") + 3] for key in CASES} == set(MODES)


@torch.no_grad()
def test_the_official_loop_is_met(uno):
    golden = case("uno")
    velocity, noise, _ = velocity_of(uno, golden, 2, "d")
    x = euler(velocity, noise, golden["refs2.pe_d.schedule"].tolist())
    assert far(x, golden["refs2.pe_d.denoised"]) < WHOLE


@torch.no_grad()
@pytest.mark.parametrize("ref", [(), (CAT,), (CAT, MUSHROOM, ROBOT)])
def test_what_is_computed_once_equals_computing_it_in_every_step(ref):
    pipeline = with_plan(*ref)
    references, x = pipeline.encode_references(0), torch.randn(1, 4, 64)
    ids = torch.cat([grid_ids(2, 2), *reference_ids((2, 2), [(2, 2)] * len(ref))])[None]
    velocity = pipeline.velocity(references)
    for t in (0.9, 0.3):
        plain = pipeline.flux(
            torch.cat((x, references), dim=1), ids, pipeline.txt, torch.zeros(1, pipeline.txt.shape[1], 3),
            torch.tensor([t]), pipeline.vec, torch.tensor([pipeline.plan.config.guidance]),
        )  # fmt: skip
        assert plain.shape[1] == ids.shape[1] and far(velocity(x, t), plain[:, :4]) < EXACT


# preprocessing


@pytest.mark.parametrize(
    ("size", "long_side", "wanted"),
    [
        ((1000, 1000), 512, (512, 512)),
        ((49, 49), 512, (512, 512)),
        ((1000, 700), 512, (512, 352)),
        ((700, 1000), 320, (224, 320)),
        ((30, 20), 64, (64, 32)),
        ((64, 16), 64, (64, 16)),
        ((500, 400), 100, (96, 80)),
    ],
)
def test_the_longer_side_is_scaled_and_both_are_cut_to_whole_tokens(size, long_side, wanted):
    assert fit_reference(Image.new("RGB", size), long_side).size == wanted


def test_scaling_is_lanczos_and_the_cut_is_central(tmp_path):
    given = open_picture(picture(tmp_path, (100, 61)))
    scaled = given.resize((200, 122), Image.Resampling.LANCZOS)
    assert fit_reference(given, 200).tobytes() == scaled.crop((4, 5, 196, 117)).tobytes()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # shot with the camera turned
    turned = picture(tmp_path, (60, 40), "b.jpg", quality=95, exif=exif)
    (source,) = read_references([turned], 64)
    assert source.picture.size == (32, 64)


def test_the_bundled_references_are_what_the_command_draws(tmp_path):
    write_references(tmp_path)
    assert sorted(path.name for path in BUNDLED.iterdir()) == [f"{name}.png" for name in sorted(REFERENCES)]
    for path in BUNDLED.iterdir():
        assert Image.open(tmp_path / path.name).tobytes() == Image.open(path).tobytes()
        assert path.stat().st_size < 20_000


# tokens and places


def test_references_are_encoded_one_by_one_in_order_and_none_is_no_token(tmp_path):
    autoencoder = load_autoencoder(find_model("tiny").autoencoder)
    one, other = (open_picture(picture(tmp_path, size)) for size in ((32, 32), (48, 16)))
    with torch.no_grad():
        wanted = [pack(autoencoder.encode(to_tensor(given))) for given in (one, other)]
        assert torch.equal(encode(autoencoder, [one, other]), torch.cat(wanted, dim=1))
        assert encode(autoencoder, []).shape == (1, 0, 64)


def test_places_follow_the_whole_composite():
    ids = place(Layout(1, 2, 32, 48, ((48, 32),)), "d", 2)
    assert torch.equal(ids[0, :12], grid_ids(3, 4))
    assert torch.equal(ids[0, 12:], grid_ids(2, 3) + torch.tensor([0.0, 6, 8]))


def test_the_posterior_is_drawn_under_the_seed_and_not_from_the_stream_of_the_noise():
    pipeline = with_plan(CAT, ROBOT)
    with torch.inference_mode():
        one, again, other = (pipeline.encode_references(seed) for seed in (3, 3, 4))
        mean = encode(pipeline.autoencoder, [source.picture for source in pipeline.plan.references])
    assert torch.equal(one, again) and not torch.equal(one, other)
    drawn = (one - mean)[:, :4].flatten()
    alike = torch.corrcoef(torch.stack((drawn, pack(noise(32, 32, 3)).flatten())))[0, 1]
    assert 0 < drawn.abs().mean() and abs(alike) < 0.3


def test_the_mean_has_no_seed():
    pipeline = with_plan(CAT, posterior="mean")
    with torch.inference_mode():
        assert torch.equal(pipeline.encode_references(3), pipeline.encode_references(4))


# pictures


def test_any_number_of_references_makes_a_picture_and_each_of_them_counts():
    assert len({quickly(*ref) for ref in [(), (CAT,), (ROBOT,), (CAT, ROBOT), (ROBOT, CAT), (CAT,) * 7]}) == 6
    off = make(CAT, lora=(f"{OWN}:0",)).composite.tobytes()
    assert quickly(CAT) == off != make(CAT).composite.tobytes()


@pytest.mark.parametrize(
    "values",
    [
        {"offset": "w"},
        {"offset": "h"},
        {"offset": "o"},
        {"offset_scale": 2.0},
        {"posterior": "mean"},
        {"ref_size": 48},
        {"schedule": "uno-release"},
        {"guidance": 3.5},
        {"reference_attention": "alone"},
    ],
)
def test_every_setting_of_references_reaches_the_picture(values):
    assert quickly(CAT, ROBOT, **values) != quickly(CAT, ROBOT)


def test_references_compose_with_grids_and_masks(tmp_path):
    kept = picture(tmp_path, (32, 32))
    grid = {"grid": "1x2", "mask": "2", "panels": (kept,), "prompt": "[IMAGE1] noise, [IMAGE2] a cat."}
    pipeline, made = Pipeline(plan_for(**grid)[0], lambda line: None), set()
    for ref in [(CAT,), (ROBOT,), ()]:
        pipeline.plan = plan_for(*ref, **grid)[0]
        result = pipeline.sample(0, lambda step, steps: None)
        assert result.composite.crop((0, 0, 32, 32)).tobytes() == open_picture(kept).tobytes()
        made.add(result.panels[2].tobytes())
    assert len(made) == 3


def test_the_command_runs_records_its_references_and_replays_to_the_same_bytes(tmp_path, capsys):
    argv = ["--device", "cpu", "--panel-size", "32", "--steps", "2", "--out", str(tmp_path), "--prompt", PROMPT]
    assert sample.main([*argv, "--ref", CAT, "--ref", ROBOT]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2
    assert notes[0] == "note: no LoRA for references given: tiny's own is used, loras/uno.safetensors"
    record = json.loads((tmp_path / "0001.json").read_text())
    assert [(entry["panel"], entry["use"], Path(entry["file"]).name) for entry in record["inputs"]] == [
        (None, "reference", "cat.png"),
        (None, "reference", "robot.png"),
    ]
    assert record["config"]["guidance"] == 4.0 and record["config"]["grid"] == "1x1"
    text = Image.open(tmp_path / "0001.png").text["config"]
    assert "cat.png" not in text and '"offset": "d"' in text
    assert sample.main(["--config", str(tmp_path / "0001.json"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "0001.png").read_bytes() == (tmp_path / "0002.png").read_bytes()


def test_references_are_followed_with_the_models_own_lora_unless_another_is_given(tmp_path):
    assert plan_for(CAT)[0].loras == ((OWN, 1.0),)
    assert plan_for()[0].loras == (), "without references it has nothing to do"
    plan, notes = plan_for(CAT, lora=(f"{OWN}:0",))
    assert plan.loras == ((OWN, 0.0),) and not notes
    bare = replace(plan.files, root=tmp_path)
    config = plan_for(CAT)[0].config
    assert config.lora == (), "a replay finds it anew, wherever the model is"
    assert choose_loras(config, bare, notes.append) == () and not notes
    follow_loras(config, (), notes.append)
    assert [note[:27] for note in notes] == ["references without a LoRA: "]


def test_a_lora_for_panels_leaves_the_models_own_for_references_in_place_and_both_work(tmp_path):
    grid = {"grid": "3x1", "mask": "2,3", "prompt": "three pictures: [IMAGE1] a, [IMAGE2] b, [IMAGE3] c"}
    plan, notes = plan_for(CAT, lora=(f"{WALK}:0.5",), **grid)
    assert plan.loras == ((WALK, 0.5), (OWN, 1.0)) and "tiny's own is used" in notes[0]
    assert plan.config.lora == (f"{WALK}:0.5", f"{OWN}:1"), "a replay needs no choice"
    assert plan_for(CAT, lora=plan.config.lora, **grid)[0].loras == plan.loras
    assert plan_for(lora=(str(WALK),), **grid)[0].loras == ((WALK, 1.0),), "without references nothing is added"
    unknown = lora(tmp_path)  # says nothing of its method, as the released one
    assert plan_for(CAT, lora=(unknown,))[0].loras == ((Path(unknown), 1.0),)
    record = {"lora": (f"{WALK}:1",), "config": "out/0001.json"}
    assert plan_for(CAT, **record, **grid)[0].loras == ((WALK, 1.0),), "a replay of a time without one"

    def made(*ref, **values):
        pipeline = Pipeline(plan_for(*ref, **grid, **values)[0], lambda line: None)
        return pipeline.sample(0, lambda *_: None).panels[3].tobytes()

    both = made(CAT, lora=(str(WALK),))
    assert len({both, made(CAT), made(lora=(str(WALK),)), made(ROBOT, lora=(str(WALK),))}) == 4, "each has its say"


def test_a_lora_that_does_not_fit_is_refused_before_a_network_loads(tmp_path):
    flux = load_flux(find_model("tiny").flux, dtype=torch.float32)
    attach(flux, "double_blocks.2.img_attn.proj", rank=1)
    save_lora(flux, tmp_path / "deep.safetensors")
    tensors = load_file(tmp_path / "deep.safetensors")
    deep = {name.replace("blocks.2.", "blocks.12."): tensor for name, tensor in tensors.items()}
    save_safetensors(deep, tmp_path / "deep.safetensors")
    with pytest.raises(ValueError, match="deep.safetensors has .* this model has no double_blocks.12.img_attn.proj"):
        plan_for(lora=(str(tmp_path / "deep.safetensors"),))


def test_a_mistyped_lora_is_told_of_a_name_near_it(tmp_path):
    with pytest.raises(ValueError, match="there is no such file; did you mean walk.safetensors.$"):
        plan_for(lora=(str(WALK)[:-1],))
    with pytest.raises(ValueError, match="there is no such file; train.py writes lora.safetensors"):
        plan_for(lora=(str(tmp_path / "a.safetensors"),))


def test_a_lora_in_a_folder_says_as_much_as_its_file(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lora(folder, method="in-context-lora", condition="clean", concat="tokens")
    plan = plan_for(lora=(str(folder),))[0]
    assert plan.clean and plan.concat == "tokens"


def test_a_peft_configuration_that_does_not_fit_is_refused_before_a_network_loads(tmp_path):
    lora(tmp_path, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 7, "lora_alpha": 7}')
    with pytest.raises(ValueError, match="says rank 7 for "):
        plan_for(lora=(str(tmp_path),))


def test_loras_that_were_trained_in_other_ways_than_they_are_used_in_are_told(tmp_path):
    clean, plain = lora(tmp_path, condition="clean", concat="pixels"), lora(tmp_path, "b.safetensors", condition="none")
    plan, notes = plan_for(lora=(clean, plain))
    assert plan.clean and notes == ["b.safetensors was trained with --condition none; now it is used with clean"]
    assert plan_for(lora=(clean,))[1] == []


def test_a_replay_from_another_reference_is_noted(capsys):
    old, new, twice = (sample.describe(plan_for(*ref)[0]) for ref in [(CAT,), (ROBOT,), (CAT, CAT)])
    for other in (new, twice):
        sample.compare(other, old, "a.json")
        assert "made with other pictures" in capsys.readouterr().err
    sample.compare(old, old, "a.json")
    assert capsys.readouterr().err == ""


# LoRAs


def lora(folder, name="uno.safetensors", **about):
    """A LoRA for the tiny model in UNO's own dialect, with some metadata."""
    flux = load_flux(find_model("tiny").flux, dtype=torch.float32)
    for parameter in attach(flux, "uno", rank=1, generator=torch.Generator().manual_seed(0)):
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    save_lora(flux, folder / name, "xlabs", {f"iclora.{key}": str(value) for key, value in about.items()})
    return str(folder / name)


def test_a_lora_of_unos_dialect_changes_what_references_do(tmp_path):
    file = lora(tmp_path)
    assert make(CAT, lora=(file,)).composite.tobytes() != quickly(CAT)
    assert plan_for(CAT, lora=(file,))[1] == [
        f"uno.safetensors may be for references, so tiny's own is not added; --lora {OWN} adds it"
    ]


def test_how_a_lora_was_trained_is_followed_and_flags_win(tmp_path):
    told = {"offset": "w", "offset_scale": 2.0, "ref_size": 48, "posterior": "mean", "reference_attention": "alone"}
    file = lora(tmp_path, method="uno", **told)
    config = plan_for(CAT, lora=(file,), ref_size=None)[0].config
    assert {name: getattr(config, name) for name in told} == told
    flags = {
        "offset": "d", "offset_scale": 1.0, "ref_size": 32, "posterior": "sample", "reference_attention": "joint",
    }  # fmt: skip
    plan, notes = plan_for(CAT, lora=(file,), **flags)
    assert {name: getattr(plan.config, name) for name in told} == flags
    assert not notes, "flags win without a word"


def test_a_uno_lora_without_references_gives_one_warning_and_runs(tmp_path):
    plan, notes = plan_for(lora=(lora(tmp_path, method="uno"),))
    assert notes == [
        "uno.safetensors was trained to follow reference pictures (UNO) and gets none; give some with --ref"
    ]
    Pipeline(plan, lambda line: None).sample(0, lambda *_: None)


def test_loras_that_were_trained_differently_need_a_flag(tmp_path):
    files = (lora(tmp_path, offset="w"), lora(tmp_path, "other.safetensors", offset="d"))
    with pytest.raises(ValueError, match="other.safetensors was trained with --offset d, another LoRA with w; say whi"):
        plan_for(CAT, lora=files)
    assert plan_for(CAT, lora=files, offset="h")[0].config.offset == "h"


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"offset": "x"}, "damaged iclora.offset in its metadata .--offset 'x' is unknown"),
        ({"offset_scale": "nan"}, "damaged iclora.offset_scale .*--offset-scale nan is out of range"),
        ({"ref_size": "64.5"}, "damaged iclora.ref_size"),
        ({"reference_attention": "both"}, "damaged iclora.reference_attention .*'both' is unknown; .* joint, alone"),
        ({"ref_size": "9" * 5000}, "damaged iclora.ref_size"),
        ({"offset_scale": "a" * 5000}, "damaged iclora.offset_scale"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path, about, message):
    with pytest.raises(ValueError, match=message) as caught:
        plan_for(CAT, lora=(lora(tmp_path, **about),), ref_size=None)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


# bad input


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((320, 40), "a.png of 320x40 pixels becomes 32x4, but a token has 16x16; crop it or raise --ref-size"),
        ((400, 2), "400x2 is narrower than 32:1"),
    ],
)
def test_absurd_shapes_are_refused(tmp_path, size, message):
    with pytest.raises(ValueError, match=message):
        plan_for(picture(tmp_path, size))


def test_unreadable_references_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot read .*a.png"):
        plan_for(CAT, str(tmp_path / "a.png"))


def test_more_than_memory_allows_is_refused_with_the_tokens_and_an_estimate(monkeypatch):
    monkeypatch.setattr(iclora.references, "free_memory", lambda device: 60_000_000)
    plan_for(CAT)
    with pytest.raises(
        ValueError,
        match=(
            r"^10240 tokens of references \(--ref, 10 given\) beside 4 of the picture take about 0.\d+ GB in the "
            "transformer, but cpu has 0.06 GB; give fewer, or lower --ref-size$"
        ),
    ):
        plan_for(*[CAT] * 10, ref_size=512)
    with pytest.raises(ValueError, match="^10240 tokens") as joint:
        plan_for(*[CAT] * 10, ref_size=512)
    with pytest.raises(ValueError, match="^10240 tokens") as alone:
        plan_for(*[CAT] * 10, ref_size=512, reference_attention="alone")
    sizes = [float(re.search(r"about (\S+) GB", str(caught.value))[1]) for caught in (joint, alone)]
    assert sizes[0] < sizes[1], "keys and values are kept of every block"
    monkeypatch.setattr(iclora.references, "free_memory", lambda device: 1)  # too little for the model in any case
    plan_for(*[CAT] * 10, ref_size=512)


def test_a_gpu_that_cannot_hold_the_weights_is_told_at_once(monkeypatch):
    monkeypatch.setattr(iclora.references, "free_memory", lambda device: 5_000_000)
    for device, message in (("cuda", "weights alone take about 0.01 GB, but the GPU has 0.005 GB free"), ("cpu", None)):
        with contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message):
            iclora.references.refuse_above(20_000_000, 10_000_000, 10, device, "10 tokens", "give fewer")


def test_a_large_model_on_the_cpu_unasked_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    notes = []
    assert [pick_device(name, row, notes.append) for name in ("auto", "cpu") for row in (TINY, DEV)] == ["cpu"] * 4
    assert len(notes) == 1 and "very slow" in notes[0]


def test_more_tokens_than_are_possible_are_refused():
    with pytest.raises(ValueError, match=r"^65536 tokens .* take about \d.* GB .*; at most 65536 tokens are possible"):
        plan_for(*[CAT] * 4, ref_size=2048)


def test_the_released_schedule_for_a_model_with_even_times_is_ignored_and_said(monkeypatch):
    monkeypatch.setattr("iclora.plan.model_defaults", lambda shape: SCHNELL)
    plan, notes = plan_for(schedule="uno-release")
    said = "tiny has even times; --schedule uno-release is ignored"
    assert plan.config.schedule == "tokens" and said in notes
