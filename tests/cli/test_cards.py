"""What the planner computes before anything is loaded, against what is measured, and what it chooses."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import iclora.monitor
import sample
import train
from iclora import sizes
from iclora.cards import MemoryPlan, Work, list_settings, plan_for_sampling, plan_for_training, plan_memory, share_plan
from iclora.cli import parse
from iclora.config import SampleConfig, TrainConfig, model_defaults, resolve_training_defaults, saved
from iclora.flops import Tokens, count_flops
from iclora.layout import Layout
from iclora.memory import add_memory_plans
from iclora.plan import make_plan
from iclora.sizes import forward_bytes, step_bytes
from iclora.training import checkpoint_blocks, flow_loss, plan_training
from lab.benchmarks import peers, rounds
from model import lora
from model.autoencoder import AutoEncoder, AutoEncoderConfig
from model.flux import Flux, FluxConfig
from model.weights import find_model

ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")
DEV = FluxConfig(64, 64, 768, 4096, 3072, 12288, 24, 19, 38, (16, 56, 56), True)
T5 = {"shared.weight": (32128, 4096)}
for number in range(24):
    block = f"encoder.block.{number}.layer"
    T5 |= {f"{block}.0.SelfAttention.{name}.weight": (4096, 4096) for name in "qkvo"}
    T5 |= {f"{block}.1.DenseReluDense.{name}.weight": (10240, 4096) for name in ("wi_0", "wi_1")}
    T5 |= {f"{block}.1.DenseReluDense.wo.weight": (4096, 10240)}
CLIP = {"text_model.embeddings.token_embedding.weight": (49408, 768)}
CLIP |= {f"text_model.encoder.layers.{n}.mlp.fc{i}.weight": (3072, 2304) for n in range(12) for i in (1, 2)}


def hollow(path, shapes, dtype, size):
    """Write a safetensors file with a whole header and a hole for its data, which takes no place on the disk."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + size * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    data = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + at)


@pytest.fixture(scope="session")
def dev(tmp_path_factory):
    """A folder with the headers of FLUX.1-dev."""
    folder = tmp_path_factory.mktemp("cards") / "flux-dev"
    with torch.device("meta"):
        networks = Flux(DEV), AutoEncoder(AutoEncoderConfig(128, (1, 2, 4, 4), 2))
    names = ("flux1-dev.safetensors", "BF16", 2), ("ae.safetensors", "F32", 4)
    for network, (name, dtype, size) in zip(networks, names, strict=True):
        hollow(folder / name, {key: tuple(t.shape) for key, t in network.state_dict().items()}, dtype, size)
    hollow(folder / "text_encoder_2" / "model.safetensors", T5, "BF16", 2)
    hollow(folder / "text_encoder" / "model.safetensors", CLIP, "BF16", 2)
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text("{}")
    return str(folder)


def layout(*size, references=()):
    return Layout(*size, references=references)


def small(hidden=256, heads=2, double=1, single=2, side=16, text=64):
    return peers.Shape(peers.flux_config(hidden, heads, double, single, 128, 64), side, text, 1, 2)


def near(estimate, measured):
    return abs(estimate - measured) <= 0.1 * measured


# estimates


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [small(), small(512, 4, 2, 1, 24, 32)])
def test_a_forward_holds_what_was_computed(shape, dtype):
    flux = peers.new_flux(shape, CPU, dtype)
    given = peers.new_inputs(flux.config, shape, CPU, dtype)
    peak = rounds.peak(torch.inference_mode()(lambda: flux(**given)), CPU)
    assert near(forward_bytes(flux.config, dtype, Tokens(shape.text, shape.side**2)), peak)


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float32])
@pytest.mark.parametrize(
    ("targets", "again"), [("all-linear", 0), ("attn", 0), ("uno", 2), ("all-linear", 3), ("attn", 3)]
)
def test_a_step_of_training_holds_what_was_computed(targets, again, dtype):
    shape = small(double=1, single=3)
    flux = peers.new_flux(shape, CPU, dtype)
    lora.attach(flux, targets, 2)
    checkpoint_blocks(flux, again)
    given = peers.new_batch(flux.config, shape, CPU, dtype)

    def step():
        flow_loss(flux, *given).mean().backward()
        flux.zero_grad(set_to_none=True)

    tokens = Tokens(shape.text, shape.side**2)
    assert near(step_bytes(flux.config, dtype, shape.train_batch, tokens, targets, 2, again), rounds.peak(step, CPU))


