"""Generates bad inputs for sample.py: what each needs is written into a folder, and its flags are returned.

The same inputs come out every time. Nothing is read from the model before an input is made.
"""

import json
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from iclora.config import LAST_SEED

PROMPT = "[IMAGE1] a red fish, [IMAGE2] the same red fish in the snow"
SMALL = ["--device", "cpu", "--grid", "1x2", "--mask", "2", "--panel-size", "16", "--steps", "1", "--prompt", PROMPT]
RECORD = {
    "grid": "1x2",
    "mask": "2",
    "panels": [],
    "set": None,
    "prompt": PROMPT,
    "panel_prompt": [],
    "preset": None,
    "model": "tiny",
    "steps": 1,
    "guidance": 3.5,
    "seed": 0,
    "num": 1,
    "panel_size": "16",
    "strength": 1.0,
    "fit": "crop",
    "device": "cpu",
    "dtype": "float32",
    "tile": False,
}
DEEP = b"[" * 200_000
JUNK = random.Random(1).randbytes(3000)

Damage = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Case:
    """One bad input.

    make: (an empty folder, the folder of the tiny model) -> the command line
    doubtful: True where the damage may leave a valid input, which may then give a whole picture
    """

    name: str
    make: Callable[[Path, Path], list[str]]
    doubtful: bool = False


def cases() -> list[Case]:
    """Lists all bad inputs."""
    groups = (flags, prompts, pictures, panels, references, records, jobs, folders)
    return [case for group in groups for case in group()]


# ways to do damage


def cut(part: float) -> Damage:
    """Cuts a file short: to a part of it, or by so many bytes if that is negative."""
    return lambda data: data[: int(part * len(data)) if part >= 0 else int(part)]


def flip(part: float, bit: int = 0) -> Damage:
    """Flips one bit of the byte at a part of a file."""
    return lambda data: flipped(data, int(part * len(data)), bit)


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def parts(count: int, seed: str) -> list[float]:
    draw = random.Random(seed)
    return [round((i + draw.random()) / count, 4) for i in range(count)]


