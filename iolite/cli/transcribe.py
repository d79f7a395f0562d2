"""`iolite transcribe`: what is said in sound and video files."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from iolite.cli import options
from iolite.cli.attachments import attach
from iolite.cli.terminal import put, say, working

if TYPE_CHECKING:
    import numpy as np

    from iolite.generate.model import Model
    from iolite.generate.transcribe import Segment


@click.command(short_help="Write down what is said in sound and video files.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("-m", "--model", default="nano", show_default=True, metavar="MODEL", help="The model.")
@click.option("--language", metavar="NAME", help="The language that is spoken, in English.  [default: English]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each file.")
@click.option("-n", "--max-tokens", type=click.IntRange(min=1), default=512, help="Longest text of one piece.")
@options.add(*options.LOADING)
def command(
    files: tuple[str, ...], model: str, language: str | None, as_json: bool, max_tokens: int, **loading: Any
) -> None:
    """Print what is said in each FILE, a sound or a video; - is stdin.

    A recording longer than the model can hear at once (30 s) is cut at pauses, and its text comes piece by piece.
    Several files are printed as FILE: TEXT.
    """
    sources = [sys.stdin.buffer.read() if file == "-" else attach("audio", file).source for file in files]
    loaded = options.load_model(model, **loading)
    own = loaded.processor.transcribe_prompt
    if language and own and "{LANGUAGE}" not in own:
        say(f"note: this model's own prompt names no language; --language {language} changes nothing")
    from iolite.media.audio import decode_audio

    for file, source in zip(files, sources, strict=True):
        samples = decode_audio(source)
        if not as_json and len(files) > 1:
            put(f"{file}: ")
        segments = listen(loaded, samples, file, language or "English", max_tokens, show=not as_json)
        if as_json:
            found = {
                "file": file,
                "seconds": len(samples) / loaded.processor.sampling_rate,
                "text": join(segments),
                "segments": [asdict(segment) for segment in segments],
            }
            put(json.dumps(found, ensure_ascii=False))
        put("\n")


def listen(model: Model, samples: np.ndarray, file: str, language: str, max_tokens: int, show: bool) -> list[Segment]:
    """All segments of one recording; show prints each as it comes."""
    from iolite.generate.transcribe import transcribe

    seconds = len(samples) / model.processor.sampling_rate
    segments: list[Segment] = []
    heard = transcribe(model, samples, language, max_tokens)
    while True:
        done = segments[-1].end if segments else 0.0
        with working(f"{file}: {done:.0f} of {seconds:.0f} s"):
            segment = next(heard, None)
        if segment is None:
            return segments
        if segment.notice:
            say(f"note: {file}, {segment.start:.1f} to {segment.end:.1f} s: {segment.notice}")
        if show and segment.text:
            put((" " if join(segments) else "") + segment.text)
        segments.append(segment)


def join(segments: list[Segment]) -> str:
    """The whole text."""
    return " ".join(segment.text for segment in segments if segment.text)