def test_the_autoencoder_holds_what_was_computed():
    network = AutoEncoder(AutoEncoderConfig(32, (1, 2, 4, 4), 2)).eval()
    pixel = 4 * 32 * 256**2
    decode = torch.inference_mode()(lambda: network.decode(torch.zeros(1, 16, 32, 32)))
    encode = torch.inference_mode()(lambda: network.encode(torch.zeros(1, 3, 256, 256)))
    assert near(sizes.DECODE["cpu"] * pixel, rounds.peak(decode, CPU))
    assert near(sizes.ENCODE * pixel, rounds.peak(encode, CPU))


def test_the_parts_of_the_released_model_are_known(dev):
    weights = sizes.read_weights(find_model(dev), torch.bfloat16)
    gigabytes = {name: round(getattr(weights, name) / 1e9, 2) for name in ("transformer", "modulation", "fp8", "text")}
    assert gigabytes == {"transformer": 23.8, "modulation": 6.49, "fp8": 8.62, "text": 9.94}
    assert 17.3e9 < weights.standing(20) < 17.4e9, "17.39 were measured on an H100"
    assert 8.7e9 < weights.standing(20, fp8=True) < 8.8e9, "8.79 were measured"
    assert weights.standing(20, offload=True) < 1.1e9


# work


@pytest.mark.parametrize(
    "targets", ["all-linear", "uno", "attn,mod", "txt_in,img_in,final_layer.linear,time_in.in_layer"]
)
@pytest.mark.parametrize("tokens", [Tokens(5, 16), Tokens(5, 16, 6), Tokens(5, 16, 6, alone=True)])
def test_flops_are_those_that_torch_counts(targets, tokens):
    shape = peers.Shape(peers.flux_config(64, 2, 2, 3, 24, 8), 4, 5, 1, 2)
    flux = peers.new_flux(shape, CPU, torch.float32)
    lora.attach(flux, targets, 4)
    ids = torch.zeros(2, tokens.target + tokens.refs, 3)
    refs = torch.zeros(2, tokens.refs, 64) if tokens.refs else None
    given = (torch.zeros(2, 16, 64), ids, torch.zeros(2, 5, 24), torch.zeros(2, 5, 3), torch.full((2,), 0.5))
    given += (torch.zeros(2, 8), torch.ones(2), None, refs, tokens.alone)
    flops = count_flops(flux.config, 2, tokens, flux)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        v = flux(*given)
    assert counter.get_total_flops() == flops.forward and flops.lora > 0
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        v.sum().backward()
    backward = flops.step - flops.forward  # but for the first layers, which pass no gradient on
    assert 0.8 * backward < counter.get_total_flops() <= backward


def test_the_released_models_work_is_as_published():
    assert round(count_flops(DEV, 1, Tokens(512, 4096)).forward / 1e12, 1) == 74.4


# recomputing


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_the_same_however_many_blocks_are_computed_again(dtype):
    shape, gradients, peaks = small(128, 2, 2, 2, 4, 5), [], []
    for again in (0, 1, 3, None):
        flux = peers.new_flux(shape, CPU, dtype)
        lora.attach(flux, "all-linear", 4, generator=torch.Generator().manual_seed(0), init="uno")
        for p in lora.trainable(flux):
            p.data += 0.01
        checkpoint_blocks(flux, again)
        run = peers.Training(flux, lora.trainable(flux), peers.new_batch(flux.config, shape, CPU, dtype))
        gradients.append(run.gradient())
        peaks.append(rounds.peak(run.gradient, CPU))
    assert all(torch.equal(gradients[0], other) for other in gradients[1:]) and gradients[0].any()
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[-1], "or nothing was computed again"


# choices


def sampled(dev, *flags):
    config = parse(SampleConfig, ["--model", dev, "--prompt", "a", "--dry-run", *flags], "")
    (plan,) = add_memory_plans([make_plan(config, lambda line: None)])
    return plan


GRID = ("--grid", "2x2", "--prompt", "[IMAGE1] a [IMAGE2] b [IMAGE3] c [IMAGE4] d")


@pytest.mark.parametrize(
    ("flags", "vram", "wanted"),
    [
        (GRID, "80", MemoryPlan(tables=True)),
        (GRID, "32", MemoryPlan(tables=True, free_text=True)),
        (GRID, "24", MemoryPlan(tables=True, free_text=True, tile=True)),
        (GRID, "16", MemoryPlan(tables=True, free_text=True, load_on_cpu=True, offload=True)),
        (
            GRID,
            "6",
            MemoryPlan(tables=True, free_text=True, load_on_cpu=True, text_on_cpu=True, tile=True, offload=True),
        ),
        ((), "16", MemoryPlan(tables=True, free_text=True, quantize="fp8")),
        ((), "12", MemoryPlan(tables=True, free_text=True, quantize="fp8")),
    ],
)
def test_the_first_setting_that_fits_is_taken(dev, flags, vram, wanted):
    plan = sampled(dev, *flags, "--vram", vram)
    assert plan.memory_plan == wanted and plan.memory_plan.peak <= 0.92e9 * float(vram)
    assert plan.config.tile == wanted.tile, "which changes pixels, so it is recorded"
    assert "vram" not in saved(plan.config) and saved(plan.config)["tile"] == wanted.tile


