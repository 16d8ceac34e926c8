"""A LoRA that teaches a relation between panels, in eighty lines: twenty sets in which a subject walks to the right.

  python -m examples.minimal_train                  about three minutes on two CPU cores; writes minimal.safetensors
  python sample.py --lora minimal.safetensors --grid 3x1 --mask all --prompt "three pictures of a red cat with a hat: \
[IMAGE1] we see the big cat on the left on a beach, [IMAGE2] it is on a beach, [IMAGE3] we see it on a beach."
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from iclora.layout import Layout, compose
from model.flux import Flux
from model.lora import attach, save_lora
from model.position import grid_ids
from model.text import load_text_encoders
from model.weights import find_model, load_autoencoder, load_flux
from sampling.flow import interpolate
from sampling.images import open_picture
from sampling.latents import pack

SETS = Path(__file__).resolve().parents[1] / "sets" / "walk"
LAYOUT = Layout(3, 1, 64, 64)
BATCH, RATE, RANK, DROPOUT = 8, 1e-3, 8, 0.05
GUIDANCE = 1.0  # the guidance embedding that LoRAs of FLUX.1-dev are trained at


@torch.no_grad()
def encode(folders: list[Path]) -> tuple[Tensor, Tensor, Tensor]:
    """Encode every set once: its panels as one picture, and its caption; the empty caption comes last.

    Returns data (N, I, 64), txt (N + 1, T, C), vec (N + 1, V)
    """
    files = find_model("tiny")
    autoencoder, encoders = load_autoencoder(files.autoencoder), load_text_encoders(files, dtype=torch.float32)
    data, captions = [], []
    for folder in folders:
        panels = {panel: open_picture(folder / f"{panel}.png") for panel in (1, 2, 3)}
        data.append(pack(autoencoder.encode(compose(panels, LAYOUT))))
        captions.append((folder / "caption.txt").read_text().strip())
    return torch.cat(data), *encoders.encode([*captions, ""], max_length=None)


def flow_loss(flux: Flux, data: Tensor, txt: Tensor, vec: Tensor, generator: torch.Generator) -> Tensor:
    """The squared error of the velocity at one random time a set.

    data: (B, I, 64), txt: (B, T, C), vec: (B, V)
    """
    noise = torch.randn(data.shape, generator=generator)
    t = torch.sigmoid(torch.randn(len(data), generator=generator))  # logit-normal
    x = interpolate(data, noise, t[:, None, None])
    ids = grid_ids(LAYOUT.tokens_high, LAYOUT.tokens_wide).expand(len(data), -1, -1)
    txt_ids = torch.zeros(len(data), txt.shape[1], 3)
    v = flux(x, ids, txt, txt_ids, t, vec, torch.full((len(data),), GUIDANCE))
    return (v - (noise - data)).square().mean()


def main(path: str = "minimal.safetensors", steps: int = 400) -> None:
    generator = torch.Generator().manual_seed(0)
    data, txt, vec = encode(sorted(folder for folder in SETS.iterdir() if folder.is_dir()))
    flux = load_flux(find_model("tiny").flux, dtype=torch.float32)
    parameters = attach(flux, "all-linear", RANK, generator=generator)  # they change nothing yet
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    for step in range(steps):
        chosen = torch.randint(len(data), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < DROPOUT
        captions = torch.where(dropped, len(data), chosen)  # now and then the empty one
        loss = flow_loss(flux, data[chosen], txt[captions], vec[captions], generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:  # the rate falls to 0 over the last third
            group["lr"] = RATE * min(1.0, (steps - step) / (0.3 * steps))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            sys.stderr.write(f"step {step + 1}/{steps}, loss {loss.item():.3f}\n")
    save_lora(flux, path)


if __name__ == "__main__":
    main()
