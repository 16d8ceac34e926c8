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
    length: int  # T5 tokens


def load_networks(model: str) -> Networks:
    """Load every network of a model in float32.

    Errors: ValueError as model.weights.find_model
    """
    files = find_model(model)
    flux = load_flux(files.flux, dtype=torch.float32)
    row = model_defaults(flux.config)
    text = load_text_encoders(files, dtype=torch.float32)
    return Networks(flux, load_autoencoder(files.autoencoder), text, row.shift, row.text_length)


@torch.inference_mode()
def generate(
    networks: Networks,
    captions: list[str],
    grid: tuple[int, int],
    seeds: list[int],
    steps: int = 20,
    guidance: float = 3.5,
    kept: Tensor | None = None,
    masked: tuple[int, ...] = (),
    clean: bool = False,
    concat: str = "pixels",
    text: str = "joint",
    references: Sequence[Sequence[Image.Image]] = (),
    offset: str = "d",
    offset_scale: float = 1.0,
    posterior: str = "sample",
    ref_size: int = PANEL,
    reference_attention: str = JOINT,
    batch: int = 20,
) -> Tensor:
    """Make one set for each caption.

    captions, seeds: N of each
    kept: (N, 3, h, w) in -1..1, composites whose masked panels are filled with 0
    masked: the panels that are generated, from 1; all of them if kept is not given
    clean: feed kept panels clean at every step, as `--condition clean` trains it, instead of noised with the rest
    concat, text: as train.py has them
    references: N lists of pictures that are to appear (UNO), of one number and size; none at all without them
    offset, offset_scale, posterior, ref_size, reference_attention: of references, as sample.py has them
    Returns (N, 3, h, w) in -1..1; kept panels are pasted over the decoded ones, as iclora does
    Errors: ValueError if sets differ in number or size of their references
    """
    shown = [[fit_reference(picture, ref_size) for picture in some] for some in references] or [[]] * len(captions)
    sizes = {tuple(picture.size for picture in some) for some in shown}
    if len(shown) != len(captions) or len(sizes) > 1:
        raise ValueError(f"{len(captions)} captions with references of {len(shown)} and {len(sizes)} kinds of sizes; "
                         "give every caption as many, and of the same sizes")  # fmt: skip
    layout = Layout(*grid, PANEL, PANEL, *sizes)
    made = []
    for first in range(0, len(captions), batch):
        part = slice(first, first + batch)
        known = None if kept is None else kept[part]
        how = (steps, guidance, known, masked, clean, concat, text, shown[part], offset, offset_scale, posterior)
        made.append(_generate(networks, captions[part], layout, seeds[part], *how, reference_attention == ALONE))
    return torch.cat(made)


def _generate(
    networks: Networks, captions: list[str], layout: Layout, seeds: list[int], steps: int, guidance: float,
    kept: Tensor | None, masked: tuple[int, ...], clean: bool, concat: str, text: str,
    shown: Sequence[Sequence[Image.Image]], offset: str, offset_scale: float, posterior: str, alone: bool,
) -> Tensor:  # fmt: skip
    flux = networks.flux
    txt, vec = encode_captions(networks.text, captions, networks.length, layout, text)
    seen = panel_attention_mask(layout, txt.shape[1] // layout.panels) if text == "panel" else None
    start = pack(torch.cat([noise(layout.height, layout.width, seed) for seed in seeds]))
    streams = [torch.Generator().manual_seed(~seed) if posterior == "sample" else None for seed in seeds]  # Pipeline's
    tokens = [encode(networks.autoencoder, *own) for own in zip(shown, streams, strict=True)]
    references = torch.cat(tokens)  # (N, R, 64)
    ids = image_ids(layout, offset, offset_scale)
    mask = torch.ones(1, start.shape[1], 1) if kept is None else generate_mask(masked, layout)
    known = torch.zeros_like(start)
    if kept is not None:
        known = pack(encode_by_panel(networks.autoencoder.encode, kept, layout, concat))

    ts = times(steps, tokens=start.shape[1], shift=networks.shift)
    keep = keep_clean(known, mask) if clean else keep_known(known, start, mask)
    x = denoise(flux, keep(start, 1.0), ts, ids, txt, vec, guidance, references, seen, alone, keep)
    z = unpack(x, 2 * layout.tokens_high, 2 * layout.tokens_wide)
    image = encode_by_panel(networks.autoencoder.decode, z, layout, concat).clamp(-1, 1)
    if kept is None:
        return image
    pixels = unpack(mask.expand(1, -1, 64), 2 * layout.tokens_high, 2 * layout.tokens_wide)[:, :1]
    return image.where(pixels.repeat_interleave(8, 2).repeat_interleave(8, 3).bool(), kept)
