import numpy as np
import pytest
import torch
from PIL import Image

from iclora.layout import (
    Layout,
    compose,
    encode_by_panel,
    generate_mask,
    panel_attention_mask,
    parse_grid,
    parse_mask,
    parse_size,
    paste,
    split,
)
from sampling.images import to_tensor
from sampling.latents import pack

GRIDS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (2, 3)]


def noise_pictures(layout, seed=0):
    draw = np.random.default_rng(seed)
    shape = (layout.panels, layout.panel_height, layout.panel_width, 3)
    return [Image.fromarray(pixels) for pixels in draw.integers(0, 256, shape, dtype=np.uint8)]


def stitch(pictures, layout):
    """All panels as one picture."""
    return paste(Image.new("RGB", (layout.width, layout.height)), dict(enumerate(pictures, start=1)), layout)


@pytest.mark.parametrize("grid", GRIDS)
def test_splitting_what_was_stitched_gives_the_panels_back(grid):
    layout = Layout(*grid, 48, 32)
    pictures = noise_pictures(layout)
    composite = stitch(pictures, layout)
    assert composite.size == (layout.width, layout.height) == (grid[1] * 48, grid[0] * 32)
    assert [panel.tobytes() for panel in split(composite, layout)] == [panel.tobytes() for panel in pictures]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_boxes_cover_every_pixel_once_in_reading_order(grid):
    layout = Layout(*grid, 48, 32)
    cover = np.zeros((layout.height, layout.width), dtype=int)
    boxes = [layout.box(panel) for panel in range(1, layout.panels + 1)]
    for left, top, right, bottom in boxes:
        cover[top:bottom, left:right] += 1
    assert (cover == 1).all()
    assert boxes == sorted(boxes, key=lambda box: (box[1], box[0]))


def test_panel_three_of_a_two_by_two_grid_is_bottom_left():
    assert Layout(2, 2, 64, 48).box(3) == (0, 48, 64, 96)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_token_mask_agrees_with_a_packed_pixel_mask(grid):
    layout = Layout(*grid, 48, 32)
    masked = [panel for panel in range(1, layout.panels + 1) if panel % 2]
    cells = torch.zeros(1, 16, layout.height // 8, layout.width // 8)
    for panel in masked:
        left, top, right, bottom = (edge // 8 for edge in layout.box(panel))
        cells[:, :, top:bottom, left:right] = 1
    mask = generate_mask(masked, layout)
    assert mask.shape == (1, layout.image_tokens, 1) and mask.dtype == torch.float32
    assert torch.equal(mask.expand(-1, -1, 64), pack(cells))


def test_the_composite_holds_kept_panels_and_exact_zero_elsewhere():
    layout = Layout(2, 2, 32, 16)
    pictures = noise_pictures(layout)
    canvas = compose({1: pictures[0], 4: pictures[3]}, layout)
    assert canvas.shape == (1, 3, 32, 64) and canvas.dtype == torch.float32
    assert torch.equal(canvas[:, :, :16, :32], to_tensor(pictures[0]))
    assert torch.equal(canvas[:, :, 16:, 32:], to_tensor(pictures[3]))
    assert (canvas[:, :, :16, 32:] == 0).all() and (canvas[:, :, 16:, :32] == 0).all()
    assert torch.equal(compose(dict(enumerate(pictures, start=1)), layout), to_tensor(stitch(pictures, layout)))


def test_pasting_puts_kept_panels_back_and_leaves_the_rest():
    layout = Layout(2, 2, 32, 16)
    generated, originals = noise_pictures(layout, seed=1), noise_pictures(layout, seed=2)
    composite = stitch(generated, layout)
    panels = split(paste(composite, {2: originals[1], 3: originals[2]}, layout), layout)
    expected = [generated[0], originals[1], originals[2], generated[3]]
    assert [panel.tobytes() for panel in panels] == [panel.tobytes() for panel in expected]
    assert composite.tobytes() == stitch(generated, layout).tobytes()


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((100, 64), "use 96x64 or 112x64"),
        ((64, 100), "use 64x96 or 64x112"),
        ((100, 100), "use 96x96 or 96x112 or 112x96 or 112x112"),
        ((7, 64), "use 16x64"),
        ((0, -3), "use 16x16"),
    ],
)
def test_sizes_off_the_token_grid_are_refused_with_the_nearest_valid_ones(size, nearest):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} is not in multiples of 16 pixels; {nearest}$"):
        Layout(1, 1, *size)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ((0, 2, 64, 64), "has 0 panels; 1 to 64 are possible"),
        ((-2, -1, 64, 64), "has 2 panels; 1 to"),
        ((9, 8, 64, 64), "72 panels; 1 to 64 are possible"),
        ((9999, 9999, 64, 64), "1 to 64"),
        ((1, 3, 4096, 2048), "make 12288x2048 pixels, 98304 tokens; at most 65536"),
        ((1, 1, 64, 16777216), "at most 65536"),
        ((8, 8, 1024, 1024), "262144 tokens"),
    ],
)
def test_absurd_grids_are_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        Layout(*layout)


