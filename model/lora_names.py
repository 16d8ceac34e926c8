"""What the Linears of FLUX.1 are called in the dialects of LoRA files; data, hardly code.

A name holds at most one block number, written {} here. Where the released model fuses several projections into
one Linear and a dialect does not, the dialect's Linear stands for some rows of the fused output.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

# diffusers' name -> the released name, and which rows of its output
DIFFUSERS = {
    "x_embedder": ("img_in", "all"),
    "context_embedder": ("txt_in", "all"),
    "time_text_embed.timestep_embedder.linear_1": ("time_in.in_layer", "all"),
    "time_text_embed.timestep_embedder.linear_2": ("time_in.out_layer", "all"),
    "time_text_embed.guidance_embedder.linear_1": ("guidance_in.in_layer", "all"),
    "time_text_embed.guidance_embedder.linear_2": ("guidance_in.out_layer", "all"),
    "time_text_embed.text_embedder.linear_1": ("vector_in.in_layer", "all"),
    "time_text_embed.text_embedder.linear_2": ("vector_in.out_layer", "all"),
    "transformer_blocks.{}.norm1.linear": ("double_blocks.{}.img_mod.lin", "all"),
    "transformer_blocks.{}.norm1_context.linear": ("double_blocks.{}.txt_mod.lin", "all"),
    "transformer_blocks.{}.attn.to_q": ("double_blocks.{}.img_attn.qkv", "q"),
    "transformer_blocks.{}.attn.to_k": ("double_blocks.{}.img_attn.qkv", "k"),
    "transformer_blocks.{}.attn.to_v": ("double_blocks.{}.img_attn.qkv", "v"),
    "transformer_blocks.{}.attn.add_q_proj": ("double_blocks.{}.txt_attn.qkv", "q"),
    "transformer_blocks.{}.attn.add_k_proj": ("double_blocks.{}.txt_attn.qkv", "k"),
    "transformer_blocks.{}.attn.add_v_proj": ("double_blocks.{}.txt_attn.qkv", "v"),
    "transformer_blocks.{}.attn.to_out.0": ("double_blocks.{}.img_attn.proj", "all"),
    "transformer_blocks.{}.attn.to_add_out": ("double_blocks.{}.txt_attn.proj", "all"),
    "transformer_blocks.{}.ff.net.0.proj": ("double_blocks.{}.img_mlp.0", "all"),
    "transformer_blocks.{}.ff.net.2": ("double_blocks.{}.img_mlp.2", "all"),
    "transformer_blocks.{}.ff_context.net.0.proj": ("double_blocks.{}.txt_mlp.0", "all"),
    "transformer_blocks.{}.ff_context.net.2": ("double_blocks.{}.txt_mlp.2", "all"),
    "single_transformer_blocks.{}.norm.linear": ("single_blocks.{}.modulation.lin", "all"),
    "single_transformer_blocks.{}.attn.to_q": ("single_blocks.{}.linear1", "q"),
    "single_transformer_blocks.{}.attn.to_k": ("single_blocks.{}.linear1", "k"),
    "single_transformer_blocks.{}.attn.to_v": ("single_blocks.{}.linear1", "v"),
    "single_transformer_blocks.{}.proj_mlp": ("single_blocks.{}.linear1", "mlp"),
    "single_transformer_blocks.{}.proj_out": ("single_blocks.{}.linear2", "all"),
    "norm_out.linear": ("final_layer.adaLN_modulation.1", "swapped"),  # diffusers: scale first; here: shift first
    "proj_out": ("final_layer.linear", "all"),
}

# XLabs' x-flux, UNO and USO: 1 is the image stream, 2 the text stream
XLABS = {
    "double_blocks.{}.processor.qkv_lora1": ("double_blocks.{}.img_attn.qkv", "all"),
    "double_blocks.{}.processor.qkv_lora2": ("double_blocks.{}.txt_attn.qkv", "all"),
    "double_blocks.{}.processor.proj_lora1": ("double_blocks.{}.img_attn.proj", "all"),
    "double_blocks.{}.processor.proj_lora2": ("double_blocks.{}.txt_attn.proj", "all"),
    "single_blocks.{}.processor.qkv_lora": ("single_blocks.{}.linear1", "qkv"),
    "single_blocks.{}.processor.proj_lora": ("single_blocks.{}.linear2", "all"),
}

OFFICIAL = {official: (official, "all") for official, _ in DIFFUSERS.values()}
OFFICIAL["single_blocks.{}.linear1_qkv"] = ("single_blocks.{}.linear1", "qkv")  # ComfyUI's

TABLES = {"diffusers": DIFFUSERS, "official": OFFICIAL, "xlabs": XLABS}
SNAKED = {name.replace(".", "_"): name for name in (*DIFFUSERS, *OFFICIAL)}  # as trainers write them, without dots

# What may stand before a name, and how its dialect is then called ("" by the name itself)
DOTTED = {"base_model.model.": "PEFT", "model.diffusion_model.": "ComfyUI", "diffusion_model.": "ComfyUI"}
DOTTED |= {"transformer.": "", "unet.": ""}
SNAKE = {"lora_unet_": "kohya", "lora_transformer_": "OneTrainer", "lycoris_": "LyCORIS"}

NUMBER = re.compile(r"(?<=blocks[._])(0|[1-9]\d{0,3})(?=[._])")


@dataclass(frozen=True)
class Place:
    """Where an adapter belongs: some rows of one Linear."""

    module: str  # the released name
    slot: str  # see rows
    name: str  # the dialect's, with dots and without prefix
    dialect: str


def template(name: str) -> tuple[str, str]:
    """Take the block number out of a name: double_blocks.7.img_mod.lin -> double_blocks.{}.img_mod.lin, 7."""
    found = NUMBER.search(name)
    return (NUMBER.sub("{}", name, count=1), found[0]) if found else (name, "")


def locate(name: str) -> Place | None:
    """Find the Linear that any dialect's name means, or None. Names without dots are looked up, never guessed."""
    before = next((prefix for prefix in (*DOTTED, *SNAKE) if name.startswith(prefix)), "")
    pattern, number = template(name.removeprefix(before))
    if before in SNAKE:
        pattern = SNAKED.get(pattern, "")
    for table, names in TABLES.items():
        if pattern in names:
            module, slot = names[pattern]
            dialect = table if table == "xlabs" else {**DOTTED, **SNAKE}.get(before) or table
            return Place(module.format(number), slot, pattern.format(number), dialect)
    return None


