"""When somebody begins to speak and when they have ended, by loudness alone: a few sums for each frame of 40 ms.

A frame is loud when it is well above the noise and not very faint. The noise is the quietest that was there lately: it
is taken down at once and up slowly, so that speech does not become noise and a fan that is switched on does. Two loud
frames begin speech, quiet ones for a while end it; pauses between words are shorter than that while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

SILENCE = 0.6  # seconds of quiet that end speech
FAINTEST = -55.0  # dB of full scale; what is below is no speech
MARGIN = 8.0  # dB above the noise
FIRST_NOISE = -50.0  # dB, the most that is believed before anything was heard: it may begin with speech
RISE = 3.0  # dB in a second
ONSET = 2  # loud frames one after another; a click is shorter
BEFORE = 0.24  # seconds before the onset that belong to it: words begin softly


class SpeechEnd:
    """Cuts samples, as they come, into frames, and says which are speech and where it ends."""

    def __init__(
        self, silence: float | None = SILENCE, faintest: float = FAINTEST, rate: int = 16_000, size: int = 640
    ) -> None:
        """silence: seconds, None: everything is speech and has no end. size: samples of a frame."""
        self.silence, self.faintest, self.size = silence, faintest, size
        self._seconds = size / rate
        self._rest = np.empty(0, np.float32)  # of a frame that is not complete
        self._before: deque[np.ndarray] = deque(maxlen=ONSET + round(BEFORE / self._seconds))
        self._noise = FIRST_NOISE
        self._loud = self._quiet = 0  # frames of either kind up to now, one after another
        self._came = 0  # samples
        self.began = 0  # samples that came before what was spoken last
        self.speaking = silence is None

    def push(self, samples: np.ndarray) -> list[tuple[np.ndarray, bool]]:
        """More samples, float32 [s] in [-1, 1], come in; out come pieces of speech, float32 [n, size], each with
        whether speech ends with it."""
        self._came += len(samples)
        samples = np.concatenate((self._rest, samples))
        whole = len(samples) // self.size * self.size
        self._rest = samples[whole:]
        frames = samples[:whole].reshape(-1, self.size)
        if self.silence is None:
            return [(frames, False)] if len(frames) else []
        return list(self._pieces(frames))

    def flush(self) -> np.ndarray:
        """The frame that was begun, filled up with zeros, if it is speech: float32 [0 or 1, size]."""
        rest, self._rest = self._rest, self._rest[:0]
        if not (self.speaking and len(rest)):
            return np.empty((0, self.size), np.float32)
        return np.pad(rest, (0, self.size - len(rest)))[None]

    def reset(self) -> None:
        """What comes next is not part of what was spoken before. The noise is still known."""
        self._rest, self._loud, self._quiet = self._rest[:0], 0, 0
        self._before.clear()
        self.speaking = self.silence is None

    def _pieces(self, frames: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
        begin = 0  # of the frames that were not handed out yet
        for at, level in enumerate(levels(frames)):
            loud = self._is_loud(float(level))
            self._loud, self._quiet = (self._loud + 1, 0) if loud else (0, self._quiet + 1)
            if not self.speaking:
                self._before.append(frames[at])
                if self._loud >= ONSET:
                    self.speaking, begin = True, at + 1
                    since = len(frames) - begin + len(self._before)  # frames
                    self.began = self._came - len(self._rest) - since * self.size
                    yield np.stack(self._before), False
                    self._before.clear()
            elif self._quiet * self._seconds >= (self.silence or 0):
                yield frames[begin : at + 1], True
                self.speaking = False
        if self.speaking and begin < len(frames):
            yield frames[begin:], False

    def _is_loud(self, level: float) -> bool:
        floor = self.faintest - MARGIN  # where less noise would change nothing
        self._noise = max(floor, min(level, self._noise + RISE * self._seconds))
        return level > max(self._noise + MARGIN, self.faintest)


def levels(frames: np.ndarray) -> np.ndarray:
    """The loudness of float32 frames [n, size] in dB of full scale, [n]; a constant is silence."""
    levels: np.ndarray = 10 * np.log10(frames.var(axis=1, dtype=np.float64) + 1e-10)
    return levels
