"""How the process ends: by a second Ctrl+C, whatever its threads are doing, with what decodes for them; and by SIGKILL,
which loses nothing that was spoken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest
from support.serving import KEY, asking, data_uri, serving, wait_for
from support.speaking import DIGITS, connected, send, speak, until, wav

from iolite.server import microphone

PROGRAM = """
import sys
from pathlib import Path
import iolite
from iolite.media import worker
from iolite.server.listen import Listener
from iolite.server.settings import Settings

worker._PROGRAM = Path(sys.argv[1])
listener = Listener(iolite.load("nano"), Settings(port=0, key=sys.argv[2], grace=600))
listener.run_here(lambda: print(listener.url, flush=True))
"""
DECODER = """
import os, pathlib, time
if os.fork():
    pathlib.Path(__file__).with_suffix(".pids").write_text(f"{os.getpid()}")
time.sleep(600)
"""
SLOW = """
import sys, time
from pathlib import Path
import iolite
from iolite.server.listen import Listener
from iolite.server.settings import Settings
from support.serving import Script

model = iolite.load("nano")
script = Script(model)
script.say(sys.argv[3])
model.network.logits = lambda hidden: time.sleep(0.02) or script.logits(hidden)
listener = Listener(model, Settings(port=0, key=sys.argv[2], chats=Path(sys.argv[1])))
listener.run_here(lambda: print(listener.url, flush=True))
"""  # an answer that takes longer than the test
LONG = "on and on " * 300


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_a_second_signal_waits_for_no_thread(tmp_path):
    decoder, pids = tmp_path / "decoder.py", tmp_path / "decoder.pids"
    decoder.write_text(DECODER)
    command = [sys.executable, "-c", PROGRAM, str(decoder), KEY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            picture = {"type": "image_url", "image_url": {"url": data_uri("number.png")}}
            asked = {"messages": [{"role": "user", "content": [picture]}]}
            for _ in range(2):  # as many as there are threads that make prompts
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"{url}/v1/chat/completions", json=asked, headers={"x-api-key": KEY}, timeout=1)
            wait_for(lambda: pids.exists() and pids.read_text())
            group = int(pids.read_text())
            assert alive(group)
            process.send_signal(signal.SIGINT)
            wait_for(lambda: _refuses(url))  # so the signal has come: two at once are one
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 128 + signal.SIGINT
            wait_for(lambda: not alive(group))
        finally:
            process.kill()


def _refuses(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 503
    except httpx.HTTPError:
        return True


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that nothing catches")
@pytest.mark.parametrize("reached", ["begin", "text"])
def test_a_killed_server_has_what_was_spoken(nano, tmp_path, reached):
    """reached: what the page was told last. The message is there from the first word about it on, and of the answer
    what was there for others to read."""
    path = tmp_path / "chats.sqlite"
    command = [sys.executable, "-c", SLOW, str(path), KEY, LONG]
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # where `support` is
    with subprocess.Popen(command, env=here, stdout=subprocess.PIPE, text=True) as process:
        try:
            server = SimpleNamespace(url=process.stdout.readline().strip())
            start = {"type": "start", "text": "What is said?", "name": "mine.wav", "silence_ms": None}
            with connected(server, microphone.PATH, start) as talk, asking(server) as http:
                speak(talk, DIGITS)
                send(talk, "commit")
                begin = until(talk, "begin")[-1]
                if reached == "text":
                    wait_for(lambda: _answer(http, begin)["text"])
                before = _answer(http, begin)
                process.kill()
                assert process.wait(60) == -signal.SIGKILL
        finally:
            process.kill()
    with serving(nano, chats=path) as listener, asking(listener) as http:
        chat = http.get(f"/page/chats/{begin['chat']}").json()
        question, answer = chat["messages"]
        assert chat["title"] == begin["title"] == "What is said?" and [question] == begin["asked"]
        (file,) = question["files"]
        padded = DIGITS + bytes(-len(DIGITS) % 1280)
        assert file["name"] == "mine.wav" and http.get(f"/page/files/{file['file']}").content == wav(padded)
        assert answer["parent"] == question["id"] and answer["info"] == {"state": "stopped", "spoken": True}
        assert answer["text"].startswith(before["text"]) and LONG.startswith(answer["text"])
        again = http.post(f"/page/chats/{chat['id']}/answers", json={"parent": question["id"], "again": True})
        assert '"type":"end"' in again.text, "and it can be answered again"


def _answer(http: httpx.Client, begin: dict) -> dict:
    """As it is kept."""
    return http.get(f"/page/chats/{begin['chat']}").json()["messages"][-1]
