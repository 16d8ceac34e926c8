"""What LoRA files hold besides two thin matrices: factors of whole matrices, what is refused, what headers say.

The names and the matrices are in lora_formats.py. Letter: r rank.
Source: KohakuBlueleaf/LyCORIS@f49d30d of LoKr and LoHa; the headers of kohya's sd-scripts, ai-toolkit and PEFT
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST = 1e6  # of an alpha and of any value: no training gives more, and products of four stay in float32

# Factors by the roles that lora_formats finds: how each kind is called
FACTORS = {"lokr": "LoKr factors", "hada": "LoHa factors", "diff": "whole weights to add"}
FACTOR = re.compile(r"lokr_w|hada_w|diff$")
REFUSED = (
    ("DoRA magnitudes", r"dora_scale|lora_magnitude_vector"),
    ("LoKr's form for convolutions", r"lokr_t[12]"),
    ("LoHa's form for convolutions", r"hada_t[12]"),
    ("OFT blocks", r"oft_blocks|\boft_|\.rescale$"),
    ("GLoRA matrices", r"\.[ab][12]\.(weight|bias)$|\.bm\.weight$"),
    ("whole weights to set", r"\.set_weight$"),
    ("a change of shape", r"\.reshape_weight$"),
    ("norms of a control LoRA (FLUX.1 Canny or Depth)", r"norm\.(query|key)_norm\.scale$"),
    ("norms", r"\.[wb]_norm$|norm\.(query|key)_norm\.|\.norm_(added_)?[qk]\."),
    ("a third matrix", r"lora_mid"),
    ("IA3 vectors", r"\.on_input$"),
    ("matrices of EasyControl, for its condition's tokens only", r"\.(q|k|v|proj)_loras\."),
    ("matrices of OminiControl, for its condition's tokens only", r"omini"),
)
# Inputs of img_in in other models of FLUX.1
CHANNELS = {(128,): "FLUX.1 Canny or Depth, a control LoRA", (384,): "FLUX.1 Fill"}

# Where a header names the model, and the part of the text that does
BASES = {"ss_base_model_version": -1, "modelspec.architecture": 0, "base_model": -1, "base_model_name_or_path": -1}
# Other models, looked for in lower case with - for _ . and spaces; a FLUX.1-dev or -schnell is none of them
OTHERS = {
    "FLUX.2": r"flux-?2\b|klein",
    "FLUX.1 Fill": r"flux.*\bfill",
    "FLUX.1 Canny": r"flux.*\bcanny",
    "FLUX.1 Depth": r"flux.*\bdepth",
    "FLUX.1 Kontext": r"kontext",
    "OminiControl": r"omini",
    "Chroma": r"chroma",
    "SDXL": r"sdxl|stable-diffusion-xl|\bpony|illustrious",
    "Stable Diffusion 3": r"\bsd-?v?3|stable-diffusion-v?3",
    "Stable Diffusion 1 or 2": r"\bsd-?v?[12]|stable-diffusion-v?[12]",
    "Wan": r"\bwan(-?\d|$|-)",
    "Qwen-Image": r"qwen",
    "HunyuanVideo": r"hunyuan|framepack",
    "Z-Image": r"\bz-?image",
    "Lumina": r"lumina",
    "HiDream": r"hidream",
    "LTX-Video": r"\bltx",
    "CogVideoX": r"cogvideo",
    "PixArt": r"pixart",
    "Kolors": r"kolors",
    "AuraFlow": r"aura-?flow",
    "Sana": r"\bsana",
}
ALPHAS = ("alpha", "lora_alpha", "network_alpha", "ss_network_alpha")


@dataclass(frozen=True)
class Change:
    """A change of some rows of one Linear that is no product of two thin matrices: its factors, and a bias to add."""

    module: str  # the released name
    rows: slice
    factors: dict[str, Tensor]  # see matrix
    scale: float  # alpha / r, 1 if no factor is low-rank
    bias: Tensor | None = None  # (rows,), not scaled
    swapped: bool = False  # the factors make the two halves of the rows in the other order


def called(roles: Mapping[str, object]) -> str:
    """Say of which kind factors are, as in a message; nothing if there are none."""
    return next((FACTORS[role[:4]] for role in roles if FACTOR.match(role)), "")


def swap(halves: Tensor) -> Tensor:
    """Exchange the two halves of the rows."""
    return torch.cat(halves.chunk(2)[::-1])


def matrix(factors: Mapping[str, Tensor]) -> Tensor:
    """Multiply factors out, in float32: of LoKr kron(W1, W2), of LoHa W1 * W2, either as a product of two, W = a b.

    factors: by role, such as lokr_w1, lokr_w2_a and lokr_w2_b; or diff, the matrix itself
    Returns (rows, inputs)
    """
    if "diff" in factors:
        return factors["diff"].float()
    kind = next(iter(factors))[:4]
    first, second = (
        factors[name].float() if name in factors else factors[f"{name}_a"].float() @ factors[f"{name}_b"].float()
        for name in (f"{kind}_w1", f"{kind}_w2")
    )
    return torch.kron(first, second) if kind == "lokr" else first * second


def outer(path: Path, keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple, int | None]:
    """Give the shape of the matrix that factors make, and their rank, None if none is low-rank; no data is read.

    keys, shapes: of the tensors, by role
    Errors: ValueError that names a key, for factors that are incomplete or do not go together
    """
    names = [] if "diff" in shapes else [f"{next(iter(shapes))[:4]}_w{i}" for i in "12"]
    wanted = {role for name in names for role in ([name] if name in shapes else [f"{name}_a", f"{name}_b"])}
    if odd := (wanted or {"diff"}) ^ shapes.keys():
        raise ValueError(
            f"{path} has {next(iter(keys.values()))} and not what goes with it ({min(odd)}); it is damaged"
        )
    ranks = {shape[0] for role, shape in shapes.items() if shape and role.endswith("_b")}
    fits = len(ranks) < 2 and all(len(shape) == 2 for shape in shapes.values())
    if fits and names and names[0] == "hada_w1":  # else a row would be multiplied with many
        fits = len({(shapes[f"{name}_a"][0], shapes[f"{name}_b"][1]) for name in names}) == 1
    try:
        made = tuple(matrix({role: torch.empty(shape, device="meta") for role, shape in shapes.items()}).shape)
    except RuntimeError:
        fits = False
    if not fits:
        key, sizes = next(iter(keys.values())), ", ".join(map(str, shapes.values()))
        raise ValueError(f"{path} has {key} and other factors of shapes {sizes}, which make no matrix; it is damaged")
    return made, next(iter(ranks), None)


class DenseAdapter(nn.Module):
    """The change of some rows by a whole matrix, such as LoKr's, which is made of its factors when it is needed."""

    def __init__(self, change: Change, weight: float = 1.0):
        super().__init__()
        self.rows, self.scale, self.swapped = change.rows, change.scale * weight, change.swapped
        self.factors = nn.ParameterDict(change.factors)
        self.bias = None if change.bias is None else nn.Parameter(weight * change.bias)  # (rows,)

    def forward(self, x: Tensor) -> Tensor:
        """Compute in the dtype of x, as Adapter.

        x: (..., inputs)
        Returns (..., rows)
        """
        weight = torch.zeros(self.rows.stop - self.rows.start, x.shape[-1], device=x.device)
        self.add_to(weight)
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def add_to(self, weight: Tensor) -> None:
        """Add scale * the matrix. weight: (rows, inputs) float32"""
        made = matrix(self.factors)
        weight.add_(swap(made) if self.swapped else made, alpha=self.scale)


def header_alpha(path: Path, metadata: Mapping[str, str]) -> float | None:
    """Give the alpha that a header names, for files without alpha tensors. Errors: ValueError for two, or no number"""
    texts = {metadata[name].strip() for name in ALPHAS if name in metadata} - {"", "None"}
    try:
        alphas = {float(text) for text in texts}
    except ValueError:
        alphas = {math.nan}
    if len(alphas) > 1 or not all(0 < alpha < MOST for alpha in alphas):
        shown = " and ".join(sorted(text[:40] for text in texts))
        raise ValueError(f"{path} has no alpha but in its header, which says {shown}; nobody knows its strength")
    return next(iter(alphas), None)


def other_model(headers: Mapping[str, object]) -> str:
    """Name the model that a header or PEFT's configuration says a LoRA is for; nothing if none, or FLUX.1 itself."""
    for name, part in BASES.items():
        value = headers.get(name)
        text = re.sub(r"[\s_.-]+", "-", value[-200:].lower().split("/")[part]) if isinstance(value, str) else ""
        if other := next((other for other, pattern in OTHERS.items() if re.search(pattern, text)), None):
            return other
    return ""
