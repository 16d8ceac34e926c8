import pytest

from iclora.layout import Layout
from iclora.prompts import MARKER_KINDS, POSITIONS, TASKS, build, clean, lint, markers_for, preset, texts_of

TEXTS = ["a fox sleeps", "a fox runs", "a fox eats", "a fox swims"]


# markers and captions


def test_a_caption_has_tag_summary_and_panels_in_order():
    caption = build("A fox has a day.", TEXTS[:3], markers_for("scene", 3, 1), tag="[MOVIE-SHOTS]")
    assert caption == (
        "[MOVIE-SHOTS] A fox has a day. [SCENE-1] a fox sleeps [SCENE-2] a fox runs [SCENE-3] a fox eats"
    )


@pytest.mark.parametrize(
    ("kind", "grid", "markers"),
    [
        ("image", (2, 2), "[IMAGE1] [IMAGE2] [IMAGE3] [IMAGE4]"),
        ("image", (1, 1), "[IMAGE1]"),
        ("scene", (3, 1), "[SCENE-1] [SCENE-2] [SCENE-3]"),
        ("position", (1, 2), "[LEFT] [RIGHT]"),
        ("position", (2, 1), "[TOP] [BOTTOM]"),
        ("position", (2, 2), "[TOP-LEFT] [TOP-RIGHT] [BOTTOM-LEFT] [BOTTOM-RIGHT]"),
        ("position", (3, 1), "[TOP] [MIDDLE] [BOTTOM]"),
        ("position", (1, 3), "[LEFT] [MIDDLE] [RIGHT]"),
    ],
)
def test_markers_follow_reading_order(kind, grid, markers):
    assert " ".join(markers_for(kind, *grid)) == markers


@pytest.mark.parametrize("grid", [(1, 1), (3, 3), (2, 3), (1, 4)])
def test_grids_without_position_names_are_sent_to_image_markers(grid):
    with pytest.raises(ValueError, match=f"a {grid[0]}x{grid[1]} grid has no position markers, .* use image markers"):
        markers_for("position", *grid)


def test_a_caption_needs_one_text_for_each_panel():
    with pytest.raises(ValueError, match="shorter"):
        build("Foxes.", TEXTS[:3], markers_for("image", 2, 2))


@pytest.mark.parametrize("kind", MARKER_KINDS)
@pytest.mark.parametrize("grid", list(POSITIONS))
def test_what_is_built_has_no_findings(kind, grid):
    texts = (TEXTS * 2)[: grid[0] * grid[1]]
    assert lint(build("Foxes.", texts, markers_for(kind, *grid)), *grid) == []


# the published tasks


def test_all_ten_published_tasks_are_there():
    assert len(TASKS) == 10


@pytest.mark.parametrize("name", list(TASKS))
def test_a_task_is_a_whole_number_of_panels_on_token_borders(name):
    task = preset(name)
    layout = Layout(task.rows, task.cols, *task.panel_size)
    assert (layout.width, layout.height) == (task.width, task.height)
    assert 4080 <= layout.image_tokens <= 9072


@pytest.mark.parametrize("name", list(TASKS))
def test_a_caption_built_for_a_task_has_no_findings(name):
    task = preset(name)
    markers = markers_for(task.markers, task.rows, task.cols)
    caption = build("<Anna> has a day.", TEXTS[: len(markers)], markers, tag=task.tag)
    assert lint(caption, task.rows, task.cols) == [] and caption.startswith(task.tag)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("couple-profile", (1024, 1024)),
        ("film-storyboard", (1024, 512)),
        ("font-design", (896, 608)),
        ("home-decoration", (672, 864)),
        ("portrait-illustration", (576, 1088)),
        ("portrait-photography", (672, 864)),
        ("ppt-templates", (992, 576)),
        ("sandstorm-visual-effect", (1408, 800)),
        ("sparklers-visual-effect", (960, 544)),
        ("visual-identity-design", (736, 1024)),
    ],
)
def test_panel_sizes_are_the_published_ones(name, size):
    assert preset(name).panel_size == size


def test_a_mistyped_preset_is_answered_with_the_nearest_one():
    with pytest.raises(ValueError, match="did you mean film-storyboard\\? choose one of couple-profile, .*"):
        preset("film_storybord")
    with pytest.raises(ValueError, match="preset 'qqq' is unknown; choose one of couple-profile"):
        preset("qqq")


# the linter


