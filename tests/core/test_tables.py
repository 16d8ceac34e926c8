"""Tables of modulations against the plain path, bit for bit; on small random networks and a CPU."""

import pytest
import torch

import sampling.denoise as loop
from model.flux import Flux, FluxConfig
from model.lora import attach, merge, shapes
from model.quantize import Fp8Linear, quantize_rows
from model.tables import MOST_ROWS, is_modulation, make_tables
from sampling.denoise import denoise

TIMES = [1.0, 0.8, 0.45, 0.0]


def network(guidance=True, dtype=torch.float32):
    torch.manual_seed(0)
    flux = Flux(FluxConfig(64, 64, 6, 5, 32, 48, 1, 2, 2, (4, 14, 14), guidance)).to(dtype)
    for p in flux.parameters():  # biases too, and large enough that a wrong row shows
        p.data = 0.3 * torch.randn(p.shape).to(dtype)
    return flux.requires_grad_(False).eval()


def with_lora(flux):
    draw = torch.Generator().manual_seed(1)
    targets = "mod,final_layer.adaLN_modulation.1,double_blocks.*.img_attn.qkv"
    for p in attach(flux, targets, 2, generator=draw):
        p.data = 0.3 * torch.randn(p.shape, generator=draw)
    return flux


def sample(flux, guidance=3.5, batch=1, refs=0, isolate=False, mask=False, seed=2, times=TIMES):
    draw = torch.Generator().manual_seed(seed)
    x, txt, vec = (torch.randn(batch, *shape, generator=draw) for shape in ((8, 64), (3, 5), (6,)))
    ids = torch.randn(1, 8 + refs, 3, generator=draw)
    shown = torch.randn(batch, refs, 64, generator=draw) if refs else None
    seen = (torch.rand(11 + refs, 11 + refs, generator=draw) > 0.3).fill_diagonal_(True) if mask else None
    with torch.inference_mode():
        return denoise(flux, x, times, ids, txt, vec, guidance, shown, seen, isolate)


CASES = {
    "plain": {},
    "two at once": {"batch": 2},
    "mask": {"mask": True},
    "references": {"refs": 4},
    "references alone": {"refs": 4, "isolate": True},
    "references alone, mask": {"refs": 4, "isolate": True, "mask": True, "batch": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_run_with_tables_is_the_run_without_them_to_the_bit(case, dtype):
    plain, tabled = network(dtype=dtype), network(dtype=dtype)
    make_tables(tabled)
    want = sample(plain, **CASES[case])
    assert torch.equal(sample(tabled, **CASES[case]), want)
    assert tabled.tables.passes == 1, "one pass over the weights, references included"
    assert not torch.equal(sample(plain, **{**CASES[case], "seed": 3}), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_it_is_without_guidance_and_with_loras_merged_or_live(dtype):
    plain, tabled = network(guidance=False, dtype=dtype), network(guidance=False, dtype=dtype)
    make_tables(tabled)
    assert torch.equal(sample(tabled, guidance=None), sample(plain, guidance=None))
    for live in (False, True):
        plain, tabled = (with_lora(network(dtype=dtype)) for _ in range(2))
        if not live:
            merge(plain), merge(tabled)
        make_tables(tabled)
        assert torch.equal(sample(tabled), sample(plain)), live
        assert not torch.equal(sample(plain), sample(network(dtype=dtype))), "else the LoRA did nothing"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])  # as cards before 8.9 hold codes
def test_so_it_is_of_modulations_that_a_file_has_in_fp8(dtype):
    plain, tabled = network(), network()
    for flux in (plain, tabled):
        for name, module in [*flux.named_modules()]:
            if is_modulation(name) and isinstance(module, torch.nn.Linear):
                coded = Fp8Linear(*quantize_rows(module.weight), module.bias)
                coded.weight.data = coded.weight.data.view(dtype)
                flux.set_submodule(name, coded)
    make_tables(tabled)
    assert torch.equal(sample(tabled), sample(plain)) and not torch.equal(sample(plain), sample(network()))


def test_the_weights_of_modulations_are_out_of_the_tree_and_their_names_are_not():
    flux = network()
    names, linears = [name for name, _ in flux.named_parameters()], shapes(flux)
    make_tables(flux)
    assert [name for name, _ in flux.named_parameters()] == [name for name in names if not is_modulation(name)]
    assert sum(map(is_modulation, names)) == 2 * (2 * 2 + 2 + 1)
    assert shapes(flux) == linears


def test_the_same_caption_and_times_are_computed_once_and_others_anew():
    plain, tabled = network(), network()
    make_tables(tabled)
    for passes, options in ((1, {}), (1, {}), (2, {"guidance": 2.0}), (3, {"times": [1.0, 0.3, 0.0]}), (3, {})):
        assert torch.equal(sample(tabled, **options), sample(plain, **options))
        assert tabled.tables.passes == passes


def test_rows_do_not_pile_up():
    plain, tabled = network(), network()
    make_tables(tabled)
    long = [1 - i / MOST_ROWS for i in range(MOST_ROWS + 1)]
    many = MOST_ROWS + 2  # known ones cost nothing, so they stay
    for times, count in ((long, MOST_ROWS), (TIMES, many), (long[::2], many), ([1.0, 0.77, 0.0], 2)):
        assert torch.equal(sample(tabled, times=times), sample(plain, times=times))
        assert tabled.tables.count == count == len(tabled.tables.tables[0].rows)


def test_a_sampler_that_asks_for_other_times_late_gets_the_plain_paths_bits(monkeypatch):
    def runge_kutta(velocity, x, times, after_step=None):
        for t, t_next in zip(times, times[1:], strict=False):
            half = x + (t_next - t) / 2 * velocity(x, t)
            x = x + (t_next - t) * velocity(half, (t + t_next) / 2)
        return x

    monkeypatch.setattr(loop, "euler", runge_kutta)
    plain, tabled = network(), network()
    make_tables(tabled)
    for most in (MOST_ROWS, 2):  # the second is forgotten in mid-run
        tabled.tables.most = most
        assert torch.equal(sample(tabled, seed=most), sample(plain, seed=most))


def test_a_pass_that_fails_half_way_leaves_no_rows_behind(monkeypatch):
    plain, tabled = network(), network()
    make_tables(tabled)
    assert torch.equal(sample(tabled), sample(plain))

    def full(vecs):
        raise MemoryError

    monkeypatch.setattr(tabled.tables.tables[-1], "extend", full)
    with pytest.raises(MemoryError):
        sample(tabled, seed=3)
    monkeypatch.undo()
    for seed in (3, 2):
        assert torch.equal(sample(tabled, seed=seed), sample(plain, seed=seed))
