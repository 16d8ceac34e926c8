"""fp8: the Linears of the blocks with weights of one byte, so that FLUX.1 takes half the memory. Lossy, and measured.

    weight[n] = scale[n] * code[n],  scale[n] = max |weight[n]| / 448     each row n has a scale of its own, in float32

A code is a float8_e4m3fn: a sign, four bits of exponent, three of mantissa, 448 at most. A card that multiplies such
codes (compute capability 8.9: RTX 40, L4, H100 and later) rounds the activations likewise, row by row, as they come.
Elsewhere a weight is widened when it is used, one layer at a time: slower than bfloat16, in half its memory.
What acts on one vector (modulation, embedders) or ends the model stays as it is.
Letters: M rows (tokens), K inputs, N outputs.
"""

import math
from collections.abc import Callable, Iterable
from itertools import groupby

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from .checkpoint import Checkpoint, Stored
from .checkpoint_forms import Made
from .flux import Flux
from .lora import add, merge, shapes
from .lora_formats import LoraFile, describe, read_deltas
from .tables import is_modulation, read_apart
from .weights import empty_network

FP8, LARGEST = torch.float8_e4m3fn, 448.0
SCALED = (8, 9)  # the compute capability from which on torch._scaled_mm exists
# Rows from which on codes are multiplied. To widen a weight moves 3 bytes a value more than bfloat16 does, whatever the
# rows are; to round activations takes a few small kernels, which count where rows are few. Measured on an H100,
# compiled, codes multiplied: 101 ms a step against 136 of bfloat16 with 4,608 rows, but 52 against 45 with 1,536. There
# widening is no way out: by its traffic it takes bfloat16's 45 and 9 more (reckoned, not measured).
SCALED_ROWS = 256
BLOCKS = ("double_blocks.", "single_blocks.")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to float8, in its own dtype; a row of zeros stays one.

    x: (M, K)
    Returns codes (M, K) and scale (M, 1) float32: x is about scale * codes
    """
    largest = torch.linalg.vector_norm(x, ord=math.inf, dim=-1, keepdim=True).float().clamp(min=1e-12)
    inverse = (LARGEST / largest).to(x.dtype)  # rounded, so the scale is made from it and no row is off as a whole
    return (x * inverse).to(FP8), 1 / inverse.float()


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Widen codes: their product with the scale, in float32, rounded once.

    codes: (N, K), scale: (N, 1) float32
    Returns (N, K)
    """
    if codes.is_cuda and not torch.compiler.is_compiling():
        return codes.view(FP8).to(dtype).mul_(scale)
    # The same by whole numbers: the bits of a code are those of a float16 that is 256 times smaller. The CPU's own cast
    # takes twice as long, and the compiler does not know the type on cards before 8.9.
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)
    return bits.view(torch.float16).float().mul_(scale * 256).to(dtype)


