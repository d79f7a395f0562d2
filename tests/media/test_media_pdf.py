"""PDFs to words and pictures of pages, and what becomes of bad ones."""

from __future__ import annotations

import contextlib
import zlib

import numpy as np
import pytest
from PIL import Image
from support.pdf import FONT, a_form, a_pdf, a_scan, drawing, file_of, locked, stream

from iolite.errors import MediaError
from iolite.media.limits import Limits
from iolite.media.pdf import Page, draw_pages, is_pdf, read_pages

HALVES = b"1 0 0 rg 0 50 100 50 re f 0 0 1 rg 0 0 100 50 re f"  # red above blue


def drawn(data, *wanted, **more) -> list[np.ndarray]:
    return list(draw_pages(data, wanted, **more))


def test_words_and_sizes():
    first, second, third = read_pages(a_pdf("naïve (café)\nwith a second line", "", "§ 3", size=(595, 842)))
    assert first == Page("naïve (café)\nwith a second line", 842, 595, empty=False)
    assert second == Page("", 842, 595, empty=True)
    assert third.text == "§ 3"


def test_words_that_were_cut_at_the_end_of_a_line_are_whole():
    (page,) = read_pages(a_pdf("a docu-\nment is read"))
    assert page.text.replace("\n", "") == "a document is read"


def test_what_was_filled_into_a_form():
    data = a_form("Ada Lovelace")
    (page,) = read_pages(data)
    assert page.text == "Your name:\nAda Lovelace"
    (filled,), (blank,) = drawn(data, (0, 300, 300)), drawn(a_form(""), (0, 300, 300))
    assert not np.array_equal(filled, blank)


def test_a_scan_has_no_words_but_is_not_empty():
    (page,) = read_pages(a_scan(Image.new("RGB", (100, 50), "red")))
    assert page == Page("", 50, 100, empty=False)


