"""Text and panels in, a set of pictures out: resolve a configuration into a plan, load its networks, sample.

The way of the data, top-down: argv -> SampleConfig -> resolve -> Plan -> Pipeline -> sample -> Result.
Letters: I image tokens of the composite, T text tokens, C width of the T5 tokens, V width of the CLIP vector.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from model.autoencoder import AutoEncoder, decode_tiled
from model.flux import FluxConfig
from model.position import grid_ids
from model.text import load_text_encoders
from model.weights import (
    ModelFiles,
    examples_folder,
    find_model,
    load_autoencoder,
    load_flux,
    read_flux_config,
    weight_files,
)
from sampling.flow import euler, interpolate, times
from sampling.images import to_picture
from sampling.inpaint import drafted_start, keep_known
from sampling.latents import noise, pack, unpack

from .config import ModelRow, SampleConfig, model_row, settle
from .data import PanelSet, Source, read_set, read_source
from .layout import Layout, compose, parse_grid, parse_mask, parse_size, paste, split, token_mask
from .prompts import Task, build, clean, lint, markers_for, preset

Note = Callable[[str], None]  # takes one line for the user
Progress = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True)
class Plan:
    """Everything that is settled before a network loads.

    config: nothing in it is left open, and the prompt is the joint caption
    masked: numbers of the panels to generate
    sources: panel number -> what is kept or drafted there
    """

    config: SampleConfig
    files: ModelFiles
    weights: tuple[Path, ...]
    shape: FluxConfig
    row: ModelRow
    layout: Layout
    masked: tuple[int, ...]
    sources: Mapping[int, Source]

    def pictures(self, drafted: bool) -> dict[int, Image.Image]:
        """Gives the kept panels, or the drafts."""
        return {panel: source.picture for panel, source in self.sources.items() if source.drafted is drafted}


@dataclass(frozen=True)
class Result:
    """One finished set.

    panels: panel number -> the generated ones
    seconds: what took how long, the loading that came before it included
    """

    composite: Image.Image
    panels: Mapping[int, Image.Image]
    seconds: Mapping[str, float]


# from a configuration to a plan


def resolve(config: SampleConfig, note: Note) -> Plan:
    """Settles and checks everything that needs no network, so that a mistake costs a second and not minutes.

    note: is told what is assumed, ignored or doubtful
    Errors: ValueError in one line for whatever cannot work
    """
    task = preset(config.preset) if config.preset else None
    files = find_model(config.model)
    shape = read_flux_config(files.flux)
    row = model_row(shape)
    if config.guidance is not None and not shape.guidance_embed:
        note(f"{files.name} has no guidance; --guidance {config.guidance:g} is ignored")
        config = replace(config, guidance=None)
    config = settle(config, task, row, pick_device(config.device))
    layout = Layout(*parse_grid(config.grid), *parse_size(config.panel_size))
    masked = parse_mask(config.mask, layout.panels)
    if not masked:
        raise ValueError("the mask is empty, so there is nothing to generate; name panels with --mask, such as 3")
    drafted_start(times(config.steps, tokens=layout.tokens_high * layout.tokens_wide), config.strength)
    if row.name == "tiny" and max(layout.panel_width, layout.panel_height) > 2 * row.panel:
        note(f"{files.name} knows small panels only; try --panel-size {row.panel}")

    found = find_panels(config, layout, masked, note)
    prompt = joint_caption(config, layout, task, found, note)
    sources = read_sources(config, layout, masked, found, note)
    config = replace(
        config,
        mask=",".join(map(str, masked)),
        panels=tuple(os.path.abspath(path) for path in config.panels),
        set=config.set and os.path.abspath(config.set),
        prompt=prompt,
        panel_prompt=(),
        model=config.model if Path(config.model).name == config.model else os.path.abspath(config.model),
    )
    return Plan(config, files, tuple(weight_files(files)), shape, row, layout, masked, sources)


def pick_device(name: str) -> str:
    """Turns auto into cuda or cpu.

    Errors: ValueError if the machine does not have it
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available[name]:
        raise ValueError(f"--device {name} is not available to torch on this machine; use cpu, or auto")
    return name


