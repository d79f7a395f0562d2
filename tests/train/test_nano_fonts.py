"""Fonts: what is kept, what counts as one design, and that the split is fixed and clean."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest

from iolite.errors import UsageError
from iolite.train.nano import fonts
from iolite.train.nano.fonts import Face, FontSplit, find_fonts, split_faces

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # always there: DejaVu, STIX and Computer Modern


@pytest.fixture(scope="module")
def split() -> FontSplit:
    return find_fonts([FONTS])


def faces(*designs: str) -> list[Face]:
    return [Face(f"/{name}.ttf", 0, name, name) for name in designs]


def test_no_design_is_on_both_sides(split: FontSplit) -> None:
    trained, held = ({face.design for face in half} for half in (split.train, split.held_out))
    assert trained
    assert held
    assert not trained & held


def test_find_fonts_is_deterministic(split: FontSplit) -> None:
    assert find_fonts([FONTS]) == split


def test_split_depends_on_names_only() -> None:
    names = [f"font {i}" for i in range(200)]
    forward, backward = split_faces(faces(*names)), split_faces(faces(*reversed(names)))
    assert {face.design for face in forward.held_out} == {face.design for face in backward.held_out}
    more = split_faces(faces(*names, "another"))
    assert {face.design for face in forward.held_out} <= {face.design for face in more.held_out}


def test_split_holds_out_about_the_promised_share() -> None:
    held = split_faces(faces(*(f"font {i}" for i in range(1000)))).held_out
    # a binomial of 1,000 at 0.15 has a standard deviation of 11; four of them
    assert 105 < len(held) < 195


def test_styles_of_one_family_are_one_design(split: FontSplit) -> None:
    sans = {face.design for face in split.train + split.held_out if "DejaVuSans-" in face.path}
    assert len(sans) == 1


def test_a_font_whose_digits_are_pictures_is_left_out(split: FontSplit) -> None:
    paths = {Path(face.path).name for face in split.train + split.held_out}
    assert "DejaVuSans.ttf" in paths
    assert "cmex10.ttf" not in paths  # large brackets
    assert "cmsy10.ttf" not in paths  # symbols


def test_digit_pictures_are_ten_different_ones() -> None:
    pictures = fonts.digit_pictures(Face(str(FONTS / "DejaVuSans.ttf"), 0, "", "").font(48))
    assert pictures is not None
    assert pictures.shape == (10, 16, 16)
    assert len({picture.tobytes() for picture in pictures}) == 10
    assert np.all((pictures >= 0) & (pictures <= 1))


def test_few_designs_are_told_with_the_packages_to_install(split: FontSplit) -> None:
    (note,) = split.notes
    assert "fonts-roboto" in note
    assert FontSplit(tuple(faces(*(f"font {i}" for i in range(fonts.ENOUGH_DESIGNS)))), ()).notes == ()


def test_no_fonts_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    with pytest.raises(UsageError) as error:
        find_fonts([tmp_path])
    assert "apt-get install" in (error.value.hint or "")
