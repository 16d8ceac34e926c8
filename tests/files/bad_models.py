"""Generates bad model folders for sample.py: the tiny model with one file damaged or replaced."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from bad_inputs import DEEP, JUNK, SMALL, SPECIAL, Case, Damage, cut, flip, flipped, parts, picture

FLUX, AE = "flux1-tiny.safetensors", "ae.safetensors"
CLIP, T5 = "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"
WEIGHTS = {"transformer": FLUX, "autoencoder": AE, "clip": CLIP, "t5": T5}


def damaged(name: str, damage: Damage | None) -> Callable[[Path, Path], list[str]]:
    """A copy of the model with one file damaged, or gone."""

    def make(folder: Path, model: Path) -> list[str]:
        for path in copied(folder, model):
            if path.relative_to(folder / "model").as_posix() == name:
                data = path.read_bytes()
                path.unlink()
                if damage is not None:
                    path.write_bytes(damage(data))
        return [*SMALL, "--model", str(folder / "model")]

    return make


def copied(folder: Path, model: Path) -> Iterator[Path]:
    """Copies the model as links, which are given one by one."""
    for path in sorted(model.rglob("*")):
        if path.is_file() and not path.is_relative_to(model / "examples"):
            link = folder / "model" / path.relative_to(model)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
            yield link


def cases() -> list[Case]:
    """Lists all bad models."""
    return [case for group in (files, headers, tensors, shards, text, paths) for case in group()]


def find(content: dict[str, Tensor], key: str) -> str:
    return key if key in content else key.removeprefix("text_model.")


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def in_header(part: float, bit: int) -> Damage:
    """Flips a bit of the tensors' entries: the header's end, without the metadata, whose words may be any."""
    return lambda data: flipped(data, header_end(data) - 1 - int(part * 2000), bit)


def in_data(part: float, bit: int) -> Damage:
    """Flips a bit behind the header."""
    return lambda data: flipped(data, int(header_end(data) + part * (len(data) - header_end(data))), bit)


def files() -> Iterator[Case]:
    for kind, name in WEIGHTS.items():
        for size in (0, 8, 9):
            yield Case(f"{kind} of {size} bytes", damaged(name, lambda data, size=size: data[:size]))
        for more in (-1, 0):
            at_end = damaged(name, lambda data, more=more: data[: header_end(data) + more])
            yield Case(f"{kind} cut at its header's end {more:+}", at_end)
        for part in (-1, -4096, *parts(2, kind)):
            yield Case(f"{kind} cut at {part}", damaged(name, cut(part)))
        yield Case(f"{kind} with a byte too many", damaged(name, lambda data: data + b"\0"))
        for place in (0, 3, 6, 7):
            yield Case(f"{kind} flipped at byte {place}", damaged(name, lambda d, p=place: flipped(d, p, p % 7)))
        for i, part in enumerate(parts(2, kind + "header")):
            yield Case(f"{kind} flipped in its header at {part}", damaged(name, in_header(part, i % 8)))
        for part in parts(1, kind + "data"):
            yield Case(f"{kind} flipped in its data at {part}", damaged(name, in_data(part, 6)), doubtful=True)
    whole = {
        "GGUF": b"GGUF\x03" + JUNK,
        "a zip of pickles": b"PK\x03\x04" + JUNK,
        "a pickle": b"\x80\x04\x95" + JUNK,
        "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "random bytes": JUNK,
        "a web page": b"<!DOCTYPE html>",
        "JSON": b"{}",
        "a picture": picture("PNG"),
        "zeros": bytes(10_000),
    }
    for i, (what, data) in enumerate(whole.items()):
        for kind in ("transformer", list(WEIGHTS)[1 + i % 3]):
            yield Case(f"{kind} that is {what}", damaged(WEIGHTS[kind], lambda _, data=data: data))
    for what in ("a folder", "a fifo", "an endless device", "a dangling link"):
        for kind, name in WEIGHTS.items():
            yield Case(f"{kind} that is {what}", replaced(name, what))


def replaced(name: str, what: str) -> Callable[[Path, Path], list[str]]:
    """A copy of the model with one file replaced by something that is no file."""

    def make(folder: Path, model: Path) -> list[str]:
        argv = damaged(name, None)(folder, model)
        SPECIAL[what](folder / "model" / name)
        return argv

    return make


def headers() -> Iterator[Case]:
    def header(change: Callable[[dict], object]) -> Damage:
        def damage(data: bytes) -> bytes:
            content = json.loads(data[8 : header_end(data)])
            changed = change(content)
            new = content if changed is None else changed
            new = new if isinstance(new, bytes) else json.dumps(new).encode()
            return struct.pack("<Q", len(new)) + new + data[header_end(data) :]

        return damage

    def entry(**values) -> Damage:
        return header(lambda content: content["img_in.weight"].update(values))

    def other(value: object) -> Damage:
        return header(lambda content: content.update({"img_in.weight": value}))

    damages = {
        f"a length of {size}": lambda data, size=size: struct.pack("<Q", size) + data[8:]
        for size in (0, 1, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1)
    }
    shapes = [
        [],
        [64],
        [0, 64],
        [-64, -64],
        [2**59, 2**59],
        [1.5, 64],
        [True, 64],
        ["64", 64],
        None,
        "64",
        {},
        [[64, 64]],
        [2**63, 2],
        [1] * 10_000,
    ]
    damages |= {f"the shape {str(shape)[:20]}": entry(shape=shape) for shape in shapes}
    dtypes = ["F32", "F64", "Q4", "bf16", "", None, 16, ["BF16"], {}]
    damages |= {f"the dtype {dtype!r}": entry(dtype=dtype) for dtype in dtypes}
    offsets = [
        [0, 0],
        [0],
        [0, 2, 4],
        [-2, 0],
        [4, 2],
        [2**60],
        [2**80, 2**81],
        None,
        "01",
        {},
        [None, None],
        [0.0, 8192.0],
    ]
    damages |= {f"the offsets {str(pair)[:20]}": entry(data_offsets=pair) for pair in offsets}
    damages |= {f"the entry {str(value)[:20]}": other(value) for value in (None, 1, "x", [], {}, [[]], {"shape": []})}
    damages |= {
        "a list": header(lambda content: []),
        "nothing": header(lambda content: b""),
        "null": header(lambda content: b"null"),
        "no tensors": header(lambda content: {}),
        "nesting without end": header(lambda content: DEEP),
        "nesting in an entry": header(lambda content: b'{"a": ' + DEEP + b"]" * len(DEEP) + b"}"),
        "random bytes": header(lambda content: b"{" + JUNK),
        "Latin-1": header(lambda content: b'{"\xe9": 1}'),
        "a number of 5,000 digits": header(lambda content: b'{"a": ' + b"9" * 5000 + b"}"),
        "two tensors in one place": header(lambda content: content.update({"img_in.bias": content["img_in.weight"]})),
        "a tensor less": header(lambda content: content.popitem() and None),
    }
    for what, damage in damages.items():
        yield Case(f"a transformer whose header has {what}", damaged(FLUX, damage))


def with_tensors(name: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path, Path], list[str]]:
    """The model with other tensors in a file: those that change returns, or else what it did to the given ones."""

    def damage(data: bytes) -> bytes:
        content = load(data)
        changed = change(content)
        return save(changed if isinstance(changed, dict) else content)

    return damaged(name, damage)


def each(convert: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda content: {name: convert(tensor) for name, tensor in content.items()}


def swapped(name: str, other: str) -> Callable[[Path, Path], list[str]]:
    return lambda folder, model: damaged(name, lambda data: (model / other).read_bytes())(folder, model)


def tensors() -> Iterator[Case]:
    keys = {
        FLUX: [
            "img_in.weight",
            "final_layer.linear.weight",
            "vector_in.in_layer.weight",
            "guidance_in.in_layer.weight",
            "double_blocks.0.img_attn.norm.query_norm.scale",
        ],
        AE: [
            "encoder.conv_in.weight",
            "encoder.conv_out.weight",
            "decoder.conv_out.bias",
            "encoder.down.1.block.0.conv1.weight",
        ],
        CLIP: [
            "text_model.embeddings.token_embedding.weight",
            "text_model.embeddings.position_embedding.weight",
            "text_model.encoder.layers.0.mlp.fc1.weight",
            "text_model.final_layer_norm.bias",
        ],
        T5: [
            "shared.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "encoder.final_layer_norm.weight",
        ],
    }
    other = {
        "int8": lambda t: t.to(torch.int8),
        "fp8": lambda t: t.to(torch.float8_e4m3fn),
        "bool": lambda t: t > 0,
        "no rows": lambda t: t[:0],
        "half its rows": lambda t: t[: len(t) // 2].clone(),
        "one more dimension": lambda t: t[None],
        "one number": lambda t: t.flatten()[0].clone(),
    }
    for turn, (name, wanted) in enumerate(keys.items()):
        for key in wanted:
            dropped = with_tensors(name, lambda content, key=key: content.pop(find(content, key)) is None)
            yield Case(f"{name} without {key[-28:]}", dropped)
        for i, (what, convert) in list(enumerate(other.items()))[turn % 2 :: 2]:

            def change(content: dict[str, Tensor], key: str = wanted[i % len(wanted)], convert=convert) -> None:
                content[find(content, key)] = convert(content[find(content, key)])

            made = with_tensors(name, change)
            yield Case(f"{name} whose {wanted[i % len(wanted)][-28:]} has {what}", made, doubtful=what == "fp8")
        fp8 = with_tensors(name, each(lambda tensor: tensor.to(torch.float8_e5m2)))
        yield Case(f"{name} of fp8", fp8, doubtful=True)
        yield Case(f"{name} without names", with_tensors(name, lambda c: {str(i): t for i, t in enumerate(c.values())}))
        added = with_tensors(name, lambda content: content.update({"more\x1b[31m\n": torch.ones(1)}))
        yield Case(f"{name} with a tensor more", added)
        yield Case(f"{name} as another part", swapped(name, T5 if name != T5 else CLIP))
    for name in (FLUX, CLIP):
        yield Case(f"{name} of NaN", with_tensors(name, each(lambda tensor: torch.full_like(tensor, torch.nan))))
    yield Case("T5 in float64", with_tensors(T5, each(Tensor.double)), doubtful=True)
    yield Case("a transformer of zeros", with_tensors(FLUX, each(torch.zeros_like)), doubtful=True)
    adapters = {
        "a LoRA": "lora_unet_single_blocks_0_linear1.lora_down.weight",
        "a ControlNet": "controlnet_blocks.0.weight",
        "a diffusers transformer": "transformer_blocks.0.norm1.linear.weight",
        "FLUX.2": "double_stream_modulation_img.lin.weight",
    }
    for what, key in adapters.items():
        yield Case(f"{what} as transformer", with_tensors(FLUX, lambda c, key=key: {key: torch.ones(4, 4)}))
    blocks = {"without its first block": "double_blocks.0.", "without its second single block": "single_blocks.1."}
    for what, stem in blocks.items():

        def drop(content: dict[str, Tensor], stem: str = stem) -> dict[str, Tensor]:
            return {key: tensor for key, tensor in content.items() if not key.startswith(stem)}

        yield Case(f"a transformer {what}", with_tensors(FLUX, drop))


def shards() -> Iterator[Case]:
    index = "flux1-tiny.safetensors.index.json"
    contents = {
        "no file": {"a": "missing.safetensors"},
        "itself": {"a": index},
        "a file elsewhere": {"a": f"../model/{FLUX}"},
        "an absolute path": {"a": "/dev/zero"},
        "a folder": {"a": "text_encoder"},
        "nothing": {},
        "a number": {"a": 1},
        "a list": [FLUX],
        "no map": None,
        "a NUL": {"a": "\0"},
        "a lone surrogate": {"a": "\udcff"},
        "an empty name": {"a": ""},
        "the autoencoder too": {"a": FLUX, "b": AE},
        "the transformer twice": {"a": FLUX, "b": "./" + FLUX},
    }
    raw = {what: json.dumps({"weight_map": names}).encode() for what, names in contents.items()}
    raw |= {"random bytes": JUNK, "nesting without end": DEEP, "no bytes": b"", "half a map": b'{"weight_map": {"a'}
    for what, data in raw.items():

        def make(folder: Path, model: Path, data: bytes = data) -> list[str]:
            argv = damaged("", None)(folder, model)
            (folder / "model" / index).write_bytes(data)
            return argv

        yield Case(f"an index of {what}", make, doubtful=what == "the transformer twice")

    def two(folder: Path, model: Path) -> list[str]:
        argv = damaged("", None)(folder, model)
        (folder / "model" / "flux1-other.safetensors").symlink_to(model / FLUX)
        return argv

    yield Case("two transformers in one folder", two)


def text() -> Iterator[Case]:
    def changed(name: str, **values) -> Callable[[Path, Path], list[str]]:
        return damaged(name, lambda data: json.dumps({**json.loads(data), **values}).encode())

    files = [
        "tokenizer/tokenizer.json",
        "tokenizer_2/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer_2/tokenizer_config.json",
        "text_encoder/config.json",
        "text_encoder_2/config.json",
    ]
    for name in files:
        for part in parts(2, name):
            yield Case(f"{name} cut at {part}", damaged(name, cut(part)))
        for i, part in enumerate(parts(1, name + "flip")):
            yield Case(f"{name} flipped at {part}", damaged(name, flip(part, i % 7)), doubtful=True)
        for what, data in {"nothing": b"", "a list": b"[]", "nesting without end": DEEP}.items():
            yield Case(f"{name} of {what}", damaged(name, lambda _, data=data: data))
        yield Case(f"{name} of an empty object", damaged(name, lambda _: b"{}"), doubtful=True)
        for what in ("a folder", "a fifo"):
            yield Case(f"{name} that is {what}", replaced(name, what))
    wrong = [
        ("text_encoder", "hidden_act", "tanh"),
        ("text_encoder", "hidden_act", None),
        ("text_encoder", "num_attention_heads", 3),
        ("text_encoder", "num_attention_heads", 0),
        ("text_encoder", "num_attention_heads", 10**30),
        ("text_encoder", "layer_norm_eps", "x"),
        ("text_encoder", "layer_norm_eps", float("nan")),
        ("text_encoder", "text_config", {"hidden_act": []}),
        ("text_encoder_2", "feed_forward_proj", "x"),
        ("text_encoder_2", "feed_forward_proj", ["gelu"]),
        ("text_encoder_2", "layer_norm_epsilon", -1),
        ("text_encoder_2", "relative_attention_max_distance", 0),
        ("text_encoder_2", "relative_attention_max_distance", "128"),
    ]
    for folder, key, value in wrong:
        made = changed(f"{folder}/config.json", **{key: value})
        yield Case(f"{folder} with {key} {str(value)[:20]}", made, doubtful=value in ("tanh", "x"))
    for folder in ("tokenizer", "tokenizer_2"):
        for limit in (0, -1, "77", None, 1.5, []):
            made = changed(f"{folder}/tokenizer_config.json", model_max_length=limit)
            yield Case(f"{folder} with the limit {limit!s:.20}", made, doubtful=True)
        for key, value in (("eos_token", "no such token"), ("unk_token", None)):
            made = changed(f"{folder}/tokenizer_config.json", **{key: value})
            yield Case(f"{folder} with {key} {value!r:.20}", made, doubtful=True)
        code = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
        yield Case(f"{folder} with code of its own", changed(f"{folder}/tokenizer_config.json", **code), doubtful=True)
        for key in ("model", "added_tokens", "pre_tokenizer", "truncation"):
            made = changed(f"{folder}/tokenizer.json", **{key: {"type": "Unigram", "vocab": []}})
            yield Case(f"{folder} whose {key} is an empty vocabulary", made, doubtful=True)
    for name in WEIGHTS.values():
        yield Case(f"a model without {name}", damaged(name, None))


def paths() -> Iterator[Case]:
    names = [
        "nowhere",
        "",
        "/",
        "..",
        "tiny/nowhere",
        "a\0b",
        "a" * 300,
        "a/" * 3000,
        "\udcff",
        "a\nb",
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "black-forest-labs/FLUX.1-dev",
    ]
    for name in names:
        yield Case(f"a model named {ascii(name)[:30]}", lambda folder, model, name=name: [*SMALL, f"--model={name}"])
    for what in SPECIAL:

        def make(folder: Path, model: Path, what: str = what) -> list[str]:
            SPECIAL[what](folder / "model")
            return [*SMALL, "--model", str(folder / "model")]

        yield Case(f"a model that is {what}", make)
    for name in (AE, CLIP, T5, "tokenizer", "text_encoder", "tokenizer/tokenizer.json"):
        yield Case(f"{name} as model", lambda folder, model, name=name: [*SMALL, "--model", str(model / name)])
