"""Without a GPU: torch's meta device computes nothing, but a tensor that was left on the CPU is an error on it."""

import pytest
import torch

import iclora.pipeline
from iclora.checkpoint import new_state
from iclora.config import SampleConfig
from iclora.layout import Layout, generate_mask, panel_attention_mask
from iclora.loader import Batch
from iclora.pipeline import Pipeline
from iclora.plan import make_plan
from iclora.references import image_ids
from iclora.training import checkpoint_blocks, flow_loss
from model.flux import Flux, FluxConfig
from model.lora import attach, save_lora
from model.weights import examples_folder, find_model, load_flux
from sampling.images import to_picture

META = torch.device("meta")
CAT = str(examples_folder() / "references" / "cat.png")
PAIR = Layout(1, 2, 32, 32)  # 8 tokens
SHOWN = Layout(1, 2, 32, 32, ((32, 32),))  # and 4 of a reference


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA whose metadata ask for all that panels can be trained with."""
    path, flux = tmp_path_factory.mktemp("lora") / "panels.safetensors", load_flux(find_model("tiny").flux)
    attach(flux, "attn", 2, generator=torch.Generator())
    ways = {"condition": "clean", "concat": "tokens", "text": "panel"}
    save_lora(flux, path, "diffusers", {f"iclora.{name}": value for name, value in ways.items()})
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"grid": "2x2", "mask": "3"},
        {"grid": "1x2", "mask": "2", "lora": "panels"},
        {"grid": "1x2", "mask": "2", "ref": (CAT,), "tile": True},
        {"prompt": "a cat on a beach", "ref": (CAT, CAT), "reference_attention": "alone", "schedule": "uno-release"},
    ],
    ids=["panels", "panels as a LoRA wants them", "panels and a reference", "references"],
)
def test_all_that_sampling_computes_is_on_its_device(flags, lora, monkeypatch):
    decoded = []
    monkeypatch.setattr(iclora.pipeline, "note_unfamiliar", lambda *_: None)  # which looks at values
    monkeypatch.setattr(iclora.pipeline, "to_picture", lambda image: decoded.append(image) or black(image))
    flags = flags | {"lora": (lora,)} if "lora" in flags else flags
    plan = make_plan(SampleConfig(steps=2, device="cpu", dtype="bfloat16", **flags), print)
    object.__setattr__(plan.config, "device", "meta")  # which no flag names
    list(Pipeline(plan.config, print).run(plan))
    high, wide = plan.layout.height, plan.layout.width
    assert [(image.device, image.shape) for image in decoded] == [(META, (1, 3, high, wide))]


def black(image):
    return to_picture(torch.zeros(image.shape))


WAYS = {
    "panels": (PAIR, {}),
    "clean panels": (PAIR, {"known": torch.zeros(2, 16, 4, 8), "generate_mask": generate_mask((2,), PAIR).bool()}),
    "texts of their own": (PAIR, {"attention_mask": panel_attention_mask(PAIR, 2)}),
    "references": (SHOWN, {"isolate_refs": False}),
    "references alone": (SHOWN, {"isolate_refs": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_all_that_training_computes_is_on_its_device(way):
    layout, more = WAYS[way]
    if layout is SHOWN:
        more = more | {"references": torch.zeros(2, 4, 64), "ids": image_ids(layout, "d", 1.0)}
    sets = Batch(torch.zeros(2, 16, 4, 8), torch.zeros(2, 4, 5), torch.zeros(2, 6), **more)
    with META:
        flux = Flux(FluxConfig(64, 64, 6, 5, 32, 48, 1, 2, 2, (4, 14, 14), True)).requires_grad_(False)
    checkpoint_blocks(flux)
    state = new_state(attach(flux, "all-linear", 2, generator=torch.Generator("cpu")))
    loss = flow_loss(flux, sets.to(META), torch.zeros(2, 8, 64, device=META), torch.zeros(2, device=META))
    loss.sum().backward()
    torch.nn.utils.clip_grad_norm_(state.parameters, 1.0)
    assert {p.grad.device for p in state.parameters} == {loss.device} == {META} == {p.device for p in state.average}
