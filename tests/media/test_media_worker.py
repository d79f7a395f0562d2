"""The child that decodes: quick, confined, and survived, whatever it meets or says."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.media import encode_audio, encode_video, numbered_frames, tone

from iolite.errors import MediaError
from iolite.media import child, worker
from iolite.media.audio import decode_audio
from iolite.media.image import decode_image
from iolite.media.limits import DEFAULT_LIMITS, Limits
from iolite.media.video import decode_video

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory, files and forks are limited on Linux")


def png(side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Replace the decoders of the child: `program(body)` runs `body` with `data` and `request` at hand."""
    worker.close()

    def install(body: str) -> None:
        source = Path(child.__file__).read_text()
        decoder = "def foreign(data, request):\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\n"
        decoder += "DECODERS = dict.fromkeys(DECODERS, foreign)\n"
        path = tmp_path / "child.py"
        path.write_text(source.replace('if __name__ == "__main__":', decoder + '\nif __name__ == "__main__":'))
        monkeypatch.setattr(worker, "_PROGRAM", path)

    yield install
    worker.close()


def run(limits: Limits = DEFAULT_LIMITS, room: int = 10**6) -> list[np.ndarray]:
    return [array for _, array in worker.decode("image", b"data", limits, label="the picture", room=room)]


def test_it_starts_quickly_and_is_kept() -> None:
    """A tenth of a second on an idle machine, and a hundredth when warm; tests may share theirs with others."""
    worker.close()
    data, times = png(), []
    for _ in range(5):
        start = time.perf_counter()
        decode_image(data)
        times.append(time.perf_counter() - start)
    assert times[0] < 2
    assert min(times[1:]) < 0.5
    if sys.platform.startswith("linux"):
        assert len(worker._idle) == 1


@linux
def test_it_is_used_again_after_a_refusal() -> None:
    worker.close()
    decode_image(png())
    kept = worker._idle[0].process.pid
    with pytest.raises(MediaError):
        decode_image(b"no picture")
    decode_image(png())
    assert worker._idle[0].process.pid == kept


def test_threads_have_children_of_their_own() -> None:
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda side: decode_image(png(side)).shape[0], range(1, 41)))
    assert pictures == list(range(1, 41))
    assert len(worker._idle) <= worker._MAX_IDLE


@linux
def test_a_fork_of_the_parent_starts_its_own() -> None:
    decode_image(png())
    before = [kept.process.pid for kept in worker._idle]
    pid = os.fork()
    if pid == 0:
        os._exit(bool(worker._idle) or decode_image(png(3)).shape != (3, 3, 3))
    assert os.waitpid(pid, 0)[1] == 0
    decode_image(png())
    assert [kept.process.pid for kept in worker._idle] == before


# -------------------------------------------------------------------------------------------------- limits


@linux
def test_memory_is_limited(program) -> None:
    program("yield {'shape': [1], 'dtype': 'uint8'}, bytes(bytearray(2**30)[:1])")
    with pytest.raises(MediaError, match=r"needs more than 0\.5 GiB of memory to decode"):
        run(Limits(max_decode_memory=2**29))
    assert len(run()) == 1


def test_the_clock_is_limited(program) -> None:
    program("import time\ntime.sleep(60)\nyield")
    start = time.perf_counter()
    with pytest.raises(MediaError, match="takes longer than 0 s to decode"):
        run(Limits(max_decode_seconds=0.3))
    assert time.perf_counter() - start < 10


@linux
def test_processor_time_is_limited(program, monkeypatch) -> None:
    """With the clock's limit out of the way."""
    monkeypatch.setattr(threading.Timer, "start", lambda self: None)
    program("while True: pass\nyield")
    with pytest.raises(MediaError, match="takes longer than 1 s to decode"):
        run(Limits(max_decode_seconds=1))


