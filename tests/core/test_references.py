"""References: parity with the official UNO on the reference numbers."""

from functools import partial

import pytest
import torch

from golden import EXACT, FLUX, GOLDEN, WHOLE, case, far
from model.compiled import compile_blocks
from model.lora import load_lora, merge
from model.offload import offload
from model.position import MODES, grid_ids, reference_ids
from model.tables import make_tables
from model.weights import load_flux
from sampling.denoise import denoise
from sampling.flow import euler
from sampling.latents import pack

STREAM = partial(offload, device="cpu")
EXACT_TECHNIQUES = {  # what makes a transformer ready, in the order of iclora.fitted
    "plain": (),
    "tables": (make_tables,),
    "offload": (STREAM,),
    "compile": (compile_blocks,),
    "all": (make_tables, compile_blocks, STREAM),
}
COMPILED = {"compile", "all"}


def official_uno():
    flux = load_flux(FLUX["dev"], dtype=torch.float32)
    load_lora(flux, GOLDEN / "uno" / "dit_lora.safetensors")
    merge(flux)
    return flux


@pytest.fixture(scope="module")
def uno():
    return official_uno()


def velocity_of(flux, golden, count, mode):
    """The official case with so many references, as sampling computes it, and the target's tokens."""
    tokens = [pack(golden[name]) for name in ("noise", *(f"ref{k}" for k in range(1, count + 1)))]
    target, *sizes = [tuple(side // 2 for side in golden[name].shape[2:]) for name in ("noise", "ref1", "ref2", "ref3")]
    ids = torch.cat([grid_ids(*target), *reference_ids(target, sizes[:count], mode)])[None]
    references = torch.cat([tokens[0][:, :0], *tokens[1:]], dim=1)
    fixed = flux.prefill(torch.cat((torch.zeros(1, 7, 3), ids), dim=1), golden["txt"], references)

    @torch.no_grad()
    def velocity(x, t):
        return flux.velocity(x, fixed, flux.conditioning(torch.tensor([t]), golden["y"], torch.tensor([4.0])))

    return velocity, tokens[0], ids


CASES = [key for key in case("uno") if key.endswith(".out")]


@torch.no_grad()
@pytest.mark.parametrize("key", CASES)
def test_every_official_output_is_met(uno, key):
    golden, count, mode = case("uno"), int(key[4]), key[key.index("pe_") + 3]
    velocity, noise, ids = velocity_of(uno, golden, count, mode)
    assert far(velocity(noise, 0.6), golden[key]) < WHOLE
    wanted = [golden[f"refs{count}.pe_{mode}.ref{k}_ids"][0] for k in range(1, count + 1)]
    assert torch.equal(ids[0, noise.shape[1] :], torch.cat(wanted) if wanted else ids[0, :0])


def test_the_cases_are_all_modes_with_up_to_three_references():
    assert len(CASES) == 13 and {key[4] for key in CASES} == set("0123")
    assert {key[key.index("pe_") + 3] for key in CASES} == set(MODES)


@torch.no_grad()
def test_the_official_loop_is_met(uno):
    golden = case("uno")
    velocity, noise, _ = velocity_of(uno, golden, 2, "d")
    x = euler(velocity, noise, golden["refs2.pe_d.schedule"].tolist())
    assert far(x, golden["refs2.pe_d.denoised"]) < WHOLE


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_is_computed_once_equals_the_official_forward_in_every_step(uno, count):
    golden = case("uno")
    velocity, x, ids = velocity_of(uno, golden, count, "d")
    refs = torch.cat([x[:, :0], *(pack(golden[f"ref{k}"]) for k in range(1, count + 1))], dim=1)
    for t in (0.9, 0.3):
        given = torch.tensor([t]), golden["y"], torch.tensor([4.0])
        plain = uno(torch.cat((x, refs), dim=1), ids, golden["txt"], torch.zeros(1, 7, 3), *given)
        assert plain.shape[1] == ids.shape[1] and far(velocity(x, t), plain[:, : x.shape[1]]) < EXACT


@torch.no_grad()
@pytest.mark.parametrize(
    "how", [pytest.param(h, marks=pytest.mark.slow) if h in COMPILED else h for h in EXACT_TECHNIQUES]
)
def test_the_sampling_loop_is_the_official_one(how):
    uno = official_uno()
    for make_ready in EXACT_TECHNIQUES[how]:
        make_ready(uno)
    golden = case("uno")
    _, x, ids = velocity_of(uno, golden, 2, "d")
    refs = torch.cat([pack(golden[f"ref{k}"]) for k in (1, 2)], dim=1)
    ts = golden["refs2.pe_d.schedule"].tolist()
    x = denoise(uno, x, ts, ids, golden["txt"], golden["y"], 4.0, refs)
    assert far(x, golden["refs2.pe_d.denoised"]) < WHOLE
