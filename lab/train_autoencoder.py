"""The autoencoder, on panels, on crops across panel borders and on whole composites; at last its decoder alone."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.autoencoder import AutoEncoder, AutoEncoderConfig

from .training import Clock, Stage, Work, run

# GroupNorm has 32 groups, so 32 channels would be normalised one by one and lose the picture's tint: measured, 16 dB.
CONFIG = AutoEncoderConfig(ch=64, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
SMALL = 32  # pixels of a crop at first, where a stage has small ones
LARGE = 64
KL = 2e-4  # weight of the divergence from a unit Gaussian, a mean over latent values
NOISE = 0.5  # most noise on latents, in their own deviations; without it the posterior's is 0.01, and all must be exact


def batch_of(pool: Tensor, count: int, step: int, small: bool, generator: torch.Generator) -> Tensor:
    """Draw a batch from random 2x2 composites: small crops, or large ones and now and then the whole.

    Three quarters of the small crops lie where subjects stand, because scenes are learned long before them. Half of
    the large crops are whole panels; the rest cross the borders. Some panels are filled with 0, as the masked ones
    are when the kept panels of a set are encoded.

    pool: (N, 3, 64, 64) uint8 panels, on the generator's device
    count: of large crops; a batch has four times as many small ones, or a quarter as many composites
    Returns (B, 3, h, w) float32 in -1..1
    """
    random = {"generator": generator, "device": pool.device}
    whole = step % 8 == 7 and not small
    count = 4 * count if small else max(1, count // 4) if whole else count
    panels = pool[torch.randint(len(pool), (count, 4), **random)].float() / 127.5 - 1
    panels = panels * (torch.rand(count, 4, 1, 1, 1, **random) > 0.1)
    top, bottom = torch.cat((panels[:, 0], panels[:, 1]), -1), torch.cat((panels[:, 2], panels[:, 3]), -1)
    composite = torch.cat((top, bottom), -2)  # (B, 3, 128, 128)
    if whole:
        return composite
    side = SMALL if small else LARGE
    corners = torch.randint(0, composite.shape[-1] - side + 1, (count, 2), **random)
    if small:
        low = torch.randint(12, 33, (3 * count // 4,), **random)
        corners[: len(low), 0] = low + LARGE * torch.randint(2, low.shape, **random)
    else:
        corners[: count // 2] = 0
    y, x = (corners[:, :, None] + torch.arange(side, device=pool.device)).unbind(1)  # each (B, side)
    each = torch.arange(count, device=pool.device)[:, None, None]
    return composite.movedim(1, -1)[each, y[:, :, None], x[:, None]].movedim(-1, 1)


def losses(model: AutoEncoder, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Squared and absolute error of pixels, absolute error of their differences, divergence of the posterior.

    The squared error leads: it is for the subjects, small, full of detail and furthest off, where an absolute
    error would go on polishing the scenes.

    Half of the pictures are decoded from latents with noise, so that what matters to the eye is large in latents too,
    and a transformer's small errors stay small.

    The Gaussian that latents are held to is the one that scale_factor and shift_factor map to mean 0, variance 1.
    """
    mean, logvar = (part.float() for part in model.moments(image))
    random = {"generator": generator, "device": image.device}
    level = NOISE * (2 * torch.rand(len(image), 1, 1, 1, **random) - 1).clamp(min=0)  # 0 for half of them
    level = level * mean.detach().std()
    spread = (logvar.exp() + level**2).sqrt()
    decoded = model.decoder(mean + spread * torch.randn(mean.shape, **random)).float()
    pixel = (decoded - image).abs().mean()
    edge = sum((decoded.diff(dim=d) - image.diff(dim=d)).abs().mean() for d in (-1, -2))
    scale = model.config.scale_factor
    z, variance = scale * (mean - model.config.shift_factor), scale**2 * logvar.exp()
    kl = 0.5 * (z.square() + variance - variance.log() - 1).mean()
    clear = F.mse_loss(decoded[level.argmin()], image[level.argmin()])
    return {
        "loss": 10 * F.mse_loss(decoded, image) + 0.3 * pixel + 0.2 * edge + KL * kl,
        "psnr": -10 * torch.log10(clear.detach() / 4),
        "z_std": z.detach().std(),
        "posterior_std": variance.detach().sqrt().mean(),
    }


def new_autoencoder() -> AutoEncoder:
    """Build an autoencoder that starts almost linear, with latents far above the posterior's noise."""
    model = AutoEncoder(CONFIG)
    for name, p in model.named_parameters():
        if ".conv2." in name or ".proj_out." in name:
            nn.init.zeros_(p)
    out, channels = model.encoder.conv_out, CONFIG.z_channels
    with torch.no_grad():
        out.weight[:channels] *= 8
        out.weight[channels:] *= 0.1
        out.bias[channels:] = -5
    return model


def is_hidden(name: str, p: Tensor) -> bool:
    """Tell the kernels that Muon trains from the first and last ones, norms and biases."""
    return p.ndim == 4 and "conv_in" not in name and "conv_out" not in name


def train(stage: Stage, pool: Tensor, work: Work, small: float = 0.0) -> AutoEncoder:
    """Train the autoencoder and set its latents to unit variance; gives the averaged weights on the CPU.

    pool: (N, 3, 64, 64) uint8 panels
    small: share of the stage that has small crops
    """
    torch.manual_seed(work.seed)
    average = train_on(stage, new_autoencoder(), pool, work, small)
    return unit_variance(average, pool[:512])


def finish(stage: Stage, model: AutoEncoder, pool: Tensor, work: Work) -> AutoEncoder:
    """Train the decoder on while latents stay as they are, so that what was learnt of them still holds.

    pool: (N, 3, 64, 64) uint8 panels
    """
    model = copy.deepcopy(model)
    model.encoder.requires_grad_(False)
    model.decoder.requires_grad_(True)
    return train_on(stage, model, pool, work)


def train_on(stage: Stage, model: AutoEncoder, pool: Tensor, work: Work, small: float = 0.0) -> AutoEncoder:
    """Train what of the model has gradients; gives the averaged weights on the CPU."""
    model, clock = model.to(work.device, memory_format=torch.channels_last), Clock(stage)
    pool = pool.to(work.device)

    def loss_at(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        image = batch_of(pool, stage.batch, step, clock.done < small, generator)
        return losses(model, image.contiguous(memory_format=torch.channels_last), generator)

    average = run(stage, model, loss_at, work, is_hidden, processes=work.processes, clock=clock)
    return average.to("cpu", memory_format=torch.contiguous_format)


@torch.no_grad()
def unit_variance(model: AutoEncoder, pool: Tensor) -> AutoEncoder:
    """Fold one number into encoder and decoder so that scaled latents have variance 1; pictures do not change."""
    z = model.encode(pool.float() / 127.5 - 1)
    factor = float(z.std())
    out, into = model.encoder.conv_out, model.decoder.conv_in
    channels = model.config.z_channels
    shift = model.config.shift_factor
    # raw' - shift = (raw - shift) / factor; only at the decoder's zero padding does this change anything
    out.weight[:channels] /= factor
    out.bias[:channels] = (out.bias[:channels] - shift) / factor + shift
    out.bias[channels:] -= 2 * torch.log(torch.tensor(factor))
    _rescale_input(into, factor, shift)
    return model


def _rescale_input(conv: nn.Conv2d, factor: float, shift: float) -> None:
    conv.bias += (conv.weight * (shift - factor * shift)).sum(dim=(1, 2, 3))
    conv.weight *= factor
