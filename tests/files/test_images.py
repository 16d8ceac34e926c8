import io
import os
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from sampling.images import (
    MAX_PIXELS,
    fit,
    open_picture,
    picture_size,
    to_picture,
    to_png,
    to_tensor,
)


def noise_picture(width=40, height=24, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(path, data):
    path.write_bytes(data)
    return open_picture(path)


def refusal(path):
    with pytest.raises(ValueError) as caught:
        open_picture(path)
    message = str(caught.value)
    assert "\n" not in message and path.name in message and ";" in message
    return message


def png_with_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 10)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


# conversions


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_a_lossless_rgb_file_is_read_pixel_for_pixel(tmp_path, kind):
    picture = noise_picture()
    assert opened(tmp_path / "a", encoded(picture, kind)).tobytes() == picture.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_other_formats_are_read_as_rgb_of_the_same_size(tmp_path, kind):
    read = opened(tmp_path / "a", encoded(Image.new("RGB", (40, 24), (200, 30, 90)), kind))
    assert read.mode == "RGB" and read.size == (40, 24)
    assert np.abs(np.asarray(read, dtype=int) - (200, 30, 90)).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(noise_picture())
    stored = {  # how a camera that was turned stores the upright picture
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert (np.asarray(opened(tmp_path / "a.png", data)) == upright).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    picture = Image.new("RGBA", (8, 8), (10, 10, 10, 255))
    picture.paste((10, 10, 10, 0), (0, 0, 4, 8))
    if mode == "P":
        palette = Image.new("P", (8, 8), 1)
        palette.putpalette([0, 0, 0, 10, 10, 10])
        palette.paste(0, (0, 0, 4, 8))
        data = encoded(palette, "PNG", transparency=0)
    elif mode == "PA":
        data = encoded(picture.quantize(4), "PNG")  # a palette with an alpha of its own for each entry
    else:
        data = encoded(picture.convert(mode), "PNG")
    read = opened(tmp_path / "a.png", data)
    assert read.mode == "RGB"
    assert read.getpixel((0, 0)) == (255, 255, 255) and read.getpixel((7, 7)) == (10, 10, 10)


def test_half_transparent_black_becomes_mid_grey(tmp_path):
    assert opened(tmp_path / "a", encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG")).getpixel((0, 0))[0] == 127


def test_opaque_alpha_changes_no_pixel(tmp_path):
    picture = noise_picture()
    assert opened(tmp_path / "a", encoded(picture.convert("RGBA"), "PNG")).tobytes() == picture.tobytes()


def test_cmyk_palette_bilevel_and_grey_are_converted(tmp_path):
    red = opened(tmp_path / "a", encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))
    assert red.getpixel((0, 0)) == (255, 0, 0)
    palette = Image.new("RGB", (8, 8), (12, 34, 56)).quantize(4)
    assert opened(tmp_path / "b", encoded(palette, "PNG")).getpixel((0, 0)) == (12, 34, 56)
    assert opened(tmp_path / "c", encoded(Image.new("1", (8, 8), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert opened(tmp_path / "d", encoded(Image.new("L", (8, 8), 77), "PNG")).getpixel((0, 0)) == (77, 77, 77)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("value", range(0, 256, 51))
def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path, kind, value):
    picture = Image.fromarray(np.full((8, 8), value * 257, dtype=np.uint16))
    assert opened(tmp_path / "a", encoded(picture, kind)).getpixel((0, 0)) == (value,) * 3


def test_big_endian_sixteen_bit_grey_is_read_alike(tmp_path):
    picture = Image.frombytes("I;16B", (2, 1), b"\x33\x33\xff\xff")
    assert np.asarray(opened(tmp_path / "a.tiff", encoded(picture, "TIFF")))[0, :, 0].tolist() == [51, 255]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
        ([0.0, 128.0, 255.0], np.float32, [0, 128, 255]),
        ([-1.0, 0.0, 4e9], np.float32, [0, 0, 255]),
        ([0, 257, 65535], np.int32, [0, 1, 255]),
        ([-5, 51, 255], np.int32, [0, 51, 255]),
    ],
)
def test_wide_and_float_grey_is_scaled_by_the_smallest_white_that_clips_nothing(tmp_path, values, kind, expected):
    data = encoded(Image.fromarray(np.array([values], dtype=kind)), "TIFF")
    assert np.asarray(opened(tmp_path / "a.tiff", data))[0, :, 0].tolist() == expected


def test_float_grey_with_nan_is_refused(tmp_path):
    (tmp_path / "a.tiff").write_bytes(encoded(Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)), "TIFF"))
    assert "NaN" in refusal(tmp_path / "a.tiff")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert opened(tmp_path / "a", data).getpixel((8, 8)) == (255, 0, 0)


