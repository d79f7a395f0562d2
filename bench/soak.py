"""Many hands on one server for a long time: that nothing leaks, sticks or is lost.

    python bench/soak.py --minutes 10 --plot soak.png

Eight clients of `iolite serve` ask in the ways of all its interfaces: a third with pictures or sound, some that hang up
somewhere in the middle, some with requests that no server should take. At the end every request must be accounted for
by the clients and by `/metrics`, and nothing may be open any more. Then the server is killed while chats are written,
several times, and every stored chat must be there when it is back. Prints one JSON object; exit code 1 if anything is
wrong. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import random
import re
import statistics
import sys
import tempfile
import threading
import time
import wave
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from serve import ENDS, Iolite, to_ids

DEMO = Path(__file__).parent.parent / "docs" / "demo"
CHAT = "/v1/chat/completions"
_STUCK = 60.0  # seconds after which a request counts as stuck; the longest answer takes two
_EVERY = 2.0  # seconds between two readings of memory
_WARM = 0.2  # share of the time in which buffers and caches fill
_TELLING = 300.0  # seconds from which on growth is judged
_GROWN = 1.1  # times as much as after the warm-up is a leak
_TOOL = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"at": {"type": "string", "maxLength": 8}}, "required": ["at"]}}}  # fmt: skip
_SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@dataclass
class Account:
    """What the clients saw. Every request that is sent ends in exactly one of `ended`, or in `wrong`."""

    sent: Counter[str] = field(default_factory=Counter)  # by kind
    ended: Counter[str] = field(default_factory=Counter)  # complete, cancelled, refused, busy
    statuses: Counter[int] = field(default_factory=Counter)
    answers: int = 0  # complete ones, of several choices each
    unsure: int = 0  # answers of requests that were hung up on: the server may have ended them before it knew
    silent: int = 0  # requests that were hung up on before there was a status
    wrong: list[str] = field(default_factory=list)
    chats: dict[str, dict[int, tuple[str, str | None]]] = field(default_factory=dict)  # id: role, text if it ended
    slowest: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def end(self, how: str, answers: int = 0, unsure: int = 0) -> None:
        with self.lock:
            self.ended[how] += 1
            self.answers += answers
            self.unsure += unsure

    def status(self, response: httpx.Response) -> None:
        with self.lock:
            self.statuses[response.status_code] += 1


class HungUpError(Exception):
    """The client has had enough."""


class Client:
    """One of the clients. `act` makes one request of some kind."""

    def __init__(self, server: Iolite, account: Account, seed: int) -> None:
        self.dice, self.account, self._server = random.Random(seed), account, server
        self.http = httpx.Client(
            base_url=server.address, headers={"x-api-key": server.key}, timeout=_STUCK, trust_env=False,
            event_hooks={"response": [account.status]},
        )  # fmt: skip
        with server.client() as asking:
            self._ends = {str(end): -1e5 for end in to_ids(asking, ENDS, False)}
        with account.lock:
            account.statuses[200] += 1  # of that request

    def act(self) -> None:
        kinds: tuple[tuple[Callable[[], None], int], ...] = (
            (self.media, 30), (self.hang_up, 15), (self.hang_up_early, 5), (self.bad, 15), (self.chat, 10),
            (self.plain, 13), (self.tools, 6), (self.others, 6),
        )  # fmt: skip
        kind = self.dice.choices([k for k, _ in kinds], [weight for _, weight in kinds])[0]
        with self.account.lock:
            self.account.sent[kind.__name__] += 1
        begin = time.monotonic()
        try:
            kind()
        except Exception as error:
            with self.account.lock:
                self.account.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}"[:300])
        with self.account.lock:
            self.account.slowest = max(self.account.slowest, time.monotonic() - begin)

    def post(self, path: str, body: Mapping[str, Any], check: Callable[[dict[str, Any]], int]) -> None:
        """A request that is to be answered whole; check says how many answers there are. A full server is left alone
        for a moment."""
        reply = self.http.post(path, json=body)
        if not self._busy(reply):
            assert reply.status_code == 200, f"{reply.status_code} {reply.text}"
            self.account.end("complete", check(reply.json()))

    def _busy(self, reply: httpx.Response) -> bool:
        if reply.status_code != 429:
            return False
        assert int(reply.headers["Retry-After"]) >= 1
        self.account.end("busy")
        time.sleep(0.05 + 0.2 * self.dice.random())
        return True

    def stream(self, path: str, body: Mapping[str, Any], leave_after: int | None = None) -> Iterator[dict[str, Any]]:
        """The events of a stream. leave_after: hangs up behind so many. Nothing comes when the server is full."""
        with self.http.stream("POST", path, json=body) as reply:
            if reply.status_code != 200:
                reply.read()
            if self._busy(reply):
                return
            assert reply.status_code == 200, f"{reply.status_code} {reply.text}"
            for seen, line in enumerate(reply.iter_lines()):
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line[6:])
                if leave_after is not None and seen >= leave_after:
                    raise HungUpError

    # ---- kinds of requests ----

    def media(self) -> None:
        part = self.dice.choice((picture, sound, demo))(self.dice)
        words = {"type": "text", "text": self.dice.choice(("What number is this?", "What is said?", "What is it?"))}
        body = {"messages": [{"role": "user", "content": [part, words]}], "max_tokens": 40}
        if self.dice.random() < 0.5:
            self.post(CHAT, body, of_openai)
        else:
            self._streamed(body)

    def plain(self) -> None:
        more: dict[str, Any] = self.dice.choice(
            ({}, {"n": 2}, {"response_format": {"type": "json_schema", "json_schema": {"schema": _SCHEMA}}})
        )
        if self.dice.random() < 0.5:
            self._streamed(self.question())
        else:
            self.post(CHAT, self.question() | more, of_openai)

    def tools(self) -> None:
        choice = self.dice.choice(("auto", "none", "required"))
        self.post(CHAT, self.question() | {"tools": [_TOOL], "tool_choice": choice, "max_tokens": 80}, of_openai)

    def others(self) -> None:
        """Anthropic's interface and Ollama's."""
        question = self.question()
        if self.dice.random() < 0.5:
            self.post("/v1/messages", question, lambda found: 1 if found["stop_reason"] else 0)
        else:
            body = {"model": "any", "messages": question["messages"], "stream": False, "options": {"num_predict": 30}}
            self.post("/api/chat", body, lambda found: 1 if found["done"] else 0)

    def hang_up(self) -> None:
        """In the middle of a stream that would go on."""
        body = self.question() | {"max_tokens": 300, "logit_bias": self._ends, "stream": True}
        try:
            found = list(self.stream(CHAT, body, leave_after=self.dice.randrange(60)))
        except HungUpError:
            self.account.end("cancelled", unsure=1)
            return
        if found:
            self.account.end("complete", 1)

    def hang_up_early(self) -> None:
        """Anywhere, before there is an answer at all as likely as not."""
        body = self.question() | {"max_tokens": 300, "logit_bias": self._ends}
        try:
            reply = self.http.post(CHAT, json=body, timeout=0.3 * self.dice.random())
        except httpx.TimeoutException:
            self.account.silent += 1
            self.account.end("cancelled", unsure=1)
            return
        if not self._busy(reply):
            assert reply.status_code == 200, reply.text
            self.account.end("complete", 1)

    def bad(self) -> None:
        expected, path, sent = self.dice.choice(bad_requests(self.dice))
        reply = self.http.post(path, **sent)
        if not self._busy(reply):
            assert reply.status_code == expected, f"{expected} was expected, not {reply.status_code}: {sent!r:.200}"
            assert 0 < len(reply.text) < 2000, "a refusal says why, and not everything"
            self.account.end("refused")

    def chat(self) -> None:
        """Two turns on the page."""
        id = self.http.post("/page/chats", json={"title": f"chat {self.dice.random()}"}).raise_for_status().json()["id"]
        kept: dict[int, tuple[str, str | None]] = {}
        self.account.chats[id] = kept
        parent, complete = None, 0
        for _ in range(2):
            body = {"parent": parent, "text": self.question()["messages"][0]["content"]}
            for found in self.stream(f"/page/chats/{id}/answers", body):
                if found["type"] == "begin":
                    for message in found["asked"]:
                        kept[message["id"]] = (message["role"], message["text"])
                    kept[found["message"]["id"]] = ("assistant", None)
                elif found["type"] == "end":
                    parent, complete = found["message"]["id"], complete + 1
                    kept[parent] = ("assistant", found["message"]["text"])
                assert found["type"] != "error", found
            if parent is None or complete == 0:
                return  # the server was full
        if complete == 2:
            self.account.end("complete", 2)
        else:  # at the second turn, which counts as busy already
            self.account.answers += complete

    def question(self) -> dict[str, Any]:
        numbers = " ".join(str(self.dice.randrange(1000)) for _ in range(self.dice.randrange(1, 40)))
        return {"model": "any", "messages": [{"role": "user", "content": f"Read {numbers}"}], "max_tokens": 60}

    def _streamed(self, body: dict[str, Any]) -> None:
        found = list(self.stream(CHAT, body | {"stream": True}))
        if found:
            assert any(choice["finish_reason"] for event in found for choice in event["choices"]), found[-1]
            self.account.end("complete", 1)


def of_openai(found: Mapping[str, Any]) -> int:
    assert all(choice["finish_reason"] for choice in found["choices"]) and found["usage"]["completion_tokens"] > 0
    return len(found["choices"])


# ---- what is sent ----


def _url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(dice: random.Random) -> dict[str, Any]:
    """Noise of any shape."""
    noise = np.random.default_rng(dice.getrandbits(32))
    file = io.BytesIO()
    shape = dice.randrange(16, 400), dice.randrange(16, 400), 3
    Image.fromarray(noise.integers(0, 256, shape, np.uint8)).save(file, dice.choice(("PNG", "JPEG", "WEBP")))
    return {"type": "image_url", "image_url": {"url": _url("image/png", file.getvalue())}}


def sound(dice: random.Random) -> dict[str, Any]:
    noise, file = np.random.default_rng(dice.getrandbits(32)), io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes((3000 * noise.standard_normal(dice.randrange(4_000, 48_000))).astype("<i2").tobytes())
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def demo(dice: random.Random) -> dict[str, Any]:
    name = dice.choice(("number.png", "shape.png"))
    return {"type": "image_url", "image_url": {"url": _url("image/png", (DEMO / name).read_bytes())}}


def bad_requests(dice: random.Random) -> list[tuple[int, str, dict[str, Any]]]:
    """Requests that must be refused: the status, the path, what is sent."""
    png = (DEMO / "number.png").read_bytes()
    cut, torn = png[: dice.randrange(8, len(png) // 2)], dice.randbytes(dice.randrange(1, 4000))
    hello = {"messages": [{"role": "user", "content": "hello"}]}

    def with_image(url: str) -> dict[str, Any]:
        part = {"type": "image_url", "image_url": {"url": url}}
        return {"json": {"messages": [{"role": "user", "content": [part]}]}}

    return [
        (400, CHAT, {"content": b'{"messages": [', "headers": {"Content-Type": "application/json"}}),
        (400, CHAT, {"json": {}}),
        (400, CHAT, {"json": {"messages": []}}),
        (400, CHAT, {"json": hello | {"temperature": -1}}),
        (400, CHAT, {"json": hello | {"n": 100}}),
        (400, CHAT, {"json": hello | {"max_tokenz": 5}}),
        (400, CHAT, {"json": hello | {"response_format": {"type": "json_schema", "json_schema": {"schema": 7}}}}),
        (400, CHAT, {"json": {"messages": [{"role": "user", "content": "word " * 200_000}]}}),
        (400, CHAT, with_image(_url("image/png", cut))),
        (400, CHAT, with_image(_url("image/png", torn))),
        (400, CHAT, with_image("data:image/png;base64,###")),
        (400, CHAT, with_image("http://127.0.0.1/secret.png")),
        (400, CHAT, with_image("file:///etc/passwd")),
        (400, "/v1/messages", {"json": {"model": "any", "messages": "no"}}),
        (400, "/api/chat", {"json": {"model": "any", "messages": [{"role": "user", "images": ["?"]}]}}),
        (401, CHAT, {"json": hello, "headers": {"x-api-key": "wrong"}}),
        (404, "/v1/nothing", {"json": {}}),
    ]


# ---- what is watched ----


@dataclass(frozen=True)
class Reading:
    """Of the server's process and its children: megabytes that are theirs alone, threads, open files."""

    seconds: float
    megabytes: float
    children_megabytes: float
    cache_megabytes: float
    threads: int
    files: int


