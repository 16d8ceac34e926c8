"""The public API and LoRA files from outside: reference numbers, dialects, and files that were trained before."""

import pytest
import torch
from safetensors.torch import load_file

from blackbox import CLOSE, FIXTURES, GOLDEN, TINY, main, metadata, refused
from model.lora import detach, load_lora, merge, save_lora
from model.position import grid_ids, reference_ids
from model.text import load_text_encoders
from model.weights import find_model, load_autoencoder, load_flux
from sampling.flow import euler, times
from sampling.latents import pack, unpack

EXACT = 5e-6  # ids, schedules, encode
FILES = GOLDEN / "lora"
LORAS = FIXTURES / "loras"
EXPECTED = load_file(FILES / "expected.safetensors")
NAMES = sorted(EXPECTED)
REFUSED = {
    "refuse_dora": ("DoRA", "transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector"),
    "refuse_unknown_block": ("transformer_blocks.7.attn.to_q.lora_A.weight", "double_blocks.7"),
    "refuse_missing_half": ("transformer_blocks.0.attn.to_q.lora_A.weight", "without its lora_B"),
    "refuse_wrong_width": ("to_q.lora_A.weight", "(4, 56)", "double_blocks.0.img_attn.qkv", "(4, 64)"),
}
INPUTS = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
MODELS = {"dev": GOLDEN / "dev" / "flux1-dev.safetensors", "schnell": GOLDEN / "schnell" / "flux1-schnell.safetensors"}
TINY_FLUX = TINY / "flux1-tiny.safetensors"
EFFECTS = load_file(FIXTURES / "effects.safetensors")
CAPTIONS = [
    "a cat on a beach.",
    "",
    "two pictures of a green striped cat with a hat: [IMAGE1] it is on the left on a beach, [IMAGE2] it is in the "
    "middle in the snow.",
]  # of the stored features


def case(name):
    return load_file(GOLDEN / name / "case.safetensors")


def inputs(tensors):
    return {name: tensors[name] for name in INPUTS if name in tensors}


def far(a, b):
    return float((a.float() - b.float()).abs().max())


@torch.no_grad()
def run(flux, given):
    return flux(**given)


DEV = inputs(case("dev"))


def effect(path, base="dev", given=DEV):
    """What the transformer predicts with a LoRA merged into it."""
    flux = load_flux(TINY_FLUX if base == "tiny" else MODELS[base], dtype=torch.float32)
    load_lora(flux, path)
    merge(flux)
    return run(flux, given)


def effect_on_tiny(path):
    return effect(path, "tiny", inputs(EFFECTS))


def convert(source, target, *more):
    assert main("convert", source, target, *more) == 0
    return target


# reference numbers


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_and_a_sampling_loop_equal_the_reference_numbers(name):
    golden = case(name)
    flux = load_flux(MODELS[name], dtype=torch.float32)
    given = inputs(golden)
    assert far(run(flux, given), golden["out"]) < CLOSE

    if "guidance" in given:
        given["guidance"] = torch.full_like(given["guidance"], 3.5)

    @torch.no_grad()
    def velocity(x, t):
        return flux(**{**given, "img": x, "timesteps": torch.full((x.shape[0],), t)})

    schedule = times(4, given["img"].shape[1], shift=name == "dev")
    assert torch.tensor(schedule) == pytest.approx(golden["schedule_4_steps"], abs=EXACT)
    assert far(euler(velocity, given["img"], schedule), golden["denoised_4_steps"]) < CLOSE


