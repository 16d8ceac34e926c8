"""LoRA files: every dialect in, three out, and a refusal by name for everything else."""

import json
import math
import re
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model.lora as lora
import model.lora_formats as formats
from golden import EXACT, FLUX, GOLDEN, WHOLE, far
from lora_cases import (
    EXPECTED,
    FILES,
    GIVEN,
    PLAIN,
    QKV,
    TO_Q,
    changed,
    fresh,
    peft,
    renamed,
    run,
    same,
    scramble,
    weights,
)
from model.checkpoint import Stored
from model.flux import Flux, FluxConfig
from model.lora import attach, detach, load_lora, merge, save_lora, trainable
from model.lora_formats import (
    DIFFUSERS,
    OFFICIAL,
    TEXT_ENCODER,
    Delta,
    locate,
    lora_file,
    names_in,
    read_lora,
    slice_of,
    swap,
    write_lora,
)


@pytest.fixture
def flux():
    return fresh()


# reading


def test_all_golden_files_are_either_expected_or_refused():
    notes = json.loads((FILES / "notes.json").read_text())
    named = {path.stem for path in FILES.glob("*.safetensors")} - {"expected"}
    assert named == set(notes) and len(EXPECTED) == 8
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


def test_every_prefix_and_suffix_is_understood(tmp_path):
    renames = (
        lambda key: key.removeprefix("transformer."),
        lambda key: "base_model.model." + key.removeprefix("transformer."),
        lambda key: "unet." + key.removeprefix("transformer."),
        lambda key: "diffusion_model." + key.removeprefix("transformer."),
        lambda key: "model.diffusion_model." + key.removeprefix("transformer."),
        lambda key: key.replace("lora_A.weight", "lora_A.default.weight").replace("lora_B.", "lora_B.default."),
        lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
        lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
        lambda key: key.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up"),
        lambda key: key.removesuffix(".weight"),
    )
    for rename in renames:
        flux = fresh()
        load_lora(flux, renamed(tmp_path, rename))
        assert far(run(flux), EXPECTED["ai_toolkit_blocks"]) < WHOLE, rename(f"{TO_Q}.lora_A.weight")


def test_names_without_dots_are_looked_up(tmp_path):
    def rename(key):
        name, _, half = key.removeprefix("transformer.").partition(".lora_")
        return prefix + name.replace(".", "_") + {"A": ".lora_down", "B": ".lora_up"}[half[0]] + ".weight"

    for prefix in ("lora_transformer_", "lycoris_", "lora_unet_"):
        flux = fresh()
        load_lora(flux, renamed(tmp_path, rename, FILES / "diffusers_all_linears.safetensors"))
        assert far(run(flux), EXPECTED["diffusers_all_linears"]) < WHOLE, prefix


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


def test_a_runs_folder_means_its_lora_and_not_the_checkpoint_beside_it(tmp_path):
    for name in ("checkpoint.safetensors", "lora.safetensors"):
        (tmp_path / name).touch()
    assert lora_file(tmp_path) == tmp_path / "lora.safetensors"


def scales(flux):
    return {
        (name, adapter.rows.start): adapter.scale
        for name, layer in lora.layers(flux).items()
        for adapter in layer.adapters
    }


def test_alpha_patterns_count_as_peft_counts_them(flux, tmp_path):
    patterns = {"transformer_blocks.0.attn.to_q": 8, "proj_out": 2, r"^transformer_blocks\.1\.norm1\.linear": 12}
    patterns |= {r"single_transformer_blocks\..*\.norm\.linear$": 6, "^attn.to_k": 20, "attn.to_": 20, "linear": 4}
    load_lora(flux, changed(tmp_path, metadata=peft(alpha_pattern=patterns)))
    found = scales(flux)
    assert found.pop((QKV, 0)) == 2
    assert [found.pop((f"single_blocks.{i}.linear2", 0)) for i in range(3)] == [0.5] * 3, "by the end of the name"
    assert [found.pop((f"single_blocks.{i}.modulation.lin", 0)) for i in range(3)] == [1.5] * 3, "by a wildcard"
    assert found.pop(("double_blocks.1.img_mod.lin", 0)) == 3
    assert set(found.values()) == {1.0}, "^ means the beginning, and only whole names count"


def test_of_patterns_that_overlap_the_first_counts(tmp_path):
    """As in PEFT 0.21.2, get_pattern_key."""
    short, long, wild = "to_q", "transformer_blocks.0.attn.to_q", ".*to_q"
    for patterns, scale in (({short: 8, long: 2}, 2), ({long: 2, short: 8}, 0.5), ({wild: 4, long: 2}, 1)):
        flux = fresh()
        load_lora(flux, changed(tmp_path, metadata=peft(alpha_pattern=patterns)))
        assert scales(flux)[QKV, 0] == scale


