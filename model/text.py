"""The two text encoders of FLUX.1, run through transformers: T5 tokens for the sequence, a CLIP vector for the whole.

Letters: B batch, T text tokens, C width of the T5 tokens, V width of the CLIP vector.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import FLOATS, MAX_JSON, read_json
from .flux import FluxConfig
from .weights import ModelFiles, open_checkpoint

UNLIMITED = 1_000_000  # a tokenizer without a limit says 1e30
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*/*.jinja")
EXTRAS = {  # parts of whole models that the encoders do not have
    "t5": r"^(decoder|lm_head)\.",
    "clip": r"^(vision_model|visual_projection|text_projection|logit_scale)\b|position_ids$",
}
KNOWN = {  # configurations of the single files that go round, T5 v1.1 XXL and CLIP-L
    "t5": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
    },
    "clip": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
    },
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
        Errors: ValueError for text that is not Unicode, or no known limit
        Source: black-forest-labs/flux@802fb47 modules/conditioner.py
        """
        ids = self._ids("T5", self.t5_tokenizer, self.t5, prompts, self._t5_limit(max_length))  # (B, T)
        txt = self.t5(input_ids=ids, attention_mask=None).last_hidden_state  # (B, T, C)
        limit = min(self.clip.config.max_position_embeddings, self.clip_tokenizer.model_max_length)
        ids = self._ids("CLIP", self.clip_tokenizer, self.clip, prompts, limit)
        hidden = self.clip(input_ids=ids, attention_mask=None).last_hidden_state
        # The first end-of-text token has seen the whole prompt. It is found here, because transformers goes by the id
        # in the config, and a wrong id silently gives the first token, which has seen nothing.
        end = (ids == self.clip_tokenizer.eos_token_id).int().argmax(dim=1)  # (B,)
        vec = hidden[torch.arange(len(prompts), device=hidden.device), end]  # (B, V)
        return txt.to(self.dtype), vec.to(self.dtype)

    def doubts(self, texts: Sequence[str], max_length: int | None, name: str) -> list[str]:
        """Say in lines what of texts is not read, or not as words. name: of the model"""
        limit, lines = self._t5_limit(max_length), []
        for ids in _tokenize(self.t5_tokenizer, [*texts], verbose=False).input_ids:
            if len(ids) > limit:
                lines.append(f"T5 reads {limit} of the prompt's {len(ids)} tokens; shorten it")
        if words := unknown_words(self.t5_tokenizer, texts):
            lines.append(f"{name} does not know {', '.join(words[:6])}, so do not expect to see that")
        return list(dict.fromkeys(lines))

    def _t5_limit(self, max_length: int | None) -> int:
        limit = max_length or self.t5_tokenizer.model_max_length
        if limit > UNLIMITED:
            raise ValueError("the T5 tokenizer has no model_max_length; give the text length, e.g. 512")
        return limit

    def _ids(self, name: str, tokenizer, encoder: nn.Module, prompts: list[str], length: int) -> Tensor:
        padded = {"padding": "max_length", "truncation": True, "max_length": length}
        ids = _tokenize(tokenizer, prompts, **padded, return_tensors="pt").input_ids
        if (token := int(ids.max())) >= encoder.config.vocab_size:
            raise ValueError(
                f"the {name} tokenizer makes token {token}, but the {name} encoder knows {encoder.config.vocab_size}; "
                "use the tokenizer that belongs to the encoder"
            )
        return ids.to(next(encoder.parameters()).device)


def unknown_words(t5_tokenizer, texts: Iterable[str]) -> list[str]:
    """List the words that T5 does not know and reads letter by letter; real ones have none."""
    words = dict.fromkeys(re.findall("[A-Za-z]{3,}", " ".join(re.sub(r"\[[^]]*\]", " ", text) for text in texts)))
    pieces = {word: t5_tokenizer.tokenize(word) for word in words}
    return [word for word in words if all(len(piece.lstrip("\u2581")) <= 1 for piece in pieces[word])]


def _tokenize(tokenizer, prompts: list[str], **settings):
    try:
        return tokenizer(prompts, **settings)
    except Exception as error:  # as below; some damage shows only now
        raise ValueError(_unreadable(tokenizer.name_or_path, error)) from None


def check_widths(txt: Tensor, vec: Tensor, config: FluxConfig, name: str) -> None:
    """Refuse encoders that do not belong to a transformer.

    txt, vec: what they made, of any batch
    name: of the model
    Errors: ValueError with both widths
    """
    widths, wanted = (txt.shape[-1], vec.shape[-1]), (config.context_in_dim, config.vec_in_dim)
    if widths != wanted:
        raise ValueError(
            f"the T5 and CLIP encoders beside {name} give widths {widths[0]} and {widths[1]}, but its transformer "
            f"takes {wanted[0]} and {wanted[1]}; use the encoders that belong to it"
        )


