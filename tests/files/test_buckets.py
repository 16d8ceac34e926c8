"""How large sets are learnt: the areas of composites, in whole tokens. Buckets of examples are in test_data.py."""

import pytest

from iclora.buckets import composite_layouts, parse_sides
from iclora.layout import Layout


@pytest.mark.parametrize(
    ("text", "sides"),
    [(None, ()), ("512", (512,)), ("1024, 512,512", (512, 1024)), ("16,8192", (16, 8192))],
)
def test_the_sides_of_composites_are_read(text, sides):
    assert parse_sides(text) == sides


@pytest.mark.parametrize("text", ["", ",", "512,", "8", "8193", "512x512", "-512", "1e3", "\u0665\u0661\u0662"])
def test_sides_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match="^composite size .* is not a list of 16 to 8192 pixels; write 512,768$"):
        parse_sides(text)


OFFICIAL = (512, 768, 1024, 1280, 1536)


def test_composites_have_the_areas_asked_for_and_the_panels_aspect_and_are_never_enlarged():
    for rows, cols, wide, high in ((3, 1, 1024, 512), (2, 2, 672, 864), (1, 2, 736, 1024), (2, 2, 601, 397)):
        layouts, own = composite_layouts(rows, cols, wide / high, wide * high, OFFICIAL), (wide // 16, high // 16)
        assert layouts[-1] == Layout(rows, cols, *(16 * side for side in own)), "cut to whole tokens, not below"
        assert len(layouts) == len(set(layouts)) == 1 + sum(side**2 < rows * cols * wide * high for side in OFFICIAL)
        for layout, side in zip(layouts, OFFICIAL, strict=False):
            share, panel = layout.width * layout.height / side**2, (layout.panel_width, layout.panel_height)
            assert share <= 1 and (share > 0.85 or layout == layouts[-1])
            assert all(
                0 <= goal - real < 16 for goal, real in zip(ideal(side, rows * cols, wide, high), panel, strict=True)
            )


def ideal(side, panels, wide, high):
    """Width and height of a panel before it is cut."""
    scale = min(1, side / (panels * wide * high) ** 0.5) + 1e-9
    return wide * scale, high * scale


def test_a_picture_smaller_than_every_size_is_taken_once_as_it_is_and_the_smallest_is_a_token():
    assert composite_layouts(1, 2, 1.0, 100 * 100, OFFICIAL) == [Layout(1, 2, 96, 96)]
    assert composite_layouts(1, 2, 1.0, 9, OFFICIAL) == [Layout(1, 2, 16, 16)]
