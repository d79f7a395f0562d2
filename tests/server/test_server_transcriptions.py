"""Recordings through the real `openai` client, long ones too."""

from __future__ import annotations

import io
import json
import wave

import httpx
import numpy as np
import openai
import pytest
from support.serving import DEMO, KEY, asking, serving, wait_for

from iolite.generate.transcribe import Segment
from iolite.server.languages import LANGUAGES
from iolite.server.transcriptions import subtitles

DIGITS = DEMO / "digits.wav"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def long_recording() -> io.BytesIO:
    """Twelve times the same digits with a second of silence between, 24 s and more."""
    with wave.open(str(DIGITS)) as file:
        rate, samples = file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), "<i2")
    whole = np.concatenate([np.concatenate([samples, np.zeros(rate, "<i2")])] * 12)
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(whole.tobytes())
    data.seek(0)
    data.name = "long.wav"
    return data


def transcribe(client, file=DIGITS, **more):
    return client.audio.transcriptions.create(model="whisper-1", file=file, **more)


def test_every_format(client):
    assert transcribe(client).text == "309"
    assert transcribe(client, response_format="text") == "309\n"
    verbose = transcribe(client, response_format="verbose_json", language="en")
    assert (verbose.text, verbose.language, len(verbose.segments)) == ("309", "english", 1)
    assert verbose.segments[0].start == 0
    assert verbose.segments[0].end == pytest.approx(verbose.duration)
    assert transcribe(client, response_format="srt").startswith("1\n00:00:00,000 --> 00:00:0")
    assert transcribe(client, response_format="vtt").startswith("WEBVTT\n\n1\n00:00:00.000 --> 00:00:0")


def test_a_long_recording_is_cut(client, nano):
    seconds = nano.processor.audio_seq_length * 0.04
    found = transcribe(client, long_recording(), response_format="verbose_json")
    assert len(found.segments) > 1
    assert all(segment.end - segment.start <= seconds + 1e-6 for segment in found.segments)
    assert [s.start for s in found.segments[1:]] == [s.end for s in found.segments[:-1]]
    assert found.duration > seconds
    events = list(transcribe(client, long_recording(), stream=True))
    assert events[-1].text == found.text
    assert "".join(event.delta for event in events[:-1]) == found.text


def test_pings_while_a_piece_is_heard(script):
    with serving(script.model, ping=0.05) as listener, asking(listener) as http:
        script.say("three")
        script.gate.clear()
        lines = []
        asked = {"files": {"file": DIGITS.read_bytes()}, "data": {"stream": "true"}}
        with http.stream("POST", "/v1/audio/transcriptions", **asked) as response:
            for line in response.iter_lines():
                lines.append(line)
                if lines.count(": ping") == 3:  # one comes at once
                    script.gate.set()
        assert json.loads(lines[-2].removeprefix("data: ")) == {"type": "transcript.text.done", "text": "three"}


def test_who_leaves_a_stream_ends_it(script):
    with serving(script.model, ping=0.05) as listener, asking(listener) as http:
        script.say("three")
        script.gate.clear()
        asked = {"files": {"file": DIGITS.read_bytes()}, "data": {"stream": "true"}}
        with http.stream("POST", "/v1/audio/transcriptions", **asked) as response:
            lines = response.iter_lines()
            assert next(lines) == ": ping"
            wait_for(lambda: listener.app.state.service.answers._open)
        wait_for(lambda: not listener.app.state.service.answers._open)
        script.gate.set()


@pytest.mark.parametrize(
    ("file", "more"),
    [
        (("a.wav", b""), {}),
        (("a.wav", b"RIFF\x00\x00\x00\x00WAVE"), {}),
        (("a.mp3", b"\x00" * 5000), {}),
        (DIGITS, {"language": "x1"}),
        (DIGITS, {"temperature": -1}),
        (DIGITS, {"response_format": "yaml"}),
        (DIGITS, {"timestamp_granularities": ["word"]}),
    ],
)
def test_what_cannot_be_used_is_refused(client, file, more):
    with pytest.raises(openai.BadRequestError) as caught:
        transcribe(client, file, **more)
    assert "av." not in caught.value.message


def test_uploads_have_a_limit(nano):
    with serving(nano, max_upload=10_000) as listener, asking(listener) as http:
        found = http.post("/v1/audio/transcriptions", files={"file": ("a.wav", b"x" * 20_000)})
        assert found.status_code == 413
    with serving(nano) as listener:
        found = httpx.post(f"{listener.url}/v1/audio/transcriptions", files={"file": ("a.wav", b"x")})
        assert found.status_code == 401


def test_subtitles():
    segments = [Segment(0, 1.5, "a\n\nb --> c"), Segment(3599.9996, 3723.04, "d")]
    assert subtitles(segments, "srt") == (
        "1\n00:00:00,000 --> 00:00:01,500\na b -> c\n\n2\n01:00:00,000 --> 01:02:03,040\nd\n"
    )


def test_languages():
    assert LANGUAGES["de"] == "German"
    assert all(len(code) == 2 and name.istitle() for code, name in LANGUAGES.items())
