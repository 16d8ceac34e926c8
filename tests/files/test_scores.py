"""Lists of requests, pictures matched to them, and scores, against formulas written out in numpy."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from iclora.backbones import CLIP, DINO, UNO, Backbone
from iclora.cli import read_jobs
from iclora.config import SampleConfig
from iclora.evaluate import (
    Item,
    as_table,
    by_subject,
    cut,
    difference,
    interval,
    margins,
    match_pictures,
    pairwise,
    summarise,
    unlike_uno,
)
from iclora.lists import read_rows

TINY = Path(__file__).parents[2] / "weights" / "tiny"
SUBJECTS = ("cat", "robot", "mushroom")
PROMPTS = """Classes

subject_name,class
backpack_dog,backpack
bear_plushie,stuffed animal
cat2,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a {0} {1} in a chef outfit'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]
"""


def picture(name):
    return Image.open(TINY / "examples" / "references" / f"{name}.png").convert("RGB")


def noise(size=(64, 64)):
    return Image.effect_noise(size, 90).convert("RGB")


@pytest.fixture(scope="module")
def dino():
    return Backbone(TINY / "dinov2", DINO, "cpu")


@pytest.fixture(scope="module")
def clip():
    return Backbone(TINY / "clip", CLIP, "cpu")


# lists


@pytest.fixture
def dreambench(tmp_path):
    (tmp_path / "prompts_and_classes.txt").write_text(PROMPTS)
    for name in ("backpack_dog", "bear_plushie", "cat2"):
        (tmp_path / name).mkdir()
        for number in ("02.jpg", "01.jpg", "10.jpg"):
            noise().save(tmp_path / name / number)
        (tmp_path / name / "notes.txt").write_text("")
    return tmp_path


def test_dreambenchs_folder_gives_every_subject_the_prompts_of_its_kind_without_the_rare_word(dreambench):
    rows = list(read_rows(dreambench).values())
    assert [row["prompt"] for row in rows] == [
        *("a backpack in the jungle", "a cube shaped backpack"),
        *("a stuffed animal in the jungle", "a cube shaped stuffed animal"),
        *("a cat in the jungle", "a cat in a chef outfit", "a red cat"),
    ]
    names = [name for name, count in (("backpack_dog", 2), ("bear_plushie", 2), ("cat2", 3)) for _ in range(count)]
    assert [row["ref"] for row in rows] == [[str(dreambench / name / "01.jpg")] for name in names]


def test_thirty_subjects_with_twenty_five_prompts_are_750_requests(dreambench):
    classes = "\n".join(f"subject{i},{'dog' if i < 9 else 'toy'}" for i in range(30))
    prompts = "\n".join(f"'a {{0}} {{1}} number {i}'.format(unique_token, class_token)," for i in range(25))
    text = f"Classes\n\nsubject_name,class\n{classes}\n\nObject Prompts\n{prompts}\n\nLive Subject Prompts\n{prompts}\n"
    (dreambench / "prompts_and_classes.txt").write_text(text)
    for i in range(30):
        (dreambench / f"subject{i}").mkdir()
        (dreambench / f"subject{i}" / "00.jpg").write_bytes(b"")
    assert len(read_jobs(SampleConfig(jobs=str(dreambench)))) == 750


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "prompts_and_classes.txt").write_text("Classes\n"), "lacks subjects or prompts"),
        (lambda f: (f / "prompts_and_classes.txt").write_bytes(b"\xff"), "it is not UTF-8 text"),
        (lambda f: [p.unlink() for p in (f / "cat2").glob("*.jpg")], "cat2 has no pictures such as 00.jpg"),
        (lambda f: (f / "cat2").rename(f / "cat3"), "cat2 has no pictures such as 00.jpg"),
    ],
    ids=["no prompts", "no text", "no pictures", "no folder"],
)
def test_an_incomplete_dreambench_is_refused_by_name(dreambench, damage, message):
    damage(dreambench)
    with pytest.raises(ValueError, match=message):
        read_rows(dreambench)


def test_unos_list_names_references_relative_to_itself_and_what_it_says_else_is_ignored(tmp_path):
    items = [
        {"prompt": "a cat", "image_paths": ["./a/1.png", "b.png"], "image_tgt_path": "x.png", "score": 4.0},
        {"prompt": "a dog", "image_path": "c.png"},
        {"prompt": "a toy", "image_paths": [str(tmp_path / "d.png")]},
    ]
    (tmp_path / "list.json").write_text(json.dumps(items))
    requests = read_jobs(SampleConfig(jobs=str(tmp_path / "list.json"), num=6, steps=3))
    assert [(request.prompt, request.num, request.steps) for request in requests.values()] == [
        ("a cat", 6, 3), ("a dog", 6, 3), ("a toy", 6, 3)
    ]  # fmt: skip
    folders = [[Path(name).resolve() for name in request.ref] for request in requests.values()]
    root = tmp_path.resolve()
    assert folders == [[root / "a" / "1.png", root / "b.png"], [root / "c.png"], [root / "d.png"]]
    assert list(requests)[1] == f"{tmp_path / 'list.json'} item 2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no file with requests"),
        ("[]", "is no file with requests"),
        ("{}", "is no list as UNO has it"),
        ("[", "is no list as UNO has it"),
        ("[" * 100_000, "is no list as UNO has it"),
        ("[1]", "item 1 is no text with references"),
        ('[{"prompt": "a", "image_path": "a.png"}, {"prompt": "a"}]', "item 2 is no text with references"),
        ('[{"image_paths": ["a.png"]}]', "item 1 is no text with references"),
        ('[{"prompt": "a", "image_paths": []}]', "item 1 is no text with references"),
        ('[{"prompt": "a", "image_paths": "a.png"}]', "item 1 is no text with references"),
        ('[{"prompt": "a", "image_paths": ["a.png", 1]}]', "item 1 is no text with references"),
    ],
)
def test_a_wrong_list_is_refused_by_its_item(tmp_path, content, message):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_rows(tmp_path / "list.json")
    assert "\n" not in str(error.value)


# which picture belongs to which request


def items(*nums):
    return [Item(f"list item {i}", None, ("a cat",), (1, 1), (), num) for i, num in enumerate(nums, 1)]


def put(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"x")


def test_pictures_are_numbered_through_all_items_from_1_or_by_item_and_picture_from_0(tmp_path):
    ours, unos = tmp_path / "ours", tmp_path / "unos"
    ours.mkdir()
    unos.mkdir()
    put(ours, "0001.png", "0002.png", "0003.png", "0001.json", "0001-panel-1.png", "0004-sheet.png", ".hidden.png")
    put(unos, "0_0.png", "1_0.jpg", "1_1.webp", "0_0.json", "notes.txt")
    assert match_pictures(ours, items(1, 2)) == [[ours / "0001.png"], [ours / "0002.png", ours / "0003.png"]]
    assert match_pictures(unos, items(1, 2)) == [[unos / "0_0.png"], [unos / "1_0.jpg", unos / "1_1.webp"]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0001.png", "0003.png"], "lacks 0002.png or 1_0.png of list item 2 .1 of 3 pictures"),
        ([], "lacks 0001.png or 0_0.png of list item 1 .3 of 3"),
        (["0_0.png", "1_0.png"], "lacks 0003.png or 1_1.png of list item 2"),
        (["0001.png", "0002.png", "0003.png", "0004.png"], "0004.png belongs to no item; the list's 3 pictures are"),
        (["0000.png"], "0000.png belongs to no item"),
        (
            ["0_1.png"],
            "0_1.png belongs to no item; the list's 3 pictures are called 0001.png to 0003.png, or 0_0.png to",
        ),
        (["2_0.png"], "2_0.png belongs to no item"),
        (["0001.png", "1.jpg"], "stands for the same as 0001.png"),
        (["0001.png", "0_0.png"], "stands for the same as 0001.png"),
        (["cat.png"], "cat.png has no number"),
    ],
)
def test_a_missing_or_superfluous_picture_is_named(tmp_path, names, message):
    put(tmp_path, *names)
    with pytest.raises(ValueError, match=message):
        match_pictures(tmp_path, items(1, 2))


# networks


def test_the_tiny_networks_see_as_the_lab_does(dino, clip):
    from lab import eyes

    both = eyes.load_eyes("tiny")
    pictures = [picture(name).resize((64, 64)) for name in SUBJECTS]
    image = torch.tensor(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
    texts = ["a cat on a beach.", "a robot"]
    assert torch.allclose(dino.see(pictures), eyes.dino_features(both.dino, image), atol=1e-5)
    assert torch.allclose(clip.see(pictures), eyes.clip_image_features(both.clip, image), atol=1e-5)
    assert torch.allclose(clip.read(texts), eyes.clip_text_features(both.clip, both.tokenizer, texts), atol=1e-5)


def test_many_pictures_are_seen_as_each_alone(dino):
    pictures = [noise() for _ in range(67)]
    alone = torch.cat([dino.see([one]) for one in pictures])
    assert torch.allclose(dino.see(pictures), alone, atol=1e-4)


@pytest.fixture
def vit(tmp_path):
    """A small DINO in the hub's form, as facebook/dino-vits16 has it: an old preprocessor_config.json, no crop."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32)
    ViTModel(ViTConfig(patch_size=8, **sizes)).save_pretrained(tmp_path)
    mean, std = UNO["image_mean"], UNO["image_std"]
    settings = {
        "do_resize": True,
        "size": 32,
        "resample": 2,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    settings["feature_extractor_type"] = "ViTFeatureExtractor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    return tmp_path


def by_hand(shown):
    """What a network should get of a picture that is resized and cut already."""
    pixels = np.asarray(shown).astype(np.float64) / 255
    return ((pixels - UNO["image_mean"]) / UNO["image_std"]).transpose(2, 0, 1)


@pytest.mark.parametrize("uno", [False, True], ids=["its folder", "UNO's script"])
def test_dino_gets_pictures_as_its_folder_says_or_as_unos_script_does(vit, uno):
    size = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}  # as 256 is to 224
    dino = Backbone(vit, DINO, "cpu", {**UNO, **size} if uno else None)
    wide = noise((90, 60))
    if uno:
        shown = wide.resize((60, 40), Image.Resampling.BICUBIC).crop((14, 4, 46, 36))
    else:
        shown = wide.resize((32, 32), Image.Resampling.BILINEAR)
    image = torch.tensor(by_hand(shown), dtype=torch.float32)[None]
    with torch.no_grad():
        token = dino.network(pixel_values=image).last_hidden_state[0, 0].numpy()
    assert np.allclose(dino.see([wide])[0].numpy(), token / np.linalg.norm(token), atol=1e-5)
    how = "the shorter side 40 (bicubic) and cut to 32x32" if uno else "32x32 (bilinear), mean 0.485 0.456 0.406"
    assert how in dino.describe() and dino.describe().startswith("vit, 32 wide, 2 layers, patches of 8;")


