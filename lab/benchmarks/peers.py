"""The same transformer three times: this project's, the official one and diffusers', with the same weights.

All three read the same memory. The official names are ours, and diffusers' tensors are rows of the fused ones, so only
its last modulation, whose halves are exchanged, is a copy. Peers are imported where they are needed, as nobody else has
them.
Letters: B batch, I image tokens, T text tokens, C and V widths of the text features.
"""

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from iclora.loader import Batch
from iclora.training import flow_loss
from model import lora
from model.flux import Flux, FluxConfig
from model.lora_formats import names_in, slice_of, swap, template
from model.position import grid_ids, reference_ids
from model.weights import load_flux, open_checkpoint

TINY = Path(__file__).parents[2] / "weights" / "tiny" / "flux1-tiny.safetensors"

# The norms of queries and keys, which are no Linears: the released name -> diffusers'
NORMS = {
    "double_blocks.{}.img_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_q",
    "double_blocks.{}.img_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_k",
    "double_blocks.{}.txt_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_added_q",
    "double_blocks.{}.txt_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_added_k",
    "single_blocks.{}.norm.query_norm": "single_transformer_blocks.{}.attn.norm_q",
    "single_blocks.{}.norm.key_norm": "single_transformer_blocks.{}.attn.norm_k",
}


@dataclass(frozen=True)
class Shape:
    """A size to measure at; side of the image and length of the text in tokens."""

    config: FluxConfig | None  # None is the tiny model, with its own weights
    side: int
    text: int
    forward_batch: int
    train_batch: int

    def read_config(self) -> FluxConfig:
        return self.config or open_checkpoint(TINY, "transformer").config


def flux_config(hidden: int, heads: int, double: int, single: int, context: int, vec: int) -> FluxConfig:
    head = hidden // heads
    return FluxConfig(
        in_channels=64, out_channels=64, vec_in_dim=vec, context_in_dim=context, hidden_size=hidden,
        mlp_hidden=4 * hidden, num_heads=heads, depth=double, depth_single_blocks=single,
        axes_dim=(head // 8, head * 7 // 16, head * 7 // 16), guidance_embed=True,
    )  # fmt: skip


SHAPES = {
    "tiny": Shape(None, 8, 80, forward_batch=1, train_batch=8),
    "small": Shape(flux_config(512, 8, 4, 8, 512, 256), 16, 64, forward_batch=1, train_batch=1),
    "dev": Shape(flux_config(3072, 24, 19, 38, 4096, 768), 32, 512, forward_batch=1, train_batch=4),
}


# weights


def new_flux(shape: Shape, device: torch.device, dtype: torch.dtype) -> Flux:
    """Make this project's transformer, frozen: the tiny one, or one with random weights of a sensible size."""
    if shape.config is None:
        return load_flux(TINY, device, dtype)
    fast = torch.device("cuda") if torch.cuda.is_available() else device  # 12 billion draws of a CPU take an hour
    generator = torch.Generator(fast).manual_seed(0)
    with torch.device("meta"):
        flux = Flux(shape.config)
    state = {}
    for name, p in flux.named_parameters():
        drawn = torch.empty(p.shape, dtype=dtype, device=fast).normal_(generator=generator)
        if p.ndim == 2:
            drawn *= p.shape[1] ** -0.5
        else:
            drawn = 0.1 * drawn + name.endswith(".scale")
        state[name] = drawn.to(device)
    flux.load_state_dict(state, assign=True)
    return flux.requires_grad_(False).eval()


def diffusers_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give a transformer's tensors their names in diffusers; fused projections are cut, in place.

    Errors: ValueError for a name that is not of FLUX.1
    """
    renamed = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        pattern, number = template(module)
        if kind == "scale" and pattern in NORMS:
            renamed[NORMS[pattern].format(number) + ".weight"] = tensor
            continue
        theirs = names_in("diffusers", module)
        if kind not in ("weight", "bias") or not theirs:
            raise ValueError(f"{name} has no name in diffusers; pass the state_dict of a FLUX.1 transformer")
        for other, part in theirs:
            rows = tensor[slice_of(part, tuple(state[module + ".weight"].shape))]
            renamed[f"{other.removeprefix('transformer.')}.{kind}"] = swap(rows) if part == "swapped" else rows
    return renamed


# peers


def package(name: str) -> str:
    """Give a peer's name and version. Errors: ValueError if it is not installed"""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        raise ValueError(
            f"{name} is not installed; run pip install -r lab/benchmarks/requirements.txt, or choose --peers without it"
        ) from None


