"""fp8: how far codes are from weights, products of codes, gradients, what a file has in fp8, LoRAs beside it."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_checkpoint_forms import DEV, E5M2, SCALED, diffusers_flux, scaled, write

import sample
from golden import FLUX
from iclora.cards import check_device
from iclora.cli import parse
from iclora.config import SampleConfig, TrainConfig
from lora_cases import PLAIN, fresh, run, same, scramble
from model.checkpoint import Checkpoint
from model.lora import LoraLinear, attach, layers, load_lora, merge, trainable
from model.lora_formats import read_lora
from model.quantize import (
    FP8,
    SCALED_ROWS,
    Fp8Linear,
    Product,
    dequantize,
    load_quantized,
    quantize_rows,
    scaled_product,
)
from model.tables import is_modulation
from model.weights import load_flux, open_checkpoint

CODES = torch.arange(256, dtype=torch.uint8).view(FP8)
CODES = CODES[~CODES.float().isnan()].view(2, 127)  # all there are
NEEDS_ROWS = pytest.mark.skipif(torch.__version__ < "2.12", reason="before 2.12 a CPU multiplies no rows of codes")
SHORT = ["--grid", "1x2", "--steps", "2", "--mask", "2"]


def drawn(*shape, seed=0, std=1.0):
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def new_linear(inputs=64, outputs=48, dtype=torch.float32):
    """A Linear of codes, and the plain one that it stands for."""
    codes, scale = quantize_rows(drawn(outputs, inputs, std=0.02))
    plain = torch.nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)
    plain.weight.copy_((codes.double() * scale.double()).float().to(dtype))
    return Fp8Linear(codes, scale, plain.bias), plain


@torch.no_grad()
def quantize(flux):
    """What load_quantized does while it reads, afterwards."""
    for name, linear in list(flux.named_modules()):
        if type(linear) is torch.nn.Linear and "_blocks." in name and not is_modulation(name):
            flux.set_submodule(name, Fp8Linear(*quantize_rows(linear.weight.float()), linear.bias))


def opened(path=FLUX["dev"]):
    return open_checkpoint(path, "transformer")


def coded(flux):
    return {name: module for name, module in flux.named_modules() if isinstance(module, Fp8Linear)}


# codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_times_a_scale_is_their_product_rounded_once(dtype):
    scale = torch.tensor([[1 / 300], [0.7]])
    assert torch.equal(dequantize(CODES, scale, dtype), (CODES.double() * scale.double()).float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounded_row_is_within_half_a_step_of_float64(dtype):
    x = (drawn(64, 500) * torch.logspace(-4, 4, 64)[:, None]).to(dtype)
    codes, scale = quantize_rows(x)
    assert codes.dtype == FP8 and scale.shape == (64, 1) and scale.dtype == torch.float32
    got = codes.double() * scale.double()
    own = torch.finfo(dtype).eps  # of the product with the inverse, before it is rounded to a code
    bound = (x.double().abs() * (2**-4 + own)).maximum(scale.double() * (2**-10 + own))
    assert ((got - x.double()).abs() <= bound).all() and (got != x.double()).any()
    assert (codes.float().abs().amax(1) == 448).all(), "the range of the codes is used"


def test_a_row_of_zeros_stays_one_and_others_are_finite():
    x = torch.stack((torch.zeros(8), torch.full((8,), 3e38), torch.full((8,), 1e-11)))
    codes, scale = quantize_rows(x)
    got = dequantize(codes, scale, torch.float32)
    assert not got[0].any() and torch.isfinite(got).all() and torch.allclose(got[1:], x[1:], rtol=1e-5, atol=0)


def test_what_was_rounded_is_not_rounded_again():
    codes, scale = quantize_rows(drawn(32, 200))
    again, rescaled = quantize_rows(dequantize(codes, scale, torch.float32))
    assert torch.equal(again.float(), codes.float()) and torch.allclose(rescaled, scale, rtol=1e-6, atol=0)


def test_the_relative_error_of_a_random_weight_is_two_and_a_half_percent():
    weight = drawn(256, 1024).double()
    codes, scale = quantize_rows(weight.float())
    error = (codes.double() * scale.double() - weight).norm() / weight.norm()
    assert 0.02 < error < 0.03


# products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_multiply_the_widened_weight_to_the_bit(dtype):
    linear, plain = new_linear(dtype=dtype)
    x = drawn(2, 5, 64).to(dtype)
    assert torch.equal(linear(x), plain(x)) and linear(x).dtype == dtype


@NEEDS_ROWS
def test_codes_multiplied_are_the_product_of_both_rounded_factors():
    linear, plain = new_linear(inputs=256, dtype=torch.bfloat16)
    x = drawn(300, 256, seed=1).bfloat16()
    codes, scale = quantize_rows(x)
    want = (codes.double() * scale) @ (linear.weight.double() * linear.scale).T + linear.bias.double()
    got = scaled_product(x, linear.weight, linear.scale, linear.bias)
    assert got.dtype == torch.bfloat16 and (got - want).abs().max() <= 2**-8 * want.abs().max() + 1e-6
    exact = F.linear(x.double(), plain.weight.double(), plain.bias.double())
    assert 0.02 < (got - exact).norm() / (exact - plain.bias).norm() < 0.03, "the rounding of the activations alone"


def test_codes_are_multiplied_from_a_number_of_rows_on_and_in_bfloat16_on_a_card_only(monkeypatch):
    linear, _ = new_linear(dtype=torch.bfloat16)
    assert not linear.scaled(drawn(2 * SCALED_ROWS, 64).bfloat16()), "not on a CPU"
    linear.native = True

    class Card:
        is_cuda = True

        def __init__(self, *shape, dtype=torch.bfloat16):
            self.shape, self.dtype = torch.Size(shape), dtype

    assert linear.scaled(Card(2, SCALED_ROWS // 2, 64)) and not linear.scaled(Card(SCALED_ROWS - 1, 64))
    assert not linear.scaled(Card(SCALED_ROWS, 64, dtype=torch.float32))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert new_linear()[0].native and not new_linear(inputs=40)[0].native, "only multiples of 16 are multiplied"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert not new_linear()[0].native


@pytest.mark.parametrize("product", [False, pytest.param(True, marks=NEEDS_ROWS)])
def test_the_compiler_takes_it_whole(product):
    linear, _ = new_linear(dtype=torch.bfloat16)
    linear.scaled = lambda x: product
    x = drawn(40, 64).bfloat16()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), linear(x))


def test_on_cards_before_8_9_the_compiler_never_meets_a_float8(monkeypatch):
    """Triton refuses a kernel that has one among its inputs there."""
    want, met = new_linear(dtype=torch.bfloat16)[0], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    linear, x = Fp8Linear(want.weight.data, want.scale, want.bias), drawn(40, 64).bfloat16()
    monkeypatch.undo()

    def backend(graph, inputs):
        met.extend(t.dtype for t in inputs if isinstance(t, torch.Tensor))
        return graph

    assert torch.equal(torch.compile(linear, fullgraph=True, backend=backend)(x), want(x))
    assert torch.equal(linear(x), want(x)) and torch.int8 in met and FP8 not in met


# gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_widened_weight_and_no_wide_weight_is_kept(dtype):
    linear, plain = new_linear(dtype=dtype)
    x, grad = drawn(2, 5, 64).to(dtype).requires_grad_(), drawn(2, 5, 48, seed=1).to(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = linear(x)
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (out, plain(x))))
    assert {t.dtype for t in kept if t.numel() >= 48 * 64} == {FP8}


@NEEDS_ROWS
def test_where_activations_are_rounded_the_gradient_is_still_that_of_the_weight():
    linear, plain = new_linear(dtype=torch.bfloat16)
    x, grad = drawn(20, 64).bfloat16().requires_grad_(), drawn(20, 48, seed=1).bfloat16()
    out = Product.apply(x, linear.weight, linear.scale, linear.bias, True)
    assert not torch.equal(out, plain(x))
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (out, plain(x))))


def test_adapters_beside_codes_get_the_gradients_of_those_beside_the_widened_weights():
    narrow, wide = load_quantized(opened(), dtype=torch.float32), fresh()
    for name, linear in coded(narrow).items():
        wide.get_submodule(name).weight.copy_(dequantize(linear.weight, linear.scale, torch.float32))
    grads = []
    for flux in (narrow, wide):
        attach(flux, rank=2, generator=torch.Generator().manual_seed(0))
        scramble(flux)
        with torch.enable_grad():
            run.__wrapped__(flux).square().sum().backward()
        grads.append([p.grad for p in trainable(flux)])
        assert {p.requires_grad for name, p in flux.named_parameters() if "adapters" not in name} == {False}
    assert len(grads[0]) > 50 and all(map(torch.equal, *grads))


# the whole model


def test_the_linears_of_blocks_are_quantised_and_nothing_else():
    flux = fresh()
    before = {name: tensor.clone() for name, tensor in flux.state_dict().items()}
    quantize(flux)
    names = [name for name in before if name.endswith(".weight") and name.removesuffix(".weight") in coded(flux)]
    assert len(names) == 8 * len(flux.double_blocks) + 2 * len(flux.single_blocks)
    assert not [name for name in names if "mod" in name or "blocks" not in name]
    after = flux.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - {*names})
    assert {after[name].dtype for name in names} == {FP8}


def test_quantised_while_it_is_read_is_quantised_afterwards():
    flux = fresh(torch.bfloat16)
    quantize(flux)
    assert same(load_quantized(opened()).state_dict(), flux.state_dict())


def test_loras_are_merged_before_rounding_where_the_file_is_wide():
    flux = fresh(torch.bfloat16)
    load_lora(flux, PLAIN, 0.7)
    merge(flux)
    quantize(flux)
    notes = []
    loaded = load_quantized(opened(), loras=[(read_lora(PLAIN), 0.7)], note=notes.append)
    assert same(loaded.state_dict(), flux.state_dict()) and not layers(loaded)
    assert not same(loaded.state_dict(), load_quantized(opened()).state_dict())
    assert len(notes) == 1 and notes[0].startswith(PLAIN.name)


def test_no_more_than_a_block_is_read_at_once(monkeypatch):
    sizes, read = [], Checkpoint.read

    def spy(self, keys, *args):
        tensors = read(self, keys, *args)
        sizes.append(
            sum(t.numel() for key, t in tensors.items() if t.ndim == 2 and "blocks" in key and "mod" not in key)
        )
        return tensors

    monkeypatch.setattr(Checkpoint, "read", spy)
    flux = load_quantized(opened())
    blocks = [*flux.double_blocks, *flux.single_blocks]
    most = max(sum(c.weight.numel() for c in coded(block).values()) for block in blocks)
    assert sum(map(bool, sizes)) == len(blocks) and max(sizes) == most and sizes[0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_blocks_matrices_take_a_byte_a_value_and_each_row_a_scale(dtype):
    flux = load_quantized(opened(), dtype=dtype)
    standing = sum(p.numel() * p.itemsize for p in [*flux.parameters(), *flux.buffers()])
    matrices = sum(linear.weight.numel() for linear in coded(flux).values())
    rows = sum(len(linear.weight) for linear in coded(flux).values())
    everything = sum(p.numel() for p in fresh().parameters())
    assert standing == dtype.itemsize * (everything - matrices) + matrices + 4 * rows


# files that are in fp8 already


def load_kept(path):
    """Load a file, and demand that it computes what it does when it is widened, to the bit."""
    for dtype in (torch.float32, torch.bfloat16):
        flux = load_quantized(opened(path), dtype=dtype)
        wide = load_flux(path, dtype=dtype)
        assert torch.equal(run(flux), run(wide))
        for name, linear in coded(flux).items():
            assert torch.equal(dequantize(linear.weight, linear.scale, dtype), wide.get_submodule(name).weight), name
    return flux


def test_a_plain_fp8_file_is_kept_bit_for_bit_modulation_too(tmp_path):
    narrow = {key: tensor.to(FP8) if tensor.ndim == 2 else tensor for key, tensor in DEV.items()}
    path = write(tmp_path / "flux1-dev.safetensors", narrow)
    flux = load_kept(path)
    assert {name for name in narrow if "blocks" in name and narrow[name].ndim == 2} == {
        f"{n}.weight" for n in coded(flux)
    }
    for name, linear in coded(flux).items():
        assert torch.equal(linear.weight.view(torch.uint8), narrow[f"{name}.weight"].view(torch.uint8)), name
        assert (linear.scale == 1).all() and linear.scale.shape == (len(linear.weight), 1)


@pytest.mark.parametrize("convert", [dict, diffusers_flux])
@pytest.mark.parametrize("how", ["with a mark and scale_weight", "with a scale a row"])
def test_a_scaled_fp8_file_is_kept_with_its_scales_a_row(tmp_path, how, convert):
    scale, marks, metadata, settings = SCALED[how]
    tensors, _ = scaled(convert(DEV), scale, **settings)
    flux = load_kept(write(tmp_path / "flux1-dev.safetensors", tensors | marks, metadata))
    assert "double_blocks.0.img_mod.lin" in coded(flux)


def test_another_float8_is_rounded_to_ours(tmp_path):
    other = {key: tensor.to(E5M2) if tensor.ndim == 2 else tensor for key, tensor in DEV.items()}
    path = write(tmp_path / "flux1-dev.safetensors", other)
    flux = load_flux(path)
    quantize(flux)
    assert same(load_quantized(opened(path)).state_dict(), flux.state_dict())


def test_loras_stay_beside_what_the_file_has_in_fp8_exact_and_are_merged_into_the_rest(tmp_path):
    """The rest is here one Linear that the file has wide, which is merged and then rounded."""
    wide = "single_blocks.0.linear2.weight"
    narrow = {key: tensor.to(FP8) if tensor.ndim == 2 and key != wide else tensor for key, tensor in DEV.items()}
    path = write(tmp_path / "flux1-dev.safetensors", narrow)
    flux = load_quantized(opened(path), loras=[(read_lora(PLAIN), 1.0)])
    beside = load_flux(path)
    load_lora(beside, PLAIN)
    adapted = {*layers(beside)}
    assert {*layers(flux)} == adapted - {wide.removesuffix(".weight")} and wide.removesuffix(".weight") in adapted
    beside.set_submodule("single_blocks.0.linear2", layers(beside)["single_blocks.0.linear2"].merged())
    rounded = beside.single_blocks[0].linear2
    rounded.weight.copy_(dequantize(*quantize_rows(rounded.weight.float()), torch.bfloat16))
    assert torch.equal(run(flux), run(beside))
    merge(flux)
    assert all(isinstance(layer, LoraLinear) for layer in layers(flux).values()) and layers(flux)
    assert torch.equal(run(flux), run(beside)), "a second merge changes nothing"


def test_rounding_once_more_would_lose_a_third_of_a_small_change():
    """Why LoRAs are not merged into codes: a change of 1 % of the weights, along itself."""
    weight, change = drawn(256, 512), drawn(256, 512, seed=1, std=0.01)
    codes, scale = quantize_rows(weight)
    narrow = dequantize(codes, scale, torch.float32)
    left = []
    for start in (narrow, weight):
        rounded = dequantize(*quantize_rows(start + change), torch.float32)
        left.append(float(((rounded - narrow) * change).sum() / change.square().sum()))
    assert left[0] < 0.75 and left[1] == pytest.approx(1, abs=0.1)


# commands


def test_quantised_pictures_replay_to_the_same_bytes_and_differ_from_plain_ones(tmp_path):
    for flags in (SHORT, [*SHORT, "--quantize", "fp8"]):
        assert sample.main([*flags, "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert sample.main(["--config", str(tmp_path / "0002.json"), "--out", str(tmp_path)]) == 0
    plain, narrow, again = (tmp_path / f"000{n}.png" for n in (1, 2, 3))
    assert narrow.read_bytes() == again.read_bytes() != plain.read_bytes()
    configs = [json.loads(path.with_suffix(".json").read_text())["config"]["quantize"] for path in (plain, narrow)]
    assert configs == [None, "fp8"]


def test_what_cannot_work_is_refused_in_one_line():
    with pytest.raises(ValueError, match="^--quantize fp8 does not work on mps, which has no float8; leave it out"):
        check_device(SampleConfig(quantize="fp8", device="mps"))
    check_device(SampleConfig(quantize="fp8", device="cpu"))
    for config in (SampleConfig, TrainConfig):
        with pytest.raises(ValueError, match="--quantize 'fp4' is unknown; .*choose one of fp8"):
            parse(config, ["--quantize", "fp4"], "")