def put(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def small(*more: str) -> Callable[[Path, Path], list[str]]:
    return lambda folder, model: [*SMALL, *more]


def panel(data: bytes, name: str = "a.png") -> Callable[[Path, Path], list[str]]:
    return lambda folder, model: [*SMALL, "--panels", put(folder / name, data)]


def config(data: bytes) -> Callable[[Path, Path], list[str]]:
    return lambda folder, model: ["--config", put(folder / "0001.json", data)]


def recorded(**values) -> Callable[[Path, Path], list[str]]:
    return config(json.dumps({"config": {**RECORD, **values}}).encode())


# the command line


def flags() -> Iterator[Case]:
    valueless = ["--grid", "--mask", "--panels", "--ref", "--steps", "--out", "--config", "--prompt"]
    wrong = {
        "--grid": [
            "",
            "0x1",
            "1x0",
            "2",
            "x",
            "2*2",
            "2x2x2",
            "-1x2",
            "1e3x1",
            "65x1",
            "9x9",
            "9999x9999",
            "2x2\0",
            "9" * 5000 + "x1",
            "\udcff",
        ],
        "--mask": [
            "",
            " ",
            "0",
            "3",
            "1-3",
            "2-1",
            "1,,2",
            ",",
            "abc",
            "1.5",
            "-1",
            "1-2-3",
            "9" * 30,
            "1;2",
            "\udc80",
        ],
        "--panel-size": [
            "",
            "0",
            "-64",
            "15",
            "17",
            "16x",
            "x16",
            "16x16x16",
            "8208",
            "999999",
            "1000000",
            "1e2",
            "nan",
        ],
        "--steps": ["", "0", "-1", "1001", "1e3", "1.5", "nan", "inf", "9" * 5000, "0x10", "two", "1\0"],
        "--seed": ["", "-1", str(LAST_SEED + 1), "1e9", "9" * 400, "nan", "\udc80"],
        "--num": ["", "0", "-5", "10001", "1.0", "9" * 100],
        "--guidance": ["", "-0.1", "100.1", "nan", "inf", "-inf", "1e400", "9" * 5000, "strong", "3,5"],
        "--strength": ["", "-0.1", "1.01", "nan", "inf", "1e-320x", "half", "0", "1e-9", "0.5"],
        "--fit": ["", "CROP", "squash", "\0"],
        "--ref-size": ["", "0", "15", "-64", "2049", "64x64", "1e2", "nan", "9" * 5000],
        "--offset": ["", "D", "x", "dh", "\0"],
        "--offset-scale": ["", "-1", "101", "nan", "inf", "1e400", "far"],
        "--posterior": ["", "mode", "MEAN"],
        "--reference-attention": ["", "ALONE", "together"],
        "--schedule": ["", "uno", "tokens "],
        "--dtype": ["", "float8", "int8", "float64", "torch.float32"],
        "--device": ["", "gpu", "cuda:9", "tpu", "meta"],
        "--preset": ["", "film", "x" * 10_000, "film-storyboard\n"],
    }
    lines = [
        ["--stpes", "3"],
        ["--ste", "3"],
        ["stray"],
        ["a.png", "b.png"],
        ["--tile=yes"],
        ["--help=1"],
        ["-x"],
        ["-1"],
        ["--", "x"],
        ["@args"],
        ["--\udcff"],
        ["--" + "x" * 100_000],
        ["\0"],
        ["--model", "tiny", "x"],
    ]
    for name in valueless:
        yield Case(f"{name} without a value", lambda folder, model, name=name: [*SMALL, name])
    for name, values in wrong.items():
        for value in values:
            yield Case(f"{name} {value[:20]!a}", small(f"{name}={value}"))
    for line in lines:
        yield Case(f"the arguments {ascii(line)[:30]}", small(*line))
    yield Case("a seed without room for two pictures", small("--seed", str(LAST_SEED), "--num", "2"))
    yield Case("a composite that is too wide", small("--grid", "1x64", "--panel-size", "512"))


def prompts() -> Iterator[Case]:
    bad = {
        "a NUL": "a\0b",
        "an escape": "\x1b[31mred",
        "a C1 control": "a \x9b b",
        "a delete": "\x7f",
        "control characters": "".join(map(chr, range(1, 32))),
        "a lone surrogate": "a \ud800 b",
        "bytes that are no UTF-8": b"\xff\xfe a".decode(errors="surrogateescape"),
        "random bytes": JUNK.decode(errors="surrogateescape"),
        "20,001 characters": "a" * 20_001,
        "a megabyte": "a b " * 2**18,
    }
    odd = {
        "spaces": " \n ",
        "emoji and private characters": "\U0001f41f\ue000\U0010ffff\ufeff\u202e" * 50,
        "the tokenizers' own words": "</s><pad><|endoftext|><unk>[IMAGE1][IMAGE3]",
        "20,000 characters": "red fish " * 2222,
    }
    for name, text in bad.items():
        yield Case(f"a prompt of {name}", small("--prompt", text))
        yield Case(f"a panel prompt of {name}", small("--panel-prompt", "a", text))
    for name, text in odd.items():
        yield Case(f"a prompt of {name}", small("--prompt", text), doubtful=True)
    for count in (1, 3, 65, 5000):
        yield Case(f"{count} panel prompts for 2 panels", small("--panel-prompt", *["a"] * count))


# pictures and panels


def picture(kind: str, size: tuple[int, int] = (40, 24), **options) -> bytes:
    pixels = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *extra: bytes, depth: int = 8, colour: int = 2, pixels: bytes = b"\0" * 99) -> bytes:
    """A PNG whose header may say anything; its checksums are right."""
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + b"".join(extra) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def pictures() -> Iterator[Case]:
    whole = {kind: picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
    for kind, cuts, flips in (("PNG", 12, 12), ("JPEG", 8, 2), *((kind, 3, 1) for kind in list(whole)[2:])):
        for part in (-1, *parts(cuts, kind)):
            yield Case(f"{kind} cut at {part}", panel(cut(part)(whole[kind])))
        for i, part in enumerate(parts(flips, kind + "flip")):
            yield Case(f"{kind} flipped at {part}", panel(flip(part, i % 8)(whole[kind])), doubtful=kind != "PNG")
    for place in (0, 8, 12, 16, 24, 29, 33, 37, len(whole["PNG"]) - 12, len(whole["PNG"]) - 1):
        yield Case(f"PNG flipped at byte {place}", panel(flipped(whole["PNG"], place, 4)))
    for place in range(3):
        yield Case(f"JPEG flipped at byte {place}", panel(flipped(whole["JPEG"], place, 4)))
    for side in (10_001, 100_000, 2**31 - 1, 2**32 - 1):
        yield Case(f"PNG that claims {side} a side", panel(png(side, side)))
    bomb = zlib.compress(b"\0" * 200_000_000)
    jpeg, gif, bmp = whole["JPEG"], bytearray(whole["GIF"]), bytearray(whole["BMP"])
    frame = jpeg.index(b"\xff\xc0") + 5
    gif[6:10], bmp[18:26] = b"\xff" * 4, struct.pack("<ii", 100_000, 100_000)
    others = {
        "JPEG that claims 65,535 a side": jpeg[:frame] + b"\xff" * 4 + jpeg[frame + 4 :],
        "GIF that claims 65,535 a side": bytes(gif),
        "BMP that claims 100,000 a side": bytes(bmp),
        "PNG of no size": png(0, 0),
        "PNG of no height": png(40, 0),
        "PNG narrower than 32:1": picture("PNG", (400, 2)),
        "PNG with too few pixels": png(40, 24),
        "PNG of a wrong depth": png(4, 4, depth=7),
        "PNG of a wrong colour type": png(4, 4, colour=5),
        "PNG without pixels": whole["PNG"][:33],
        "PNG with a text bomb": png(5, 5, chunk(b"zTXt", b"a\0\0" + bomb)),
        "nothing": b"",
        "text": b"a red fish\n",
        "random bytes": JUNK,
        "zeros": bytes(5000),
        "a web page": b"<!DOCTYPE html><title>404</title>",
        "a PDF": b"%PDF-1.4\n%%EOF",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9",
        "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "PNG's first bytes alone": whole["PNG"][:8],
    }
    for name, data in others.items():
        yield Case(f"a panel that is {name}", panel(data))
    odd = {
        "too many pixels": png(5, 5, pixels=b"\0" * 200_000_000),
        "a profile bomb": png(5, 5, chunk(b"iCCP", b"a\0\0" + bomb)),
        "10,000 chunks": png(5, 5, *[chunk(b"tEXt", b"a\0b")] * 10_000),
        "an unknown critical chunk": png(5, 5, chunk(b"ABCD", b"")),
    }
    for name, data in odd.items():
        yield Case(f"PNG with {name}", panel(data), doubtful=True)


SPECIAL = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a fifo": lambda path: os.mkfifo(path),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "an empty device": lambda path: path.symlink_to("/dev/null"),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a file of the kernel": lambda path: path.symlink_to("/proc/self/mem"),
}


