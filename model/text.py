"""The two text encoders of FLUX.1, run through transformers: T5 tokens for the sequence, a CLIP vector for the whole.

Letters: B batch, T text tokens, C width of the T5 tokens, V width of the CLIP vector.

Configurations are inferred from tensor shapes; a config.json, where there is one, adds what shapes do not show.
Loading is our own and strict: transformers 5 loads nothing, without an error, from CLIP names with a prefix.
"""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import fill, open_checkpoint, read_json
from .weights import ModelFiles, count_blocks, dimensions, infer

UNLIMITED = 1_000_000  # a tokenizer without a limit says 1e30
TOKENIZER_FILES = ("*.json", "*.txt", "*.model")
WORDS = 6  # shown of what a prompt loses
CLIP_PREFIX = "text_model."  # on the names in released files, but not in today's transformers
CLIP_EXTRAS = r"^(vision_model|visual_projection|text_projection|logit_scale)\b|position_ids$"
T5_EXTRAS = r"^(decoder|lm_head)\."  # parts of a whole T5 that the encoder does not have
T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor under two names; files have one or both


def _positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < 1_000_000


# What shapes do not show, and what it may be; taken from a config.json where there is one.
T5_SETTINGS = {
    "feed_forward_proj": lambda value: value in ("gated-gelu", "gated-silu", "relu", "gelu"),
    "relative_attention_max_distance": lambda value: type(value) is int and _positive(value),
    "layer_norm_epsilon": _positive,
}
CLIP_SETTINGS = {
    "hidden_act": lambda value: value in ("quick_gelu", "gelu"),
    "num_attention_heads": lambda value: type(value) is int and _positive(value),
    "layer_norm_eps": _positive,
}


class TextEncoders:
    """T5 and CLIP with their tokenizers. Make it with load_text_encoders; drop every reference to free the memory."""

    def __init__(self, t5: nn.Module, clip: nn.Module, t5_tokenizer, clip_tokenizer, dtype: torch.dtype):
        self.t5, self.clip = t5, clip
        self.t5_tokenizer, self.clip_tokenizer = t5_tokenizer, clip_tokenizer
        self.dtype = dtype

    @torch.no_grad()
    def encode(self, prompts: list[str], max_length: int | None) -> tuple[Tensor, Tensor]:
        """Encode prompts as FLUX.1 was trained: padded to the full length, and the padding not masked.

        max_length: T5 tokens T; None is the tokenizer's own limit. CLIP takes 77, or fewer if it has fewer positions
        Returns txt: (B, T, C) and vec: (B, V)
        Errors: ValueError for no prompts, text that is not Unicode, or no known limit
        Source: black-forest-labs/flux@802fb47 modules/conditioner.py
        """
        if not prompts:
            raise ValueError("there is no prompt to encode; give at least one, which may be empty")
        ids = self._ids("T5", self.t5_tokenizer, self.t5.shared, prompts, self._t5_limit(max_length))  # (B, T)
        txt = self.t5(input_ids=ids, attention_mask=None).last_hidden_state  # (B, T, C)
        ids = self._ids("CLIP", self.clip_tokenizer, _embedding(self.clip), prompts, self._clip_limit())
        hidden = self.clip(input_ids=ids, attention_mask=None).last_hidden_state
        # The first end-of-text token has seen the whole prompt. It is found here, because transformers goes by the id
        # in the config, and a wrong id silently gives the first token, which has seen nothing.
        end = (ids == self.clip_tokenizer.eos_token_id).int().argmax(dim=1)  # (B,)
        vec = hidden[torch.arange(len(prompts), device=hidden.device), end]  # (B, V)
        return txt.to(self.dtype), vec.to(self.dtype)

    def lost(self, prompt: str, max_length: int | None) -> list[str]:
        """Say in one line per encoder what of a prompt lies beyond its limit; no lines if nothing does."""
        lines = []
        t5 = _lost(self.t5_tokenizer, prompt, self._t5_limit(max_length))
        if t5:
            lines.append(f"T5 reads only the start of the prompt: {t5}; shorten it")
        clip = _lost(self.clip_tokenizer, prompt, self._clip_limit())
        if clip:
            lines.append(f"CLIP reads only the start, which is usual for joint prompts (T5 gives the rest): {clip}")
        return lines

    def _t5_limit(self, max_length: int | None) -> int:
        limit = self.t5_tokenizer.model_max_length if max_length is None else max_length
        if limit > UNLIMITED:
            raise ValueError("the T5 tokenizer has no model_max_length; give the text length, e.g. 512")
        if limit < 1:
            raise ValueError(f"the text length is {limit}; it must be at least 1 token")
        return limit

    def _clip_limit(self) -> int:
        positions = next(m.num_embeddings for n, m in self.clip.named_modules() if n.endswith("position_embedding"))
        return min(positions, self.clip_tokenizer.model_max_length)

    def _ids(self, name: str, tokenizer, embedding: nn.Embedding, prompts: list[str], length: int) -> Tensor:
        padded = {"padding": "max_length", "truncation": True, "max_length": length}
        ids = _tokenize(tokenizer, prompts, **padded, return_tensors="pt").input_ids
        _check_known(name, int(ids.max()), embedding.num_embeddings)
        return ids.to(embedding.weight.device)


