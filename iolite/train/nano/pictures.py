"""Small pictures to read and to name: digit strings in any font, and one coloured shape.

Drawing is split in two. `render_digits` and `render_shape` make anti-aliased ink masks, slowly and once, for the store.
`compose_digits` and `compose_shape` lay such masks out and colour them for every sample, in about 0.1 ms.

A picture is 48 pixels high and 48, 96 or 144 wide, so it becomes 1, 2 or 3 tokens without being resized.
`difficulty` in [0, 1] widens the choice of ink and paper, from dark on white to inverted and coloured: reading starts
an order of magnitude sooner on dark ink and light paper.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from iolite.train.nano.fonts import DIGITS, Face

PATCH = 48
_OVERSAMPLING = 3  # masks are drawn this much larger, then reduced

Rgb = tuple[float, float, float]

# Each name covers a region of hues, not a point. Grey and white are left out: the layer norm over a patch keeps the
# direction from paper to ink and drops its length, so grey looks like black, and white on white paper is nothing.
COLOURS: dict[str, tuple[Rgb, ...]] = {
    "red": ((255, 0, 0), (215, 25, 35), (175, 15, 25)),
    "green": ((0, 128, 0), (35, 170, 65), (70, 200, 60), (0, 230, 20)),
    "blue": ((0, 0, 255), (30, 70, 205), (20, 35, 140), (45, 115, 235)),
    "yellow": ((255, 255, 0), (255, 232, 20), (245, 225, 50)),
    "orange": ((255, 165, 0), (255, 140, 0), (242, 118, 22)),
    "purple": ((128, 0, 128), (150, 50, 205), (105, 35, 155)),
    "pink": ((255, 105, 180), (255, 130, 190), (240, 85, 165)),
    "black": ((0, 0, 0), (35, 35, 35)),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")


@dataclass(frozen=True)
class Look:
    """How one set of ten digits is drawn."""

    height: float  # pixels from the highest to the lowest point among the ten digits
    angle: float  # degrees, counter-clockwise
    stretch: float  # width over natural width: a picture of 4:3 reaches the model stretched to 2:1
    blur: float  # pixels, as left by cameras and by scaling up


@dataclass(frozen=True)
class Glyphs:
    """Ten digit masks of one face and look; offsets are from the centre of the digit's advance box."""

    masks: tuple[np.ndarray, ...]  # ten uint8 [h, w], 255 is ink
    geometry: np.ndarray  # float32 [10, 5]: h, w, left, top, advance, in pixels
    angle: float


@dataclass(frozen=True)
class Picture:
    """A picture, and for every patch (raster order) the word it should make the model think of, or ""."""

    pixels: np.ndarray  # uint8 [48, W, 3]
    labels: list[str]


def random_look(dice: random.Random) -> Look:
    """A look from the distribution the store is filled with."""
    return Look(
        height=dice.uniform(22, 42),
        angle=0.0 if dice.random() < 0.35 else max(-9.0, min(9.0, dice.gauss(0, 3.5))),
        stretch=1.0 if dice.random() < 0.4 else math.exp(dice.uniform(-0.3, 0.35)),
        blur=dice.uniform(0.3, 0.9) if dice.random() < 0.3 else 0.0,
    )


