"""Answers that are broken off, a queue that is full, servers that stop; and that nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import socket
import threading

import httpx
from support.serving import KEY, asking, serving, wait_for

CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "hm"}], "max_tokens": 30}
OLLAMA = {"messages": QUESTION["messages"], "options": {"num_predict": 30}}
LONG = "on and on " * 40


def stats(listener):
    return listener.app.state.service.answers._engine.stats()


def is_idle(listener) -> bool:
    now = stats(listener)
    return now.running == now.waiting == 0 and not listener.app.state.service.answers._open


def hold(script) -> None:
    """The model draws nothing until the gate is set."""
    script.say(LONG)
    script.gate.clear()


def test_a_client_that_goes_away_ends_its_answer(script, scripted):
    for stream in (True, False):
        hold(script)
        client = httpx.Client(base_url=scripted.url, headers={"x-api-key": KEY}, timeout=60)
        with contextlib.suppress(httpx.HTTPError):
            if stream:
                with client.stream("POST", CHAT, json=QUESTION | {"stream": True}) as response:
                    next(response.iter_raw())
            else:
                client.post(CHAT, json=QUESTION, timeout=0.3)
        client.close()
        wait_for(lambda: not scripted.app.state.service.answers._open)
        script.gate.set()
        wait_for(lambda: is_idle(scripted))
        assert script.drawn < 20, "it went on drawing for nobody"
    with asking(scripted) as http:
        script.say("still here")
        assert http.post(CHAT, json=QUESTION).json()["choices"][0]["message"]["content"] == "still here"


def test_clients_that_go_away_while_tokens_come(nano):
    """Of many, each ends its answer: none is drawn to its end."""

    def leave() -> None:
        sent = {"prompt": "what is", "max_tokens": 4000}
        for tenths in range(8):
            with contextlib.suppress(httpx.HTTPError):
                httpx.post(f"{url}/v1/completions", json=sent, headers={"x-api-key": KEY}, timeout=0.05 + 0.02 * tenths)

    with serving(nano) as listener:
        url = listener.url
        threads = [threading.Thread(target=leave) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        wait_for(lambda: is_idle(listener))
        assert stats(listener).submitted > 5
        assert stats(listener).finished == 0


def test_a_full_queue_says_when_to_come_back(script):
    with serving(script.model, slots=1, waiting=1) as listener, asking(listener) as http:
        hold(script)
        found = []

        def post():
            found.append(httpx.post(listener.url + CHAT, json=QUESTION, headers={"x-api-key": KEY}, timeout=60))

        threads = [threading.Thread(target=post) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: stats(listener).running + stats(listener).waiting == 2)
        for path, body in ((CHAT, QUESTION), ("/v1/messages", QUESTION | {"max_tokens": 5}), ("/api/chat", OLLAMA)):
            refused = http.post(path, json=body)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
        assert http.get("/health").status_code == 200
        assert "iolite_running_answers 1.0" in http.get("/metrics").text
        script.gate.set()
        for thread in threads:
            thread.join(60)
        assert [response.status_code for response in found] == [200, 200]
        wait_for(lambda: is_idle(listener))


def test_answers_are_sent_at_once(nano, monkeypatch):
    """Without TCP_NODELAY the second packet of every answer waits for the client's word on the first."""
    found = []
    with serving(nano) as listener, asking(listener) as http:
        protocol = listener.config.http_protocol_class
        made = protocol.connection_made

        def noted(self, transport):
            found.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            made(self, transport)

        monkeypatch.setattr(protocol, "connection_made", noted)
        http.get("/health")
    assert found
    assert all(found)


def test_pings_while_nothing_comes(script):
    with serving(script.model, ping=0.05) as listener, asking(listener) as http:
        for path, ping in ((CHAT, ": ping"), ("/v1/messages", "event: ping")):
            hold(script)
            pings = 0
            with http.stream("POST", path, json=QUESTION | {"stream": True, "max_tokens": 5}) as response:
                for line in response.iter_lines():
                    pings += line == ping
                    if pings == 2:
                        script.gate.set()
            assert pings >= 2


def test_a_stop_lets_answers_end(script):
    hold(script)
    stream = {"method": "POST", "url": CHAT, "json": QUESTION | {"stream": True}}
    with serving(script.model, grace=60.0) as listener, asking(listener) as http, http.stream(**stream) as response:
        lines = response.iter_lines()
        next(lines)
        listener.should_exit = True
        wait_for(lambda: listener.app.state.service.answers.stopping)
        script.gate.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_a_stop_tells_those_that_it_ends(script):
    hold(script)
    with serving(script.model, grace=0.1) as listener, asking(listener) as http:
        with http.stream("POST", CHAT, json=QUESTION | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            listener.should_exit = True
            wait_for(lambda: not listener.app.state.service.answers._open)
            script.gate.set()
            last = [line for line in lines if line][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert "stopped" in error["message"]


def test_an_error_in_the_middle_of_a_stream(script, scripted, monkeypatch):
    """Scores that are no numbers end one answer with an error event."""
    script.say(LONG)

    def logits(hidden):
        rows = script.logits(hidden)
        return rows * float("nan") if script.drawn > 5 else rows

    monkeypatch.setattr(script.model.network, "logits", logits)
    with asking(scripted) as http:
        asked = ((CHAT, QUESTION, "data: "), ("/v1/messages", QUESTION, "data: "), ("/api/chat", OLLAMA, ""))
        for path, question, mark in asked:
            script.drawn = 0
            with http.stream("POST", path, json=question | {"stream": True}) as response:
                assert response.status_code == 200
                last = [line for line in response.iter_lines() if line][-1]
            assert "not numbers" in str(json.loads(last.removeprefix(mark))["error"])
        script.drawn = 0
        found = http.post(CHAT, json=QUESTION)
        assert found.status_code == 500
        assert found.json()["error"]["type"] == "server_error"
    wait_for(lambda: is_idle(scripted))


def test_many_at_once(nano):
    """More than there are slots, of several interfaces, some of which hang up."""
    with serving(nano, slots=3, waiting=30) as listener, asking(listener) as http:
        expected = http.post(CHAT, json=QUESTION).json()["choices"][0]["message"]["content"]
        found, threads = [], []

        def one(number: int) -> None:
            headers = {"x-api-key": KEY}
            if number % 3 == 0:
                with contextlib.suppress(httpx.HTTPError):
                    httpx.post(listener.url + CHAT, json=QUESTION, headers=headers, timeout=0.02)
            elif number % 3 == 1:
                answer = httpx.post(listener.url + CHAT, json=QUESTION, headers=headers, timeout=60).json()
                found.append(answer["choices"][0]["message"]["content"])
            else:
                body = OLLAMA | {"stream": False}
                answer = httpx.post(f"{listener.url}/api/chat", json=body, headers=headers, timeout=60).json()
                found.append(answer["message"]["content"])

        for number in range(24):
            threads.append(threading.Thread(target=one, args=(number,)))
            threads[-1].start()
        for thread in threads:
            thread.join(60)
        assert found == [expected] * 16
        wait_for(lambda: is_idle(listener))