def rows(slot: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Give the first row of a slot and the one after its last.

    slot: all, swapped (all, the two halves exchanged), or of a fused projection q, k, v, qkv, mlp
    shape: outputs, inputs of the Linear; a fused projection's inputs are the model's width
    """
    out, width = shape
    fused = {"q": (0, width), "k": (width, 2 * width), "v": (2 * width, 3 * width), "qkv": (0, 3 * width)}
    return {"all": (0, out), "swapped": (0, out), "mlp": (3 * width, out), **fused}[slot]


def swap(halves: Tensor) -> Tensor:
    """Exchange the two halves of the rows."""
    return torch.cat(halves.chunk(2)[::-1])


def names_in(dialect: str, module: str) -> list[tuple[str, str]]:
    """List a dialect's names for one Linear, prefix included, each with its slot.

    dialect: diffusers (its names cover every row), xlabs, or kohya, where only the Linears of blocks have names, as
        diffusers drops the others without a word
    """
    if dialect == "kohya":
        return [("lora_unet_" + module.replace(".", "_"), "all")] if "_blocks." in module else []
    pattern, number = template(module)
    before = "transformer." if dialect == "diffusers" else ""
    return [(before + name.format(number), slot) for name, (own, slot) in TABLES[dialect].items() if own == pattern]
