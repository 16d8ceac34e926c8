"""The transformer on frozen features of T5 and CLIP, panels before sets; then guidance distilled into its embedding."""

import contextlib
import hashlib
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn

from model.autoencoder import AutoEncoder
from model.checkpoint import save_safetensors
from model.flux import Flux, FluxConfig
from model.position import grid_ids
from model.text import TextEncoders
from sampling.flow import interpolate
from sampling.latents import pack

from .captions import panel_prompt, reticent, say_domain
from .sets import PlannedSet
from .train_text import CLASSES, facts, wrong_facts
from .training import Stage, Work, run, step_generator
from .world import Panel

CONFIG = FluxConfig(
    in_channels=64, out_channels=64, vec_in_dim=128, context_in_dim=128, hidden_size=256, mlp_hidden=1024, num_heads=8,
    depth=3, depth_single_blocks=6, axes_dim=(4, 14, 14), guidance_embed=True,
)  # fmt: skip
WIDEST = 992  # of a tiny model
PICTURES, CAPTIONS = 16, 256  # encoded at once on a CPU
MORE = 32  # times as many on a GPU
SHORT = 40  # T5 tokens of a single panel's caption
DROPPED = 0.07  # share of the captions replaced by the empty one
READING = 0.2  # weight of the facts beside the velocity
LATE = 0.7  # mean of the times' logits: what a subject is gets settled near noise, where its shape is learned last
GUIDANCE = (1.0, 5.0)  # drawn uniformly; says nothing until it is distilled


