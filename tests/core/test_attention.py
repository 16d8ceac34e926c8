"""References alone: what is kept for all steps equals a single sequence with the same mask and modulation."""

import pytest
import torch
from torch import nn

from golden import EXACT, WHOLE, far
from iclora.training import checkpoint_blocks
from model.flux import Flux, FluxConfig
from model.lora import attach, merge, trainable
from model.position import grid_ids, reference_ids

T, SIZES = 5, ((2, 3), (2, 2), (1, 2))  # text tokens; sizes of the target and two references, in tokens
TARGET, R = 6, 6
I = TARGET + R  # noqa: E741


def network(guidance=True, blocks=2, singles=3, lora=True):
    """A random transformer, with adapters everywhere that have a say."""
    torch.manual_seed(0)
    flux = Flux(FluxConfig(64, 64, 6, 5, 64, 96, 2, blocks, singles, (4, 14, 14), guidance)).requires_grad_(False)
    if lora:
        for p in attach(flux, "all-linear", 2, generator=torch.Generator().manual_seed(1)):
            nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    return flux.eval()


def given(seed=0, count=2):
    """The arguments of a forward, up to the guidance, and references; seed draws all but the latter."""
    draw, same = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(9)
    x, txt, y = (torch.randn(count, *shape, generator=draw) for shape in ((TARGET, 64), (T, 5), (6,)))
    ids = torch.cat([grid_ids(*SIZES[0]), *reference_ids(SIZES[0], SIZES[1:])]).expand(count, -1, -1)
    t = torch.rand(count, generator=draw)
    guidance = torch.full((count,), 1.0 + seed)
    return (x, ids, txt, torch.zeros(count, T, 3), t, y, guidance), torch.randn(count, R, 64, generator=same)


class Apart(nn.Module):
    """A modulation that is another one for the last R of so many tokens."""

    def __init__(self, inner, still, tokens):
        super().__init__()
        self.inner, self.still, self.tokens = inner, still, tokens

    def forward(self, vec):
        own, other = self.inner(vec), self.inner(self.still)
        return [
            torch.cat((a.expand(-1, self.tokens - R, -1), b.expand(len(a), R, -1)), dim=1)
            for a, b in zip(own, other, strict=True)
        ]


def in_one_sequence(flux, arguments, references, mask=None):
    """Everything computed anew, by the published forward: a dense mask, and modulations by token."""
    mask = torch.ones(T + I, T + I, dtype=torch.bool) if mask is None else mask.clone()
    mask[-R:] = False
    mask[-R:, -R:] = True
    still = flux.conditioning(torch.zeros(1), torch.zeros(1, 6), torch.ones(1))
    for block in flux.double_blocks:
        block.img_mod = Apart(block.img_mod, still, I)
    for block in flux.single_blocks:
        block.modulation = Apart(block.modulation, still, T + I)
    try:
        return flux(*arguments, mask, references)
    finally:
        for block in flux.double_blocks:
            block.img_mod = block.img_mod.inner
        for block in flux.single_blocks:
            block.modulation = block.modulation.inner


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("guidance", [True, False])
@torch.no_grad()
def test_what_is_kept_for_all_steps_equals_computing_everything_anew(guidance, masked):
    flux, references = network(guidance), given()[1]
    mask = torch.rand(T + I, T + I, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    mask = mask if mask is None else mask | torch.eye(T + I, dtype=torch.bool)
    for seed in range(3):  # another prompt, time, noise and guidance
        (x, ids, txt, txt_ids, t, y, g), _ = given(seed)
        cond = flux.prefill(torch.cat((txt_ids, ids), dim=1), txt, references, mask, isolate_refs=True)
        for time in (t, t / 2):
            once = flux.velocity(x, cond, flux.conditioning(time, y, g))
            anew = in_one_sequence(flux, (x, ids, txt, txt_ids, time, y, g), references, mask)
            assert once.shape == x.shape and far(once, anew) < EXACT
            assert torch.equal(flux(x, ids, txt, txt_ids, time, y, g, mask, references, True), once)
            assert far(once, flux(x, ids, txt, txt_ids, time, y, g, mask, references)) > 1e-2, "joint is another thing"


def test_gradients_pass_through_what_is_kept_as_through_one_sequence():
    arguments, references = given()
    gradients = []
    for run in (
        lambda flux: flux(*arguments, None, references, True),
        lambda flux: in_one_sequence(flux, arguments, references),
        lambda flux: checkpoint_blocks(flux) or flux(*arguments, None, references, True),
    ):
        flux = network()
        run(flux).square().mean().backward()
        gradients.append([p.grad for p in trainable(flux)])
    once, anew, recomputed = gradients
    size = torch.cat([grad.flatten() for grad in anew]).norm()
    assert all(float((a - b).norm() / size) < WHOLE for a, b in zip(once, anew, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(once, recomputed, strict=True))


@torch.no_grad()
def test_what_is_kept_depends_on_the_references_alone_and_on_each_of_them():
    flux, (arguments, references) = network(), given()
    (_, ids, txt, txt_ids, *_), others = given(1)[0], references.clone()
    others[:, -1] += 1
    one, same, other = (
        flux.prefill(torch.cat((txt_ids, ids), dim=1), words, shown, isolate_refs=True).ref_kv
        for words, shown in ((txt, references), (arguments[2], references), (txt, others))
    )
    assert len(one) == 5
    for a, b, c in zip(one, same, other, strict=True):
        assert all(torch.equal(i, j) and not torch.equal(i, k) for i, j, k in zip(a, b, c, strict=True))
        assert a[1].untyped_storage().nbytes() == a[1].nbytes, "nothing else stays in memory with it"
    assert far(one[1][0][:, :, 0], other[1][0][:, :, 0]) > 1e-4, "references see each other"


@torch.no_grad()
def test_adapters_reach_references_and_fresh_or_merged_ones_change_nothing():
    plain, fresh, adapted, merged = network(lora=False), network(lora=False), network(), network()
    attach(fresh, "all-linear", 2)
    merge(merged)
    arguments, references = given()
    ids = torch.cat((arguments[3], arguments[1]), dim=1)
    bare, same, own, folded = (
        flux.prefill(ids, arguments[2], references, isolate_refs=True).ref_kv
        for flux in (plain, fresh, adapted, merged)
    )
    for a, b, c, d in zip(bare, same, own, folded, strict=True):
        assert torch.equal(a[0], b[0]) and far(a[0], c[0]) > 1e-3 and far(c[0], d[0]) < WHOLE
    first, second = (flux(*arguments, None, references, True) for flux in (adapted, merged))
    assert far(first, second) < WHOLE


@torch.no_grad()
def test_without_references_alone_means_nothing():
    flux, ((x, ids, *more), references) = network(), given()
    ids = ids[:, :TARGET]
    plain = flux(x, ids, *more)
    assert torch.equal(flux(x, ids, *more, None, references[:, :0], True), plain)
    assert torch.equal(flux(x, ids, *more, None, None, True), plain)


@torch.no_grad()
def test_bfloat16_stays_near_float32():
    arguments, references = given()
    want = network(lora=False)(*arguments, None, references, True)
    half = network(lora=False).bfloat16()(*arguments, None, references, True).float()
    assert (half - want).norm() / want.norm() < 0.05
