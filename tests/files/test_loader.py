"""The loader: batches in an order that never changes, what is held out, what is encoded and put together."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from iclora import loader as loading
from iclora.config import UNO, TrainConfig, model_defaults, resolve_training_defaults
from iclora.data import load
from iclora.layout import Layout, panel_attention_mask
from iclora.loader import Batches, Loader, every_mask, hold_out
from model.weights import find_model

TINY = find_model("tiny")
PAIR = Layout(1, 2, 32, 32)
ORDER = [(0, [4, 4]), (0, [3, 0]), (1, [0, 2]), (0, [2, 1]), (1, [2, 1]), (0, [1, 0]), (1, [1, 0]), (0, [3, 2])]


def draw(path, size, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def sets(tmp_path):
    """Three sets of two panels."""
    for number in range(3):
        folder = tmp_path / "sets" / str(number)
        folder.mkdir(parents=True)
        draw(folder / "1.png", (32, 32), number)
        draw(folder / "2.png", (32, 32), 10 + number)
        (folder / "caption.txt").write_text(f"both: [IMAGE1] fox {number}, [IMAGE2] the same")
    (tmp_path / "sets" / "set.json").write_text('{"grid": "1x2"}')
    return tmp_path / "sets"


def loader_of(data, **settings):
    settings = {"panel_size": 32, "batch": 2, **settings}
    config = TrainConfig(data=str(data), out=str(data.parent / "runs" / "a"), **settings)
    config = resolve_training_defaults(config, model_defaults(TINY.flux.config), "cpu")
    notes = []
    loader = Loader(config, load(data), TINY)
    loader.encode(notes.append, ["[IMAGE1] a cat [IMAGE2] a cat"] * (config.method != UNO))
    return loader, notes


def never(*_):
    raise AssertionError("nothing is missing, so nothing should be loaded")


# what is encoded


def test_everything_is_encoded_once_beside_the_run_and_no_encoder_is_loaded_again(sets, monkeypatch):
    loader, notes = loader_of(sets, holdout=0.4)
    assert notes[0] == "3 sets in 1 buckets; 3 pictures and 5 texts encoded, others cached"
    assert [len(examples) for examples in loader.trained] == [2] and len(loader.held_out[0][1]) == 1
    assert len(list((sets.parent / "runs" / ".cache").rglob("*.safetensors"))) == 8
    monkeypatch.setattr(loading, "load_autoencoder", never)
    monkeypatch.setattr(loading, "load_text_encoders", never)
    assert loader_of(sets, holdout=0.4)[1][0].startswith("3 sets in 1 buckets; 0 pictures and 0 texts encoded")


def test_encoders_of_another_model_are_refused(sets):
    loader, _ = loader_of(sets)
    other = SimpleNamespace(config=replace(TINY.flux.config, vec_in_dim=999))
    loader.files = replace(TINY, flux=other)
    with pytest.raises(
        ValueError, match=r"encoders beside tiny give widths .*, but its transformer takes .* and 999; use the"
    ):
        loader.encode(print)


def test_a_dropped_caption_is_the_empty_one_and_a_prompt_is_a_batch_of_its_text(sets):
    loader, _ = loader_of(sets)
    layout, examples = loader.batch(0)
    kept = loader.collate(layout, examples, [(), ()], [False, False])
    dropped = loader.collate(layout, examples, [(), ()], [True, False])
    empty = loader.prompt("", layout)
    assert torch.equal(dropped.txt[0], empty.txt[0]) and torch.equal(dropped.vec[0], empty.vec[0])
    assert not torch.equal(kept.txt[0], dropped.txt[0]) and torch.equal(kept.txt[1], dropped.txt[1])
    assert torch.equal(kept.z, dropped.z) and kept.known is kept.references is kept.attention_mask is None
    assert empty.z.shape == (1, *kept.z.shape[1:])
    assert loader.prompt("[IMAGE1] a cat [IMAGE2] a cat", layout).txt.isfinite().all()


def test_clean_panels_and_texts_of_panels(sets):
    loader, _ = loader_of(sets, condition="clean", text="panel")
    layout, examples = loader.batch(0)
    batch = loader.collate(layout, examples, [(1,), ()], [False, True])
    assert batch.generate_mask[0].flatten().tolist() == [False, False, True, True] * 2 and batch.generate_mask[1].all()
    assert batch.known[0].any() and not batch.known[1].any()
    assert torch.equal(batch.attention_mask, panel_attention_mask(layout, batch.txt.shape[1] // 2))
    assert not torch.equal(batch.txt[0, : len(batch.txt[0]) // 2], batch.txt[0, len(batch.txt[0]) // 2 :])


def test_references_stand_one_behind_the_other_with_their_positions(tmp_path):
    for number, size in enumerate(((32, 32), (64, 64), (32, 64))):
        draw(tmp_path / f"{number}.png", size, number)
    row = {"prompt": "a fox", "image_paths": ["1.png", "2.png"], "image_tgt_path": "0.png"}
    (tmp_path / "pairs.json").write_text(json.dumps([row, {**row, "prompt": "a cat"}]))
    loader, _ = loader_of(tmp_path / "pairs.json", method=UNO, reference_attention="alone")
    layout, examples = loader.batch(0)
    batch = loader.collate(layout, examples, [(), ()], [False, False])
    assert batch.references.shape == batch.ref_std.shape == (2, layout.reference_tokens, 64) == (2, 16 + 8, 64)
    assert batch.ids.shape == (1, 4 + 24, 3) and batch.isolate_refs and (batch.ref_std > 0).all()
    noise = torch.randn(batch.ref_std.shape)
    assert torch.equal(batch.sample_posterior(noise).references, batch.references + batch.ref_std * noise)
    assert batch.sample_posterior(None) is batch and batch.z_std is None


def test_targets_are_drawn_anew_around_their_mean_and_kept_panels_are_the_mean(sets):
    loader, _ = loader_of(sets, condition="clean", target_posterior="sample")
    mean, _ = loader_of(sets, condition="clean")
    layout, examples = loader.batch(0)
    batch, plain = (of.collate(layout, examples, [(1,), ()], [False, False]) for of in (loader, mean))
    noise = torch.randn(batch.z.shape)
    assert torch.allclose(batch.z, plain.z, atol=1e-6) and torch.equal(batch.known, plain.known)
    assert plain.z_std is None and (batch.z_std > 0).all()
    drawn = batch.sample_posterior(None, noise)
    assert torch.equal(drawn.z, batch.z + batch.z_std * noise) and torch.equal(drawn.known, batch.known)


def test_every_set_comes_in_all_sizes_each_encoded_by_itself_and_is_held_out_of_all_of_them(sets):
    loader, notes = loader_of(sets, panel_size=None, composite_size="32,46", holdout=0.4)
    assert notes[0] == "3 sets in 2 buckets; 6 pictures and 5 texts encoded, others cached"
    assert [(layout.panel_width, len(members)) for layout, members in loader.buckets.items()] == [(16, 3), (32, 3)]
    trained = [{example.name for example in members} for members in loader.trained]
    held = [{example.name for example in members} for _, members in loader.held_out]
    assert trained[0] == trained[1] and held[0] == held[1] and not trained[0] & held[0] and len(held[0]) == 1
    widths = {loader.batch(number)[0].panel_width for number in range(4)}
    assert widths == {16, 32}
    shapes = [
        loader.collate(layout, some, [(), ()], [False] * 2).z.shape for layout, some in map(loader.batch, range(4))
    ]
    assert {shape[2:] for shape in shapes} == {(2, 4), (4, 8)}


def test_there_are_fourteen_ways_to_keep_some_of_four_panels():
    masks = every_mask(Layout(2, 2, 16, 16))
    assert len(set(masks)) == 15 and masks[0] == () and (1, 2, 3, 4) not in masks
    assert every_mask(Layout(1, 1, 16, 16)) == [()]
    with pytest.raises(ValueError, match="3x3 grid has 510 ways .* up to 6 panels"):
        every_mask(Layout(3, 3, 16, 16))


# batches


def test_the_order_of_batches_is_that_of_all_runs_before():
    batches = Batches([5, 3], 2, seed=7)
    assert [batches[number] for number in range(8)] == ORDER, "a run goes on to the data that it would have had"


def test_batches_are_full_of_one_bucket_and_every_example_counts_the_same():
    batches = Batches([20, 7, 1], 4, seed=3)
    counts = Counter()
    for number in range(batches.before(4)):
        which, chosen = batches[number]
        assert len(chosen) == 4
        counts.update((which, index) for index in chosen)
    assert counts == {(which, index): 4 for which, size in enumerate((20, 7, 1)) for index in range(size)}


def test_every_pass_takes_every_example_once():
    batches = Batches([20], 4, seed=3)
    for epoch in range(3):
        chosen = [index for number in range(5) for index in batches[5 * epoch + number][1]]
        assert sorted(chosen) == list(range(20))


def test_a_batch_depends_on_nothing_but_its_number_and_the_seed():
    sizes = [9, 5, 4]
    batches = [Batches(sizes, 4, 1)[number] for number in range(40)]
    one = Batches(sizes, 4, 1)
    assert [one[number] for number in reversed(range(40))] == batches[::-1]
    assert [Batches(sizes, 4, 2)[number] for number in range(40)] != batches
    assert [one.epoch_of(number) for number in range(40)] == sorted(one.epoch_of(number) for number in range(40))


def test_the_order_changes_from_epoch_to_epoch_and_mixes_the_buckets():
    batches = Batches([20, 20, 20], 4, 0)
    epochs = [[batches[15 * epoch + number] for number in range(15)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert Counter(which for which, _ in epoch) == {0: 5, 1: 5, 2: 5}
        assert [which for which, _ in epoch] != sorted(which for which, _ in epoch)


# held out


@pytest.mark.parametrize(
    ("count", "part", "held"),
    [
        (20, 0.1, 2),
        (4, 0.1, 0),
        (1, 0.9, 0),
        (2, 0.9, 1),
        (20, 0, 0),
        (2000, 0.1, 32),
    ],
)
def test_held_out_sets_are_the_last_of_each_bucket_and_never_all_or_very_many(count, part, held):
    trained, kept = hold_out({PAIR: list(range(count))}, part)
    assert trained[PAIR] == list(range(count - held))
    assert kept == ([(PAIR, list(range(count - held, count)))] if held else [])


def test_held_out_sets_are_shared_by_the_buckets():
    sizes = {replace(PAIR, panel_width=16 * n): [f"{n}-{i}" for i in range(40 * n)] for n in (1, 2, 3, 4)}
    trained, kept = hold_out(sizes, 0.25)  # 10, 20, 30 and 40 of them would be 100
    assert [len(sets) for _, sets in kept] == [8, 8, 8, 8]
    assert [len(sets) for sets in trained.values()] == [32, 72, 112, 152]
    assert [len(sets) for _, sets in hold_out(sizes, 0.04)[1]] == [2, 3, 5, 6]


def test_what_rounding_leaves_over_is_held_out_from_the_largest_buckets():
    cases = ((4, 4, 4), [1, 0, 0]), ((1, 1, 2, 2, 2, 2, 5, 5, 10), [0, 0, 0, 0, 0, 0, 1, 0, 2]), ((4,), [0])
    for counts, held in cases:
        sizes = {
            replace(PAIR, panel_width=16 * (n + 1)): [f"{n}-{i}" for i in range(count)]
            for n, count in enumerate(counts)
        }
        trained, kept = hold_out(sizes, 0.1)
        assert [count - len(sets) for count, sets in zip(counts, trained.values(), strict=True)] == held
        assert sum(len(sets) for _, sets in kept) == sum(held)


def test_an_example_of_several_sizes_is_on_one_side_and_validations_stay_few():
    sizes = [replace(PAIR, panel_width=16 * n) for n in (1, 2, 3)]
    buckets = {sizes[0]: list(range(200)), sizes[1]: list(range(200)), sizes[2]: list(range(190, 200))}
    trained, kept = hold_out(buckets, 0.1)
    held = set(dict(kept)[sizes[0]])
    assert held == set(dict(kept)[sizes[1]]) == set(range(185, 200)) and len(held) == 32 * 200 // 410
    assert all(not held & set(examples) for examples in trained.values())
    assert sizes[2] not in trained, "all of its examples are held out at their first size"
