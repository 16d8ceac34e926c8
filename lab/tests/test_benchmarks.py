"""The benchmarks' own arithmetic: equal weights under other names, medians, taking turns, memory. No peer is needed."""

import itertools
import json
import re
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lab.benchmarks import cards, commands, fp8, peers, rounds, speed
from model import lora
from model.quantize import Fp8Linear, quantize_rows, scaled_product

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = peers.Shape(peers.flux_config(64, 2, 2, 3, 24, 8), 4, 5, forward_batch=1, train_batch=2)
WIDTH = 64


@pytest.fixture
def flux():
    return peers.new_flux(SMALL, CPU, torch.float32)


# weights under the names of others


def test_diffusers_tensors_are_rows_of_ours_in_the_same_memory(flux):
    state = flux.state_dict()
    theirs = peers.diffusers_state(state)
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in state.values())
    for kind in ("weight", "bias"):
        block = "single_transformer_blocks.2."
        rows = [theirs[f"{block}{name}.{kind}"] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        assert torch.equal(torch.cat(rows), state[f"single_blocks.2.linear1.{kind}"])
    owned = {t.untyped_storage().data_ptr() for t in state.values()}
    copied = {name for name, t in theirs.items() if t.untyped_storage().data_ptr() not in owned}
    assert copied == {"norm_out.linear.weight", "norm_out.linear.bias"}


def test_every_name_of_diffusers_is_filled_once(flux):
    theirs = peers.diffusers_state(flux.state_dict())
    double, single = (
        {name.split(".", 2)[2] for name in theirs if name.startswith(f"{kind}transformer_blocks.1.")}
        for kind in ("", "single_")
    )
    assert (len(double), len(single)) == (14 * 2 + 4, 6 * 2 + 2)
    outside = {name for name in theirs if "transformer_blocks." not in name}
    assert len(theirs) == 2 * len(double) + 3 * len(single) + len(outside)
    assert len(outside) == 2 * 10


def test_the_last_modulation_changes_halves(flux):
    own = flux.state_dict()["final_layer.adaLN_modulation.1.weight"]
    theirs = peers.diffusers_state(flux.state_dict())["norm_out.linear.weight"]
    assert torch.equal(theirs[:WIDTH], own[WIDTH:]) and torch.equal(theirs[WIDTH:], own[:WIDTH])


def test_queries_of_text_and_image_keep_their_own_norms(flux):
    state = flux.state_dict()
    theirs = peers.diffusers_state(state)
    assert (
        theirs["transformer_blocks.1.attn.norm_added_k.weight"] is state["double_blocks.1.txt_attn.norm.key_norm.scale"]
    )
    assert theirs["transformer_blocks.1.attn.norm_q.weight"] is state["double_blocks.1.img_attn.norm.query_norm.scale"]


@pytest.mark.parametrize("name", ["img_in.gamma", "nothing.weight", "double_blocks.0.nothing.scale"])
def test_a_tensor_that_diffusers_does_not_know_is_refused(name):
    with pytest.raises(ValueError, match="has no name in diffusers"):
        peers.diffusers_state({name: torch.zeros(2, 2)})


def test_every_adapter_stands_beside_one_linear_of_diffusers(flux):
    theirs = peers.diffusers_state(flux.state_dict())
    parameters = peers.attach(flux, rank=4)
    parts = peers.adapters_by_diffusers_name(flux)
    assert len(parts) == 14 * 2 + 6 * 3 == len(parameters) // 2
    for name, part in parts.items():
        assert theirs[f"{name}.weight"].shape == (len(part.up), part.down.shape[1])
    assert all(p.abs().max() > 0 for p in parameters), "an up of zeros would hide the gradient of its down"


def test_an_adapter_of_rows_that_diffusers_cuts_is_refused(flux):
    lora.attach(flux, "uno", rank=4)
    with pytest.raises(ValueError, match="no Linear for rows 0 to 192 of double_blocks.0.img_attn.qkv"):
        peers.adapters_by_diffusers_name(flux)


def test_random_weights_are_the_same_each_time_and_give_outputs_of_ordinary_size(flux):
    again = peers.new_flux(SMALL, CPU, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(flux.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        out = flux(**peers.new_inputs(SMALL.config, SMALL, CPU, torch.float32))
    assert 0.1 < out.std() < 10 and out.shape == (1, 16, 64)


def test_a_training_step_trains_the_adapters_and_leaves_no_gradient(flux):
    run = peers.Training(flux, peers.attach(flux, rank=4), peers.new_batch(SMALL.config, SMALL, CPU, torch.float32))
    before = [p.detach().clone() for p in run.parameters]
    first, held = run.gradient(), len(run.standing())
    assert torch.equal(first, run.gradient()) and first.norm() > 0
    run.step()
    assert all(not torch.equal(p, old) and p.grad is None for p, old in zip(run.parameters, before, strict=True))
    assert len(run.standing()) == held + 3 * len(before), "AdamW holds two averages and a step count of each"


class OfficialFlux(peers.Flux):
    """Our transformer behind the official forward; the test gives it the weights."""

    def __init__(self, *params, **given):
        super().__init__(SMALL.config)

    def load_state_dict(self, state, assign):
        self.given = state

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None):
        return super().forward(img, img_ids, txt, txt_ids, timesteps, y, guidance)


class DiffusersFlux(OfficialFlux):
    """And behind that of diffusers."""

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, **more):
        assert set(more) == {"guidance", "return_dict"}
        img_ids, txt_ids = (ids.expand(len(hidden_states), -1, -1) for ids in (img_ids, txt_ids))
        rest = (timestep, pooled_projections, more["guidance"])
        return (super().forward(hidden_states, img_ids, encoder_hidden_states, txt_ids, *rest),)


@pytest.mark.parametrize("name", ["official", "diffusers"])
def test_a_training_step_gives_a_peer_what_its_forward_takes(flux, name, monkeypatch):
    package = SimpleNamespace(Flux=OfficialFlux, FluxParams=dict, FluxTransformer2DModel=DiffusersFlux)
    monkeypatch.setattr(peers.importlib, "import_module", lambda module: package)
    peer = peers.PEERS[name][1](SMALL.config, flux.state_dict())
    inner = peer.model if name == "official" else peer.transformer
    nn.Module.load_state_dict(inner, flux.state_dict(), assign=True)
    sets, *drawn = peers.new_batch(SMALL.config, SMALL, CPU, torch.float32)
    assert torch.equal(peers.flow_loss(peer, sets, *drawn), peers.flow_loss(flux, sets, *drawn))
    refs, ids = torch.randn(2, 4, 64), torch.randn(1, sets.z.shape[2] * sets.z.shape[3] // 4 + 4, 3)
    uno = replace(sets, references=refs, ids=ids)
    assert torch.allclose(peers.flow_loss(peer, uno, *drawn), peers.flow_loss(flux, uno, *drawn), atol=1e-5)
    for more in ({"attention_mask": torch.ones(21, 21, dtype=torch.bool)}, {"references": refs, "isolate_refs": True}):
        with pytest.raises(ValueError, match="peers know no masks"):
            peers.flow_loss(peer, replace(sets, **more), *drawn)


@pytest.mark.parametrize("measure", ["forward", "train"])
def test_the_installed_peers_agree_with_this_project(measure, monkeypatch, capsys):
    for package in ("diffusers", "peft", "fluxbfl"):
        pytest.importorskip(package)
    monkeypatch.setattr(peers, "SHAPES", {"tiny": SMALL})
    argv = ["--measure", measure, "--shapes", "tiny", "--dtypes", "float32", "--device", "cpu", "--profile"]
    assert speed.main(argv) == 0, capsys.readouterr().err


# the arithmetic


def test_the_spread_is_the_median_between_its_quartiles():
    assert rounds.spread([5, 1, 4, 2, 3]) == rounds.Spread(2, 3, 4)
    assert rounds.spread([7]) == rounds.Spread(7, 7, 7)
    with pytest.raises(ValueError, match="no measurement"):
        rounds.spread([])


@pytest.mark.parametrize(
    ("values", "scale", "text"),
    [
        ((0.0121, 0.0123, 0.0131), 1e3, "12.3 (12.1 to 13.1)"),
        ((1.04, 1.0561, 1.07), 1, "1.06 (1.04 to 1.07)"),
        ((1200, 1234, 1300), 1, "1234 (1200 to 1300)"),
        ((0, 0, 0), 1, "0.00 (0.00 to 0.00)"),
    ],
)
def test_spreads_are_written_to_three_digits(values, scale, text):
    assert rounds.Spread(*values).show(scale) == text


def test_speeds_are_compared_within_each_round():
    own, other = [1.0, 2.0, 40.0], [1.5, 3.0, 60.0]  # the machine slowed down; the ratio did not change
    assert rounds.times_as_fast(own, other) == rounds.Spread(1.5, 1.5, 1.5)


def test_all_take_turns_and_each_begins_in_its_round():
    now, order = [0.0], []

    def call(name, seconds):
        order.append(name)
        now[0] += seconds

    calls = {"a": lambda: call("a", 1.0), "b": lambda: call("b", 2.0)}
    measured = rounds.take_turns(calls, 3, CPU, clock=lambda: now[0], seconds=3.5)
    assert measured == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert "".join(order) == "aabb" + "aabb" + "bbaa" + "aabb", "a warm-up, then twice each, as b takes 2 of 3.5 s"


def test_the_peak_counts_what_is_held_at_one_time():
    def together():
        return torch.zeros(100_000) + torch.zeros(100_000)  # three of them at the end

    def in_turn():
        for _ in range(3):
            torch.zeros(100_000)

    assert 1.2e6 <= rounds.peak(together, CPU) < 1.25e6
    assert 0.4e6 <= rounds.peak(in_turn, CPU) < 0.45e6


def test_a_forward_and_a_training_step_hold_few_values_of_every_token(request):
    shape = replace(SMALL, side=16, text=64, train_batch=1)
    flux, tokens = peers.new_flux(shape, CPU, torch.float32), 4 * WIDTH * (16 * 16 + 64)  # bytes of one value of each
    given = peers.new_inputs(shape.read_config(), shape, CPU, torch.float32)
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # attention has room of its own for each
    with torch.no_grad():
        assert rounds.peak(lambda: flux(**given), CPU) / tokens < 16  # 15.9; 21 with linear1's until the block ends
    adapters = peers.attach(flux, 2)
    training = peers.Training(flux, adapters, peers.new_batch(shape.read_config(), shape, CPU, torch.float32))
    training.step()
    assert rounds.peak(training.step, CPU) / tokens / 5 < 25  # a block; 24.2


def test_operators_are_counted_and_sorted_by_kind():
    x = torch.zeros(64, 64)
    found = rounds.operators(lambda: (x @ x, x + x, x + x), CPU)
    assert (found["aten::mm"].calls, found["aten::add"].calls) == (1, 2) and found["aten::mm"].seconds > 0
    many = {f"aten::{number}": rounds.Operator(1e-6, 1) for number in range(20)}
    lines = rounds.operator_table({"ours": found, "theirs": many})
    assert lines[2].startswith("| **matrix products** |") and len(lines) == 2 + 3 + 15


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mm", "matrix products"),
        ("aten::addmm_", "matrix products"),
        ("aten::baddbmm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::native_layer_norm", "everything else"),
        ("aten::mul", "everything else"),
    ],
)
def test_operators_are_of_one_kind(operator, kind):
    assert rounds.group(operator) == kind