def test_the_output_names_the_weights_by_their_digest(vit):
    first = Backbone(vit, DINO, "cpu").about["sha256"]
    tensors = load_file(vit / "model.safetensors")
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, vit / "model.safetensors", {"format": "pt"})
    second = Backbone(vit, DINO, "cpu")
    assert first != second.about["sha256"] and second.describe().endswith(second.about["sha256"])


def test_damaged_and_foreign_folders_are_refused_in_one_line(vit, tmp_path):
    def refused(message, folder=vit, kinds=DINO):
        with pytest.raises(ValueError, match=message) as error:
            Backbone(folder, kinds, "cpu")
        assert "\n" not in str(error.value)

    refused("holds a model of type 'vit', not clip; give another folder", kinds=CLIP)
    refused("config.json is no file", folder=tmp_path / "nowhere")
    tensors = load_file(vit / "model.safetensors")
    gone = next(key for key in tensors if "layer.0" in key or "layers.0" in key)
    rest = {key: tensor for key, tensor in tensors.items() if key != gone}
    save_file(rest, vit / "model.safetensors", {"format": "pt"})
    refused("model.safetensors lacks .* .1 tensors")
    (vit / "model.safetensors").write_bytes(b"\0" * 100)
    refused("model.safetensors is no safetensors file")
    (vit / "model.safetensors").unlink()
    (vit / "pytorch_model.bin").write_bytes(b"\x80")
    refused("is no folder of a ViTModel with config.json and model.safetensors; name another")
    save_file(tensors, vit / "model.safetensors", {"format": "pt"})
    (vit / "preprocessor_config.json").write_text("[")
    refused("preprocessor_config.json is not a JSON object")
    (vit / "preprocessor_config.json").unlink()
    refused("preprocessor_config.json is no file")


