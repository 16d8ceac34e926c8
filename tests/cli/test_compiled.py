"""Compiled blocks against the blocks as written. A backend that runs the graph as it is shows that there is one; the
real compiler is asked in the slow tests, as it takes minutes.
"""

import gc
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from model.compiled import check_compiler, compile_blocks
from model.flux import Flux, FluxConfig
from model.lora import attach
from model.position import timestep_embedding
from model.tables import make_tables
from sampling.denoise import denoise


@pytest.fixture(autouse=True)
def forgetful():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(dtype=torch.float32, blocks=2):
    torch.manual_seed(0)
    flux = Flux(FluxConfig(64, 64, 6, 5, 32, 48, 1, blocks, blocks, (4, 14, 14), True)).to(dtype)
    return flux.requires_grad_(False).eval()


def sample(flux, tokens=8, refs=0, isolate=False, mask=False, guidance=3.5, seed=2):
    draw = torch.Generator().manual_seed(seed)
    x, txt, vec = (torch.randn(2, *shape, generator=draw) for shape in ((tokens, 64), (3, 5), (6,)))
    ids = torch.randn(1, tokens + refs, 3, generator=draw)
    shown = torch.randn(2, refs, 64, generator=draw) if refs else None
    size = 3 + tokens + refs
    seen = (torch.rand(size, size, generator=draw) > 0.3).fill_diagonal_(True) if mask else None
    with torch.inference_mode():
        return denoise(flux, x, [1.0, 0.5, 0.0], ids, txt, vec, guidance, shown, seen, isolate)


def graphs(backend="eager"):
    return CompileCounterWithBackend(backend)


@pytest.mark.slow
def test_all_blocks_of_a_kind_share_one_graph_and_all_sizes_a_second_one():
    plain, compiled, counter = network(), network(), graphs()
    make_tables(compiled)
    compile_blocks(compiled, counter)
    for tokens, most in ((8, 2), (12, 4), (20, 4), (16, 4), (8, 4)):
        assert torch.equal(sample(compiled, tokens), sample(plain, tokens))
        assert counter.frame_count == most, tokens
    sample(compiled, 12, refs=4)
    assert counter.frame_count == 4, "references are tokens like others"


@pytest.mark.slow
def test_masks_and_references_alone_are_graphs_too_and_the_latter_pass_as_written():
    plain, compiled, counter = network(blocks=1), network(blocks=1), graphs()
    compile_blocks(compiled, counter)
    options = {"refs": 4, "isolate": True, "mask": True}
    assert torch.equal(sample(compiled, **options), sample(plain, **options))
    assert counter.frame_count == 2


def test_a_compiled_transformer_is_gone_when_nobody_holds_it():
    flux = network(blocks=1)
    make_tables(flux)
    compile_blocks(flux, graphs())
    weights = weakref.ref(flux.single_blocks[0].linear1.weight)
    sample(flux)
    gc.disable()
    try:
        del flux
        assert weights() is None, "else the next one stands beside it"
    finally:
        gc.enable()


def loss_and_gradients(flux):
    draw = torch.Generator().manual_seed(3)
    x, txt, y = (torch.randn(2, *shape, generator=draw) for shape in ((8, 64), (3, 5), (6,)))
    t, ids, parameters = torch.tensor([0.3, 0.7]), torch.randn(2, 8, 3, generator=draw), []
    for p in flux.parameters():
        if p.requires_grad:
            parameters.append(p)
    loss = flux(x, ids, txt, torch.zeros(2, 3, 3), t, y, t).square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def adapted(**more):
    flux, draw = network(**more), torch.Generator().manual_seed(1)
    for p in attach(flux, "all-linear", 2, generator=draw):
        p.data = 0.1 * torch.randn(p.shape, generator=draw)
    return flux


@pytest.mark.slow
def test_a_training_step_with_loras_is_one_graph_as_well():
    plain, compiled, counter = adapted(blocks=1), adapted(blocks=1), graphs("aot_eager")
    compile_blocks(compiled, counter)
    for one, other in zip(loss_and_gradients(compiled), loss_and_gradients(plain), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2


def test_conditioning_is_not_compiled_so_that_bfloat16_rounds_it_as_released():
    flux = network(torch.bfloat16)
    compile_blocks(flux, graphs())
    guidance, y = torch.tensor([3.5]), torch.zeros(1, 6)
    plain = network(torch.bfloat16).conditioning(guidance, y, guidance)
    assert torch.equal(flux.conditioning(guidance, y, guidance), plain)
    rounded = timestep_embedding(torch.tensor([3.504])).bfloat16()
    assert torch.equal(timestep_embedding(guidance.bfloat16()), rounded)


def test_a_compiler_that_does_not_work_is_refused_in_one_line(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no g++\nwas found")

    monkeypatch.setattr(torch, "compile", broken)
    for device, needs in (("cpu", "g++"), ("cuda", "Triton")):
        with pytest.raises(ValueError) as caught:
            check_compiler(device)
        assert str(caught.value) == f"--compile does not work here (no g++); install {needs}, or leave it out"


KINDS = ({}, {"tokens": 12, "mask": True}, {"refs": 4, "isolate": True})


@pytest.mark.slow
def test_the_real_compiler_stays_near_the_blocks_as_written():
    check_compiler("cpu")
    plain, compiled = network(), network()
    make_tables(compiled)
    compile_blocks(compiled)
    for kind in KINDS:
        assert (sample(compiled, **kind) - sample(plain, **kind)).abs().max() < 1e-5


@pytest.mark.slow
def test_in_bfloat16_it_is_no_further_from_float64_than_they_are():
    """On average: one picture's errors differ by up to a tenth. Times and guidance are exact in bfloat16."""
    exact, plain, compiled = network(torch.bfloat16).double(), network(torch.bfloat16), network(torch.bfloat16)
    make_tables(compiled)
    compile_blocks(compiled)
    errors = torch.zeros(2)
    for kind in KINDS:
        for seed in range(4):
            want, *near = (sample(flux, guidance=4.0, seed=seed, **kind) for flux in (exact, plain, compiled))
            errors += torch.tensor([(got - want).norm() / want.norm() for got in near]) / 12
    assert 1e-3 < errors[0] < 0.01 and errors[1] <= 1.05 * errors[0]


@pytest.mark.slow
def test_so_do_gradients():
    plain, compiled = adapted(), adapted()
    make_tables(compiled)
    compile_blocks(compiled)
    for near, want in zip(loss_and_gradients(compiled), loss_and_gradients(plain), strict=True):
        assert (near - want).norm() < 1e-5 * want.norm() + 1e-7
