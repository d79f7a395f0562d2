"""Pictures: sizes, patches and positions against Transformers; every mode and format; bad files."""

from __future__ import annotations

import base64
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from iolite.errors import MediaError
from iolite.media.image import decode_image, image_patches, resized_shape
from iolite.media.limits import Limits

BUDGETS = (70, 140, 280, 560, 1120)
SIZES = [  # (height, width)
    *[(1, 1), (1, 4000), (4000, 1), (3, 997), (47, 49), (48, 48), (96, 192), (480, 640), (572, 1024), (1080, 1920)],
    *[(2, 300), (31, 2000), (768, 768), (100, 101), (1344, 1920), (333, 9), (5, 5000)],
]


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------ against the reference


@pytest.mark.parametrize("budget", BUDGETS)
def test_patches_equal_the_reference(reference, budget: int) -> None:
    processor = reference.image(max_soft_tokens=budget)
    for seed, (height, width) in enumerate(SIZES):
        image = picture(height, width, seed=seed)
        want = processor(images=Image.fromarray(image), return_tensors="pt")
        ours = image_patches(image, max_soft_tokens=budget)
        count = int(want["num_soft_tokens_per_image"][0])
        assert len(ours.pixels) == count == ours.grid[0] * ours.grid[1] <= budget, (height, width)
        # Ours multiplies by 1/255 as the reference does; both are floats in [0, 1], so 1e-6 is under 10 of their steps.
        np.testing.assert_allclose(ours.pixels, want["pixel_values"][0][:count].numpy(), rtol=0, atol=1e-6)
        np.testing.assert_array_equal(ours.positions, want["image_position_ids"][0][:count].numpy())
        assert (want["image_position_ids"][0][count:] == -1).all()


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(BUDGETS))
def test_sizes_equal_the_reference(reference, height: int, width: int, budget: int) -> None:
    rule = sys.modules[reference.image.__module__].get_aspect_ratio_preserving_size
    want = rule(height, width, patch_size=16, max_patches=budget * 9, pooling_kernel_size=3)
    assert resized_shape(height, width, max_soft_tokens=budget) == want


@given(st.integers(1, 20000), st.integers(1, 20000), st.integers(1, 1120))
def test_any_size_keeps_the_budget(height: int, width: int, budget: int) -> None:
    rows, columns = (side / 48 for side in resized_shape(height, width, max_soft_tokens=budget))
    assert rows >= 1
    assert columns >= 1
    assert rows * columns <= budget
    assert rows == int(rows)
    assert columns == int(columns)


@pytest.mark.parametrize(
    ("size", "budget", "want"),
    [
        ((572, 1024), 10, (96, 192)),
        ((1, 4000), 280, (48, 280 * 48)),  # one row, cut at the budget
        ((1, 100), 280, (48, 167 * 48)),
        ((4000, 1), 70, (70 * 48, 48)),
        ((77, 77), 1, (48, 48)),  # where rounding leaves no whole patch
        ((1, 1), 280, (768, 768)),
        ((100, 200), 3, (48, 96)),
        ((100, 300), 3, (48, 144)),
    ],
)
def test_known_sizes(size: tuple[int, int], budget: int, want: tuple[int, int]) -> None:
    assert resized_shape(*size, max_soft_tokens=budget) == want


def test_a_square_of_every_size_has_a_patch_at_budget_one() -> None:
    assert {resized_shape(n, n, max_soft_tokens=1) for n in range(1, 3000)} == {(48, 48)}


def test_a_picture_of_the_right_size_is_not_resized() -> None:
    image = picture(96, 144)
    patches = image_patches(image, max_soft_tokens=6)
    assert patches.grid == (2, 3)
    patch = patches.pixels[4].reshape(48, 48, 3)  # second row, second column
    np.testing.assert_allclose(patch, image[48:, 48:96] / 255, atol=1e-7)
    assert patches.positions.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]


# --------------------------------------------------------------------------------------- formats and modes


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "TGA", "PCX", "SGI", "DIB", "QOI", "MSP", "WEBP"])
def test_lossless_formats(format: str) -> None:
    image = picture(32, 32) if format != "MSP" else np.full((32, 32, 3), 255, np.uint8)
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(
        decode_image(saved(Image.fromarray(image).convert("1" if format == "MSP" else "RGB"), format, **options)), image
    )


@pytest.mark.parametrize("format", ["JPEG", "JPEG2000", "WEBP", "AVIF", "MPO"])
def test_lossy_formats(format: str) -> None:
    image = np.full((40, 50, 3), (200, 100, 50), np.uint8)
    got = decode_image(saved(Image.fromarray(image), format))
    assert got.shape == image.shape
    assert np.abs(got.astype(int) - image).max() <= 4  # one colour: only the colour space rounds