def test_a_panel_outside_the_grid_is_refused_with_the_valid_range():
    for panel in (0, 5):
        with pytest.raises(ValueError, match=f"panel {panel} is outside the 2x2 grid; panels are numbered 1 to 4"):
            generate_mask([panel], Layout(2, 2, 64, 64))


def test_panels_of_a_wrong_number_size_or_place_are_refused():
    layout = Layout(1, 2, 32, 32)
    picture = Image.new("RGB", (32, 32))
    for wrong in ([picture] * 3, [picture, Image.new("RGB", (32, 48))]):
        with pytest.raises(ValueError):
            stitch(wrong, layout)
    for use in (lambda: paste(picture, {3: picture}, layout), lambda: compose({0: picture}, layout)):
        with pytest.raises(ValueError, match="is outside the 1x2 grid"):
            use()


@pytest.mark.parametrize(("text", "grid"), [("2x2", (2, 2)), ("3x1", (3, 1)), ("1 X 2", (1, 2)), ("2\u00d73", (2, 3))])
def test_a_grid_is_rows_by_columns(text, grid):
    assert parse_grid(text) == grid


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        "0x2",
        "2x0",
        "-1x2",
        "2x2x2",
        "axb",
        "2.0x2",
        "9" * 5000 + "x1",
        "2x2\0",
        "\u0662x2",
    ],
)
def test_other_grids_are_refused_in_one_line(text):
    with pytest.raises(ValueError, match="is not ROWSxCOLS") as caught:
        parse_grid(text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 150


@pytest.mark.parametrize(("text", "size"), [("64", (64, 64)), ("64x48", (64, 48)), ("1024\u00d7512", (1024, 512))])
def test_a_size_is_width_by_height(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "64x", "x64", "0", "-64", "64.5", "1e3", "9" * 5000])
def test_other_sizes_are_refused_in_one_line(text):
    with pytest.raises(ValueError, match="is not WIDTHxHEIGHT") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("text", "panels"),
    [
        ("3", (3,)),
        ("2,4", (2, 4)),
        ("4, 2,2", (2, 4)),
        ("2-4", (2, 3, 4)),
        ("1,3-4", (1, 3, 4)),
        ("all", (1, 2, 3, 4)),
        (" ALL ", (1, 2, 3, 4)),
    ],
)
def test_a_mask_lists_panels_ranges_or_all(text, panels):
    assert parse_mask(text, 4) == panels


@pytest.mark.parametrize("text", ["0", "5", "1,9", "3-5", "0-2", "4-2", "1-999999999"])
def test_a_mask_outside_the_grid_is_refused_with_the_valid_range(text):
    with pytest.raises(ValueError, match="does not fit the grid; panels are numbered 1 to 4 in reading order"):
        parse_mask(text, 4)


@pytest.mark.parametrize("text", ["", "  ", "x", "1,", ",", "1;2", "-1", "1-", "1.5", "1\0", "9" * 5000])
def test_other_masks_are_refused_in_one_line(text):
    with pytest.raises(ValueError, match="is not a list of panels") as caught:
        parse_mask(text, 4)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 150


def test_panels_see_each_other_but_each_its_own_text_only():
    layout = Layout(1, 2, 32, 16)  # tokens 1 1 2 2
    seen = panel_attention_mask(layout, text_length=3)
    words, cells = [1, 1, 1, 2, 2, 2], [1, 1, 2, 2]
    expected = [[w == one for w in words] + [c == one for c in cells] for one in words]
    expected += [[w == one for w in words] + [True] * 4 for one in cells]
    assert seen.tolist() == expected
    assert panel_attention_mask(Layout(1, 1, 32, 32), 5).all(), "a single panel reads everything"
    assert panel_attention_mask(Layout(2, 2, 16, 16), 1).sum() == 4 * 2 + 4 * 5


@pytest.mark.parametrize("grid", GRIDS)
def test_the_autoencoder_is_shown_the_composite_or_its_panels_in_reading_order(grid):
    layout, shown = Layout(*grid, 48, 32), []
    image = torch.randn(2, 3, layout.height, layout.width)

    def halved(x):
        shown.append(x)
        return x[..., ::2, ::2]

    for concat in ("pixels", "tokens"):
        assert torch.equal(encode_by_panel(halved, image, layout, concat), halved(image))
    whole, _, panels, _ = shown
    assert torch.equal(whole, image) and panels.shape == (2 * layout.panels, 3, 32, 48)
    for panel in range(1, layout.panels + 1):
        left, top, right, bottom = layout.box(panel)
        assert torch.equal(panels[panel - 1], image[0, :, top:bottom, left:right])
