"""Speech to text: a recording of any length in pieces that the model can hear at once, cut where it is quiet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from iolite.generate.model import Model

# The prompt of the model card.
PROMPT = (
    "Transcribe the following speech segment in {LANGUAGE} into {LANGUAGE} text.\n\n"
    "Follow these specific instructions for formatting the answer:\n"
    "*   Only output the transcription, with no newlines.\n"
    "*   When transcribing numbers, write the digits, i.e. write 1.7 and not one point seven, "
    "and write 3 instead of three."
)

SEARCH_SECONDS = 10.0  # the cut is looked for in the last third of a 30 s piece
QUIET_SECONDS = 0.2  # a pause between words is about this long; shorter dips lie inside words
STEP_SECONDS = 0.02


@dataclass(frozen=True)
class Segment:
    """What is said between two moments of a recording, in seconds. `notice` as in `Reply`."""

    start: float
    end: float
    text: str
    notice: str | None = None


def prompt_for(model: Model, language: str) -> str:
    """The checkpoint's own transcription prompt, or the model card's; {LANGUAGE} in it becomes the language."""
    return (model.processor.transcribe_prompt or PROMPT).replace("{LANGUAGE}", language)


def cut_at_silences(samples: np.ndarray, longest: int, rate: int = 16_000) -> list[tuple[int, int]]:
    """(start, stop) of consecutive pieces of at most `longest` samples that together are all of samples [s].

    Each cut is in the middle of the quietest QUIET_SECONDS within SEARCH_SECONDS (or half a piece, if that is less)
    before the limit; of equally quiet moments the latest.
    """
    quiet, step = int(QUIET_SECONDS * rate), int(STEP_SECONDS * rate)
    search = max(min(int(SEARCH_SECONDS * rate), longest // 2), quiet)
    pieces, start = [], 0
    while len(samples) - start > longest:
        first = start + longest - search
        power = np.square(samples[first : start + longest], dtype=np.float64)
        total = np.concatenate(([0.0], power.cumsum()))
        begins = np.arange(0, len(power) - quiet + 1, step)
        energy = total[begins + quiet] - total[begins]
        quietest = begins[len(energy) - 1 - int(energy[::-1].argmin())]
        stop = first + int(quietest) + quiet // 2
        pieces.append((start, stop))
        start = stop
    return [*pieces, (start, len(samples))]


def transcribe(
    model: Model, samples: np.ndarray, language: str = "English", max_tokens: int = 512
) -> Iterator[Segment]:
    """Segments of speech in samples, float32 [s] of 16 kHz mono in [-1, 1], each as soon as it is heard.

    Thinking is off, the choice of tokens is greedy, and every piece is heard on its own, after the prompt's text.
    """
    rate = model.processor.sampling_rate
    longest = model.processor.audio_seq_length * model.processor.audio_samples_per_token
    text = prompt_for(model, language)
    for start, stop in cut_at_silences(samples, longest, rate):
        sound = {"type": "audio", "audio": samples[start:stop], "sampling_rate": rate}
        message = {"role": "user", "content": [{"type": "text", "text": text}, sound]}
        reply = model.chat([message], max_tokens=max_tokens, temperature=0.0)
        yield Segment(start / rate, stop / rate, reply.text.strip(), reply.notice)
