"""The picture world: deterministic, recognisable by simple statistics, and captioned within its vocabulary."""

import re
from dataclasses import replace

import numpy as np
import pytest

from iclora.prompts import MARKER_KINDS, markers_for
from lab.captions import DOMAIN_WORDS, LIMITS, joint_caption, length, name, panel_prompt, say_domain, vocabulary
from lab.world import (
    ACCESSORIES,
    COLOURS,
    FACES,
    PATTERNS,
    POSITIONS,
    SCENES,
    SHAPES,
    SIZES,
    Panel,
    Placed,
    Subject,
    base_colour,
    draw,
    is_held_out,
    random_set,
    random_subject,
)

GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1))
PLAIN = Subject("bear", "red", "plain", "none", 0.0, 30.0, 0.5, 0)


def pixels(subject: Subject, scene: str = "meadow", position: str = "middle", size: str = "big", seed: int = 5):
    return np.asarray(draw(Panel(scene, (Placed(subject, position, size),), seed)), dtype=np.float32)


def random_sets(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    for i in range(count):
        rows, cols = GRIDS[i % len(GRIDS)]
        yield rows, cols, random_set(rng, rows, cols, 1 + i // len(GRIDS) % 4)


def test_equal_seeds_give_equal_sets_bytes_and_captions():
    first, again, other = (random_set(np.random.default_rng(seed), 2, 2, 2) for seed in (3, 3, 4))
    assert first == again != other
    assert [draw(panel).tobytes() for panel in first] == [draw(panel).tobytes() for panel in again]
    captions = [joint_caption(first, 2, 2, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert captions[0] == captions[1] != captions[2]


def test_every_part_of_a_panel_changes_the_picture():
    subject = Subject("cat", "blue", "striped", "none", 0.0, 30.0, 0.5, 0)
    changes = (
        {"shape": "bear"},
        {"colour": "red"},
        {"pattern": "dotted"},
        {"accessory": "hat"},
        {"hue": 0.9},
        {"angle": 100.0},
        {"spacing": 0.0},
        {"face": 1},
    )
    plain = pixels(subject)
    for change in changes:
        assert np.abs(pixels(replace(subject, **change)) - plain).mean() > 0.5, change
    for change in ({"scene": "city"}, {"position": "left"}, {"size": "small"}, {"seed": 6}):
        assert np.abs(pixels(subject, **change) - plain).mean() > 0.5, change


def test_the_world_is_as_large_as_promised():
    assert len(SHAPES) >= 12 and len(COLOURS) == 8 and len(PATTERNS) == 4 and len(SCENES) >= 10
    assert len(ACCESSORIES) == 4 and len(FACES) >= 4 and len(SIZES) == 2 and len(POSITIONS) == 4


def test_sets_keep_their_subjects_in_distinct_scenes():
    for rows, cols, panels in random_sets(200):
        casts = {tuple(placed.subject for placed in panel.placed) for panel in panels}
        cast = casts.pop()
        assert not casts and len(panels) == rows * cols == len({panel.scene for panel in panels})
        assert len({one.shape for one in cast}) == len({one.colour for one in cast}) == len(cast)
        for panel in panels:
            assert len({placed.position for placed in panel.placed}) == len(cast)


def test_no_three_panels_show_a_walk_from_left_to_right():
    rng = np.random.default_rng(1)
    for _ in range(300):
        panels = random_set(rng, 3, 1)
        assert [panel.placed[0].position for panel in panels] != ["left", "middle", "right"]


def test_about_a_tenth_of_the_combinations_is_held_out_and_none_is_trained_on():
    every = [replace(PLAIN, shape=s, colour=c, pattern=p) for s in SHAPES for c in COLOURS for p in PATTERNS]
    seen = [one for one in every if not is_held_out(one)]
    assert 0.05 < 1 - len(seen) / len(every) < 0.15
    for trait, values in (("shape", SHAPES), ("colour", COLOURS), ("pattern", PATTERNS)):
        assert {getattr(one, trait) for one in seen} == set(values)
    rng = np.random.default_rng(2)
    assert not any(is_held_out(random_subject(rng)) for _ in range(300))
    assert all(is_held_out(random_subject(rng, held_out=True)) for _ in range(50))
    assert {is_held_out(random_subject(rng, held_out=None)) for _ in range(200)} == {True, False}
    for _, _, panels in random_sets(100):
        assert not any(is_held_out(placed.subject) for panel in panels for placed in panel.placed)


@pytest.mark.parametrize("hue", [-1.0, 0.0, 1.0])
def test_a_plain_body_is_nearest_to_its_named_colour(hue):
    named = {colour: np.array(base_colour(replace(PLAIN, colour=colour))) for colour in COLOURS}
    for shape in ("bear", "ghost", "pear"):
        for colour in COLOURS:
            with_body = pixels(replace(PLAIN, shape=shape, colour=colour, hue=hue))
            other = pixels(replace(PLAIN, shape=shape, colour="purple" if colour != "purple" else "yellow", hue=hue))
            # Pixels that change with the colour are body; the brighter half of them is neither outline nor shade.
            body = with_body[np.abs(with_body - other).sum(-1) > 90]
            body = body[body.sum(-1) >= np.median(body.sum(-1))]
            mean = np.median(body, axis=0)
            assert min(named, key=lambda c: np.linalg.norm(named[c] - mean)) == colour


def test_scenes_are_told_apart_by_coarse_colours():
    def coarse(scene, seed):
        picture = pixels(random_subject(np.random.default_rng(seed)), scene, seed=seed)
        return picture.reshape(2, 32, 2, 32, 3).mean((1, 3))

    means = {scene: np.mean([coarse(scene, seed) for seed in range(12)], axis=0) for scene in SCENES}
    shown = [(scene, coarse(scene, seed)) for scene in SCENES for seed in range(100, 110)]
    right = [
        min((np.square(mean - one).sum(), guess) for guess, mean in means.items())[1] == scene for scene, one in shown
    ]
    assert np.mean(right) > 0.95


def test_patterns_are_told_apart_by_their_texture():
    def statistics(pattern, angle):
        subject = replace(PLAIN, shape="ghost", pattern=pattern, angle=angle, face=1)
        body = pixels(subject)[40:56, 18:46].sum(-1)
        step = np.concatenate([np.abs(np.diff(body, axis=0)).ravel(), np.abs(np.diff(body, axis=1)).ravel()])
        return np.mean(body > 480), step.mean()

    for angle in (20.0, 65.0):
        light, edges = zip(*(statistics(pattern, angle) for pattern in PATTERNS), strict=True)
        assert light[0] < 0.05 < min(light[1:])
        assert edges[0] < min(edges[1:]) / 2
    pictures = [pixels(replace(PLAIN, shape="ghost", pattern=pattern)) for pattern in PATTERNS]
    for i, one in enumerate(pictures):
        assert all(np.abs(one - other).mean() > 3 for other in pictures[:i])


def test_shapes_and_faces_differ_in_many_pixels():
    for trait, values in (("shape", tuple(SHAPES)), ("face", range(len(FACES)))):
        pictures = [pixels(replace(PLAIN, **{trait: value})) for value in values]
        for i, one in enumerate(pictures):
            assert all((np.abs(one - other).sum(-1) > 90).sum() > 40 for other in pictures[:i])


def test_positions_are_where_they_are_said_to_be():
    centres = {}
    for position in POSITIONS:
        shown = (
            np.abs(
                pixels(PLAIN, position=position, size="small")
                - pixels(replace(PLAIN, colour="blue"), position=position, size="small")
            ).sum(-1)
            > 60
        )
        rows, columns = np.nonzero(shown)
        centres[position] = columns.mean(), rows.mean()
    assert centres["left"][0] + 10 < centres["middle"][0] < centres["right"][0] - 10
    assert centres["top"][1] + 15 < centres["middle"][1]


@pytest.mark.parametrize("size", [16, 48, 64, 128])
def test_panels_come_in_any_multiple_of_16(size):
    assert draw(Panel("sea", (Placed(PLAIN, "left", "big"),), 1), size).size == (size, size)


def test_wrong_requests_are_refused_in_one_line():
    panel = Panel("sea", (Placed(PLAIN, "left", "big"),), 1)
    rng = np.random.default_rng(0)
    for message, call in (
        ("multiple of 16", lambda: draw(panel, 60)),
        ("1 to 4", lambda: draw(replace(panel, placed=()))),
        ("use fewer", lambda: random_set(rng, 4, 4)),
        ("1, 2, 3 or 4", lambda: random_set(rng, 2, 2, 5)),
        ("one per cell", lambda: joint_caption((panel,), 1, 2)),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_captions_keep_to_their_length_their_vocabulary_and_what_may_be_said():
    rng, words, used = np.random.default_rng(7), set(vocabulary()), set()
    assert len(words) < 300
    assert not words & {"hue", "angle", "spacing", "face", "eye", "eyes", "mouth", "teeth", "asleep", "smile", "spots"}
    for rows, cols, panels in random_sets(500):
        for markers in MARKER_KINDS:
            caption = joint_caption(panels, rows, cols, rng, markers)
            assert length(caption) <= (60 if len(panels) == 1 else LIMITS[len(panels[0].placed) > 1]), caption
            tokens = re.findall(r"\[[A-Z0-9-]+\]|\w+|[^\w\s]", caption)
            assert set(tokens) - set(",.:;") <= words, caption
            used.update(tokens)
            expected = list(markers_for(markers, rows, cols)) if len(panels) > 1 else []
            assert re.findall(r"\[[^]]*\]", caption) == expected
            for one in panels[0].placed:
                assert one.subject.shape in tokens and one.subject.colour in tokens
    for domain in DOMAIN_WORDS:
        said = {say_domain("", domain, panels, rng) for panels in (1, 2, 4) for _ in range(20)}
        used.update(word for front in said for word in re.findall(r"\w+", front))
    assert used - set(",.:;") <= words and len(words - used) <= 5, words ^ used


def test_hidden_traits_do_not_change_a_caption():
    for rows, cols, panels in random_sets(20):
        hidden = tuple(
            replace(
                panel,
                seed=panel.seed + 1,
                placed=tuple(
                    replace(one, subject=replace(one.subject, hue=0.123, angle=1.0, spacing=0.9, face=3))
                    for one in panel.placed
                ),
            )
            for panel in panels
        )
        captions = [joint_caption(given, rows, cols, np.random.default_rng(1)) for given in (panels, hidden)]
        assert captions[0] == captions[1]


def test_a_prompt_without_randomness_tells_everything():
    subject = replace(PLAIN, shape="cat", pattern="striped", accessory="hat")
    panel = Panel("snow", (Placed(subject, "left", "small"),), 0)
    assert name(subject) == "red striped cat with a hat"
    assert panel_prompt(panel) == "a small red striped cat with a hat on the left in a snowy field."
    assert joint_caption((panel,), 1, 1, markers="scene") == panel_prompt(panel)
    rng = np.random.default_rng(0)
    assert len({panel_prompt(panel, rng).replace("small ", "") for _ in range(200)}) >= 4
