"""The second Ctrl+C ends the process, whatever its threads are doing, and what decodes for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import httpx
import pytest
from support.serving import KEY, data_uri, wait_for

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
