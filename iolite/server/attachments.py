"""What people attach on the chat page: known by its bytes, checked at once, its cost in tokens told before sending."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iolite.errors import MediaError
from iolite.generate.model import Model
from iolite.media.audio import decode_audio
from iolite.media.image import decode_image, resized_shape
from iolite.server.chats import Attached, File
from iolite.server.pdf import pdf_pages

MOST_TEXT = 1_000_000  # characters of a text

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
    if type == "application/pdf":
        pages = pdf_pages(data)
        text = "\n\n".join(f"[page {number}]\n{page}" for number, page in enumerate(pages, start=1))
        return _text(model, data, text, {"pages": len(pages)}, type)
    if type == OTHER and (decoded := _decoded(data)) is not None:
        return _text(model, data, decoded, {}, "text/plain")
    kind = type.partition("/")[0] if type != OTHER else announced.partition("/")[0]
    if kind == "video" and announced.startswith("audio/"):
        kind, type = "audio", type.replace("video/", "audio/")
    measure = {"image": _picture, "audio": _sound, "video": _video}.get(kind)
    if measure is None:
        raise MediaError("the file is no picture, sound, video, PDF or text", "convert it to one of these")
    return Taken(kind, type, data, None, measure(model, data))


def _decoded(data: bytes) -> str | None:
    """Bytes as text, None when they are none."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _text(model: Model, data: bytes, text: str, info: Mapping[str, Any], type: str) -> Taken:
    if len(text) > MOST_TEXT:
        raise MediaError(f"the text has {len(text):,} characters; {MOST_TEXT:,} are allowed")
    return Taken("text", type, data, text, {**info, "tokens": len(model.tokenizer.encode(text))})


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
    if file.kind == "text":
        return {"type": "text", "text": f"[{attached.name}]\n{file.text}\n[end of {attached.name}]\n\n"}
    part: dict[str, Any] = {
        "type": file.kind,
        file.kind: f"data:{file.type};base64,{base64.b64encode(file.data).decode()}",
    }
    if file.kind == "image" and attached.tokens is not None:
        part["max_soft_tokens"] = attached.tokens
    if file.kind == "video":
        part["sound"] = True
    return part
