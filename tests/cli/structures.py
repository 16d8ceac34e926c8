"""Generates inputs that are wrong by structure, for all four commands: a part of a header, of JSON or of a table is
another, gone, or one too many. hypothesis draws them, the same ones every time.
"""

import contextlib
import copy
import csv
import io
import json
import os
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import blackbox
from bad_inputs import RECORD, SMALL

ODD = st.one_of(
    st.sampled_from([
        None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -1.0, 1e300, float("nan"), float("inf"), "", " ", "\0",
        "\ud800", "\x1b[31m", "..", "../x.png", "/dev/zero", "C:\\x.png", "a/b\\c.png", "x" * 5000, "{}", "[]", "1x2",
        "F32", "U8", [], [[]], [None], [1, 2, 3], ["a"], {}, {"": None}, {"a": {"b": [1]}}, [0, 2**62], [-1, 5],
    ]),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.integers(-3, 99), max_size=3),
)  # fmt: skip
NAMES = ("__metadata__", "alpha", "image", "file_name")
WORDS = "picture of [IMAGE1] a red fish, [IMAGE2] the same fish in the snow"
FLAGS = [
    "--steps",
    "1",
    "--batch",
    "1",
    "--rank",
    "1",
    "--sample-every",
    "0",
    "--holdout",
    "0",
    "--decay",
    "0",
    "--device",
    "cpu",
]


@dataclass(frozen=True)
class Kind:
    """One kind of input that a command reads.

    document: what is whole
    write: (folder, document) -> the flags that read it from there
    """

    name: str
    command: str
    document: Any
    write: Callable[[Path, Any], list[str]]


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every part of a document: what holds it, and under which key."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from places(value)


@st.composite
def changed(draw: Callable, document: Any) -> Any:
    """The document with one to three of its parts replaced, removed, renamed, or one added."""
    root = [copy.deepcopy(document)]
    for _ in range(draw(st.integers(1, 3))):
        whole, *parts = places(root)
        parent, key = draw(st.sampled_from([*parts, whole]))
        action = draw(st.sampled_from(("replace", "replace", "remove", "rename", "add")))
        if action == "replace" or parent is root:
            parent[key] = draw(ODD)
        elif action == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, draw(ODD))
        else:
            name = draw(
                st.one_of(st.text(max_size=8), st.sampled_from(("__metadata__", "alpha", "image", "file_name")))
            )
            parent[name] = parent.pop(key) if action == "rename" else draw(ODD)
    return root[0]


# writers


def dumps(document: Any) -> bytes:
    return json.dumps(document).encode()


def packed(header: Any, data: int) -> bytes:
    """A safetensors file with any header; texts in its metadata that are JSON were objects in the document."""
    if isinstance(header, dict) and isinstance(about := header.get("__metadata__"), dict):
        inner = {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in about.items()}
        header = header | {"__metadata__": inner}
    text = dumps(header)
    return struct.pack("<Q", len(text)) + text + bytes(1 + i % 60 for i in range(data))


