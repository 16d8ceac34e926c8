"""The cache: encoders run once, damage is mended, and kept latents cannot know what they will have to answer."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from iclora import cache as caching
from iclora.cache import Cache, LatentCache, ReferenceCache, TextCache, every_mask, file_mark, text_mark
from iclora.data import read_source
from iclora.examples import buckets, find_examples
from iclora.layout import Layout, compose
from iclora.references import encode, read_references
from model.text import load_text_encoders
from model.weights import find_model, load_autoencoder
from sampling.latents import pack

TWO = "two foxes: [IMAGE1] a fox, [IMAGE2] the fox"


@pytest.fixture(scope="module")
def autoencoder():
    return load_autoencoder(find_model("tiny").autoencoder)


def data_set(folder, seeds=((1, 2), (3, 4))):
    """Sets of two panels; returns them in their buckets."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "set.json").write_text('{"grid": "1x2"}')
    for number, pair in enumerate(seeds):
        (folder / str(number)).mkdir(exist_ok=True)
        (folder / str(number) / "caption.txt").write_text(TWO)
        for panel, seed in enumerate(pair, start=1):
            pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / str(number) / f"{panel}.png")
    return buckets(find_examples(folder), 32)


def never():
    raise AssertionError("nothing is missing, so nothing should be loaded")


def entries(folder):
    return sorted(folder.rglob("*.safetensors"))


# entries


def test_an_entry_comes_back_bit_for_bit_from_two_levels_of_folders(tmp_path):
    tensors = {"txt": torch.randn(3, 4).bfloat16(), "vec": torch.randn(5), "none": torch.zeros(0)}
    cache = Cache(tmp_path)
    assert cache.get("abcdef") is None
    cache.put("abcdef", tensors)
    assert entries(tmp_path) == [tmp_path / "ab" / "cd" / "abcdef.safetensors"]
    found = cache.get("abcdef")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"]