@pytest.mark.parametrize(
    ("prompt", "grid", "findings"),
    [
        ("", (2, 2), ["the prompt is empty"]),
        ("  \n", (1, 1), ["the prompt is empty"]),
        ("a fox", (1, 1), []),
        ("[IMAGE1] a fox", (1, 1), []),
        ("a fox four times", (2, 2), ["it has no markers, but the 2x2 grid takes [IMAGE1] to [IMAGE4]"]),
        ("[MOVIE-SHOTS] [FOUR-PANEL] <Anna> <LEFT> walks", (2, 1), ["it has no markers, but"]),
        ("[IMAGE1] a [IMAGE2] b", (1, 2), []),
        (
            "[IMAGE1] a [IMAGE2] b",
            (1, 3),
            ["it has [IMAGE1] [IMAGE2], but the 1x3 grid takes [IMAGE1] to [IMAGE3], each once"],
        ),
        ("[IMAGE1] a [IMAGE2] b [IMAGE3] c", (1, 2), ["it has [IMAGE1] [IMAGE2] [IMAGE3], but"]),
        (
            "[IMAGE0] a [IMAGE1] b",
            (1, 2),
            ["it has [IMAGE0] [IMAGE1], but the 1x2 grid takes [IMAGE1] to [IMAGE2], each"],
        ),
        ("[IMAGE1] a [IMAGE2] b [IMAGE1] c", (1, 2), ["it has [IMAGE1] [IMAGE2] [IMAGE1], but"]),
        ("[IMAGE2] a [IMAGE1] b", (1, 2), ["it has [IMAGE2] [IMAGE1], but"]),
        ("[LEFT] a [RIGHT] b", (1, 2), []),
        ("[LEFT] a [RIGHT] b", (2, 1), ["it has [LEFT] [RIGHT], but the 2x1 grid takes [TOP] [BOTTOM]"]),
        ("[TOP] a [BOTTOM] b", (1, 4), ["the 1x4 grid takes [IMAGE1] to [IMAGE4]"]),
        ("[IMAGE1] a [RIGHT] b", (1, 2), ["it has [IMAGE1] [RIGHT], but the 1x2 grid takes [IMAGE1] to [IMAGE2]"]),
        ("[IMAGE1] a [SCENE-2] b", (1, 2), ["takes [IMAGE1] to [IMAGE2]"]),
        ("[IMAGE1] a [IMAGE2]", (1, 2), ["[IMAGE2] has no text"]),
        ("[IMAGE1], [IMAGE2] b", (1, 2), ["[IMAGE1] has no text"]),
        (
            "[SCENE1] a [Scene-2] b",
            (1, 2),
            ["it has [SCENE1] [Scene-2], but the 1x2 grid takes [SCENE-1] to [SCENE-2]"],
        ),
        (
            "[image\n1] a [IMAGE-2] b",
            (1, 2),
            ["it has [image 1] [IMAGE-2], but the 1x2 grid takes [IMAGE1] to [IMAGE2]"],
        ),
        ("[bottom_right] a", (2, 2), ["takes [TOP-LEFT] [TOP-RIGHT] [BOTTOM-LEFT] [BOTTOM-RIGHT]"]),
    ],
)
def test_the_linter_says_where_markers_and_grid_differ(prompt, grid, findings):
    found = lint(prompt, *grid)
    assert len(found) == len(findings)
    for line, expected in zip(found, findings, strict=True):
        assert expected in line and "\n" not in line


# cleaning


def test_cleaning_makes_one_paragraph_and_keeps_every_word():
    assert clean("  a fox\r\n\tand   caf\u00e9 \u732b \U0001f98a ") == "a fox and caf\u00e9 \u732b \U0001f98a"
    assert clean("") == ""


@pytest.mark.parametrize("prompt", ["a\0b", "\x1b[31m", "a\x7f", "\x85", b"\xff".decode("utf-8", "surrogateescape")])
def test_control_characters_and_bytes_are_refused_in_one_line(prompt):
    with pytest.raises(ValueError, match=r"not plain text: character \d is U\+") as caught:
        clean(prompt)
    assert str(caught.value).isprintable()


def test_endless_and_foreign_prompts_are_refused():
    with pytest.raises(ValueError, match="20001 characters; shorten it to 20000"):
        clean("a" * 20_001)
    with pytest.raises(ValueError, match="is int, not text"):
        clean(7)


# apart


def test_what_is_joined_is_not_too_long_to_be_read_again():
    with pytest.raises(ValueError, match="has 24039 characters; shorten it to 20000"):
        build("", ["a" * 6000] * 4, ["[IMAGE1]", "[IMAGE2]", "[IMAGE3]", "[IMAGE4]"])


def test_a_caption_is_taken_apart_so_that_every_panel_has_what_all_share_and_its_own():
    caption = "two foxes: [LEFT] a fox, [RIGHT] the fox asleep."
    assert texts_of(caption, 1, 2, "joint") == [caption]
    assert texts_of(caption, 1, 2, "panel") == [
        "two foxes:", "two foxes: [LEFT] a fox,", "two foxes: [RIGHT] the fox asleep.",
    ]  # fmt: skip
    assert texts_of("[IMAGE1] a, [IMAGE2] b", 2, 1, "panel") == ["", "[IMAGE1] a,", "[IMAGE2] b"]
    assert texts_of("a fox", 1, 1, "panel") == ["a fox", "a fox"]
    assert texts_of("", 3, 1, "panel") == [""] * 4, "left out in training"


@pytest.mark.parametrize(
    ("caption", "finding"),
    [
        ("two foxes", "it has no markers, but the 1x2 grid takes"),
        ("[IMAGE1] a fox", "it has .IMAGE1., but the 1x2 grid takes"),
        ("[IMAGE2] a fox [IMAGE1] a bear", "it has .IMAGE2. .IMAGE1., but"),
        ("[LEFT] a fox [IMAGE2] a bear", "it has .LEFT. .IMAGE2., but the 1x2 grid takes .LEFT. .RIGHT."),
    ],
)
def test_a_caption_that_cannot_be_taken_apart_is_refused_with_the_reason(caption, finding):
    with pytest.raises(ValueError, match=finding) as caught:
        texts_of(caption, 1, 2, "panel")
    assert "is to read its own part of" in str(caught.value) and "--text joint" in str(caught.value)
