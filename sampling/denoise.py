"""From noise to data: what the transformer computes once a run, and what in every step of flow.euler.

sample.py, the sheets of a training and the lab all make their pictures here.

Letters: B batch, T text, I target-image, R reference, L all tokens, C width of the T5 tokens, V of the CLIP vector.
"""

from typing import Any

import torch
from torch import Tensor

from .flow import AfterStep, euler


def denoise(
    flux: Any,
    x: Tensor,
    times: list[float],
    ids: Tensor,
    txt: Tensor,
    vec: Tensor,
    guidance: float | None = None,
    refs: Tensor | None = None,
    mask: Tensor | None = None,
    isolate_refs: bool = False,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Follow the transformer's velocity from noise to data.

    flux: with prefill, conditioning and velocity, as model.flux.Flux has them
    x: (B, I, 64) the point at times[0], float32; at time 1 that is noise
    times: descending, from sampling.flow.times
    ids: (1, I + R, 3) positions of the target's tokens, then of the references'
    txt: (B, T, C) T5 tokens, vec: (B, V) pooled CLIP text
    guidance: as distilled into the model, such as 3.5; None for models without it
    refs: (B, R, 64) clean tokens of reference pictures, the same in every step
    mask: (L, L) True where the token of the row sees that of the column; None is everywhere
    isolate_refs: whether references see only each other, and are computed once
    after_step: callable (x, t_next) -> x, such as one that holds kept panels (sampling.inpaint)
    Returns x: (B, I, 64) the point at the last time, float32
    """
    batch, text_length = txt.shape[:2]
    scale = None if guidance is None else torch.full((batch,), guidance, device=x.device)

    def conditioning(t: float) -> Tensor:  # (B, D)
        return flux.conditioning(torch.full((batch,), t, device=x.device), vec, scale)

    for t in times[:-1]:  # asked for early, as model/tables.py passes once over its weights for all
        conditioning(t)
    ids = torch.cat((ids.new_zeros(1, text_length, 3), ids), dim=1).expand(batch, -1, -1)  # (B, L, 3)
    cond = flux.prefill(ids, txt, refs, mask, isolate_refs)
    return euler(lambda x, t: flux.velocity(x, cond, conditioning(t)).float(), x, times, after_step)
