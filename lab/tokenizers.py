"""The tiny model's two tokenizers, made from captions: sentencepiece for T5, byte-pair encoding for CLIP."""

import json
import re
from pathlib import Path

import sentencepiece
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

T5_LENGTH = 64  # tokens a prompt is padded or cut to; the longest caption of the lab takes 63
CLIP_LENGTH = 77
BATCH = 4096  # captions that are tokenized at once; more take memory, and fewer the time of other cores
SMALLER = {**{c: c.lower() for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}, "\t": " ", "\n": " "}
MARKER = re.compile(r"\[[A-Z0-9-]+\]")
LETTERS = "9876543210zyxwvutsrqponmlkjihgfedcba"  # a stands last: at the start of a word it is the word "a"
ALPHABET = f"{LETTERS} {' '.join(LETTERS)} . , : ; ! ? ' \" ( ) [ ] < > - "


def make_t5_tokenizer(captions: list[str], folder: Path) -> T5Tokenizer:
    """Make a sentencepiece vocabulary in which every word of the captions is one piece, and markers are symbols.

    Capitals are read as small letters, outside markers. Other words are spelled in letters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for caption in captions for word in re.findall(r"[a-z]+", MARKER.sub(" ", caption))})
    markers = sorted({mark for caption in captions for mark in MARKER.findall(caption)})
    rules = folder / "rules.tsv"
    rules.write_text("".join(f"{ord(a):X}\t{ord(b):X}\n" for a, b in SMALLER.items()))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([ALPHABET] * 50), model_prefix=str(folder / "spiece"), model_type="unigram",
        vocab_size=2000, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0,
        user_defined_symbols=markers + ["\u2581" + word for word in words], normalization_rule_tsv=str(rules),
        minloglevel=2,
    )  # fmt: skip
    rules.unlink()
    (folder / "spiece.vocab").unlink()
    tokenizer = T5Tokenizer.from_pretrained(str(folder), extra_ids=0, model_max_length=T5_LENGTH)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in markers])
    tokenizer.save_pretrained(str(folder))
    return T5Tokenizer.from_pretrained(str(folder))


def token_ids(tokenizer: T5Tokenizer | CLIPTokenizer, captions: list[str]) -> Tensor:
    """Tokenize captions, each padded or cut to the tokenizer's own length: (N, T)."""
    parts = [captions[i : i + BATCH] for i in range(0, len(captions), BATCH)]
    settings = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return torch.cat([tokenizer(part, **settings).input_ids for part in parts])


def make_clip_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """Train byte-pair merges in CLIP's form: lower case, end-of-word marks, end of text as the last and padding id."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_clip_words(), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([*captions, *[ALPHABET] * 50], trainer)
    trained = json.loads(bpe.to_str())["model"]
    pieces = sorted(set(trained["vocab"]) | {letter + "</w>" for letter in alphabet})
    specials = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate([*(p for p in pieces if p not in specials), *specials])}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in trained["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=CLIP_LENGTH)
    tokenizer.save_pretrained(str(folder))
    return CLIPTokenizer.from_pretrained(str(folder))


def _clip_words():
    return Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
