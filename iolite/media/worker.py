"""Runs `child.py`: foreign bytes in, arrays out, or a MediaError in our own words.

The child gets no environment worth having (no tokens) and no file but its pipes, and its answers are checked like any
other foreign input: raw arrays of stated shape, never pickles, never more bytes than the request allows.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from iolite.errors import MediaError
from iolite.media.limits import Limits

NOUNS = {
    "image": "picture",
    "audio": "sound",
    "video": "video",
    "document": "document",
    "pdf": "PDF",
    "pages": "PDF",
}
_SAVED_AS = {"image": "PNG", "audio": "WAV", "video": "MP4"}
_PROGRAM = Path(__file__).with_name("child.py")
_KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PATH", "SYSTEMROOT", "TMPDIR", "TEMP")
_MAX_HEADER = 4096  # bytes of one JSON line
_MAX_IDLE = 2  # children kept for the next request


class _Child:
    """One child process, asked one thing at a time."""

    def __init__(self) -> None:
        self.killed = False
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_PROGRAM), json.dumps([path for path in sys.path if path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ},
            start_new_session=True,  # its own process group: killed with its fork, and deaf to the user's Ctrl-C
        )
        _all.add(self)
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def ask(self, request: dict[str, Any], data: bytes) -> None:
        head = json.dumps({**request, "bytes": len(data)}).encode()
        self.stdin.write(len(head).to_bytes(4, "little") + head)
        self.stdin.write(data)
        self.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next header; ValueError or EOFError when there is none of the right form."""
        line = self.stdout.readline(_MAX_HEADER)
        if not line:
            raise EOFError
        header = json.loads(line)
        if not isinstance(header, dict):
            raise ValueError
        return header

    def array(self, header: dict[str, Any], room: int) -> np.ndarray:
        """The array that a header announces, of at most `room` bytes."""
        shape, dtype = header["shape"], {"uint8": np.uint8, "float32": np.float32}[header["dtype"]]
        if not (isinstance(shape, list) and all(isinstance(side, int) and side >= 0 for side in shape)):
            raise ValueError
        if math.prod(shape) * np.dtype(dtype).itemsize > room:
            raise ValueError
        array = np.empty(shape, dtype)
        view = array.reshape(-1).view(np.uint8).data
        while view:
            count = self.stdout.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise EOFError
            view = view[count:]
        return array

    def kill(self) -> None:
        """End the process and its fork, from any thread."""
        self.killed = True
        if self.process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()

    def close(self) -> None:
        self.kill()
        self.process.wait()
        _all.discard(self)
        self.stdout.close()
        with contextlib.suppress(OSError):  # what was not yet written has nowhere to go
            self.stdin.close()


_lock = threading.Lock()
_idle: list[_Child] = []
_all: set[_Child] = set()  # those that decode, too


