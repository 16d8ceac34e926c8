"""CLIP and DINOv2 at tiny size: how they are trained, their files, and the figures that say how well they see."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model

from lab import eyes, train_eyes
from lab.captions import panel_prompt, vocabulary
from lab.training import Stage, Work
from lab.truth import same_hidden
from lab.world import SHAPES, is_held_out, random_set
from model.checkpoint import read_header
from model.weights import find_model

FILES = find_model("tiny")


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(str(FILES.clip_tokenizer))


@pytest.fixture(scope="module")
def clip(tokenizer):
    torch.manual_seed(0)
    return train_eyes.new_clip(FILES, tokenizer)


@pytest.fixture(scope="module")
def dino():
    torch.manual_seed(0)
    return train_eyes.new_dino()


def short(name):
    return Stage(name, steps=8, batch=16, lr=1e-3, muon_lr=2e-3, warmup=2, ema=0.8)


def singles(count, held_out=True):
    rng = np.random.default_rng(2)
    return [random_set(rng, 1, 1, 1, held_out)[0] for _ in range(count)]


# training


def test_clip_learns_and_leaves_the_text_tower_as_it_is(clip, tokenizer, tmp_path):
    pool = train_eyes.draw_some((train_eyes.siblings, 1, 4))
    image = pool[0].flatten(0, 1).float() / 127.5 - 1
    spoken = eyes.text_tower(clip, tokenizer, [panel_prompt(panel) for family in pool[1] for panel in family])
    before = float(train_eyes.clip_losses(clip, image, spoken)["loss"].detach())
    trained = train_eyes.train_clip(short("c"), clip, tokenizer, lambda: pool, Work(tmp_path))
    assert float(train_eyes.clip_losses(trained, image, spoken)["loss"].detach()) < 0.8 * before
    train_eyes.write_eye(trained, tmp_path / "clip", "CLIPImageProcessor")
    written = read_header(tmp_path / "clip" / "model.safetensors")[0]
    kept = train_eyes.load_file(tmp_path / "clip" / "model.safetensors")
    for name, tensor in train_eyes.text_tensors(FILES).items():
        assert torch.equal(kept[name], tensor) and tensor.dtype == torch.bfloat16, name
    assert {stored.dtype for stored in written.values()} == {"BF16"}


def test_dino_learns_to_tell_subjects_from_their_twins(dino, tmp_path):
    pool = train_eyes.draw_some((train_eyes.subject_and_twin, 1, 4))
    told = torch.tensor([train_eyes.traits_of(panel) for family in pool[1] for panel in family])

    def contrast(model):
        blind = nn.Linear(128, train_eyes.PLACE)
        return float(train_eyes.dino_losses(model, blind, pool[0].flatten(0, 1).float() / 127.5 - 1, told)["contrast"])

    before = contrast(dino)
    trained = train_eyes.train_dino(short("d"), dino, lambda: pool, Work(tmp_path))
    assert contrast(trained) < 0.9 * before

    def never():
        raise AssertionError("a finished stage draws nothing")

    again = train_eyes.train_dino(short("d"), dino, never, Work(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trained.parameters(), strict=True))


class Told(nn.Module):
    """Stands for the model where only the loss is looked at: pictures are their own features."""

    def forward(self, pixel_values):
        return type("", (), {"pooler_output": pixel_values.flatten(1)})


def test_the_identity_loss_is_lowest_where_views_agree_and_twins_do_not():
    subjects = torch.eye(16).repeat_interleave(2, dim=0)  # 8 families: two views, two of the twin
    scenes = subjects[torch.arange(32).view(8, 2, 2).transpose(1, 2).flatten()]
    head, told = nn.Linear(16, train_eyes.PLACE), torch.full((32, len(train_eyes.TRAITS)), -1)
    good, by_scene = (train_eyes.dino_losses(Told(), head, z, told) for z in (subjects, scenes))
    assert good["before its twin"] == 1 and float(good["loss"].detach()) < 0.01
    assert by_scene["before its twin"] == 0 and float(by_scene["loss"].detach()) > 5


def test_traits_are_told_of_the_subject_wherever_it_stands_but_not_its_size():
    for panel in singles(30):
        told, subject = dict(zip(train_eyes.TRAITS, train_eyes.traits_of(panel), strict=True)), panel.placed[0].subject
        assert told["shape"] == 1 + list(SHAPES).index(subject.shape) and told["face"] == subject.face
        assert told["size"] == -1 and (told["angle"] == -1) == (subject.pattern == "plain")


def test_siblings_differ_in_one_named_trait_and_are_never_held_out():
    rng = np.random.default_rng(0)
    for _ in range(50):
        first, *others = train_eyes.siblings(rng)
        assert len({panel_prompt(panel) for panel in (first, *others)}) == 4
        for other in others:
            was, now = ({**vars(p.placed[0].subject), "scene": p.scene} for p in (first, other))
            assert sum(was[trait] != now[trait] for trait in was) == 1
            assert other.placed[0].position == first.placed[0].position and not is_held_out(other.placed[0].subject)


def test_twins_in_training_have_the_same_captions_and_are_somebody_else():
    rng = np.random.default_rng(0)
    for _ in range(50):
        first, second, *twins = train_eyes.subject_and_twin(rng)
        assert [panel_prompt(panel) for panel in twins] == [panel_prompt(first), panel_prompt(second)]
        a, b = first.placed[0].subject, twins[0].placed[0].subject
        assert first.scene != second.scene and first.seed == twins[0].seed
        assert not all(same_hidden(a, b).values()), (a, b)


def test_a_twin_has_the_same_caption_and_no_hidden_trait_in_common():
    rng = np.random.default_rng(5)
    for panel in singles(20):
        subject = panel.placed[0].subject
        other = eyes.twin(subject, rng)
        assert panel_prompt(eyes.with_subject(panel, other)) == panel_prompt(panel)
        assert not any(same_hidden(subject, other).values()), (subject, other)


def test_captions_start_out_white_and_without_a_mean(clip, tokenizer):
    clip = copy.deepcopy(clip)
    train_eyes.whiten(clip, tokenizer)
    vectors = eyes.text_tower(clip, tokenizer, [panel_prompt(panel) for panel in singles(400, held_out=None)])
    projected = clip.text_projection(vectors).detach()
    spread, own = (torch.linalg.eigvalsh(torch.cov(x.T)).flip(0) for x in (projected, vectors))
    assert float(projected.mean(dim=0).norm()) < 0.1 * float(projected.norm(dim=1).mean())
    assert 20 * spread[0] / spread[60] < own[0] / own[60]


# files


def test_the_files_load_whole_in_transformers_by_the_hubs_names(clip, dino, tmp_path):
    for path in FILES.root.iterdir():
        if path.name not in ("clip", "dinov2"):
            (tmp_path / path.name).symlink_to(path.resolve())
    train_eyes.write_eye(clip, tmp_path / "clip", "CLIPImageProcessor", train_eyes.text_tensors(FILES))
    train_eyes.write_eye(dino, tmp_path / "dinov2", "BitImageProcessor")
    assert (tmp_path / "clip" / "model.safetensors").stat().st_size < 2_100_000
    assert (tmp_path / "dinov2" / "model.safetensors").stat().st_size < 1_200_000
    for kind, name in ((CLIPModel, "clip"), (Dinov2Model, "dinov2")):
        _, told = kind.from_pretrained(str(tmp_path / name), use_safetensors=True, output_loading_info=True)
        assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        prepared = json.loads((tmp_path / name / "preprocessor_config.json").read_text())
        assert prepared["image_mean"] == prepared["image_std"] == [0.5] * 3 and prepared["crop_size"]["height"] == 64
    found, image = eyes.load_eyes(str(tmp_path)), eyes.to_image(singles(3))
    rounded = {name: t.to(torch.bfloat16).float() for name, t in dino.state_dict().items()}
    ours = eyes.dino_features(found.dino, image)
    dino.load_state_dict(rounded)
    assert torch.allclose(ours, eyes.dino_features(dino.eval(), image), atol=1e-5)
    assert torch.allclose(ours.norm(dim=1), torch.ones(len(ours)))
    names = read_header(tmp_path / "dinov2" / "model.safetensors")[0]
    assert "encoder.layer.0.attention.attention.query.weight" in names  # as on the hub, whatever transformers calls it


def test_pictures_of_another_size_are_refused_in_one_line(dino):
    with pytest.raises(ValueError, match=r"pictures are \(1, 3, 128, 128\), not \(N, 3, 64, 64\); cut out and resize"):
        eyes.dino_features(dino, torch.zeros(1, 3, 128, 128))


def test_short_padding_changes_no_caption(clip, tokenizer):
    captions = [panel_prompt(panel) for panel in singles(3)]
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    full = clip.text_model(input_ids=ids).pooler_output
    assert torch.allclose(eyes.text_tower(clip, tokenizer, captions), full, atol=1e-5)


# figures


def test_auc_is_1_if_perfect_a_half_if_random_and_counts_ties_half():
    rng = np.random.default_rng(0)
    assert eyes.auc_interval(np.arange(10) + 10.0, np.arange(10.0)) == (1.0, 1.0, 1.0)
    assert eyes.auc(np.arange(10.0), np.arange(10) + 10.0) == 0.0
    assert eyes.auc(np.ones(5), np.ones(5)) == 0.5 and eyes.auc(np.array([1.0, 2]), np.array([1.0, 0])) == 0.875
    mean, low, high = eyes.auc_interval(rng.random(300), rng.random(300))
    assert low < 0.5 < high and low < mean < high and high - low < 0.15


def test_auc_of_features_that_know_the_subject_or_only_its_description(monkeypatch):
    shown = []
    monkeypatch.setattr(eyes, "to_image", lambda panels: shown.append(panels) or torch.zeros(len(panels)))

    def by(what):
        def look(image):
            mean = [hash(what(panel.placed[0].subject)) % 2**32 for panel in shown[-1]]
            drawn = [np.random.default_rng(seed).standard_normal(64) for seed in mean]
            return nn.functional.normalize(torch.tensor(np.array(drawn)), dim=1)

        found = [line.split(" | ") for line in eyes.dino_auc(look, 30)[3:]]
        return [float(cells[1]) for cells in found]  # twin, twin in the same place, drawn anew, anyone

    assert by(lambda s: s) == [1, 1, 1, 1]
    assert by(lambda s: (s.shape, s.colour, s.pattern, s.accessory)) == [0.5, 0.5, 0.5, 1]


WORDS = [word for word in vocabulary() if word not in ("a", "an", "with", "on", "the", "in")]


def words_of(captions):
    """Features that know nothing but which words a caption has."""
    found = [set(re.findall(r"\w+", caption)) for caption in captions]
    has = [[float(word in words) for word in WORDS] for words in found]
    return nn.functional.normalize(torch.tensor(has), dim=1)


def test_zero_shot_is_right_for_an_oracle_and_by_chance_for_the_blind():
    panels = singles(40)
    told = words_of([panel_prompt(panel) for panel in panels])
    for trait, hits in eyes.zero_shot(told, panels, words_of).items():
        assert all(right.all() for right in hits), trait
    blind = eyes.zero_shot(told.roll(1, dims=0), panels, words_of)
    assert all(right.float().mean() < 0.6 for hits in blind.values() for right in hits)
    lines = eyes.clip_zero_shot(lambda image: told, words_of, len(panels))
    assert len(lines) == 2 + len(eyes.OPTIONS) and lines[2].startswith("| shape | 7.1% |")
