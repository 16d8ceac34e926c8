"""The cache: encoders run once, damage is mended, and kept latents cannot know what they will have to answer."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from iclora import cache as caching
from iclora.cache import (
    Cache,
    latent_entry,
    reference_entry,
    text_encoder_paths,
    text_entry,
)
from iclora.data import bucket, load, read_panels
from iclora.layout import Layout, compose, encode_by_panel
from iclora.loader import every_mask
from iclora.locks import lock
from iclora.references import encode, fit_reference
from model import checkpoint
from model.checkpoint import file_sha256, fingerprint
from model.text import load_text_encoders
from model.weights import find_model, load_autoencoder
from sampling.images import open_picture
from sampling.latents import pack

TWO = "two foxes: [IMAGE1] a fox, [IMAGE2] the fox"
OF_LATENTS = "bdb8b4603354039e246723145e0729064c36dd3b6620635643354beef5d6b12d"
OF_WEIGHTS = "5177acb3626323e8c29e1ba9c0e215159c1561b21b16be1ba10d41871ccea617"


@pytest.fixture(scope="module")
def autoencoder():
    return load_autoencoder(find_model("tiny").autoencoder)


def draw(path, size, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def data_set(folder, seeds=((1, 2), (3, 4))):
    """Sets of two panels; returns their layout and examples."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "set.json").write_text('{"grid": "1x2"}')
    for number, pair in enumerate(seeds):
        (folder / str(number)).mkdir(exist_ok=True)
        (folder / str(number) / "caption.txt").write_text(TWO)
        for panel, seed in enumerate(pair, start=1):
            draw(folder / str(number) / f"{panel}.png", (32, 32), seed)
    ((layout, examples),) = bucket(load(folder), 32, (512, 320)).items()
    return layout, examples


def latents(example, layout, masked=(), rule="crop", concat="pixels", autoencoder="ae", spread=False):
    return latent_entry(example, layout, masked, rule, concat, autoencoder, spread)


def never(*_):
    raise AssertionError("nothing is missing, so nothing should be loaded")


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# entries


def test_an_entry_comes_back_bit_for_bit_from_two_levels_of_folders(tmp_path):
    tensors = {"txt": torch.randn(3, 4).bfloat16(), "vec": torch.randn(5), "none": torch.zeros(0)}
    cache = Cache(tmp_path)
    assert cache.get("abcdef") is None
    cache.put("abcdef", tensors)
    assert files(tmp_path) == [tmp_path / "ab" / "cd" / "abcdef.safetensors"]
    read = cache.get("abcdef")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)


DAMAGE = {
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit changed": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "another file": lambda data: b"not a safetensors file at all",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_entry_is_made_anew(tmp_path, kind, autoencoder):
    layout, examples = data_set(tmp_path / "sets")
    entries, cache = [latents(example, layout) for example in examples], Cache(tmp_path / "cache")
    assert cache.fill(entries, lambda: autoencoder, "") == 2
    path, good = cache.path(entries[0].key), cache.get(entries[0].key)["z"]
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    assert cache.get(entries[0].key) is None
    assert cache.fill(entries, lambda: autoencoder, "") == 1
    assert torch.equal(cache.get(entries[0].key)["z"], good)


def test_an_entry_under_the_name_of_another_is_not_believed(tmp_path):
    cache, (one, two) = Cache(tmp_path), (text_entry(text, None, torch.float32, "e").key for text in ("one", "two"))
    for key in (one, two):
        cache.put(key, {"vec": torch.ones(1)})
    cache.path(one).write_bytes(cache.path(two).read_bytes())
    assert cache.get(one) is None and cache.get(two)


def test_what_is_read_stays_in_memory_as_long_as_there_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "MEMORY", 10)
    cache = Cache(tmp_path)
    entries = [text_entry(text, None, torch.float32, "e") for text in ("one", "two")]
    for entry, values in zip(entries, (2, 1), strict=True):
        cache.put(entry.key, {"vec": torch.ones(values)})
        cache.read(entry)
        cache.path(entry.key).unlink()
    assert cache.read(entries[0])["vec"].tolist() == [1, 1]
    with pytest.raises(ValueError, match=f"the cached caption 'two' in {tmp_path} is gone or damaged; run again"):
        cache.read(entries[1])


def test_a_failure_while_encoding_keeps_what_was_done(tmp_path):
    def fail(network):
        raise ValueError("no such picture")

    good = replace(text_entry("a", None, torch.float32, "e"), make=lambda network: {"vec": torch.ones(1)})
    bad = replace(text_entry("b", None, torch.float32, "e"), make=fail)
    cache = Cache(tmp_path)
    with pytest.raises(ValueError, match="no such picture"):
        cache.fill([good, bad], object, "")
    assert cache.fill([good], never, "") == 0


