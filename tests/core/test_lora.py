"""LoRA layers and files: every dialect in, three out, and a refusal by name for everything else."""

import json
import math
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model.lora as lora
from golden import EXACT, FLUX, GOLDEN, WHOLE, case, far
from model.flux import Flux, FluxConfig
from model.lora import TARGETS, LoraLinear, attach, detach, load_lora, merge, save_lora, trainable
from model.lora_formats import DIFFUSERS, Delta, locate, lora_file, names_in, write_lora
from model.position import grid_ids, reference_ids
from model.weights import load_flux
from sampling.latents import pack

FILES = GOLDEN / "lora"
EXPECTED = load_file(FILES / "expected.safetensors")
NOTES = json.loads((FILES / "notes.json").read_text())
INPUTS = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
GIVEN = {name: case("dev")[name] for name in INPUTS}
PLAIN = FILES / "ai_toolkit_blocks.safetensors"
TO_Q = "transformer.transformer_blocks.0.attn.to_q"
QKV = "double_blocks.0.img_attn.qkv"


@pytest.fixture
def flux():
    return load_flux(FLUX["dev"], dtype=torch.float32)


def fresh(dtype=torch.float32):
    return load_flux(FLUX["dev"], dtype=dtype)


@torch.no_grad()
def run(flux, **more):
    return flux(**{**GIVEN, **more})


