"""Pictures, sounds, videos and PDFs that a person names or drops into a line of text.

A path counts when it has a known ending and the file exists; quotes, backslashes before blanks, `~` and file:// are
understood. One path at an end of the text is taken out of it; any other is replaced by the file's name, so that
"compare a.png and b.png" still reads. Something that is plainly a path (it has a slash) but is not there is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from iolite.errors import MediaError

ENDINGS = {
    "image": "png jpg jpeg webp gif bmp tif tiff avif",
    "audio": "wav mp3 flac ogg oga opus m4a aac wma aiff aif",
    "video": "mp4 m4v mov mkv webm avi mpg mpeg",
    "document": "pdf",
}
_KINDS = {ending: kind for kind, endings in ENDINGS.items() for ending in endings.split()}
_ENDING = rf"\.(?:{'|'.join(sorted(_KINDS, key=len, reverse=True))})"
_PATH = re.compile(
    rf"""'(?P<single>[^'\n]+{_ENDING})'|"(?P<double>[^"\n]+{_ENDING})\""""
    rf"""|(?<!\S)(?P<bare>(?!['"])(?:\\.|[^\s"\\])+?{_ENDING})(?=[\s,;:!?)]|\.(?:\s|$)|$)""",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Attachment:
    """One file to send along, or the bytes that came in its place."""

    kind: str  # "image" | "audio" | "video" | "document"
    source: str | bytes
    pages: str = "auto"  # of a document: how the pages of a PDF are read

    @property
    def name(self) -> str:
        return Path(self.source).name if isinstance(self.source, str) else "what came through stdin"

    def part(self) -> dict[str, Any]:
        """The content part of a message."""
        part = {"type": self.kind, self.kind: self.source}
        if self.kind == "video":
            return {**part, "sound": True}  # who shows a video means what is said in it too
        if self.kind == "document":
            return {**part, "name": self.name if isinstance(self.source, str) else None, "pages": self.pages}
        return part


def kind_of(path: str) -> str | None:
    """What a file name's ending says it holds, or None."""
    return _KINDS.get(Path(path).suffix.lower().removeprefix("."))


def attach(kind: str, path: str) -> Attachment:
    """A file that was named as a picture, sound, video or document. MediaError when it is not there."""
    if re.match(r"(data|https?|file):", path, re.IGNORECASE):
        return Attachment(kind, path)  # not a path: `read_source` knows what it is
    where = os.path.expanduser(path)  # unlike Path.expanduser, it never raises
    if not os.path.isfile(where):  # unlike Path.is_file, it never raises, however long the name
        raise _missing(kind, path)
    return Attachment(kind, str(Path(where).absolute()))


def _missing(kind: str, path: str) -> MediaError:
    shown = repr(path if len(path) <= 200 else path[:200] + "…")
    if os.path.isdir(os.path.expanduser(path)):
        return MediaError(f"{shown} is a folder, not a file", f"name one {kind} file")
    if os.path.exists(os.path.expanduser(path)):
        return MediaError(f"{shown} is not an ordinary file", "pipe it in instead, and give - as the file")
    return MediaError(f"there is no {kind} file {shown}", "check the path; quote it when it holds blanks")


def pick_paths(text: str) -> tuple[str, list[Attachment]]:
    """The text without the paths of media in it, and those media in their order."""
    hits = [(match, found) for match in _PATH.finditer(text) if (found := _existing(match))]
    if len(hits) == 1:
        match, found = hits[0]
        before, after = text[: match.start()].rstrip(), text[match.end() :].lstrip()
        if not before or not after:
            return before or after, [found]
    for match, found in reversed(hits):
        text = text[: match.start()] + found.name + text[match.end() :]
    return text, [found for _, found in hits]


def _existing(match: re.Match[str]) -> Attachment | None:
    written = match["single"] or match["double"] or re.sub(r"\\(.)", r"\1", match["bare"])
    if re.match(r"(?!file:)[a-z]+://", written, re.IGNORECASE):
        return None  # an address stays text: nothing is fetched because a prompt mentions it
    path = unquote(written[7:]) if written.lower().startswith("file://") else written
    kind = kind_of(path)
    assert kind is not None
    where = os.path.expanduser(path)
    if os.path.isfile(where):
        return Attachment(kind, str(Path(where).absolute()))
    if path.startswith(("/", "./", "../", "~")) or ("/" in path and match["bare"]):
        raise _missing(kind, path)
    return None


def user_message(text: str, attachments: Sequence[Attachment]) -> dict[str, Any]:
    """A user's message: pictures, videos and documents before the text and sound after it, as the model was trained."""
    before = [a.part() for a in attachments if a.kind != "audio"]
    after = [a.part() for a in attachments if a.kind == "audio"]
    if not before and not after:
        return {"role": "user", "content": text}
    middle = [{"type": "text", "text": text}] if text else []
    return {"role": "user", "content": [*before, *middle, *after]}