def _embedding(clip: nn.Module) -> nn.Embedding:
    return next(module for name, module in clip.named_modules() if name.endswith("token_embedding"))


def _check_known(name: str, token: int, vocabulary: int) -> None:
    if token >= vocabulary:
        raise ValueError(
            f"the {name} tokenizer makes token {token}, but the {name} encoder knows {vocabulary}; "
            "use the tokenizer that belongs to the encoder"
        )


def _tokenize(tokenizer, prompts: list[str], **settings):
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the prompt {prompt[:40]!a} has bytes that are no text; write it in UTF-8") from None
    try:
        return tokenizer(prompts, **settings)
    except Exception as error:  # as below; some damage shows only now
        raise ValueError(_unreadable(tokenizer.name_or_path, error)) from None


def _lost(tokenizer, prompt: str, limit: int) -> str:
    """Tokens lost and the first words of them, or nothing. The last token kept is always the end of text."""
    tokens = _tokenize(tokenizer, [prompt], return_offsets_mapping=True, verbose=False)
    number = len(tokens.input_ids[0])
    if number <= limit:
        return ""
    start = tokens.offset_mapping[0][limit - 1][0]
    word = re.search(r"\S{0,20}$", prompt[:start])[0]  # of a word that is cut, its start
    first = " ".join((word + prompt[start:]).split()[:WORDS])[:80]
    return f"{number - limit} of {number} tokens are lost, from '{first} ...' on"


