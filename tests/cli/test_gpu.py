"""What a GPU adds: the same numbers, the same pictures to rounding, one training step. Skipped without CUDA."""

import pytest
import torch

import train
from golden import FLUX, case, far
from iclora.config import SampleConfig
from iclora.pipeline import Pipeline
from iclora.plan import make_plan
from iclora.training import checkpoint_blocks
from model import checkpoint, loading
from model.compiled import compile_blocks
from model.flux import Flux, FluxConfig
from model.loading import move
from model.lora import attach, trainable
from model.offload import offload
from model.quantize import SCALED, SCALED_ROWS, Fp8Linear, dequantize, load_quantized, quantize_rows
from model.tables import is_modulation, make_tables
from model.weights import examples_folder, load_flux, open_checkpoint
from sampling.denoise import denoise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_golden_forward_holds_on_the_gpu():
    golden = case("dev")
    flux = load_flux(FLUX["dev"], device="cuda", dtype=torch.float32)
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
    with torch.no_grad():
        out = flux(**{name: golden[name].cuda() for name in names})
    assert far(out.cpu(), golden["out"]) < 1e-4


@pytest.mark.parametrize("ref", [(), (str(examples_folder() / "references" / "cat.png"),)], ids=["plain", "reference"])
def test_a_set_on_the_gpu_is_the_set_of_the_cpu_to_rounding(ref):
    made = []
    for device in ("cpu", "cuda"):
        config = SampleConfig(grid="2x2", mask="3", ref=ref, steps=4, device=device, dtype="float32")
        (result,) = Pipeline(config, print).run(make_plan(config, print))
        made.append(torch.frombuffer(bytearray(result.composite.tobytes()), dtype=torch.uint8).float())
    assert (made[0] - made[1]).abs().mean() < 1


def test_a_training_runs_on_the_gpu(tmp_path):
    assert train.main(["--data", "sets/walk", "--steps", "2", "--device", "cuda", "--out", str(tmp_path / "run")]) == 0


def network():
    torch.manual_seed(0)
    flux = Flux(FluxConfig(64, 64, 256, 512, 1024, 4096, 8, 2, 2, (16, 56, 56), True)).to("cuda", torch.bfloat16)
    return flux.requires_grad_(False).eval()


def sample(flux, tokens=256, guidance=3.5):
    draw = torch.Generator().manual_seed(2)
    x, ids, txt = (torch.randn(1, *shape, generator=draw).cuda() for shape in ((tokens, 64), (tokens, 3), (64, 512)))
    with torch.inference_mode():
        return denoise(flux, x, [1.0, 0.7, 0.3, 0.0], ids, txt, txt[:, 0, :256], guidance)


def test_modulations_computed_ahead_are_off_the_gpu_and_the_same_to_the_bit():
    flux = network()
    want = sample(flux)
    modulations = sum(p.nbytes for name, p in flux.named_parameters() if is_modulation(name))
    before = torch.cuda.memory_allocated()
    make_tables(flux)
    assert before - torch.cuda.memory_allocated() > 0.99 * modulations
    assert torch.equal(sample(flux), want) and torch.equal(sample(flux), want) and flux.tables.passes == 1
    assert torch.equal(sample(flux, guidance=2.0), sample(network(), guidance=2.0)), "now from locked memory"
    assert before - torch.cuda.memory_allocated() > 0.9 * modulations


def gradients(flux):
    """Of adapters, with one block of each kind computed again."""
    checkpoint_blocks(flux, 3)
    draw = torch.Generator().manual_seed(3)
    img, txt, y = (torch.randn(2, *shape, generator=draw).cuda() for shape in ((64, 64), (16, 512), (256,)))
    ids, t, guidance = torch.zeros(2, 64, 3).cuda(), torch.tensor([0.3, 0.9]).cuda(), torch.ones(2).cuda()
    flux(img, ids, txt, torch.zeros(2, 16, 3).cuda(), t, y, guidance).float().square().mean().backward()
    return [p.grad for p in trainable(flux)]