# the command


class Double(nn.Module):
    """A peer without a package: our own transformer, off by an error."""

    def __init__(self, config, state, error=0.0):
        super().__init__()
        self.flux, self.error = peers.Flux(config), error
        self.flux.load_state_dict(state, assign=True)

    def forward(self, **given):
        return self.flux(**given) * (1 + self.error)


@pytest.fixture
def command(monkeypatch):
    def run(*argv, error=0.0):
        build = lambda config, state: Double(config, state, error)  # noqa: E731
        monkeypatch.setattr(peers, "SHAPES", {"tiny": SMALL})
        monkeypatch.setattr(peers, "PEERS", {"official": ("torch", build)})
        return speed.main(["--measure", "forward", "--device", "cpu", "--peers", "official", "--rounds", "1", *argv])

    return run


def test_the_table_names_both_and_goes_to_a_file(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rounds, "elapsed", lambda *_: 1.0)
    assert command("--shapes", "tiny", "--dtypes", "float32", "--out", str(tmp_path / "speed.md")) == 0
    text = (tmp_path / "speed.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    ours, other = (line for line in text.splitlines() if line.startswith(("| this project", "| official: torch")))
    assert ours.split("|")[3].strip() == "" and other.split("|")[3].strip() == "1.00 (1.00 to 1.00)"
    assert "Relative distance from this project (tolerance 5e-05): official: torch" in text


def test_operators_take_the_place_of_times_with_profile(command, capsys):
    assert command("--shapes", "tiny", "--dtypes", "bfloat16", "--profile") == 0
    out = capsys.readouterr().out
    assert "**matrix products**" in out and "quartiles" not in out


def test_a_peer_that_disagrees_is_not_timed(command, capsys, tmp_path):
    out = tmp_path / "speed.md"
    assert command("--shapes", "tiny", "--dtypes", "float32", "--out", str(out), error=0.01) == 2
    assert "is 1.0e-02 from this project, more than 5e-05; nothing is timed" in capsys.readouterr().err
    assert not out.exists()


def test_a_missing_peer_is_named_with_what_installs_it(monkeypatch, capsys):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(peers, "version", missing)
    for measure, name in (("forward", "fluxbfl"), ("train", "diffusers")):
        assert speed.main(["--measure", measure, "--shapes", "tiny", "--device", "cpu"]) == 2
        assert f"{name} is not installed; run pip install -r lab/benchmarks/requirements.txt" in capsys.readouterr().err


def test_training_needs_the_peer_that_trains(capsys):
    assert speed.main(["--measure", "train", "--shapes", "tiny", "--device", "cpu", "--peers", "official"]) == 2
    assert "add diffusers to --peers" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--rounds", "0"], ["--shapes", "huge"], ["--dtypes", "int8"], ["--peers", "peft"]])
def test_a_wrong_argument_ends_with_status_2(argv, capsys):
    for module in (speed, fp8, cards):
        assert module.main(argv) == 2 and capsys.readouterr().err.count("\n") == 1


def test_processor_time_is_refused_where_it_sees_nothing(capsys):
    assert speed.main(["--clock", "cpu", "--device", "cuda"]) == 2
    assert "--clock cpu does not see" in capsys.readouterr().err


def test_only_the_benchmarks_ask_for_the_peers():
    def names(path):
        lines = (line.partition("#")[0].strip() for line in (ROOT / path).read_text().splitlines())
        return {line.partition("==")[0] for line in lines if line}

    assert names("lab/benchmarks/requirements.txt") == {"diffusers", "fluxbfl", "peft"}
    assert not names("requirements.txt") & {"diffusers", "fluxbfl", "peft", "accelerate"}
    sources = itertools.chain.from_iterable((ROOT / folder).rglob("*.py") for folder in ("model", "sampling", "iclora"))
    assert not [path for path in sources if "fluxbfl" in path.read_text()]


# what fp8 loses


def test_a_card_is_emulated_by_a_product_of_both_rounded_factors():
    codes, scale = quantize_rows(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)))
    linear = Fp8Linear(codes, scale, torch.ones(48, dtype=torch.bfloat16))
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = fp8.multiply_codes(linear, x)
    want = scaled_product(x.flatten(0, 1), codes, scale, linear.bias).view(2, 9, 48)
    assert got.dtype == torch.bfloat16 and torch.allclose(got, want, rtol=2**-7, atol=2**-5)
    assert not torch.equal(got, linear(x)), "few rows are not rounded by themselves"