def special(what: str, name: str, argv: Callable[[Path], list[str]]) -> Callable[[Path, Path], list[str]]:
    """Puts something at a path that is no file; argv gives the flags for the folder."""

    def make(folder: Path, model: Path) -> list[str]:
        (folder / name).parent.mkdir(exist_ok=True)
        SPECIAL[what](folder / name)
        return argv(folder)

    return make


def panels() -> Iterator[Case]:
    def from_set(folder: Path) -> list[str]:
        return [*SMALL[:-2], "--set", str(folder / "set")]  # without --prompt, so that the caption is needed

    good = picture("PNG")
    for what in SPECIAL:
        yield Case(f"a panel that is {what}", special(what, "a.png", lambda f: [*SMALL, "--panels", str(f / "a.png")]))
        yield Case(f"a set that is {what}", special(what, "set", from_set))
        prompted = special(what, "set/1.png", lambda f: [*from_set(f), "--prompt", PROMPT])
        yield Case(f"a set whose panel is {what}", prompted)
        caption = special(what, "set/caption.txt", from_set)
        yield Case(f"a set whose caption is {what}", lambda f, m, c=caption: put(f / "set/1.png", good) and c(f, m))
    for name in ("a\0b", "a" * 300, "a/" * 3000, "a\nb", "\udcff", "", ".", "/dev/stdin/x"):
        yield Case(f"a panel named {ascii(name)[:20]}", small("--panels", name))
        yield Case(f"a set named {ascii(name)[:20]}", small(f"--set={name}"))
    for count in (3, 4, 65, 3000):
        yield Case(f"{count} panels for 2", lambda f, m, n=count: [*SMALL, "--panels", *[put(f / "a.png", good)] * n])
    yield Case("one draft for 2 panels", lambda f, m: [*SMALL, "--strength", "0.5", "--panels", put(f / "a.png", good)])
    yield Case("panels and a set", lambda f, m: [*SMALL, "--set", str(f), "--panels", put(f / "1.png", good)])
    yield Case("a grid without an example", lambda f, m: [*SMALL, "--grid", "5x7"])
    sets = {
        "the same number twice": {"1.png": good, "01.png": good},
        "other names": {"a.png": good},
        "a binary caption": {"1.png": good, "caption.txt": JUNK},
        "an empty picture": {"1.png": b"", "caption.txt": b"a"},
        "a caption of a megabyte": {"1.png": good, "caption.txt": b"red fish " * 2**17},
        "a caption with a NUL": {"1.png": good, "caption.txt": b"a\0b"},
        "5 panels": {"caption.txt": b"a", **{f"{i}.png": good for i in range(5)}},
    }
    for name, files in sets.items():

        def make(folder: Path, model: Path, files: dict[str, bytes] = files) -> list[str]:
            for file, data in files.items():
                put(folder / "set" / file, data)
            return from_set(folder)

        yield Case(f"a set with {name}", make)