# scores


def test_panels_are_cut_in_reading_order():
    panels = [Image.new("RGB", (10, 20), (level, 0, 0)) for level in range(6)]
    whole = Image.new("RGB", (30, 40))
    for i, panel in enumerate(panels):
        whole.paste(panel, (i % 3 * 10, i // 3 * 20))
    assert [panel.getpixel((0, 0))[0] for panel in cut(whole, (2, 3))] == list(range(6))
    assert {panel.size for panel in cut(whole, (2, 3))} == {(10, 20)}


def test_the_pairwise_mean_is_that_of_the_cosine_matrix_off_its_diagonal():
    features = torch.nn.functional.normalize(torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), dim=1)
    matrix = features.numpy() @ features.numpy().T
    assert pairwise(features) == pytest.approx((matrix.sum() - np.trace(matrix)) / 12, abs=1e-6)
    assert pairwise(features[:1].repeat(3, 1)) == pytest.approx(1)


def test_a_margin_is_what_a_subject_has_in_its_place_before_all_that_is_wrong():
    apart = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.3, 0.7]])  # places 0 and 2
    assert margins(apart).tolist() == pytest.approx([0.9 - 0.3, 0.7 - 0.3])
    twice = torch.tensor([[0.9, 0.8], [0.2, 0.3]])  # the first subject stands in both places
    assert margins(twice).tolist() == pytest.approx([0.9 - 0.8, 0.3 - 0.8])
    three = torch.tensor([[0.9, 0.0, 0.0], [0.0, 0.8, 0.6], [0.0, 0.1, 0.7]])
    assert margins(three).tolist() == pytest.approx([0.9, 0.2, 0.1])