def test_each_step_from_float32_to_codes_loses_more(monkeypatch):
    monkeypatch.setitem(fp8.SHAPES, "small", SMALL)
    lines = [line.split("|") for line in fp8.random("small") if "%" in line]
    errors = [float(line[2].strip(" %")) for line in lines]
    assert [line[1].strip() for line in lines] == [*fp8.PLAIN[1:], *fp8.NARROW]
    assert 0.1 < errors[0] < 2 < errors[1] < errors[3] < 20


def test_pictures_of_all_forms_are_compared(monkeypatch):
    monkeypatch.setattr(fp8, "GRIDS", ("1x2",))
    lines = [line.split("|") for line in fp8.bundled(1, 1) if "%" in line]
    assert [line[1].strip() for line in lines] == [*fp8.PLAIN[1:], *fp8.NARROW]
    errors, decibels = ([float(line[at].strip(" %")) for line in lines] for at in (2, 4))
    assert 0 < errors[0] < errors[1] < errors[3] < 50 and decibels[0] > decibels[1]


def test_training_on_codes_draws_the_same_and_its_curve_is_another(monkeypatch):
    for form in (fp8.PLAIN[1], fp8.NARROW[1]):  # on most CPUs bfloat16 takes minutes
        monkeypatch.delitem(fp8.TRAINED, form)
    wide, narrow = (
        [*map(float, line.split("|")[2:-1])] for line in fp8.training(4) if line.startswith(("| float32", "| fp8"))
    )
    assert len(wide) == 5 and wide != narrow and np.allclose(wide, narrow, rtol=0.1)