def scaled_product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Round the rows of x to float8 and multiply codes by codes: plain operations, which a compiler joins.

    x: (M, K) bfloat16, codes: (N, K), scale: (N, 1), bias: (N,) bfloat16
    Returns (M, N)
    """
    rows, factors = quantize_rows(x)
    return torch._scaled_mm(rows, codes.t(), factors, scale.t(), bias=bias, out_dtype=x.dtype, use_fast_accum=x.is_cuda)


class Product(torch.autograd.Function):
    """x W^T + b; the gradient of x widens W once more, so that no wide weight waits for the backward pass.

    Where activations are rounded, the gradient is that of the product without this rounding.
    """

    @staticmethod
    def forward(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, scaled: bool) -> Tensor:
        """x: (..., K), codes: (N, K), scale: (N, 1), bias: (N,). Returns (..., N)"""
        if scaled:
            return scaled_product(x.flatten(0, -2), codes, scale, bias).unflatten(0, x.shape[:-1])
        return F.linear(x, dequantize(codes, scale, x.dtype), bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ dequantize(*ctx.saved_tensors, grad.dtype), None, None, None, None


class Fp8Linear(nn.Linear):
    """A frozen Linear of codes (N, K), the scale of each row (N, 1) and a bias (N,) in the model's dtype."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor):
        nn.Module.__init__(self)  # nn.Linear would make weights of its own
        self.out_features, self.in_features = codes.shape
        able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= SCALED
        # on cards before 8.9 the compiler must not meet the type, as an input neither
        codes = codes.view(torch.int8) if torch.cuda.is_available() and not able else codes
        self.weight, self.scale, self.bias = (nn.Parameter(t, requires_grad=False) for t in (codes, scale, bias))
        self.native = able and not self.in_features % 16 and not self.out_features % 16

    def scaled(self, x: Tensor) -> bool:
        """Say whether codes are multiplied, and x is rounded for it."""
        return self.native and x.is_cuda and x.dtype == torch.bfloat16 and x.shape[:-1].numel() >= SCALED_ROWS

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K). Returns (..., N)"""
        return Product.apply(x, self.weight, self.scale, self.bias, self.scaled(x))


@torch.no_grad()
def load_quantized(
    checkpoint: Checkpoint,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    loras: Iterable[tuple[LoraFile, float]] = (),
    note: Callable[[str], object] = lambda line: None,
    tables: bool = False,
) -> Flux:
    """Load a transformer into fp8 block by block, so that no more than one block is ever there in another form.

    What the file has in fp8 is kept bit for bit, modulation too, and LoRAs stay beside it, exact: rounded once more, a
    change of 1 % of a weight would lose a third of itself. Into other Linears LoRAs are merged before rounding.

    checkpoint: from find_model or open_checkpoint
    dtype: of what is not in fp8, and of the activations
    loras: with their strengths
    note: is told what each is
    tables: whether make_tables comes next, which wants modulations on the CPU
    Errors: ValueError as load_flux and load_lora
    """
    flux, changes, tensors = empty_network(Flux, checkpoint), {}, checkpoint.tensors
    for file, strength in loras:
        for delta in read_deltas(file, shapes(flux)):
            changes.setdefault(delta.module, []).append((delta, strength))
        note(str(describe(file)))

    def merge_into(names: Iterable[str]) -> None:
        for name in names:
            for delta, strength in changes.pop(name, ()):
                add(flux, delta, strength, train=False)
        merge(flux)

    def read(keys: list[str]) -> None:
        flux.load_state_dict(read_apart(checkpoint, keys, dtype, device, tables), strict=False, assign=True)

    coded = [key for key in flux.state_dict() if becomes_codes(key, tensors[key])]
    read([key for key in tensors if key not in {*coded}])
    for _, block in groupby(coded, lambda key: key.split(".")[:2]):
        keys = list(block)
        wide = [key for key in keys if not has_codes(tensors[key])]
        read(wide)
        merge_into(key.removesuffix(".weight") for key in wide)
        for key in keys:
            name = key.removesuffix(".weight")
            linear = flux.get_submodule(name)
            rows = quantize_rows(linear.weight.float()) if key in wide else read_codes(tensors[key])
            flux.set_submodule(name, Fp8Linear(*(part.to(linear.bias.device) for part in rows), linear.bias))
    merge_into(list(changes))
    return flux.requires_grad_(False).eval()


def has_codes(stored: Stored | Made) -> bool:
    """Say whether a file has all rows as float8_e4m3fn; other forms of float8 are rounded to it."""
    return isinstance(stored, Made) and not stored.swapped and {row.dtype for row, _ in stored.rows} == {"F8_E4M3"}


def becomes_codes(key: str, stored: Stored | Made) -> bool:
    """Say whether a tensor is quantised, or is so already: matrices of blocks, modulation only as the file has it."""
    return key.startswith(BLOCKS) and len(stored.shape) == 2 and (not is_modulation(key) or has_codes(stored))


def read_codes(made: Made) -> tuple[Tensor, Tensor]:
    """Map codes as they are, and give each row its scale, which often is that of the whole tensor.

    Returns codes (N, K) and scale (N, 1)
    """

    def tensor(stored: Stored) -> Tensor:
        with safe_open(stored.path, framework="pt") as file:
            return file.get_tensor(stored.key)

    codes = [tensor(row) for row, _ in made.rows]
    scales = [torch.ones(1) if scale is None else tensor(scale).float() for _, scale in made.rows]
    scales = [scale.reshape(-1, 1).expand(len(rows), 1) for scale, rows in zip(scales, codes, strict=True)]
    return torch.cat(codes) if len(codes) > 1 else codes[0], torch.cat(scales)
