"""A plan in, a set of pictures out: load the networks of a plan, one after the other, and sample.

The way of the data, top-down: argv -> SampleConfig -> resolve -> Plan -> Pipeline -> sample -> Result.
Letters: I image tokens of the composite, R reference tokens, T text tokens, C width of the T5 tokens, V width of the
CLIP vector.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from model.autoencoder import AutoEncoder, decode_tiled
from model.lora import load_lora, merge
from model.text import TextEncoders, load_text_encoders
from model.weights import load_autoencoder, load_flux
from sampling.denoise import denoise
from sampling.flow import interpolate, times
from sampling.images import to_picture
from sampling.inpaint import drafted_start, keep_clean, keep_known
from sampling.latents import noise, pack, unpack

from .config import ALONE
from .layout import Layout, compose, paste, sight, split, through, token_mask
from .plan import Note, Plan, resolve
from .prompts import texts_of
from .references import encode, place

__all__ = ["Pipeline", "Plan", "Result", "resolve"]
Progress = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True)
class Result:
    """One finished set.

    panels: panel number -> the generated ones
    seconds: what took how long, the loading that came before it included
    """

    composite: Image.Image
    panels: Mapping[int, Image.Image]
    seconds: Mapping[str, float]


class Pipeline:
    """The networks of one plan, loaded one after the other; sample() can be called with many seeds.

    T5 and the transformer are large, so the text is encoded and its encoders are freed before the transformer loads.

    note: is told which words of the prompt are lost
    """

    @torch.inference_mode()
    def __init__(self, plan: Plan, note: Note):
        self.plan, self.seconds = plan, {}
        device, dtype = plan.config.device, getattr(torch, plan.config.dtype)
        with timed(self.seconds, "text"):
            self.txt, self.vec = encode_text(plan, dtype, note)
        with timed(self.seconds, "panels"):
            self.autoencoder = load_autoencoder(plan.files.autoencoder, device)
            self.mask = token_mask(plan.masked, plan.layout).to(device)  # (1, I, 1)
            self.data = encode_panels(self.autoencoder, plan, self.mask)
        with timed(self.seconds, "transformer"):
            self.flux = load_flux(plan.files.flux, device, dtype)
            for path, strength in plan.loras:
                note(str(load_lora(self.flux, path, strength)))
            merge(self.flux)

    @torch.inference_mode()
    def sample(self, seed: int, progress: Progress) -> Result:
        """Makes one set; the same seed gives the same one.

        seed: of the noise
        progress: called after every step
        """
        plan, config, layout, seconds = self.plan, self.plan.config, self.plan.layout, dict(self.seconds)
        dtype = getattr(torch, config.dtype)  # rounds the noise as the official sampler does; x itself is float32
        start = pack(noise(layout.height, layout.width, seed, dtype).float()).to(config.device)  # (1, I, 64)
        ts = times(config.steps, tokens=start.shape[1], shift=plan.row.shift, schedule=config.schedule)
        ts = drafted_start(ts, config.strength)
        keep = keep_clean(self.data, self.mask) if plan.clean else keep_known(self.data, start, self.mask)

        def after_step(x: Tensor, t_next: float) -> Tensor:
            wait(x.device)
            progress(ts.index(t_next), len(ts) - 1)
            return keep(x, t_next)

        with timed(seconds, "references"):
            references = self.encode_references(seed)  # (1, R, 64)
        with timed(seconds, "sampling"):
            x = keep(interpolate(self.data, start, ts[0]), ts[0])  # at t = 1 this is the noise
            ids = place(layout, config.offset, config.offset_scale).to(x.device)  # (1, I + R, 3)
            mask = None
            if plan.text == "panel":
                mask = sight(layout, self.txt.shape[1] // layout.panels).to(x.device)
            isolate = config.reference_attention == ALONE
            x = denoise(
                self.flux, x, ts, ids, self.txt, self.vec, config.guidance, references, mask, isolate, after_step
            )
        with timed(seconds, "decoding"):
            z = unpack(x, 2 * layout.tokens_high, 2 * layout.tokens_wide)
            decode = partial(decode_tiled, self.autoencoder) if config.tile else self.autoencoder.decode
            image = through(decode, z, layout, plan.concat)
            composite = paste(to_picture(image), plan.pictures(drafted=False), layout)
        panels = split(composite, layout)
        return Result(composite, {panel: panels[panel - 1] for panel in plan.masked}, seconds)

    def encode_references(self, seed: int) -> Tensor:
        """Encodes the references, each picture's own sample of their posterior unless the mean is wanted.

        returns: (1, R, 64) clean tokens
        """
        generator = torch.Generator("cpu").manual_seed(~seed)  # not the stream that the noise comes from
        pictures = [source.picture for source in self.plan.references]
        return encode(self.autoencoder, pictures, generator if self.plan.config.posterior == "sample" else None)


def encode_text(plan: Plan, dtype: torch.dtype, note: Note) -> tuple[Tensor, Tensor]:
    """Encodes the prompt with encoders that are gone afterwards.

    returns: txt (1, T, C), vec (1, V)
    Errors: ValueError if the transformer was made for other encoders
    """
    encoders = load_text_encoders(plan.files, plan.config.device, dtype)
    texts = texts_of(plan.config.prompt, plan.layout.rows, plan.layout.cols, plan.text)
    for line in dict.fromkeys(line for text in texts for line in encoders.lost(text, plan.row.text)):
        note(line)
    txt, vec = encode_captions(encoders, [plan.config.prompt], plan.row.text, plan.layout, plan.text)
    del encoders
    gc.collect()  # transformers' modules hold each other in cycles
    if plan.config.device == "cuda":
        torch.cuda.empty_cache()
    widths, wanted = (txt.shape[-1], vec.shape[-1]), (plan.shape.context_in_dim, plan.shape.vec_in_dim)
    if widths != wanted:
        raise ValueError(
            f"the T5 and CLIP encoders beside {plan.files.name} give widths {widths[0]} and {widths[1]}, but its "
            f"transformer takes {wanted[0]} and {wanted[1]}; use the encoders that belong to it"
        )
    return txt, vec


def encode_captions(
    encoders: TextEncoders, captions: list[str], length: int | None, layout: Layout, text: str
) -> tuple[Tensor, Tensor]:
    """Encodes captions; where panels read texts of their own, these stand one behind the other.

    length: T5 tokens of a text
    text: "joint" or "panel", see iclora.prompts.texts_of
    returns: txt (B, T, C), vec (B, V), which is of what all panels share
    """
    texts = [texts_of(caption, layout.rows, layout.cols, text) for caption in captions]
    txt, vec = encoders.encode([one for some in texts for one in some], length)
    txt, vec = (features.unflatten(0, (len(captions), -1)) for features in (txt, vec))  # (B, texts, T, C)
    return (txt[:, 1:] if text == "panel" else txt).flatten(1, 2), vec[:, 0]


def encode_panels(autoencoder: AutoEncoder, plan: Plan, mask: Tensor) -> Tensor:
    """Encodes the kept panels as one composite and the drafts as another, so that neither sees the other.

    mask: (1, I, 1) 1 where tokens are generated
    returns: (1, I, 64) kept tokens, drafts under the mask; 0 where there is nothing
    """

    def encode(panels: dict[int, Image.Image]) -> Tensor:
        if not panels:
            return torch.zeros(1, plan.layout.tokens_high * plan.layout.tokens_wide, 64, device=mask.device)
        image = compose(panels, plan.layout).to(mask.device)
        return pack(through(autoencoder.encode, image, plan.layout, plan.concat))

    return encode(plan.pictures(drafted=True)).where(mask.bool(), encode(plan.pictures(drafted=False)))


def wait(device: torch.device) -> None:
    """Waits for the work queued on a GPU, so that the clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Notes how long a block took."""
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)