# references


def references() -> Iterator[Case]:
    good = picture("PNG")
    for what in SPECIAL:
        yield Case(f"a reference that is {what}", special(what, "a.png", lambda f: [*SMALL, "--ref", str(f / "a.png")]))
    for name in ("a\0b", "a" * 300, "a/" * 3000, "a\nb", "\udcff", "", "."):
        yield Case(f"a reference named {ascii(name)[:20]}", small("--ref", name))
    bad = {
        "empty": b"",
        "cut short": cut(0.5)(good),
        "random bytes": JUNK,
        "of 100,000 a side": png(100_000, 100_000),
        "of no size": png(0, 0),
        "narrower than 32:1": picture("PNG", (400, 2)),
        "narrower than a token": picture("PNG", (400, 40)),
        "higher than a token is wide": picture("PNG", (30, 900)),
    }
    for name, data in bad.items():
        yield Case(f"a reference {name}", lambda f, m, data=data: [*SMALL, "--ref", put(f / "a.png", data)])
    second = lambda f, m: [*SMALL, "--ref", put(f / "a.png", good), str(f / "b.png")]  # noqa: E731
    yield Case("a second reference that is missing", second)
    for count, size in ((4200, "64"), (50, "2048")):

        def make(folder: Path, model: Path, count: int = count, size: str = size) -> list[str]:
            return [*SMALL, "--ref-size", size, "--ref", *[put(folder / "a.png", picture("PNG", (16, 16)))] * count]

        yield Case(f"{count} references of {size} pixels", make)


# records to replay


def records() -> Iterator[Case]:
    whole = json.dumps({"config": RECORD}, indent=2).encode()
    for part in (-1, *parts(9, "record")):
        yield Case(f"a record cut at {part}", config(cut(part)(whole)))
    for i, part in enumerate(parts(9, "record flip")):
        yield Case(f"a record flipped at {part}", config(flip(part, i % 8)(whole)), doubtful=True)
    contents = {
        "nothing": b"",
        "a list": b"[]",
        "null": b"null",
        "a text": b'"config"',
        "a number": b"1",
        "no config": b"{}",
        "a list as config": b'{"config": []}',
        "random bytes": JUNK,
        "a picture": picture("PNG"),
        "nesting without end": DEEP,
        "nesting inside": b'{"config": {"prompt": ' + DEEP,
        "closed nesting": b'{"config": {"panels": ' + DEEP + b"]" * len(DEEP) + b"}}",
        "two objects": whole + whole,
        "UTF-16": whole.decode().encode("utf-16"),
        "101 megabytes": whole + b" " * 101_000_000,
        "a number of 5,000 digits": b'{"config": {"seed": ' + b"9" * 5000 + b"}}",
    }
    for name, data in contents.items():
        yield Case(f"a record of {name}", config(data))
    text = chunk(b"tEXt", b"config\0" + json.dumps(RECORD).encode())
    whole = png(5, 5, text, pixels=b"\0" * 80)
    for part in parts(4, "picture record"):
        yield Case(f"a picture to replay cut at {part}", config(cut(part)(whole)))
    inside = {
        "no JSON": b"{",
        "a list": b"[]",
        "nesting without end": DEEP,
        "a seed that is none": json.dumps({**RECORD, "seed": "x"}).encode(),
        "an unknown option": json.dumps({**RECORD, "unknown": 1}).encode(),
    }
    for what, data in inside.items():
        yield Case(f"a picture to replay with {what}", config(png(5, 5, chunk(b"tEXt", b"config\0" + data))))
    bomb = chunk(b"zTXt", b"config\0\0" + zlib.compress(b" " * 200_000_000))
    yield Case("a picture to replay with a text bomb", config(png(5, 5, bomb)))
    for what in SPECIAL:
        yield Case(f"a record that is {what}", special(what, "a.json", lambda f: ["--config", str(f / "a.json")]))
    wrong = [(text, 1) for text in ("grid", "mask", "set", "prompt", "preset", "model", "panel_size", "fit", "device")]
    wrong += [(number, "1") for number in ("steps", "guidance", "seed", "num", "strength")]
    wrong += [(path, 1) for path in ("out", "config", "jobs")]
    wrong += [
        ("panels", "a.png"),
        ("panels", [None]),
        ("panels", ["\0"]),
        ("panels", ["\ud800.png"]),
        ("panels", [""]),
        ("panel_prompt", [1]),
        ("panel_prompt", ["a"]),
        ("set", "\0"),
        ("prompt", "\ud800"),
        ("prompt", "a" * 100_000),
        ("steps", True),
        ("steps", 1.0),
        ("steps", 10**4000),
        ("seed", -1),
        ("seed", 2**70),
        ("num", 0),
        ("guidance", float("nan")),
        ("guidance", float("inf")),
        ("guidance", 10**4000),
        ("strength", float("-inf")),
        ("model", {}),
        ("model", None),
        ("model", "a\0b"),
        ("model", "\ud800"),
        ("dtype", ["float32"]),
        ("tile", 0),
        ("tile", None),
        ("strength", 0),
        ("grid", "\ud800"),
        ("grid", []),
        ("mask", None),
        ("mask", "9"),
        ("preset", "\0"),
        ("device", "meta"),
        ("panel_size", "a" * 100_000),
        ("unknown", 1),
        ("", None),
        ("unknown\n" * 50, 1),
        ("ref", "a.png"),
        ("ref", [None]),
        ("ref", ["\0"]),
        ("ref", [""]),
        ("ref_size", "64"),
        ("ref_size", 10**4000),
        ("offset", 1),
        ("offset", "x"),
        ("offset_scale", "1"),
        ("offset_scale", float("nan")),
        ("posterior", True),
        ("schedule", 5),
    ]
    for name, value in wrong:
        shown = value if not isinstance(value, int) or value < 10**9 else f"of {len(str(value))} digits"
        yield Case(f"a record with {name[:12]!a} {shown!a:.20}", recorded(**{name: value}))