class Peer(nn.Module):
    """A transformer that stands in for ours: it has our forward, and runs what the official one has of it."""

    def forward(
        self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None, mask=None, references=None, isolate_refs=False
    ) -> Tensor:  # fmt: skip
        if mask is not None or isolate_refs:
            raise ValueError("peers know no masks; measure joint text, and references that all tokens see")
        tokens = img if references is None else torch.cat((img, references), dim=1)
        return self.run(tokens, img_ids, txt, txt_ids, timesteps, y, guidance)[:, : img.shape[1]]


class Official(Peer):
    """black-forest-labs' transformer, which wants everything in one dtype."""

    def __init__(self, config: FluxConfig, state: dict[str, Tensor]):
        super().__init__()
        official = importlib.import_module("fluxbfl.model")
        self.config, self.dtype = config, state["img_in.weight"].dtype
        with torch.device("meta"):
            self.model = official.Flux(
                official.FluxParams(
                    in_channels=config.in_channels, out_channels=config.out_channels, vec_in_dim=config.vec_in_dim,
                    context_in_dim=config.context_in_dim, hidden_size=config.hidden_size,
                    mlp_ratio=config.mlp_hidden / config.hidden_size, num_heads=config.num_heads, depth=config.depth,
                    depth_single_blocks=config.depth_single_blocks, axes_dim=list(config.axes_dim),
                    theta=config.theta, qkv_bias=True, guidance_embed=config.guidance_embed,
                )
            )  # fmt: skip
        self.model.load_state_dict(state, assign=True)
        self.requires_grad_(False).eval()

    def run(self, img, img_ids, txt, txt_ids, timesteps, y, guidance) -> Tensor:
        img, txt, timesteps, y = (x.to(self.dtype) for x in (img, txt, timesteps, y))
        guidance = None if guidance is None else guidance.to(self.dtype)
        return self.model(img, img_ids, txt, txt_ids, timesteps, y, guidance)


class Diffusers(Peer):
    """diffusers' transformer.

    autocast: compute under torch.autocast, as its training scripts do, whose adapters are float32
    """

    def __init__(self, config: FluxConfig, state: dict[str, Tensor], autocast: bool = False):
        super().__init__()
        diffusers = importlib.import_module("diffusers")
        self.config, self.dtype, self.autocast = config, state["img_in.weight"].dtype, autocast
        with torch.device("meta"):
            self.transformer = diffusers.FluxTransformer2DModel(
                in_channels=config.in_channels, out_channels=config.out_channels, num_layers=config.depth,
                num_single_layers=config.depth_single_blocks, num_attention_heads=config.num_heads,
                attention_head_dim=config.hidden_size // config.num_heads, joint_attention_dim=config.context_in_dim,
                pooled_projection_dim=config.vec_in_dim, guidance_embeds=config.guidance_embed,
                axes_dims_rope=tuple(config.axes_dim),
            )  # fmt: skip
        self.transformer.load_state_dict(diffusers_state(state), assign=True)
        self.requires_grad_(False).eval()

    def compile_blocks(self) -> None:
        """Have the blocks compiled in diffusers' own way."""
        self.transformer.compile_repeated_blocks(fullgraph=True)

    def run(self, img, img_ids, txt, txt_ids, timesteps, y, guidance) -> Tensor:
        with torch.autocast(img.device.type, self.dtype) if self.autocast else contextlib.nullcontext():
            return self.transformer(
                hidden_states=img.to(self.dtype), encoder_hidden_states=txt.to(self.dtype),
                pooled_projections=y.to(self.dtype), timestep=timesteps, img_ids=img_ids[0], txt_ids=txt_ids[0],
                guidance=guidance, return_dict=False,
            )[0]  # fmt: skip


# adapters


def attach(flux: Flux, rank: int, targets: str = "all-linear") -> list[nn.Parameter]:
    """Attach adapters, and give them a say: to all Linears of the blocks, as the published In-Context LoRAs have."""
    generator = torch.Generator().manual_seed(1)
    parameters = lora.attach(flux, targets, rank, generator=generator)
    with torch.no_grad():
        for p in parameters[1::2]:  # the ups, which start at zero
            p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    return parameters


