"""Documents become texts and pictures of pages."""

from __future__ import annotations

import base64

import pytest
from PIL import Image
from support.pdf import a_pdf, a_scan, locked

from iolite.documents import Document, open_documents, read_document
from iolite.errors import MediaError
from iolite.media.limits import Limits
from iolite.media.pdf import Page
from iolite.messages import normalise

WORDS, SCAN, EMPTY = Page("Some words.", 842, 595, False), Page("", 842, 595, False), Page("", 842, 595, True)


def pdf(*pages: Page) -> Document:
    return Document("the PDF", data=b"%PDF-", pages=pages)


def test_words_are_laid_out_page_by_page():
    assert list(pdf(WORDS, EMPTY, WORDS).layout("a b.pdf")) == [
        "[a b.pdf]\n[page 1]\nSome words.\n\n[page 2]\n(empty)\n\n[page 3]\nSome words.\n[end of a b.pdf]"
    ]
    assert list(Document("the document", text="Hello.\n").layout("x\ny" * 100)) == [
        f"[{('x y' * 100)[:100]}]\nHello.\n[end of {('x y' * 100)[:100]}]"
    ]
    assert next(Document("the document", text="").layout(None)) == "[document]\n[end of document]"


def test_pictures_stand_behind_the_number_of_their_page():
    mixed = pdf(SCAN, WORDS, SCAN)
    assert mixed.looked_at("auto", sees=True) == [0, 2]
    assert list(mixed.layout("a.pdf", [0, 2])) == [
        "[a.pdf]\n[page 1]", 0, "[page 2]\nSome words.\n\n[page 3]", 2, "[end of a.pdf]",
    ]  # fmt: skip
    assert mixed.looked_at("pictures", sees=True) == [0, 1, 2]
    assert mixed.looked_at("text", sees=True) == mixed.looked_at("auto", sees=False) == []
    assert "[page 1]\n(no text)\n\n[page 2]" in next(mixed.layout("a.pdf"))


@pytest.mark.parametrize(
    ("document", "pages", "sees", "told", "hint"),
    [
        (pdf(SCAN), "text", True, "holds no text", "pictures of its pages"),
        (pdf(SCAN, EMPTY), "auto", False, "holds no text", "takes no pictures"),
        (pdf(EMPTY), "auto", True, "holds no text", "pictures of its pages"),
        (pdf(*[WORDS] * 9), "pictures", True, "has 9 pages to be looked at; 8 pages may", "or its text"),
        (pdf(WORDS, *[SCAN] * 9), "auto", True, "has 9 pages without text; 8 pages may", "of their own"),
        (Document("the document", text="x"), "pictures", True, "has no pages", "leave out"),
    ],
)
def test_what_cannot_be_looked_at(document, pages, sees, told, hint):
    with pytest.raises(MediaError) as caught:
        document.looked_at(pages, sees, Limits(max_page_pictures=8))
    assert told in str(caught.value) and hint in caught.value.hint


def test_pages_are_drawn_at_the_size_that_the_model_sees():
    (first,) = pdf(SCAN).sizes([0], max_soft_tokens=280, patch_size=48)
    assert first == (0, 19 * 48, 14 * 48)
    data = a_scan(Image.new("RGB", (60, 60), "red"), Image.new("RGB", (90, 30), "blue"))
    document = read_document(data)
    pictures = list(document.pictures([1, 0], 4, 48))
    assert [picture.shape for picture in pictures] == [(48, 144, 3), (96, 96, 3)]
    assert pictures[0][24, 72].argmax() == 2 and pictures[1][24, 24].argmax() == 0


def test_known_by_their_bytes(tmp_path):
    uri = "data:application/x-whatever;base64," + base64.b64encode(a_pdf("one", "two")).decode()
    assert [page.text for page in read_document(uri).pages] == ["one", "two"]
    (tmp_path / "notes").write_text("%PDF is a format. Größe", encoding="utf-16")
    assert read_document(tmp_path / "notes").text == "%PDF is a format. Größe"
    for data, told in ((b"\x89PNG\r\n\x1a\n\0\0", "neither a PDF nor a text"), (locked(), "the PDF is locked")):
        with pytest.raises(MediaError, match=told):
            read_document(data)
    with pytest.raises(MediaError, match=r"the document '.*notes' has 23 characters; 9 are allowed"):
        read_document(str(tmp_path / "notes"), limits=Limits(max_text=9))


def test_texts_after_a_document_join_it():
    """A template would put them right behind its last word."""
    parts = [
        {"type": "text", "text": "Compare"},
        {"type": "document", "document": "a"}, {"type": "file", "file": {"file_data": "data:,b", "filename": "b"}},
        {"type": "text", "text": "please."}, {"type": "image", "image": "c.png"}, {"type": "text", "text": "Now."},
    ]  # fmt: skip
    found = normalise([{"role": "system", "content": "x"}, {"role": "user", "content": parts}])
    messages, media = open_documents(*found, lambda one: [f"<{one.name}", found[1][2], f"{one.source}>"])
    assert messages[0]["content"] == "x"
    assert messages[1]["content"] == [
        {"type": "text", "text": "Compare"},
        {"type": "text", "text": "<None"}, {"type": "image"}, {"type": "text", "text": "a>\n\n<b"},
        {"type": "image"}, {"type": "text", "text": "data:,b>\n\nplease."},
        {"type": "image"}, {"type": "text", "text": "Now."},
    ]  # fmt: skip
    assert [one.source for one in media] == ["c.png"] * 3
