"""The real `ollama` client."""

from __future__ import annotations

import json

import ollama
import pytest
from support.serving import DEMO, KEY

import iolite

CALL = '<|tool_call>call:weather{city:<|"|>Zürich<|"|>}<tool_call|>'


def client_of(listener) -> ollama.Client:
    return ollama.Client(host=listener.url, headers={"Authorization": f"Bearer {KEY}"})


@pytest.fixture(scope="module")
def client(server):
    client = client_of(server)
    yield client
    client._client.close()


def question(words: str, *files: str) -> list:
    return [{"role": "user", "content": words, "images": [str(DEMO / file) for file in files]}]


def weather(city: str) -> str:
    """Weather of a city.

    Args:
        city: its name
    """
    return "rain"


@pytest.mark.parametrize(
    ("messages", "answer"),
    [
        (question("What number is this?", "number.png"), "47"),
        (question("Transcribe the speech.", "digits.wav"), "309"),
    ],
)
def test_pictures_and_sound(client, messages, answer):
    reply = client.chat(model="gemma4:12b", messages=messages)
    assert reply.message.content == answer
    assert reply.done and reply.done_reason == "stop"
    assert reply.eval_count > 1
    pieces = list(client.chat(model="x", messages=messages, stream=True))
    assert "".join(piece.message.content for piece in pieces) == answer
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_generate(client):
    assert client.generate(model="x", prompt="What number is this?", images=[DEMO / "number.png"]).response == "47"
    whole = client.generate(model="x", prompt="who are you?").response
    assert "".join(piece.response for piece in client.generate(model="x", prompt="who are you?", stream=True)) == whole
    cut = client.generate(model="x", prompt="who are you?", options={"num_predict": 2})
    assert (cut.done_reason, cut.eval_count) == ("length", 2)
    raw = client.generate(model="x", prompt="what is", raw=True, options={"num_predict": 4})
    assert raw.eval_count == 4
    assert client.generate(model="x").done_reason == "load"
    word = whole.split()[1]
    stopped = client.generate(model="x", prompt="who are you?", options={"stop": [word], "num_ctx": 2048})
    assert stopped.response == whole[: whole.index(word)]


def test_format(client):
    schema = {"type": "object", "properties": {"n": {"enum": [4, 7]}}, "required": ["n"], "additionalProperties": False}
    reply = client.chat(model="x", messages=question("What number is this?", "number.png"), format=schema)
    assert json.loads(reply.message.content)["n"] in (4, 7)


def test_thoughts_and_tools(script, scripted):
    client = client_of(scripted)
    said = f"<|channel>thought\nhm hm\n<channel|>{CALL}"
    messages = [{"role": "user", "content": "will it rain?"}]
    script.say(said, end="<|tool_response>")
    message = client.chat(model="x", messages=messages, tools=[weather], think=True).message
    assert message.thinking == "hm hm"
    assert message.tool_calls[0].function.name == "weather"
    assert message.tool_calls[0].function.arguments == {"city": "Zürich"}
    script.say(said, end="<|tool_response>")
    pieces = list(client.chat(model="x", messages=messages, tools=[weather], think=True, stream=True))
    assert "".join(piece.message.thinking or "" for piece in pieces) == "hm hm"
    assert [call.function.name for piece in pieces for call in piece.message.tool_calls or ()] == ["weather"]
    history = [*messages, message, {"role": "tool", "tool_name": "weather", "content": "rain"}]
    script.say("take an umbrella")
    assert client.chat(model="x", messages=history, tools=[weather]).message.content == "take an umbrella"
    client._client.close()


def test_how_likely_tokens_were(client, nano):
    settings = {"model": "x", "logprobs": True, "top_logprobs": 3, "options": {"temperature": 0}}
    messages = question("What number is this?", "number.png")
    whole = client.chat(messages=messages, **settings)
    assert "".join(token.token for token in whole.logprobs) == whole.message.content == "47"
    parts = [{"type": "image", "image": str(DEMO / "number.png")}, {"type": "text", "text": "What number is this?"}]
    scores = nano.logits(nano.prompt([{"role": "user", "content": parts}]))[-1].double().log_softmax(-1)
    likeliest = [other.logprob for other in whole.logprobs[0].top_logprobs]
    assert likeliest == pytest.approx(scores.topk(3).values.tolist(), abs=1e-3)
    assert whole.logprobs[0].logprob == likeliest[0]
    pieces = list(client.chat(messages=messages, stream=True, **settings))
    for piece in pieces:
        assert piece.message.content == "".join(token.token for token in piece.logprobs or ())
    assert sum(len(piece.logprobs or ()) for piece in pieces) == len(whole.logprobs)
    for raw in (False, True):
        more = settings | {"prompt": "who are you?", "raw": raw, "options": {"temperature": 0, "num_predict": 6}}
        reply = client.generate(**more)
        assert "".join(token.token for token in reply.logprobs) == reply.response
        streamed = [token.token for piece in client.generate(stream=True, **more) for token in piece.logprobs or ()]
        assert streamed == [token.token for token in reply.logprobs]
    assert not client.chat(model="x", messages=messages, logprobs=True).logprobs[0].top_logprobs
    assert client.chat(model="x", messages=messages).logprobs is None