def test_a_crash_is_an_error_and_the_next_picture_is_decoded(program, monkeypatch) -> None:
    program("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\nyield")
    with pytest.raises(MediaError, match="cannot be read"):
        run()
    monkeypatch.undo()
    assert decode_image(png()).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "header",
    [
        "{'shape': [2000, 1000], 'dtype': 'uint8'}",  # more than there is room for
        "{'shape': [-1, -5], 'dtype': 'uint8'}",
        "{'shape': ['5'], 'dtype': 'uint8'}",
        "{'shape': 5, 'dtype': 'uint8'}",
        "{'shape': [5], 'dtype': 'object'}",
        "{'shape': [5]}",
        "['shape']",
        "{'shape': [5], 'dtype': 'uint8', 'long': 'x' * 5000}",
    ],
)
def test_lies_are_errors(program, header: str) -> None:
    program(f"yield {header}, b'12345'")
    with pytest.raises(MediaError, match="cannot be read"):
        run()


def test_a_decoders_text_goes_nowhere(program) -> None:
    program("raise ValueError('secret at 0x7ffd1234')\nyield")
    with pytest.raises(MediaError) as caught:
        run()
    assert "secret" not in str(caught.value) + str(caught.value.hint)
    program("raise Refused('secret at 0x7ffd1234', width='secret')\nyield")
    worker.close()
    with pytest.raises(MediaError) as caught:
        run()
    assert "secret" not in str(caught.value) + str(caught.value.hint)


# ----------------------------------------------------------------------------------------------- confinement


@linux
def test_it_can_open_no_file_and_no_socket(program) -> None:
    program("open('/etc/passwd')\nyield")
    with pytest.raises(MediaError, match="refers to other files"):
        run()
    worker.close()
    program("import _socket\n_socket.socket()\nyield")
    with pytest.raises(MediaError):
        run()


def test_it_sees_no_tokens(program, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    program("yield {'shape': [1], 'dtype': 'uint8'}, bytes(['HF_TOKEN' in os.environ])")
    assert run()[0][0] == 0


def test_it_imports_neither_torch_nor_numpy(program) -> None:
    program("yield {'shape': [2], 'dtype': 'uint8'}, bytes(['torch' in sys.modules, 'numpy' in sys.modules])")
    assert run()[0].tolist() == [0, 0]


@pytest.mark.parametrize(
    "playlist",
    [
        "ffconcat version 1.0\nfile {path}\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{path}\n#EXT-X-ENDLIST\n",
        "v=0\nm=audio 5004 RTP/AVP 0\nc=IN IP4 127.0.0.1\n",
        '<?xml version="1.0"?><MPD><Period><AdaptationSet><BaseURL>file://{path}</BaseURL></AdaptationSet></Period></MPD>',
    ],
)
def test_playlists_open_nothing(tmp_path, playlist: str) -> None:
    """Also where nothing but the list of containers stands against them: decoded here, in this process."""
    path = tmp_path / "secret.wav"
    path.write_bytes(encode_audio(tone(16000, 1.0), 16000, "wav", "pcm_s16le", "mono"))
    data = playlist.format(path=path).encode()
    for decode in (decode_audio, decode_video):
        with pytest.raises(MediaError, match="cannot be read"):
            decode(data)
    with pytest.raises((OSError, ValueError, child.Refused)):
        list(child.decode_audio(data, {"max_pixels": 10**6, "max_audio_seconds": 60}))


def test_whatever_the_bytes_it_is_a_picture_or_an_error() -> None:
    """Damaged at every tenth byte or so: no exception but MediaError."""
    rng = np.random.default_rng(0)
    sources = [
        (decode_image, png(32)),
        (decode_audio, encode_audio(tone(16000, 0.1), 16000, "flac", "flac", "mono")),
        (decode_video, encode_video(numbered_frames(4), 10)),
    ]
    for decode, data in sources:
        for _ in range(25):
            damaged = np.frombuffer(data, np.uint8).copy()
            places = rng.integers(0, len(data), max(1, len(data) // 200))
            damaged[places] = rng.integers(0, 256, len(places))
            with contextlib.suppress(MediaError):
                decode(damaged.tobytes())
