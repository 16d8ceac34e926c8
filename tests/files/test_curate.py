"""The parts of the data factory: its words, its catalogue, its seams and its eyes."""

import json
import sqlite3
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection

from iclora.curate.catalogue import STAGES, Catalogue, Item, Outcome, crops_of, passed, reader, selected
from iclora.curate.eyes import ClipJudge, Dino, Owl
from iclora.curate.options import CHAIN, CurateConfig
from iclora.curate.page import write_page
from iclora.curate.seam import cut, find_seam
from iclora.curate.stages import crop
from iclora.curate.taxonomy import HERE, alone, judge_texts, make_item, read_words
from lab.curate import TruthJudge, WorldLocator
from lab.eyes import dino_features, load_eyes, twin, with_subject
from lab.truth import load_reader
from lab.world import SHAPES, box, draw, random_set
from model.weights import find_model
from sampling.images import to_tensor

TINY = find_model("tiny").root
WORDS = {name: HERE / f"{name}.json" for name in ("words", "words-tiny")}


def item(number, **values):
    names = ("category", "mood", "subject", "second", "scene1", "scene2", "scene3", "grid", "size", "caption", "prompt")
    return Item(number, **{**{name: name for name in names}, "second": "", "grid": "1x2", "size": "64x64", **values})


def pair(seed, subjects=1):
    return [draw(panel) for panel in random_set(np.random.default_rng(seed), 1, 2, subjects)]


def diptych(pictures, grid="1x2"):
    joined = np.concatenate([np.asarray(picture) for picture in pictures], axis=1 if grid == "1x2" else 0)
    return Image.fromarray(joined)


@pytest.fixture
def catalogue(tmp_path):
    with closing(Catalogue(tmp_path / "catalogue.sqlite")) as opened:
        opened.add(map(item, range(1, 7)))
        yield opened


# words


@pytest.mark.parametrize("name", WORDS)
def test_an_item_follows_from_the_seed_and_its_number(name):
    words = read_words(WORDS[name])
    items = [make_item(number, 0, words) for number in range(1, 200)]
    assert items == [make_item(number, 0, words) for number in range(1, 200)]
    assert items[7] != make_item(8, 1, words)
    for one in items:
        assert not set("{}") & set(one.caption + one.prompt) and one.subject in one.caption
        assert len(one.subject.split()) <= 12 and one.second in one.prompt
        assert len({one.scene1, one.scene2, one.scene3}) == 3
        assert one.scene2 in one.prompt and one.scene1 not in one.prompt


@pytest.mark.parametrize("name", WORDS)
def test_all_classes_come_before_one_comes_again_and_three_moods_come(name):
    words = read_words(WORDS[name])
    classes = [each for names in words["classes"].values() for each in names]
    items = [make_item(number, 3, words) for number in range(1, 1 + len(classes))]
    assert sorted(one.category for one in items) == sorted(classes)
    assert len({make_item(number, 0, words).mood for number in range(30)}) == 3


def test_a_second_subject_is_of_another_class_and_the_tiny_model_has_pairs_without_one():
    tiny, full = (read_words(WORDS[name]) for name in ("words-tiny", "words"))
    items = [make_item(number, 0, tiny) for number in range(100)]
    second = [one for one in items if one.second]
    assert 20 < len(second) < 80 and not [one for one in second if one.category in one.second.split()]
    assert all(make_item(number, 0, full).second for number in range(100))


def test_the_tiny_model_knows_every_word_of_its_lists():
    from transformers import T5TokenizerFast

    words, tokenizer = read_words(WORDS["words-tiny"]), T5TokenizerFast.from_pretrained(TINY / "tokenizer_2")
    items = [make_item(number, 0, words) for number in range(300)]
    for text in [one.caption for one in items] + [alone(one.subject, one.scene3, words) for one in items]:
        ids = tokenizer(text).input_ids
        assert len(ids) <= 64 and tokenizer.unk_token_id not in ids, text


def test_a_language_model_writes_subjects_and_scenes_and_its_lines_are_cleaned():
    asked = []

    def write(request):
        asked.append(request)
        return (
            "1. blue glass cat.\n- blue glass cat\n* " + "word " * 70 + "\n\n2) cat in a teapot"
            if "subjects" in request
            else ("on a roof\nin a barrel\nunder a bridge\n")
        )

    words = read_words(WORDS["words-tiny"])
    items = [make_item(number, 0, words, write) for number in range(40)]
    assert {one.subject for one in items} == {"blue glass cat", "cat in a teapot"}
    assert {one.scene1 for one in items} == {"on a roof", "in a barrel", "under a bridge"}
    assert any("'mushroom'" in request for request in asked)


