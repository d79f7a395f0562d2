"""Where the media of a request may come from: out of the request itself, and elsewhere only as the server allows.

What is named by a URL or a path is refused here, before anything is opened; a model that was made by `guarded` would
refuse it too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from iolite.errors import MediaError, MessageError
from iolite.generate.model import Model
from iolite.messages import normalise
from iolite.server.settings import Settings

MOST_FRAMES = 256  # of one video; each becomes some seventy tokens
NOWHERE = Path(os.devnull)  # as the media folder: no path leads to something below it


def guarded(model: Model, settings: Settings) -> Model:
    """The same model, which reads no media but those that the settings allow."""
    limits = replace(
        model.builder.limits,
        max_frames=MOST_FRAMES,
        max_bytes=settings.max_upload,
        max_page_pictures=settings.max_media,
    )
    root = settings.media_path or NOWHERE
    return replace(
        model, builder=replace(model.builder, media_root=root, allow_urls=settings.allow_urls, limits=limits)
    )


def check_sources(messages: Sequence[Mapping[str, Any]], settings: Settings) -> None:
    """Raises MediaError for too many media, and for those that may not be fetched."""
    _, attachments = normalise(messages)
    if len(attachments) > settings.max_media:
        raise MediaError(f"the request has {len(attachments)} media; {settings.max_media} are allowed")
    for attachment in attachments:
        _check(attachment.source, attachment.kind, settings)


def _check(source: Any, kind: str, settings: Settings) -> None:
    if isinstance(source, list) and kind == "video" and len(source) <= MOST_FRAMES:
        for frame in source:  # a video as a list of pictures
            _check(frame, "image", settings)
        return
    if isinstance(source, np.ndarray):
        return  # samples of our own: JSON holds no arrays
    if source is None:
        raise MessageError(f"a part of type {kind!r} holds nothing")
    if not isinstance(source, str):
        raise MediaError(f"a part of type {kind!r} holds neither a data: URI nor base64")
    scheme = source[:16].partition(":")[0].lower() if ":" in source[:16] else ""
    if scheme == "data":
        return
    if scheme in ("http", "https"):
        if not settings.allow_urls:
            raise MediaError("this server fetches no URLs", "send the data as base64, or serve with --allow-urls")
    elif scheme != "file":
        raise MediaError("a medium is neither a data: URI nor a URL", "send it as data:TYPE;base64,…")
    elif settings.media_path is None:
        raise MediaError("this server opens no files", "send the data as base64, or serve with --media-path FOLDER")
