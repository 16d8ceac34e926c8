"""Requests in, sets of pictures out: networks stay loaded between requests, and captions that were read stay read.

  pipeline = Pipeline.load("tiny")
  result = pipeline(grid="2x2", mask="3")          the options of sample.py by name; panels and ref may be PIL images
  result.composite.save("set.png")

Letters: I image tokens of the composite, R reference tokens, T text tokens, C width of the T5 tokens, V width of the
CLIP vector.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from model.autoencoder import AutoEncoder, decode_tiled
from model.flux import Flux
from model.lora import load_lora, merge
from model.text import TextEncoders, check_widths, load_text_encoders
from model.weights import load_autoencoder, load_flux
from sampling.denoise import denoise
from sampling.flow import AfterStep, interpolate, times
from sampling.images import to_picture, to_tensor
from sampling.inpaint import keep_clean, keep_known, steps_left
from sampling.latents import noise, pack, unpack

from .cli import typed
from .config import ALONE, SHARED, SampleConfig
from .layout import Layout, compose, encode_by_panel, generate_mask, panel_attention_mask, paste, split
from .memory import planned
from .plan import Plan, Source, make_plan, text_key
from .prompts import texts_of
from .records import Note
from .references import encode, image_ids

FAMILIAR = 23.4  # dB; the worst of 114 pictures of its own world comes back with 23.5, 18 of 29 photos with less


@dataclass(frozen=True)
class Result:
    """One finished set."""

    composite: Image.Image
    panels: Mapping[int, Image.Image]  # the generated ones by number
    seconds: Mapping[str, float]  # what took how long, loading included
    seed: int


class Pipeline:
    """The networks of one model, and the features of captions. note: is called with what is doubtful, in one line."""

    def __init__(self, config: SampleConfig, note: Note = lambda line: None):
        self.config, self.note = config, note
        self.texts: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.encoders: TextEncoders | None = None
        self.autoencoder: AutoEncoder | None = None
        self.flux = self.loaded = None

    @classmethod
    def load(
        cls, model: str = "tiny", loras: Sequence[str] = (), device: str = "auto", dtype: str | None = None, **more: Any
    ) -> "Pipeline":
        """Choose a model and LoRAs, and check them; networks load with the first request.

        model, loras, device, dtype: as --model, --lora, --device and --dtype of sample.py
        more: other options for all requests by name, such as quantize or compile
        Errors: ValueError in one line for whatever cannot work
        """
        if void := more.keys() & {"num", "jobs", "config", "dry_run"}:
            raise ValueError(f"{min(void)} is an option of sample.py alone; leave it out")
        model_options = {"model": model, "lora": loras, "device": device, "dtype": dtype}
        config = with_options(SampleConfig(), {**model_options, **more}, "Pipeline.load")
        networks = {name: getattr(config, name) for name in ("lora", *SHARED)}
        plan = make_plan(SampleConfig(prompt="", grid="1x1", **networks), lambda line: None)
        return pipeline_for(plan)(config)

    def __call__(self, **options: Any) -> Result:
        """Make one set.

        options: those of sample.py by name, references being another name for ref; paths or PIL images
        Errors: ValueError in one line for whatever cannot work
        """
        if fixed := options.keys() & {*SHARED, "num", "out", "jobs", "config"}:
            raise ValueError(f"{min(fixed)} is no option of one set; give it to Pipeline.load, or to sample.py")
        if options.keys() >= {"ref", "references"}:
            raise ValueError("references is another name for ref; give one of them")
        if "references" in options:
            options["ref"] = options.pop("references")
        config = with_options(self.config, options, "the request")
        (result,) = self.run(make_plan(replace(config, num=1), self.note))
        return result

    @torch.inference_mode()
    def run(self, plan: Plan, progress: Callable[[], object] = lambda: None) -> Iterator[Result]:
        """Make the sets of a plan, one for each seed.

        progress: called after every step
        """
        config, layout, seconds = plan.config, plan.layout, {}
        with timed(seconds, "text"):
            self.read_captions([plan])
            txt, vec = self.texts[text_key(plan)]  # (1, T, C), (1, V)
        with timed(seconds, "panels"):
            if self.autoencoder is None:
                self.autoencoder = load_autoencoder(plan.files.autoencoder, config.device)
            mask = generate_mask(plan.generated, layout).to(config.device)  # (1, I, 1)
            known = encode_panels(self.autoencoder, plan, mask)
            if plan.defaults.name == "tiny" and (config.panels or config.set or config.ref):
                note_unfamiliar(self.autoencoder, plan, self.note)
        with timed(seconds, "transformer"):
            self.load_transformer(plan)
        ids = image_ids(layout, config.offset, config.offset_scale).to(config.device)  # (1, I + R, 3)
        attn_mask = None
        if plan.text_mode == "panel":
            attn_mask = panel_attention_mask(layout, txt.shape[1] // layout.panels).to(config.device)
        isolate_refs = config.reference_attention == ALONE
        for seed in range(config.seed, config.seed + config.num):
            seconds = dict(seconds)
            with timed(seconds, "references"):
                refs = encode_references(self.autoencoder, plan, seed)  # (1, R, 64)
            with timed(seconds, "sampling"):
                x, ts, after_step = start(plan, seed, known, mask, progress)
                x = denoise(self.flux, x, ts, ids, txt, vec, config.guidance, refs, attn_mask, isolate_refs, after_step)
            with timed(seconds, "decoding"):
                composite = decode(self.autoencoder, x, plan)
            panels = split(composite, layout)
            yield Result(composite, {panel: panels[panel - 1] for panel in plan.generated}, seconds, seed)

    @torch.inference_mode()
    def read_captions(self, plans: Sequence[Plan]) -> None:
        """Encode the captions that were not read before.

        Errors: ValueError if the transformer was made for other encoders
        """
        new = {text_key(plan): plan for plan in plans if text_key(plan) not in self.texts}
        self.texts |= {key: self.read_caption(plan) for key, plan in new.items()}

    def read_caption(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Encode one caption. Returns txt: (1, T, C), vec: (1, V)"""
        if self.encoders is None:
            self.encoders = load_text_encoders(plan.files, plan.config.device, getattr(torch, plan.config.dtype))
        for line in self.doubts(plan):
            self.note(line)
        how = plan.defaults.text_length, plan.layout, plan.text_mode
        txt, vec = encode_captions(self.encoders, [plan.caption], *how)
        check_widths(txt, vec, plan.files.flux.config, plan.files.name)
        return txt, vec

    def doubts(self, plan: Plan) -> list[str]:
        """Say in lines what of a caption the encoders do not read, or not as words."""
        texts = texts_of(plan.caption, plan.layout.rows, plan.layout.cols, plan.text_mode)
        return self.encoders.doubts(texts, plan.defaults.text_length, plan.files.name)

    def load_transformer(self, plan: Plan) -> None:
        """Load the transformer with its LoRAs merged, unless it is there."""
        loras = [(lora.path, lora.path.stat().st_mtime_ns, strength) for lora, strength in plan.loras]
        wanted = loras, plan.memory_plan
        if self.loaded != wanted:
            self.flux = self.loaded = None
            self.flux, self.loaded = self.make_transformer(plan), wanted

    def make_transformer(self, plan: Plan) -> Flux:
        """Load a transformer and merge its LoRAs into it."""
        flux = load_flux(plan.files.flux, plan.config.device, getattr(torch, plan.config.dtype))
        for lora, strength in plan.loras:
            self.note(str(load_lora(flux, lora, strength)))
        if plan.loras:
            merge(flux)
        return flux