def test_blocks_that_stream_from_locked_memory_give_the_bits_of_those_that_stay():
    want, streamed = sample(network()), network().cpu()
    offload(streamed, "cuda")
    assert all(torch.equal(sample(streamed), want) for _ in range(2))
    found = []
    for device in ("cuda", "cpu"):
        flux = network().to(device)
        attach(flux, rank=4, generator=torch.Generator().manual_seed(0), init="uno")
        for p in trainable(flux):
            p.data += 0.01
        found.append(gradients(flux if device == "cuda" else offload(flux, "cuda") and flux))
    assert found[0] and all(torch.equal(stays, streams) for stays, streams in zip(*found, strict=True))


def test_pieces_reach_the_card_bit_for_bit(monkeypatch):
    monkeypatch.setattr(checkpoint, "BIG", 0)
    monkeypatch.setattr(loading, "BIG", 0)
    monkeypatch.setattr(loading, "PIECE", 1000)
    want = load_flux(FLUX["dev"], dtype=torch.bfloat16)
    for flux in (load_flux(FLUX["dev"], "cuda", torch.bfloat16), move(load_flux(FLUX["dev"]).bfloat16(), "cuda")):
        assert all(p.is_cuda for p in flux.parameters())
        assert all(torch.equal(p.cpu(), want.get_parameter(name)) for name, p in flux.named_parameters())


def test_a_picture_on_a_small_card_is_that_on_a_large_one_to_the_bit():
    made = []
    for budget in ({}, {"vram": 1.0}, {"vram": 1.0, "offload": True}):
        pipeline = Pipeline.load("tiny", device="cuda", **budget)
        made.append(pipeline(grid="1x2", prompt="a cat", steps=3).composite.tobytes())
    assert made[0] == made[1] == made[2]


@pytest.mark.slow
def test_compiled_blocks_stay_near_those_as_written():
    plain, compiled = network(), network()
    make_tables(compiled)
    compile_blocks(compiled)
    for tokens in (256, 576, 1024):
        want = sample(plain, tokens)
        assert (sample(compiled, tokens) - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("rows", [SCALED_ROWS, 1000])
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < SCALED, reason="has no float8")
def test_a_card_multiplies_codes_as_the_cpu_does_compiled_too(rows):
    codes, scale = quantize_rows(torch.randn(512, 256, device="cuda"))
    linear = Fp8Linear(codes, scale, torch.randn(512, device="cuda").bfloat16())
    x = torch.randn(2, rows // 2, 256, device="cuda").bfloat16().requires_grad_()
    assert linear.scaled(x)
    x_codes, x_scale = quantize_rows(x.detach().flatten(0, 1).cpu())
    want = (x_codes.double() * x_scale) @ (codes.cpu().double() * scale.cpu()).t() + linear.bias.cpu().double()
    want = want.view(*x.shape[:2], -1)
    compiled = torch.compile(linear, fullgraph=True)  # which does not round the rows to bfloat16 before float8
    for call, tolerance in ((linear, 5e-3), (compiled, 3e-2)):
        out = call(x)
        assert (out.cpu() - want).float().norm() / want.float().norm() < tolerance
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert far(grad, dequantize(codes, scale, torch.float32).sum(0)) < 2**-6 * 512**0.5


def test_codes_that_stand_as_whole_numbers_are_widened_as_codes():  # on cards before 8.9 they do
    codes, scale = quantize_rows(torch.randn(64, 48, device="cuda"))
    want = dequantize(codes.cpu(), scale.cpu(), torch.bfloat16)
    for held in (codes, codes.view(torch.int8)):
        assert torch.equal(dequantize(held, scale, torch.bfloat16).cpu(), want)


def test_a_model_in_fp8_on_the_card_is_near_that_on_the_cpu():
    golden = case("dev")
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
    outs = []
    for device in ("cpu", "cuda"):
        flux = load_quantized(open_checkpoint(FLUX["dev"], "transformer"), device, torch.float32)
        with torch.no_grad():
            outs.append(flux(**{name: golden[name].to(device) for name in names}).cpu())
    assert far(*outs) < 1e-4
