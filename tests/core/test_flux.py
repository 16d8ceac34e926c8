import pytest
import torch

from golden import EXACT, FLUX, WHOLE, case, far
from model.flux import Flux, FluxConfig
from model.position import rotary_angles, timestep_embedding
from model.weights import load_flux
from sampling.flow import euler

INPUTS = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")


def inputs(golden):
    return {name: golden[name] for name in INPUTS if name in golden}


def run_and_record(flux, **kwargs):
    """Run the model and keep what every block returned."""
    seen = {}

    def keep(name):
        return lambda module, args, output: seen.__setitem__(name, output)

    hooks = [
        block.register_forward_hook(keep(f"{kind}.{i}"))
        for kind in ("double_blocks", "single_blocks")
        for i, block in enumerate(getattr(flux, kind))
    ]
    with torch.no_grad():
        out = flux(**kwargs)
    for hook in hooks:
        hook.remove()
    return out, seen


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_every_block_and_the_output_equal_the_official_model(name):
    golden = case(name)
    flux = load_flux(FLUX[name], dtype=torch.float32)
    out, seen = run_and_record(flux, **inputs(golden))
    for block, output in seen.items():
        if block.startswith("double"):
            img, txt = output
            assert far(img, golden[f"{block}.img"]) < EXACT, block
            assert far(txt, golden[f"{block}.txt"]) < EXACT, block
        else:
            assert far(output, golden[block]) < EXACT, block
    assert len(seen) == 5
    assert far(out, golden["out"]) < WHOLE


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_four_euler_steps_equal_the_official_loop(name):
    golden = case(name)
    flux = load_flux(FLUX[name], dtype=torch.float32)
    fixed = inputs(golden)
    if "guidance" in fixed:
        fixed["guidance"] = torch.full_like(fixed["guidance"], 3.5)

    @torch.no_grad()
    def velocity(x, t):
        return flux(**{**fixed, "img": x, "timesteps": torch.full((x.shape[0],), t)})

    x = euler(velocity, golden["img"], golden["schedule_4_steps"].tolist())
    assert far(x, golden["denoised_4_steps"]) < WHOLE


def test_rotary_angles_equal_the_official_matrices():
    golden = case("dev")
    pe = rotary_angles(torch.cat((golden["txt_ids"], golden["img_ids"]), dim=1), (4, 14, 14))
    cos, sin = pe.unbind(-1)
    assert far(cos, golden["pe"][..., 0, 0]) < EXACT and far(cos, golden["pe"][..., 1, 1]) < EXACT
    assert far(sin, golden["pe"][..., 1, 0]) < EXACT and far(-sin, golden["pe"][..., 0, 1]) < EXACT


def test_bfloat16_stays_near_float32_at_the_rounded_conditioning():
    """bfloat16 rounds 1000 t and 1000 guidance; against float32 at those rounded values little is left."""
    golden = case("dev")
    fixed = inputs(golden)
    rounded = {name: (1000 * fixed[name].bfloat16()).float() / 1000 for name in ("timesteps", "guidance")}
    with torch.no_grad():
        want = load_flux(FLUX["dev"], dtype=torch.float32)(**{**fixed, **rounded})
        plain = load_flux(FLUX["dev"], dtype=torch.bfloat16)(**fixed).float()
    assert (plain - want).norm() / want.norm() < 0.02


def test_bfloat16_rounds_the_conditioning_as_the_official_sampler_does():
    guidance = torch.tensor([3.5], dtype=torch.bfloat16)
    assert torch.equal(timestep_embedding(guidance), timestep_embedding(torch.tensor([3.504])).bfloat16())
    assert not torch.equal(timestep_embedding(guidance), timestep_embedding(torch.tensor([3.5])).bfloat16())


@pytest.mark.slow
def test_two_full_width_blocks_build_and_run():
    config = FluxConfig(64, 64, 768, 4096, 3072, 12288, 24, 1, 1, (16, 56, 56), guidance_embed=True)
    with torch.device("meta"):
        flux = Flux(config).to(torch.bfloat16)
    flux = flux.to_empty(device="cpu")
    for parameter in flux.parameters():
        torch.nn.init.uniform_(parameter, -0.03, 0.03) if parameter.ndim > 1 else torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        out = flux(
            torch.randn(1, 4, 64), torch.zeros(1, 4, 3), torch.randn(1, 2, 4096), torch.zeros(1, 2, 3),
            torch.tensor([0.5]), torch.randn(1, 768), torch.tensor([3.5]),
        )  # fmt: skip
    assert out.shape == (1, 4, 64) and out.isfinite().all()


def test_a_model_with_guidance_asks_for_it():
    golden = case("dev")
    fixed = {**inputs(golden), "guidance": None}
    with pytest.raises(ValueError, match="pass guidance"):
        load_flux(FLUX["dev"], dtype=torch.float32)(**fixed)


def test_axes_that_do_not_make_the_width_are_refused():
    with pytest.raises(ValueError, match="do not make the width"):
        FluxConfig(64, 64, 24, 40, 64, 256, 2, 1, 1, (4, 14, 16), guidance_embed=True)


def two_texts(flux, change, mask):
    """How much the velocity of each of two panels moves when a text's words change; tokens: 3 + 3 of text, 4 + 4."""
    draw = torch.Generator().manual_seed(1)
    img, txt, y = (torch.randn(1, *shape, generator=draw) for shape in ((8, 64), (6, 5), (6,)))
    ids, t = torch.randn(1, 8, 3, generator=draw), torch.tensor([0.5])
    other = txt.clone()
    other[:, change] += 1
    with torch.no_grad():
        before, after = (flux(img, ids, words, torch.zeros(1, 6, 3), t, y, t, mask) for words in (txt, other))
    moved = (after - before).abs().amax(dim=(0, 2))
    return float(moved[:4].max()), float(moved[4:].max())


def test_a_panel_reads_no_other_panels_words():
    panel = torch.tensor([1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 2, 2, 2, 2])
    picture = torch.arange(14) >= 6
    own = panel[:, None] == panel
    torch.manual_seed(0)
    one, four = (
        Flux(FluxConfig(64, 64, 6, 5, 32, 48, 1, blocks, singles, (4, 14, 14), True))
        for blocks, singles in ((0, 1), (2, 2))
    )
    pictures_meet = own | (picture[:, None] & picture)
    still, moved = two_texts(one, slice(3, 6), pictures_meet)
    assert still < 1e-6 and moved > 1e-4, "in one block"
    assert two_texts(four, slice(3, 6), own)[0] < 1e-6, "in any number of blocks, while the pictures do not meet"
    assert two_texts(four, slice(3, 6), pictures_meet)[0] > 1e-4, "through the other panel, as is meant"
    assert two_texts(one, slice(3, 6), None)[0] > 1e-4, "else the test could not fail"


def test_a_mask_that_hides_nothing_changes_nothing_beyond_rounding():
    flux = load_flux(FLUX["dev"], dtype=torch.float32)
    given = inputs(case("dev"))
    tokens = given["img"].shape[1] + given["txt"].shape[1]
    with torch.no_grad():
        plain, masked = (flux(**given, mask=mask) for mask in (None, torch.ones(tokens, tokens, dtype=torch.bool)))
    assert far(plain, masked) < EXACT