def decode(
    kind: str, data: bytes, limits: Limits, *, label: str, room: int, **options: Any
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Decode `data` as a kind of `child.DECODERS` in a child; yields (header, array) as they arrive.

    `label` names the thing in errors ("the picture 'cat.png'"), `room` is the most bytes all arrays may take together,
    `options` go to the decoder beside the limits. Raises MediaError for all that a child can meet or do.
    """
    child = _take()
    timer = threading.Timer(limits.max_decode_seconds, child.kill)
    timer.daemon = True
    timer.start()
    refused: dict[str, Any] | None = None
    sound = False  # whether the child has answered to the end, and can be asked again
    try:
        child.ask({"kind": kind, **dataclasses.asdict(limits), **options}, data)
        while "shape" in (header := child.answer()):
            array = child.array(header, room)
            room -= array.nbytes
            yield header, array
        refused = header if "refused" in header else None
        sound = True
    except (EOFError, OSError):
        refused = {"refused": _cause_of_death(child)}
    except (ValueError, KeyError, TypeError):  # an answer that is not of the agreed form
        refused = {"refused": "time" if child.killed else "unreadable"}
    finally:
        timer.cancel()
        _give_back(child) if sound and not child.killed else child.close()
    if refused is not None:
        raise media_error(kind, label, limits, str(refused["refused"]), refused)


def _cause_of_death(child: _Child) -> str:
    if child.killed:
        return "time"
    try:
        code = child.process.wait(timeout=5)  # it has closed its end of the pipe, so it is ending
    except subprocess.TimeoutExpired:
        return "unreadable"
    return "time" if code == getattr(signal, "SIGXCPU", None) else "unreadable"


def _take() -> _Child:
    with _lock:
        while _idle:
            child = _idle.pop()
            if child.process.poll() is None:
                return child
            child.close()
    return _Child()


def _give_back(child: _Child) -> None:
    with _lock:
        if sys.platform.startswith("linux") and len(_idle) < _MAX_IDLE:
            _idle.append(child)
            return
    child.close()


@atexit.register
def close() -> None:
    """End the idle children; the next request starts a new one."""
    with _lock:
        while _idle:
            _idle.pop().close()


def kill_all() -> None:
    """End all children, also those at work. For a process that ends without waiting for its threads; takes no lock,
    since one of them may have it."""
    for child in tuple(_all):
        child.kill()


def _forget() -> None:
    """In a fork of this process: the children belong to the parent."""
    global _lock
    _lock = threading.Lock()
    for child in _idle:
        child.process.returncode = 0  # not ours to wait for
        child.stdin.close()
        child.stdout.close()
    _idle.clear()
    _all.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def media_error(kind: str, label: str, limits: Limits, code: str, values: dict[str, Any]) -> MediaError:
    """The error for a code of the child's. Of `values` only numbers are used."""
    noun = NOUNS[kind]
    track = "sound" if kind == "audio" else "picture"

    def number(name: str) -> float:
        value = values.get(name, 0)
        return value if isinstance(value, (int, float)) and math.isfinite(value) else 0

    size = f"{number('width'):.0f} x {number('height'):.0f} pixels"
    seconds = limits.max_video_seconds if kind == "video" else limits.max_audio_seconds
    amount = f"{number('bytes'):,.0f} bytes" if "bytes" in values else f"{number('seconds'):,.2f} s"
    messages = {
        "pixels": (f"is {size}; the limit is {limits.max_pixels:,} pixels", "scale it down first"),
        "seconds": (
            f"lasts {number('seconds'):,.1f} s or more; the limit is {seconds:,.0f} s",
            "cut it into shorter pieces",
        ),
        "short": (
            f"is cut short: its header tells of more than the {amount} that are there",
            "fetch or export it again",
        ),
        "track": (f"has no {track} track", None),
        "empty": ("has no samples", "give a recording that is not empty"),
        "frames": (
            f"would give {number('frames'):,.0f} frames; the limit is {limits.max_frames:,}",
            "ask for fewer frames",
        ),
        "video_pixels": (
            f"would give {number('frames'):,.0f} frames of {size}; the limit is {limits.max_video_pixels:,} pixels "
            "for all frames together",
            "ask for fewer frames, or scale the video down first",
        ),
        "locked": ("is locked by a password", "save it without one"),
        "pages": (
            f"has {number('pages'):,.0f} pages; the limit is {limits.max_pages:,}",
            "give the pages that matter as a PDF of their own",
        ),
        "text": (
            f"has more than {limits.max_text:,} characters",
            "give the pages that matter as a PDF of their own",
        ),
        "memory": (
            f"needs more than {limits.max_decode_memory / 2**30:.1f} GiB of memory to decode",
            "scale it down, or save it in another format",
        ),
        "files": ("refers to other files, which are not opened", "save it as one file"),
        "time": (
            f"takes longer than {limits.max_decode_seconds:.0f} s to decode",
            "give a smaller or shorter one",
        ),
    }
    unreadable = (
        f"cannot be read: it is damaged, cut short, or in no {noun} format that is accepted",
        f"save it again, as {_SAVED_AS[kind]} for instance" if kind in _SAVED_AS else "save it again",
    )
    message, hint = messages.get(code, unreadable)
    return MediaError(f"{label} {message}", hint)