def new_config(width: int, guidance: bool) -> FluxConfig:
    """The shape of a transformer of another width, or without a guidance embedding.

    width: of whole heads, and of a tiny model (iclora.config.model_defaults)
    Errors: ValueError for another width
    """
    head = CONFIG.hidden_size // CONFIG.num_heads
    if width % head or not head <= width <= WIDEST:
        near = min(max(head, width // head * head), WIDEST)
        raise ValueError(f"--width {width} is not a multiple of {head} from {head} to {WIDEST}; use for example {near}")
    shape = {"hidden_size": width, "mlp_hidden": 4 * width, "num_heads": width // head, "guidance_embed": guidance}
    return replace(CONFIG, **shape)


def new_flux(config: FluxConfig = CONFIG) -> Flux:
    """Build a transformer with random weights whose blocks start as the identity, as DiT's do."""
    flux = Flux(config)
    for name, p in flux.named_parameters():
        if ".lin." in name or "_mod." in name or "adaLN" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(p)
    return flux


def is_hidden(name: str, p: Tensor) -> bool:
    """Tell the matrices inside the blocks, which Muon trains, from the rest."""
    return p.ndim == 2 and "_blocks." in name and "mod" not in name


@dataclass(frozen=True)
class Data:
    """Latents and encoded captions of every grid, on the device that trains.

    latents: by grid, (N, 16, h, w) float16
    txt: by grid, and of the "empty" caption, T5 features (N, phrasings, T, C) bfloat16
    vec: likewise, CLIP vectors (N, phrasings, V) float32
    facts: by grid, what train_text.facts says of every panel (N, panels, facts) int16
    """

    latents: dict
    txt: dict
    vec: dict
    facts: dict


def of_sets(latents: dict, planned: dict, text: TextEncoders, work: Work) -> Data:
    """The sets that were drawn, of every grid.

    latents: by grid, (N, 16, h, w)
    planned: by grid, the N sets as lab.sets.plan_sets gives them
    """
    captions = {grid: [one.captions for one in of_grid] for grid, of_grid in planned.items()}
    numbered = {
        grid: [[(panel, number) for number, panel in enumerate(one.panels, 1)] for one in of_grid]
        for grid, of_grid in planned.items()
    }
    return new_data(latents, captions, numbered, text, work)


def singles(latents: Tensor, planned: list[PlannedSet], text: TextEncoders, work: Work) -> Data:
    """The panels of 2x2 sets one by one, with captions of their own that are padded to SHORT tokens.

    A panel alone takes 56 tokens where a set takes 128, and shows one more subject, so words get their looks sooner.

    latents: (N, 16, 16, 16) of the sets
    """
    rng = np.random.default_rng([work.seed, 7])
    panels = [(panel, one.domain) for one in planned for panel in one.panels]

    def caption(panel: Panel, domain: str) -> str:
        text = panel_prompt(reticent((panel,), rng)[0], rng)
        return say_domain(text, domain, 1, rng) if domain else text

    captions = [[caption(*panel) for _ in range(2)] for panel in panels]
    cut = rearrange(latents, "N C (rows h) (cols w) -> (N rows cols) C h w", rows=2, cols=2).contiguous()
    numbered = [[(panel, 1)] for panel, _ in panels]
    return new_data({(1, 1): cut}, {(1, 1): captions}, {(1, 1): numbered}, text, work, SHORT)


def new_data(
    latents: dict, captions: dict, numbered: dict, text: TextEncoders, work: Work, length: int | None = None
) -> Data:  # fmt: skip
    """Encode captions, and put all on the work's device.

    numbered: by grid, the panels of every set, each with its number
    length: T5 tokens T; None is the tokenizer's own limit
    """
    for encoder in (text.t5, text.clip):
        encoder.to(work.device)
    encoded = {grid: encode(groups, text, length) for grid, groups in {**captions, "empty": [[""]]}.items()}
    on_device = {grid: z.to(work.device) for grid, z in latents.items()}
    told = {grid: facts_of(groups).to(work.device) for grid, groups in numbered.items()}
    return Data(on_device, *({grid: parts[i] for grid, parts in encoded.items()} for i in (0, 1)), told)


def encode(groups: list, text: TextEncoders, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Encode equally many phrasings of every caption: (N, phrasings, T, C) bfloat16 and (N, phrasings, V).

    length: T5 tokens T; None is the tokenizer's own limit
    """
    every = [caption for group in groups for caption in group]
    batch = CAPTIONS * (1 if text.t5.device.type == "cpu" else MORE)
    parts = [text.encode(every[i : i + batch], length) for i in range(0, len(every), batch)]
    txt = torch.cat([txt.bfloat16() for txt, _ in parts])
    shape = (len(groups), len(groups[0]))
    return txt.unflatten(0, shape), torch.cat([vec for _, vec in parts]).unflatten(0, shape)


def facts_of(groups: list[list[tuple[Panel, int]]]) -> Tensor:
    """What the panels of sets show, each with its number: (N, panels, facts) int16."""
    return torch.tensor([[facts(*numbered) for numbered in group] for group in groups], dtype=torch.int16)


@torch.no_grad()
def prepare_latents(autoencoder: AutoEncoder, pictures: dict, work: Work) -> dict:
    """Encode the pictures of every grid, or load them if this autoencoder has encoded that many before.

    pictures: by grid, (N, 3, h, w) uint8
    Returns by grid (N, 16, h/8, w/8) float16
    """
    weights = b"".join(p.numpy().tobytes() for p in autoencoder.parameters())
    mark = hashlib.sha256(weights + str(work.seed).encode()).hexdigest()
    latents = {}
    autoencoder.to(work.device)
    for (rows, cols), of_grid in pictures.items():
        path = work.folder / f"latents-{rows}x{cols}.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                if file.metadata().get("autoencoder") == mark and len(file.get_slice("z")[:, 0, 0, 0]) == len(of_grid):
                    latents[rows, cols] = file.get_tensor("z")
                    continue
        latents[rows, cols] = encode_pictures(autoencoder, of_grid, work)
        save_safetensors({"z": latents[rows, cols]}, path, {"autoencoder": mark})
    autoencoder.cpu()
    return latents


@torch.no_grad()
def encode_pictures(autoencoder: AutoEncoder, pictures: Tensor, work: Work) -> Tensor:
    """Encode pictures (N, 3, h, w) uint8, several processes with one thread each: (N, 16, h/8, w/8) float16."""
    z = torch.empty(len(pictures), 16, *(side // 8 for side in pictures.shape[2:]), dtype=torch.half)
    batch, processes = PICTURES * (1 if work.device == "cpu" else MORE), work.processes

    def share(number: int) -> None:
        for first in range(number * batch, len(z), processes * batch):
            part = slice(first, first + batch)
            z[part] = autoencoder.encode(pictures[part].to(work.device).float() / 127.5 - 1)

    if processes > 1:
        torch.set_num_threads(1)
        z.share_memory_()
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=share, args=(number,)) for number in range(1, processes)]
    for other in others:
        other.start()
    share(0)
    for other in others:
        other.join()
    if any(other.exitcode for other in others):
        raise ValueError("a process that encoded pictures ended before its work was done; start again")
    return z


def compile_blocks(flux: Flux, grid: tuple[int, int]) -> Callable:
    """Compile the blocks for the shapes of one grid; gives a context manager under which that grid is to be run.

    Other grids run as written: each shape costs a minute or two of compilation.
    """
    for block in (*flux.double_blocks, *flux.single_blocks):
        block.compile(dynamic=False)
    return lambda now: contextlib.nullcontext() if now == grid else torch.compiler.set_stance("force_eager")


def keep_wide(flux: Flux) -> None:
    """Let the residual stream be float32 under autocast, whose Linears give bfloat16.

    A block adds to its stream by torch.addcmul(x, gate, y), which gives the widest type of the three: a stream that
    begins as float32 stays so, to the last layer, and its norms are float32 too. So it is widened where it begins.
    """
    for layer in (flux.img_in, flux.txt_in):
        layer.register_forward_hook(lambda layer, args, out: out.float())


def batch_of(data: Data, grid: tuple[int, int], count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Draw sets of one grid, a phrasing for each, and leave out some captions.

    generator: of the device that the data are on
    Returns latents (B, 16, h, w), txt (B, T, C) and vec (B, V), float32, and the facts of tokens (B, I, facts)
    """
    z, vec = data.latents[grid], data.vec[grid]
    random = {"generator": generator, "device": z.device}
    chosen = torch.randint(len(z), (count,), **random)
    phrasing = torch.randint(vec.shape[1], (count,), **random)
    dropped = torch.rand(count, **random) < DROPPED
    vec = data.vec["empty"][0].where(dropped[:, None], vec[chosen, phrasing])
    txt = data.txt["empty"][0].where(dropped[:, None, None], data.txt[grid][chosen, phrasing])
    rows, cols = (torch.arange(4 * side, device=z.device) // 4 for side in grid)
    panel = (rows[:, None] * grid[1] + cols).flatten()  # of each token, from 0
    return z[chosen].float(), txt.float(), vec, data.facts[grid][chosen][:, panel].long()


def noised(z: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pack latents and move them towards noise, to logit-normal times about LATE.

    z: (B, 16, h, w)
    Returns the points (B, I, 64), the velocities there (B, I, 64), and the times (B)
    Source: arXiv:2403.03206 (logit-normal times)
    """
    data = pack(z)
    noise = torch.randn(data.shape, generator=generator, device=z.device).to(z)
    t = torch.sigmoid(LATE + torch.randn(len(z), generator=generator, device=z.device)).to(z)
    return interpolate(data, noise, t[:, None, None]), noise - data, t


def velocity(flux: Flux, x: Tensor, t: Tensor, txt: Tensor, vec: Tensor, guidance: Tensor, grid: tuple) -> Tensor:
    """Run the transformer on a batch of one grid of 64-pixel panels."""
    ids = grid_ids(4 * grid[0], 4 * grid[1]).to(x).expand(len(x), -1, -1)
    return flux(x, ids, txt, ids.new_zeros(len(x), txt.shape[1], 3), t, vec, guidance)


def train(
    stage: Stage, flux: Flux, data: Data, often: dict, work: Work, teacher: Flux | None = None, fast: bool = False
) -> Flux:
    """Train the transformer on data, or on the guided velocity of a teacher; gives the averaged weights.

    Beside the velocity, a linear layer reads the facts of its panel off every image token behind the double blocks,
    and is thrown away afterwards: to tell them, a token must find its panel's words. That shortens the long time in
    which scenes are right and subjects are blobs.

    A teacher's velocity with the caption is moved away from the one without, by a factor drawn from 1..5 that the
    student reads off its guidance embedding: one pass then costs what two did, as in FLUX.1-dev.

    often: by grid, how often it is drawn
    fast: compile the blocks for the grid that is drawn most often; needs a C++ compiler on the CPU
    Source: arXiv:2210.03142 (distillation of guided diffusion, its first stage)
    """
    for one in (flux, teacher):
        if one is not None:
            keep_wide(one.to(work.device))
    grids = list(data.latents)
    chances = torch.tensor([often[grid] for grid in grids])
    stance = compile_blocks(flux, max(often, key=often.get)) if fast else contextlib.nullcontext
    module = nn.ModuleDict({"flux": flux, "head": nn.Linear(flux.config.hidden_size, sum(CLASSES))}).to(work.device)
    reading = READING if teacher is None else 0.0  # what has been learned need not be read again by a new layer
    tap = {}
    flux.double_blocks[-1].register_forward_hook(lambda block, args, out: tap.update(img=out[0]))

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        # Drawn apart, so that every process works on the same grid.
        grid = grids[int(torch.multinomial(chances, 1, generator=step_generator(work.seed + 1, step)))]
        count = batch_size(stage.batch, data.latents[grid], data.txt[grid].shape[-2])
        z, txt, vec, told = batch_of(data, grid, count, generator)
        x, target, t = noised(z, generator)
        guidance = torch.empty_like(t).uniform_(*GUIDANCE, generator=generator)
        if teacher is not None:
            target = guided(teacher, x, t, txt, vec, guidance, data, grid)
        with stance(grid):
            error = (velocity(flux, x, t, txt, vec, guidance, grid) - target).square().mean()
        wrong = wrong_facts(module["head"](tap["img"]), told)
        losses = {"loss": error + reading * wrong.mean(), "velocity": error.detach(), "facts": wrong.mean().detach()}
        if grid == (2, 2):
            losses["2x2"] = error.detach()
        return losses

    average = run(stage, module, loss_at, work, is_hidden, processes=work.processes)["flux"]
    for part in average.modules():
        part._forward_hooks.clear()  # the copy has the hooks too
    for block in (*average.double_blocks, *average.single_blocks):
        block._compiled_call_impl = None  # the compiler must not run in processes forked after it did: they hang
    return average


@torch.no_grad()
def guided(
    teacher: Flux, x: Tensor, t: Tensor, txt: Tensor, vec: Tensor, guidance: Tensor, data: Data, grid: tuple
) -> Tensor:
    """The classifier-free guided velocity of a model: without the caption, plus `guidance` times the difference.

    Source: arXiv:2207.12598
    """
    told = velocity(teacher, x, t, txt, vec, guidance, grid)
    nothing = data.txt["empty"][0].to(txt).expand_as(txt), data.vec["empty"][0].to(vec).expand_as(vec)
    untold = velocity(teacher, x, t, *nothing, guidance, grid)
    return untold + guidance[:, None, None] * (told - untold)


def batch_size(base: int, z: Tensor, text: int) -> int:
    """Sets in a batch of this grid, so that every batch has about the tokens of `base` 2x2 sets."""
    tokens = z.shape[2] * z.shape[3] // 4
    return round(base * (64 + text) / (tokens + text))