@pytest.mark.parametrize(
    "change", [{"classes": {}}, {"templates": [{}]}, {"sizes": ["large"]}, {"subjects": {"bare": {}}}, {"alone": "{b}"}]
)
def test_lists_that_cannot_work_are_refused_in_one_line(tmp_path, change):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(json.loads(WORDS["words-tiny"].read_text()) | change))
    with pytest.raises(ValueError, match="mine.json is no list of words"):
        read_words(path)


# options


def test_stages_and_thresholds_of_stage_two_are_those_of_stage_one():
    config = CurateConfig(dino=0.7, judge_score=3)
    assert config.chosen == CHAIN[:6] and CurateConfig(lora="a.safetensors").chosen == CHAIN
    assert [config.bar(stage) for stage in STAGES] == [None, 0.65, 0.7, 3, None, None, None, 0.7, 3, None]
    with pytest.raises(ValueError, match="did you mean judge"):
        CurateConfig(stages="dino,judje")
    with pytest.raises(ValueError, match="LoRA of stage I"):
        CurateConfig(stages="redraw")


# the catalogue


def test_items_go_through_stages_one_after_the_other(catalogue):
    db = catalogue.db
    assert [one.id for one in passed(db, "diptych")] == [1, 2, 3, 4, 5, 6] and not passed(db, "split")
    for number in (1, 2, 3):
        catalogue.record(number, "diptych", Outcome())
    catalogue.record(1, "split", Outcome(0.9), 0.5)
    catalogue.record(2, "split", Outcome(0.1), 0.5)
    assert [one.id for one in passed(db, "diptych")] == [4, 5, 6]
    assert [one.id for one in passed(db, "split")] == [3] and [one.id for one in passed(db, "dino")] == [1]
    assert passed(db, "diptych")[0] == item(4)
    assert [one.id for one in passed(db, "diptych", 1, 2)] == [5]


def test_another_bar_changes_verdicts_and_reasons_and_keeps_scores_and_failures(catalogue):
    catalogue.record(1, "judge", Outcome(3.25, data={"parts": []}), 3.5)
    catalogue.record(2, "judge", Outcome(against="the judge failed: it is asleep"), 3.5)

    def rows():
        return catalogue.db.execute("SELECT score, kept, reason FROM results ORDER BY item").fetchall()

    failed = (None, 0, "the judge failed: it is asleep")
    assert rows() == [(3.25, 0, "below 3.5"), failed]
    catalogue.hold_again("judge", 3)
    assert rows() == [(3.25, 1, "at least 3"), failed]


def test_a_condition_selects_and_changes_nothing(catalogue, tmp_path):
    for number in (1, 2, 3):
        catalogue.record(number, "diptych", Outcome())
        catalogue.record(number, "split", Outcome(1), 0)
        catalogue.record(number, "dino", Outcome(number / 4), 0.9)
    with closing(reader(catalogue.path)) as db:
        assert [one.id for one in selected(db, "export", "dino > 0.3 AND dropped LIKE 'dino%'")] == [2, 3]
        for where in ("1 = 1 -- all", "1 = 0 OR 1 = 1"):
            assert [one.id for one in selected(db, "export", where)] == [1, 2, 3]
        for where in ("dinno > 1", "1; DROP TABLE items", "load_extension('x')", "dino >", "1 UNION", ")(", "0) OR (1"):
            with pytest.raises(ValueError, match="--where .* write an SQL condition over id, category"):
                selected(db, "export", where)
        with pytest.raises(sqlite3.DatabaseError):
            db.execute("DELETE FROM items")
        with pytest.raises(sqlite3.DatabaseError):
            db.execute("ATTACH '/tmp/x' AS x")
    assert len(passed(catalogue.db, "diptych", anew=True)) == 6


def test_parts_of_other_processes_are_taken_over_once(catalogue):
    part = catalogue.path.with_name("part-1.sqlite")
    with closing(Catalogue(part)) as other:
        other.record(2, "diptych", Outcome())
    catalogue.record(1, "diptych", Outcome())
    catalogue.merge_parts()
    assert [one.id for one in passed(catalogue.db, "split")] == [1, 2] and not part.exists()


def test_other_settings_are_refused_until_the_stage_is_forgotten(catalogue):
    catalogue.settle("judge", {"judge": "a wrong name"})
    catalogue.settle("judge", {"judge": "clip 1234"})  # as nothing was made by the other
    catalogue.record(1, "judge", Outcome(4), 3)
    catalogue.settle("judge", {"judge": "clip 1234"})
    with pytest.raises(ValueError, match="has a judge made with judge clip 1234, not gpt; .*--redo judge"):
        catalogue.settle("judge", {"judge": "gpt"})
    catalogue.forget(CHAIN[CHAIN.index("judge") :])
    catalogue.settle("judge", {"judge": "gpt"})
    assert not catalogue.db.execute("SELECT * FROM results").fetchall() and len(passed(catalogue.db, "diptych")) == 6


