"""From a configuration to a plan: everything that can be checked before a network loads is checked here."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import torch
from PIL import Image

from model.flux import Flux
from model.lora import shapes
from model.lora_formats import LoraFile, check_shapes, read_lora
from model.weights import ModelFiles, examples_folder, find_model
from sampling.images import fit, open_picture, picture_size, to_rgb
from sampling.inpaint import steps_left

from .config import UNO, UNO_RELEASE, ModelDefaults, SampleConfig, flag, model_defaults, resolve_defaults
from .layout import Layout, parse_grid, parse_mask, parse_size
from .memory import check_memory
from .prompts import TASKS, Task, build, clean, lint, markers_for, texts_of
from .records import Note, PanelSet, read_set
from .references import fit_reference, follow_loras, reference_size

Loras = tuple[tuple[LoraFile, float], ...]  # with their strengths
MODES = {"condition": ("none", "clean"), "concat": ("pixels", "tokens"), "text": ("joint", "panel")}  # as train.py's
TINY_GRIDS = ("1x1", "1x2", "2x1", "2x2", "3x1")  # that it was trained on


@dataclass(frozen=True)
class Source:
    """A picture that was given, of its final size."""

    path: str  # absolute; a PIL image is called one
    sha256: str  # of the file; of a PIL image's pixels
    picture: Image.Image


@dataclass(frozen=True)
class Plan:
    """Everything that is settled before a network loads."""

    config: SampleConfig  # every default decided
    files: ModelFiles
    defaults: ModelDefaults
    loras: Loras
    layout: Layout  # with the references' sizes
    generated: tuple[int, ...]  # panels to generate; the others are kept
    caption: str  # the joint one
    kept: Mapping[int, Source]  # by panel
    drafts: Mapping[int, Source]  # by panel to generate, where --strength starts from drafts
    references: tuple[Source, ...]  # in the order of their places
    condition: str  # as a LoRA was trained: "clean" feeds kept panels clean, "none" noised
    concat: str  # "pixels" or "tokens", see iclora.layout.encode_by_panel
    text_mode: str  # "joint" or "panel", see iclora.prompts.texts_of
    memory_plan: object = None  # an iclora.cards.MemoryPlan; None saves no memory


def make_plan(config: SampleConfig, note: Note) -> Plan:
    """Settle and check everything that needs no network, so that a mistake costs a second and not minutes.

    note: is called with what is assumed, ignored or doubtful
    Errors: ValueError in one line for whatever cannot work
    """
    task = TASKS.get(config.preset)
    files = find_model(config.model)
    defaults = model_defaults(files.flux.config)
    if config.guidance is not None and defaults.guidance is None:
        note(f"{files.name} has no guidance; --guidance {config.guidance:g} is ignored")
        config = replace(config, guidance=None)
    loras = choose_loras(config, files, note) if config.lora or config.ref else ()
    modes = {name: mode_of(loras, name, *values) for name, values in MODES.items()}
    if loras:
        note_other_modes([lora for lora, _ in loras], modes, note)
        config = follow_loras(config, [lora for lora, _ in loras])
        config = follow_release(config, loras, note) if defaults.name == "dev" else config
    config = resolve_defaults(config, task, defaults, pick_device(config.device, defaults, note))
    layout = Layout(*parse_grid(config.grid), *parse_size(config.panel_size))
    generated = parse_mask(config.mask, layout.panels)
    steps_left(config.steps, config.strength)  # refuses a strength that leaves none
    if defaults.name == "tiny":
        note_unknown_shapes(layout, files.name, defaults.panel, note)

    panels = find_panels(config, layout, generated, note)
    caption = joint_caption(config, layout, task, panels, note)
    kept, drafts = read_panels(config, layout, generated, panels, note)
    layout, references = read_references(config, layout, files) if config.ref else (layout, ())
    if modes["text"] == "panel":
        if references:
            raise ValueError("a LoRA of --lora gives each panel a text of its own, and --ref has none; leave one out")
        texts_of(caption, layout.rows, layout.cols, "panel")  # refuses a caption that cannot be taken apart
    how = modes["condition"], modes["concat"], modes["text"]
    return Plan(config, files, defaults, loras, layout, generated, caption, kept, drafts, references, *how)


def choose_loras(config: SampleConfig, files: ModelFiles, note: Note) -> Loras:
    """Read the headers of the LoRAs that are asked for and, for references, of the model's own unless one is for them.

    Errors: ValueError for whatever load_lora would refuse
    """
    bundled = files.root / "loras" / "uno.safetensors"
    loras = tuple((read_lora(path), strength) for path, strength in map(parse_lora, config.lora))
    methods = {lora.metadata.get("iclora.method"): lora.path.name for lora, _ in loras}
    if UNO in methods and not config.ref:
        note(f"{methods[UNO]} was trained to follow reference pictures (UNO) and gets none; give some with --ref")
    if config.ref and bundled.is_file() and UNO not in methods:
        if None in methods:
            name = files.name
            note(f"{methods[None]} may be for references, so {name}'s own is not added; --lora {bundled} adds it")
        else:
            note(f"no LoRA for references given: {files.name}'s own is used, loras/{bundled.name}")
            loras = (*loras, (read_lora(bundled), 1.0))
    if config.ref and not loras:
        note("references without a LoRA: the model follows them only if it was trained to; UNO's goes to --lora")
    if loras:
        with torch.device("meta"):
            linears = shapes(Flux(files.flux.config))
        for lora, _ in loras:
            check_shapes(lora, linears)
    return loras


def follow_release(config: SampleConfig, loras: Loras, note: Note) -> SampleConfig:
    """Sample with UNO's release, which has its names, rank 512 and no word of train.py's, as its own sampler does."""
    chosen = {name: value for name, value in UNO_RELEASE.items() if getattr(config, name) is None}
    for lora, _ in loras:
        ranks = {(entry.dialect, lora.tensors[entry.keys["down"]].shape[0]) for entry in lora.entries}
        if chosen and ranks == {("xlabs", 512)} and "iclora.method" not in lora.metadata:
            flags = " and ".join(f"{flag(name)} {value}" for name, value in chosen.items())
            note(f"{lora.path.name} is taken for UNO's release and sampled as there, with {flags}; flags win")
            return replace(config, **chosen)
    return config


def mode_of(loras: Loras, name: str, plain: str, other: str) -> str:
    """Say how a LoRA was trained, so that it is used in the same way: plainly unless one says otherwise."""
    return other if any(lora.metadata.get(f"iclora.{name}") == other for lora, _ in loras) else plain


def note_other_modes(loras: Sequence[LoraFile], modes: Mapping[str, str], note: Note) -> None:
    """Tell of LoRAs that were trained in other modes (condition, concat, text) than they are used in; seldom meant."""
    for lora in loras:
        for name, value in modes.items():
            if (trained := lora.metadata.get(f"iclora.{name}", value)) != value:
                note(f"{lora.path.name} was trained with {flag(name)} {trained}; now it is used with {value}")


def parse_lora(text: str) -> tuple[Path, float]:
    """Read FILE or FILE:STRENGTH.

    Errors: ValueError if there is no such file, or the strength is no number
    """
    path, strength = str(text), 1.0
    if not os.path.exists(path) and ":" in path[2:]:  # a Windows drive has one as well
        path, _, number = path.rpartition(":")
        try:
            strength = float(number)
        except ValueError:
            raise ValueError(f"--lora {ascii(text[-80:])}: {ascii(number[:40])} is no strength; use 0.8") from None
    if not os.path.exists(path):
        folder, name = os.path.split(path)
        near = get_close_matches(name, os.listdir(folder or ".") if os.path.isdir(folder or ".") else [], n=1)
        advice = f"did you mean {near[0]}?" if near else "train.py writes lora.safetensors"
        raise ValueError(f"--lora {ascii(path[-80:])}: there is no such file; {advice}")
    if not -100 <= strength <= 100:
        raise ValueError(f"--lora {ascii(text[-80:])}: strength {strength:g} is out of range; 1 is as trained")
    return Path(path), strength


def pick_device(name: str, defaults: ModelDefaults, note: Note) -> str:
    """Turn auto into cuda, mps or cpu, and note where that is slow for a model.

    Errors: ValueError if the machine does not have it
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
        if name == "cpu" and defaults.name != "tiny":
            note("torch finds no GPU, so the CPU is used, on which a model of this size is very slow")
    if not available[name]:
        raise ValueError(f"--device {name} is not available to torch on this machine; use cpu, or auto")
    return name


