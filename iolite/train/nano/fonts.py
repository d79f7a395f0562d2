"""The fonts of this computer that can write digits, split into trained and held-out designs.

A face is kept when its ten digits are distinct and look like digits (dingbats, key caps and ornamental initials do
not). Faces of one family, and families whose digits are copies of one another (Liberation Sans and Arimo; the Latin
digits inside every Noto Sans), form one design. A design is trained on or held out as a whole, by a hash of its name,
so the held-out accuracy is about shapes of digits that training never saw.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from iolite.errors import UsageError

DIGITS = "0123456789"
FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "/usr/share/texmf/fonts",
    "~/.fonts",
    "~/.local/share/fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "C:/Windows/Fonts",
)
SUFFIXES = frozenset({".ttf", ".otf", ".ttc"})  # Type 1 files are older copies of fonts that also come as OpenType
ENOUGH_DESIGNS = 40
HELD_OUT_SHARE = 0.15
DEBIAN_PACKAGES = (
    "fonts-adf-accanthis fonts-adf-baskervald fonts-adf-berenis fonts-adf-gillius fonts-adf-ikarius "
    "fonts-adf-libris fonts-adf-mekanus fonts-adf-romande fonts-adf-switzera fonts-adf-tribun "
    "fonts-adf-universalis fonts-adf-verana fonts-b612 fonts-cantarell fonts-comfortaa fonts-courier-prime "
    "fonts-croscore fonts-crosextra-caladea fonts-crosextra-carlito fonts-dejavu fonts-dosis fonts-ebgaramond "
    "fonts-firacode fonts-freefont-ttf fonts-hack fonts-inconsolata fonts-jetbrains-mono fonts-junction "
    "fonts-lato fonts-league-spartan fonts-liberation2 fonts-linuxlibertine fonts-lmodern fonts-lobstertwo "
    "fonts-noto-core fonts-open-sans fonts-play fonts-quicksand fonts-roboto-slab fonts-roboto-unhinted "
    "fonts-sil-andika fonts-sil-charis fonts-sil-gentium fonts-texgyre fonts-urw-base35"
)

# Words of a family name that tell a weight, a width or an edition, not a design.
_STYLE_WORDS = re.compile(
    r"\b(thin|hairline|(extra|ultra|semi|demi)?[- ]?(light|bold|condensed|cond)|book|regular|medium|retina|demi|heavy|"
    r"black|narrow|cn|cd|med|italic|oblique|(un)?slanted|std|pro|no ?\d|\d+)\b",
    re.IGNORECASE,
)
_GLYPH_SIDE = 16  # every digit is compared as a 16 x 16 picture of its own box
_SAME_DESIGN = 0.05  # mean absolute difference of two such pictures, ink 1 and paper 0, below which they are copies
_LIKE_A_DIGIT = 8  # of ten digits, how many must be nearest to the average form of that digit


@dataclass(frozen=True)
class Face:
    """One style of one font file."""

    path: str
    index: int
    family: str
    design: str  # the family name that stands for all copies of this design

    def font(self, size: float) -> ImageFont.FreeTypeFont:
        """The face at `size` pixels per em."""
        return ImageFont.truetype(self.path, size, index=self.index, layout_engine=ImageFont.Layout.BASIC)


@dataclass(frozen=True)
class FontSplit:
    """The usable faces of this computer; no design is in both halves."""

    train: tuple[Face, ...]
    held_out: tuple[Face, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know: empty, or one sentence about too few fonts."""
        found = len({face.design for face in self.train + self.held_out})
        if found >= ENOUGH_DESIGNS:
            return ()
        return (
            f"only {found} font designs found, {ENOUGH_DESIGNS} or more read better on unseen fonts; "
            f"on Debian: apt-get install {DEBIAN_PACKAGES}",
        )