def load_text_encoders(
    files: ModelFiles, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> TextEncoders:
    """Load both encoders and their tokenizers, frozen and in eval mode; never from the network.

    files: from find_model: folders of the hub layout (sharded or not) or single files
    dtype: of parameters and outputs; for float16, in which T5 overflows, T5 computes in bfloat16
    Errors: ValueError for damaged, incomplete or quantised files, by name
    """
    # transformers takes seconds to import, so only those who encode text wait for it
    from transformers.models.clip.modeling_clip import CLIPTextConfig, CLIPTextModel
    from transformers.models.clip.tokenization_clip import CLIPTokenizer
    from transformers.models.t5.modeling_t5 import T5Config, T5EncoderModel
    from transformers.models.t5.tokenization_t5 import T5Tokenizer

    clip_tokenizer = load_tokenizer(CLIPTokenizer, files.clip_tokenizer)
    t5_tokenizer = load_tokenizer(T5Tokenizer, files.t5_tokenizer)
    clip = _load(CLIPTextModel, CLIPTextConfig, files.clip, "clip", dtype)
    t5 = _load(T5EncoderModel, T5Config, files.t5, "t5", torch.bfloat16 if dtype is torch.float16 else dtype)
    return TextEncoders(t5.to(device), clip.to(device), t5_tokenizer, clip_tokenizer, dtype)


def _load(network: type, config: type, path: Path, kind: str, dtype: torch.dtype) -> nn.Module:
    """Load one encoder through transformers, which only reports what is missing or left over: here that is an error.

    Errors: ValueError in one line
    """
    checkpoint = open_checkpoint(path, kind)  # says by name what is damaged, quantised or something else
    keys = [key for key in checkpoint.tensors if not re.search(EXTRAS[kind], key.removeprefix("text_model."))]
    for key in keys:
        if (dtype_there := checkpoint.tensors[key].dtype) not in FLOATS:
            raise ValueError(f"{checkpoint.path} has {key} as {dtype_there}, which is no float of 16 bits or more")
    settings = path / "config.json"  # beside a single file there is none
    values = read_json(settings) if os.path.lexists(settings) else KNOWN[kind]
    try:
        config = config.from_dict(values.get("text_config", values))  # of a whole CLIP, its part
        source = {"pretrained_model_name_or_path": None, "state_dict": checkpoint.read(keys, dtype)}
        module, report = network.from_pretrained(**source, config=config, dtype=dtype, output_loading_info=True)
    except Exception as error:  # of many kinds, for settings and shapes that do not fit
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{checkpoint.path} does not load ({reason}); download its folder again") from None
    for problem, found in (("lacks", report["missing_keys"]), ("has the unexpected", report["unexpected_keys"])):
        if found:
            raise ValueError(f"{checkpoint.path} {problem} {', '.join(sorted(found)[:3])} ({len(found)} tensors)")
    return module.requires_grad_(False).eval()


def load_tokenizer(kind: type, folder: Path):
    """Read a tokenizer; transformers would make up a vocabulary where files are odd, and take any limit."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    files = [path for name in TOKENIZER_FILES for path in sorted(folder.glob(name))]
    if odd := [path for path in files if not path.is_file() or path.stat().st_size > MAX_JSON]:
        raise ValueError(f"{odd[0]} is no file of at most 16 MB; download the folder {folder.name}/ again")
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions for damaged files
        raise ValueError(_unreadable(folder, error)) from None
    limit = tokenizer.model_max_length
    if type(limit) is not int or limit < 2:
        raise ValueError(f"{folder} has model_max_length = {limit!r:.80}, which is no text length; download it again")
    return tokenizer


def _unreadable(folder: str | Path, error: Exception) -> str:
    """Say that a tokenizer cannot be read, and why; for a lone spiece.model, transformers would lead astray."""
    reason, advice = " ".join(str(error).split())[:120], "download the folder again"
    if not (Path(folder) / "tokenizer.json").exists() and (Path(folder) / "spiece.model").exists():
        reason = "its spiece.model is damaged, or sentencepiece or protobuf is not installed"
        advice = "pip install sentencepiece protobuf, or download tokenizer.json beside it"
    return f"the tokenizer in {folder} cannot be read ({reason}); {advice}"
