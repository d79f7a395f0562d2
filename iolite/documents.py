"""Documents (PDFs and texts) in a message become its text, and pictures of pages where there is no text or where asked.

A document reads like this, with a picture behind the number of a page that is looked at:

    [report.pdf]
    [page 1]
    The words of the first page.

    [page 2]
    ...
    [end of report.pdf]
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iolite.errors import MediaError
from iolite.media.fetch import Source, label_of, read_source
from iolite.media.image import resized_shape
from iolite.media.limits import DEFAULT_LIMITS, Limits
from iolite.media.pdf import Page, draw_pages, is_pdf, read_pages
from iolite.messages import Attachment

_LONGEST_NAME = 100  # characters


@dataclass(frozen=True)
class Document:
    """A text, or a PDF: its bytes and pages. label: what errors call it."""

    label: str
    text: str | None = None
    data: bytes = b""
    pages: tuple[Page, ...] = ()

    def looked_at(self, pages: str, sees: bool, limits: Limits = DEFAULT_LIMITS) -> list[int]:
        """Which pages (from 0) become pictures. pages: as in `Attachment`; sees: whether the model takes pictures.

        MediaError when they are too many, and for a PDF without any text where there are to be no pictures.
        """
        if pages == "pictures" and self.text is not None:
            raise MediaError(f"{self.label} is a text, which has no pages to look at", "leave out pages")
        if pages == "pictures":
            found = list(range(len(self.pages)))
        else:
            bare = [number for number, page in enumerate(self.pages) if not page.text and not page.empty]
            found = bare if pages == "auto" and sees else []
            if not found and self.text is None and not any(page.text for page in self.pages):
                hint = "ask for pictures of its pages" if sees else "this model takes no pictures: send its text"
                raise MediaError(f"{self.label} holds no text", hint)
        most = limits.max_page_pictures
        if len(found) > most:
            asked = "pages to be looked at" if pages == "pictures" else "pages without text"
            raise MediaError(
                f"{self.label} has {len(found):,} {asked}; {most} pages may be pictures",
                "give the pages that matter as a PDF of their own" + (", or its text" if pages == "pictures" else ""),
            )
        return found

    def layout(self, name: str | None, looked_at: Collection[int] = ()) -> Iterator[str | int]:
        """Its texts, and the number of each page that is a picture in its place. No text begins or ends blank."""
        name = " ".join((name or "document").split())[:_LONGEST_NAME]
        written = f"[{name}]"
        for number, page in enumerate(self.pages):
            written += f"\n[page {number + 1}]"
            if number in looked_at:
                yield written.strip()
                yield number
                written = ""
            else:
                written += f"\n{page.text}\n" if page.text else "\n(empty)\n" if page.empty else "\n(no text)\n"
        written = f"{written}\n{self.text or ''}".strip()
        yield f"{written}\n[end of {name}]".strip()

    def sizes(self, looked_at: Sequence[int], max_soft_tokens: int, patch_size: int) -> list[tuple[int, int, int]]:
        """(page, height, width) in pixels: what the model sees of a picture of each page, and nothing more."""
        found = []
        for number in looked_at:
            sides = (max(1, round(side)) for side in (self.pages[number].height, self.pages[number].width))
            found.append((number, *resized_shape(*sides, max_soft_tokens=max_soft_tokens, patch_size=patch_size)))
        return found

    def pictures(
        self, looked_at: Sequence[int], max_soft_tokens: int, patch_size: int, limits: Limits = DEFAULT_LIMITS
    ) -> Iterator[np.ndarray]:
        """uint8 RGB of each of these pages, drawn at its size."""
        sizes = self.sizes(looked_at, max_soft_tokens, patch_size)
        return draw_pages(self.data, sizes, limits=limits, label=self.label)


def read_document(
    source: Source, *, limits: Limits = DEFAULT_LIMITS, media_root: Path | None = None, allow_urls: bool = False
) -> Document:
    """A PDF or a text, known by its bytes. MediaError for anything else, and as in `fetch.read_source`."""
    data = read_source(source, kind="document", limits=limits, media_root=media_root, allow_urls=allow_urls)
    label = label_of(source, "document")
    if is_pdf(data):
        label = label_of(source, "pdf")
        return Document(label, data=data, pages=read_pages(data, limits=limits, label=label))
    text = decoded(data)
    if text is None:
        raise MediaError(f"{label} is neither a PDF nor a text", "send pictures, sound and video as what they are")
    if len(text) > limits.max_text:
        raise MediaError(f"{label} has {len(text):,} characters; {limits.max_text:,} are allowed", "give a part of it")
    return Document(label, text=text)


def decoded(data: bytes) -> str | None:
    """Bytes as text, None when they are none."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def open_documents(
    messages: Sequence[Mapping[str, Any]],
    attachments: Sequence[Attachment],
    open_one: Callable[[Attachment], Iterable[str | Attachment]],
) -> tuple[list[dict[str, Any]], list[Attachment]]:
    """Messages and media as `normalise` gives them, with texts and pictures in the place of documents."""
    media, found = iter(attachments), list[Attachment]()
    opened = [dict(message) for message in messages]
    for message in opened:
        if isinstance(message["content"], list):
            message["content"] = _opened(message["content"], media, open_one, found)
    return opened, found


def _opened(
    content: Sequence[Mapping[str, Any]],
    media: Iterator[Attachment],
    open_one: Callable[[Attachment], Iterable[str | Attachment]],
    found: list[Attachment],
) -> list[dict[str, Any]]:
    """The parts of one message; the media in them are added to found."""
    parts: list[dict[str, Any]] = []
    ended = False  # whether the part before was a document
    for part in content:
        attachment = None if part["type"] == "text" else next(media)
        pieces: Iterable[str | Attachment] = [attachment or part["text"]]
        if attachment and attachment.kind == "document":
            pieces = open_one(attachment)
        for piece in pieces:
            if isinstance(piece, Attachment):
                parts.append({"type": piece.kind})
                found.append(piece)
            elif ended:  # templates put nothing between two texts
                parts[-1]["text"] += f"\n\n{piece}"
            else:
                parts.append({"type": "text", "text": piece})
            ended = False
        ended = attachment is not None and attachment.kind == "document"
    return parts