def header_of(path: Path) -> tuple[dict, int]:
    """The header of a file as a document, and how many bytes of data follow."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    about = header.get("__metadata__", {})
    for key, text in about.items():
        with contextlib.suppress(ValueError):
            about[key] = value if isinstance(value := json.loads(text), dict | list) else text
    return header, len(data) - 8 - size


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def picture(path: Path, width: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((width, 16), 60).convert("RGB").save(path)
    return path


def table(rows: Any) -> bytes:
    """A CSV of rows; what is none becomes a line of text."""
    out = io.StringIO()
    for row in rows if isinstance(rows, list) else [rows]:
        csv.writer(out).writerow(row if isinstance(row, list) else [row])
    return out.getvalue().encode(errors="surrogatepass")


# kinds


def kinds(world: Path) -> list[Kind]:
    """Every kind, with every command that reads it. world: a folder with a small model in it, see make_world"""
    model = ["--model", str(world / "model")]
    lora, lora_data = header_of(world / "lora.safetensors")
    peft = {"r": 2, "lora_alpha": 4, "rank_pattern": {"x_embedder": 4}, "alpha_pattern": {"blocks.0.attn": 1.0}}
    flux, _ = header_of(world / "model" / "flux1-small.safetensors")
    tensors = (world / "model" / "flux1-small.safetensors").read_bytes()
    tensors = tensors[8 + int.from_bytes(tensors[:8], "little") :]
    run, _ = header_of(world / "run" / "checkpoint.safetensors")
    state = (world / "run" / "checkpoint.safetensors").read_bytes()
    state = state[8 + int.from_bytes(state[:8], "little") :]
    sets = [
        {"panels": ["1.png", "2.png"], "grid": "1x2", "prompt": WORDS},
        {"image": "12.png", "grid": "1x2", "summary": "two pictures", "prompts": ["a fish", "the fish"]},
    ]
    pairs = [
        {"prompt": "a fish", "image_path": "1.png", "image_tgt_path": "2.png"},
        {"prompt": "a cat", "image_paths": ["1.png", "2.png"], "image_tgt_path": "1.png", "score": 3.5},
    ]
    of_hub = [["file_name", "text"], ["12.png", WORDS]]
    sample = [*SMALL, *model]
    train = [*FLAGS, *model, "--panel-size", "16"]

    def data(folder: Path) -> None:
        for name, width in (("1.png", 16), ("2.png", 16), ("12.png", 32)):
            picture(folder / "data" / name, width)

    def reads(prepare: Callable, *flags: str) -> Callable[[Path, Any], list[str]]:
        """Writes a document into data/ and gives the flags with it, or with the folder."""

        def write(folder: Path, document: Any) -> list[str]:
            data(folder)
            path = prepare(folder / "data", document)
            return [*flags, str(path)]

        return write

    def rows(folder: Path, document: Any) -> Path:
        lines = document if isinstance(document, list) else [document]
        return put(folder / "sets.jsonl", b"\n".join(map(dumps, lines)))

    def grid(folder: Path, document: Any) -> Path:
        put(folder / "12.txt", WORDS.encode())
        (folder / "1.png").unlink(), (folder / "2.png").unlink()
        put(folder / "set.json", dumps(document))
        return folder

    def one_json(folder: Path, document: Any) -> Path:
        return put(folder / "pairs.json", dumps(document))

    def hub(folder: Path) -> Path:
        (folder / "1.png").unlink(), (folder / "2.png").unlink()
        put(folder / "set.json", dumps({"grid": "1x2"}))
        return folder

    def hub_rows(folder: Path, document: Any) -> Path:
        head, *rest = document if isinstance(document, list) and document else [document]
        named = [
            dict(zip(map(str, head), row, strict=False)) if isinstance(row, list) and isinstance(head, list) else row
            for row in rest
        ]
        put(folder / "metadata.jsonl", b"\n".join(map(dumps, named)))
        return hub(folder)

    def hub_table(folder: Path, document: Any) -> Path:
        put(folder / "metadata.csv", table(document))
        return hub(folder)

    def lora_file(folder: Path, document: Any) -> Path:
        return put(folder / "l.safetensors", packed(document, lora_data))

    def peft_folder(folder: Path, document: Any) -> Path:
        (folder / "peft").mkdir()
        shutil.copy(world / "lora.safetensors", folder / "peft" / "adapter_model.safetensors")
        put(folder / "peft" / "adapter_config.json", dumps(document))
        return folder / "peft"

    def whole_model(folder: Path, document: Any) -> Path:
        for path in (world / "model").iterdir():
            if path.name != "flux1-small.safetensors":
                (folder / "m").mkdir(exist_ok=True)
                (folder / "m" / path.name).symlink_to(path.resolve())
        text = dumps(document)
        put(folder / "m" / "flux1-small.safetensors", struct.pack("<Q", len(text)) + text + tensors)
        return folder / "m"

    def begun(folder: Path, document: Any) -> Path:
        shutil.copytree(world / "run", folder / "run")
        put(folder / "run" / "checkpoint.safetensors", packed(document, 0) + state)
        return folder / "run"

    config = json.loads((world / "run" / "config.json").read_text())
    again = ["--data", str(world / "sets"), *train]
    further = reads(lora_file, *again, "--init-lora")
    found = [
        Kind("header of a LoRA", "sample", lora, reads(lora_file, *sample, "--lora")),
        Kind("header of a LoRA", "train", lora, further),
        Kind("PEFT's settings", "sample", peft, reads(peft_folder, *sample, "--lora")),
        Kind("header of a transformer", "sample", flux, reads(whole_model, *SMALL, "--model")),
        Kind("saved settings", "sample", {"config": RECORD | {"model": str(world / "model")}},
             reads(one_json, "--config")),
        Kind("saved settings", "train", config, reads(one_json, "--config")),
        Kind("header of a checkpoint", "train", run, reads(begun, *again, "--steps", "2", "--out")),
        Kind("requests", "sample", [{"seed": 1, "num": 1, "prompt": WORDS}], reads(rows, *sample, "--jobs")),
    ]  # fmt: skip
    for command in ("data", "train"):
        flags = ["--data"] if command == "data" else [*train, "--data"]
        uno = ["--data"] if command == "data" else [*train, "--method", "uno", "--ref-size", "16", "--data"]
        found += [
            Kind("rows of sets", command, sets, reads(rows, *flags)),
            Kind("settings of a folder", command, {"grid": "1x2", "markers": "image"}, reads(grid, *flags)),
            Kind("pairs", command, pairs, reads(one_json, *uno)),
            Kind("rows of a hub's folder", command, of_hub, reads(hub_rows, *flags)),
            Kind("table of a hub's folder", command, of_hub, reads(hub_table, *flags)),
        ]
    for name, document, write in (("header of a LoRA", lora, lora_file), ("PEFT's settings", peft, peft_folder)):

        def convert(folder: Path, changed: Any, write: Callable = write) -> list[str]:
            folder.mkdir(exist_ok=True)
            return [str(write(folder, changed)), str(folder / "converted.safetensors"), "--to", "diffusers"]

        found.append(Kind(name, "convert", document, convert))
    return found


def try_one(kind: Kind, document: Any) -> int:
    """Run a command on a document in this process. Returns its status, which is 0 if the change meant nothing

    Errors: AssertionError if it does not end as it should
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        argv = kind.write(folder, document)
        if kind.command in ("sample", "train") and "--out" not in argv[-2:]:
            argv += ["--out", str(folder / "out")]
        before = sorted(os.listdir(folder))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = blackbox.main(kind.command, *argv)
        lines = err.getvalue().splitlines()
        shown = f"{kind.command} on a changed {kind.name} ended with {status}: {err.getvalue()[-500:]!r}"
        assert status in (0, 2), shown
        if status == 2 and kind.command != "data":
            assert lines and lines[-1].startswith("error: ") and lines[-1].isprintable(), shown
            assert not (folder / "out").exists() or not [
                p for p in (folder / "out").iterdir() if p.suffix != ".json"
            ], shown
        if status == 2 and kind.command == "data":
            assert all(line.isprintable() for line in out.getvalue().splitlines()), shown
        assert kind.command != "convert" or status == 0 or sorted(os.listdir(folder)) == before, shown
        return status


def try_kind(kind: Kind, examples: int) -> Counter:
    """Try so many changed documents of a kind. Returns how many ended with which status"""
    ended: Counter = Counter()

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(changed(kind.document))
    def one(document: Any) -> None:
        ended[try_one(kind, document)] += 1

    one()
    return ended


def make_world(folder: Path) -> Path:
    """Make what all kinds need: a small model, sets, a LoRA and a run that is half way."""
    from test_train import make_model, make_sets

    from model.flux import Flux, FluxConfig
    from model.lora import attach, save_lora
    from model.weights import find_model

    make_model(folder / "model")
    make_sets(folder / "sets", count=2)
    torch.manual_seed(0)
    shape = find_model(str(folder / "model")).flux.config
    flux = Flux(FluxConfig(**vars(shape)))
    attach(
        flux, "double_blocks.0.img_attn.qkv,single_blocks.0.linear2,final_layer.linear", 2, generator=torch.Generator()
    )
    save_lora(flux, folder / "lora.safetensors", "diffusers", {"about": "a small one"})
    flags = ["--data", str(folder / "sets"), "--model", str(folder / "model"), *FLAGS, "--panel-size", "16"]
    assert blackbox.main("train", *flags, "--out", folder / "run") == 0
    return folder