def render_digits(face: Face, look: Look) -> Glyphs:
    """Draw the ten digits of a face."""
    probe = face.font(100)
    boxes = [probe.getbbox(character, anchor="ls") for character in DIGITS]
    top, bottom = min(box[1] for box in boxes), max(box[3] for box in boxes)
    scale = look.height * _OVERSAMPLING / (bottom - top)  # drawn pixels per pixel of the probe
    font = face.font(100 * scale)
    side = 2 * math.ceil(0.8 * look.height) * _OVERSAMPLING  # holds the rotated box of the widest digits
    size = (round(side / _OVERSAMPLING * look.stretch), side // _OVERSAMPLING)
    masks, geometry = [], np.empty((10, 5), np.float32)
    for digit, character in enumerate(DIGITS):
        advance = font.getlength(character)
        canvas = Image.new("L", (side, side))
        place = ((side - advance) / 2, side / 2 - scale * (top + bottom) / 2)
        ImageDraw.Draw(canvas).text(place, character, fill=255, font=font, anchor="ls")
        if look.angle:
            canvas = canvas.rotate(look.angle, Image.Resampling.BICUBIC)
        if look.blur:
            canvas = canvas.filter(ImageFilter.GaussianBlur(look.blur * _OVERSAMPLING))
        small = canvas.resize(size, Image.Resampling.BICUBIC)
        box = small.point(lambda ink: 255 * (ink > 8)).getbbox() or (0, 0, 1, 1)
        mask = np.asarray(small.crop(box))
        masks.append(mask)
        left, up = box[0] - size[0] / 2, box[1] - size[1] / 2
        geometry[digit] = (*mask.shape, left, up, advance / _OVERSAMPLING * look.stretch)
    return Glyphs(tuple(masks), geometry, look.angle)


def layout_digits(
    text: str, geometry: list[list[float]], angle: float, width: int, dice: random.Random
) -> list[tuple[int, int]] | None:
    """Top-left corner of every digit's mask in a 48 x `width` picture, or None when the string does not fit."""
    rows = [geometry[int(character)] for character in text]  # h, w, left, top, advance
    height = max(row[0] for row in rows)
    natural = sum(row[4] for row in rows)
    room = (width - 3 - natural) / (len(text) - 0.5)
    if room < 0:
        return None
    gap = dice.random() ** 2 * min(room, 0.4 * height)
    pen, slope = 0.0, math.tan(math.radians(angle))
    corners = []
    for row in rows:
        centre = pen + row[4] / 2
        corners.append((centre + row[2], row[3] - slope * centre))
        pen += row[4] + gap
    left = min(x for x, _ in corners)
    right = max(x + row[1] for (x, _), row in zip(corners, rows, strict=True))
    up = min(y for _, y in corners)
    down = max(y + row[0] for (_, y), row in zip(corners, rows, strict=True))
    spare_x, spare_y = width - 2 - (right - left), PATCH - 2 - (down - up)
    if spare_x < 0 or spare_y < 0:
        return None
    dx, dy = 1 - left + dice.random() * spare_x, 1 - up + dice.random() * spare_y
    return [(round(x + dx - 0.25), round(y + dy - 0.25)) for x, y in corners]


def compose_digits(
    text: str,
    masks: list[np.ndarray],
    corners: list[tuple[int, int]],
    width: int,
    dice: random.Random,
    noise: np.ndarray,
    difficulty: float,
) -> Picture:
    """Put one mask per character of `text` at its corner, choose ink and paper, add noise.

    `noise` is a long float32 array of standard normal values from which a random stretch is taken.
    """
    canvas = np.zeros((PATCH, width), np.uint8)
    centres = []
    for mask, (x, y) in zip(masks, corners, strict=True):
        h, w = mask.shape
        x, y = min(max(x, 0), width - w), min(max(y, 0), PATCH - h)
        part = canvas[y : y + h, x : x + w]
        np.maximum(part, mask, out=part)
        centres.append(x + w / 2)
    ink, paper = digit_colours(dice, difficulty)
    labels = []
    for middle in range(PATCH // 2, width, PATCH):
        distance, character = min(
            (abs(centre - middle), character) for centre, character in zip(centres, text, strict=True)
        )
        labels.append(character if distance <= 30 else "")
    return Picture(_paint(canvas, ink, paper, dice, noise, difficulty), labels)


def digit_colours(dice: random.Random, difficulty: float) -> tuple[Rgb, Rgb]:
    """Ink and paper of a digit picture: dark on light at difficulty 0, one in four otherwise at difficulty 1."""
    kind = dice.random()
    if kind >= 0.25 * difficulty:
        return _dark(dice), _light(dice)
    if kind < 0.11 * difficulty:
        return _light(dice), _dark(dice)
    while True:
        ink: Rgb = (dice.uniform(0, 255), dice.uniform(0, 255), dice.uniform(0, 255))
        paper: Rgb = (dice.uniform(0, 255), dice.uniform(0, 255), dice.uniform(0, 255))
        if abs(_luminance(ink) - _luminance(paper)) > 95:
            return (ink, paper) if _luminance(ink) < _luminance(paper) or dice.random() < 0.4 else (paper, ink)


def render_shape(shape: str, dice: random.Random) -> np.ndarray:
    """One filled shape of random size, place, slight rotation and stretch: uint8 [48, 48], 255 is ink."""
    side = PATCH * 4
    points = _outline(shape, dice)
    free = shape == "circle" or (shape in ("triangle", "star") and dice.random() < 0.25)
    turn = math.radians(dice.uniform(-180, 180) if free else max(-11.0, min(11.0, dice.gauss(0, 5))))
    stretch = 1.0 if dice.random() < 0.5 else math.exp(dice.uniform(-0.15, 0.15))
    cos, sin = math.cos(turn), math.sin(turn)
    points = [((x * cos - y * sin) * stretch, x * sin + y * cos) for x, y in points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    extent = max(max(xs) - min(xs), max(ys) - min(ys))
    scale = dice.uniform(20, 44) * 4 / extent
    left = dice.uniform(4, side - 4 - scale * (max(xs) - min(xs))) - scale * min(xs)
    top = dice.uniform(4, side - 4 - scale * (max(ys) - min(ys))) - scale * min(ys)
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).polygon([(left + scale * x, top + scale * y) for x, y in points], fill=255)
    if dice.random() < 0.25:
        canvas = canvas.filter(ImageFilter.GaussianBlur(dice.uniform(1, 3)))
    return np.asarray(canvas.reduce(4))


def compose_shape(
    shape: str, colour: str, mask: np.ndarray, dice: random.Random, noise: np.ndarray, difficulty: float
) -> Picture:
    """Colour a shape mask [48, 48]; its one label is the shape or the colour, by chance."""
    spread = (6 + 14 * difficulty) * (0.4 if colour == "black" else 1.0)
    base = COLOURS[colour][0] if dice.random() > 0.4 + 0.6 * difficulty else dice.choice(COLOURS[colour])
    ink = tuple(min(255.0, max(0.0, value + dice.uniform(-spread, spread))) for value in base)
    dark_paper = colour != "black" and dice.random() < 0.1 * difficulty
    shade = dice.uniform(0, 50) if dark_paper else 255 - dice.random() ** 2 * 40 * difficulty
    paper = tuple(min(255.0, max(0.0, shade + dice.uniform(-8, 8) * difficulty)) for _ in range(3))
    pixels = _paint(mask, ink, paper, dice, noise, difficulty)  # type: ignore[arg-type]
    return Picture(pixels, [shape if dice.random() < 0.5 else colour])


def _outline(shape: str, dice: random.Random) -> list[tuple[float, float]]:
    """The corners of a shape about the origin, y downwards."""
    if shape == "square":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    if shape == "diamond":
        slim = dice.uniform(0.62, 1.0)
        return [(0, -1), (slim, 0), (0, 1), (-slim, 0)]
    if shape == "cross":
        a = dice.uniform(0.24, 0.38)
        return [
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        ]
    corners, inner = {"circle": (48, 1.0), "triangle": (3, 1.0), "star": (10, dice.uniform(0.36, 0.5))}[shape]
    radii = [inner if shape == "star" and i % 2 else 1.0 for i in range(corners)]
    turns = [2 * math.pi * i / corners - math.pi / 2 for i in range(corners)]
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turns, strict=True)]


def _paint(
    mask: np.ndarray, ink: Rgb, paper: Rgb, dice: random.Random, noise: np.ndarray, difficulty: float
) -> np.ndarray:
    """Blend ink over paper by the mask: uint8 [H, W, 3]."""
    start, step = np.array(paper, np.float32), (np.array(ink, np.float32) - paper) / 255
    pixels = mask[:, :, None] * step.astype(np.float32) + start
    if (sigma := dice.random() * 5 * difficulty) > 0.5:
        offset = int(dice.random() * (len(noise) - pixels.size))
        pixels += sigma * noise[offset : offset + pixels.size].reshape(pixels.shape)
        np.clip(pixels, 0, 255, out=pixels)
    return pixels.astype(np.uint8)


def _dark(dice: random.Random) -> Rgb:
    if dice.random() < 0.5:
        return (dice.uniform(0, 50),) * 3
    return dice.uniform(0, 110), dice.uniform(0, 80), dice.uniform(0, 140)


def _light(dice: random.Random) -> Rgb:
    if dice.random() < 0.5:
        return (dice.uniform(235, 255),) * 3
    return dice.uniform(215, 255), dice.uniform(215, 255), dice.uniform(195, 255)


def _luminance(colour: Rgb) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