DAMAGE = {
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit changed": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "another file": lambda data: b"not a safetensors file at all",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_entry_is_made_anew(tmp_path, kind, autoencoder):
    sets, latents = data_set(tmp_path / "sets"), LatentCache(tmp_path / "cache", "ae")
    assert latents.encode(sets, lambda: autoencoder) == 2
    path = entries(tmp_path / "cache")[0]
    good = latents.cache.get(path.stem)["z"]
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    assert latents.cache.get(path.stem) is None
    assert latents.encode(sets, lambda: autoencoder) == 1
    assert torch.equal(latents.cache.get(path.stem)["z"], good)


def test_an_entry_lost_during_training_is_one_clear_line(tmp_path):
    ((layout, (example, *_)),) = data_set(tmp_path / "sets").items()
    with pytest.raises(ValueError, match="entry of .* is gone or damaged; run again"):
        LatentCache(tmp_path / "cache", "ae").get(example, layout)


# latents


def test_latents_are_those_of_the_composite_and_nothing_is_loaded_twice(tmp_path, autoencoder):
    sets, latents = data_set(tmp_path / "sets"), LatentCache(tmp_path / "cache", "ae")
    seen = []
    assert latents.encode(sets, lambda: autoencoder, progress=lambda *done: seen.append(done)) == 2
    assert seen == [(1, 2), (2, 2)]
    assert latents.encode(sets, never) == 0
    ((layout, examples),) = sets.items()
    for example in examples:
        pictures = [read_source(path, (32, 32), "crop", False).picture for path in example.files]
        with torch.no_grad():
            z = autoencoder.encode(compose(dict(enumerate(pictures, start=1)), layout))[0]
        assert torch.equal(latents.get(example, layout), z)


def test_the_key_covers_everything_that_the_latents_depend_on(tmp_path):
    ((layout, (example, other)),) = data_set(tmp_path).items()
    latents = LatentCache(tmp_path, "ae")
    keys = {
        latents.key(example, layout),
        latents.key(other, layout),
        latents.key(example, layout, (1,)),
        latents.key(example, layout, (2,)),
        latents.key(example, Layout(2, 1, 32, 32)),
        latents.key(example, Layout(1, 2, 32, 48)),
        LatentCache(tmp_path, "another").key(example, layout),
        LatentCache(tmp_path, "ae", "pad").key(example, layout),
        LatentCache(tmp_path, "ae", concat="tokens").key(example, layout),
    }
    assert len(keys) == 9
    assert latents.key(replace(example, name="x", caption="y", files=()), layout) == latents.key(example, layout)


def test_panels_encoded_by_themselves_stand_side_by_side_and_know_nothing_of_each_other(tmp_path, autoencoder):
    latents, found = LatentCache(tmp_path / "cache", "ae", concat="tokens"), []
    for name, seeds in (("a", (1, 2)), ("b", (1, 9))):  # the second panel differs
        ((layout, (example,)),) = data_set(tmp_path / name, (seeds,)).items()
        assert latents.encode({layout: [example]}, lambda: autoencoder) == 1
        found.append(latents.get(example, layout))
    picture = read_source(example.files[0], (32, 32), "crop", False).picture
    with torch.no_grad():
        alone = autoencoder.encode(compose({1: picture}, Layout(1, 1, 32, 32)))[0]
    assert torch.allclose(found[0][..., :4], alone, atol=1e-5)
    assert torch.equal(found[0][..., :4], found[1][..., :4]) and not torch.equal(found[0], found[1])


def test_a_changed_picture_is_encoded_again(tmp_path, autoencoder):
    latents = LatentCache(tmp_path / "cache", "ae")
    assert latents.encode(data_set(tmp_path / "sets"), lambda: autoencoder) == 2
    assert latents.encode(data_set(tmp_path / "sets", ((1, 2), (3, 5))), lambda: autoencoder) == 1


def test_kept_latents_know_nothing_of_what_is_masked(tmp_path, autoencoder):
    latents, kept, whole = LatentCache(tmp_path / "cache", "ae"), [], []
    for name, seeds in (("a", (1, 2)), ("b", (1, 9))):  # the second panel differs
        ((layout, (example,)),) = data_set(tmp_path / name, (seeds,)).items()
        latents.encode({layout: [example]}, lambda: autoencoder, every_mask)
        kept.append(latents.get(example, layout, masked=(2,)))
        whole.append(latents.get(example, layout))
    assert torch.equal(kept[0], kept[1])
    left = slice(0, 4)  # cells of the panel that is kept
    assert not torch.equal(whole[0][..., left], whole[1][..., left]), "else the test could not fail: there is no leak"
    assert not torch.equal(kept[0][..., left], whole[0][..., left])


def test_every_subset_that_training_may_draw_is_there_up_front(tmp_path, autoencoder):
    ((layout, (example,)),) = data_set(tmp_path / "sets", ((1, 2),)).items()
    latents = LatentCache(tmp_path / "cache", "ae")
    assert latents.encode({layout: [example]}, lambda: autoencoder, every_mask) == 3
    assert {latents.get(example, layout, masked).shape for masked in ((), (1,), (2,))} == {(16, 4, 8)}


# references


def pairs(folder):
    """Two pairs of one target: a single reference, and that one beside another."""
    folder.mkdir()
    for name, size in {"target": (32, 32), "one": (100, 70), "other": (32, 48)}.items():
        pixels = np.random.default_rng(list(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    rows = [
        {"prompt": "x", "image_paths": [f"{name}.png" for name in names], "image_tgt_path": "target.png"}
        for names in (["one"], ["one", "other"])
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    return find_examples(folder / "pairs.json")


def test_references_are_cached_as_sampling_encodes_them_with_all_that_drawing_needs(tmp_path, autoencoder):
    single, several = pairs(tmp_path / "pairs")
    cached, done = ReferenceCache(Cache(tmp_path / "cache"), "ae", (64, 48)), []
    assert cached.encode([single, several], lambda: autoencoder, lambda *of: done.append(of)) == 3, "one in two sizes"
    assert done == [(1, 3), (2, 3), (3, 3)] and cached.encode([single, several], never, None) == 0
    for example, long_side in ((single, 64), (several, 48)):
        pictures = [source.picture for source in read_references(example.references, long_side)]
        mean, spread = cached.get(example)
        with torch.no_grad():
            assert torch.allclose(encode(autoencoder, pictures)[0], mean, atol=1e-6)
            drawn = encode(autoencoder, pictures[:1], torch.Generator().manual_seed(3))[0]
        wide, high = pictures[0].size
        noise = torch.randn(1, 16, high // 8, wide // 8, generator=torch.Generator().manual_seed(3))
        count = len(drawn)
        assert torch.allclose(mean[:count] + spread[:count] * pack(noise)[0], drawn, atol=1e-5)
        assert spread.min() > 0 and len(mean) == sum(p.width * p.height // 256 for p in pictures)


def test_the_keys_of_references_cover_pixels_size_and_autoencoder_and_nothing_else(tmp_path):
    single, several = pairs(tmp_path / "pairs")
    cache = Cache(tmp_path)
    of = ReferenceCache(cache, "ae", (64, 48)).keys
    assert len({*of(single), *of(several)}) == 3
    assert of(single) != ReferenceCache(cache, "ae", (65, 48)).keys(single), "though it is cut to the same tokens"
    assert of(single) != ReferenceCache(cache, "another", (64, 48)).keys(single)
    assert of(replace(single, caption="y", sha256=("z",), references=several.references[:1])) == of(single)


def test_there_are_fourteen_ways_to_keep_some_of_four_panels():
    masks = every_mask(Layout(2, 2, 16, 16))
    assert len(set(masks)) == 15 and masks[0] == () and (1, 2, 3, 4) not in masks
    assert every_mask(Layout(1, 1, 16, 16)) == [()]
    with pytest.raises(ValueError, match="3x3 grid has 510 ways .* up to 6 panels"):
        every_mask(Layout(3, 3, 16, 16))


# text


def test_captions_are_encoded_once_with_encoders_that_are_gone_afterwards(tmp_path):
    files = find_model("tiny")
    texts = TextCache(tmp_path, text_mark(files), None, torch.float32)
    encoders = load_text_encoders(files, dtype=torch.float32)
    assert texts.encode([TWO, "", TWO], lambda: encoders) == 2
    assert texts.encode(["", TWO], never) == 0
    for caption in (TWO, ""):
        for cached, fresh in zip(texts.get(caption), encoders.encode([caption], None), strict=True):
            assert torch.equal(cached, fresh[0])
    with pytest.raises(ValueError, match="the cached caption 'never seen' .* is gone or damaged"):
        texts.get("never seen")


def test_text_keys_tell_length_type_and_encoders_apart(tmp_path):
    kinds = [("a", 80, torch.float32), ("a", 512, torch.float32), ("a", 80, torch.bfloat16), ("b", 80, torch.float32)]
    assert len({TextCache(tmp_path, *kind).key(TWO) for kind in kinds}) == 4


# marks


def test_a_mark_follows_the_content_and_not_the_name(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"weights")
    two.write_bytes(b"weights")
    assert file_mark([one]) == file_mark([two])
    two.write_bytes(b"weightz")
    assert file_mark([one]) != file_mark([two])


def test_large_files_are_marked_without_being_read(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "HASHED", 4)
    path = tmp_path / "large"
    path.write_bytes(b"weights")
    before = file_mark([path])
    monkeypatch.setattr(caching.hashlib, "file_digest", never)
    assert file_mark([path]) == before
    path.write_bytes(b"more weights")
    assert file_mark([path]) != before


def test_the_mark_of_the_text_encoders_covers_their_tokenizers(tmp_path):
    files = find_model("tiny")
    for source in files.t5_tokenizer.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    same = replace(files, t5_tokenizer=tmp_path)
    assert text_mark(same) == text_mark(files)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert text_mark(same) != text_mark(files)
