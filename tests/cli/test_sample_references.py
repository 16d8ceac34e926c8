"""References: what --ref does on the tiny model. Parity with the official UNO is in tests/core."""

import contextlib
import json
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import iclora.memory
import sample
from iclora.config import DEV, TINY, SampleConfig
from iclora.layout import Layout
from iclora.pipeline import Pipeline, encode_references
from iclora.plan import choose_loras, follow_release, make_plan, pick_device
from iclora.record import compare, describe, replay
from iclora.references import encode, fit_reference, image_ids
from lab.export import REFERENCES, write_references
from model.checkpoint import Stored, save_safetensors
from model.lora import attach, save_lora
from model.lora_formats import Entry, LoraFile
from model.position import grid_ids
from model.weights import examples_folder, find_model, load_autoencoder, load_flux
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
    plan = make_plan(SampleConfig(ref=ref, **{**settings, **values}), notes.append)
    return plan, [note for note in notes if "knows panels of 64x64" not in note]


@lru_cache(maxsize=1)
def networks():
    """The networks without a LoRA, for every plan with the same prompt and panel; tiny's own is left out too."""
    pipeline = Pipeline(SampleConfig(), lambda line: None)
    list(pipeline.run(plan_for()[0]))
    return pipeline


def run(pipeline, plan):
    (result,) = pipeline.run(plan)
    return result


def quickly(*ref, **values):
    return run(networks(), replace(plan_for(*ref, **values)[0], loras=())).composite.tobytes()


def make(*ref, **values):
    return run(Pipeline(SampleConfig(), lambda line: None), plan_for(*ref, **values)[0])


def picture(folder, size, name="a.png", seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name, **options)
    return str(folder / name)


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
    (source,) = plan_for(turned, ref_size=64)[0].references
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
    ids = image_ids(Layout(1, 2, 32, 48, ((48, 32),)), "d", 2)
    assert torch.equal(ids[0, :12], grid_ids(3, 4))
    assert torch.equal(ids[0, 12:], grid_ids(2, 3) + torch.tensor([0.0, 6, 8]))


def drawn(plan, *seeds):
    with torch.inference_mode():
        return [encode_references(networks().autoencoder, plan, seed) for seed in seeds]


def test_the_posterior_is_drawn_under_the_seed_and_not_from_the_stream_of_the_noise():
    plan = plan_for(CAT, ROBOT)[0]
    one, again, other = drawn(plan, 3, 3, 4)
    with torch.inference_mode():
        mean = encode(networks().autoencoder, [source.picture for source in plan.references])
    assert torch.equal(one, again) and not torch.equal(one, other)
    difference = (one - mean)[:, :4].flatten()
    alike = torch.corrcoef(torch.stack((difference, pack(noise(32, 32, 3)).flatten())))[0, 1]
    assert 0 < difference.abs().mean() and abs(alike) < 0.3


def test_the_mean_has_no_seed():
    assert torch.equal(*drawn(plan_for(CAT, posterior="mean")[0], 3, 4))


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
    made = set()
    for ref in [(CAT,), (ROBOT,), ()]:
        result = run(networks(), replace(plan_for(*ref, **grid)[0], loras=()))
        assert result.composite.crop((0, 0, 32, 32)).tobytes() == open_picture(kept).tobytes()
        made.add(result.panels[2].tobytes())
    assert len(made) == 3


