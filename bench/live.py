"""How long after the last sample the first token comes, by how long somebody has spoken.

    python bench/live.py                            # the embedded model
    python bench/live.py 12b-int4 --rounds 2        # a folder of `iolite init`

A client of a real server sends noise in frames of 40 ms at the speed of speech, then a commit, and waits for an answer
of one token; beside it, the same recording is sent whole when it has ended. Lengths come in turns, so that all of them
share what else the machine does. The model's own limit on recordings is set aside, up to 30 s.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import threading
import time
import wave
from dataclasses import replace

import httpx
import numpy as np
from websockets.sync.client import connect

import iolite
from iolite.server.listen import Listener
from iolite.server.live import PATH
from iolite.server.settings import Settings

RATE, FRAME = 16_000, 640
KEY = "a-key-of-the-benchmark"
HEADERS = {"Authorization": f"Bearer {KEY}"}
ONE = {"temperature": 0, "max_tokens": 1}


def noise(seconds: float, seed: int) -> bytes:
    dice = np.random.default_rng(seed)
    return (3000 * dice.standard_normal(round(seconds * RATE))).clip(-32_768, 32_767).astype("<i2").tobytes()


def spoken(url: str, data: bytes) -> dict[str, float]:
    """Milliseconds from the last sample to the first token as the client sees it, and as the engine does."""
    with connect(url.replace("http", "ws", 1) + PATH, additional_headers=HEADERS, proxy=None) as talk:
        talk.send(json.dumps({"type": "start", "silence_ms": None, **ONE}))
        assert json.loads(talk.recv())["type"] == "ready"
        begin = time.perf_counter()
        for number, at in enumerate(range(0, len(data), 2 * FRAME)):
            time.sleep(max(0.0, begin + (number + 1) * FRAME / RATE - time.perf_counter()))
            talk.send(data[at : at + 2 * FRAME])
        talk.send('{"type":"commit"}')
        end = time.perf_counter()
        while (found := json.loads(talk.recv()))["type"] != "done":
            assert found["type"] != "error", found
        took = time.perf_counter() - end
    timings = found["timings"]
    return {"client_ms": 1000 * took, "engine_ms": timings["prompt_ms"], "unread_tokens": timings["prompt_n"]}


def sent_whole(url: str, data: bytes) -> float:
    """Milliseconds for the first token of a recording that is sent when it has ended."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, RATE, 0, "NONE", ""))
        out.writeframes(data)
    sound = {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}
    body = {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": sound}]}], **ONE}
    begin = time.perf_counter()
    httpx.post(f"{url}/v1/chat/completions", json=body, headers=HEADERS, timeout=600).raise_for_status()
    return 1000 * (time.perf_counter() - begin)


def measure(url: str, lengths: list[float], rounds: int, whole: bool) -> None:
    spoken(url, noise(1, 0))  # not counted: the first passes make their buffers
    found: dict[float, list[dict[str, float]]] = {length: [] for length in lengths}
    for turn in range(rounds):
        for length in lengths:
            # The same sound twice would be found and not read.
            took = spoken(url, noise(length, 1000 * turn + round(10 * length) + 1))
            if whole:
                took["whole_ms"] = sent_whole(url, noise(length, 1000 * turn + round(10 * length) + 2))
            found[length].append(took)
            rounded = {name: round(value, 1) for name, value in took.items()}
            print(json.dumps({"seconds": length, **rounded}), flush=True)
    for length, rows in found.items():
        medians = {name: round(statistics.median(row[name] for row in rows), 1) for name in rows[0]}
        most = round(max(row["client_ms"] for row in rows), 1)
        print(json.dumps({"median of": rounds, "seconds": length, **medians, "most_client_ms": most}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--seconds", type=float, nargs="+", default=[1, 5, 15, 30])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-whole", action="store_true", help="leave out the recordings that are sent whole")
    asked = parser.parse_args()
    model = iolite.load(asked.model, context=2048)
    most = max(model.processor.audio_seq_length, 751)
    processor = replace(model.processor, audio_seq_length=most)
    model = replace(model, builder=replace(model.builder, processor=processor))
    listener = Listener(model, Settings(port=0, key=KEY))
    ready = threading.Event()
    thread = threading.Thread(target=listener.run_here, args=(ready.set,))
    thread.start()
    try:
        ready.wait(60)
        measure(listener.url, asked.seconds, asked.rounds, not asked.no_whole)
    finally:
        listener.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