# many requests


def jobs() -> Iterator[Case]:
    def rows(data: bytes) -> Callable[[Path, Path], list[str]]:
        return lambda folder, model: [*SMALL, "--jobs", put(folder / "jobs.jsonl", data)]

    for what in SPECIAL:
        yield Case(f"jobs that are {what}", special(what, "a.jsonl", lambda f: [*SMALL, "--jobs", str(f / "a.jsonl")]))
    contents = {
        "nothing": b"",
        "blank lines": b"\n \n",
        "random bytes": JUNK,
        "UTF-16": "{}".encode("utf-16"),
        "nesting without end": DEEP,
        "a row cut short": b'{"seed": 1}\n{"seed": ',
        "a list": b"[]",
        "a text": b'"a"',
        "a NUL": b"\0",
        "a picture": picture("PNG"),
        "a number of 5,000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
        "an unknown option": b'{}\n{"unknown": 1}',
        "a wrong type": b'{}\n{"steps": "1"}',
        "a wrong grid": b'{}\n{"grid": "0x1"}',
        "a missing panel": b'{}\n{"panels": ["nowhere.png"]}',
        "a lone surrogate": b'{"prompt": "\\ud800"}',
        "another model": b'{"model": "tiny"}',
        "jobs of its own": b'{"jobs": "jobs.jsonl"}',
    }
    for what, data in contents.items():
        yield Case(f"jobs of {what}", rows(data))


# where the files go


def folders() -> Iterator[Case]:
    names = {
        "a file": "file",
        "below a file": "file/out",
        "a device": "/dev/null",
        "below a device": "/dev/full/out",
        "a dangling link": "link",
        "below a dangling link": "link/out",
        "a link to itself": "loop",
        "a fifo": "fifo",
        "a name too long": "a" * 300,
        "a path too long": "a/" * 3000,
        "a NUL": "a\0b",
    }
    for what, name in names.items():

        def make(folder: Path, model: Path, name: str = name) -> list[str]:
            put(folder / "file", b"mine")
            (folder / "link").symlink_to("nowhere")
            (folder / "loop").symlink_to("loop")
            os.mkfifo(folder / "fifo")
            return [*SMALL, "--out", str(folder / name)]

        yield Case(f"an output folder that is {what}", make)
    yield Case("an output folder of the kernel", small("--out", "/proc/out"))
