"""What a server gives several clients at once: tokens per second in all, and how long each waits for its first one.

    python bench/serve.py                                          # the embedded model
    python bench/serve.py 12b-int4 --drafter none --peer-model 12b-q4_0.gguf     # beside llama.cpp's server

Each client sends a prompt of its own, streams the answer of a set length, and sends the next. Servers are processes of
their own and work in turns; the one that waits is stopped. llama.cpp's has as many places as there are clients and is
started anew for each number (`bench/llama_mtp.py` says how it is built); ours has places for the most.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from llama_mtp import Server as LlamaServer
from llama_mtp import Settings as LlamaSettings

from iolite.errors import IoliteError
from iolite.evals.machine import hardware, physical_cores
from iolite.evals.speed import Spread

_LOADS = 600.0  # seconds that a server may take to load a model, or to answer
_MAIN = "from iolite.cli import main; main()"
ENDS = "<eos><turn|><|tool_response>"  # of answers
_WORDS = (
    "one",
    "two",
    "red",
    "blue",
    "what",
    "is",
    "the",
    "number",
    "of",
    "a",
    "circle",
    "say",
    "read",
    "hear",
    "colour",
)


@dataclass(frozen=True)
class Sample:
    """One streamed answer. Times are of one clock, in seconds."""

    asked: float
    first: float
    ended: float
    tokens: int

    @property
    def wait(self) -> float:
        return self.first - self.asked


@dataclass(frozen=True)
class Turn:
    """What some clients got at the same time."""

    clients: int
    samples: Sequence[Sample]

    @property
    def rate(self) -> float:
        """Tokens per second of all clients together, from the first question to the last answer's end."""
        seconds = max(sample.ended for sample in self.samples) - min(sample.asked for sample in self.samples)
        return sum(sample.tokens for sample in self.samples) / seconds


def percentile(values: Sequence[float], share: float) -> float:
    """The least of the values that no more than 1 - share of them exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


class Iolite:
    """`iolite serve` as a process of its own, for the time of a `with` block."""

    def __init__(self, model: str, *options: str, log: Any = subprocess.DEVNULL) -> None:
        """Starts it and waits until it answers. IoliteError when it ends instead."""
        self.key = secrets.token_hex(16)
        command = [sys.executable, "-c", _MAIN, "serve", model, "--port", "0", *options]
        environment = os.environ | {"IOLITE_API_KEY": self.key}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip().rstrip("/")
        if not self.address:
            raise IoliteError(f"the server of {model} ended with exit code {self.process.wait()}")

    def __enter__(self) -> Iolite:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.process.kill()  # it reaches a stopped process too
        self.process.communicate()

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.address, headers=headers, timeout=_LOADS, trust_env=False)


def events(client: httpx.Client, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The JSON of a stream's events, as they come."""
    with client.stream("POST", path, json=body) as reply:
        if reply.status_code != 200:
            raise IoliteError(f"{path}: {reply.status_code} {reply.read().decode(errors='replace')[:300]}")
        for line in reply.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line[6:])


def ask_iolite(client: httpx.Client, prompt: str, tokens: int, ends: Sequence[int] = ()) -> Sample:
    """A text that goes on for so many tokens, whatever they are but those that end one."""
    body = {
        "model": "any", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, "logit_bias": {str(end): -1e5 for end in ends},
    }  # fmt: skip
    asked, first, drawn = time.perf_counter(), 0.0, 0
    for found in events(client, "/v1/completions", body):
        if found["choices"] and found["choices"][0]["text"]:
            first = first or time.perf_counter()
        drawn = (found.get("usage") or {}).get("completion_tokens", drawn)
    return _sample(asked, first, drawn, tokens)


def ask_llama(client: httpx.Client, prompt: Sequence[int], tokens: int) -> Sample:
    """The same of llama.cpp's server, which keeps nothing of the prompts before."""
    body = {
        "prompt": list(prompt), "n_predict": tokens, "temperature": 0, "stream": True, "ignore_eos": True,
        "cache_prompt": False, "return_tokens": True,
    }  # fmt: skip
    asked, first, drawn = time.perf_counter(), 0.0, 0
    for found in events(client, "/completion", body):
        first = first or time.perf_counter()
        drawn = found.get("timings", {}).get("predicted_n", drawn)
    return _sample(asked, first, drawn, tokens)


def _sample(asked: float, first: float, drawn: int, tokens: int) -> Sample:
    if drawn != tokens or not first:
        raise IoliteError(f"{drawn} tokens were drawn of {tokens}")
    return Sample(asked, first, time.perf_counter(), drawn)


def prompts(client: httpx.Client, length: int, number: int, seed: int) -> list[tuple[str, list[int]]]:
    """Texts that all begin differently, and their tokens, about so many; no server knows any of them yet."""
    dice, found = random.Random(seed), []
    for _ in range(number):
        text = str(dice.randrange(10**6))
        while len(ids := to_ids(client, text, True)) < length:
            text += " " + dice.choice(_WORDS)
        found.append((text, ids))
    return found


def to_ids(client: httpx.Client, text: str, begins: bool) -> list[int]:
    """The tokens of a text by iolite's server; begins: with the one that every prompt begins with."""
    reply = client.post("/tokenize", json={"text": text, "add_special": begins})
    ids: list[int] = reply.raise_for_status().json()["tokens"]
    return ids