def note_unknown_shapes(layout: Layout, name: str, panel: int, note: Note) -> None:
    """Tell which grids and panels the tiny model was trained on, where others are asked for."""
    if f"{layout.rows}x{layout.cols}" not in TINY_GRIDS:
        note(f"{name} knows grids of {', '.join(TINY_GRIDS)}; a {layout.rows}x{layout.cols} grid comes out badly")
    if (layout.panel_width, layout.panel_height) != (panel, panel):
        size = f"{layout.panel_width}x{layout.panel_height}"
        note(f"{name} knows panels of {panel}x{panel}; {size} comes out badly, try --panel-size {panel}")


def find_panels(config: SampleConfig, layout: Layout, generated: Sequence[int], note: Note) -> PanelSet:
    """Say which panel files are meant: the given ones, else, where some or a caption are needed, the bundled example.

    Errors: ValueError if both ways of giving them are used, or none where some are needed and no example has this grid
    """
    if config.panels and config.set is not None:
        raise ValueError("--panels and --set are two ways to give the same; use one of them")
    if config.set is not None:
        return read_set(Path(config.set))
    if config.panels:
        return PanelSet(config.panels)
    need_pictures = len(generated) < layout.panels or config.strength < 1
    need_caption = config.prompt is None and not config.panel_prompt
    return bundled_example(layout, need_pictures, need_caption, note) if need_pictures or need_caption else PanelSet()


