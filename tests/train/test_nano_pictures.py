"""Pictures: sizes, legibility by template matching, colours, and labels in the right patches."""

import random
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from iolite.train.nano import pictures
from iolite.train.nano.fonts import Face
from iolite.train.nano.pictures import COLOURS, SHAPES, Glyphs, Look

FACE = Face(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 0, "DejaVu Sans", "dejavu sans")
NOISE = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)


def glyphs(height: float = 30.0, angle: float = 0.0) -> Glyphs:
    return pictures.render_digits(FACE, Look(height, angle, stretch=1.0, blur=0.0))


def draw(text: str, width: int, one: Glyphs, seed: int = 0, difficulty: float = 0.0) -> pictures.Picture:
    dice = random.Random(seed)
    corners = pictures.layout_digits(text, one.geometry.tolist(), one.angle, width, dice)
    assert corners is not None
    return pictures.compose_digits(text, [one.masks[int(c)] for c in text], corners, width, dice, NOISE, difficulty)


def test_digits_have_the_asked_height() -> None:
    one = glyphs(36)
    # 3 and 8 overshoot the line a little; reducing by three moves an edge by less than a pixel at each side
    assert abs(one.geometry[:, 0].max() - 36) <= 2


@pytest.mark.parametrize(("text", "width"), [("7", 48), ("7", 144), ("42", 96), ("309", 144), ("1984", 144)])
def test_ink_is_dark_on_light_and_stays_inside(text: str, width: int) -> None:
    picture = draw(text, width, glyphs(24, angle=5))
    assert picture.pixels.shape == (48, width, 3)
    assert picture.pixels.dtype == np.uint8
    frame = np.concatenate([picture.pixels[[0, -1]].reshape(-1, 3), picture.pixels[:, [0, -1]].reshape(-1, 3)])
    assert frame.min() > 180  # only paper at the border
    assert picture.pixels.min() < 130


def test_every_digit_is_where_the_layout_says() -> None:
    one = glyphs(30)
    dice = random.Random(3)
    corners = pictures.layout_digits("1984", one.geometry.tolist(), 0.0, 144, dice)
    assert corners is not None
    picture = pictures.compose_digits("1984", [one.masks[int(c)] for c in "1984"], corners, 144, dice, NOISE, 0.0)
    ink = 255.0 - picture.pixels.mean(2)
    for character, (x, y) in zip("1984", corners, strict=True):
        h, w = one.masks[int(character)].shape
        part = ink[y : y + h, x : x + w].ravel()
        likeness = [
            np.corrcoef(part, mask.ravel())[0, 1] if mask.shape == (h, w) else 0.0
            for mask in map(np.asarray, one.masks)
        ]
        assert int(np.argmax(likeness)) == int(character)


def test_a_string_that_is_too_wide_is_refused() -> None:
    assert pictures.layout_digits("1984", glyphs(42).geometry.tolist(), 0.0, 96, random.Random(0)) is None


def test_labels_name_the_digit_nearest_to_each_patch() -> None:
    one = glyphs(24)
    masks = [one.masks[int(c)] for c in "58"]
    picture = pictures.compose_digits("58", masks, [(10, 10), (110, 10)], 144, random.Random(0), NOISE, 0.0)
    assert picture.labels == ["5", "", "8"]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_part_of_the_box(shape: str) -> None:
    # area over bounding box: circle pi/4, square 1 (less when turned), triangle and diamond 1/2
    low, high = {
        "circle": (0.74, 0.83),
        "square": (0.66, 1.0),
        "triangle": (0.36, 0.58),
        "star": (0.24, 0.46),
        "diamond": (0.4, 0.62),
        "cross": (0.3, 0.65),
    }[shape]
    dice = random.Random(shape)
    for _ in range(20):
        ink = pictures.render_shape(shape, dice) > 127
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert box >= 100
        assert low - 0.05 < ink.sum() / box < high + 0.05


@pytest.mark.parametrize("colour", COLOURS)
def test_a_shape_has_its_colour(colour: str) -> None:
    mask = np.zeros((48, 48), np.uint8)
    mask[16:32, 16:32] = 255
    for seed in range(20):
        picture = pictures.compose_shape("square", colour, mask, random.Random(seed), NOISE, 1.0)
        inside = picture.pixels[18:30, 18:30].reshape(-1, 3).mean(0)
        distance = {name: min(np.abs(inside - base).sum() for base in bases) for name, bases in COLOURS.items()}
        assert min(distance, key=distance.__getitem__) == colour
        assert picture.labels in (["square"], [colour])


def test_difficulty_zero_is_dark_ink_on_light_paper() -> None:
    for seed in range(100):
        ink, paper = pictures.digit_colours(random.Random(seed), 0.0)
        assert max(ink) <= 140
        assert min(paper) >= 195


def test_difficulty_one_keeps_three_in_four_dark_on_light() -> None:
    dice = random.Random(0)
    light = [min(pictures.digit_colours(dice, 1.0)[1]) >= 195 for _ in range(2000)]
    assert 0.70 < np.mean(light) < 0.82  # 0.75 and the few coloured ones that happen to be light