def weights(flux):
    return {name: tensor.clone() for name, tensor in flux.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def scramble(flux, seed=0):
    """Give fresh adapters something to say, exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(flux):
            parameter.copy_((0.1 * torch.randn(parameter.shape, generator=generator)).bfloat16())


def changed(tmp_path, source=PLAIN, metadata=None, drop=(), **more):
    """Copy a LoRA file with some tensors replaced, added or dropped; dots in names are written __ here."""
    tensors = load_file(source) | {name.replace("__", "."): tensor for name, tensor in more.items()}
    path = tmp_path / "changed.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items() if name not in drop}, path, metadata)
    return path


def renamed(tmp_path, rename, source=PLAIN, metadata=None):
    path = tmp_path / "renamed.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(source).items()}, path, metadata)
    return path


# reading


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_dialect_gives_the_official_output_attached_and_merged(flux, name):
    report = load_lora(flux, FILES / f"{name}.safetensors")
    assert far(run(flux), EXPECTED[name]) < WHOLE
    assert report.skipped == ()
    merge(flux)
    assert far(run(flux), EXPECTED[name]) < WHOLE


def test_all_golden_files_are_either_expected_or_refused():
    named = {path.stem for path in FILES.glob("*.safetensors")} - {"expected"}
    assert named == set(NOTES) and len(EXPECTED) == 8
    assert {name for name in named if not name.startswith("refuse_")} == set(EXPECTED)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("diffusers_all_linears", "diffusers names, 56 modules, rank 4, scale 1, 0 keys unused"),
        ("ai_toolkit_blocks", "diffusers names, 46 modules, rank 4, scale 1, 0 keys unused"),
        ("diffusers_alpha_metadata", "diffusers names, 46 modules, rank 4, scale 0.5, 0 keys unused"),
        ("kohya", "kohya names, 29 modules, rank 4, scale 0.5, 0 keys unused"),
        ("kohya_split_qkv", "kohya names, 29 modules, rank 2-6-8, scale 1, 0 keys unused"),
        ("comfyui_official_names", "ComfyUI names, 39 modules, rank 4, scale 1, 0 keys unused"),
        ("xlabs_partial", "xlabs names, 10 modules, rank 4, scale 1, 0 keys unused"),
    ],
)
def test_the_report_tells_dialect_modules_rank_and_scale(flux, name, line):
    assert str(load_lora(flux, FILES / f"{name}.safetensors")) == f"{name}.safetensors: {line}"


def test_the_uno_file_is_read_like_xlabs(flux):
    report = load_lora(flux, GOLDEN / "uno" / "dit_lora.safetensors")
    assert (report.dialect, report.modules) == ("xlabs", 14)
    part = flux.single_blocks[0].linear1.adapters[0]
    assert (part.rows.start, part.rows.stop) == (0, 192), "the qkv rows of linear1 and not the MLP's"


@pytest.mark.parametrize("references", [0, 1, 2, 3])
def test_the_uno_file_gives_unos_output(flux, references):
    golden = case("uno")
    load_lora(flux, GOLDEN / "uno" / "dit_lora.safetensors")
    latents = [golden["noise"], *(golden[f"ref{k + 1}"] for k in range(references))]
    sizes = [(z.shape[2] // 2, z.shape[3] // 2) for z in latents]
    ids = torch.cat([grid_ids(*sizes[0]), *reference_ids(sizes[0], sizes[1:])])
    with torch.no_grad():
        out = flux(
            torch.cat([pack(z) for z in latents], dim=1),
            ids[None],
            golden["txt"],
            torch.zeros(1, 7, 3),
            torch.tensor([0.6]),
            golden["y"],
            torch.tensor([4.0]),
        )
    want = golden[f"refs{references}.pe_d.out"]
    assert far(out[:, : want.shape[1]], want) < WHOLE


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("transformer."),
        lambda key: "base_model.model." + key.removeprefix("transformer."),
        lambda key: "unet." + key.removeprefix("transformer."),
        lambda key: "diffusion_model." + key.removeprefix("transformer."),
        lambda key: key.replace("lora_A.weight", "lora_A.default.weight").replace("lora_B.", "lora_B.default."),
        lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
        lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
        lambda key: key.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up"),
        lambda key: key.removesuffix(".weight"),
    ],
    ids=["bare", "PEFT", "unet", "ComfyUI", "default", "lora.down", "lora_down", "linear_layer", "no .weight"],
)
def test_every_prefix_and_suffix_is_understood(flux, tmp_path, rename):
    load_lora(flux, renamed(tmp_path, rename))
    assert far(run(flux), EXPECTED["ai_toolkit_blocks"]) < WHOLE


@pytest.mark.parametrize("prefix", ["lora_transformer_", "lycoris_", "lora_unet_"])
def test_names_without_dots_are_looked_up(flux, tmp_path, prefix):
    def rename(key):
        name, _, half = key.removeprefix("transformer.").partition(".lora_")
        return prefix + name.replace(".", "_") + {"A": ".lora_down", "B": ".lora_up"}[half[0]] + ".weight"

    load_lora(flux, renamed(tmp_path, rename, FILES / "diffusers_all_linears.safetensors"))
    assert far(run(flux), EXPECTED["diffusers_all_linears"]) < WHOLE


def test_every_name_without_dots_means_one_linear_only():
    names = [name.format(3) for name in DIFFUSERS] + [official.format(3) for official, _ in DIFFUSERS.values()]
    for name in names:
        assert locate("lora_unet_" + name.replace(".", "_")).module == locate(name).module


def test_qkv_rows_of_linear1_can_be_named_alone(flux, tmp_path):
    a, b = torch.randn(2, 64), torch.randn(192, 2)
    names = (
        "diffusion_model.single_blocks.0.linear1_qkv.lora_A.weight",
        "diffusion_model.single_blocks.0.linear1_qkv.lora_B.weight",
    )
    save_file(dict(zip(names, (a, b), strict=True)), tmp_path / "qkv.safetensors")
    before = flux.single_blocks[0].linear1.weight.clone()
    load_lora(flux, tmp_path / "qkv.safetensors")
    merge(flux)
    delta = flux.single_blocks[0].linear1.weight - before
    assert far(delta[:192], b @ a) < EXACT and not delta[192:].any()


def test_a_folder_saved_by_peft_takes_alpha_from_its_configuration(flux, tmp_path):
    source = FILES / "diffusers_alpha_metadata.safetensors"
    path = renamed(tmp_path, lambda key: "base_model.model." + key.removeprefix("transformer."), source)
    path.rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    report = load_lora(flux, tmp_path)
    assert (report.dialect, report.scales) == ("PEFT", (0.5,))
    assert far(run(flux), EXPECTED["diffusers_alpha_metadata"]) < WHOLE
    detach(flux)
    assert load_lora(flux, tmp_path / "adapter_model.safetensors").scales == (0.5,), "the file alone is as good"


def peft(**values):
    settings = {f"transformer.{name}": value for name, value in {"r": 4, "lora_alpha": 4, **values}.items()}
    return {"lora_adapter_metadata": json.dumps(settings)}


def test_alpha_patterns_count_as_peft_counts_them(flux, tmp_path):
    patterns = {"transformer_blocks.0.attn.to_q": 8, "proj_out": 2, r"^transformer_blocks\.1\.norm1\.linear": 12}
    load_lora(flux, changed(tmp_path, metadata=peft(alpha_pattern=patterns)))
    scales = {
        (name, part.rows.start): part.scale for name, layer in lora.layers(flux).items() for part in layer.adapters
    }
    assert scales.pop((QKV, 0)) == 2
    assert [scales.pop((f"single_blocks.{i}.linear2", 0)) for i in range(3)] == [0.5] * 3, "by the end of the name"
    assert scales.pop(("double_blocks.1.img_mod.lin", 0)) == 3
    assert set(scales.values()) == {1.0}


@pytest.mark.parametrize(("patterns", "scale"), [
    ({"to_q": 8, "transformer_blocks.0.attn.to_q": 2}, 2), ({"transformer_blocks.0.attn.to_q": 2, "to_q": 8}, 0.5),
])  # fmt: skip
def test_of_patterns_that_overlap_the_first_counts(flux, tmp_path, patterns, scale):
    """As in PEFT 0.21.2, get_pattern_key."""
    load_lora(flux, changed(tmp_path, metadata=peft(alpha_pattern=patterns)))
    assert [part.scale for part in lora.layers(flux)[QKV].adapters if part.rows.start == 0] == [scale]


def test_rank_patterns_and_rank_stabilised_scales_are_read(flux, tmp_path):
    path = changed(tmp_path, metadata=peft(r=8, rank_pattern={".*": 4}, use_rslora=True))
    assert load_lora(flux, path).scales == (2.0,)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (peft(use_dora=True), "is configured with use_dora, so it is no plain LoRA"),
        (peft(use_qalora=True), "is configured with use_qalora, so it is no plain LoRA"),
        (peft(peft_type="LOHA"), "is configured with peft_type LOHA, so"),
        (
            peft(init_lora_weights="pissa_niter_4"),
            "beside a base that pissa_niter_4 changed, which the file does not hold",
        ),
        (peft(init_lora_weights="OLoRA"), "beside a base that olora changed"),
        (peft(init_lora_weights="lora_ga"), "beside a base that lora_ga changed"),
        (peft(r=8), "says rank 8 for single_transformer_blocks.0.attn.to_k, but transformer.*lora_A.weight has rank 4"),
        (peft(lora_alpha=None), "gives single_transformer_blocks.0.attn.to_k the lora_alpha None, no positive number"),
        (peft(alpha_pattern={"(": 3}), "no valid pattern"),
        (peft(alpha_pattern=[]) | peft(alpha_pattern=[1]), "damaged rank_pattern or alpha_pattern"),
        ({"lora_adapter_metadata": "{"}, "damaged lora_adapter_metadata"),
        ({"lora_adapter_metadata": "[]"}, "damaged lora_adapter_metadata"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(flux, tmp_path, metadata, message):
    with pytest.raises(ValueError, match=message):
        load_lora(flux, changed(tmp_path, metadata=metadata))


def test_alpha_in_tensors_and_in_a_configuration_is_one_too_many(flux, tmp_path):
    with pytest.raises(ValueError, match="alpha and a PEFT configuration"):
        load_lora(flux, changed(tmp_path, FILES / "diffusers_alpha_tensors.safetensors", peft(lora_alpha=2)))


def test_the_bias_of_an_adapter_is_scaled_and_swapped_like_its_rows(flux, tmp_path):
    up, bias = torch.randn(128, 1), torch.randn(128)
    tensors = {"lora_A.weight": torch.zeros(1, 64), "lora_B.weight": up, "lora_B.bias": bias}
    tensors["alpha"] = torch.tensor(0.5)
    path = tmp_path / "bias.safetensors"
    save_file({f"transformer.norm_out.linear.{name}": tensor for name, tensor in tensors.items()}, path)
    before = flux.final_layer.adaLN_modulation[1].bias.clone()
    load_lora(flux, path, strength=0.5)
    attached = run(flux)
    save_lora(flux, tmp_path / "again.safetensors", dtype=torch.float32)
    merge(flux)
    assert far(run(flux), attached) < WHOLE
    delta = flux.final_layer.adaLN_modulation[1].bias - before
    assert far(delta, 0.25 * torch.cat((bias[64:], bias[:64]))) < EXACT
    again = fresh()
    load_lora(again, tmp_path / "again.safetensors")
    assert far(run(again), attached) < WHOLE
    with pytest.raises(ValueError, match="kohya dialect has no place for rows 0 to 128 of final_layer"):
        save_lora(again, tmp_path / "no.safetensors", "kohya")


# refusing


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refuse_dora", r"has DoRA magnitudes \(transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector\)"),
        ("refuse_unknown_block", "transformer_blocks.7.attn.to_q.lora_A.weight, but this model has no double_blocks.7"),
        ("refuse_missing_half", r"transformer_blocks.0.attn.to_q.lora_A.weight without its lora_B \(up\) half"),
        (
            "refuse_wrong_width",
            r"to_q.lora_A.weight of shape \(4, 56\); double_blocks.0.img_attn.qkv .* needs \(4, 64\)",
        ),
    ],
)
def test_golden_files_to_refuse_are_refused_and_leave_the_model_alone(flux, name, message):
    before = weights(flux)
    with pytest.raises(ValueError, match=message):
        load_lora(flux, FILES / f"{name}.safetensors")
    assert same(weights(flux), before)


ODD = {
    "DoRA": (f"{TO_Q}.dora_scale", "DoRA magnitudes"),
    "LoKr": (f"{TO_Q}.lokr_w1", "LoKr factors"),
    "LoHa": (f"{TO_Q}.hada_w1_a", "LoHa factors"),
    "OFT": ("oft_unet_double_blocks_0_img_mod_lin.oft_blocks", "OFT blocks"),
    "GLoRA": (f"{TO_Q}.a1.weight", "GLoRA matrices"),
    "diff": (f"{TO_Q}.diff", "whole weights to add"),
    "diff_b": (f"{TO_Q}.diff_b", "whole weights to add"),
    "set_weight": (f"{TO_Q}.set_weight", "whole weights to set"),
    "reshape": (f"{TO_Q}.reshape_weight", "a change of shape"),
    "norm": ("single_blocks.0.norm.key_norm.scale", "norms"),
    "w_norm": (f"{TO_Q}.w_norm", "norms"),
    "mid": (f"{TO_Q}.lora_mid.weight", "a third matrix"),
    "module": ("transformer.transformer_blocks.0.attn.to_z.lora_A.weight", "belongs to no Linear of FLUX.1"),
    "leading zero": ("transformer.transformer_blocks.00.attn.to_q.lora_A.weight", "belongs to no Linear"),
    "role": (f"{TO_Q}.lora_C.weight", "belongs to no Linear"),
    "unet": ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "belongs to no Linear"),
    "alpha": ("lora_unet_txt_in.alpha", r"has lora_unet_txt_in.alpha without its lora_A \(down\) half"),
    "twice": ("diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight", "which mean the same"),
    "clip": ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "1 keys of text encoders"),
    "t5": ("text_encoder_2.encoder.block.0.lora_A.weight", "1 keys of text encoders"),
}


@pytest.mark.parametrize("case", ODD)
def test_whatever_is_not_a_plain_lora_is_refused_by_name(flux, tmp_path, case):
    key, message = ODD[case]
    before = weights(flux)
    with pytest.raises(ValueError, match=message) as error:
        load_lora(flux, changed(tmp_path, **{key.replace(".", "__"): torch.zeros(4, 64)}))
    assert key in str(error.value) and "\n" not in str(error.value)
    assert same(weights(flux), before)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((4, 64), math.nan), f"values in {TO_Q}.lora_A.weight that are not finite"),
        (torch.full((4, 64), math.inf), "not finite"),
        (torch.zeros(0, 64), "rank 0"),
        (torch.zeros(()), "rank 0"),
        (torch.zeros(4, 64, 1, 1), r"of shape \(4, 64, 1, 1\)"),
        (torch.zeros(5, 64), r"lora_B.weight of shape \(64, 4\); double_blocks.0.img_attn.qkv .* needs \(64, 5\)"),
        (torch.zeros(4, 64, dtype=torch.int8), "lora_A.weight in I8"),
        (torch.zeros(4, 64).to(torch.float8_e4m3fn), "fp8|F8_E4M3"),
    ],
)
def test_bad_tensors_are_refused_by_name(flux, tmp_path, tensor, message):
    before = weights(flux)
    with pytest.raises(ValueError, match=message):
        load_lora(flux, changed(tmp_path, **{f"{TO_Q}.lora_A.weight".replace(".", "__"): tensor}))
    assert same(weights(flux), before)


@pytest.mark.parametrize("alpha", [torch.zeros(4), torch.tensor(math.nan), torch.tensor(2)])
def test_a_bad_alpha_is_refused(flux, tmp_path, alpha):
    with pytest.raises(ValueError, match="to_q.alpha"):
        load_lora(flux, changed(tmp_path, **{f"{TO_Q}.alpha".replace(".", "__"): alpha}))


def test_a_whole_model_is_no_lora(flux):
    with pytest.raises(ValueError, match="holds a FLUX.1 transformer, not a LoRA"):
        load_lora(flux, FLUX["dev"])
    with pytest.raises(ValueError, match="holds a FLUX.1 autoencoder, not a LoRA"):
        load_lora(flux, GOLDEN / "ae" / "ae.safetensors")


def test_missing_damaged_and_pickled_files_are_refused(flux, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_lora(flux, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="holds no LoRA, no .safetensors file; name the file"):
        load_lora(flux, tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(PLAIN.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        load_lora(flux, tmp_path / "cut.safetensors")
    header = b'{"__metadata__":{"a":1},"img_in.lora_A":{"dtype":"F32","shape":[1,64],"data_offsets":[0,256]},'
    header += b'"img_in.lora_B":{"dtype":"F32","shape":[64,1],"data_offsets":[256,512]}}'
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(512))
    with pytest.raises(ValueError, match="header is damaged"):
        load_lora(flux, tmp_path / "odd.safetensors")
    (tmp_path / "old.bin").write_bytes(b"PK\x03\x04" + bytes(64))
    with pytest.raises(ValueError, match="never unpickled"):
        load_lora(flux, tmp_path / "old.bin")


def test_text_encoder_parts_are_left_out_only_on_request(flux, tmp_path):
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    more = {f"{key}__{half}__weight": torch.zeros(4, 4) for half in ("lora_down", "lora_up")}
    path = changed(tmp_path, **more)
    with pytest.raises(ValueError, match=f"2 keys of text encoders \\({key}.*--skip-text-encoder"):
        load_lora(flux, path)
    report = load_lora(flux, path, skip_text_encoder=True)
    assert len(report.skipped) == 2 and str(report).endswith("0 keys unused, 2 of text encoders skipped")
    assert far(run(flux), EXPECTED["ai_toolkit_blocks"]) < WHOLE


def test_a_file_for_text_encoders_alone_is_refused(flux, tmp_path):
    save_file({"text_encoder.text_model.x.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "te.safetensors")
    with pytest.raises(ValueError, match="no adapter for the FLUX.1 transformer"):
        load_lora(flux, tmp_path / "te.safetensors", skip_text_encoder=True)


# the layer


@pytest.mark.parametrize("targets", [*TARGETS, "img_in,final_layer.*,*.out_layer", "attn, txt_in"])
def test_a_fresh_adapter_changes_nothing_to_the_bit(flux, targets):
    before = run(flux)
    attach(flux, targets, rank=4, alpha=7, generator=torch.Generator().manual_seed(0))
    assert lora.layers(flux) and torch.equal(run(flux), before)


def test_a_fresh_adapter_changes_nothing_to_the_bit_in_bfloat16():
    flux = fresh(torch.bfloat16)
    before = run(flux)
    attach(flux, rank=4)
    after = run(flux)
    assert after.dtype == torch.bfloat16 and torch.equal(after, before)


def test_a_seed_fixes_a_fresh_adapter():
    states = []
    for seed in (3, 3, 4):
        flux = fresh()
        attach(flux, "attn", 4, generator=torch.Generator().manual_seed(seed))
        states.append(dict(flux.named_parameters()))
    assert same(states[0], states[1]) and not same(states[0], states[2])
    down = states[0][f"{QKV}.adapters.0.down"]
    assert down.abs().max() <= 64**-0.5 and down.std() > 0.04, "uniform between the roots of 1 / inputs"


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 14 * 2 + 6 * 3),
        ("attn", 8 * 2 + 4 * 3),
        ("mlp", 4 * 2 + 2 * 3),
        ("mod", 2 * 2 + 3),
        ("uno", 4 * 2 + 2 * 3),
        ("attn,mlp,mod", 14 * 2 + 6 * 3),
        (QKV, 1),
        ("double_blocks.*.img_attn.qkv", 2),
    ],
)
def test_targets_mean_as_many_adapters_as_their_dialect_has_linears(flux, targets, count):
    attach(flux, targets, rank=2)
    assert len(trainable(flux)) == 2 * count


def test_all_linear_on_the_large_model_is_as_large_as_the_published_files():
    config = FluxConfig(64, 64, 768, 4096, 3072, 12288, 24, 19, 38, (16, 56, 56), True)
    with torch.device("meta"):
        flux = Flux(config)
        attach(flux, "all-linear", rank=16)
        assert sum(p.numel() for p in trainable(flux)) == 85_917_696
        detach(flux)
        attach(flux, "uno", rank=1)
        assert sum(p.numel() for p in trainable(flux)) == 1_867_776


def test_all_linear_attaches_what_the_published_files_hold(flux):
    def where(model):
        return {(n, p.rows.start, p.rows.stop) for n, layer in lora.layers(model).items() for p in layer.adapters}

    attach(flux, "all-linear", rank=4)
    other = fresh()
    load_lora(other, PLAIN)
    assert where(flux) == where(other)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("atn", "'atn' means no Linear of this model; did you mean attn.* choose from attn, mlp, mod, uno, all-linear"),
        ("double_blocks.0.img_atn.qkv", "did you mean double_blocks.0.img_attn.qkv"),
        ("double_blocks.9.*", "'double_blocks.9.\\*' means no Linear"),
        ("", "'' means no Linear"),
    ],
)
def test_a_wrong_target_shows_the_nearest(flux, targets, message):
    before = weights(flux)
    with pytest.raises(ValueError, match=message):
        attach(flux, targets)
    assert same(weights(flux), before)


@pytest.mark.parametrize("numbers", [{"rank": 0}, {"alpha": 0}, {"alpha": math.nan}, {"alpha": -1.0}])
def test_a_rank_or_alpha_out_of_range_is_refused(flux, numbers):
    with pytest.raises(ValueError, match=f"LoRA {next(iter(numbers))} .* out of range"):
        attach(flux, **numbers)


def test_a_strength_that_is_no_number_is_refused(flux):
    with pytest.raises(ValueError, match="strength nan is no finite number"):
        load_lora(flux, PLAIN, strength=math.nan)


def test_only_adapters_learn_and_gradients_equal_those_of_the_merged_weight(flux):
    attach(flux, f"attn,{QKV},txt_in", rank=2, alpha=3)
    scramble(flux)
    flux(**GIVEN).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable(flux))
    assert {id(p) for p in flux.parameters() if p.grad is not None} == {id(p) for p in trainable(flux)}
    layer, x = flux.double_blocks[0].img_attn.qkv, torch.randn(2, 5, 64, requires_grad=True)
    probe = torch.randn(2, 5, 192)
    (layer(x) * probe).sum().backward()
    weight = layer.weight.clone()
    for part in layer.adapters:
        weight[part.rows] += part.scale * part.up.detach() @ part.down.detach()
    assert far(x.grad, probe @ weight) < WHOLE
    part = layer.adapters[1]
    part.zero_grad()
    (layer(x) * probe).sum().backward()
    want = part.scale * torch.einsum("bto,bti->oi", probe, x.detach())[part.rows]
    assert far(part.up.grad, want @ part.down.detach().T) < 1e-4
    assert far(part.down.grad, part.up.detach().T @ want) < 1e-4


def test_gradients_of_parts_that_overlap_are_those_of_the_formula():
    layer = LoraLinear(torch.nn.Linear(3, 5).double())
    for start, stop, rank, bias in ((0, 5, 2, True), (1, 3, 1, False), (2, 5, 1, False)):
        down, up = torch.randn(rank, 3).double(), torch.randn(stop - start, rank).double()
        delta = Delta("", slice(start, stop), down, up, 0.5, torch.randn(5).double() if bias else None)
        layer.adapters.append(lora.Adapter(delta, 1.5))
    wide = torch.randn(2, 8, 3).double()
    for x in (wide, wide[:, ::4], wide[0], wide[:, :0]):
        x = x.detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, *parameters: layer(x), (x, *layer.adapters.parameters()))
        want = layer.base(x)
        for part in layer.adapters:
            change = x @ part.down.T @ part.up.T + (0 if part.bias is None else part.bias)
            want = want + 0.75 * torch.nn.functional.pad(change, (part.rows.start, 5 - part.rows.stop))
        assert torch.allclose(layer(x), want)


def test_master_weights_stay_float32_beside_a_bfloat16_model():
    flux = fresh(torch.bfloat16)
    attach(flux, rank=2)
    scramble(flux)
    flux(**GIVEN).float().square().mean().backward()
    assert {p.dtype for p in trainable(flux)} == {torch.float32} == {p.grad.dtype for p in trainable(flux)}


def test_a_bfloat16_model_with_a_lora_is_as_near_as_bfloat16_allows():
    flux = fresh(torch.bfloat16)
    load_lora(flux, PLAIN)
    exact = EXPECTED["ai_toolkit_blocks"]
    attached = run(flux)
    merge(flux)
    plain = far(run(fresh(torch.bfloat16)), run(fresh()))
    assert far(attached, exact) < 4 * plain and far(run(flux), exact) < 4 * plain


def test_detach_restores_every_module_and_every_bit(flux):
    modules, before = dict(flux.named_modules()), weights(flux)
    load_lora(flux, FILES / "diffusers_all_linears.safetensors")
    load_lora(flux, FILES / "kohya.safetensors", strength=0.3)
    attach(flux)
    detach(flux)
    assert dict(flux.named_modules()) == modules and same(weights(flux), before)


def test_merging_keeps_names_and_leaves_the_old_tensors_alone(flux):
    held = flux.state_dict()
    before = weights(flux)
    load_lora(flux, FILES / "diffusers_all_linears.safetensors")
    merge(flux)
    assert not lora.layers(flux) and flux.state_dict().keys() == before.keys()
    assert same(held, before), "whoever holds the old weights, a mapped file included, sees no change"
    assert not any(p.requires_grad for p in flux.parameters())


def test_several_loras_add_up_with_their_strengths(flux):
    base = weights(flux)
    deltas = []
    for name in ("kohya", "xlabs_partial"):
        one = fresh()
        load_lora(one, FILES / f"{name}.safetensors")
        merge(one)
        deltas.append({key: tensor - base[key] for key, tensor in one.state_dict().items()})
    load_lora(flux, FILES / "kohya.safetensors", strength=0.7)
    load_lora(flux, FILES / "xlabs_partial.safetensors", strength=-1.5)
    attached = run(flux)
    merge(flux)
    for key, tensor in flux.state_dict().items():
        assert far(tensor, base[key] + 0.7 * deltas[0][key] - 1.5 * deltas[1][key]) < EXACT, key
    assert far(run(flux), attached) < WHOLE


def test_strength_zero_is_the_base_model(flux):
    before = run(flux)
    load_lora(flux, PLAIN, strength=0)
    assert torch.equal(run(flux), before)


def test_a_loaded_lora_is_frozen_unless_it_is_to_be_trained(flux):
    load_lora(flux, FILES / "kohya.safetensors")
    assert trainable(flux) == []
    load_lora(flux, FILES / "kohya.safetensors", train=True)
    assert len(trainable(flux)) == 2 * 29 and {p.dtype for p in trainable(flux)} == {torch.float32}


def test_wrapping_keeps_what_a_linear_is_asked_for(flux):
    attach(flux, "img_in")
    assert isinstance(flux.img_in, LoraLinear) and flux.img_in.weight.dtype == torch.float32
    assert lora.shapes(flux) == lora.shapes(fresh())


# writing


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "xlabs"])
@pytest.mark.parametrize("targets", ["all-linear", "uno"])
def test_a_saved_lora_loads_as_it_was(flux, tmp_path, dialect, targets):
    attach(flux, "double_blocks.*_attn.*" if dialect == "xlabs" and targets != "uno" else targets, 3, alpha=1.5)
    scramble(flux)
    save_lora(flux, tmp_path / "a.safetensors", dialect, {"trigger": "x"})
    again = fresh()
    report = load_lora(again, tmp_path / "a.safetensors")
    assert (report.dialect, report.metadata) == (dialect, {"format": "pt", "trigger": "x"})
    assert far(run(again), run(flux)) < WHOLE, "0.5 and the weights here are exact in bfloat16"
    assert {t.dtype for name, t in load_file(tmp_path / "a.safetensors").items() if "alpha" not in name} == {
        torch.bfloat16
    }


def test_scales_and_strengths_that_differ_are_saved_in_every_dialect(flux, tmp_path):
    load_lora(flux, FILES / "xlabs_partial.safetensors", strength=0.3)
    attach(flux, "double_blocks.*_attn.*", 3, alpha=1)
    scramble(flux)
    for dialect in ("diffusers", "kohya", "xlabs"):
        save_lora(flux, tmp_path / "a.safetensors", dialect, dtype=torch.float32)
        again = fresh()
        load_lora(again, tmp_path / "a.safetensors")
        assert far(run(again), run(flux)) < WHOLE


def keys(flux, tmp_path, dialect, targets):
    attach(flux, targets, 2, generator=torch.Generator().manual_seed(0))
    save_lora(flux, tmp_path / "keys.safetensors", dialect)
    detach(flux)
    tensors = load_file(tmp_path / "keys.safetensors")
    return {
        name: tuple(t.shape)
        for name, t in tensors.items()
        if "blocks.1" not in name and "blocks_1" not in name and "blocks.2" not in name and "blocks_2" not in name
    }


def pairs(table, a, b, before=""):
    found = {}
    for name, (rank, inputs, outputs) in table.items():
        found |= {f"{before}{name}.{a}": (rank, inputs), f"{before}{name}.{b}": (outputs, rank)}
    return found


def test_the_diffusers_dialect_has_these_keys(flux, tmp_path):
    double, single = "transformer_blocks.0.", "single_transformer_blocks.0."
    table = {
        double + name: (2, 64, 64)
        for name in (
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
            "attn.to_out.0",
            "attn.to_add_out",
        )
    }
    table |= {double + name: (2, 64, 384) for name in ("norm1.linear", "norm1_context.linear")}
    table |= {double + name: (2, 64, 256) for name in ("ff.net.0.proj", "ff_context.net.0.proj")}
    table |= {double + name: (2, 256, 64) for name in ("ff.net.2", "ff_context.net.2")}
    table |= {single + name: (2, 64, 64) for name in ("attn.to_q", "attn.to_k", "attn.to_v")}
    table |= {single + "norm.linear": (2, 64, 192), single + "proj_mlp": (2, 64, 256)}
    table[single + "proj_out"] = (2, 320, 64)
    want = pairs(table, "lora_A.weight", "lora_B.weight", "transformer.")
    assert keys(flux, tmp_path, "diffusers", "all-linear") == want and len(want) == 2 * (14 + 6)


def test_the_kohya_dialect_has_these_keys(flux, tmp_path):
    table = {
        f"double_blocks_0_{stream}_{name}": sizes
        for stream in ("img", "txt")
        for name, sizes in {
            "mod_lin": (2, 64, 384),
            "attn_qkv": (6, 64, 192),
            "attn_proj": (2, 64, 64),
            "mlp_0": (2, 64, 256),
            "mlp_2": (2, 256, 64),
        }.items()
    }
    table |= {"single_blocks_0_linear1": (8, 64, 448), "single_blocks_0_linear2": (2, 320, 64)}
    table |= {"single_blocks_0_modulation_lin": (2, 64, 192)}
    want = pairs(table, "lora_down.weight", "lora_up.weight", "lora_unet_")
    want |= {f"lora_unet_{name}.alpha": () for name in table}
    assert keys(flux, tmp_path, "kohya", "all-linear") == want and len(want) == 3 * 13


def test_the_xlabs_dialect_has_these_keys(flux, tmp_path):
    table = {
        f"double_blocks.0.processor.{name}": (2, 64, outputs)
        for name, outputs in {"qkv_lora1": 192, "qkv_lora2": 192, "proj_lora1": 64, "proj_lora2": 64}.items()
    }
    table |= {"single_blocks.0.processor.qkv_lora": (2, 64, 192), "single_blocks.0.processor.proj_lora": (2, 320, 64)}
    want = pairs(table, "down.weight", "up.weight")
    assert keys(flux, tmp_path, "xlabs", "uno") == want
    uno = load_file(GOLDEN / "uno" / "dit_lora.safetensors")
    assert {name for name in want} == {
        name for name in uno if "_blocks.0." in "_" + name.replace("double", "_") or name.startswith("single_blocks.0.")
    }


def test_alpha_is_the_scale_times_the_stacked_rank_in_kohya(flux, tmp_path):
    attach(flux, "attn", rank=2, alpha=1)
    scramble(flux)
    save_lora(flux, tmp_path / "k.safetensors", "kohya")
    tensors = load_file(tmp_path / "k.safetensors")
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"] == 3
    assert tensors["lora_unet_double_blocks_0_img_attn_proj.alpha"] == 1
    up = tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    assert not up[:64, 2:].any() and not up[64:128, :2].any() and not up[64:128, 4:].any() and not up[128:, :4].any()


def test_where_ranks_differ_the_diffusers_dialect_says_each_alpha(flux, tmp_path):
    attach(flux, "attn", rank=2)
    attach(flux, "mod", rank=3)
    scramble(flux)
    save_lora(flux, tmp_path / "d.safetensors")
    tensors = load_file(tmp_path / "d.safetensors")
    assert tensors[f"{TO_Q}.alpha"] == 2 and tensors["transformer.transformer_blocks.0.norm1.linear.alpha"] == 3
    again = fresh()
    assert load_lora(again, tmp_path / "d.safetensors").scales == (1.0,)
    assert far(run(again), run(flux)) < WHOLE


@pytest.mark.parametrize(
    ("dialect", "targets", "message"),
    [
        ("kohya", "txt_in", "kohya dialect has no place for rows 0 to 64 of txt_in"),
        ("kohya", "final_layer.linear", "no place for rows 0 to 64 of final_layer.linear"),
        ("xlabs", "all-linear", "xlabs dialect has no place for rows 0 to 384 of double_blocks.0.img_mod.lin"),
        ("xlabs", "single_blocks.1.linear1", "no place for rows 0 to 448 of single_blocks.1.linear1"),
        ("xlabs", "mlp", "no place for rows 0 to 256 of double_blocks.0.img_mlp.0"),
        ("peft", "attn", "'peft' cannot be written; choose one of diffusers, kohya, xlabs"),
    ],
)
def test_what_a_dialect_cannot_hold_is_refused_by_name(flux, tmp_path, dialect, targets, message):
    attach(flux, targets, 2)
    with pytest.raises(ValueError, match=message):
        save_lora(flux, tmp_path / "no.safetensors", dialect)
    assert not list(tmp_path.iterdir())


def test_nothing_to_save_and_values_too_large_are_refused(flux, tmp_path):
    with pytest.raises(ValueError, match="no LoRA to write"):
        save_lora(flux, tmp_path / "no.safetensors")
    attach(flux, QKV, 1)
    with torch.no_grad():
        trainable(flux)[1].fill_(1e6)
    with pytest.raises(ValueError, match="lora_B.weight holds values that are not finite in torch.float16"):
        save_lora(flux, tmp_path / "no.safetensors", dtype=torch.float16)


def test_an_older_files_alpha_does_not_stay_in_the_header(flux, tmp_path):
    report = load_lora(flux, FILES / "diffusers_alpha_metadata.safetensors")
    more = {"ss_network_alpha": "2", "ss_base_model_version": "flux"}
    save_lora(flux, tmp_path / "a.safetensors", metadata=report.metadata | more)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "ss_base_model_version": "flux"}
    again = fresh()
    load_lora(again, tmp_path / "a.safetensors")
    assert far(run(again), EXPECTED["diffusers_alpha_metadata"]) < WHOLE


# diffusers itself


def diffusers_weights():
    """The golden model under diffusers' names."""
    official, norms = load_file(FLUX["dev"]), {"norm_q": "img_attn.norm.query_norm", "norm_k": "img_attn.norm.key_norm"}
    norms |= {"norm_added_q": "txt_attn.norm.query_norm", "norm_added_k": "txt_attn.norm.key_norm"}
    found = {}
    for name, (module, slot) in DIFFUSERS.items():
        depth = 1 if "{}" not in name else 2 if name.startswith("transformer") else 3
        for i in range(depth):
            for kind in ("weight", "bias"):
                tensor = official[f"{module.format(i)}.{kind}"]
                start, stop = lora.rows(slot, official[f"{module.format(i)}.weight"].shape)
                tensor = tensor[start:stop] if slot != "swapped" else torch.cat(tensor.chunk(2)[::-1])
                found[f"{name.format(i)}.{kind}"] = tensor
    for i in range(2):
        for name, own in norms.items():
            found[f"transformer_blocks.{i}.attn.{name}.weight"] = official[f"double_blocks.{i}.{own}.scale"]
    for i in range(3):
        for name in ("query", "key"):
            own = f"single_blocks.{i}.norm.{name}_norm.scale"
            found[f"single_transformer_blocks.{i}.attn.norm_{name[0]}.weight"] = official[own]
    return {name: tensor.float() for name, tensor in found.items()}


def diffusers_package():
    reason = "needs diffusers and peft, which nothing but these tests uses"
    pytest.importorskip("peft", reason=reason)
    return pytest.importorskip("diffusers", reason=reason)


@pytest.mark.parametrize("dialect", ["diffusers", "xlabs"])
@pytest.mark.parametrize("ranks", [(2,), (2, 3)], ids=["one rank", "two ranks"])
def test_diffusers_itself_gives_the_same_output(flux, tmp_path, dialect, ranks):
    diffusers = diffusers_package()
    FluxLoraLoaderMixin = diffusers.loaders.FluxLoraLoaderMixin
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    transformer.load_state_dict(diffusers_weights())
    targets = {"diffusers": ("all-linear,txt_in,final_layer.*", "mod"), "xlabs": ("uno", "single_blocks.*.linear2")}
    for rank, target in zip(ranks, targets[dialect], strict=False):
        attach(flux, target, rank, alpha=1)
    scramble(flux)
    save_lora(flux, tmp_path / "a.safetensors", dialect, dtype=torch.float32)

    # at small times and guidance the sinusoids agree to the last bit, which else moves the output by 2e-5
    small = {"timesteps": torch.tensor([0.02, 0.01]), "guidance": torch.tensor([0.03, 0.01])}
    given = {**GIVEN, **small}

    def output():
        with torch.no_grad():
            return transformer(
                hidden_states=given["img"],
                encoder_hidden_states=given["txt"],
                pooled_projections=given["y"],
                timestep=given["timesteps"],
                img_ids=given["img_ids"][0],
                txt_ids=given["txt_ids"][0],
                guidance=given["guidance"],
                return_dict=False,
            )[0]

    assert far(output(), run(fresh(), **small)) < WHOLE, "the weights were converted rightly"
    loaded, alphas = FluxLoraLoaderMixin.lora_state_dict(load_file(tmp_path / "a.safetensors"), return_alphas=True)
    FluxLoraLoaderMixin.load_lora_into_transformer(loaded, alphas, transformer)
    assert far(run(fresh(), **small), run(flux, **small)) > 0.01
    assert far(output(), run(flux, **small)) < WHOLE


def test_diffusers_itself_understands_kohya_files_of_the_large_width(tmp_path):
    # the reader of this dialect knows no other width
    FluxLoraLoaderMixin = diffusers_package().loaders.FluxLoraLoaderMixin

    with torch.device("meta"):
        known = lora.shapes(Flux(FluxConfig(64, 64, 768, 4096, 3072, 12288, 24, 1, 1, (16, 56, 56), True)))
    generator = torch.Generator().manual_seed(0)
    deltas = {}
    for module in (name for name in known if "_blocks." in name):
        for name, slot in names_in("diffusers", module):
            start, stop = lora.rows(slot, known[module])
            down, up = (torch.randn(sizes, generator=generator) for sizes in ((2, known[module][1]), (stop - start, 2)))
            deltas[name] = Delta(module, start, stop, down, up, 0.5)
    write_lora(list(deltas.values()), known, tmp_path / "k.safetensors", "kohya", dtype=torch.float32)
    loaded, _ = FluxLoraLoaderMixin.lora_state_dict(load_file(tmp_path / "k.safetensors"), return_alphas=True)
    assert len(loaded) == 2 * len(deltas) == 2 * 20
    for name, delta in deltas.items():
        x = torch.randn(delta.down.shape[1], generator=generator)
        theirs = loaded[f"{name}.lora_B.weight"] @ (loaded[f"{name}.lora_A.weight"] @ x)
        ours = delta.scale * delta.up @ (delta.down @ x)
        assert far(theirs, ours) < 1e-5 * ours.abs().max(), name


def test_messages_are_one_line(flux, tmp_path):
    for path in sorted(FILES.glob("refuse_*")):
        with pytest.raises(ValueError) as error:
            load_lora(flux, path)
        assert re.fullmatch(r"[ -~]+", str(error.value))


def test_a_runs_folder_means_its_lora_and_not_the_checkpoint_beside_it(tmp_path):
    for name in ("checkpoint.safetensors", "lora.safetensors"):
        (tmp_path / name).touch()
    assert lora_file(tmp_path) == tmp_path / "lora.safetensors"