def take_turn(clients: int, answers: int, ask: Callable[[int], Sample]) -> Turn:
    """Clients that each ask so many times, one question after the other; ask gets the question's number."""

    def client(number: int) -> list[Sample]:
        return [ask(number * answers + i) for i in range(answers)]

    with ThreadPoolExecutor(clients) as pool:
        return Turn(clients, [sample for found in pool.map(client, range(clients)) for sample in found])


@contextmanager
def awake(process: subprocess.Popen[Any]) -> Iterator[None]:
    """A process runs for the time of the block, and is stopped behind it."""
    process.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGSTOP)


class Bench:
    """Both servers, in turns; every turn is printed as it comes."""

    def __init__(self, asked: argparse.Namespace, ours: Iolite) -> None:
        self.asked, self.ours, self._seed = asked, ours, 0
        self.turns: dict[tuple[str, int], list[Turn]] = {}

    def run(self) -> None:
        # Not counted: the first passes of a process make their buffers and read the weights from the disk.
        self.iolite(max(self.asked.clients), 1, 8, counted=False)
        end = time.monotonic() + 60 * self.asked.minutes
        for _ in range(self.asked.rounds):
            for clients in self.asked.clients:
                if time.monotonic() > end:
                    return
                self.iolite(clients, self.asked.answers, self.asked.tokens)
                if self.asked.peer_model:
                    self.llama(clients)

    def questions(self, clients: int, answers: int) -> list[tuple[str, list[int]]]:
        self._seed += 1
        with awake(self.ours.process), self.ours.client() as client:
            return prompts(client, self.asked.prompt, clients * answers, self._seed)

    def iolite(self, clients: int, answers: int, tokens: int, counted: bool = True) -> None:
        questions = self.questions(clients, answers)
        with awake(self.ours.process), self.ours.client() as client:
            ends = to_ids(client, ENDS, False)
            turn = take_turn(clients, answers, lambda i: ask_iolite(client, questions[i][0], tokens, ends))
        if counted:
            self.keep("iolite", turn)

    def llama(self, clients: int) -> None:
        asked, questions = self.asked, self.questions(clients, self.asked.answers)
        context = clients * (asked.prompt + 16 + asked.tokens + 64)
        settings = LlamaSettings(asked.peer_model, threads=asked.threads, context=context, slots=clients)
        # It closes a connection that is kept when it likes to.
        way: dict[str, Any] = {"timeout": _LOADS, "trust_env": False, "headers": {"Connection": "close"}}
        with LlamaServer(settings) as server, httpx.Client(base_url=server.address, **way) as client:
            take_turn(clients, 1, lambda i: ask_llama(client, questions[i][1][:8], 4))  # as above
            turn = take_turn(clients, asked.answers, lambda i: ask_llama(client, questions[i][1], asked.tokens))
        self.keep("llama.cpp", turn)

    def keep(self, engine: str, turn: Turn) -> None:
        self.turns.setdefault((engine, turn.clients), []).append(turn)
        waits = [sample.wait for sample in turn.samples]
        shown = {
            "engine": engine, "clients": turn.clients, "answers": len(waits), "tokens_per_second": round(turn.rate, 2),
            "first_token_median_s": round(statistics.median(waits), 4), "most_s": round(max(waits), 4),
        }  # fmt: skip
        print(json.dumps(shown), file=sys.stderr, flush=True)

    def table(self) -> str:
        lines = [
            "| clients | server | tokens/s in all | × one client | first token, median | 99th | answers |",
            "|---|---|---|---|---|---|---|",
        ]
        for clients in self.asked.clients:
            for engine in ("iolite", "llama.cpp"):
                if turns := self.turns.get((engine, clients)):
                    lines.append(self._row(engine, clients, turns))
        return "\n".join(lines)

    def _row(self, engine: str, clients: int, turns: Sequence[Turn]) -> str:
        waits = [sample.wait for turn in turns for sample in turn.samples]
        alone = self.turns.get((engine, 1), ())  # of the same rounds, of which the last may be cut short
        gain = Spread.of(turn.rate / one.rate for turn, one in zip(turns, alone, strict=False)) if alone else ""
        median, late = statistics.median(waits), percentile(waits, 0.99)
        rate = Spread.of(turn.rate for turn in turns)
        return f"| {clients} | {engine} | {rate} | {gain} | {median:.3g} s | {late:.3g} s | {len(waits)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--drafter", default="auto", help="as of `iolite serve`")
    parser.add_argument("--peer-model", metavar="GGUF", help="what llama.cpp's server serves: the same shape")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt, about")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--answers", type=int, default=1, help="of each client in a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60, help="after which no further turn is begun")
    parser.add_argument("--threads", type=int, default=physical_cores())
    asked = parser.parse_args()
    places = max(asked.clients)
    options = ("-np", str(places), "--chats", "none", "-t", str(asked.threads), "--drafter", asked.drafter)
    with tempfile.TemporaryFile() as log, Iolite(asked.model, *options, log=log) as ours:
        bench = Bench(asked, ours)
        bench.run()
    print(f"{hardware()}; {asked.threads} threads; {Path(asked.model).name}, prompts of about {asked.prompt} tokens, "
          f"answers of {asked.tokens}\n\n{bench.table()}")  # fmt: skip


if __name__ == "__main__":
    main()
