"""LoRA files that hold more than two matrices: biases, factors of whole weights, alphas and headers of every kind.

References are formulas in float64, which know nothing of the code that is tested.
"""

import json
import math
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from golden import EXACT, WHOLE, far
from lora_cases import EXPECTED, PLAIN, QKV, TO_Q, changed, fresh, peft, run, same, weights
from model.lora import detach, layers, load_lora, merge, save_lora
from model.lora_formats import read_lora

D, MLP = 64, 256  # of the golden model
ROWS = {"q": slice(0, D), "k": slice(D, 2 * D), "v": slice(2 * D, 3 * D), "mlp": slice(3 * D, 3 * D + MLP)}


@pytest.fixture
def flux():
    return fresh()


def draw(*shape, dtype=torch.float32, seed=0):
    return (0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))).to(dtype)


def file_of(tmp_path, tensors, metadata=None, name="l.safetensors"):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name, metadata)
    return tmp_path / name


def changes(flux, path, strength=1.0):
    """What a file adds to the model, in float64, by released name; forwards agree with the merged weights."""
    before = {name: tensor.double() for name, tensor in flux.state_dict().items()}
    report = load_lora(flux, path, strength)
    attached = run(flux)
    merge(flux)
    assert far(run(flux), attached) < WHOLE
    after = {name: tensor.double() for name, tensor in flux.state_dict().items()}
    return {n: after[n] - before[n] for n in before if not torch.equal(after[n], before[n])}, report


