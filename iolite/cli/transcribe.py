"""`iolite transcribe`: what is said in sound and video files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
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
@click.option(
    "-n", "--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Longest text of one piece."
)
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
        segments: list[Segment] = []
        for segment in listen(loaded, samples, file, language or "English", max_tokens):
            if segment.notice:
                say(f"note: {file}, {segment.start:.1f} to {segment.end:.1f} s: {segment.notice}")
            if segment.text and not as_json:
                label = f"{file}: " if len(files) > 1 else ""
                put(piece(segment.text, label, first=not join(segments)))
            segments.append(segment)
        if as_json:
            found = {
                "file": file,
                "seconds": len(samples) / loaded.processor.sampling_rate,
                "text": join(segments),
                "segments": [asdict(segment) for segment in segments],
            }
            put(json.dumps(found, ensure_ascii=False) + "\n")
        elif not sys.stdout.isatty():
            put("\n")


def listen(model: Model, samples: np.ndarray, file: str, language: str, max_tokens: int) -> Iterator[Segment]:
    """All segments of one recording as they come, under a spinner."""
    from iolite.generate.transcribe import transcribe

    seconds = len(samples) / model.processor.sampling_rate
    segments, done = transcribe(model, samples, language, max_tokens), 0.0
    while True:
        with working(f"{file}: {done:.0f} of {seconds:.0f} s"):
            segment = next(segments, None)
        if segment is None:
            return
        yield segment
        done = segment.end


def piece(text: str, label: str, first: bool) -> str:
    """How one segment is printed: in one line with the others, but on a terminal, where a spinner stands in the last
    line while the next is heard, in a line of its own."""
    if sys.stdout.isatty():
        return f"{label}{text}\n"
    return label + text if first else f" {text}"


def join(segments: list[Segment]) -> str:
    """The whole text."""
    return " ".join(segment.text for segment in segments if segment.text)
