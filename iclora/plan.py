"""From a configuration to a plan: everything that can be checked before a network loads is checked here."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import torch
from PIL import Image

from model.flux import Flux, FluxConfig
from model.lora import shapes
from model.lora_files import read_deltas, read_lora
from model.weights import ModelFiles, examples_folder, find_model, read_flux_config, weight_files
from sampling.flow import times
from sampling.images import fit, open_picture
from sampling.inpaint import drafted_start

from .config import UNO, ModelRow, SampleConfig, model_row, settle
from .knobs import flag
from .layout import Layout, parse_grid, parse_mask, parse_size
from .prompts import Task, build, clean, lint, markers_for, preset, texts_of
from .records import PanelSet, read_set
from .references import about, check_memory, fit_reference, follow_loras

Note = Callable[[str], None]  # takes one line for the user


@dataclass(frozen=True)
class Source:
    """One panel or reference read from a file.

    picture: of its final size
    drafted: True if a masked panel starts from it, False if it is kept or a reference
    """

    path: Path
    sha256: str
    picture: Image.Image
    drafted: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that is settled before a network loads.

    config: nothing in it is left open, and the prompt is the joint caption
    masked: numbers of the panels to generate
    sources: panel number -> what is kept or drafted there
    references: whose subjects are to appear, in the order of their places
    """

    config: SampleConfig
    files: ModelFiles
    weights: tuple[Path, ...]
    shape: FluxConfig
    row: ModelRow
    layout: Layout
    masked: tuple[int, ...]
    sources: Mapping[int, Source]
    loras: tuple[tuple[Path, float], ...] = ()
    references: tuple[Source, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether a LoRA was trained to see kept panels clean, so that they are fed clean."""
        return self._learnt("condition", "clean")

    @property
    def concat(self) -> str:
        """How panels are put together, as a LoRA was trained: see iclora.layout.through."""
        return "tokens" if self._learnt("concat", "tokens") else "pixels"

    @property
    def text(self) -> str:
        """What panels read, as a LoRA was trained: see iclora.prompts.texts_of."""
        return "panel" if self._learnt("text", "panel") else "joint"

    def _learnt(self, name: str, value: str) -> bool:
        return any(about(path).get(f"iclora.{name}") == value for path, _ in self.loras)

    def pictures(self, drafted: bool) -> dict[int, Image.Image]:
        """Gives the kept panels, or the drafts."""
        return {panel: source.picture for panel, source in self.sources.items() if source.drafted is drafted}


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
    if config.schedule != "tokens" and not row.shift:
        note(f"{files.name} has even times; --schedule {config.schedule} is ignored")
        config = replace(config, schedule="tokens")
    loras = choose_loras(config, files, note)
    with torch.device("meta"):
        linears = shapes(Flux(shape))
    for path, _ in loras:
        read_deltas(read_lora(path), linears)  # refuses what load_lora would
    config = settle(follow_loras(config, loras, note), task, row, pick_device(config.device, row, note))
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
    if config.ref:
        check_memory(config, layout, files.flux, shape)
    references = read_references(config.ref, config.ref_size)
    layout = replace(layout, references=tuple(source.picture.size for source in references))
    config = replace(
        config,
        mask=",".join(map(str, masked)),
        panels=tuple(os.path.abspath(path) for path in config.panels),
        set=config.set and os.path.abspath(config.set),
        ref=tuple(os.path.abspath(path) for path in config.ref),
        lora=tuple(f"{os.path.abspath(path)}:{strength:g}" for path, strength in loras if config.lora),
        prompt=prompt,
        panel_prompt=(),
        model=config.model if Path(config.model).name == config.model else os.path.abspath(config.model),
    )
    plan = Plan(config, files, tuple(weight_files(files)), shape, row, layout, masked, sources, loras, references)
    if references and plan.text == "panel":
        raise ValueError("a LoRA of --lora gives each panel its own text, which says nothing of --ref; leave one out")
    texts_of(prompt, layout.rows, layout.cols, plan.text)  # refuses a caption that cannot be taken apart
    ways = {"condition": "clean" if plan.clean else "none", "concat": plan.concat, "text": plan.text}
    note_other_ways([path for path, _ in loras], ways, note)
    return plan


def choose_loras(config: SampleConfig, files: ModelFiles, note: Note) -> tuple[tuple[Path, float], ...]:
    """Takes the LoRAs that are asked for and, for references, the model's own unless one of those may be for them."""
    own, asked = files.root / "loras" / "uno.safetensors", tuple(parse_lora(text) for text in config.lora)
    methods = {about(path).get("iclora.method"): path.name for path, _ in asked}
    if not config.ref or not own.is_file() or UNO in methods or asked and config.config:  # a record has all of them
        return asked
    if None in methods:
        note(f"{methods[None]} may be for references, so {files.name}'s own is not added; --lora {own} adds it")
        return asked
    note(f"no LoRA for references given: {files.name}'s own is used, loras/{own.name}")
    return (*asked, (own, 1.0))


def note_other_ways(loras: Iterable[Path], ways: Mapping[str, str], note: Note) -> None:
    """Tells of LoRAs that were trained in other ways than they are used in, which is possible, but seldom meant.

    ways: condition, concat and text, as for TrainConfig
    """
    for path in loras:
        for name, value in ways.items():
            if (was := about(path).get(f"iclora.{name}", value)) != value:
                note(f"{path.name} was trained with {flag(name)} {was}; now it is used with {value}")


def parse_lora(text: str) -> tuple[Path, float]:
    """Reads FILE or FILE:STRENGTH.

    Errors: ValueError if there is no such file, or the strength is no number
    """
    path, strength = text, 1.0
    if not os.path.exists(path) and ":" in text:
        path, _, number = text.rpartition(":")
        try:
            strength = float(number)
        except ValueError:
            raise ValueError(f"--lora {ascii(text[-80:])}: {ascii(number[:40])} is no strength; use 0.8") from None
    if not os.path.exists(path):
        folder, name = os.path.split(path)
        near = get_close_matches(name, os.listdir(folder or ".") if os.path.isdir(folder or ".") else [], n=1)
        meant = f"did you mean {near[0]}?" if near else "train.py writes lora.safetensors"
        raise ValueError(f"--lora {ascii(path[-80:])}: there is no such file; {meant}")
    if not -100 <= strength <= 100:
        raise ValueError(f"--lora {ascii(text[-80:])}: strength {strength:g} is out of range; 1 is as trained")
    return Path(path), strength


def pick_device(name: str, row: ModelRow, note: Note) -> str:
    """Turns auto into cuda or cpu, and notes where that is slow for the model of a row.

    Errors: ValueError if the machine does not have it
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        if not available["cuda"] and row.name != "tiny":
            note("torch finds no CUDA GPU, so the CPU is used, on which a model of this size is very slow")
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
    for finding in lint(prompt, *grid, task.markers if task else "image"):
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


def read_source(path: Path, size: tuple[int, int], rule: str, drafted: bool) -> Source:
    """Reads one panel and fits it.

    size: width, height in pixels
    rule: as for sampling.images.fit
    Errors: ValueError in one line if it cannot be read
    """
    picture = fit(open_picture(path), *size, rule)
    return Source(path.absolute(), hashlib.sha256(path.read_bytes()).hexdigest(), picture, drafted)


def read_references(paths: Sequence[str], long_side: int) -> tuple[Source, ...]:
    """Reads reference pictures, upright, and brings each to its size.

    Errors: ValueError in one line if one cannot be read or is too narrow
    """
    references = []
    for path in map(Path, paths):
        picture = fit_reference(open_picture(path), long_side, path.name)
        references.append(Source(path.absolute(), hashlib.sha256(path.read_bytes()).hexdigest(), picture))
    return tuple(references)