def test_requests_of_one_list_keep_their_own_tiles_and_all_loras_count():
    walk = ROOT / "weights" / "tiny" / "loras" / "walk.safetensors"
    for rows in ([{"tile": True}, {"lora": (str(walk),)}], [{"lora": (str(walk),)}, {"tile": True}]):
        configs = [SampleConfig(prompt="a cat.", grid="1x1", device="cpu", **row) for row in rows]
        plans = share_plan([make_plan(config, lambda line: None) for config in configs], int(8e9))
        assert [plan.config.tile for plan in plans] == ["tile" in row for row in rows]
        assert plans[0].memory_plan.phases["loading"] == plans[1].memory_plan.phases["loading"]
        loading = plans[0].memory_plan.phases["loading"]
        assert loading > plan_for_sampling([plans["lora" in rows[0]]], int(8e9)).phases["loading"]


def test_what_is_encoded_beside_the_transformer_counts(dev, tmp_path):
    Image.new("RGB", (1024, 1024)).save(tmp_path / "ref.png")
    plain, small, large = (
        sampled(dev, *flags, "--vram", "80").memory_plan
        for flags in ((), *(("--ref", str(tmp_path / "ref.png"), "--ref-size", size) for size in ("512", "1024")))
    )
    beside = small.phases["encoding"] - plain.phases["encoding"]
    assert plain.phases["encoding"] > plain.parts["of it on the device"] and beside == pytest.approx(
        sizes.ENCODE * 4 * 128 * 512**2
    )
    assert large.phases["encoding"] - plain.phases["encoding"] == pytest.approx(4 * beside)


def test_loras_count_while_they_are_merged_and_beside_fp8_codes_for_good(dev):
    (plan,), extra = [sampled(dev, "--vram", "80")], 2 * 10**9
    files, weights = plan.files, sizes.read_weights(plan.files, torch.bfloat16)
    work = Work(4608, 1e12, lambda again: 1e9, 0, 20, 1024**2, 0, 0)
    for coded in (False, True):
        own = replace(weights, coded=coded)
        for quantize, phase, grows in ((None, "loading", True), (None, "sampling", False), ("fp8", "sampling", coded)):
            config = replace(plan.config, vram=80, quantize=quantize)
            without, with_loras = (
                plan_memory(config, files.flux.config, own, one, 0).phases[phase]
                for one in (work, replace(work, loras=extra))
            )
            assert (with_loras - without >= extra) == grows


def test_fp8_does_not_come_by_itself_where_there_is_none():
    config = SampleConfig(device="mps")
    assert {plan.quantize for plan in list_settings(config, DEV, True, "mps")} == {None}
    assert {plan.quantize for plan in list_settings(config, DEV, True, "cuda")} == {None, "fp8"}


def test_on_a_cpu_encoders_leave_and_fp8_is_loaded_block_by_block(dev):
    argv = ["--model", dev, "--grid", "1x1", "--prompt", "a cat", "--device", "cpu", "--dtype", "bfloat16"]
    plan = make_plan(parse(SampleConfig, [*argv, "--quantize", "fp8"], "", "sample.py"), print)
    chosen = plan_for_sampling([plan], int(24e9))
    assert chosen == MemoryPlan(free_text=True, quantize="fp8")
    assert chosen.phases["sampling"] < chosen.phases["loading"] < 17e9, "which is less than the weights in bfloat16"


def test_too_little_is_refused_with_the_least_that_would_do(dev):
    with pytest.raises(
        ValueError, match=r"^--vram 2 is too little for 4608 tokens; .*offload.* needs --vram \d(\.\d)?; "
    ) as no:
        sampled(dev, *GRID, "--vram", "2")
    least = re.search(r"needs --vram (\S+);", str(no.value))[1]
    sampled(dev, *GRID, "--vram", least)
    with pytest.raises(ValueError, match="is too little"):
        sampled(dev, *GRID, "--vram", str(float(least) - 0.2))