def test_what_a_killed_process_left_is_cleared_unless_another_one_fills_the_cache(tmp_path):
    good = replace(text_entry("a", None, torch.float32, "e"), make=lambda network: {"vec": torch.ones(1)})
    cache = Cache(tmp_path)
    scrap = cache.path(good.key).with_name(f".{good.key}.safetensors.00ff.tmp")
    scrap.parent.mkdir(parents=True)
    scrap.touch()
    with lock(tmp_path, shared=True):  # as a run that is filling it
        assert cache.fill([good], object, "") == 1 and scrap.exists()
    assert cache.fill([good], never, "") == 0 and os.listdir(scrap.parent) == [f"{good.key}.safetensors"]


def test_a_run_that_fills_the_cache_is_known_to_others(tmp_path):
    def make(network):
        with lock(tmp_path) as alone, lock(tmp_path, shared=True) as shared:
            held.append((alone, shared))
        return {"vec": torch.ones(1)}

    held = []
    Cache(tmp_path).fill([replace(text_entry("a", None, torch.float32, "e"), make=make)], object, "")
    assert held == [(False, True)]


# latents


def test_latents_are_those_of_the_composite_and_nothing_is_loaded_twice(tmp_path, autoencoder):
    (layout, examples), cache, loads = data_set(tmp_path / "sets"), Cache(tmp_path / "cache"), []
    entries = [latents(example, layout) for example in examples]
    assert cache.fill([*entries, *entries], lambda: loads.append(1) or autoencoder, "") == 2 and len(loads) == 1
    assert cache.fill(entries, never, "") == 0
    for example, entry in zip(examples, entries, strict=True):
        with torch.no_grad():
            z = autoencoder.encode(compose(dict(enumerate(read_panels(example, layout), start=1)), layout))[0]
        assert torch.equal(cache.read(entry)["z"], z)
    layout, changed = data_set(tmp_path / "sets", ((1, 2), (3, 5)))
    assert cache.fill([latents(example, layout) for example in changed], lambda: autoencoder, "") == 1


def test_the_keys_of_runs_begun_before_are_found_again(tmp_path):
    layout, (example, _) = data_set(tmp_path)
    assert latents(example, layout).key == OF_LATENTS, "else everything is encoded once more"


@pytest.mark.parametrize("concat", ["pixels", "tokens"])
def test_latents_may_come_with_all_that_drawing_them_needs(tmp_path, autoencoder, concat):
    layout, (example, _) = data_set(tmp_path)
    with torch.no_grad():
        mean = latents(example, layout, concat=concat).make(autoencoder)["z"]
        both = latents(example, layout, concat=concat, spread=True).make(autoencoder)
        image = compose(dict(enumerate(read_panels(example, layout), start=1)), layout)
        logvar = encode_by_panel(lambda part: autoencoder.moments(part)[1], image, layout, concat)[0]
    assert torch.allclose(both["z"], mean, atol=1e-6) and both["z"].shape == both["spread"].shape == (16, 4, 8)
    assert torch.allclose(both["spread"], 0.3611 * (logvar / 2).exp(), atol=1e-6)


def test_the_key_covers_everything_that_the_latents_depend_on(tmp_path):
    layout, (example, other) = data_set(tmp_path)
    keys = {
        latents(example, layout).key,
        latents(other, layout).key,
        latents(example, layout, (1,)).key,
        latents(example, layout, (2,)).key,
        latents(example, Layout(2, 1, 32, 32)).key,
        latents(example, Layout(1, 2, 32, 48)).key,
        latents(example, layout, autoencoder="another").key,
        latents(example, layout, rule="pad").key,
        latents(example, layout, concat="tokens").key,
        latents(example, layout, spread=True).key,
    }
    assert len(keys) == 10
    assert latents(replace(example, name="x", caption="y", files=()), layout).key == latents(example, layout).key


def two_that_differ_in_the_second_panel(tmp_path):
    for name, seeds in (("a", (1, 2)), ("b", (1, 9))):
        layout, (example,) = data_set(tmp_path / name, (seeds,))
        yield layout, example


def test_panels_encoded_by_themselves_stand_side_by_side_and_know_nothing_of_each_other(tmp_path, autoencoder):
    z = []
    for layout, example in two_that_differ_in_the_second_panel(tmp_path):
        with torch.no_grad():
            z.append(latents(example, layout, concat="tokens").make(autoencoder)["z"])
            first = autoencoder.encode(compose({1: read_panels(example, layout)[0]}, Layout(1, 1, 32, 32)))[0]
    assert torch.allclose(z[0][..., :4], first, atol=1e-5)
    assert torch.equal(z[0][..., :4], z[1][..., :4]) and not torch.equal(z[0], z[1])


def test_kept_latents_know_nothing_of_what_is_masked(tmp_path, autoencoder):
    kept, whole, cache = [], [], Cache(tmp_path / "cache")
    for layout, example in two_that_differ_in_the_second_panel(tmp_path):
        entries = [latents(example, layout, masked) for masked in every_mask(layout)]
        assert cache.fill(entries, lambda: autoencoder, "") == 3
        kept.append(cache.read(latents(example, layout, (2,)))["z"])
        whole.append(cache.read(latents(example, layout))["z"])
    assert torch.equal(kept[0], kept[1])
    left = slice(0, 4)  # cells of the panel that is kept
    assert not torch.equal(whole[0][..., left], whole[1][..., left]), "else the test could not fail: there is no leak"
    assert not torch.equal(kept[0][..., left], whole[0][..., left])


