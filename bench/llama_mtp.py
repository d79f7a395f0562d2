"""llama.cpp's own multi-token prediction, through its server: the peer of a drafter's measurements.

    cmake -S llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
    cmake --build build --target llama-server
    export IOLITE_LLAMA_BIN=build/bin

llama-cpp-python has the library but not the part of llama.cpp that drafts, so this wants a build of llama.cpp itself,
0.5.0 or newer. The server can draw for each draft whether it counts as accepted, with a probability that is given: what
drafts gain at that acceptance then shows with weights of any values, and the answer is nonsense.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iolite.errors import UsageError

VARIABLE = "IOLITE_LLAMA_BIN"
_LOADS = 600.0  # seconds that a server may take to load a model, or to answer
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would not find this machine


def find_server() -> Path:
    """The program. Raises UsageError, which says what to do, where there is none."""
    folder = os.environ.get(VARIABLE, "")
    if not folder:
        raise UsageError(
            f"{VARIABLE} names no build of llama.cpp, so its multi-token prediction is not measured",
            "build llama.cpp's target llama-server, and set it to the folder of that program",
        )
    found = shutil.which("llama-server", path=os.path.abspath(folder))
    if found is None:
        raise UsageError(f"{VARIABLE}={folder} holds no llama-server", "build llama.cpp's target llama-server there")
    return Path(found)


@dataclass(frozen=True)
class Answer:
    """One answer of two tokens or more; seconds are those of the passes behind its first token, which the prompt's pass
    draws."""

    ids: tuple[int, ...]
    seconds: float
    drafted: int
    accepted: int

    @property
    def passes(self) -> int:
        """Passes of the model behind the first token; each draws a token of its own behind what it accepts."""
        return len(self.ids) - 1 - self.accepted

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return (len(self.ids) - 1) / self.seconds

    @property
    def mean_accepted_length(self) -> float:
        """Tokens a pass, the model's own included."""
        return (len(self.ids) - 1) / self.passes

    @property
    def accepted_drafts_a_pass(self) -> float:
        return self.accepted / self.passes


def read_answer(reply: Mapping[str, Any]) -> Answer:
    """An answer out of what `/completion` replies, which leaves drafts out where there were none."""
    timings = reply["timings"]
    drafted, accepted = timings.get("draft_n", 0), timings.get("draft_n_accepted", 0)
    return Answer(tuple(reply["tokens"]), timings["predicted_ms"] / 1e3, drafted, accepted)


@dataclass(frozen=True)
class Settings:
    """What a server runs: a GGUF model and, for drafts > 0, its GGUF drafter, which drafts as many tokens a pass.

    acceptance: how likely a draft counts as accepted, given that those before it were; None: when it is the model's own
    token. context: tokens of a prompt and its answer, of all slots together. slots: answers drawn at once.
    """

    model: str
    drafter: str | None = None
    drafts: int = 0
    acceptance: float | None = None
    threads: int = 1
    context: int = 4096
    slots: int = 1

    def arguments(self) -> list[str]:
        """Of the command line; the rest is as llama.cpp's makers set it up."""
        numbers = {"--threads": self.threads, "--ctx-size": self.context, "--parallel": self.slots}
        numbers |= {"--cache-ram": 0}
        found = ["--model", self.model, "--offline", "--no-ui"]
        if self.drafts:
            assert self.drafter is not None
            numbers |= {"--spec-draft-n-max": self.drafts}
            found += ["--spec-type", "draft-mtp", "--spec-draft-model", self.drafter]
            if self.acceptance is not None:
                rates = (self.acceptance ** (i + 1) for i in range(self.drafts))
                found += ["--spec-synth-rates", ",".join(f"{rate:.6g}" for rate in rates)]
        return found + [text for name, number in numbers.items() for text in (name, str(number))]


class Server:
    """llama.cpp's server with one model, for the time of a `with` block. It works only while it answers."""

    def __init__(self, settings: Settings) -> None:
        """Starts it and waits until the model is loaded. Raises UsageError with the server's last words if it ends."""
        self.settings = settings
        program, files = find_server(), (settings.model, settings.drafter if settings.drafts else None)
        for file in files:
            if file is not None and not os.path.isfile(file):
                raise UsageError(f"there is no GGUF file {file!r}", "`iolite convert` writes such files")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        command = [str(program), "--host", "127.0.0.1", "--port", str(port), *settings.arguments()]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (open for as long as the server)
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=subprocess.STDOUT)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def answer(self, prompt: Sequence[int], tokens: int, seed: int = 0) -> Answer:
        """The likeliest `tokens` tokens behind the prompt, of which nothing is kept from an answer before.

        The seed decides which drafts are accepted, where that is left to chance.
        """
        assert tokens > 1  # the first costs no pass of its own
        wanted = {
            "prompt": list(prompt),
            "n_predict": tokens,
            "temperature": 0,
            "seed": seed,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        }
        answer = read_answer(self._call("/completion", json.dumps(wanted).encode()))
        if len(answer.ids) != tokens:
            raise UsageError(
                f"llama-server drew {len(answer.ids)} tokens of {tokens}", "give its settings a longer context"
            )
        return answer

    def _wait(self) -> None:
        end = time.monotonic() + _LOADS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise UsageError(
                    f"llama-server ended while it loaded its models: {self._last_words()}",
                    "see that they are a model and its drafter, and that memory is left for them",
                )
            try:
                self._call("/health")
                return
            except (urllib.error.URLError, ConnectionError):  # not listening yet, or loading
                time.sleep(0.05)
        raise UsageError(f"llama-server has not loaded its models within {_LOADS:.0f} s", "name smaller ones")

    def _call(self, path: str, body: bytes | None = None) -> dict[str, Any]:
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        try:
            with _OPENER.open(request, timeout=_LOADS) as reply:
                found: dict[str, Any] = json.load(reply)
        except urllib.error.HTTPError as error:
            if error.code == 503:  # loading
                raise
            refusal = error.read().decode(errors="replace")
            raise UsageError(
                f"llama-server refuses: {refusal}", "ask for a shorter prompt, or give a context"
            ) from None
        return found

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").splitlines()
        errors = [line for line in lines if " E " in line]
        return " ".join((errors or lines)[-3:])