def agree(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert far(got[name], tensor) < EXACT, name


def wide(tensor):
    return tensor.to(torch.float32).double()


# biases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_to_add_is_scaled_by_the_strength_and_not_by_alpha(flux, tmp_path, dtype):
    a, b, bias = draw(4, D, dtype=dtype), draw(3 * D, 4, dtype=dtype), draw(3 * D, dtype=dtype)
    name = f"diffusion_model.{QKV}"
    tensors = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.diff_b": bias}
    path = file_of(tmp_path, tensors | {f"{name}.alpha": torch.tensor(2.0)})
    got, _ = changes(flux, path, strength=0.7)
    agree(got, {f"{QKV}.weight": 0.7 * 2 / 4 * wide(b) @ wide(a), f"{QKV}.bias": 0.7 * wide(bias)})


def test_a_bias_alone_is_added_to_its_rows(flux, tmp_path):
    k, out = draw(D), draw(2 * D)
    names = {"transformer.transformer_blocks.0.attn.to_k.diff_b": k, "transformer.norm_out.linear.diff_b": out}
    path = file_of(tmp_path, names)
    got, report = changes(flux, path, strength=-2)
    want = torch.zeros(3 * D, dtype=torch.float64)
    want[ROWS["k"]] = -2 * wide(k)
    halves = torch.cat((wide(out)[D:], wide(out)[:D]))  # diffusers has scale first, the release shift
    agree(got, {f"{QKV}.bias": want, "final_layer.adaLN_modulation.1.bias": -2 * halves})
    assert report.modules == 2


def test_both_kinds_of_bias_add_up_and_survive_saving(flux, tmp_path):
    a, b, scaled, added = draw(2, D), draw(D, 2), draw(D), draw(D, seed=1)
    name = "transformer.transformer_blocks.0.attn.to_v"
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.lora_B.bias": scaled}
    path = file_of(tmp_path, tensors | {f"{name}.diff_b": added, f"{name}.alpha": torch.tensor(1.0)})
    load_lora(flux, path, 0.5)
    save_lora(flux, tmp_path / "again.safetensors", dtype=torch.float32)
    bias, weight = (torch.zeros(3 * D, *more, dtype=torch.float64) for more in ((), (D,)))
    bias[ROWS["v"]] = 0.5 * (0.5 * wide(scaled) + wide(added))
    weight[ROWS["v"]] = 0.5 * 0.5 * wide(b) @ wide(a)
    for file, strength in ((path, 0.5), (tmp_path / "again.safetensors", 1.0)):
        agree(changes(fresh(), file, strength)[0], {f"{QKV}.weight": weight, f"{QKV}.bias": bias})


def test_zeros_to_add_mean_nothing_whatever_they_are_of(flux, tmp_path):
    names = [f"{TO_Q}.diff_b", f"{TO_Q}.diff", "diffusion_model.txt_in.diff_b", "diffusion_model.norm.of_none.diff"]
    zeros = {name.replace(".", "__"): torch.zeros(7) for name in names}
    report = load_lora(flux, changed(tmp_path, **zeros))
    assert report.notes == ("4 tensors of zeros ignored",) and str(report).endswith(", 4 tensors of zeros ignored")
    assert far(run(flux), EXPECTED["ai_toolkit_blocks"]) < WHOLE
    save_lora(flux, tmp_path / "k.safetensors", "kohya")  # which has no place for a bias


def test_biases_of_a_wrong_size_or_of_no_linear_are_refused(flux, tmp_path):
    for key, message in (
        (f"{TO_Q}.diff_b", r"to_q.diff_b of shape \(7,\); double_blocks.0.img_attn.qkv of this model needs \(64,\)"),
        ("diffusion_model.img_norm.diff_b", "img_norm.diff_b, which belongs to no Linear"),
    ):
        with pytest.raises(ValueError, match=message):
            load_lora(flux, changed(tmp_path, **{key.replace(".", "__"): torch.ones(7)}))


# factors of whole weights


def lokr(seed=0, low=(), rank=3, size=(D, D), left=(8, 4)):
    """Factors of a LoKr and the change they mean, without alpha."""
    sizes = {"w1": left, "w2": (size[0] // left[0], size[1] // left[1])}
    factors, halves = {}, []
    for number, (name, (rows, columns)) in enumerate(sizes.items()):
        if name in low:
            a, b = draw(rows, rank, seed=seed + number), draw(rank, columns, seed=seed + number)
            factors |= {f"lokr_{name}_a": a, f"lokr_{name}_b": b}
            halves.append(wide(a) @ wide(b))
        else:
            factors[f"lokr_{name}"] = draw(rows, columns, seed=seed + number)
            halves.append(wide(factors[f"lokr_{name}"]))
    first, second = halves  # kron, as a sum over no index of einsum
    return factors, torch.einsum("ij,kl->ikjl", first, second).reshape(size)


def loha(seed=0, rank=3, size=(D, D)):
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = ((size[0], rank), (rank, size[1])) * 2
    factors = {name: draw(*shape, seed=seed + n) for n, (name, shape) in enumerate(zip(names, shapes, strict=True))}
    a, b, c, d = (wide(factor) for factor in factors.values())
    return factors, (a @ b) * (c @ d)


@pytest.mark.parametrize(
    ("low", "scale"), [((), 1), (("w1",), 5 / 3), (("w2",), 5 / 3), (("w1", "w2"), 5 / 3)], ids=str
)
def test_lokr_adds_the_kronecker_product_and_alpha_counts_only_where_a_factor_is_low_rank(flux, tmp_path, low, scale):
    factors, want = lokr(low=low)
    name = "lycoris_double_blocks_0_img_attn_proj"
    path = file_of(tmp_path, {f"{name}.{k}": t for k, t in factors.items()} | {f"{name}.alpha": torch.tensor(5.0)})
    got, report = changes(flux, path, strength=0.6)
    agree(got, {"double_blocks.0.img_attn.proj.weight": 0.6 * scale * want})
    assert str(report) == (
        f"l.safetensors: LyCORIS names, 1 modules, scale {scale:.4g}, 0 keys unused, 1 of them LoKr factors"
    )


def test_an_absurd_alpha_of_whole_factors_means_nothing(flux, tmp_path):
    """ai-toolkit writes 9999999999, in float16 infinite, where a LoKr has its full rank."""
    factors, want = lokr()
    for alpha in (torch.tensor(9999999999.0), torch.tensor(math.inf, dtype=torch.float16)):
        tensors = {f"{TO_Q}.{name}": tensor for name, tensor in factors.items()} | {f"{TO_Q}.alpha": alpha}
        got, _ = changes(fresh(), file_of(tmp_path, tensors))
        assert far(got[f"{QKV}.weight"][ROWS["q"]], want) < EXACT


@pytest.mark.parametrize("kind", [lokr, loha])
def test_factors_go_where_their_names_say(flux, tmp_path, kind):
    """Every spelling; rows of fused Linears; halves exchanged."""
    scale, tensors, want = (1, {}, {}) if kind is lokr else (2 / 3, {}, {})
    table = {
        "transformer.transformer_blocks.1.attn.add_k_proj": ("double_blocks.1.txt_attn.qkv", "k", (D, D)),
        "lycoris_single_transformer_blocks_0_proj_mlp": ("single_blocks.0.linear1", "mlp", (MLP, D)),
        "lora_unet_double_blocks_0_txt_mlp_2": ("double_blocks.0.txt_mlp.2", "", (D, MLP)),
        "diffusion_model.single_blocks.1.linear2": ("single_blocks.1.linear2", "", (D, D + MLP)),
        "transformer.norm_out.linear": ("final_layer.adaLN_modulation.1", "halves", (2 * D, D)),
    }
    known = {name: tuple(tensor.shape) for name, tensor in flux.state_dict().items()}
    for seed, (name, (module, part, size)) in enumerate(table.items()):
        factors, change = kind(seed=10 * seed, size=size)
        tensors |= {f"{name}.{key}": tensor for key, tensor in factors.items()} | {f"{name}.alpha": torch.tensor(2)}
        weight = torch.zeros(known[f"{module}.weight"], dtype=torch.float64)
        weight[ROWS.get(part, slice(None))] = torch.cat((change[D:], change[:D])) if part == "halves" else change
        want[f"{module}.weight"] = scale * weight
    agree(changes(flux, file_of(tmp_path, tensors))[0], want)


def test_a_whole_weight_is_added_whatever_alpha_stands_beside(flux, tmp_path):
    whole, a, b = draw(D, D), draw(2, D), draw(D, 2)
    name = "transformer.transformer_blocks.0.attn.to_k"
    pair = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    for more, low in (({}, 0), (pair, 4 / 2 * wide(b) @ wide(a))):
        path = file_of(tmp_path, {f"{name}.diff": whole, f"{name}.alpha": torch.tensor(4.0), **more})
        got, _ = changes(fresh(), path, strength=0.5)
        want = torch.zeros(3 * D, D, dtype=torch.float64)
        want[ROWS["k"]] = 0.5 * (wide(whole) + low)
        agree(got, {f"{QKV}.weight": want})


def test_factors_and_loras_add_up_and_come_off_to_the_bit(flux, tmp_path):
    before, modules = weights(flux), dict(flux.named_modules())
    factors, change = loha()
    path = file_of(tmp_path, {f"{TO_Q}.{name}": tensor for name, tensor in factors.items()})
    plain, other = changes(fresh(), PLAIN)[0], 2 * change
    load_lora(flux, PLAIN, 0.5)
    load_lora(flux, path, 2)
    attached = run(flux)
    detach(flux)
    assert same(weights(flux), before) and dict(flux.named_modules()) == modules
    load_lora(flux, PLAIN, 0.5)
    load_lora(flux, path, 2)
    merge(flux)
    assert far(run(flux), attached) < WHOLE and not layers(flux)
    got = {name: tensor.double() - before[name].double() for name, tensor in flux.state_dict().items()}
    want = {name: 0.5 * tensor for name, tensor in plain.items()}
    want[f"{QKV}.weight"][ROWS["q"]] += other
    agree({name: got[name] for name in want}, want)


def test_factors_are_neither_trained_further_nor_saved(flux, tmp_path):
    tensors = {f"{TO_Q}.{name}": tensor for name, tensor in lokr()[0].items()}
    path = file_of(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"LoKr factors \(.*lokr_w1\), which are not trained further; start from"):
        load_lora(flux, path, train=True)
    assert not layers(flux)
    load_lora(flux, path)
    with pytest.raises(ValueError, match="LoKr factors of double_blocks.0.img_attn.qkv are no LoRA that can be saved"):
        save_lora(flux, tmp_path / "no.safetensors")
    path = file_of(tmp_path, {f"{TO_Q}.diff": draw(D, D)})
    with pytest.raises(ValueError, match=r"whole weights to add \(.*to_q.diff\), which are not trained further"):
        load_lora(flux, path, train=True)


def test_factors_that_do_not_go_together_are_refused(flux, tmp_path):
    before, whole, high = weights(flux), lokr()[0], lokr(low=("w2",))[0]
    loose = loha()[0]
    for factors, message in (
        ({"lokr_w1": whole["lokr_w1"]}, r"lokr_w1 and not what goes with it \(lokr_w2_a\); it is damaged"),
        (whole | high, "and not what goes with it"),
        ({k: t for k, t in loose.items() if k != "hada_w2_b"}, r"what goes with it \(hada_w2_b\)"),
        (whole | {"diff": draw(D, D)}, "and not what goes with it"),
        (high | {"lokr_w2_b": draw(4, D // 4)}, "which make no matrix"),
        (whole | {"lokr_w1": draw(8, 4, 1)}, "which make no matrix"),
        (loose | {"hada_w2_a": draw(1, 3)}, "which make no matrix"),
        (lokr(low=("w1", "w2"))[0] | {"lokr_w1_a": draw(8, 4), "lokr_w1_b": draw(4, 4)}, "which make no matrix"),
        (
            whole | {"lokr_w1": draw(8, 8)},
            r"has a product of .*lokr_w1 of shape \(64, 128\); double_blocks.0.img_attn.qkv .* needs \(64, 64\)",
        ),
        (whole | {"lokr_w1": draw(8, 4).int()}, "lokr_w1 in I32; a LoRA must be in floats"),
        (whole | {"lokr_w1": torch.full((8, 4), math.nan)}, "values in .*lokr_w1 that are not finite"),
        (whole | {"lora_A.weight": draw(4, D), "lora_B.weight": draw(D, 4)}, "has both .*lora_A.weight and"),
        (high | {"alpha": torch.tensor(math.inf)}, "alpha of inf, no alpha"),
        (whole | {"dora_scale": draw(D, 1)}, "DoRA magnitudes"),
        (whole | {"scalar": draw(1)}, "to_q.scalar, which belongs to no Linear"),
    ):
        path = file_of(tmp_path, {f"{TO_Q}.{name}": tensor for name, tensor in factors.items()})
        with pytest.raises(ValueError, match=message) as error:
            load_lora(flux, path)
        assert "\n" not in str(error.value)
    assert same(weights(flux), before)


# alphas and types


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint64),
        *(torch.float64, torch.float32),
        *(torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    ],
    ids=str,
)
def test_an_alpha_may_be_of_any_type(flux, tmp_path, dtype):
    path = changed(tmp_path, **{f"{TO_Q}.alpha".replace(".", "__"): torch.tensor(2).to(dtype)})
    load_lora(flux, path)
    found = {a.rows.start: a.scale for a in layers(flux)[QKV].adapters}
    assert found == {0: 0.5, D: 1.0, 2 * D: 1.0}


def test_alphas_alone_mean_nothing_and_leave_a_note(flux, tmp_path):
    lone = {f"lora_unet_{name}__alpha": torch.tensor(4.0) for name in ("img_in", "txt_in")}
    report = load_lora(flux, changed(tmp_path, **lone))
    assert report.notes == ("2 alphas without matrices ignored (lora_unet_img_in.alpha)",)
    assert far(run(flux), EXPECTED["ai_toolkit_blocks"]) < WHOLE
    with pytest.raises(ValueError, match="no adapter for the FLUX.1 transformer"):
        read_lora(file_of(tmp_path, {"lora_unet_img_in.alpha": torch.tensor(4.0), "lora_te1_x.lora_A": draw(2, 2)}))


@pytest.mark.parametrize("name", ["alpha", "lora_alpha", "network_alpha", "ss_network_alpha"])
def test_an_alpha_of_the_header_is_followed_where_nothing_else_says_one(flux, tmp_path, name):
    report = load_lora(flux, changed(tmp_path, metadata={name: "2.0"}))
    assert report.scales == (0.5,) and report.notes == ("alpha 2 of its header followed",)
    key = f"{TO_Q}.alpha".replace(".", "__")
    report = load_lora(flux, changed(tmp_path, metadata={name: "2.0"}, **{key: torch.tensor(8.0)}))
    assert report.scales == (1.0, 2.0) and not report.notes, "tensors win"
    report = load_lora(flux, changed(tmp_path, metadata={name: "2.0", **peft(lora_alpha=12)}))
    assert report.scales == (3.0,) and not report.notes, "and so does PEFT's configuration"


def test_a_saved_lora_takes_no_alpha_of_an_older_header_along(flux, tmp_path):
    load_lora(flux, changed(tmp_path, metadata={"network_alpha": "2"}))
    want = run(flux)
    about = {"network_alpha": "2", "alpha": "2", "lora_alpha": "2", "ss_network_alpha": "2"}
    save_lora(flux, tmp_path / "s.safetensors", metadata=about, dtype=torch.float32)
    again = fresh()
    assert load_lora(again, tmp_path / "s.safetensors").scales == (1.0,)
    assert far(run(again), want) < WHOLE


def test_header_alphas_that_are_none_are_nothing_and_others_are_refused(flux, tmp_path):
    for metadata in ({"ss_network_alpha": "None"}, {"alpha": ""}, {"ss_network_dim": "4"}):
        assert load_lora(flux, changed(tmp_path, metadata=metadata)).scales == (1.0,)
    for metadata, says in (
        ({"ss_network_alpha": "Dynamic"}, "Dynamic"),
        ({"alpha": "nan"}, "nan"),
        ({"alpha": "1e300"}, "1e300"),
        ({"lora_alpha": "-1"}, "-1"),
        ({"alpha": "1", "network_alpha": "2"}, "1 and 2"),
        ({"alpha": "9" * 10_000}, "9" * 40),
    ):
        with pytest.raises(ValueError, match=f"no alpha but in its header, which says {says}; nobody knows"):
            load_lora(flux, changed(tmp_path, metadata=metadata))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_is_widened_to_bfloat16(flux, tmp_path, dtype):
    a, b, bias = (draw(*shape, dtype=dtype) for shape in ((4, D), (D, 4), (D,)))
    name = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.diff_b": bias}
    path = file_of(tmp_path, tensors | {f"{name}.alpha": torch.tensor(2.0).to(dtype)})
    load_lora(flux, path)
    assert layers(flux)["double_blocks.0.img_attn.proj"].adapters[0].down.dtype == torch.bfloat16
    module = "double_blocks.0.img_attn.proj"
    want = {f"{module}.weight": 2 / 4 * wide(b) @ wide(a), f"{module}.bias": wide(bias)}
    agree(changes(fresh(), path)[0], want)


def test_no_float64_is_left_in_what_is_attached(flux, tmp_path):
    load_lora(flux, file_of(tmp_path, {name: tensor.double() for name, tensor in load_file(PLAIN).items()}))
    assert {p.dtype for layer in layers(flux).values() for p in layer.adapters.parameters()} == {torch.float32}
    assert far(run(flux), EXPECTED["ai_toolkit_blocks"]) < WHOLE


def test_adapters_names_of_peft_are_left_out(flux, tmp_path):
    for number in ("default", "default_0"):
        names = {name: name.replace(".weight", f".{number}.weight") for name in load_file(PLAIN)}
        load_lora(flux, file_of(tmp_path, {names[name]: tensor for name, tensor in load_file(PLAIN).items()}))
        assert far(run(flux), EXPECTED["ai_toolkit_blocks"]) < WHOLE
        detach(flux)


# headers and other models

HEADERS = (
    ({"ss_base_model_version": "flux2"}, "FLUX.2"),
    ({"ss_base_model_version": "flux2_klein_9b"}, "FLUX.2"),
    ({"modelspec.architecture": "Flux.2-dev/lora"}, "FLUX.2"),
    ({"base_model": "black-forest-labs/FLUX.1-Fill-dev"}, "FLUX.1 Fill"),
    ({"base_model": "FLUX.1-Kontext-dev"}, "FLUX.1 Kontext"),
    ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL"),
    ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
    ({"ss_base_model_version": "sd_v1"}, "Stable Diffusion 1 or 2"),
    ({"ss_base_model_version": "sd3.5_large"}, "Stable Diffusion 3"),
    ({"modelspec.architecture": "stable-diffusion-3-medium"}, "Stable Diffusion 3"),
    ({"ss_base_model_version": "wan2.1"}, "Wan"),
    ({"base_model": "Wan-AI/Wan2.2-T2V-A14B"}, "Wan"),
    ({"base_model": "Qwen/Qwen-Image"}, "Qwen-Image"),
    ({"modelspec.architecture": "hunyuan-video"}, "HunyuanVideo"),
    ({"ss_base_model_version": "chroma"}, "Chroma"),
    ({"ss_base_model_version": "zimage"}, "Z-Image"),
    ({"base_model": "Tongyi-MAI/Z-Image-Turbo"}, "Z-Image"),
)


def test_a_header_for_another_model_gives_a_note_where_all_fits(flux, tmp_path):
    for metadata, model in HEADERS:
        report = load_lora(flux, changed(tmp_path, metadata=metadata))
        assert report.notes == (f"its header says it is for {model}",), metadata
        detach(flux)
    for name, values in (
        ("ss_base_model_version", ("flux1", "flux1_dev", "flux_dev", "")),
        ("modelspec.architecture", ("flux-1-dev/lora", "flux-1-schnell/lora", "Flux.1-AE")),
        (
            "base_model",
            ("black-forest-labs/FLUX.1-dev", "/home/wan/sdxl/flux1-dev.safetensors", "flux-2024-03", "swan"),
        ),
    ):
        for value in values:
            assert not load_lora(flux, changed(tmp_path, metadata={name: value})).notes, value
            detach(flux)


def test_a_peft_configuration_names_the_model_too(tmp_path):
    changed(tmp_path).rename(tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": "x/stable-diffusion-xl-base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert read_lora(tmp_path).notes == ("its header says it is for SDXL",)


def test_a_refusal_says_which_model_the_header_names(flux, tmp_path):
    header, says = {"ss_base_model_version": "flux2"}, "its header says it is for FLUX.2"
    for key, tensor, message in (
        (f"{TO_Q}.lora_A.weight", draw(4, 96), rf"needs \(4, 64\); {says}"),
        ("transformer.transformer_blocks.47.attn.to_q.lora_A.weight", draw(4, D), "without its lora_B"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", draw(4, D), f"belongs to no Linear of FLUX.1; {says}"),
    ):
        with pytest.raises(ValueError, match=message):
            load_lora(flux, changed(tmp_path, metadata=header, **{key.replace(".", "__"): tensor}))
    name = "transformer.transformer_blocks.47.attn.to_q"
    pair = {f"{name}.lora_A.weight": draw(4, D), f"{name}.lora_B.weight": draw(D, 4)}
    with pytest.raises(ValueError, match=f"no double_blocks.47.img_attn.qkv; it is for another; {says}"):
        load_lora(flux, file_of(tmp_path, pair, header))


@pytest.mark.parametrize(
    ("inputs", "model"), [(384, "FLUX.1 Fill"), (128, "FLUX.1 Canny or Depth, a control LoRA")], ids=str
)
def test_loras_of_models_with_more_input_channels_are_called_by_name(flux, tmp_path, inputs, model):
    pair = {"img_in.lora_A.weight": draw(4, inputs), "img_in.lora_B.weight": draw(D, 4)}
    with pytest.raises(ValueError, match=rf"\(4, {inputs}\); img_in of this model needs \(4, 64\); it is for {model}"):
        load_lora(flux, file_of(tmp_path, pair))
    pair = {"img_in.lora_A.weight": draw(inputs, D), "img_in.lora_B.weight": draw(2 * D, inputs)}
    with pytest.raises(ValueError, match=rf"\(128, {inputs}\); img_in of this model needs \(64, {inputs}\)$"):
        load_lora(flux, file_of(tmp_path, pair))  # of that rank, but of another width


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", "holds an IP adapter, not a LoRA"),
        ("redux_up.weight", "holds a FLUX.1 Redux adapter, not a LoRA"),
        ("transformer_blocks.0.attn.processor.q_loras.0.down.weight", "matrices of EasyControl, for its condition's"),
        ("single_blocks.3.processor.proj_loras.0.up.weight", "matrices of EasyControl"),
        ("omini.transformer_blocks.0.attn.to_q.lora_A.weight", "matrices of OminiControl"),
        ("single_blocks.0.norm.key_norm.lora_A.weight", "norms"),
    ],
)
def test_other_adapters_are_called_what_they_are(tmp_path, key, message):
    with pytest.raises(ValueError, match=message):
        read_lora(file_of(tmp_path, {key: draw(4, D)}))


# what a file can do to its reader


def test_patterns_of_a_file_cost_no_time_and_one_line(flux, tmp_path):
    patterns = ["([a-z0-9_.]+)*!", "a{99999999999999}", "(" * 5000, "(?=x)" * 1000, "[" * 100, "\\", "x" * 10**6]
    patterns += [".*" * 101, "a\nb", "é" * 300]
    start = time.process_time()
    for name in ("alpha_pattern", "rank_pattern"):
        for pattern in patterns:
            with pytest.raises(ValueError, match=f"in its {name}, no valid pattern") as error:
                read_lora(changed(tmp_path, metadata=peft(**{name: {pattern: 4}})))
            assert "\n" not in str(error.value) and len(str(error.value)) < 1000
        for many in ({f"to_{i}": 4 for i in range(100_000)}, {f"{'.*a' * 20}{i}": 4 for i in range(200)}):
            with pytest.raises(ValueError, match=f"patterns in its {name}, more than any trainer writes"):
                read_lora(changed(tmp_path, metadata=peft(**{name: many})))
    slowest = {f"{'*a' * 50}{i:02}".replace("*", ".*"): 4 for i in range(99)} | {f"to_{i}": 4 for i in range(900)}
    read_lora(changed(tmp_path, metadata=peft(alpha_pattern=slowest, rank_pattern=slowest)))
    assert time.process_time() - start < 20, "two seconds"


def test_settings_of_any_shape_cost_one_line(tmp_path):
    deep = json.loads("[" * 500 + "]" * 500)
    for settings in (
        {"lora_alpha": deep},
        {"r": {"a": deep}},
        {"peft_type": deep},
        {"init_lora_weights": ["pissa"], "lora_alpha": "x" * 10**6},
        {"lora_alpha": math.inf},
        {"lora_alpha": math.nan},
        {"lora_alpha": 10**300},
        {"alpha_pattern": {"to_q": math.nan}},
    ):
        with pytest.raises(ValueError) as error:
            read_lora(changed(tmp_path, metadata=peft(**settings)))
        assert len(str(error.value)) < 400


def test_empty_tensors_and_absurd_names_are_refused_at_once(tmp_path):
    for shape in ((0, 2**40), (2**40, 0), (0,), (0, 0, 0)):
        header = {"img_in.lora_A.weight": shape, "img_in.lora_B.weight": (2**40, 0)}
        entry = {k: {"dtype": "F32", "shape": list(s), "data_offsets": [0, 0]} for k, s in header.items()}
        text = json.dumps(entry).encode()
        (tmp_path / "e.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(ValueError, match="img_in.lora_A.weight of shape .* so of rank 0"):
            read_lora(tmp_path / "e.safetensors")
    for number in (100, 9999, 10**9):
        key = f"double_blocks.{number}.img_mod.lin.lora_A.weight"
        with pytest.raises(ValueError, match="belongs to no Linear of FLUX.1"):
            read_lora(file_of(tmp_path, {key: draw(1, D)}))


def test_a_pipe_is_no_lora_and_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(ValueError, match="holds no LoRA|it is no file"):
            read_lora(path)
    (tmp_path / "adapter_model.safetensors").unlink()
    changed(tmp_path).rename(tmp_path / "adapter_model.safetensors")
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(ValueError, match="adapter_config.json is no file"):
        read_lora(tmp_path)