def load_text_encoders(
    files: ModelFiles, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> TextEncoders:
    """Load both encoders and their tokenizers, frozen and in eval mode; never from the network.

    files: from find_model: folders of the hub layout (sharded or not) or single files
    dtype: of parameters and outputs; for float16, in which T5 overflows, T5 computes in bfloat16
    Errors: ValueError for damaged, incomplete or quantised files, by name
    """
    # transformers takes seconds to import, so only those who encode text wait for it
    from transformers.models.clip.tokenization_clip import CLIPTokenizer
    from transformers.models.t5.tokenization_t5 import T5Tokenizer

    clip_tokenizer = load_tokenizer(CLIPTokenizer, files.clip_tokenizer)
    t5_tokenizer = load_tokenizer(T5Tokenizer, files.t5_tokenizer)
    clip = _load_clip(files, clip_tokenizer, device, dtype)
    t5 = _load_t5(files, device, torch.bfloat16 if dtype is torch.float16 else dtype)
    return TextEncoders(t5, clip, t5_tokenizer, clip_tokenizer, dtype)


def load_tokenizer(kind: type, folder: Path):
    """Read a tokenizer; transformers would make up a vocabulary where files are odd, and take any limit."""
    files = [path for name in TOKENIZER_FILES for path in sorted(folder.glob(name))]
    if odd := [path for path in files if not path.is_file()]:
        raise ValueError(f"{odd[0]} is no file; download the folder {folder.name}/ again")
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions for damaged files
        raise ValueError(_unreadable(folder, error)) from None
    limit = tokenizer.model_max_length
    if type(limit) is not int or limit < 2:
        raise ValueError(f"{folder} has model_max_length = {limit!r:.80}, which is no text length; download it again")
    return tokenizer


def _unreadable(folder: str | Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:120]
    return f"the tokenizer in {folder} cannot be read ({reason}); download the folder again"


def _load_t5(files: ModelFiles, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers.models.t5.modeling_t5 import T5Config, T5EncoderModel

    checkpoint = open_checkpoint(files.t5, "t5")
    tensors = {key: stored for key, stored in checkpoint.tensors.items() if not re.search(T5_EXTRAS, key)}
    if embedding := next((tensors[key] for key in T5_EMBEDDINGS if key in tensors), None):
        tensors |= dict.fromkeys(T5_EMBEDDINGS, embedding)
    checkpoint = replace(checkpoint, tensors=tensors)
    config = infer(infer_t5_config, checkpoint) | _settings(files.t5, "text_encoder_2", T5_SETTINGS)
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(**config))
        t5.set_input_embeddings(t5.shared)  # one module under both names
    return fill(t5, checkpoint, device, dtype)


def _load_clip(files: ModelFiles, tokenizer, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers.models.clip.modeling_clip import CLIPTextConfig, CLIPTextModel

    checkpoint = open_checkpoint(files.clip, "clip")
    tensors = {key: stored for key, stored in checkpoint.tensors.items() if not re.search(CLIP_EXTRAS, key)}
    checkpoint = replace(checkpoint, tensors={key.removeprefix(CLIP_PREFIX): tensors[key] for key in tensors})
    config = infer(infer_clip_config, checkpoint) | _settings(files.clip, "text_encoder", CLIP_SETTINGS)
    if config["hidden_size"] % config["num_attention_heads"]:
        raise ValueError(
            f"{checkpoint.name} has width {config['hidden_size']}, which {config['num_attention_heads']} "
            "attention heads do not divide; put its config.json with num_attention_heads beside it"
        )
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for token in filter(None, tokens.values()):
        _check_known("CLIP", token, config["vocab_size"])
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(**config, **tokens))
    if any(key.startswith(CLIP_PREFIX) for key in clip.state_dict()):  # an older transformers
        tensors = {CLIP_PREFIX + key: stored for key, stored in checkpoint.tensors.items()}
        checkpoint = replace(checkpoint, tensors=tensors)
    positions = torch.arange(config["max_position_embeddings"], device=device)[None]
    for module in clip.modules():
        if "position_ids" in dict(module.named_buffers(recurse=False)):  # computed, so not in the file
            module.position_ids = positions
    return fill(clip, checkpoint, device, dtype)


def infer_t5_config(shapes: dict[str, tuple[int, ...]]) -> dict[str, int | float | str]:
    """Read the arguments of a T5Config off the encoder's tensor shapes; the rest is as in T5 1.1.

    Errors: ValueError, without a subject, for shapes that no T5 encoder has
    """
    vocabulary, width = dimensions(shapes, "shared.weight", 2)
    attention, mlp = "encoder.block.0.layer.0.SelfAttention.", "encoder.block.0.layer.1.DenseReluDense."
    buckets, heads = dimensions(shapes, attention + "relative_attention_bias.weight", 2)
    inner = dimensions(shapes, attention + "q.weight", 2)[0]
    if inner % heads:
        raise ValueError(f"has {heads} attention heads, which do not divide the {inner} rows of {attention}q.weight")
    gated = mlp + "wi_0.weight" in shapes
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": dimensions(shapes, mlp + ("wi_0.weight" if gated else "wi.weight"), 2)[0],
        "num_layers": count_blocks(shapes, "encoder.block"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


def infer_clip_config(shapes: dict[str, tuple[int, ...]]) -> dict[str, int | float | str]:
    """Read the arguments of a CLIPTextConfig off the encoder's tensor shapes; the rest is as in CLIP-L.

    Errors: ValueError, without a subject, for shapes that no CLIP text encoder has
    """
    vocabulary, width = dimensions(shapes, "embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": dimensions(shapes, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": count_blocks(shapes, "encoder.layers"),
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": dimensions(shapes, "embeddings.position_embedding.weight", 2)[0],
    }


def _settings(path: Path, subfolder: str, wanted: dict[str, Callable]) -> dict[str, int | float | str]:
    """What shapes do not show, from the config.json in the folder (of a single file: in the subfolder beside it).

    wanted: by name, the test that a value must pass
    """
    file = (path if path.is_dir() else path.parent / subfolder) / "config.json"
    given = read_json(file) if os.path.lexists(file) else {}
    if isinstance(given.get("text_config"), dict):  # of a whole CLIP
        given = given["text_config"]
    settings = {key: given[key] for key in wanted if key in given}
    for key, value in settings.items():
        if not wanted[key](value):
            raise ValueError(f"{file} has {key} = {value!r:.80}, which is not valid here; download it again")
    return settings