def with_options(config: SampleConfig, options: dict[str, Any], source: str) -> SampleConfig:
    """Lay options over a configuration; of pictures, texts and LoRAs one may stand for a list of one.

    source: what gives them, for messages
    Errors: ValueError in one line for an unknown option, or a value of another type
    """
    several = {k: v for k, v in options.items() if k in ("ref", "panels", "panel_prompt", "lora")}
    several = {k: tuple(v) if isinstance(v, list | tuple) else (v,) for k, v in several.items()}
    single = {k: v for k, v in options.items() if k not in several}
    return replace(config, **typed(SampleConfig, single, source), **several)


def pipeline_for(plan: Plan) -> type[Pipeline]:
    """Choose the plain pipeline, or one that does what cards.py has chosen."""
    if not planned(plan.config, plan.files.flux):
        return Pipeline
    from .fitted import Fitted  # the plain path does without

    return type("FittedPipeline", (Fitted, Pipeline), {})


def encode_captions(
    encoders: TextEncoders, captions: list[str], length: int | None, layout: Layout, text_mode: str
) -> tuple[Tensor, Tensor]:
    """Encode captions; where panels read texts of their own, these stand one behind the other.

    length: T5 tokens of a text
    text_mode: "joint" or "panel", see iclora.prompts.texts_of
    Returns txt: (B, T, C), vec: (B, V), which is of what all panels share
    """
    texts = [texts_of(caption, layout.rows, layout.cols, text_mode) for caption in captions]
    txt, vec = encoders.encode([text for of_caption in texts for text in of_caption], length)
    txt, vec = (features.unflatten(0, (len(captions), -1)) for features in (txt, vec))  # (B, texts, T, C)
    return (txt[:, 1:] if text_mode == "panel" else txt).flatten(1, 2), vec[:, 0]