def adapters_by_diffusers_name(flux: Flux) -> dict[str, lora.Adapter]:
    """Name every adapter by the Linear of diffusers that it stands beside.

    Errors: ValueError for an adapter of rows that diffusers has no Linear for
    """
    adapters = {}
    for module, layer in lora.layers(flux).items():
        shape = tuple(layer.weight.shape)
        names = {
            (s.start, s.stop): name for name, part in names_in("diffusers", module) for s in [slice_of(part, shape)]
        }
        for adapter in layer.adapters:
            start, stop = adapter.rows.start, adapter.rows.stop
            if (start, stop) not in names:
                raise ValueError(f"diffusers has no Linear for rows {start} to {stop} of {module}")
            adapters[names[start, stop].removeprefix("transformer.")] = adapter
    return adapters


def attach_peft(model: Diffusers, flux: Flux, dtype: torch.dtype) -> list[nn.Parameter]:
    """Attach the adapters of flux to diffusers' transformer through PEFT, with copies of their weights.

    dtype: of the copies
    Returns their parameters, in the order of ours
    """
    peft = importlib.import_module("peft")
    adapters = adapters_by_diffusers_name(flux)
    rank = len(next(iter(adapters.values())).down)
    model.transformer.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(adapters)))
    copies = []
    for name, adapter in adapters.items():
        layer = model.transformer.get_submodule(name)
        for ours, theirs in ((adapter.down, layer.lora_A["default"]), (adapter.up, layer.lora_B["default"])):
            theirs.weight = nn.Parameter(ours.detach().to(dtype, copy=True))
            copies.append(theirs.weight)
    return copies


# what is measured


def new_inputs(config: FluxConfig, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw the arguments of one forward; time and guidance are such that all implementations round them alike."""
    generator, batch = torch.Generator().manual_seed(2), shape.forward_batch

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    return {
        "img": drawn(batch, shape.side**2, config.in_channels),
        "img_ids": grid_ids(shape.side, shape.side).to(device).expand(batch, -1, -1),
        "txt": drawn(batch, shape.text, config.context_in_dim),
        "txt_ids": torch.zeros(batch, shape.text, 3, device=device),
        "timesteps": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "y": drawn(batch, config.vec_in_dim),
        "guidance": torch.full((batch,), 3.5, device=device, dtype=dtype),
    }


def new_batch(
    config: FluxConfig, shape: Shape, device: torch.device, dtype: torch.dtype, reference: int = 0
) -> tuple[Batch, Tensor, Tensor]:
    """Draw the arguments of one training step: encoded sets, noise (B, I, 64) and times (B,).

    reference: side of one beside each example, in tokens
    """
    generator, batch = torch.Generator().manual_seed(3), shape.train_batch
    z = torch.randn(batch, 16, 2 * shape.side, 2 * shape.side, generator=generator)
    txt = torch.randn(batch, shape.text, config.context_in_dim, generator=generator)
    vec = torch.randn(batch, config.vec_in_dim, generator=generator)
    noise = torch.randn(batch, shape.side**2, 64, generator=generator)
    t = torch.linspace(0.25, 0.75, batch + 2)[1:-1]
    given = Batch(z.to(device), txt.to(device, dtype), vec.to(device, dtype))
    if reference:
        side, refs = (shape.side, shape.side), torch.randn(batch, reference**2, 64, generator=generator)
        ids = torch.cat((grid_ids(*side), *reference_ids(side, [(reference, reference)])))[None]
        given = replace(given, references=refs.to(device), ids=ids.to(device))
    return given, noise.to(device), t.to(device)


class Training:
    """One implementation in training: the loss is this project's for all, and so is what follows it.

    flux: anything with the forward of model.flux.Flux
    given: from new_batch
    """

    def __init__(self, flux: nn.Module, parameters: list[nn.Parameter], given: tuple[Batch, Tensor, Tensor]):
        self.flux, self.parameters, self.given = flux, parameters, given
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)

    def gradient(self) -> Tensor:
        """Give all gradients behind each other, in float32."""
        flow_loss(self.flux, *self.given).mean().backward()
        flat = torch.cat([p.grad.reshape(-1).float() for p in self.parameters])
        self.optimizer.zero_grad(set_to_none=True)
        return flat

    def step(self) -> None:
        """Loss, gradient, clipping, AdamW."""
        flow_loss(self.flux, *self.given).mean().backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def standing(self) -> list[Tensor]:
        """List what is held between steps."""
        states = self.optimizer.state.values()
        return [*self.flux.parameters(), *(value for state in states for value in state.values())]


def far(a: Tensor, b: Tensor) -> float:
    """The distance of a from b, relative to the length of b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


Build = Callable[[FluxConfig, dict[str, Tensor]], Peer]
PEERS: dict[str, tuple[str, Build]] = {"official": ("fluxbfl", Official), "diffusers": ("diffusers", Diffusers)}
