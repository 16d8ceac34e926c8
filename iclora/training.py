"""From a configuration to a training: its plan and start, a step's noise and times, the loss; train.py runs them.

Letters: B batch, I image tokens, R reference tokens, T text tokens, C and V their widths; h, w latent cells.

Every random number of a step is drawn for the whole batch from a generator seeded by (seed, step), and each process
takes its share: a run gives the same on one process as on several, and goes on after a kill without generator state.
"""

import functools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.flux import Flux
from model.lora import attach, load_lora, refuse_unnamed, trainable
from model.lora_formats import LoraFile, read_lora
from model.position import grid_ids
from model.weights import ModelFiles, find_model, load_flux
from sampling.flow import interpolate, time_stretch
from sampling.latents import pack

from .buckets import parse_sides
from .checkpoint import RESULT, State, as_begun, claim, load_checkpoint, new_state, refuse_other_run, train_command
from .config import IN_CONTEXT, UNO, ModelDefaults, TrainConfig, model_defaults, resolve_training_defaults
from .data import Example, bucket, load
from .fitted import load_fitted, prepare
from .layout import Layout, parse_grid
from .loader import Batch, Loader, fingerprints
from .memory import check_training_memory
from .plan import MODES, note_other_modes, pick_device
from .processes import join_processes, meet
from .prompts import clean
from .records import Note
from .references import follow_loras

GUIDANCE = 1.0  # the guidance embedding that LoRAs of FLUX.1-dev are trained at
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
DIALECTS = {IN_CONTEXT: "diffusers", UNO: "xlabs"}  # of the LoRA file, by method; the latter is the release's


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that is settled before a network loads.

    config: with all defaults resolved
    fingerprint: of what is learnt from, see iclora.loader.fingerprints
    train_on: the command that trains on from the run's LoRA, in a run of its own
    checkpoint: what the run goes on from; None where it begins
    memory_plan: from check_training_memory
    """

    config: TrainConfig
    files: ModelFiles
    defaults: ModelDefaults
    init_lora: LoraFile | None
    examples: Sequence[Example]
    fingerprint: dict[str, str]
    train_on: str
    checkpoint: Path | None
    memory_plan: object


def plan_training(config: TrainConfig, world_size: int, note: Note) -> TrainingPlan:
    """Decide what was left open, read the data, and refuse whatever cannot work.

    Errors: ValueError in one line
    """
    command, files = train_command(config), find_model(config.model)
    defaults = model_defaults(files.flux.config)
    init_lora = read_lora(config.init_lora) if config.init_lora else None
    if config.method == UNO and init_lora:
        config = follow_loras(config, [init_lora])
    config = replace(config, sample_prompt=tuple(map(clean, config.sample_prompt)))
    config, begun = as_begun(config, note)
    config = resolve_training_defaults(config, defaults, pick_device(config.device, defaults, note))
    micro_batches(config.batch, 0, world_size, config.accumulate)  # refuses a batch that cannot be shared
    if config.tensorboard:
        board_writer()  # refuses what is not installed
    with torch.device("meta"):
        flux = Flux(files.flux.config)
    add_adapters(flux, config, init_lora)  # refuses unknown targets, and a wrong --init-lora
    sizes = parse_sides(config.composite_size) or config.panel_size
    examples = load(config.data, config.grid and parse_grid(config.grid), note, config.method)
    count = sum(p.numel() for p in trainable(flux))
    layouts = bucket(examples, sizes, defaults.long_sides(config.ref_size))
    plan = check_training_memory(config, layouts, files, count, world_size)
    config = replace(config, quantize=plan.quantize) if plan else config  # fp8 may be what makes it fit; recorded
    fingerprint = fingerprints(examples, files, init_lora)
    refuse_other_run(begun, config, fingerprint, command, new_state(trainable(flux)))
    return TrainingPlan(config, files, defaults, init_lora, examples, fingerprint, command, begun, plan)


def board_writer() -> type:
    """Find the class that writes events for TensorBoard, which is no requirement of ours.

    Errors: ValueError if it is not installed
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        advice = "pip install tensorboard, or leave it out: metrics.jsonl and loss.png tell the same"
        raise ValueError(f"--tensorboard needs a package that is not installed; {advice}") from None
    return SummaryWriter