def test_no_regular_expression_of_a_file_is_run(flux, tmp_path):
    for pattern in ("(", "(a+)+$", "to_q|to_k", "[ab]", "a{99}", r"\w", ""):
        with pytest.raises(ValueError, match="in its alpha_pattern, no valid pattern"):
            load_lora(flux, changed(tmp_path, metadata=peft(alpha_pattern={pattern: 3})))
    load_lora(flux, changed(tmp_path, metadata=peft(alpha_pattern={".*" * 60 + "x": 3})))  # and takes no time


def test_rank_patterns_and_rank_stabilised_scales_are_read(flux, tmp_path):
    path = changed(tmp_path, metadata=peft(r=8, rank_pattern={".*": 4}, use_rslora=True))
    assert load_lora(flux, path).scales == (2.0,)


def test_a_configuration_that_does_not_fit_is_refused(flux, tmp_path):
    module, key = "single_transformer_blocks.0.attn.to_k", "transformer.*lora_A.weight"
    for metadata, message in (
        (peft(use_dora=True), "is configured with use_dora, so it is no plain LoRA"),
        (peft(use_qalora=True), "is configured with use_qalora, so it is no plain LoRA"),
        (peft(peft_type="LOHA"), "is configured with peft_type LOHA, so"),
        (peft(init_lora_weights="pissa_niter_4"), "a base that pissa_niter_4 changed, which the file does not hold"),
        (peft(init_lora_weights="OLoRA"), "beside a base that olora changed"),
        (peft(init_lora_weights="lora_ga"), "beside a base that lora_ga changed"),
        (peft(r=8), f"says rank 8 for {module}, but {key} has rank 4"),
        (peft(lora_alpha=None), f"gives {module} the lora_alpha None, no positive number"),
        (peft(alpha_pattern=[1]), "damaged rank_pattern or alpha_pattern"),
        ({"lora_adapter_metadata": "{"}, "damaged lora_adapter_metadata"),
        ({"lora_adapter_metadata": "[]"}, "damaged lora_adapter_metadata"),
    ):
        with pytest.raises(ValueError, match=message):
            load_lora(flux, changed(tmp_path, metadata=metadata))


def test_settings_of_text_encoders_alone_say_nothing_of_the_transformer(flux, tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"text_encoder.r": 8, "text_encoder.lora_alpha": 2})}
    assert load_lora(flux, changed(tmp_path, metadata=metadata)).scales == (1.0,)


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


def test_reading_takes_time_linear_in_the_number_of_keys(monkeypatch):
    names = [f"lora_te1_text_model_{i}.alpha" for i in range(50_000)]
    modules = [name.format(i) for name in DIFFUSERS if "{}" in name for i in range(100)]
    names += [f"transformer.{module}.lora_{half}.weight" for module in modules for half in "AB"]
    tensors = dict.fromkeys(names, Stored(PLAIN, "F32", (1, 1)))
    monkeypatch.setattr(formats, "read_header", lambda path: (tensors, {}))
    start = time.perf_counter()
    file = read_lora(PLAIN)
    assert len(file.skipped) == 50_000 and len(file.entries) == len(modules) == 2_000
    assert time.perf_counter() - start < 4, "half a second; looking through a list for every key took 20"


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


def test_messages_are_one_line(flux, tmp_path):
    for path in sorted(FILES.glob("refuse_*")):
        with pytest.raises(ValueError) as error:
            load_lora(flux, path)
        assert re.fullmatch(r"[ -~]+", str(error.value))


ODD = (
    (f"{TO_Q}.dora_scale", "DoRA magnitudes"),
    (f"{TO_Q}.lokr_w1", r"lora_A.weight and .*lokr_w1; it is damaged"),
    (f"{TO_Q}.lokr_t2", "LoKr's form for convolutions"),
    (f"{TO_Q}.hada_t1", "LoHa's form for convolutions"),
    ("oft_unet_double_blocks_0_img_mod_lin.oft_blocks", "OFT blocks"),
    (f"{TO_Q}.a1.weight", "GLoRA matrices"),
    (f"{TO_Q}.set_weight", "whole weights to set"),
    (f"{TO_Q}.reshape_weight", "a change of shape"),
    ("single_blocks.0.norm.key_norm.scale", r"norms of a control LoRA \(FLUX.1 Canny or Depth\)"),
    ("transformer_blocks.0.attn.processor.q_loras.0.down.weight", "matrices of EasyControl"),
    (f"{TO_Q}.w_norm", "norms"),
    (f"{TO_Q}.lora_mid.weight", "a third matrix"),
    ("transformer.transformer_blocks.0.attn.to_z.lora_A.weight", "belongs to no Linear of FLUX.1"),
    ("transformer.transformer_blocks.00.attn.to_q.lora_A.weight", "belongs to no Linear"),
    (f"{TO_Q}.lora_C.weight", "belongs to no Linear"),
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "belongs to no Linear"),
    ("diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight", "which mean the same"),
)


def test_whatever_is_not_a_plain_lora_is_refused_by_name(flux, tmp_path):
    before = weights(flux)
    for key, message in ODD:
        with pytest.raises(ValueError, match=message) as error:
            load_lora(flux, changed(tmp_path, **{key.replace(".", "__"): torch.zeros(4, 64)}))
        assert key in str(error.value) and "\n" not in str(error.value)
    assert same(weights(flux), before)