def test_metadata_of_the_source_does_not_travel_along(tmp_path):
    data = encoded(noise_picture(), "PNG", dpi=(300, 300), icc_profile=b"profile")
    (tmp_path / "b.png").write_bytes(to_png(opened(tmp_path / "a.png", data)))
    assert Image.open(tmp_path / "b.png").info == {}


# refusals


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("BMP", {}),
        ("GIF", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_every_truncation_is_refused(tmp_path, capfd, kind, options):
    data = encoded(noise_picture(16, 16), kind, **options)
    for length in sorted({*range(0, len(data), max(1, len(data) // 60)), *range(len(data) - 14, len(data))}):
        (tmp_path / "a.img").write_bytes(data[:length])
        refusal(tmp_path / "a.img")
    assert capfd.readouterr().err == ""


def test_every_flipped_bit_of_a_png_is_refused(tmp_path):
    data = encoded(Image.new("RGB", (4, 4), "red"), "PNG")
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.png").write_bytes(flipped)
        refusal(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_flipped_bit_gives_a_picture_or_one_line(tmp_path, capfd, kind):
    data = encoded(noise_picture(16, 16), kind)
    draw = random.Random(0)
    for bit in draw.sample(range(len(data) * 8), 150):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.img").write_bytes(flipped)
        try:
            assert open_picture(tmp_path / "a.img").mode == "RGB"
        except ValueError as error:
            assert "\n" not in str(error) and "a.img" in str(error)
    assert capfd.readouterr().err == ""


def test_missing_empty_binary_and_folder_are_refused_each_in_its_own_words(tmp_path):
    assert "no such file" in refusal(tmp_path / "missing.png")
    assert "folder" in refusal(tmp_path)
    (tmp_path / "empty.png").write_bytes(b"")
    assert "empty" in refusal(tmp_path / "empty.png")
    (tmp_path / "binary.png").write_bytes(random.Random(0).randbytes(5000))
    assert "not PNG, JPEG" in refusal(tmp_path / "binary.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert "device" in refusal(tmp_path / "pipe.png")


def test_formats_outside_the_list_never_reach_a_decoder(tmp_path):
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert "not PNG, JPEG" in refusal(tmp_path / "a.eps")
    (tmp_path / "a.ppm").write_bytes(encoded(noise_picture(), "PPM"))
    assert "not PNG, JPEG" in refusal(tmp_path / "a.ppm")


@pytest.mark.parametrize("size", [(10001, 10000), (9600, 12000), (20000, 20000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_from_its_header_without_a_warning(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_with_header(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert f"{MAX_PIXELS // 10**6} megapixels" in refusal(tmp_path / "bomb.png")


def test_the_size_is_read_off_the_header_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(png_with_header(400, 300))  # has no pixels to speak of
    assert picture_size(tmp_path / "a.png") == (400, 300)
    (tmp_path / "a.png").write_bytes(png_with_header(20000, 20000))
    with pytest.raises(ValueError, match="a.png: .*more than 100 megapixels"):
        picture_size(tmp_path / "a.png")


def test_a_picture_too_narrow_for_any_panel_is_refused(tmp_path):
    (tmp_path / "line.png").write_bytes(encoded(Image.new("RGB", (330, 10)), "PNG"))
    assert "330x10 is narrower than 32:1" in refusal(tmp_path / "line.png")


def test_a_file_name_with_a_line_break_still_gives_one_line():
    with pytest.raises(ValueError, match="no such file") as caught:
        open_picture("a\nb\0.png")
    assert "\n" not in str(caught.value)


# fit


@pytest.mark.parametrize("rule", ["crop", "pad", "stretch"])
def test_a_picture_of_the_right_size_is_not_touched(rule):
    picture = noise_picture()
    assert fit(picture, 40, 24, rule).tobytes() == picture.tobytes()


@pytest.mark.parametrize("rule", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (320, 10), (10, 320), (63, 65), (7, 200)])
def test_every_rule_gives_the_asked_size(rule, size):
    assert fit(noise_picture(*size), 48, 32, rule).size == (48, 32)


@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
def test_crop_equals_scaling_to_cover_and_cutting_the_centre(size):
    picture, (wide, high) = noise_picture(*size), (size[0] * 16 // 30, size[1] * 16 // 30)
    left, top = (wide - 16) // 2, (high - 16) // 2
    expected = picture.resize((wide, high), Image.Resampling.LANCZOS).crop((left, top, left + 16, top + 16))
    assert np.abs(np.asarray(fit(picture, 16, 16), dtype=int) - np.asarray(expected)).max() <= 1


def test_stretch_keeps_all_of_the_picture():
    picture = Image.new("RGB", (90, 30), "red")
    picture.paste("lime", (30, 0, 60, 30))
    stretched = fit(picture, 48, 48, "stretch")
    assert [stretched.getpixel((x, 24)) for x in (4, 24, 44)] == [(255, 0, 0), (0, 255, 0), (255, 0, 0)]


def test_pad_adds_mid_grey_bars_on_both_sides():
    padded = fit(Image.new("RGB", (40, 20), "red"), 32, 32, "pad")
    column = [padded.getpixel((16, y)) for y in range(32)]
    assert column == [(128, 128, 128)] * 8 + [(255, 0, 0)] * 16 + [(128, 128, 128)] * 8


# tensors


def test_pixels_and_tensors_are_exact_inverses_for_every_value():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([values, values[::-1], values.T], axis=-1))
    image = to_tensor(picture)
    assert image.shape == (1, 3, 16, 16) and image.dtype == torch.float32
    assert image.min() == -1 and image.max() == 1
    assert to_picture(image).tobytes() == picture.tobytes() == to_picture(image[0]).tobytes()


def test_a_tensor_keeps_rows_columns_and_channels_apart():
    picture = Image.new("RGB", (3, 2))
    picture.putpixel((2, 1), (0, 255, 0))
    assert (to_tensor(picture)[0] > 0).nonzero().tolist() == [[1, 1, 2]]


def test_values_outside_the_range_are_clamped_and_between_are_rounded():
    image = torch.tensor([-9.0, 9.0, 0.0, 0.0019]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert np.asarray(to_picture(image))[0, :, 0].tolist() == [0, 255, 128, 128]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(value):
    with pytest.raises(ValueError, match="the model gave NaN"):
        to_picture(torch.full((3, 2, 2), value))


# writing


def test_png_and_text_come_back_as_written(tmp_path):
    text = {"prompt": "caf\u00e9, a fox\nand \u732b", "config": '{"seed": 1}'}
    (tmp_path / "a.png").write_bytes(to_png(noise_picture(), text))
    assert Image.open(tmp_path / "a.png").text == text
    assert open_picture(tmp_path / "a.png").tobytes() == noise_picture().tobytes()


def test_the_same_picture_and_text_give_the_same_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(to_png(noise_picture(), {"x": "1", "y": "2"}))
    (tmp_path / "b.png").write_bytes(to_png(noise_picture(), {"y": "2", "x": "1"}))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