def test_intervals_are_wilsons_for_rates_and_resampled_else():
    hits = np.array([1] * 8 + [0] * 2)
    mean, low, high = interval(hits)  # from the quadratic equation (p - mean)^2 = z^2 p (1 - p) / n
    z2 = 1.959964**2 / 10
    roots = sorted(np.roots([1 + z2, -(2 * 0.8 + z2), 0.64]))
    assert (mean, low, high) == pytest.approx((0.8, *roots))
    assert interval(np.ones(20))[1] == pytest.approx(0.839, abs=1e-3)
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    mean, low, high = interval(values)
    error = values.std() / np.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)


def test_differences_are_paired_by_item():
    values = np.random.default_rng(1).normal(0.5, 0.2, 200)
    mean, low, high = difference(values + 0.01, values)
    assert (mean, low, high) == pytest.approx((0.01, 0.01, 0.01))
    mean, low, high = difference([1] * 6, [0] * 6)  # six differences of 1, and one of 1 and -1
    wider = np.array([1] * 7 + [-1])
    assert (mean, low, high) == pytest.approx((1, wider.mean() - 1.96 * wider.std() / np.sqrt(8), 1), abs=1e-4)
    assert low < 1
    assert difference([0.3, 0.4], [0.3, 0.4]) == (0, 0, 0), "which are no rates"


def test_items_without_a_score_are_left_out_of_its_mean():
    table = summarise({"a": {"DINO": [0.2, None, 0.4]}, "b": {"DINO": [0.1, None, 0.2]}})
    assert {name: cell[0] for name, cell in table["DINO"].items()} == pytest.approx(
        {"a": 0.3, "b": 0.15, "a - b": 0.15}
    )
    lines = as_table(table, {"DINO": 0.76})
    assert lines[0] == "| score | a | b | a - b | UNO's release |"
    assert lines[2].startswith("| DINO | 0.300 (0.2") and lines[2].endswith("| 0.760 |")
    assert "UNO" not in as_table(table, {})[0]


def test_unos_figures_may_be_compared_only_if_everything_was_measured_as_there():
    def eye(model, width, patch, **more):
        about = {"model": model, "hidden_size": width, "num_hidden_layers": 12, "patch_size": patch, **UNO, **more}
        return SimpleNamespace(about=about)

    def requests(count, subjects, num):
        return [Item("item", None, ("a cat",), (1, 1), ((),) * subjects, num)] * count

    dino, clip = eye("vit", 384, 16), eye("clip", 768, 32)
    assert unlike_uno(requests(750, 1, 1), dino, clip) == unlike_uno(requests(750, 2, 6), dino, clip) == []
    assert unlike_uno(requests(750, 2, 1), dino, clip) == ["pairs have not six pictures each (--num 6)"]
    assert unlike_uno(requests(749, 1, 1), dino, clip) == ["the list has not DreamBench's 750 items"]
    assert "not ViT-S/16" in unlike_uno(requests(750, 1, 1), eye("dinov2", 384, 16), clip)[0]
    assert "--resize uno" in unlike_uno(requests(750, 1, 1), eye("vit", 384, 16, resample=2), clip)[0]
    assert "not ViT-B/32" in unlike_uno(requests(750, 1, 1), dino, eye("clip", 1024, 14))[0]


def test_the_prompts_of_one_subject_count_as_one():
    cat, dog = ((Path("cat.png"),),), ((Path("dog.png"),),)
    items = [Item("", "", ("",), (1, 1), subjects, 1) for subjects in (cat, cat, cat, dog, (), ())]
    means = by_subject(items, {"a": {"DINO": [0.1, 0.2, 0.3, 0.8, None, 0.5], "CLIP-T": [None] * 6}})
    assert means["a"]["DINO"] == pytest.approx([0.2, 0.8, None, 0.5]) and means["a"]["CLIP-T"] == [None] * 4
    one = summarise({"a": {"DINO": [0.2, 0.8]}})["DINO"]["a"]
    assert one[0] == pytest.approx(0.5) and one[1] == pytest.approx(0.2), "which drawing requests anew would hide"