# a large model on a card


def test_every_part_is_measured_at_a_small_size_or_says_why_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        cards, "take_turns", lambda calls, *_, **more: {name: [call() is None or 1.0] for name, call in calls.items()}
    )
    monkeypatch.setattr(cards, "STEPS", 1)
    monkeypatch.setattr(cards, "UNO", (4, 2))
    monkeypatch.setattr(peers, "PEERS", {"official": ("torch", Double), "diffusers": ("none", Double)})
    command = [
        "--size",
        "small",
        "--device",
        "cpu",
        "--ways",
        "eager",
        "tables, offload",
        "--out",
        str(tmp_path / "rows"),
    ]
    parts = ["--parts", *(part for part in cards.PARTS if part != "profile")]
    assert cards.main([*command, *parts, "--minutes", "1e-9"]) == 0
    assert re.search(r"time is up; \d+ rows are left", capsys.readouterr().err)
    assert cards.main([*command, *parts]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert {row["what"].partition(",")[0] for row in rows} == {
        "matrix product", "forward", "training step", "picture in 1 steps", "training step in a budget", "loading",
        "distance from eager", "forward beside peers", "training step beside peers", "first picture", "next picture",
    }  # fmt: skip
    why = {row["way"]: row["not available"] for row in rows if "not available" in row}
    assert why["transformer"] == "no --model was given"
    assert all(row["equal"] for row in rows if row["what"] == "distance from eager")
    assert all("none is not installed" in row["not available"] for row in rows if row["what"].startswith("forward be"))
    assert "0.01 is too little" in why["0.01 GB"]
    for row in rows:
        if row["what"] in ("forward", "training step") and row["way"] == "eager":
            assert 0.3 < row["predicted GB"] / row["peak GB"] < 2 and row["tflops"] > 0  # at this width norms count
    table = capsys.readouterr().out
    assert table.count("\n") == len(rows) + 2
    assert cards.main([*command, *parts]) == 0
    assert capsys.readouterr().out == table, "nothing is measured again"
    assert len((tmp_path / "rows").read_text().splitlines()) == len(rows)


def test_peers_take_turns_with_ours_on_the_same_weights(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", {"official": ("torch", Double)})
    given = cards.SIZES["small"], cards.speed.forward, 4, 2, CPU, False
    figures = cards.turns(*given)
    (name,) = (key for key in figures if key.startswith("times as fast as official: torch"))
    assert 0.2 < figures[name] < 5 and figures["tflops"] > 0 and figures["peak GB"] > 0
    monkeypatch.setattr(peers, "PEERS", {"official": ("torch", lambda config, state: Double(config, state, 0.2))})
    with pytest.raises(cards.Missing, match="nothing is timed"):
        cards.turns(*given)


@pytest.mark.parametrize(
    ("kernel", "kind"),  # as they were seen, or stand in the compiler's code
    [
        ("triton_poi_fused_addmm_cat_gelu_7", "fused: gelu, and cat before linear2"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_cat_4", "fused: norms of queries and keys, RoPE, heads"),
        ("triton_red_fused_add_mul_native_layer_norm_2", "fused: other norms, modulation, gates"),
        ("cpp_fused_clone_1", "fused: everything else"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob", "attention"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNT", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "everything else"),
    ],
)
def test_a_kernel_is_of_one_kind(kernel, kind):
    assert cards.kind_of(kernel) == kind


def test_a_profile_says_where_the_time_of_a_forward_goes():
    figures = cards.forward(cards.SIZES["small"], (), 4, CPU, True)
    assert figures["ms by kind"]["matrix products"] > 0 and figures["ms by kind"]["attention"] > 0
    assert len(figures["largest"]) == cards.LARGEST


def test_a_whole_model_is_loaded_and_samples_in_a_process_and_in_a_pipeline(monkeypatch):
    monkeypatch.setattr(cards.whole, "STEPS", 1)
    monkeypatch.setattr(cards.whole, "run_command", lambda argv: (float(argv[0] == "sample.py"), 0, 0))
    rows = [*cards.whole.loading("tiny", CPU), *cards.whole.first("tiny", CPU)]
    figures = {key["way"].partition(",")[0]: measure() for key, measure in rows}
    assert figures["transformer"]["GB"] > figures["autoencoder"]["GB"] > 0.001
    assert figures["sample.py"] == {"ms": 1e3, "first ms": 1e3} and figures["one pipeline"]["sampling ms"] > 0


def test_a_transformer_made_beside_the_device_streams_to_it(monkeypatch):
    setting, given = cards.SIZES["small"], {}
    monkeypatch.setattr(cards, "offload", lambda flux, device: given.update(made=flux, to=device))
    flux = cards.made(setting, ("tables", "offload"), torch.device("meta"), CPU)
    assert given == {"made": flux, "to": torch.device("meta")} and flux.img_in.weight.device == CPU


def test_what_is_compiled_is_what_the_command_compiles(monkeypatch):
    compiled = []
    monkeypatch.setitem(cards.TECHNIQUES, "compile", compiled.append)
    flux = cards.made(cards.SIZES["small"], ("tables", "compile"), CPU)
    assert compiled == [flux]


# every command


def test_each_command_is_measured_with_its_memory_in_a_process_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(commands, "COMMANDS", ("-c 'held = b\"x\" * 3 * 10**8'", "-m iclora.data OUT/sets"))
    assert commands.main([]) == 0
    large, data = (line.split("|")[2:5] for line in capsys.readouterr().out.splitlines()[2:])
    assert float(large[2]) > 300 and float(data[1]) > float(large[1])


def test_a_command_that_fails_is_named_with_its_last_line(monkeypatch, capsys):
    monkeypatch.setattr(commands, "COMMANDS", ("-c 'import sys; print(\"why\"); sys.exit(3)'",))
    assert commands.main([]) == 2
    assert "ended with status 3: why" in capsys.readouterr().err