def test_pages_are_drawn_at_the_size_asked_for():
    data = drawing(HALVES)
    tall, wide = drawn(data, (0, 96, 48), (0, 48, 144))
    for picture, shape in ((tall, (96, 48, 3)), (wide, (48, 144, 3))):
        assert picture.shape == shape
        assert picture[0, 0].tolist() == picture[shape[0] // 2 - 1, -1].tolist() == [255, 0, 0]
        assert picture[-1, -1].tolist() == [0, 0, 255]
    (turned,) = drawn(drawing(HALVES, page=b"/Rotate 90"), (0, 48, 48))
    assert turned[0, -1].tolist() == [255, 0, 0] and turned[0, 0].tolist() == [0, 0, 255]
    (blank,) = drawn(a_pdf(""), (0, 48, 48))
    assert (blank == 255).all()


def test_the_right_pages_in_the_order_asked_for():
    data = a_scan(*(Image.new("RGB", (60, 60), colour) for colour in ("red", "lime", "blue")))
    found = drawn(data, (2, 48, 48), (0, 48, 48))
    assert [picture[24, 24].argmax() for picture in found] == [2, 0]


def nested(depth: int) -> list[bytes]:
    """Forms that draw the next one ten times each."""
    head = b"/Type/XObject/Subtype/Form/BBox[0 0 9 9]"
    within = [head + b"/Resources<</XObject<</I %d 0 R>>>>" % (number + 6) for number in range(depth)]
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Resources<</XObject<</I 5 0 R>>>>/Contents 4 0 R>>"
    begin = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>", page, stream(b"/I Do")]
    return [*begin, *(stream(b"/I Do " * 10, more) for more in within), stream(b"0 0 9 9 re f", head)]


def packed(times: int) -> bytes:
    """A page whose content unpacks to a hundred million bytes of text."""
    content = zlib.compress(b"BT /F1 9 Tf " + b"(aaaaaaaaaaaaaaaa) Tj " * times + b"ET", 9)
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Resources<</Font<</F1 5 0 R>>>>/Contents 4 0 R>>"
    return file_of([
        b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>", page,
        stream(content, b"/Filter/FlateDecode"), FONT,
    ])  # fmt: skip


def tree(depth: int) -> bytes:
    """A tree of pages with nothing but branches."""
    branches = [b"<</Type/Pages/Kids[%d 0 R]/Count 1>>" % (number + 3) for number in range(depth)]
    return file_of([b"<</Type/Catalog/Pages 2 0 R>>", *branches, b"<</Type/Page/MediaBox[0 0 9 9]>>"])


BAD = {
    "locked": (locked(), "locked by a password"),
    "no PDF": (b"%PDF-1.7\n" + b"x" * 200, "damaged"),
    "nothing": (b"", "damaged"),
    "cut short": (a_pdf("one", "two")[:300], "damaged"),
    "its own page": (file_of([b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[2 0 R]/Count 1>>"]), "damaged"),
    "a deep tree": (tree(5000), "damaged"),
    "many pages": (a_pdf(*["x"] * 60), "has 60 pages; the limit is 50"),
    "many words": (packed(10_000), "more than 20,000 characters"),
    "a bomb of words": (packed(2_000_000), "PDF"),  # by its words, memory or time, whichever comes first
    "a bomb of forms": (file_of(nested(12)), "PDF"),
}
SMALL = Limits(max_pages=50, max_text=20_000, max_decode_seconds=2, max_decode_memory=2**29)


@pytest.mark.parametrize("name", BAD)
def test_bad_ones_are_refused_in_our_words(name):
    data, told = BAD[name]
    with pytest.raises(MediaError) as caught:
        read_pages(data, limits=SMALL, label="the PDF 'a.pdf'")
    assert str(caught.value).startswith("the PDF 'a.pdf' ")
    assert told in str(caught.value)
    assert "pdfium" not in str(caught.value).lower()


@pytest.mark.parametrize(
    "data",
    [
        drawing(b"[" * 20_000 + b"]" * 20_000 + b" TJ"),
        drawing(b"", page=b"/X " + b"[" * 20_000 + b"]" * 20_000),
        drawing(b"q " * 500_000),
    ],
    ids=["arrays", "arrays of a page", "states"],
)
def test_deep_nesting_is_survived(data):
    (page,) = read_pages(data)
    assert page.text == ""
    assert drawn(data, (0, 48, 48))[0].shape == (48, 48, 3)


def test_huge_sizes_cost_what_is_asked_for():
    data = drawing(b"1 0 0 rg 0 0 1000000 1000000 re f", size=(1e6, 1e6))
    (page,) = read_pages(data)
    assert page.width == page.height > 10_000
    assert (drawn(data, (0, 48, 48), limits=Limits(max_decode_memory=2**28))[0] == (255, 0, 0)).all()
    with pytest.raises(MediaError, match="96 x 48 pixels"):
        drawn(data, (0, 48, 96), limits=Limits(max_pixels=48 * 48))


def test_a_huge_picture_in_a_page():
    pixels = stream(zlib.compress(bytes(10**7)), b"/Type/XObject/Subtype/Image/Width 60000/Height 60000"
                    b"/ColorSpace/DeviceRGB/BitsPerComponent 8/Filter/FlateDecode")  # fmt: skip
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Resources<</XObject<</I 5 0 R>>>>/Contents 4 0 R>>"
    data = file_of([
        b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>", page,
        stream(b"9 0 0 9 0 0 cm /I Do"), pixels,
    ])  # fmt: skip
    with contextlib.suppress(MediaError):  # drawn line by line or refused, in the memory there is
        assert drawn(data, (0, 48, 48), limits=Limits(max_decode_memory=2**29))[0].shape == (48, 48, 3)
    assert len(read_pages(data)) == 1


def test_what_is_one():
    assert is_pdf(a_pdf("x")) and is_pdf(b"\xef\xbb\xbf\r\n" + a_pdf("x"))
    assert not is_pdf(b"A PDF begins with %PDF-1.7.") and not is_pdf(b"")


def test_words_are_seen_without_the_fonts_of_the_system():
    (written,) = drawn(a_pdf("words in a font that is not in the file"), (0, 300, 300))
    assert (written[80:110] < 100).any() and (written[:80] == 255).all() and (written[110:] == 255).all()