def test_the_order_of_a_forwards_arguments_is_that_of_the_release():
    flux = load_flux(MODELS["dev"], dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(flux(*DEV.values()), run(flux, DEV))


def test_the_autoencoder_equals_the_reference_numbers_and_draws_under_a_seed():
    golden = case("ae")
    autoencoder = load_autoencoder(GOLDEN / "ae" / "ae.safetensors")
    with torch.no_grad():
        mean = autoencoder.encode(golden["image"])
        assert far(mean, golden["latent_mean"]) < EXACT
        assert far(autoencoder.decode(golden["z"]), golden["decoded"]) < CLOSE
        draws = [autoencoder.encode(golden["image"], torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and far(draws[0], draws[2]) > 1e-3 and far(draws[0], mean) > 1e-3


@pytest.mark.parametrize("mode", ["d", "h", "w", "o"])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_references_stand_where_the_release_puts_them_and_are_seen_as_there(mode, count):
    golden = case("uno")
    latents = [golden[name] for name in ("noise", "ref1", "ref2", "ref3")[: count + 1]]
    target, *others = [(z.shape[2] // 2, z.shape[3] // 2) for z in latents]
    places = reference_ids(target, others, mode=mode)
    assert len(places) == count
    for number, ids in enumerate(places, start=1):
        assert torch.equal(ids, golden[f"refs{count}.pe_{mode}.ref{number}_ids"][0])
    if count == 0 and mode != "d":
        return
    flux = load_flux(MODELS["dev"], dtype=torch.float32)
    load_lora(flux, GOLDEN / "uno" / "dit_lora.safetensors")
    merge(flux)
    given = {
        "img": torch.cat([pack(z) for z in latents], dim=1), "img_ids": torch.cat([grid_ids(*target), *places])[None],
        "txt": golden["txt"], "txt_ids": torch.zeros(1, golden["txt"].shape[1], 3), "timesteps": torch.tensor([0.6]),
        "y": golden["y"], "guidance": torch.tensor([4.0]),
    }  # fmt: skip
    out = run(flux, given)
    want = golden[f"refs{count}.pe_{mode}.out"]
    assert out.shape == given["img"].shape and far(out[:, : want.shape[1]], want) < CLOSE


def test_times_fall_from_one_to_zero_and_longer_sequences_stay_longer_near_noise():
    short, long, even = times(20, 256), times(20, 1024), times(4, 256, shift=False)
    assert len(short) == 21 and short[0] == 1.0 and short[-1] == 0.0
    assert all(a > b for a, b in zip(short, short[1:], strict=False)) and long[10] > short[10]
    assert even == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert short[10] == pytest.approx(0.622459352016449, abs=EXACT)


def test_euler_walks_along_the_velocity_and_calls_after_every_step():
    told = []

    def after_step(x, t_next):
        told.append(t_next)
        return x

    data, noise = torch.full((1, 2), 3.0), torch.full((1, 2), -1.0)
    x = euler(lambda x, t: noise - data, noise, [1.0, 0.7, 0.2, 0.0], after_step=after_step)
    assert torch.allclose(x, data) and told == [0.7, 0.2, 0.0]


def test_packing_is_undone_by_unpacking():
    z = torch.randn(2, 16, 6, 10)
    tokens = pack(z)
    assert tokens.shape == (2, 15, 64) and torch.equal(unpack(tokens, 6, 10), z)
    assert torch.equal(grid_ids(3, 5)[:, 1:].reshape(3, 5, 2)[2, 4], torch.tensor([2.0, 4.0]))


def test_texts_have_the_features_they_had_before():
    stored = load_file(FIXTURES / "text.safetensors")
    encoders = load_text_encoders(find_model("tiny"), "cpu", torch.float32)
    txt, vec = encoders.encode(CAPTIONS, 40)
    assert far(txt[:, ::4], stored["txt"]) < 1e-4 and far(vec, stored["vec"]) < 1e-4
    assert encoders.encode(CAPTIONS[:1], 16)[0].shape == (1, 16, txt.shape[2])


# LoRA files


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_file_has_its_effect_attached_and_merged_and_is_taken_away_to_the_bit(name):
    flux = load_flux(MODELS["dev"], dtype=torch.float32)
    before = run(flux, DEV)
    load_lora(flux, FILES / f"{name}.safetensors")
    assert far(run(flux, DEV), EXPECTED[name]) < CLOSE
    detach(flux)
    assert torch.equal(run(flux, DEV), before)
    assert far(effect(FILES / f"{name}.safetensors"), EXPECTED[name]) < CLOSE


@pytest.mark.parametrize("name", REFUSED)
def test_a_golden_file_to_refuse_is_refused_by_name_and_leaves_the_model_alone(name):
    flux = load_flux(MODELS["dev"], dtype=torch.float32)
    before = run(flux, DEV)
    with pytest.raises(ValueError) as caught:
        load_lora(flux, FILES / f"{name}.safetensors")
    assert all(fragment in str(caught.value) for fragment in REFUSED[name]), caught.value
    assert torch.equal(run(flux, DEV), before)


def test_strength_is_a_factor_of_the_effect():
    flux, path = load_flux(MODELS["dev"], dtype=torch.float32), FILES / "kohya.safetensors"
    before = run(flux, DEV)
    load_lora(flux, path, strength=0.0)
    assert far(run(flux, DEV), before) < CLOSE
    load_lora(flux, path, strength=0.25)
    load_lora(flux, path, strength=0.75)
    assert far(run(flux, DEV), EXPECTED["kohya"]) < CLOSE, "several LoRAs add up"


def test_other_kinds_of_files_are_refused_as_lora_and_as_model():
    flux = load_flux(MODELS["dev"], dtype=torch.float32)
    with pytest.raises(ValueError, match="LoRA"):
        load_lora(flux, MODELS["dev"])
    with pytest.raises(ValueError, match="LoRA"):
        load_flux(FILES / "kohya.safetensors")
    with pytest.raises(ValueError, match="lack|transformer|FLUX"):
        load_autoencoder(MODELS["dev"])


POSSIBLE = [
    (name, to)
    for name in NAMES
    for to in ("diffusers", "kohya", "xlabs")
    if to == "diffusers"
    or name == "xlabs_partial"
    or (to == "kohya" and name not in ("comfyui_official_names", "diffusers_all_linears"))
]


@pytest.mark.parametrize(("name", "to"), POSSIBLE)
def test_a_golden_file_does_the_same_in_every_dialect_that_can_hold_it(tmp_path, name, to):
    path = convert(FILES / f"{name}.safetensors", tmp_path / "a.safetensors", "--to", to)
    assert far(effect(path), EXPECTED[name]) < CLOSE


@pytest.mark.parametrize("first", ["diffusers", "kohya", "xlabs"])
@pytest.mark.parametrize("second", ["diffusers", "kohya", "xlabs"])
def test_to_and_fro_through_two_dialects_changes_neither_effect_nor_rank(tmp_path, first, second):
    path = FILES / "xlabs_partial.safetensors"
    for i, to in enumerate((first, second, first, second)):
        path = convert(path, tmp_path / f"{i}.safetensors", "--to", to)
    assert far(effect(path), EXPECTED["xlabs_partial"]) < CLOSE
    assert {min(t.shape) for key, t in load_file(path).items() if not key.endswith("alpha")} == {4}


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "xlabs"])
@pytest.mark.parametrize("source", ["xlabs_partial", "kohya"])
def test_what_is_attached_is_saved_with_its_effect_and_metadata(tmp_path, source, dialect):
    flux, path = load_flux(MODELS["dev"], dtype=torch.float32), tmp_path / "a.safetensors"
    load_lora(flux, FILES / f"{source}.safetensors")
    if (source, dialect) == ("kohya", "xlabs"):
        with pytest.raises(ValueError, match="xlabs dialect has no place for"):
            save_lora(flux, path, dialect=dialect)
        assert not path.exists()
        return
    save_lora(flux, path, dialect=dialect, metadata={"trigger": "a word"})
    assert far(effect(path), EXPECTED[source]) < CLOSE
    assert metadata(path)["trigger"] == "a word"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_converting_to_a_dtype_and_naming_the_model_are_possible(tmp_path, capsys, dtype):
    argv = ["--to", "diffusers", "--dtype", dtype, "--model", "tiny"]
    path = convert(LORAS / "kohya.safetensors", tmp_path / "a.safetensors", *argv)
    assert {t.dtype for t in load_file(path).values()} == {getattr(torch, dtype)}
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "kohya names" in line and f"wrote {path}" in line
    with pytest.raises(ValueError, match="needs|no "):
        load_lora(load_flux(MODELS["dev"]), path)


@pytest.mark.parametrize("name", REFUSED)
def test_convert_refuses_what_loading_refuses(tmp_path, capsys, name):
    if name == "refuse_unknown_block":  # a block that another model may have
        return
    status = main("convert", FILES / f"{name}.safetensors", tmp_path / "a.safetensors", "--to", "kohya")
    assert status == 2 and not list(tmp_path.iterdir())
    refused(capsys, f"{name}.safetensors")


# LoRA files that were trained before


@pytest.mark.parametrize("name", ["clean", "kohya", "tokens", "uno", "alone"])
def test_a_file_trained_before_has_the_effect_it_had(name):
    assert far(effect_on_tiny(LORAS / f"{name}.safetensors"), EFFECTS[f"out.{name}"]) < CLOSE
    assert far(EFFECTS[f"out.{name}"], EFFECTS["out.base"]) > 0.1


def test_a_file_trained_before_is_the_same_after_conversion(tmp_path):
    once = convert(LORAS / "clean.safetensors", tmp_path / "1.safetensors", "--to", "kohya")
    twice = convert(once, tmp_path / "2.safetensors", "--to", "diffusers")
    assert far(effect_on_tiny(twice), EFFECTS["out.clean"]) < CLOSE
    uno = convert(LORAS / "uno.safetensors", tmp_path / "3.safetensors", "--to", "kohya")
    back = convert(uno, tmp_path / "4.safetensors", "--to", "xlabs")
    assert far(effect_on_tiny(back), EFFECTS["out.uno"]) < CLOSE
    assert set(load_file(back)) == set(load_file(LORAS / "uno.safetensors"))
    assert metadata(back)["iclora.offset"] == "h", "what sample.py follows goes along"


@pytest.mark.parametrize(("name", "told"), [
    ("clean", {"method": "in-context-lora", "condition": "clean", "concat": "pixels", "text": "joint"}),
    ("tokens", {"method": "in-context-lora", "condition": "clean", "concat": "tokens", "text": "panel"}),
    ("uno", {"method": "uno", "offset": "h", "offset_scale": "2.0", "posterior": "mean", "ref_size": "48"}),
    ("alone", {"method": "uno", "reference_attention": "alone", "stage": "1"}),
])  # fmt: skip
def test_the_metadata_of_a_file_trained_before_is_what_these_tests_rely_on(name, told):
    about = metadata(LORAS / f"{name}.safetensors")
    assert {key: about[f"iclora.{key}"] for key in told} == told