def find_fonts(folders: Iterable[str | os.PathLike[str]] = FONT_FOLDERS) -> FontSplit:
    """Every usable face under `folders`, split by design. Takes a few seconds for a thousand files.

    Raises UsageError when fewer than two designs are found, for then there is nothing to hold out.
    """
    faces, pictures = [], []
    for path in _font_files(folders):
        for index in range(4 if path.suffix.lower() == ".ttc" else 1):
            try:
                face = Face(str(path), index, "", "")
                font = face.font(48)
            except OSError:  # not a font, or no such face in the collection
                break
            if (picture := digit_pictures(font)) is not None:
                faces.append(Face(str(path), index, font.getname()[0] or path.stem, ""))
                pictures.append(picture)
    keep = _look_like_digits(np.stack(pictures)) if pictures else []
    if keep:
        faces = _name_designs([faces[i] for i in keep], np.stack([pictures[i] for i in keep]))
    split = split_faces(faces)
    if not split.train or not split.held_out:
        raise UsageError("fewer than two fonts with digits were found", f"on Debian: apt-get install {DEBIAN_PACKAGES}")
    return split


def split_faces(faces: Sequence[Face]) -> FontSplit:
    """Hold out about one design in seven, chosen by the hash of its name alone."""
    designs = sorted({face.design for face in faces}, key=_place)
    held = {name for name in designs if _place(name) < HELD_OUT_SHARE} or set(designs[:1])
    return FontSplit(
        train=tuple(face for face in faces if face.design not in held),
        held_out=tuple(face for face in faces if face.design in held),
    )


def digit_pictures(font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """The ten digits, each stretched to its box: float32 [10, 16, 16]; None if any is empty or two are the same.

    A font without digits draws its one "missing" box ten times, so this is the check for coverage too.
    """
    pictures = np.empty((10, _GLYPH_SIDE, _GLYPH_SIDE), np.float32)
    for digit, character in enumerate(DIGITS):
        mask = font.getmask(character, mode="L")
        if min(mask.size) < 2 or max(mask.size) > 200:
            return None
        picture = Image.frombytes("L", mask.size, bytes(mask))
        box = picture.getbbox()
        if box is None:
            return None
        picture = picture.crop(box).resize((_GLYPH_SIDE, _GLYPH_SIDE), Image.Resampling.BOX)
        pictures[digit] = np.asarray(picture, np.float32) / 255
    apart = np.abs(pictures[:, None] - pictures[None]).mean((2, 3)) + np.eye(10)  # [10, 10]
    return pictures if apart.min() > 0.02 else None


def _font_files(folders: Iterable[str | os.PathLike[str]]) -> list[Path]:
    files = {
        Path(root, name)
        for folder in folders
        for root, _, names in os.walk(os.path.expanduser(folder))
        for name in names
        if Path(name).suffix.lower() in SUFFIXES
    }
    return sorted(files)


def _look_like_digits(pictures: np.ndarray) -> list[int]:
    """Indices of the faces whose digits mostly resemble the average digits; pictures [faces, 10, 16, 16]."""
    flat = pictures.reshape(len(pictures), 10, -1)
    keep = np.arange(len(flat))
    for _ in range(2):  # the second round compares with averages that the odd faces no longer blur
        average = flat[keep].mean(0)  # [10, 256]
        distance = np.stack([np.abs(flat - form).mean(2) for form in average], 2)  # [faces, 10, 10]
        right = (distance.argmin(2) == np.arange(10)).sum(1)
        keep = np.flatnonzero(right >= _LIKE_A_DIGIT)
    return keep.tolist()


def _name_designs(faces: Sequence[Face], pictures: np.ndarray) -> list[Face]:
    """Give every face the first (alphabetical) base name among its family and all copies of it."""
    parent = list(range(len(faces)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    bases = [_base_name(face.family) for face in faces]
    first: dict[str, int] = {}
    for i, base in enumerate(bases):
        parent[root(i)] = root(first.setdefault(base, i))
    flat = pictures.reshape(len(faces), -1)
    for i in range(len(faces)):
        copies = np.flatnonzero(np.abs(flat[:i] - flat[i]).mean(1) < _SAME_DESIGN)
        for j in copies.tolist():
            parent[root(j)] = root(i)
    names: dict[int, str] = {}
    for i, base in enumerate(bases):
        names[root(i)] = min(base, names.get(root(i), base))
    return [Face(face.path, face.index, face.family, names[root(i)]) for i, face in enumerate(faces)]


def _base_name(family: str) -> str:
    return " ".join(_STYLE_WORDS.sub(" ", family).split()).lower() or family.lower()


def _place(name: str) -> float:
    """A fixed pseudo-random place in [0, 1) for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