def anonymous(pid: int) -> float:
    """Megabytes of a process that no file backs."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def children(pid: int) -> list[int]:
    """Of all threads of a process, their own children included."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in file.read_text().split()]
    return found + [below for child in found for below in children(child)]


def counters(server: Iolite) -> dict[str, float]:
    """What `/metrics` shows."""
    with server.client() as asking:
        text = asking.get("/metrics").raise_for_status().text
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in rows}


def summed(found: Mapping[str, float], name: str, **labels: str) -> int:
    """A counter's sum over all labels but these."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    of_name = [row for row in found if row == name or row.startswith(name + "{")]
    return round(sum(found[row] for row in of_name if all(label in row for label in wanted)))


class Watch(threading.Thread):
    """Reads a server's memory until it is told to stop."""

    def __init__(self, server: Iolite, account: Account) -> None:
        super().__init__(daemon=True)
        self.server, self.account, self.begin = server, account, time.monotonic()
        self.readings: list[Reading] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(_EVERY):
            self.readings.append(self.read())
            if len(self.readings) % 15 == 0:
                ended, wrong = dict(self.account.ended), len(self.account.wrong)
                print(json.dumps(vars(self.readings[-1]) | ended | {"wrong": wrong}), file=sys.stderr, flush=True)

    def read(self) -> Reading:
        pid = self.server.process.pid
        of_children = 0.0
        for child in children(pid):
            with contextlib.suppress(OSError):
                of_children += anonymous(child)
        cache = counters(self.server)["iolite_cache_bytes"] / 2**20
        self.account.statuses[200] += 1  # of that request
        threads, files = (len(list(Path(f"/proc/{pid}/{name}").iterdir())) for name in ("task", "fd"))
        return Reading(time.monotonic() - self.begin, anonymous(pid), of_children, cache, threads, files)