def trained(dev, vram, batch=1, **options):
    files = find_model(dev)
    config = resolve_training_defaults(TrainConfig(vram=vram, batch=batch, **options), model_defaults(DEV), "cpu")
    return plan_for_training(config, [layout(1, 2, 512, 512)], files, 85_900_000, batch, 0)


def test_every_example_of_a_step_has_rows_of_its_own_in_the_plan(dev):
    one, four = (trained(dev, 80, 1, accumulate=n).parts["of it on the device"] for n in (1, 4))
    assert 90e6 < four - one < 110e6, "16 steps of 3 more examples, 2.1 MB each"


def test_training_keeps_the_activations_of_as_many_blocks_as_fit(dev):
    counts = [trained(dev, vram).checkpointing for vram in (80, 32, 24)]
    assert counts[0] == 0 < counts[1] < counts[2] <= 57
    assert trained(dev, 80, checkpointing=True).checkpointing == 57
    plans = [trained(dev, vram) for vram in (24, 16, 12)]
    assert [(plan.quantize, plan.offload) for plan in plans] == [(None, False), ("fp8", False), ("fp8", True)]
    assert all(plan.tables and plan.peak <= 0.92e9 * vram for plan, vram in zip(plans, (24, 16, 12), strict=True))
    with pytest.raises(ValueError, match="use that much, --checkpointing auto, a larger --accumulate or"):
        trained(dev, 2, checkpointing=False)


# commands


def test_dry_run_prints_the_plan_and_stops(dev, tmp_path, capsys):
    assert sample.main(["--model", dev, *GRID, "--vram", "24", "--dry-run", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tokens", "4608"]
    assert lines[-1] == "with modulation tables, text encoders freed first, tiles"
    flags = ["--data", str(ROOT / "sets" / "sketch"), "--out", str(tmp_path / "run"), "--dry-run"]
    assert train.main([*flags, "--checkpointing", "auto", "--vram", "0.25"]) == 0
    assert re.search(r"^with .*\d+ blocks computed again", capsys.readouterr().out, re.M)
    assert train.main([*flags, "--vram", "0.01"]) == 2
    assert capsys.readouterr().err.count("error: --vram 0.01 is too little") == 1
    assert not list(tmp_path.iterdir())


def test_fp8_that_makes_a_training_fit_is_recorded_as_if_it_had_been_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("iclora.training.check_training_memory", lambda *given: MemoryPlan(quantize="fp8"))
    config = TrainConfig(data=str(ROOT / "sets" / "sketch"), out=str(tmp_path / "run"))
    assert config.quantize is None and plan_training(config, 1, lambda line: None).config.quantize == "fp8"


@pytest.mark.slow
def test_a_training_on_a_small_card_ends_in_the_tensors_of_a_plain_one(tmp_path):
    flags = ["--data", str(ROOT / "sets" / "sketch"), "--batch", "2", "--steps", "2", "--sample-every", "0"]
    tensors = []
    for name, more in (("plain", []), ("small", ["--offload", "--checkpointing", "auto", "--vram", "0.25"])):
        assert train.main([*flags, "--device", "cpu", "--out", str(tmp_path / name), *more]) == 0
        tensors.append(load_file(tmp_path / name / "lora.safetensors"))
    assert tensors[0].keys() == tensors[1].keys() and all(torch.equal(tensors[1][k], t) for k, t in tensors[0].items())


@pytest.mark.parametrize("value", [True, False, "auto"])
def test_recomputing_is_asked_for_by_flag_and_replayed(tmp_path, value):
    flags = {True: ["--checkpointing"], False: ["--no-checkpointing"], "auto": ["--checkpointing", "auto"]}[value]
    assert parse(TrainConfig, [*flags, "--rank", "4"], "").checkpointing == value
    (tmp_path / "config.json").write_text(json.dumps({"config": {"checkpointing": value}}))
    assert parse(TrainConfig, ["--config", str(tmp_path / "config.json")], "").checkpointing == value


@pytest.mark.parametrize("flags", [["--checkpointing", "some"], ["--no-checkpointing", "auto"]])
def test_another_word_is_refused(flags):
    with pytest.raises(ValueError, match="see --help"):
        parse(TrainConfig, flags, "")


def test_the_speed_of_a_step_stands_beside_its_loss(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(iclora.monitor, "LOGGED", 1)
    flags = ["--data", str(ROOT / "sets" / "sketch"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert train.main([*flags, "--batch", "1", "--steps", "1", "--sample-every", "0", "--holdout", "0"]) == 0
    assert re.search(r" 1/1 .*loss \d\.\d{4}, [\d.]+ TFLOP/s", capsys.readouterr().err)