def test_what_is_here(client):
    (model,) = client.list().models
    assert model.model == "nano"
    assert model.details.parameter_size == "4.3M"
    assert model.size > 4_000_000
    shown = client.show("nano")
    assert {"completion", "vision", "audio", "tools", "thinking"} <= set(shown.capabilities)
    assert shown.modelinfo["gemma4.context_length"] == 4096
    assert 4_300_000 < shown.modelinfo["general.parameter_count"] < 4_320_000
    (loaded,) = client.ps().models
    assert (loaded.model, loaded.size_vram, loaded.context_length) == ("nano", 0, 4096)
    assert loaded.expires_at.year == 9999


@pytest.mark.parametrize("name", ["pull", "delete", "create"])
def test_models_are_neither_made_nor_removed(client, name):
    with pytest.raises(ollama.ResponseError) as caught:
        getattr(client, name)("x")
    assert caught.value.status_code in (404, 405)


@pytest.mark.parametrize(
    ("body", "about"),
    [
        ({"messages": [{"role": "user", "content": "x", "images": ["/etc/passwd"]}]}, "base64"),
        ({"messages": [{"role": "user", "content": "x", "images": ["http://127.0.0.1/"]}]}, "base64"),
        ({"messages": [{"role": "user", "content": "x", "images": ["QUFBQUFBQUFBQUFBQUFBQQ=="]}]}, "picture"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"messages": question("x"), "options": {"temperature": -1}}, "temperature"),
        ({"messages": question("x"), "options": {"mirostat": 2}}, "mirostat"),
        ({"messages": question("x"), "options": {"num_predict": 2**70}}, "num_predict"),
        ({"messages": question("x"), "template": "{{ .Prompt }}"}, "template"),
        ({"messages": question("x"), "format": "yaml"}, "format"),
        ({"messages": question("x"), "top_logprobs": 2}, "logprobs"),
        ({"messages": question("x"), "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_bad_requests(http, body, about):
    found = http.post("/api/chat", json=body)
    assert found.status_code == 400
    assert about in found.json()["error"]


def test_version(http, client):
    """Programs such as VS Code ask for the Ollama that they know how to speak to."""
    found = http.get("/api/version").json()
    assert found["iolite"] == iolite.__version__
    assert tuple(map(int, found["version"].split("."))) >= (0, 6, 4)


def test_embeddings(http, client):
    texts = ["what number is this?", "red green blue"]
    expected = [item["embedding"] for item in http.post("/v1/embeddings", json={"input": texts}).json()["data"]]
    found = client.embed("x", texts, options={"num_ctx": 4096}, truncate=True)
    assert [list(vector) for vector in found.embeddings] == expected
    assert found.prompt_eval_count == sum(
        len(http.post("/tokenize", json={"text": t}).json()["tokens"]) + 1 for t in texts
    )
    assert found.total_duration > 0
    assert list(client.embed("x", texts[0]).embeddings[0]) == expected[0]
    assert list(client.embeddings("x", texts[1]).embedding) == expected[1]
    assert client.embed("x", "").embeddings == client.embed("x", []).embeddings == []
    for wrong in ({"input": ["a", ""]}, {"input": "word " * 5000, "truncate": True}, {"input": "a", "dimensions": 3},
                  {"input": [[1]]}, {"input": "a", "images": ["x"]}):  # fmt: skip
        refused = http.post("/api/embed", json=wrong)
        assert refused.status_code == 400 and isinstance(refused.json()["error"], str), wrong
    with pytest.raises(ollama.ResponseError, match="placeholder"):
        client.embeddings("x", "<|image|>")
    said = http.post("/api/embed", json={"input": "a", "options": {"num_ctx": 1}})
    assert said.headers["x-iolite-ignored"] == "options"
    assert "not trained" in said.json()["note"]