def growth(readings: Sequence[Reading]) -> dict[str, float]:
    """How memory changed after the warm-up: medians of the first and the last quarter of what followed."""
    warm = readings[round(_WARM * len(readings)) :]
    quarter = max(1, len(warm) // 4)
    early, late = warm[:quarter], warm[-quarter:]
    found: dict[str, float] = {}
    for name in ("megabytes", "children_megabytes", "cache_megabytes", "threads", "files"):
        for when, some in (("early", early), ("late", late)):
            found[f"{name}_{when}"] = round(statistics.median(getattr(reading, name) for reading in some), 1)
    slope = np.polyfit([r.seconds / 60 for r in warm], [r.megabytes for r in warm], 1)[0] if len(warm) > 2 else 0.0
    return found | {"megabytes_a_minute": round(float(slope), 2)}


def leaks(readings: Sequence[Reading]) -> list[str]:
    """What has grown. Runs of a few minutes are all warm-up, and tell nothing."""
    if not readings or readings[-1].seconds < _TELLING:
        return []
    found = growth(readings)
    names = [name.removesuffix("_early") for name in found if name.endswith("_early")]
    grown = [name for name in names if found[f"{name}_late"] > _GROWN * found[f"{name}_early"] + 2]
    return [f"{name} grew from {found[f'{name}_early']} to {found[f'{name}_late']}" for name in grown]


def draw(readings: Sequence[Reading], path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    minutes = [reading.seconds / 60 for reading in readings]
    for name, label in (("megabytes", "server"), ("children_megabytes", "children that decode media"),
                        ("cache_megabytes", "of the server's: kept keys and values")):  # fmt: skip
        axes.plot(minutes, [getattr(reading, name) for reading in readings], label=label, linewidth=1.2)
    axes.axvline(_WARM * minutes[-1], color="0.7", linewidth=0.8, linestyle=":")
    axes.set(xlabel="minutes", ylabel="anonymous memory, MB", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


# ---- the parts of the test ----


def soak(server: Iolite, account: Account, clients: int, seconds: float) -> list[Reading]:
    """Clients that act until the time is over."""
    watch, end = Watch(server, account), time.monotonic() + seconds

    def work(number: int) -> None:
        client = Client(server, account, number)
        with client.http:
            while time.monotonic() < end and len(account.wrong) < 100:
                client.act()

    watch.start()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    watch.over.set()
    watch.join()
    return watch.readings


def settle(server: Iolite, account: Account) -> dict[str, float]:
    """The counters when nothing runs any more; a request that stays is stuck."""
    end = time.monotonic() + _STUCK
    while time.monotonic() < end:
        found = counters(server)
        if not found["iolite_running_answers"] and not found["iolite_waiting_answers"]:
            return found
        account.statuses[200] += 1  # it counts the requests before it, not itself
        time.sleep(0.2)
    raise SystemExit("answers still run though nobody is there: stuck")


def audit(account: Account, found: Mapping[str, float]) -> list[str]:
    """Where the clients' account and the server's differ."""
    wrong = list(account.wrong)

    def must(true: bool, what: str) -> None:
        if not true:
            wrong.append(what)

    must(sum(account.sent.values()) == sum(account.ended.values()) + len(account.wrong), "requests that ended nowhere")
    for status in {200, 499, *account.statuses}:
        here, there = account.statuses[status], summed(found, "iolite_requests_total", status=str(status))
        slack = account.silent if status in (200, 429, 499) else 0  # what nobody waited for
        must(here <= there <= here + slack, f"status {status}: clients saw {here}, the server sent {there}")
    must(
        not any(f'status="{status}"' in row for status in range(500, 600) for row in found), "an error of the server's"
    )
    counted = summed(found, "iolite_answers_total")
    low, high = account.answers, account.answers + account.unsure
    must(low <= counted <= high, f"{counted} answers are counted, clients saw {low} and hung up on {account.unsure}")
    states = {
        s: summed(found, "iolite_engine_requests", state=s) for s in ("submitted", "finished", "cancelled", "failed")
    }
    must(states["submitted"] == states["finished"] + states["cancelled"], f"the engine's requests: {states}")
    must(states["finished"] + states["cancelled"] >= low, f"the engine had fewer requests than were answered: {states}")
    return wrong


def check_chats(server: Iolite, account: Account) -> tuple[int, list[str]]:
    """Every message that the server has said to be stored, and what of it is not there."""
    checked, lost = 0, []
    with server.client() as asking:
        for id, kept in account.chats.items():
            reply = asking.get(f"/page/chats/{id}")
            stored = {m["id"]: m for m in reply.json()["messages"]} if reply.status_code == 200 else {}
            if reply.status_code != 200:
                lost.append(f"chat {id} is gone")
            for number, (role, text) in kept.items():
                checked += 1
                message = stored.get(number)
                if message is None or message["role"] != role or (text is not None and message["text"] != text):
                    lost.append(f"message {number} of chat {id} is not what it was: {message!r:.200}")
                elif message["info"].get("state") == "writing":
                    lost.append(f"message {number} is said to be written still")
    return checked, lost


def kill(server: Iolite, account: Account, clients: int, seconds: float) -> None:
    """Ends a server by SIGKILL while clients write chats."""
    killed = threading.Event()

    def work(number: int) -> None:
        client = Client(server, account, number)
        with client.http, contextlib.suppress(httpx.HTTPError):
            while not killed.is_set():
                client.chat()

    with ThreadPoolExecutor(clients) as pool:
        working = [pool.submit(work, time.time_ns() + number) for number in range(clients)]
        time.sleep(seconds)
        killed.set()  # nobody begins a chat that no server takes
        server.process.kill()
        for each in working:
            each.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--plot", metavar="PNG")
    asked = parser.parse_args()
    account = Account()
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w") as log:
        # Fewer places than clients, so that some are sent away; a small model may say "please" for ever.
        options = ("-np", "4", "--queue", "3", "-n", "300", "--chats", f"{folder}/chats.sqlite")
        with Iolite(asked.model, *options, log=log) as server:
            readings = soak(server, account, asked.clients, 60 * asked.minutes)
            wrong = audit(account, settle(server, account)) + leaks(readings)
            seen = {name: dict(getattr(account, name)) for name in ("sent", "ended", "statuses")}  # without the kills
            seen_answers = account.answers
        if asked.plot:
            draw(readings, asked.plot)
        checked = 0
        for number in range(asked.kills):
            with Iolite(asked.model, *options, log=log) as server:
                checked, lost = check_chats(server, account)
                wrong += lost
                kill(server, account, asked.clients, 1.0 + 0.37 * number)
        with Iolite(asked.model, *options, log=log) as server:
            checked, lost = check_chats(server, account)
        log.flush()
        wrong += lost + [line for line in Path(folder, "log").read_text().splitlines() if "Error" in line][:20]
    found = {
        "minutes": asked.minutes, **seen, "answers": seen_answers,
        "slowest_s": round(account.slowest, 2), "memory": growth(readings),
        "kills": asked.kills, "chats": len(account.chats), "messages_checked": checked, "wrong": wrong,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
