"""Panel-conditioned sampling: SDEdit's replacement, as In-Context LoRA uses it for masked panels.

Letters: B batch, I image tokens.
"""

import math

from torch import Tensor

from .flow import AfterStep, interpolate


def keep_known(known: Tensor, noise: Tensor, mask: Tensor) -> AfterStep:
    """Make the after_step of euler that holds the kept tokens on their own path from noise to data.

    The noise is drawn once for the whole run, so the path is a straight line and ends exactly at `known`.

    known: (B, I, 64) clean tokens; what stands under the mask is never read
    noise: (B, I, 64) the noise that the run started from
    mask: (1, I, 1) 1 where tokens are generated, 0 where they are kept
    Source: arXiv:2410.23775 section 3.4; the same as the inpainting of diffusers, mflux and ComfyUI
    """
    generated = mask.bool()

    def after_step(x: Tensor, t_next: float) -> Tensor:
        return x.where(generated, interpolate(known, noise, t_next).to(x.dtype))

    return after_step


def keep_clean(known: Tensor, mask: Tensor) -> AfterStep:
    """Make the after_step of euler that holds the kept tokens clean at every time, for models trained to see them so.

    The run must start from after_step(noise, 1.0) too.

    known: (B, I, 64) clean tokens; what stands under the mask is never read
    mask: (1, I, 1) 1 where tokens are generated, 0 where they are kept
    Source: the trainable inpainting that arXiv:2410.23775 section 4 names as the cure for lost identity
    """
    generated = mask.bool()

    def after_step(x: Tensor, t_next: float) -> Tensor:
        return x.where(generated, known.to(x.dtype))

    return after_step


def steps_left(steps: int, strength: float) -> int:
    """Count the steps that a draft leaves, the last ones: floor(steps x strength). SDEdit proper starts from a draft.

    strength: in 0..1; 1 leaves every step, and the draft is forgotten
    Errors: ValueError if strength leaves no step
    Source: arXiv:2108.01073 (SDEdit)
    """
    if not 1 <= (left := steps * strength + 1e-9) < steps + 1:  # 10 x 0.3 is a little less than 3 in binary
        raise ValueError(f"strength {strength} leaves no step of {steps}; use {math.ceil(1e4 / steps) / 1e4:g} or more")
    return int(left)