def start_training(plan: TrainingPlan, rank: int, world_size: int, note: Note) -> tuple[Loader, Flux, State]:
    """Encode the data and load the transformer with what is trained, new or from the run's checkpoint."""
    config = plan.config
    if world_size > 1:
        join_processes(config.device, "nccl" if config.device == "cuda" else "gloo")
    path = claim(Path(config.out), plan.checkpoint, rank)
    if rank > 0:
        meet(world_size)  # the first process encodes alone, and the others find its cache
    loader = Loader(config, plan.examples, plan.files)
    on_cpu = plan.memory_plan and plan.memory_plan.text_on_cpu
    loader.encode(note, config.sample_prompt, "cpu" if on_cpu else config.device)
    if rank == 0:
        meet(world_size)
    if plan.memory_plan:
        flux = load_fitted(plan.files.flux, config, plan.memory_plan, (), note)
    else:
        flux = load_flux(plan.files.flux, config.device, getattr(torch, config.dtype))
    report = add_adapters(flux, config, plan.init_lora)
    if plan.memory_plan:
        prepare(flux, config, plan.memory_plan, note)
    if config.checkpointing:
        checkpoint_blocks(flux, plan.memory_plan and plan.memory_plan.checkpointing)
    state = new_state(trainable(flux), config.eps)
    if plan.checkpoint:
        load_checkpoint(path, state, note)
        further = f"to train on from it: {plan.train_on}" if config.decay else "a larger --steps goes on from it"
        report = f"going on from step {state.step}" if state.step < config.steps else f"this run is finished; {further}"
    note(report)
    note_doubts(plan, loader.layouts, note)
    return loader, flux, state


def try_command(config: TrainConfig, layout: Layout) -> str:
    """Say where the LoRA is, and how to try it. layout: of the first sets"""
    path, kept = Path(config.out) / RESULT, " --mask 2 --panels PICTURES" if config.condition == "clean" else ""
    more = "--ref PICTURE" if config.method == UNO else f"--grid {layout.rows}x{layout.cols}{kept}"
    return f"wrote {path}; try it with `python sample.py --lora {shlex.quote(str(path))} {more} --prompt TEXT`"


def add_adapters(flux: Flux, config: TrainConfig, init_lora: LoraFile | None) -> str:
    """Attach the adapters that are trained: those of --init-lora, else fresh ones.

    Returns a line about them
    Errors: ValueError for targets that mean nothing here or cannot be saved, or a file that is no LoRA for this model
    """
    if init_lora:
        report = load_lora(flux, init_lora, train=True)
        report = f"starting from {report}; --rank, --targets and --lora-init are those of the file"
    else:
        generator = torch.Generator("cpu").manual_seed(config.seed)
        attach(flux, config.targets, config.rank, generator=generator, init=config.lora_init)
        report = f"training {sum(p.numel() for p in trainable(flux)):,} parameters of rank {config.rank}"
    try:
        refuse_unnamed(flux, DIALECTS[config.method])
    except ValueError as error:
        line = str(error).partition(";")[0]
        raise ValueError(f"{line}, so the release's names cannot hold it; use --targets uno, or another file") from None
    return report


def checkpoint_blocks(flux: Flux, count: int | None = None) -> None:
    """Recompute the first blocks, or all, in the backward pass instead of keeping what they computed."""
    for block in [*flux.double_blocks, *flux.single_blocks][:count]:
        # there is no dropout, whose draws would have to be repeated
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def note_doubts(plan: TrainingPlan, layouts: Sequence[Layout], note: Note) -> None:
    """Note what is possible, but seldom meant."""
    config = plan.config
    most = max(len(layout.references) for layout in layouts)
    if config.stage == 1 and most > 1:
        note(f"rows of --data have up to {most} references; the paper's stage 1 has one, several are for --stage 2")
    if config.stage == 2 and most < 2:
        note("every row of --data has one reference; the paper's stage 2 has several")
    if config.stage == 2 and not config.init_lora:
        note("stage 2 starts cold; the paper starts it from the LoRA of stage 1, which goes to --init-lora")
    if config.composite_size and plan.defaults.name == "tiny":
        note(f"{plan.files.name} knows panels of {plan.defaults.panel} pixels; what it learns of other sizes is bad")
    if config.method == IN_CONTEXT and plan.init_lora:
        note_other_modes([plan.init_lora], {name: getattr(config, name) for name in MODES}, note)


# noise, times and the learning rate


@dataclass(frozen=True)
class StepNoise:
    """The random part of one batch.

    noise: (B, I, 64), t: (B,)
    kept: the panels that each example keeps clean, from 1; none of them unless the run is conditional
    dropped: which captions are left out
    ref_noise: (B, R, 64) of the references' posterior; None takes its mean
    z_noise: (B, 16, h, w) of the posterior of the latents that are learnt; None takes its mean
    """

    noise: Tensor
    t: Tensor
    kept: list[tuple[int, ...]]
    dropped: list[bool]
    ref_noise: Tensor | None
    z_noise: Tensor | None

    def __getitem__(self, share: slice) -> "StepNoise":
        return StepNoise(*(value if value is None else value[share] for value in vars(self).values()))