def test_every_kind_of_source(tmp_path, monkeypatch) -> None:
    image = picture(10, 12)
    data = saved(Image.fromarray(image), "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (data, path, str(path), path.as_uri(), uri, image, Image.fromarray(image), memoryview(data)):
        np.testing.assert_array_equal(decode_image(source), image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(orientation: int) -> None:
    upright = picture(20, 30)
    stored = {  # what a camera held so writes; the tag tells how to undo it
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data), upright)
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(decode_image(opened), upright)


def test_alpha_lies_on_white() -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 255, np.array([0, 51, 204, 255])
    want = np.array([255, 204, 51, 0])  # red stays at 255, the others are 255 - alpha
    got = decode_image(saved(Image.fromarray(rgba), "PNG"))
    assert (got[..., 0] == 255).all()
    assert (got[..., 1] == want).all()
    assert (got[..., 2] == want).all()
    np.testing.assert_array_equal(decode_image(rgba), got)


def test_grey_with_alpha_lies_on_white() -> None:
    la = np.zeros((2, 3, 2), np.uint8)
    la[..., 1] = (0, 51, 255)
    got = decode_image(saved(Image.fromarray(la), "PNG"))
    assert (got[..., 0] == (255, 204, 0)).all()


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette_with_transparency_lies_on_white(format: str) -> None:
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1] * 4)
    got = decode_image(saved(image, format, transparency=1))
    assert got[0, 0].tolist() == [10, 20, 30]
    assert got[0, 1].tolist() == [255, 255, 255]
    assert decode_image(saved(image, format))[0, 1].tolist() == [40, 50, 60]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(format: str) -> None:
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    got = decode_image(saved(Image.fromarray(grey), format))
    assert got[0, :, 0].tolist() == [0, 1, 128, 255]
    assert (got == got[..., :1]).all()


def test_a_dark_sixteen_bit_png_stays_dark() -> None:
    got = decode_image(saved(Image.fromarray(np.full((5, 5), 200, np.uint16)), "PNG"))
    assert (got == 1).all()


def test_wide_grey_tiffs_are_scaled() -> None:
    floats = np.array([[0.0, 0.5, 1.0]], np.float32)
    assert decode_image(saved(Image.fromarray(floats), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    whole = np.array([[0, 32768, 65535]], np.int32)
    assert decode_image(saved(Image.fromarray(whole), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


def test_sixteen_bit_rgb_png() -> None:
    row = b"\0" + struct.pack(">6H", 65535, 0, 32896, 257, 514, 65535)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    assert decode_image(data).tolist() == [[[255, 0, 128], [1, 2, 255]]]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "RGBX", "LAB", "RGBa", "PA", "HSV", "La"])
def test_pil_modes(mode: str) -> None:
    got = decode_image(Image.new(mode, (3, 2)))
    assert got.shape == (2, 3, 3)
    assert got.dtype == np.uint8


def test_cmyk_jpeg() -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow make red
    got = decode_image(saved(ink, "JPEG"))
    assert np.abs(got.astype(int) - (255, 0, 0)).max() <= 4


def test_lab_tiff() -> None:
    grey = Image.new("LAB", (4, 4), (128, 128, 128))
    got = decode_image(saved(grey, "TIFF"))
    assert got.std(axis=-1).max() <= 2  # neutral, whatever the profile's curve makes of the lightness
    assert 90 < got.mean() < 150


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (decode_image(data) == (255, 0, 0)).all()


# ------------------------------------------------------------------------------------------------- refusals


def test_what_is_no_picture() -> None:
    png = saved(Image.fromarray(picture(50, 50)), "PNG")
    jpeg = saved(Image.fromarray(picture(50, 50)), "JPEG")
    gif = saved(Image.fromarray(picture(50, 50)), "GIF")
    for data in (
        png[: len(png) // 2],
        jpeg[: len(jpeg) // 2],
        gif[:100],
        png[:20],
        b"\0",
        b"hello, world",
        b"%PDF-1.4\n",
    ):
        with pytest.raises(MediaError, match=r"^the picture cannot be read: .* accepted$") as caught:
            decode_image(data)
        assert caught.value.hint
    with pytest.raises(MediaError, match="is empty: 0 bytes"):
        decode_image(b"")


def test_formats_that_run_other_programs_are_refused() -> None:
    postscript = saved(Image.fromarray(picture(8, 8)), "EPS")
    with pytest.raises(MediaError, match="cannot be read"):
        decode_image(postscript)


def test_the_file_is_named() -> None:
    with pytest.raises(MediaError, match=r"the picture 'no/such\.png' is not there"):
        decode_image("no/such.png")


def test_a_bomb_is_refused_by_its_header() -> None:
    """100,000 x 100,000 pixels of which no byte follows: had anything been decoded, the file would be "damaged"."""
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    data += struct.pack(">I", 10) + b"IDAT"
    with pytest.raises(MediaError, match=r"100000 x 100000 pixels; the limit is 64,000,000 pixels"):
        decode_image(data)


def test_limits_hold_for_every_source() -> None:
    image, limits = picture(20, 20), Limits(max_pixels=399, max_bytes=500)
    for source in (image, Image.fromarray(image), saved(Image.new("RGB", (20, 20)), "PNG")):
        with pytest.raises(MediaError, match="20 x 20 pixels; the limit is 399 pixels"):
            decode_image(source, limits=limits)
    with pytest.raises(MediaError, match=r"bytes; the limit is 500"):
        decode_image(saved(Image.fromarray(image), "PNG"), limits=limits)


def test_the_largest_picture_fits_into_the_decoder() -> None:
    """8000 x 8000 RGBA needs 256 MB, three times over while it is laid on white: less than the child may have."""
    data = saved(Image.new("RGBA", (8000, 8000), (0, 0, 0, 128)), "PNG", compress_level=1)
    assert (decode_image(data)[::1999, ::1999] == 127).all()


@pytest.mark.parametrize("shape", [(5,), (4, 4, 2), (0, 4, 3), (2, 4, 4, 3)])
def test_arrays_that_are_no_pictures(shape: tuple[int, ...]) -> None:
    with pytest.raises(MediaError, match="is not a picture"):
        decode_image(np.zeros(shape, np.uint8))
    with pytest.raises(MediaError, match="float64"):
        decode_image(np.zeros((4, 4, 3)))


def test_decoding_needs_no_torch() -> None:
    code = "import sys, iolite.media.image, iolite.media.audio, iolite.media.video; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