def bundled_example(layout: Layout, pictures: bool, caption: bool, note: Note) -> PanelSet:
    """Give the bundled example of a grid, and say so.

    pictures, caption: whether they are needed
    Errors: ValueError if no example has this grid
    """
    grid, examples = f"{layout.rows}x{layout.cols}", examples_folder()
    bundled = sorted(folder.name for folder in examples.glob("*x*"))
    if grid not in bundled:
        needs = " and ".join(["panels (--panels or --set)"] * pictures + ["a --prompt"] * caption)
        raise ValueError(f"give {needs}: there is no bundled example of a {grid} grid, only {', '.join(bundled)}")
    example = read_set(examples / grid)
    if not pictures:
        note(f"no prompt given: the caption of the bundled {grid} example is used: {example.caption}")
        return PanelSet(caption=example.caption, bundled=True)
    words = f"with its caption: {example.caption}" if caption else "with the given prompt"
    note(f"no panels given: the bundled {grid} example is used, {words}")
    return replace(example, bundled=True)


def joint_caption(config: SampleConfig, layout: Layout, task: Task | None, panels: PanelSet, note: Note) -> str:
    """Make the one prompt of all panels: from the panel prompts, else as given, else that of the set.

    Errors: ValueError if there is none, or the panel prompts are not one for each panel
    """
    if config.panel_prompt:
        caption = build_caption(config, layout, task)
    elif config.prompt is not None:
        caption = clean(config.prompt)
    elif panels.caption is not None:
        caption = panels.caption
    else:
        raise ValueError("there is no prompt; give --prompt, or --panel-prompt for each panel, or caption.txt in --set")
    for finding in lint(caption, layout.rows, layout.cols, *((task.markers, task.tag) if task else ())):
        note(f"prompt: {finding}")
    return caption


def build_caption(config: SampleConfig, layout: Layout, task: Task | None) -> str:
    """Join the panel prompts, behind the prompt. Errors: ValueError if they are not one for each panel"""
    if len(config.panel_prompt) != layout.panels:
        raise ValueError(
            f"{len(config.panel_prompt)} --panel-prompt for the {layout.panels} panels of the {config.grid} grid; give "
            "one for each, kept ones too, in reading order"
        )
    markers = markers_for(task.markers if task else "image", layout.rows, layout.cols)
    return build(config.prompt or "", config.panel_prompt, markers, task.tag if task else "")