def sample_step(config: TrainConfig, step: int, count: int, layout: Layout) -> StepNoise:
    """Draw everything random of a step, for all processes. count: examples in the batch"""
    generator = torch.Generator("cpu").manual_seed((config.seed * 1_000_003 + step) % 2**63)
    t = sample_times(config.times, count, layout.image_tokens, generator)
    dropped = (torch.rand(count, generator=generator) < config.dropout).tolist()
    kept = [sample_kept(layout.panels, generator) if config.condition == "clean" else () for _ in range(count)]
    noise, ref_noise, z_noise = torch.randn(count, layout.image_tokens, 64, generator=generator), None, None
    if layout.references and config.posterior == "sample":
        ref_noise = torch.randn(count, layout.reference_tokens, 64, generator=generator)
    if config.target_posterior == "sample":
        z_noise = torch.randn(count, 16, 2 * layout.tokens_high, 2 * layout.tokens_wide, generator=generator)
    return StepNoise(noise, t, kept, dropped, ref_noise, z_noise)


def sample_times(kind: str, count: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Draw times: (count,) in 0..1.

    kind: logit-normal, uniform, or shifted, which is uniform and moved towards noise as in sampling
    Source: arXiv:2403.03206 (logit-normal); bytedance/UNO@d305981 train.py (shifted)
    """
    if kind == "logit-normal":
        return torch.sigmoid(torch.randn(count, generator=generator))
    t = torch.rand(count, generator=generator)
    stretch = time_stretch(tokens) if kind == "shifted" else 1.0
    return stretch * t / (1 + (stretch - 1) * t)


def sample_kept(panels: int, generator: torch.Generator) -> tuple[int, ...]:
    """Draw which panels stay clean: any number of them but all, and any of them; from 1."""
    number = int(torch.randint(0, panels, (1,), generator=generator))
    return tuple(sorted((torch.randperm(panels, generator=generator)[:number] + 1).tolist()))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate: linear warm-up, then constant, then in a straight line to 0 behind the last step."""
    left = (config.steps - step) / (config.decay * config.steps) if config.decay else 1.0
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup), left)


# the loss


def flow_loss(flux: Flux, batch: Batch, noise: Tensor, t: Tensor) -> Tensor:
    """Measure the squared error of the velocity; known panels and references stand clean in the input, as in sampling.

    noise: (B, I, 64), t: (B,)
    Returns (B,) its mean over the generated tokens of each example, float32
    """
    data = pack(batch.z)
    x = interpolate(data, noise, t[:, None, None])
    if batch.known is not None:
        x = x.where(batch.generate_mask, pack(batch.known))
    count, text_length = batch.txt.shape[:2]
    ids = grid_ids(batch.z.shape[2] // 2, batch.z.shape[3] // 2).to(x.device) if batch.ids is None else batch.ids
    ids = ids.expand(count, -1, -1)  # (B, I + R, 3)
    txt_ids = torch.zeros(count, text_length, 3, device=x.device)
    guidance = torch.full((count,), GUIDANCE, device=x.device) if flux.config.guidance_embed else None
    context = batch.attention_mask, batch.references, batch.isolate_refs
    v = flux(x, ids, batch.txt, txt_ids, t, batch.vec, guidance, *context)
    error = (v.float() - (noise - data)).square().mean(dim=-1)  # (B, I)
    if batch.generate_mask is None:
        return error.mean(dim=1)
    weight = batch.generate_mask[..., 0].float()
    return (error * weight).sum(dim=1) / weight.sum(dim=1)


@torch.no_grad()
def validation_loss(flux: Flux, loader: Loader, condition: str, device: torch.device) -> float:
    """The loss on held-out examples at fixed times, noise and kept panels; unlike that of training it can be compared.

    References and latents are the mean of their posterior.

    condition: "clean" keeps panels as training does
    """
    losses = []
    for number, (layout, examples) in enumerate(loader.held_out):
        generator = torch.Generator("cpu").manual_seed(number)
        for example, t in product(examples, VALIDATION_TIMES):
            kept = sample_kept(layout.panels, generator) if condition == "clean" else ()
            batch = loader.collate(layout, [example], [kept], [False]).to(device)
            noise = torch.randn(1, layout.image_tokens, 64, generator=generator).to(device)
            losses.append(flow_loss(flux, batch, noise, torch.full((1,), t, device=device)))
    return float(torch.cat(losses).mean())


def micro_batches(count: int, rank: int, world_size: int, accumulate: int) -> list[slice]:
    """Cut one process's share of a batch into the parts that are worked through one after the other.

    rank, world_size: of this process among those that share every batch
    Errors: ValueError if the batch cannot be cut evenly
    """
    if count % (world_size * accumulate):
        raise ValueError(
            f"a batch of {count} cannot be cut for {world_size} processes and --accumulate {accumulate}; "
            f"use a --batch that is a multiple of {world_size * accumulate}"
        )
    size = count // (world_size * accumulate)
    first = rank * size * accumulate
    return [slice(start, start + size) for start in range(first, first + size * accumulate, size)]