def test_the_command_runs_records_its_references_and_replays_to_the_same_bytes(tmp_path, capsys):
    argv = ["--device", "cpu", "--panel-size", "32", "--steps", "2", "--out", str(tmp_path), "--prompt", PROMPT]
    assert sample.main([*argv, "--ref", CAT, "--ref", ROBOT]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert notes[0] == "note: no LoRA for references given: tiny's own is used, loras/uno.safetensors"
    record = json.loads((tmp_path / "0001.json").read_text())
    assert [(entry["panel"], entry["use"], Path(entry["file"]).name) for entry in record["inputs"]] == [
        (None, "reference", "cat.png"),
        (None, "reference", "robot.png"),
    ]
    assert record["config"]["guidance"] == 4.0 and record["config"]["grid"] == "1x1"
    (used,) = [entry for entry in record["model"]["files"] if entry["file"] == "uno.safetensors"]
    assert used["strength"] == 1 and len(used["sha256"]) == 64
    text = Image.open(tmp_path / "0001.png").text["config"]
    assert "cat.png" not in text and '"offset": "d"' in text
    assert sample.main(["--config", str(tmp_path / "0001.json"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "0001.png").read_bytes() == (tmp_path / "0002.png").read_bytes()


def chosen(plan):
    return tuple((lora.path, strength) for lora, strength in plan.loras)


def test_references_are_followed_with_the_models_own_lora_unless_another_is_given(tmp_path):
    assert chosen(plan_for(CAT)[0]) == ((OWN, 1.0),)
    assert chosen(plan_for()[0]) == (), "without references it has nothing to do"
    plan, notes = plan_for(CAT, lora=(f"{OWN}:0",))
    assert chosen(plan) == ((OWN, 0.0),) and not notes
    bare = replace(plan.files, root=tmp_path)
    assert replay(plan_for(CAT)[0]).lora == (), "a replay finds it anew, wherever the model is"
    assert choose_loras(plan_for(CAT)[0].config, bare, notes.append) == ()
    assert [note[:27] for note in notes] == ["references without a LoRA: "]


def test_a_lora_for_panels_leaves_the_models_own_for_references_in_place_and_both_work(tmp_path):
    grid = {"grid": "3x1", "mask": "2,3", "prompt": "three pictures: [IMAGE1] a, [IMAGE2] b, [IMAGE3] c"}
    plan, notes = plan_for(CAT, lora=(f"{WALK}:0.5",), **grid)
    assert chosen(plan) == ((WALK, 0.5), (OWN, 1.0)) and "tiny's own is used" in notes[0]
    assert replay(plan).lora == (f"{WALK}:0.5", f"{OWN}:1"), "a replay needs no choice"
    assert chosen(plan_for(CAT, lora=replay(plan).lora, **grid)[0]) == chosen(plan)
    exact = replay(plan_for(lora=(f"{WALK}:1.2345678",), **grid)[0]).lora
    assert exact == (f"{WALK}:1.2345678",), "else a replay makes another picture"
    assert chosen(plan_for(lora=(str(WALK),), **grid)[0]) == ((WALK, 1.0),), "without references nothing is added"
    unknown = lora(tmp_path)  # says nothing of its method, as the released one
    assert chosen(plan_for(CAT, lora=(unknown,))[0]) == ((Path(unknown), 1.0),)
    replayed = {"lora": (f"{WALK}:1",), "config": "out/0001.json"}
    assert chosen(plan_for(CAT, **replayed, **grid)[0]) == ((WALK, 1.0), (OWN, 1.0)), "with references that are new"

    def made(*ref, **values):
        return make(*ref, **grid, **values).panels[3].tobytes()

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
    assert plan.condition == "clean" and plan.concat == "tokens"


def test_a_peft_configuration_that_does_not_fit_is_refused_before_a_network_loads(tmp_path):
    lora(tmp_path, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 7, "lora_alpha": 7}')
    with pytest.raises(ValueError, match="says rank 7 for "):
        plan_for(lora=(str(tmp_path),))


def test_loras_that_were_trained_in_other_ways_than_they_are_used_in_are_told(tmp_path):
    clean, plain = lora(tmp_path, condition="clean", concat="pixels"), lora(tmp_path, "b.safetensors", condition="none")
    plan, notes = plan_for(lora=(clean, plain))
    assert plan.condition == "clean"
    assert notes == ["b.safetensors was trained with --condition none; now it is used with clean"]
    assert plan_for(lora=(clean,))[1] == []


def test_a_replay_from_another_reference_is_noted():
    old, new, twice = (describe(plan_for(*ref)[0]) for ref in [(CAT,), (ROBOT,), (CAT, CAT)])
    for other in (new, twice):
        notes = []
        compare(other, old, "a.json", notes.append)
        assert "made with other pictures" in notes[0]
    notes = []
    compare(old, old, "a.json", notes.append)
    assert notes == []


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


def of_rank(rank, path="dit_lora.safetensors", dialect="xlabs", **metadata):
    """What read_lora says of a file of one adapter."""
    shapes = {"down": (rank, 3072), "up": (9216, rank)}
    tensors = {half: Stored(Path(path), "BF16", shape) for half, shape in shapes.items()}
    entry = Entry("double_blocks.0.img_attn.qkv", "all", "x", dialect, {half: half for half in shapes})
    return LoraFile(Path(path), tensors, [entry], {f"iclora.{k}": v for k, v in metadata.items()}, ())


def test_unos_release_is_sampled_as_its_own_sampler_does_and_flags_win():
    notes, loras = [], ((of_rank(16), 1.0), (of_rank(512), 1.0))
    config = follow_release(SampleConfig(), loras, notes.append)
    assert (config.steps, config.schedule) == (25, "uno-release")
    assert notes.pop() == (
        "dit_lora.safetensors is taken for UNO's release and sampled as there, with --steps 25 and --schedule "
        "uno-release; flags win"
    )
    config = follow_release(SampleConfig(steps=20), loras, notes.append)
    assert (config.steps, config.schedule) == (20, "uno-release") and "with --schedule uno-release;" in notes.pop()
    given = SampleConfig(steps=20, schedule="tokens")
    assert follow_release(given, loras, notes.append) == given and not notes


@pytest.mark.parametrize(
    "other", [of_rank(128), of_rank(512, dialect="diffusers"), of_rank(512, method="uno")], ids=["uso", "names", "ours"]
)
def test_other_loras_keep_twenty_steps_and_true_times(other):
    assert follow_release(SampleConfig(), ((other, 1.0),), [].append) == SampleConfig()


def test_the_release_is_told_on_the_model_that_it_was_made_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("iclora.plan.follow_release", lambda config, loras, note: asked.append(loras) or config)
    config = plan_for(CAT, lora=(lora(tmp_path),), steps=None)[0].config
    assert (config.steps, config.schedule) == (20, "tokens") and not asked
    monkeypatch.setattr("iclora.plan.model_defaults", lambda shape: DEV)
    plan_for(CAT, lora=(lora(tmp_path),))
    assert [file.path.name for file, _ in asked[0]] == ["uno.safetensors"]


def test_a_uno_lora_without_references_gives_one_warning_and_runs(tmp_path):
    plan, notes = plan_for(lora=(lora(tmp_path, method="uno"),))
    assert notes == [
        "uno.safetensors was trained to follow reference pictures (UNO) and gets none; give some with --ref"
    ]
    run(Pipeline(SampleConfig(), lambda line: None), plan)


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
    monkeypatch.setattr(iclora.memory, "free_memory", lambda device: 80_000_000)
    plan_for(CAT)
    with pytest.raises(
        ValueError,
        match=(
            r"^10240 tokens of references \(--ref, 10 given\) beside 4 of the picture take about 0.\d+ GB in the "
            "transformer, but cpu has 0.08 GB; give fewer, or lower --ref-size$"
        ),
    ):
        plan_for(*[CAT] * 10, ref_size=512)
    with pytest.raises(ValueError, match="^10240 tokens") as joint:
        plan_for(*[CAT] * 10, ref_size=512)
    with pytest.raises(ValueError, match="^10240 tokens") as alone:
        plan_for(*[CAT] * 10, ref_size=512, reference_attention="alone")
    sizes = [float(re.search(r"about (\S+) GB", str(caught.value))[1]) for caught in (joint, alone)]
    assert sizes[0] < sizes[1], "keys and values are kept of every block"
    monkeypatch.setattr(iclora.memory, "free_memory", lambda device: 1)  # too little for the model in any case
    plan_for(*[CAT] * 10, ref_size=512)


def test_a_gpu_that_cannot_hold_the_weights_is_told_at_once(monkeypatch):
    monkeypatch.setattr(iclora.memory, "free_memory", lambda device: 5_000_000)
    for device, message in (("cuda", "weights alone take about 0.01 GB, but the GPU has 0.005 GB free"), ("cpu", None)):
        with contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message):
            iclora.memory._refuse_above(20_000_000, 10_000_000, 10, device, "10 tokens", "give fewer")


def test_a_large_model_on_the_cpu_unasked_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    notes = []
    assert [pick_device(name, row, notes.append) for name in ("auto", "cpu") for row in (TINY, DEV)] == ["cpu"] * 4
    assert len(notes) == 1 and "very slow" in notes[0]


def test_more_tokens_than_are_possible_are_refused():
    with pytest.raises(ValueError, match=r"^65536 tokens .* take about \d.* GB .*; at most 65536 tokens are possible"):
        plan_for(*[CAT] * 4, ref_size=2048)