def find_panels(config: SampleConfig, layout: Layout, masked: Sequence[int], note: Note) -> PanelSet:
    """Says which panel files are meant: the given ones, else, where some or a caption are needed, the bundled example.

    Errors: ValueError if both ways of giving them are used, or none where some are needed and no example has this grid
    """
    if config.panels and config.set is not None:
        raise ValueError("--panels and --set are two ways to give the same; use one of them")
    if config.set is not None:
        return read_set(Path(config.set))
    if config.panels:
        return PanelSet(tuple(map(Path, config.panels)))
    pictures = len(masked) < layout.panels or config.strength < 1
    caption = config.prompt is None and not config.panel_prompt
    if not pictures and not caption:
        return PanelSet()
    grid = f"{layout.rows}x{layout.cols}"
    examples = examples_folder()
    bundled = sorted(folder.name for folder in examples.glob("*x*"))
    if grid not in bundled:
        needed = " and ".join(["panels (--panels or --set)"] * pictures + ["a --prompt"] * caption)
        raise ValueError(f"give {needed}: there is no bundled example of a {grid} grid, only {', '.join(bundled)}")
    found = read_set(examples / grid)
    if not pictures:
        note(f"no prompt given: the caption of the bundled {grid} example is used: {found.caption}")
        return PanelSet(caption=found.caption, bundled=True)
    own = "with its caption: " + str(found.caption) if caption else "with the given prompt"
    note(f"no panels given: the bundled {grid} example is used, {own}")
    return replace(found, bundled=True)


def joint_caption(config: SampleConfig, layout: Layout, task: Task | None, found: PanelSet, note: Note) -> str:
    """Makes the one prompt of all panels: from the panel prompts, else as given, else as found.

    Errors: ValueError if there is none, or the panel prompts are not one for each panel
    """
    grid = layout.rows, layout.cols
    if config.panel_prompt:
        if len(config.panel_prompt) != layout.panels:
            raise ValueError(
                f"{len(config.panel_prompt)} --panel-prompt for the {layout.panels} panels of the "
                f"{config.grid} grid; give one for each, kept ones too, in reading order"
            )
        markers = markers_for(task.markers if task else "image", *grid)
        prompt = build(config.prompt or "", config.panel_prompt, markers, task.tag if task else "")
    elif config.prompt is not None:
        prompt = clean(config.prompt)
    elif found.caption is not None:
        prompt = found.caption
    else:
        raise ValueError("there is no prompt; give --prompt, or --panel-prompt for each panel, or caption.txt in --set")
    if task and not prompt.startswith(task.tag):
        note(f"captions of {config.preset} begin with {task.tag}; this one does not")
    for finding in lint(prompt, *grid):
        note(f"prompt: {finding}")
    return prompt


def read_sources(
    config: SampleConfig, layout: Layout, masked: Sequence[int], found: PanelSet, note: Note
) -> dict[int, Source]:
    """Reads and fits the panels that are kept or drafted; the other files are not even opened.

    Errors: ValueError for a wrong number of files, or one that cannot be read
    """
    everything = range(1, layout.panels + 1)
    kept = [panel for panel in everything if panel not in masked]
    drafts = config.strength < 1
    if len(found.paths) == layout.panels:
        assigned = dict(zip(everything, found.paths, strict=True))
    elif len(found.paths) == len(kept) and not drafts:
        assigned = dict(zip(kept, found.paths, strict=True))
    elif drafts:
        raise ValueError(
            f"{len(found.paths)} panels given; --strength {config.strength:g} starts from drafts and needs all "
            f"{layout.panels} of the {config.grid} grid"
        )
    else:
        some = f"the {len(kept)} kept ones ({', '.join(map(str, kept))})" if kept else "none, as all are generated,"
        raise ValueError(
            f"{len(found.paths)} panels given; mask {','.join(map(str, masked))} in a {config.grid} grid takes {some} "
            f"or all {layout.panels}; --mask says which are generated"
        )
    used = assigned if drafts else {panel: path for panel, path in assigned.items() if panel in kept}
    ignored = [f"{panel} ({path.name})" for panel, path in assigned.items() if panel not in used]
    if ignored and not found.bundled:
        note(f"masked panels are generated, so the given ones are ignored: {', '.join(ignored)}; --strength uses them")
    size = layout.panel_width, layout.panel_height
    return {panel: read_source(path, size, config.fit, panel in masked) for panel, path in used.items()}


