"""What uploads can make the server hold: many at once, slow ones, many parts, forms that break off, files that nobody
sends."""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from tempfile import SpooledTemporaryFile

import httpx
import pytest
from starlette import formparsers
from support.serving import DEMO, KEY, asking, serving, wait_for

from iolite.server import answers, bodies, page, recordings

PATHS = ["/page/files", "/v1/audio/transcriptions"]
FORM = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
END = b"\r\n--x--\r\n"
KIND = {"Content-Type": "multipart/form-data; boundary=x", "x-api-key": KEY}


@pytest.fixture
def files(monkeypatch):
    """Every temporary file of a form."""
    made = []

    class Kept(SpooledTemporaryFile):
        was_read = False

        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            made.append(self)

        def read(self, *given):
            self.was_read = True
            return super().read(*given)

    monkeypatch.setattr(formparsers, "SpooledTemporaryFile", Kept)
    return made


def upload(listener, path, pieces):
    return httpx.post(listener.url + path, content=pieces, headers=KIND, timeout=60)


def begun(listener, path, sent: bytes, length: int = 10**6) -> socket.socket:
    """A connection that has sent a part of its body."""
    host, port = listener.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in KIND.items())
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(f"{head}\r\n".encode() + sent)
    return connection


@pytest.mark.parametrize("path", PATHS)
def test_many_at_once(nano, monkeypatch, files, path):
    monkeypatch.setattr(bodies, "MOST_UPLOADS", 1)
    with serving(nano, max_upload=10_000) as listener:
        with begun(listener, path, FORM + b"a" * 9_000):
            wait_for(lambda: files)
            wait_for(lambda: files[0].tell() == 9_000)
            found = upload(listener, path, FORM + b"a" * 5_000 + END)
            assert found.status_code == 429 and int(found.headers["retry-after"]) >= 1
            assert "send it again later" in found.json()["error"]["message"]
            assert httpx.post(f"{listener.url}/tokenize", json={"text": "a"}, headers=KIND).status_code == 200
        wait_for(lambda: all(file.closed for file in files))
        found = upload(listener, path, FORM + b"a" * 5_000 + END)  # there is room again
        assert found.status_code == {"/page/files": 201, "/v1/audio/transcriptions": 400}[path], found.text
        wait_for(lambda: all(file.closed for file in files))


@pytest.mark.parametrize("path", [*PATHS, "/tokenize"])
@pytest.mark.parametrize("pause", [None, 0.05])
def test_a_body_that_does_not_end(nano, monkeypatch, files, path, pause):
    """pause: seconds between its bytes, None: nothing comes any more."""
    monkeypatch.setattr(bodies, "PATIENCE", 0.5)
    over = threading.Event()
    with serving(nano) as listener, begun(listener, path, FORM + b"a" * 100) as connection:

        def trickle():
            with contextlib.suppress(OSError):
                while pause and not over.wait(pause):
                    connection.sendall(b"a")

        with ThreadPoolExecutor() as pool:
            pool.submit(trickle)
            try:
                assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
            finally:
                over.set()
        wait_for(lambda: all(file.closed for file in files))


@pytest.mark.parametrize("path", PATHS)
def test_one_that_breaks_off(nano, monkeypatch, files, path):
    monkeypatch.setattr(bodies, "MOST_UPLOADS", 1)
    with serving(nano, max_upload=4 * 2**20) as listener:
        for number in range(1, 4):  # the room of each is free for the next
            with begun(listener, path, FORM + b"a" * 3 * 2**20, 4 * 2**20):
                wait_for(lambda count=number: len(files) == count and files[-1].tell() == 3 * 2**20)
            wait_for(lambda: files[-1].closed)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("named", ['name="file"; filename="a"', 'name="model"'])
def test_a_form_of_many_parts(http, files, path, named):
    """Each file of more than 1 MiB would be an open one of the process."""
    part = f"--x\r\nContent-Disposition: form-data; {named}\r\n\r\na\r\n".encode()
    found = http.post(path, content=part * 900 + b"--x--\r\n", headers=KIND)
    assert found.status_code == 400 and "Too many" in found.json()["error"]["message"]
    assert len(files) <= 1 and all(file.closed for file in files)


def test_those_that_wait_to_be_decoded_are_on_the_disk(nano, monkeypatch, files):
    gate, take = threading.Event(), page.take
    monkeypatch.setattr(page, "take", lambda *given: gate.wait(60) and take(*given))
    data = (DEMO / "number.png").read_bytes()
    with serving(nano) as listener, ThreadPoolExecutor() as pool, asking(listener) as http:
        found = [pool.submit(http.post, PATHS[0], files={"file": ("x", data, "")}) for _ in range(5)]
        try:
            wait_for(lambda: len(files) == 5 and sum(file.was_read for file in files) >= answers.PREPARING)
            assert http.get("/health").status_code == 200
            assert sum(file.was_read for file in files) == answers.PREPARING
        finally:
            gate.set()
        assert [one.result().status_code for one in found] == [201] * 5


RECORDING = {"file": ("digits.wav", (DEMO / "digits.wav").read_bytes(), "audio/wav")}  # of 25,600 samples


@pytest.fixture
def held(scripted, monkeypatch):
    """There is room for one recording, and not for two."""
    monkeypatch.setattr(recordings, "MOST_SAMPLES", 40_000)
    return scripted.app.state.service.recordings


@pytest.mark.parametrize("stream", ["false", "true"])
def test_hours_of_sound_in_small_files(script, scripted, held, stream):
    """Recordings are held as samples for as long as the model listens, whoever waits for it."""
    script.say("309")
    script.gate.clear()
    with asking(scripted) as http, ThreadPoolExecutor() as pool:
        first = pool.submit(http.post, PATHS[1], data={"stream": stream}, files=RECORDING)
        try:
            wait_for(lambda: held.held)
            found = http.post(PATHS[1], files=RECORDING)
            assert found.status_code == 429 and "send it again later" in found.json()["error"]["message"]
        finally:
            script.gate.set()
        assert "309" in first.result().text
        wait_for(lambda: not held.held)
        assert http.post(PATHS[1], files=RECORDING).status_code == 200


def test_who_goes_away_lets_go_of_the_recording(script, scripted, held):
    script.say("on and on " * 200)
    script.gate.clear()
    asked = {"url": PATHS[1], "data": {"stream": "true"}, "files": RECORDING}
    with asking(scripted) as http, http.stream("POST", **asked) as leaving:
        assert leaving.status_code == 200
        wait_for(lambda: held.held)
    wait_for(lambda: not held.held)
