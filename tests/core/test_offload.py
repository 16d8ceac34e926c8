"""Blocks that stream to the device give what blocks that stay give, to the bit, and are there two at a time."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from golden import FLUX
from iclora.cards import check_device
from iclora.config import SampleConfig
from model.lora import attach, trainable
from model.offload import offload
from model.weights import load_flux
from sampling.denoise import denoise

BLOCKS = 5
ALL, SOME, NONE = range(BLOCKS), (1, 2, 4), ()


def inputs(batch=2, refs=0):
    """Tokens of two pictures of 4x4 with 7 of text, as Flux.forward takes them."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    ids = torch.randint(0, 9, (batch, 16 + refs, 3), generator=generator).float()
    fixed = {"img": draw(batch, 16, 64), "img_ids": ids, "txt": draw(batch, 7, 40), "txt_ids": torch.zeros(batch, 7, 3)}
    fixed |= {"timesteps": torch.tensor([0.3, 0.9]), "y": draw(batch, 24), "guidance": torch.full((batch,), 3.5)}
    return fixed | ({"refs": draw(batch, refs, 64)} if refs else {})


class Watch:
    """Counts what is there whenever a block runs, and how often one was fetched."""

    def __init__(self, stream):
        self.most, self.fetched = 0, 0
        fetch = stream._fetch

        def counted(row):
            fetch(row)
            self.fetched += 1
            there = [row for row in stream.rows if row.visit.untyped_storage().nbytes()]
            self.most = max(self.most, len(there))

        stream._fetch = counted


def blocks(flux):
    return [*flux.double_blocks, *flux.single_blocks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_is_equal_to_the_bit_with_two_blocks_there(dtype):
    flux = load_flux(FLUX["dev"], dtype=dtype)
    x, ids, txt = torch.randn(1, 16, 64), torch.zeros(1, 16, 3), torch.randn(1, 7, 40)
    run = functools.partial(denoise, x=x, times=[1.0, 0.7, 0.2, 0.0], ids=ids, txt=txt, vec=torch.randn(1, 24))
    with torch.inference_mode():
        plain = run(flux, guidance=3.5)
        stream = offload(flux, "cpu")
        watch = Watch(stream)
        assert torch.equal(run(flux, guidance=3.5), plain) and torch.equal(run(flux, guidance=3.5), plain)
    assert watch.most == 2
    assert watch.fetched == 2 * 3 * BLOCKS + 1  # each once in a pass, and the first of the next one ahead


def test_a_block_that_found_no_memory_is_not_taken_for_there(monkeypatch):
    flux, fixed = load_flux(FLUX["dev"], dtype=torch.float32), inputs()
    with torch.inference_mode():
        plain = flux(**fixed)
        stream = offload(flux, "cpu")
        fetch = stream._fetch
        for fails in range(1, BLOCKS):
            calls = iter(range(1, 9))
            monkeypatch.setattr(stream, "_fetch", lambda row, c=calls, f=fails: 1 / (next(c, 0) - f) and fetch(row))
            with pytest.raises(ZeroDivisionError):
                flux(**fixed)
            monkeypatch.setattr(stream, "_fetch", fetch)
            assert torch.equal(flux(**fixed), plain)


def step(flux, fixed, again, isolate):
    """Gradients of two steps of training, after which the adapters are no longer zero."""
    for index, block in enumerate(blocks(flux)):
        if index in again and getattr(block.forward, "func", None) is not checkpoint:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    grads = []
    for _ in range(2):
        flux(**fixed, isolate_refs=isolate).float().square().mean().backward()
        with torch.no_grad():
            for p in trainable(flux):
                grads.append(p.grad.clone())
                p -= p.grad
                p.grad = None
    return grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("again", [NONE, SOME, ALL])
@pytest.mark.parametrize("refs, isolate", [(0, False), (8, True)])
def test_gradients_are_equal_to_the_bit_however_many_blocks_are_computed_again(dtype, again, refs, isolate):
    made = []
    for streams in (False, True):
        flux = load_flux(FLUX["dev"], dtype=dtype)
        attach(flux, rank=4, generator=torch.Generator().manual_seed(0))
        watch = Watch(offload(flux, "cpu")) if streams else None
        made.append(step(flux, inputs(refs=refs), again, isolate))
    assert watch.most == 2
    if not refs:
        assert watch.fetched == 2 + 2 * (2 * BLOCKS - 4)  # forth and back; where it turns, two blocks are still there
    assert len(made[0]) > 20 and any(grad.any() for grad in made[0])
    assert all(torch.equal(plain, streamed) for plain, streamed in zip(*made, strict=True))


def test_what_is_trained_stays_and_all_else_leaves():
    flux = load_flux(FLUX["dev"])
    attach(flux, rank=4)
    stream = offload(flux, "cpu")
    held = {row.visit.untyped_storage().data_ptr() for row in stream.rows}
    for block in blocks(flux):
        for p in block.parameters():
            assert bool(p.untyped_storage().nbytes()) == p.requires_grad
    assert held == {0} and flux.img_in.weight.any()
    sizes = [sum(p.nbytes for p in block.parameters() if not p.requires_grad) for block in blocks(flux)]
    assert all(size <= row.home.nbytes < 1.2 * size for size, row in zip(sizes, stream.rows, strict=True))


class Codes(torch.nn.Module):
    """A Linear with weights of one byte, as buffers."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(dim=1, keepdim=True).float() / 448
        self.register_buffer("weight", (linear.weight / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, (self.weight.float() * self.scale).to(x.dtype), self.bias)


def test_buffers_of_any_dtype_stream_too():
    flux = load_flux(FLUX["dev"])
    for name, module in [*flux.named_modules()]:
        if "_blocks." in name and isinstance(module, torch.nn.Linear):
            flux.set_submodule(name, Codes(module))
    with torch.no_grad():
        plain = flux(**inputs())
        offload(flux, "cpu")
        assert not any(t.untyped_storage().nbytes() for t in flux.single_blocks.buffers())
        assert torch.equal(flux(**inputs()), plain)


@pytest.mark.slow
def test_compiled_blocks_stream_too():
    torch._dynamo.reset()
    made = []
    for streams in (False, True):
        flux = load_flux(FLUX["dev"], dtype=torch.float32)
        attach(flux, "attn", rank=4, generator=torch.Generator().manual_seed(0))
        for block in flux.single_blocks:
            block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
        if streams:
            offload(flux, "cpu")
        made.append(step(flux, inputs(), SOME, False))
    assert all(torch.equal(plain, streamed) for plain, streamed in zip(*made, strict=True))


def test_a_device_that_shares_memory_is_refused():
    with pytest.raises(ValueError, match="--offload means nothing on mps"):
        check_device(SampleConfig(offload=True, device="mps"))
    check_device(SampleConfig(device="mps"))
    check_device(SampleConfig(offload=True, device="cuda"))