def test_bad_tensors_are_refused_by_name(flux, tmp_path):
    before, up = weights(flux), r"lora_B.weight of shape \(64, 4\); double_blocks.0.img_attn.qkv .* needs \(64, 5\)"
    for tensor, message in (
        (torch.full((4, 64), math.nan), f"values in {TO_Q}.lora_A.weight that are not finite"),
        (torch.full((4, 64), math.inf), "not finite"),
        (torch.zeros(0, 64), "rank 0"),
        (torch.zeros(()), "rank 0"),
        (torch.zeros(4, 64, 1, 1), r"of shape \(4, 64, 1, 1\)"),
        (torch.zeros(5, 64), up),
        (torch.zeros(4, 64, dtype=torch.int8), "lora_A.weight in I8"),
        (torch.full((4, 64), 1e20), "not finite or beyond 1e\\+06"),
        (torch.full((4, 64), 1e300, dtype=torch.float64), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            load_lora(flux, changed(tmp_path, **{f"{TO_Q}.lora_A.weight".replace(".", "__"): tensor}))
    assert same(weights(flux), before)


def test_a_bad_alpha_is_refused(flux, tmp_path):
    bad = (math.nan, math.inf, -math.inf, 1e38, 1e300, 10**15)
    for alpha in (torch.zeros(4), torch.tensor(True), *(torch.tensor(a, dtype=torch.float64) for a in bad)):
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


def test_text_encoders_are_left_out_in_every_spelling(flux, tmp_path):
    for number, key in enumerate(
        (
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
            "lora_te2_encoder_block_0_layer_0_SelfAttention_q.alpha",
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight",
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj.dora_scale",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
            "text_encoder_2.encoder.block.0.lora_A.weight",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.diff",
            "text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
            "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
            "lycoris_text_model_encoder_layers_0_mlp_fc1.lokr_w1",
            "bundle_emb.my word.clip_l",
            "bundle_emb.my word.t5",
        )
    ):
        report = load_lora(flux, changed(tmp_path, **{key.replace(".", "__"): torch.ones(4, 4)}))
        assert report.skipped == (key,) and str(report).endswith("0 keys unused, 1 of text encoders skipped")
        if number in (0, 12):
            assert far(run(flux), EXPECTED["ai_toolkit_blocks"]) < WHOLE
        detach(flux)
    names = [name.format(0) for name in (*DIFFUSERS, *OFFICIAL)]
    for prefix in ("", "transformer.", "base_model.model.", "lora_unet_", "lora_transformer_", "lycoris_"):
        assert not [n for n in names if TEXT_ENCODER.search(prefix + n)], "no Linear is taken for a text encoder's"
        assert not [n for n in names if TEXT_ENCODER.search((prefix + n).replace(".", "_"))]


def test_a_file_for_text_encoders_alone_is_refused(tmp_path):
    save_file({"text_encoder.text_model.x.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "te.safetensors")
    with pytest.raises(ValueError, match="no adapter for the FLUX.1 transformer, only 1 keys of text encoders"):
        read_lora(tmp_path / "te.safetensors")


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


def test_a_lora_of_strength_zero_is_saved_as_nothing(flux, tmp_path):
    load_lora(flux, FILES / "xlabs_partial.safetensors", strength=0)
    for dialect in ("diffusers", "kohya", "xlabs"):
        save_lora(flux, tmp_path / "a.safetensors", dialect)
        again = fresh()
        load_lora(again, tmp_path / "a.safetensors")
        assert torch.equal(run(again), run(fresh()))


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
    for name, (module, part) in DIFFUSERS.items():
        depth = 1 if "{}" not in name else 2 if name.startswith("transformer") else 3
        for i in range(depth):
            for kind in ("weight", "bias"):
                tensor = official[f"{module.format(i)}.{kind}"]
                tensor = tensor[slice_of(part, official[f"{module.format(i)}.weight"].shape)]
                tensor = swap(tensor) if part == "swapped" else tensor
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
        for name, part in names_in("diffusers", module):
            rows = slice_of(part, known[module])
            sizes = (2, known[module][1]), (rows.stop - rows.start, 2)
            down, up = (torch.randn(size, generator=generator) for size in sizes)
            deltas[name] = Delta(module, rows, down, up, 0.5)
    write_lora(list(deltas.values()), known, tmp_path / "k.safetensors", "kohya", {}, torch.float32)
    loaded, _ = FluxLoraLoaderMixin.lora_state_dict(load_file(tmp_path / "k.safetensors"), return_alphas=True)
    assert len(loaded) == 2 * len(deltas) == 2 * 20
    for name, delta in deltas.items():
        x = torch.randn(delta.down.shape[1], generator=generator)
        theirs = loaded[f"{name}.lora_B.weight"] @ (loaded[f"{name}.lora_A.weight"] @ x)
        ours = delta.scale * delta.up @ (delta.down @ x)
        assert far(theirs, ours) < 1e-5 * ours.abs().max(), name