def encode_panels(autoencoder: AutoEncoder, plan: Plan, mask: Tensor) -> Tensor:
    """Encode the kept panels as one composite and the drafts as another, so that neither sees the other.

    mask: (1, I, 1) 1 where tokens are generated
    Returns known: (1, I, 64) kept tokens, drafts under the mask; 0 where there is nothing
    """

    def encode(sources: Mapping[int, Source]) -> Tensor:
        if not sources:
            return torch.zeros(1, mask.shape[1], 64, device=mask.device)
        pictures = {panel: source.picture for panel, source in sources.items()}
        image = compose(pictures, plan.layout).to(mask.device)
        return pack(encode_by_panel(autoencoder.encode, image, plan.layout, plan.concat))

    return encode(plan.drafts).where(mask.bool(), encode(plan.kept))


def note_unfamiliar(autoencoder: AutoEncoder, plan: Plan, note: Note) -> None:
    """Tell which pictures are unlike what the tiny model was trained on: its autoencoder gives them back badly."""
    strange = []
    for source in (*plan.kept.values(), *plan.drafts.values(), *plan.references):
        image = to_tensor(source.picture).to(next(autoencoder.parameters()).device)
        error = (autoencoder.decode(autoencoder.encode(image)).clamp(-1, 1) - image).square().mean()
        if -10 * math.log10(float(error) / 4) < FAMILIAR:
            strange.append(Path(source.path).name)
    if strange:
        world = f"{plan.files.name} knows its own drawn pictures only"
        note(f"{world}; what {', '.join(dict.fromkeys(strange))} shows is not among them and comes out badly")


def encode_references(autoencoder: AutoEncoder, plan: Plan, seed: int) -> Tensor:
    """Encode the references, each picture's own sample of their posterior unless the mean is wanted.

    Returns tokens: (1, R, 64)
    """
    generator = torch.Generator("cpu").manual_seed(~seed)  # not the stream that the noise comes from
    pictures = [source.picture for source in plan.references]
    return encode(autoencoder, pictures, generator if plan.config.posterior == "sample" else None)


def start(
    plan: Plan, seed: int, known: Tensor, mask: Tensor, progress: Callable[[], object]
) -> tuple[Tensor, list[float], AfterStep]:
    """Give where sampling starts, its times, and what holds the kept panels after every step.

    known: (1, I, 64) tokens of kept panels and drafts
    mask: (1, I, 1) 1 where tokens are generated
    Returns x: (1, I, 64), times and after_step
    """
    config, layout = plan.config, plan.layout
    dtype = getattr(torch, config.dtype)  # rounds the noise as the official sampler does; x itself is float32
    x = pack(noise(layout.height, layout.width, seed, dtype).float()).to(config.device)
    ts = times(config.steps, tokens=x.shape[1], shift=plan.defaults.shift, schedule=config.schedule)
    ts = ts[-1 - steps_left(config.steps, config.strength) :]
    keep = keep_clean(known, mask) if plan.condition == "clean" else keep_known(known, x, mask)

    def after_step(x: Tensor, t_next: float) -> Tensor:
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)  # so that progress and the clock tell the truth
        progress()
        return keep(x, t_next)

    return keep(interpolate(known, x, ts[0]), ts[0]), ts, after_step  # at t = 1 this is the noise


def decode(autoencoder: AutoEncoder, x: Tensor, plan: Plan) -> Image.Image:
    """Decode a composite and paste the kept panels' own pixels back.

    x: (1, I, 64) clean tokens
    """
    layout = plan.layout
    z = unpack(x, 2 * layout.tokens_high, 2 * layout.tokens_wide)
    network = partial(decode_tiled, autoencoder) if plan.config.tile else autoencoder.decode
    composite = to_picture(encode_by_panel(network, z, layout, plan.concat))
    return paste(composite, {panel: source.picture for panel, source in plan.kept.items()}, layout)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long a block took."""
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)