# references


def pairs(folder):
    """Two pairs of one target: a single reference, and that one beside another."""
    folder.mkdir()
    for name, size in {"target": (32, 32), "one": (100, 70), "other": (32, 48)}.items():
        draw(folder / f"{name}.png", size, list(size))
    rows = [
        {"prompt": "x", "image_paths": [f"{name}.png" for name in names], "image_tgt_path": "target.png"}
        for names in (["one"], ["one", "other"])
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    return load(folder / "pairs.json")


def test_references_are_cached_as_sampling_encodes_them_with_all_that_drawing_needs(tmp_path, autoencoder):
    single, several = pairs(tmp_path / "pairs")
    entries = [reference_entry(single, 0, 64, "ae"), *(reference_entry(several, i, 48, "ae") for i in range(2))]
    cache = Cache(tmp_path / "cache")
    assert cache.fill(entries, lambda: autoencoder, "") == 3, "one in two sizes"
    for entry, path, long_side in zip(entries, (*single.references, *several.references), (64, 48, 48), strict=True):
        picture, tensors = fit_reference(open_picture(path), long_side), cache.read(entry)
        with torch.no_grad():
            assert torch.allclose(encode(autoencoder, [picture])[0], tensors["mean"], atol=1e-6)
            sample = encode(autoencoder, [picture], torch.Generator().manual_seed(3))[0]
        noise = torch.randn(1, 16, picture.height // 8, picture.width // 8, generator=torch.Generator().manual_seed(3))
        assert torch.allclose(tensors["mean"] + tensors["spread"] * pack(noise)[0], sample, atol=1e-5)
        assert tensors["spread"].min() > 0 and len(sample) == picture.width * picture.height // 256


def test_the_keys_of_references_cover_pixels_size_and_autoencoder_and_nothing_else(tmp_path):
    single, several = pairs(tmp_path / "pairs")
    key = reference_entry(single, 0, 64, "ae").key
    others = [(several, 1, 64, "ae"), (single, 0, 48, "ae"), (single, 0, 65, "ae"), (single, 0, 64, "another")]
    assert len({key, *(reference_entry(*other).key for other in others)}) == 5
    same = replace(single, caption="y", sha256=("z",), references=several.references[:1])
    assert reference_entry(same, 0, 64, "ae").key == reference_entry(several, 0, 64, "ae").key == key


# text


def test_captions_are_encoded_once(tmp_path):
    encoders, cache = load_text_encoders(find_model("tiny"), dtype=torch.float32), Cache(tmp_path)
    entries = [text_entry(text, None, torch.float32, "e") for text in (TWO, "", TWO)]
    assert cache.fill(entries, lambda: encoders, "") == 2
    assert cache.fill(entries, never, "") == 0
    for entry, caption in zip(entries, (TWO, ""), strict=False):
        txt, vec = encoders.encode([caption], None)
        assert torch.equal(cache.read(entry)["txt"], txt[0]) and torch.equal(cache.read(entry)["vec"], vec[0])


def test_text_keys_tell_length_type_and_encoders_apart():
    kinds = [(80, torch.float32, "a"), (512, torch.float32, "a"), (80, torch.bfloat16, "a"), (80, torch.float32, "b")]
    assert len({text_entry(TWO, *kind).key for kind in kinds}) == 4


# fingerprints


def test_a_fingerprint_follows_the_content_and_not_the_name(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"weights")
    two.write_bytes(b"weights")
    assert fingerprint([one]) == fingerprint([two]) == fingerprint([one], dated=True) != fingerprint([one, two])
    assert fingerprint([one]) == OF_WEIGHTS, "else no run goes on that was begun before"
    two.write_bytes(b"weightz")
    assert fingerprint([one]) != fingerprint([two])


def test_large_files_are_identified_without_being_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_HASHED", 4)
    monkeypatch.setattr(checkpoint.hashlib, "file_digest", never)
    path = tmp_path / "large"
    path.write_bytes(b"weights")
    before = [fingerprint([path], dated) for dated in (False, True)]
    path.touch()
    assert file_sha256(path) is None and fingerprint([path]) == before[0]
    assert fingerprint([path], dated=True) not in before
    path.write_bytes(b"more weights")
    assert fingerprint([path]) != before[0]


def test_the_files_of_the_text_encoders_are_all_of_their_settings_and_tokenizers_too(tmp_path):
    tiny = find_model("tiny")
    for source in tiny.t5_tokenizer.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    paths = text_encoder_paths(replace(tiny, t5_tokenizer=tmp_path))
    assert fingerprint(paths) == fingerprint(text_encoder_paths(tiny)) and tmp_path / "tokenizer_config.json" in paths
    assert {path.parent.name for path in paths[:4]} == {"text_encoder", "text_encoder_2"}
    assert [path.name for path in paths[2:4]] == ["config.json"] * 2