# from a plan to pictures


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

    @torch.inference_mode()
    def sample(self, seed: int, progress: Progress) -> Result:
        """Makes one set; the same seed gives the same one.

        seed: of the noise
        progress: called after every step
        """
        plan, config, layout, seconds = self.plan, self.plan.config, self.plan.layout, dict(self.seconds)
        dtype = getattr(torch, config.dtype)  # rounds the noise as the official sampler does; x itself is float32
        start = pack(noise(layout.height, layout.width, seed, dtype).float()).to(config.device)  # (1, I, 64)
        ts = drafted_start(times(config.steps, tokens=start.shape[1], shift=plan.row.shift), config.strength)
        keep = keep_known(self.data, start, self.mask)

        def after_step(x: Tensor, t_next: float) -> Tensor:
            wait(x.device)
            progress(ts.index(t_next), len(ts) - 1)
            return keep(x, t_next)

        with timed(seconds, "sampling"):
            x = interpolate(self.data, start, ts[0])  # at t = 1 this is the noise
            x = euler(self.velocity(), x, ts, after_step)
        with timed(seconds, "decoding"):
            z = unpack(x, 2 * layout.tokens_high, 2 * layout.tokens_wide)
            image = decode_tiled(self.autoencoder, z) if config.tile else self.autoencoder.decode(z)
            composite = paste(to_picture(image), plan.pictures(drafted=False), layout)
        panels = split(composite, layout)
        return Result(composite, {panel: panels[panel - 1] for panel in plan.masked}, seconds)

    def velocity(self) -> Callable[[Tensor, float], Tensor]:
        """Makes the velocity of the sampler from the transformer: a closure over text, positions and guidance."""
        config, layout = self.plan.config, self.plan.layout
        ids = grid_ids(layout.tokens_high, layout.tokens_wide)[None].to(config.device)  # (1, I, 3)
        txt_ids = torch.zeros(1, self.txt.shape[1], 3, device=config.device)
        guidance = None if config.guidance is None else torch.full((1,), config.guidance, device=config.device)

        def velocity(x: Tensor, t: float) -> Tensor:
            t = torch.full((1,), t, device=x.device)
            return self.flux(x, ids, self.txt, txt_ids, t, self.vec, guidance).float()  # x stays in float32

        return velocity


def encode_text(plan: Plan, dtype: torch.dtype, note: Note) -> tuple[Tensor, Tensor]:
    """Encodes the prompt with encoders that are gone afterwards.

    returns: txt (1, T, C), vec (1, V)
    Errors: ValueError if the transformer was made for other encoders
    """
    encoders = load_text_encoders(plan.files, plan.config.device, dtype)
    for line in encoders.lost(plan.config.prompt, plan.row.text):
        note(line)
    txt, vec = encoders.encode([plan.config.prompt], plan.row.text)
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


def encode_panels(autoencoder: AutoEncoder, plan: Plan, mask: Tensor) -> Tensor:
    """Encodes the kept panels as one composite and the drafts as another, so that neither sees the other.

    mask: (1, I, 1) 1 where tokens are generated
    returns: (1, I, 64) kept tokens, drafts under the mask; 0 where there is nothing
    """

    def encode(panels: dict[int, Image.Image]) -> Tensor:
        if not panels:
            return torch.zeros(1, plan.layout.tokens_high * plan.layout.tokens_wide, 64, device=mask.device)
        return pack(autoencoder.encode(compose(panels, plan.layout).to(mask.device)))

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
