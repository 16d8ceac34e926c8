"""LoRA layers: the equation, what it gives for every golden file, attached and merged, and what may be trained."""

import math

import pytest
import torch

import model.lora as lora
from golden import EXACT, GOLDEN, WHOLE, case, far
from lora_cases import EXPECTED, FILES, GIVEN, PLAIN, QKV, fresh, run, same, scramble, weights
from model.flux import Flux, FluxConfig
from model.lora import TARGETS, LoraLinear, attach, detach, load_lora, merge, trainable
from model.lora_formats import Delta, read_lora
from model.position import grid_ids, reference_ids
from sampling.latents import pack


@pytest.fixture
def flux():
    return fresh()


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_dialect_gives_the_official_output_attached_and_merged(flux, name):
    report = load_lora(flux, FILES / f"{name}.safetensors")
    assert far(run(flux), EXPECTED[name]) < WHOLE
    assert report.skipped == ()
    merge(flux)
    assert far(run(flux), EXPECTED[name]) < WHOLE


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


def test_a_file_that_was_read_already_is_not_opened_twice_for_its_header(flux, monkeypatch):
    file = read_lora(PLAIN)
    monkeypatch.setattr("model.lora.read_lora", None)
    load_lora(flux, file)
    assert far(run(flux), EXPECTED[PLAIN.stem]) < WHOLE


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
    drawn = []
    for seed in (3, 3, 4):
        parameters = attach(fresh(), "attn", 4, generator=torch.Generator().manual_seed(seed))
        drawn.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    down = drawn[0][: 4 * 64]
    assert down.abs().max() <= 64**-0.5 and down.std() > 0.04, "uniform between the roots of 1 / inputs"


def test_unos_start_moves_the_weights_less_by_the_ratio_of_the_downs_5_3_at_full_size():
    downs, moved = {}, {}
    for init in lora.INITS:
        linear = torch.nn.Sequential(torch.nn.Linear(3072, 8))
        down, up = attach(linear, "0", 512, generator=torch.Generator().manual_seed(0), init=init)
        optimizer = torch.optim.AdamW([down, up], lr=1e-3)
        linear(torch.randn(4, 3072, generator=torch.Generator().manual_seed(1))).sin().sum().backward()
        optimizer.step()
        downs[init], moved[init] = float(down.detach().std()), float((up @ down).detach().square().mean().sqrt())
    assert downs["kaiming"] == pytest.approx(0.0104, rel=0.01) and downs["uno"] == pytest.approx(0.00195, rel=0.01)
    assert downs["kaiming"] / downs["uno"] == pytest.approx(5.33, rel=0.01)
    assert moved["kaiming"] / moved["uno"] == pytest.approx(5.33, rel=0.05)
    with pytest.raises(ValueError, match="LoRA init 'orthogonal' is unknown; choose one of kaiming, uno"):
        attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), "0", 2, init="orthogonal")


def test_parameters_come_in_the_order_of_the_model_and_of_attaching_as_checkpoints_number_them(flux):
    first = attach(flux, "single_blocks.*.linear2," + QKV, 2)
    second = attach(flux, "attn", 3)
    layer = flux.double_blocks[0].img_attn.qkv
    assert [p.shape[0] for p in layer.adapters.parameters()] == [2, 192, *(3, 64) * 3], "down, up of each adapter"
    assert [id(p) for p in trainable(flux)[:8]] == [id(p) for p in layer.adapters.parameters()]
    assert {id(p) for p in first + second} == {id(p) for p in trainable(flux)}


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


def test_gradients_of_adapters_that_overlap_are_those_of_the_formula():
    layer = LoraLinear(torch.nn.Linear(3, 5).double())
    for start, stop, rank, bias in ((0, 5, 2, True), (1, 3, 1, False), (2, 5, 1, False)):
        down, up = torch.randn(rank, 3).double(), torch.randn(stop - start, rank).double()
        delta = Delta("", slice(start, stop), down, up, 0.5, torch.randn(5).double() if bias else None)
        layer.adapters.append(lora.Adapter(delta, 1.5))
    wide = torch.randn(2, 4, 3).double()
    for x in (wide, wide[:, ::2], wide[0], wide[:, :0]):
        x = x.detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, *parameters: layer(x), (x, *layer.adapters.parameters()))
        want = layer.base(x)
        for adapter in layer.adapters:
            change = 0.75 * x @ adapter.down.T @ adapter.up.T + (0 if adapter.bias is None else adapter.bias)
            want = want + torch.nn.functional.pad(change, (adapter.rows.start, 5 - adapter.rows.stop))
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


def test_merging_in_place_gives_the_same_bits_in_the_old_tensors(flux):
    held = flux.state_dict()
    other = fresh()
    for each in (flux, other):
        load_lora(each, FILES / "diffusers_all_linears.safetensors")
    merge(flux, in_place=True)
    merge(other)
    assert same(flux.state_dict(), other.state_dict()) and same(held, other.state_dict())


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
