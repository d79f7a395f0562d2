"""What people attach on the chat page: known by its bytes, checked at once, its cost in tokens told before sending."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iolite.documents import Document, decoded, read_document
from iolite.errors import MediaError
from iolite.generate.model import Model
from iolite.media.audio import decode_audio
from iolite.media.image import decode_image, resized_shape
from iolite.media.pdf import is_pdf
from iolite.server.chats import Attached, File

# (where, bytes that are there) -> the type that a browser shows it as. Nothing that a browser would run is in here.
_TYPES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG\r\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF8", "image/gif"),
    (8, b"WEBP", "image/webp"),
    (4, b"ftypavif", "image/avif"),
    (4, b"ftypM4A", "audio/mp4"),
    (4, b"ftyp", "video/mp4"),
    (8, b"WAVE", "audio/wav"),
    (0, b"ID3", "audio/mpeg"),
    (0, b"\xff\xfb", "audio/mpeg"),
    (0, b"\xff\xf3", "audio/mpeg"),
    (0, b"OggS", "audio/ogg"),
    (0, b"fLaC", "audio/flac"),
    (0, b"\x1aE\xdf\xa3", "video/webm"),
    (0, b"%PDF-", "application/pdf"),
)
OTHER = "application/octet-stream"


@dataclass(frozen=True)
class Taken:
    """A file that may be attached, as `Chats.keep` takes it."""

    kind: str
    type: str
    data: bytes
    text: str | None
    info: Mapping[str, Any]


def take(model: Model, data: bytes, announced: str = "") -> Taken:
    """Finds out what bytes are and what they cost. announced: the type that the browser gives them, which only tells
    sound from video in containers that hold either. MediaError for what the model cannot take."""
    if not data:
        raise MediaError("the file is empty")
    type = next((kind for at, mark, kind in _TYPES if data[at : at + len(mark)] == mark), OTHER)
    if is_pdf(data) and type in ("application/pdf", OTHER):
        document = read_document(data, limits=model.builder.limits)
        return Taken("document", "application/pdf", data, _words(document), _document(model, document))
    if type == OTHER and decoded(data) is not None:
        text = read_document(data, limits=model.builder.limits).text or ""
        return Taken("text", "text/plain", data, text, {"tokens": len(model.tokenizer.encode(text))})
    kind = type.partition("/")[0] if type != OTHER else announced.partition("/")[0]
    if kind == "video" and announced.startswith("audio/"):
        kind, type = "audio", type.replace("video/", "audio/")
    measure = {"image": _picture, "audio": _sound, "video": _video}.get(kind)
    if measure is None:
        raise MediaError("the file is no picture, sound, video, PDF or text", "convert it to one of these")
    return Taken(kind, type, data, None, measure(model, data))


def _words(document: Document) -> str:
    """What a search finds of a PDF."""
    return "\n\n".join(page.text for page in document.pages)


def _document(model: Model, document: Document) -> dict[str, Any]:
    """tokens: of its text, with pictures of the pages that have none (so many: `pictures`); None for a PDF that is
    pictures alone. costs: of all its pages as pictures, for each number of tokens that a page may be given."""
    limits, vision = model.builder.limits, model.config.vision
    bare = document.looked_at("auto", vision is not None, limits)
    costs = {}
    if vision is not None and len(document.pages) <= limits.max_page_pictures:
        all_pages = document.looked_at("pictures", True, limits)
        costs = {str(budget): _reading(model, document, all_pages, budget) for budget in budgets(model)}
    tokens = None
    if any(page.text for page in document.pages):
        tokens = _reading(model, document, bare, model.processor.image_max_soft_tokens)
    return {"pages": len(document.pages), "pictures": len(bare), "tokens": tokens, "costs": costs}


def _reading(model: Model, document: Document, looked_at: list[int], budget: int) -> int:
    """Tokens of a document of which these pages are looked at."""
    sizes = dict[int, int]()
    if looked_at:
        assert model.config.vision is not None
        patch = model.config.vision.model_patch_size
        for number, *drawn in document.sizes(looked_at, budget, patch):
            height, width = resized_shape(*drawn, max_soft_tokens=budget, patch_size=patch)  # long thin ones grow again
            sizes[number] = (height // patch) * (width // patch) + 2  # what begins and ends a picture
    pieces = document.layout("document", looked_at)
    return sum(sizes[piece] if isinstance(piece, int) else len(model.tokenizer.encode(piece)) for piece in pieces)


def _picture(model: Model, data: bytes) -> dict[str, Any]:
    """costs: what it becomes for each number of tokens that it may be given."""
    cost_of(model, {"type": "image", "image": data})  # whether the model takes pictures at all
    height, width = decode_image(data, limits=model.builder.limits).shape[:2]
    assert model.config.vision is not None
    patch = model.config.vision.model_patch_size
    costs = {}
    for budget in budgets(model):
        rows, columns = (s // patch for s in resized_shape(height, width, max_soft_tokens=budget, patch_size=patch))
        costs[str(budget)] = rows * columns
    return {"width": width, "height": height, "costs": costs}


def budgets(model: Model) -> list[int]:
    """The numbers of tokens that a picture may be given, for people to choose from."""
    usual = model.processor.image_max_soft_tokens
    return sorted(model.processor.image_budgets or {max(1, usual // 3), usual})


def _sound(model: Model, data: bytes) -> dict[str, Any]:
    return _sound_info(model, decode_audio(data, limits=model.builder.limits))


def _sound_info(model: Model, samples: np.ndarray) -> dict[str, Any]:
    rate = model.processor.sampling_rate
    tokens = cost_of(model, {"type": "audio", "audio": samples, "sampling_rate": rate})
    return {"tokens": tokens, "seconds": round(len(samples) / rate, 1), "longest": longest(model)}


def recording(model: Model, samples: np.ndarray) -> Taken:
    """What was spoken, float32 [s], as a file: 16-bit PCM, of which it was made."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, model.processor.sampling_rate, 0, "NONE", ""))
        out.writeframes((samples * np.float32(32_768)).astype("<i2").tobytes())
    return Taken("audio", "audio/wav", file.getvalue(), None, _sound_info(model, samples))


def longest(model: Model) -> float:
    """Seconds of sound that the model was made for at once."""
    processor = model.processor
    return processor.audio_seq_length * processor.audio_samples_per_token / processor.sampling_rate


def _video(model: Model, data: bytes) -> dict[str, Any]:
    return {"tokens": cost_of(model, {"type": "video", "video": data, "sound": True})}


def cost_of(model: Model, part: Mapping[str, Any]) -> int:
    """Tokens of one part of a message."""
    with_it = model.builder.build([{"role": "user", "content": [part]}])
    return len(with_it.ids) - len(model.builder.build([{"role": "user", "content": ""}]).ids)


def part_of(file: File, attached: Attached) -> dict[str, Any]:
    """A file as a part of a message."""
    kind, data = file.kind, file.data
    if kind == "text":  # what `decoded` made of the bytes, or an earlier version of a PDF
        kind, data = "document", (file.text or "").encode()
    part: dict[str, Any] = {"type": kind, kind: f"data:{file.type};base64,{base64.b64encode(data).decode()}"}
    if kind == "document":
        part |= {"name": attached.name, "pages": "auto" if attached.tokens is None else "pictures"}
    if kind in ("image", "document") and attached.tokens is not None:
        part["max_soft_tokens"] = attached.tokens
    if file.kind == "video":
        part["sound"] = True
    return part