def read_panels(
    config: SampleConfig, layout: Layout, generated: Sequence[int], panels: PanelSet, note: Note
) -> tuple[dict[int, Source], dict[int, Source]]:
    """Read and fit the panels that are kept, and the drafts; the other files are not even opened.

    Returns both by panel
    Errors: ValueError for a wrong number of files, or one that cannot be read
    """
    everything, drafted = range(1, layout.panels + 1), config.strength < 1
    kept = [panel for panel in everything if panel not in generated]
    named = kept if len(panels.paths) == len(kept) and not drafted else everything
    if len(panels.paths) != len(named):
        raise wrong_count(config, len(panels.paths), layout.panels, kept)
    paths = dict(zip(named, panels.paths, strict=True))
    ignored = [f"{panel} ({_name(paths[panel])})" for panel in paths if panel in generated and not drafted]
    if ignored and not panels.bundled:
        note(f"masked panels are generated, so the given ones are ignored: {', '.join(ignored)}; --strength uses them")

    def read(numbers: Sequence[int]) -> dict[int, Source]:
        size = layout.panel_width, layout.panel_height
        return {panel: read_panel(paths[panel], size, config.fit, note) for panel in numbers}

    return read(kept), read(generated if drafted else ())


def wrong_count(config: SampleConfig, count: int, panels: int, kept: Sequence[int]) -> ValueError:
    """Say how many panels should be given."""
    if config.strength < 1:
        needs = f"--strength {config.strength:g} starts from drafts and needs all {panels} of the {config.grid} grid"
        return ValueError(f"{count} panels given; {needs}")
    takes = f"the {len(kept)} kept ones ({', '.join(map(str, kept))})" if kept else "none, as all are generated,"
    mask = ",".join(map(str, (panel for panel in range(1, panels + 1) if panel not in kept)))
    return ValueError(
        f"{count} panels given; mask {mask} in a {config.grid} grid takes {takes} or all {panels}; --mask says which "
        "are generated"
    )


def read_panel(path: Path | Image.Image, size: tuple[int, int], rule: str, note: Note) -> Source:
    """Read a panel and bring it to its size; note what a crop cuts away, and that it is enlarged.

    Errors: ValueError in one line if it cannot be read
    """
    source = read_source(path)
    wide, high = (target / side for target, side in zip(size, source.picture.size, strict=True))
    cut, scale = 1 - min(wide, high) / max(wide, high), (min if rule == "pad" else max)(wide, high)
    doubts = [f"the crop cuts {cut:.0%} of it away (--fit pad keeps all)"] * (rule == "crop" and cut > 0.1)
    doubts += [f"it is enlarged {scale:.1f} times"] * (scale > 1)
    if doubts:
        note(f"{_name(path)} becomes {size[0]}x{size[1]} pixels: {', and '.join(doubts)}")
    return replace(source, picture=fit(source.picture, *size, rule))


def read_references(config: SampleConfig, layout: Layout, files: ModelFiles) -> tuple[Layout, tuple[Source, ...]]:
    """Read the references, upright, and bring each to its size, which the layout then has.

    Errors: ValueError in one line if one cannot be read or is too narrow, or memory does not hold them all
    """
    sizes = map(picture_size, config.ref)
    shapes = tuple(reference_size(s, config.ref_size, n) for s, n in zip(sizes, map(_name, config.ref), strict=True))
    check_memory(config, replace(layout, references=shapes), files.flux)
    fitting = [(read_source(item), _name(item)) for item in config.ref]
    sources = [replace(s, picture=fit_reference(s.picture, config.ref_size, name)) for s, name in fitting]
    return replace(layout, references=tuple(source.picture.size for source in sources)), tuple(sources)


def _name(item: str | Path | Image.Image) -> str:
    """Call a picture something in messages."""
    return "a PIL image" if isinstance(item, Image.Image) else Path(item).name


def read_source(item: str | Path | Image.Image) -> Source:
    """Read a picture from a file, or take one that Python made. Errors: ValueError in one line if it cannot be read"""
    if isinstance(item, Image.Image):
        picture_size(item)
        picture = to_rgb(item)
        return Source("a PIL image", hashlib.sha256(picture.tobytes()).hexdigest(), picture)
    picture = open_picture(item)
    return Source(os.path.abspath(item), hashlib.sha256(Path(item).read_bytes()).hexdigest(), picture)


def text_key(plan: Plan) -> tuple[str, str, int, int]:
    """Tell captions apart by what is read of them."""
    return plan.caption, plan.text_mode, plan.layout.rows, plan.layout.cols