def test_a_catalogue_of_another_version_or_a_damaged_one_is_refused(catalogue, tmp_path):
    with sqlite3.connect(tmp_path / "newer.sqlite") as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(ValueError, match="is of version 9, not 1"):
        Catalogue(tmp_path / "newer.sqlite")
    catalogue.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = catalogue.path.read_bytes()
    (tmp_path / "cut.sqlite").write_bytes(data[: len(data) // 2])
    with pytest.raises(sqlite3.DatabaseError):
        Catalogue(tmp_path / "cut.sqlite")


def test_what_find_has_cut_out_is_read_back(catalogue):
    catalogue.record(3, "find", Outcome(data={"crops": [{"subject": "cat", "scene": "at night"}]}))
    catalogue.record(4, "find", Outcome(against="no cat is found"))
    assert crops_of(catalogue.db) == {3: [{"subject": "cat", "scene": "at night"}]}


# seams


@pytest.mark.parametrize("grid", ["1x2", "2x1"])
def test_seams_are_found_and_single_pictures_have_none(grid):
    right = clear = 0
    for seed in range(30):
        pictures = pair(seed, 1 + seed % 2)
        seam, share = find_seam(diptych(pictures, grid), grid)
        halves = cut(diptych(pictures, grid), grid, seam, (64, 64))
        right += share >= 0.65 and all(np.array_equal(a, b) for a, b in zip(halves, pictures, strict=True))
        (panel,) = random_set(np.random.default_rng(seed), 1, 1, 1)
        box = (0, 32, 128, 96) if grid == "1x2" else (32, 0, 96, 128)
        clear += find_seam(draw(panel, 128).crop(box), grid)[1] < 0.65
    assert right >= 29 and clear >= 24


def test_a_seam_beside_the_middle_is_found_and_both_halves_get_one_size():
    left, right = pair(3)
    wide = Image.new("RGB", (128, 64))
    wide.paste(left.resize((66, 64)), (0, 0))
    wide.paste(right.resize((62, 64)), (66, 0))
    seam, share = find_seam(wide, "1x2")
    assert seam == 66 and share > 0.8 and [half.size for half in cut(wide, "1x2", seam, (64, 64))] == [(64, 64)] * 2


def test_crops_are_squares_inside_the_picture():
    picture = draw(random_set(np.random.default_rng(0), 1, 1, 1)[0])
    for edges in ((-5, -5, 20, 10), (40, 50, 80, 60), (10, 10, 10, 10), (0, 0, 200, 200)):
        assert crop(picture, edges).size == (64, 64)
    marked = Image.new("RGB", (64, 64))
    marked.paste((255, 0, 0), (20, 30, 30, 40))
    assert np.asarray(crop(marked, (20, 30, 30, 40)))[..., 0].min() == 255


# eyes


def test_dino_sees_what_the_lab_sees():
    first, second = pair(5)
    expected = dino_features(load_eyes("tiny").dino, torch.cat([to_tensor(first), to_tensor(second)]))
    cosine = Dino(TINY / "dinov2", "cpu")(first, second)
    assert cosine == pytest.approx(float(expected[0] @ expected[1]), abs=1e-4)
    assert Dino(TINY / "dinov2", "cpu")(first, first) == pytest.approx(1)


def test_clip_reads_colours_part_by_part():
    parts = judge_texts(read_words(WORDS["words-tiny"]))
    judge = ClipJudge(TINY / "clip", parts, "cpu")
    (panel,) = random_set(np.random.default_rng(1), 1, 1, 1)
    placed = panel.placed[0]
    red, blue = (
        draw(replace(panel, placed=(replace(placed, subject=replace(placed.subject, colour=colour)),)))
        for colour in ("red", "blue")
    )
    assert judge(red, red).parts == dict.fromkeys(parts, 4) and judge(red, red).score == 4
    assert judge(red, blue).parts["colour"] < 2 and judge(red, blue).score < 4
    with pytest.raises(ValueError, match="no parts for CLIP"):
        ClipJudge(TINY / "clip", {}, "cpu")


@pytest.fixture(scope="module")
def owl_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("owl")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 806, "max_position_embeddings": 16, "bos_token_id": 804, "eos_token_id": 805}
    text["pad_token_id"] = 805
    vision = {**tower, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    CLIPTokenizer.from_pretrained(TINY / "tokenizer").save_pretrained(folder)
    return folder


def test_owl_finds_a_box_in_pixels_of_the_picture_or_nothing(owl_folder, monkeypatch):
    picture = Image.new("RGB", (64, 32), "red")
    owl = Owl(owl_folder, "cpu")
    monkeypatch.setattr("iclora.curate.eyes.SURE", 0)
    left, top, right, bottom = owl(picture, "cat")
    assert left < right and top < bottom and 0 < right - left < 128

    class Sees(torch.nn.Module):
        config, device = owl.model.config, owl.model.device

        def forward(self, ids, image, mask):
            assert ids.shape == mask.shape == (1, 16) and image.shape == (1, 3, 32, 32)
            assert image[0, 0, 0].min() > 1 and image[0, 0, -1].max() < 0.2  # red above, grey below
            logits, boxes = torch.full((1, 16, 1), -9.0), torch.zeros(1, 16, 4)
            logits[0, 5], boxes[0, 5] = 2.0, torch.tensor([0.5, 0.25, 0.25, 0.25])
            return type("Output", (), {"logits": logits, "pred_boxes": boxes})

    owl.model = Sees()
    assert owl(picture, "cat") == (24, 8, 40, 24)
    monkeypatch.setattr("iclora.curate.eyes.SURE", 0.95)
    assert owl(picture, "cat") is None


@pytest.mark.slow
def test_folders_that_hold_something_else_are_refused(owl_folder, tmp_path):
    with pytest.raises(ValueError, match="config.json is no file"):
        Dino(tmp_path, "cpu")
    with pytest.raises(ValueError, match="holds a model of type 'owlv2', not dinov2"):
        Dino(owl_folder, "cpu")
    with pytest.raises(ValueError, match="does not load|lacks"):
        Owl(TINY / "dinov2", "cpu")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((TINY / "dinov2" / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((TINY / "dinov2" / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors"):
        Dino(tmp_path, "cpu")


# the page


def test_the_page_escapes_words_and_shows_scores_reasons_and_bars(catalogue, tmp_path):
    catalogue.add([item(9, subject="<script>alert(1)</script>", mood='"&')])
    for number, cosine in ((9, 0.8), (2, 0.1)):
        catalogue.record(number, "diptych", Outcome())
        catalogue.record(number, "split", Outcome(1), 0.5)
        catalogue.record(number, "dino", Outcome(cosine), 0.5)
    catalogue.export("export", [item(9)], "kept by all stages")
    with closing(reader(catalogue.path)) as db:
        write_page(tmp_path, db, {stage: CurateConfig().bar(stage) for stage in STAGES})
    text = (tmp_path / "index.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "Kept: 1" in text and "Dropped: 1" in text
    assert "dino: below 0.5" in text and "below 0.5 (1)" in text and text.count("<svg") == 2
    assert Image.open(tmp_path / "kept.png").height > 100


# the picture world's own


@pytest.fixture(scope="module")
def truth():
    return load_reader("tiny")


@pytest.mark.slow
def test_the_reader_tells_the_same_subject_from_its_twin_in_panels_and_in_crops(truth):
    judge, rng, right = TruthJudge(truth), np.random.default_rng(8), {"same": 0, "twin": 0, "crop": 0, "twin's crop": 0}
    for _ in range(25):
        (both,) = random_set(rng, 1, 1, 2)  # crops come from panels of two
        subject = both.placed[0].subject
        first, second = (with_subject(panel, subject) for panel in random_set(rng, 1, 2, 1))
        other = draw(with_subject(second, twin(subject, rng)))
        both, first, second = map(draw, (both, first, second))
        cut_out = crop(both, WorldLocator(truth)(both, subject.shape))
        right["same"] += judge(first, second).score == 4
        right["twin"] += judge(first, other).score < 3.5
        right["crop"] += judge(cut_out, second).score == 4
        right["twin's crop"] += judge(cut_out, other).score < 3.5
    assert min(right.values()) >= 20, right
    assert judge(first, draw(random_set(rng, 1, 1, 1)[0])).score < 3.5


def test_the_world_finds_a_subject_by_its_shape_where_it_stands(truth):
    rng, apart = np.random.default_rng(9), []
    for _ in range(20):
        (panel,) = random_set(rng, 1, 1, 2)
        for which, placed in enumerate(panel.placed):
            found = WorldLocator(truth)(draw(panel), f"striped {placed.subject.shape} with a hat")
            apart.append(99 if found is None else np.abs(np.subtract(found, box(panel, which))).max())
    assert np.mean(np.array(apart) < 2) > 0.9
    absent = next(shape for shape in SHAPES if shape not in {one.subject.shape for one in panel.placed})
    assert WorldLocator(truth)(draw(panel), absent) is None
