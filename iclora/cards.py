"""Which techniques a run needs on a card: its peak in every phase, computed from headers before anything is loaded.

The first setting that fits is taken, in this order, so the fastest of those that fit:

  1. as it is, where weights are below BIG; above it the next is always on, as it is exact and costs no time
  2. modulation tables: a quarter of the weights (27 %) leaves the card
  3. text encoders leave before the transformer comes; a new caption reads them again
  4. training: as many blocks as needed are computed again in the backward pass (--checkpointing auto), at most a third
     slower; the first ones, as then one block alone is kept beside the inputs of the others
  5. sampling: decoding in tiles takes seconds, but pixels near seams change slightly, so it is recorded as --tile
  6. offload: exact, and free where a block is computed for longer than its copy takes: large pictures on slow cards.
     It comes here if a step then takes at most SLOWER times as long
  7. fp8: lossy, so it is told and recorded as --quantize; it comes where nothing exact keeps half of the speed
  8. fp8 with offload
Encoders that do not fit alone run on the CPU; weights that do not fit whole are read, merged and quantised there. What
is asked for (--tile, --offload, --quantize, --no-checkpointing) is on in every setting.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from model.compiled import check_compiler
from model.flux import FluxConfig
from model.loading import BIG
from model.tables import AHEAD, MOST_ROWS
from model.weights import ModelFiles

from .config import SampleConfig, TrainConfig, model_defaults
from .flops import count_flops, count_tokens
from .layout import MAX_TOKENS, Layout
from .sizes import COPIES, DECODE, ENCODE, TEXT_WORK, TILE, Weights, forward_bytes, read_weights, step_bytes

RESERVE = 0.08  # of a card: CUDA's own, and gaps that no tensor fits into
RATE, LINK = 100e12, 20e9  # FLOP/s of a middling card and bytes/s of its slot, to guess what offload costs
SLOWER = 2
SHORT = 128  # tokens of a text whose model has no fixed length
Config = SampleConfig | TrainConfig


@dataclass(frozen=True)
class MemoryPlan:
    """The techniques of a run and its peak in every phase; equal to another one if the techniques are."""

    tables: bool = False  # modulation outputs are computed ahead, and their layers leave the device
    free_text: bool = False  # encoders leave before the transformer comes
    text_on_cpu: bool = False  # encoders run there
    load_on_cpu: bool = False  # the transformer is read, merged and quantised there, and then moved
    checkpointing: int = 0  # so many blocks, from the first, are computed again in the backward pass
    tile: bool = False  # decoding in tiles
    offload: bool = False  # blocks stay in the machine's memory and stream
    quantize: str | None = None  # "fp8"
    phases: Mapping[str, float] = field(default_factory=dict, compare=False)  # bytes at the peak, by name
    parts: Mapping[str, float] = field(default_factory=dict, compare=False)  # bytes of what there is, by name
    tokens: int = field(default=0, compare=False)  # of one example, text and references included
    budget: float = field(default=math.inf, compare=False)  # bytes

    @property
    def peak(self) -> float:
        """The most bytes of any phase."""
        return max(self.phases.values())

    @property
    def techniques(self) -> str:
        """The techniques in words."""
        words = {
            "modulation tables": self.tables,
            "text encoders freed first": self.free_text,
            "text encoders on the CPU": self.text_on_cpu,
            "loading through the CPU": self.load_on_cpu,
            f"{self.checkpointing} blocks computed again": self.checkpointing,
            "tiles": self.tile,
            "offload": self.offload,
            f"{self.quantize} (lossy)": self.quantize,
        }
        return ", ".join(word for word, used in words.items() if used) or "nothing special"

    @property
    def line(self) -> str:
        """Write the plan in a line."""
        used = f"{self.peak / 1e9:.3g} of {self.budget / 1e9:.3g} GB"
        return f"{self.tokens} tokens at once take about {used}, with {self.techniques}"

    def __str__(self) -> str:
        """Write the plan as a table."""
        rows = [*self.parts.items(), *((f"peak of {name}", size) for name, size in self.phases.items())]
        rows.append(("allowed", self.budget))
        sizes = [f"{name:<32}{size / 1e9:>9.3f} GB" for name, size in rows]
        return "\n".join([f"{'tokens':<32}{self.tokens:>9}", *sizes, f"with {self.techniques}"])


@dataclass(frozen=True)
class Work:
    """The largest that a run computes.

    tokens: of one example
    flops: of its cheapest step
    activations: how many blocks are computed again -> bytes
    fixed: bytes of what is trained, with gradients, averages and moments
    steps: whose modulations are computed ahead, for each example
    pixels, encoded: of the largest picture, and of the largest one that is encoded
    loras: bytes of the LoRAs' files, which are merged into the transformer
    """

    tokens: int
    flops: float
    activations: Callable[[int], float]
    fixed: int
    steps: int
    pixels: int
    encoded: int
    loras: int


def plan_for_sampling(plans: Sequence[Any], free: int) -> MemoryPlan:
    """Choose techniques that all requests of a list fit with, as one transformer serves them.

    plans: of one model, each an iclora.plan.Plan
    free: bytes that the device has, unless --vram says it
    Errors: ValueError with what the smallest setting needs, if none fits
    """
    config = replace(plans[0].config, tile=all(plan.config.tile for plan in plans))
    files, works = plans[0].files, []
    flux, dtype = files.flux.config, getattr(torch, config.dtype)
    for plan in plans:
        layout, masked = plan.layout, plan.text_mode == "panel"
        text = (plan.defaults.text_length or SHORT) * (layout.panels if masked else 1)
        tokens = count_tokens(text, layout, plan.config.reference_attention)
        size = forward_bytes(flux, dtype, tokens, masked)
        flops = count_flops(flux, 1, tokens).forward
        pixels, loras = layout.width * layout.height, sum(lora.path.stat().st_size for lora, _ in plan.loras)
        pictures = [
            layout.width * layout.height * bool(plan.kept or plan.drafts),
            *(w * h for w, h in layout.references),
        ]
        works.append((len(tokens), flops, size, plan.config.steps, pixels, max(pictures), loras))
    tokens, flops, sizes, steps, pixels, encoded, loras = zip(*works, strict=True)
    rows = max(max(steps), min(MOST_ROWS, sum(steps)))
    work = Work(max(tokens), min(flops), lambda again: max(sizes), 0, rows, max(pixels), max(encoded), max(loras))
    return plan_memory(config, flux, read_weights(files, dtype), work, free)


def share_plan(plans: Sequence[Any], free: int) -> list[Any]:
    """Give all requests of a list the same techniques; those that change pixels become options, to be recorded.

    Errors: ValueError as plan_for_sampling
    """
    chosen = plan_for_sampling(plans, free)
    configs = [replace(c, tile=c.tile or chosen.tile, quantize=chosen.quantize) for c in (p.config for p in plans)]
    return [replace(plan, memory_plan=chosen, config=config) for plan, config in zip(plans, configs, strict=True)]


def plan_for_training(
    config: TrainConfig, layouts: Collection[Layout], files: ModelFiles, trained: int, share: int, free: int
) -> MemoryPlan:
    """Choose techniques that the largest step of a training fits with.

    config: with all defaults resolved
    layouts: of all batches
    trained: how many values
    share: examples that one process works on at once
    free: bytes that the device has, unless --vram says it
    Errors: ValueError with what the smallest setting needs, if none fits
    """
    flux, dtype = files.flux.config, getattr(torch, config.dtype)
    text = model_defaults(flux).text_length or SHORT
    sizes = sorted((count_tokens(text, layout, config.reference_attention) for layout in layouts), key=len)
    held = partial(step_bytes, flux, dtype, share, sizes[-1], config.targets, config.rank or 0)
    flops = count_flops(flux, share, sizes[0]).step
    pixels = max(w * h for layout in layouts for w, h in ((layout.width, layout.height), *layout.references))
    fixed = trained * (4 * COPIES + dtype.itemsize * (dtype is not torch.float32))  # adapters are cast to the base's
    work = Work(len(sizes[-1]), flops, held, fixed, AHEAD * share * config.accumulate, pixels, pixels, 0)
    return plan_memory(config, flux, read_weights(files, dtype), work, free)


def plan_memory(config: Config, flux: FluxConfig, weights: Weights, work: Work, free: int) -> MemoryPlan:
    """Choose the first setting that fits.

    config: with all defaults resolved
    free: bytes that the device has, unless --vram says it
    Errors: ValueError with what the smallest setting needs, if none fits; or for too many tokens
    """
    check_device(config)
    if work.tokens > MAX_TOKENS:
        raise ValueError(f"{work.tokens} tokens are more than the {MAX_TOKENS} possible ones; use a smaller picture")
    training, device = isinstance(config, TrainConfig), "cuda" if config.vram else config.device
    own = torch.cuda.memory_reserved() if device == "cuda" and not config.vram else 0  # of networks that are there
    budget = (config.vram * 1e9 if config.vram else free + own) * (1 - RESERVE)
    text_on_cpu, best = weights.text * (1 + TEXT_WORK) > budget, None
    for choice in list_settings(config, flux, weights.transformer > BIG, device):
        choice = replace(choice, text_on_cpu=text_on_cpu, budget=budget)
        choice = replace(choice, load_on_cpu=device == "cuda" and load_bytes(choice, work, weights, training) > budget)
        choice = add_phases(choice, work, weights, device, training)
        asked = choice.quantize or config.offload
        if choice.peak <= budget and (asked or copy_seconds(choice, weights, training) <= SLOWER * work.flops / RATE):
            return choice
        best = choice if best is None or choice.peak < best.peak else best
    needed = math.ceil(10 * best.peak / (1 - RESERVE) / 1e9) / 10
    given = f"--vram {config.vram:g}" if config.vram else f"{budget / 1e9:.3g} GB of {device}"
    again = "--checkpointing auto, " if training and not config.checkpointing else ""
    less = f"{again}a larger --accumulate or " if training else "fewer panels or --ref, or "
    raise ValueError(
        f"{given} is too little for {work.tokens} tokens; the smallest setting ({best.techniques}) needs --vram "
        f"{needed:g}; use that much, {less}a smaller --panel-size"
    )


def check_device(config: Config) -> None:
    """Refuse what a device cannot do. Errors: ValueError"""
    if config.device == "mps" and config.quantize:
        raise ValueError(f"--quantize {config.quantize} does not work on mps, which has no float8; leave it out")
    if config.device == "mps" and config.offload:
        raise ValueError("--offload means nothing on mps, whose memory is the CPU's; leave it out")
    if config.compile:
        check_compiler(config.device)


def list_settings(config: Config, flux: FluxConfig, big: bool, device: str) -> Iterator[MemoryPlan]:
    """List settings, the fastest first; see the module. big: whether tables are on in any case"""
    blocks = flux.depth + flux.depth_single_blocks
    again = {"auto": range(blocks + 1), True: [blocks]}.get(getattr(config, "checkpointing", None), [0])
    plain = MemoryPlan(**{k: v for k, v in vars(config).items() if k in ("quantize", "offload", "tile")})
    tables = replace(plain, tables=device != "cpu")  # whose memory has the weights in any case
    full = replace(tables, free_text=True)
    streams = [False, True] if device == "cuda" else [False]
    bases = ([] if device == "cpu" else [tables]) if big else [plain, tables]  # others need the machine's memory too
    bases += [replace(full, offload=full.offload or stream) for stream in streams]
    bases += [replace(base, quantize="fp8") for base in bases[-len(streams) :] if device != "mps"]
    for base in bases:
        tiles = [False, True] if base.free_text and not isinstance(config, TrainConfig) else [False]  # the exact first
        for tile, number in product(tiles, again):
            yield replace(base, tile=base.tile or tile, checkpointing=number)


def load_bytes(choice: MemoryPlan, work: Work, weights: Weights, training: bool) -> float:
    """Give the peak while the transformer is read on the device: whole, or into fp8 block by block."""
    whole = weights.standing(0 if choice.tables else None, fp8=bool(choice.quantize))  # modulations go elsewhere
    whole += weights.block if choice.quantize else work.loras
    return bytes_beside(choice, weights, training) + whole + bool(work.loras) * weights.merged


def bytes_beside(choice: MemoryPlan, weights: Weights, training: bool) -> int:
    """Give the bytes that stand beside the transformer; training has freed all else by then."""
    return 0 if training else weights.autoencoder + weights.text * (not choice.free_text and not choice.text_on_cpu)


def copy_seconds(choice: MemoryPlan, weights: Weights, training: bool) -> float:
    """Give the seconds that the copies of a step take; training needs every block twice."""
    return choice.offload * (1 + training) * (weights.fp8 if choice.quantize else weights.linears) / LINK


def add_phases(choice: MemoryPlan, work: Work, weights: Weights, device: str, training: bool) -> MemoryPlan:
    """Compute the parts and the peak of every phase of a setting."""
    rows, others = work.steps if choice.tables else None, bytes_beside(choice, weights, training)
    standing = weights.standing(rows, choice.offload, choice.quantize == "fp8")
    standing += work.loras * bool(choice.quantize and weights.coded)  # LoRAs stay beside what a file has in fp8
    held, text = work.activations(choice.checkpointing), weights.text * (not choice.text_on_cpu)
    image = 4 * weights.channels  # bytes a pixel of all channels, float32
    step = "a training step" if training else "sampling"
    # training encodes before the transformer comes; in a second picture it is there
    there = weights.autoencoder + text * (not choice.free_text) if training else standing + others
    phases = {
        "text": text * (1 + TEXT_WORK),
        "encoding": there + ENCODE * image * work.encoded,
        "loading": standing + others if choice.load_on_cpu else load_bytes(choice, work, weights, training),
        step: standing + others + work.fixed + held,
    }
    if not training:
        at_once = work.pixels if not choice.tile else min(work.pixels, TILE**2)
        phases["decoding"] = standing + others + DECODE[device] * image * at_once
    parts = {
        "transformer": weights.transformer,
        "of it modulation layers": weights.modulation,
        "of it on the device": standing,
        "text encoders": weights.text,
        "autoencoder": weights.autoencoder,
        "activations": held,
    }
    parts |= {"LoRA, gradients, moments": work.fixed} if training else {}
    return replace(choice, phases=phases, parts=parts, tokens=work.tokens)
