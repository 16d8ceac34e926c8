"""Many sets at once from one model: the sampler of iclora.pipeline on batches, for measuring."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from iclora.config import ALONE, JOINT, model_defaults
from iclora.layout import Layout, encode_by_panel, generate_mask, panel_attention_mask
from iclora.pipeline import encode_captions
from iclora.references import encode, fit_reference, image_ids
from model.autoencoder import AutoEncoder
from model.flux import Flux
from model.text import TextEncoders, load_text_encoders
from model.weights import find_model, load_autoencoder, load_flux
from sampling.denoise import denoise
from sampling.flow import times
from sampling.inpaint import keep_clean, keep_known
from sampling.latents import noise, pack, unpack

from .sets import PANEL


@dataclass(frozen=True)
class Networks:
    """The networks of one model, all loaded."""

    flux: Flux
    autoencoder: AutoEncoder
    text: TextEncoders
    shift: bool
    text_length: int  # T5 tokens


def load_networks(model: str) -> Networks:
    """Load every network of a model in float32.

    Errors: ValueError as model.weights.find_model
    """
    files = find_model(model)
    flux = load_flux(files.flux, dtype=torch.float32)
    defaults, text = model_defaults(flux.config), load_text_encoders(files, dtype=torch.float32)
    return Networks(flux, load_autoencoder(files.autoencoder), text, defaults.shift, defaults.text_length)


@dataclass(frozen=True)
class Options:
    """How sets are made: as train.py and sample.py have it, and most often as a LoRA was trained."""

    steps: int = 20
    guidance: float = 3.5
    clean: bool = False  # feed kept panels clean at every step (--condition clean), not noised with the rest
    concat: str = "pixels"
    text: str = "joint"
    offset: str = "d"  # of references, as all that follows
    offset_scale: float = 1.0
    posterior: str = "sample"
    ref_size: int = PANEL
    reference_attention: str = JOINT


@torch.inference_mode()
def generate(
    networks: Networks,
    captions: Sequence[str],
    grid: tuple[int, int],
    seeds: Sequence[int],
    options: Options = Options(),
    kept: Tensor | None = None,
    masked: tuple[int, ...] = (),
    references: Sequence[Sequence[Image.Image]] = (),
    batch: int = 20,
) -> Tensor:
    """Make one set for each caption.

    captions, seeds: N of each
    kept: (N, 3, h, w) in -1..1, composites whose masked panels are filled with 0
    masked: the panels that are generated, from 1; all of them if kept is not given
    references: N lists of pictures that are to appear (UNO), of one number and size; none at all without them
    batch: sets that are made at a time
    Returns (N, 3, h, w) in -1..1; kept panels are pasted over the decoded ones, as iclora does
    Errors: ValueError if sets differ in number or size of their references
    """
    pictures = [[fit_reference(p, options.ref_size) for p in group] for group in references] or [[]] * len(captions)
    sizes = {tuple(picture.size for picture in group) for group in pictures}
    if len(pictures) != len(captions) or len(sizes) > 1:
        raise ValueError(
            f"{len(captions)} captions with references of {len(pictures)} and {len(sizes)} kinds of sizes; "
            "give every caption as many, and of the same sizes"
        )
    layout = Layout(*grid, PANEL, PANEL, *sizes)
    sets = []
    for first in range(0, len(captions), batch):
        part = slice(first, first + batch)
        known = None if kept is None else kept[part]
        sets.append(make_batch(networks, captions[part], layout, seeds[part], options, known, masked, pictures[part]))
    return torch.cat(sets)


def make_batch(
    networks: Networks,
    captions: Sequence[str],
    layout: Layout,
    seeds: Sequence[int],
    options: Options,
    kept: Tensor | None,
    masked: tuple[int, ...],
    pictures: Sequence[Sequence[Image.Image]],
) -> Tensor:
    """Make sets of one layout at once, B of them; as for generate, but that the pictures are fitted."""
    txt, vec = encode_captions(networks.text, list(captions), networks.text_length, layout, options.text)
    attn_mask = panel_attention_mask(layout, txt.shape[1] // layout.panels) if options.text == "panel" else None
    start = pack(torch.cat([noise(layout.height, layout.width, seed) for seed in seeds]))  # (B, I, 64)
    sampled = options.posterior == "sample"
    generators = [torch.Generator().manual_seed(~seed) if sampled else None for seed in seeds]  # the pipeline's
    pairs = zip(pictures, generators, strict=True)
    refs = torch.cat([encode(networks.autoencoder, group, generator) for group, generator in pairs])  # (B, R, 64)
    ids = image_ids(layout, options.offset, options.offset_scale)
    mask = torch.ones(1, start.shape[1], 1) if kept is None else generate_mask(masked, layout)
    known = torch.zeros_like(start)
    if kept is not None:
        known = pack(encode_by_panel(networks.autoencoder.encode, kept, layout, options.concat))

    keep = keep_clean(known, mask) if options.clean else keep_known(known, start, mask)
    ts, isolate_refs = times(options.steps, start.shape[1], networks.shift), options.reference_attention == ALONE
    x, guidance = keep(start, 1.0), options.guidance
    x = denoise(networks.flux, x, ts, ids, txt, vec, guidance, refs, attn_mask, isolate_refs, keep)
    z = unpack(x, 2 * layout.tokens_high, 2 * layout.tokens_wide)
    image = encode_by_panel(networks.autoencoder.decode, z, layout, options.concat).clamp(-1, 1)
    if kept is None:
        return image
    pixels = unpack(mask.expand(1, -1, 64), 2 * layout.tokens_high, 2 * layout.tokens_wide)[:, :1]
    return image.where(pixels.repeat_interleave(8, 2).repeat_interleave(8, 3).bool(), kept)


def without(image: Tensor, panel: int) -> Tensor:
    """Composites (N, 3, 128, 128) with one panel of the four filled with 0."""
    image = image.clone()
    y, x = divmod(panel - 1, 2)
    image[:, :, y * PANEL : (y + 1) * PANEL, x * PANEL : (x + 1) * PANEL] = 0
    return image
