"""The real `anthropic` client."""

from __future__ import annotations

import base64
from typing import Literal

import anthropic
import pydantic
import pytest
from PIL import Image
from support.pdf import a_pdf, a_scan, locked
from support.serving import KEY, base64_of

WEATHER = {
    "name": "weather",
    "description": "of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<|tool_call>call:weather{city:<|"|>Zürich<|"|>}<tool_call|>'
PICTURE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": base64_of("number.png")},
}
QUESTION = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "What number is this?"}]}]


def client_of(listener) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=listener.url, api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


def ask(client, messages, max_tokens=100, **more):
    return client.messages.create(model="claude", messages=messages, max_tokens=max_tokens, **more)


def test_a_picture(client):
    message = ask(client, QUESTION)
    assert message.content[0].text == "47"
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == 3
    counted = client.messages.count_tokens(model="claude", messages=QUESTION).input_tokens
    assert counted == message.usage.input_tokens + message.usage.cache_read_input_tokens


def test_streaming(client):
    with client.messages.stream(model="claude", messages=QUESTION, max_tokens=100) as stream:
        assert "".join(stream.text_stream) == "47"
        message = stream.get_final_message()
    assert message.content[0].text == "47"
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == 3


def test_system_length_and_stop(client):
    plain = [{"role": "user", "content": "who are you?"}]
    whole = ask(client, plain).content[0].text
    cut = ask(client, plain, max_tokens=2)
    assert cut.stop_reason == "max_tokens"
    word = whole.split()[1]
    stopped = ask(client, plain, stop_sequences=["never said", word])
    assert stopped.content[0].text == whole[: whole.index(word)]
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    for system in ("be brief", [{"type": "text", "text": "be brief"}]):
        asked = client.messages.count_tokens(model="c", messages=plain, system=system).input_tokens
        assert asked > client.messages.count_tokens(model="c", messages=plain).input_tokens


def test_thoughts_and_tools(script, scripted):
    said = f"<|channel>thought\nhm hm\n<channel|>well{CALL}{CALL}"
    tools = {"tools": [WEATHER], "thinking": {"type": "enabled", "budget_tokens": 1024}}
    messages = [{"role": "user", "content": "will it rain?"}]
    with client_of(scripted) as client:
        script.say(said, end="<|tool_response>")
        whole = ask(client, messages, **tools)
        script.say(said, end="<|tool_response>")
        with client.messages.stream(model="c", messages=messages, max_tokens=100, **tools) as stream:
            streamed = stream.get_final_message()
        for message in (whole, streamed):
            assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
            assert message.content[0].thinking == "hm hm"
            assert message.content[1].text == "well"
            assert message.content[3].input == {"city": "Zürich"}
            assert message.stop_reason == "tool_use"
        results = [{"type": "tool_result", "tool_use_id": b.id, "content": "rain"} for b in whole.content[2:]]
        results[1]["content"] = [{"type": "text", "text": "rain"}, PICTURE]
        history = [*messages, {"role": "assistant", "content": [b.model_dump() for b in whole.content]}]
        history.append({"role": "user", "content": [*results, {"type": "text", "text": "so?"}]})
        script.say("take an umbrella")
        assert ask(client, history, tools=[WEATHER]).content[0].text == "take an umbrella"


def test_schema(client):
    class Number(pydantic.BaseModel):
        n: Literal[4, 7]

    asked = {"model": "x", "max_tokens": 60, "messages": QUESTION}
    assert client.messages.parse(output_format=Number, **asked).parsed_output.n in (4, 7)
    raw = client.messages.with_raw_response.create(output_config={"effort": "low"}, **asked)
    assert raw.headers["x-iolite-ignored"] == "output_config.effort"
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format"):
        client.messages.create(output_config={"format": {"type": "json_schema"}}, **asked)


def test_tool_choice(script, scripted):
    with client_of(scripted) as client:
        for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
            script.say(CALL, end="<|tool_response>")
            script.ids[0] = script.model.tokenizer.token_id("<turn|>")  # which only the constraint keeps it from
            found = ask(client, [{"role": "user", "content": "hm"}], tools=[WEATHER], tool_choice=choice)
            assert found.content[0].input == {"city": "Zürich"}


@pytest.mark.parametrize(
    ("more", "about"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"max_tokens": 2**40}}, "max_tokens"),
        ({"extra_body": {"temperature": -1.0}}, "temperature"),
        ({"thinking": {"type": "x"}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": -5}}, "budget"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"tool_choice": {"type": "sometimes"}}, "tool_choice"),
        ({"extra_body": {"container": "x"}}, "container"),
    ],
)
def test_what_cannot_be_honoured_is_refused(client, more, about):
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(client, QUESTION, **more)
    assert about in caught.value.body["error"]["message"]
    assert caught.value.body["type"] == "error"


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}}],
        [{"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}}],
        [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}],
        [{"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}}],
        [{"type": "document", "source": {"type": "url", "url": "http://127.0.0.1/x.pdf"}}],
        [{"type": "document", "source": {"type": "file", "file_id": "file-1"}}],
        [{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}, "pages": "all"}],
        [
            {
                "type": "document",
                "source": {"type": "text", "media_type": "text/plain", "data": "x"},
                "citations": {"enabled": True},
            }
        ],
        [{"type": "image"}],
        [{"type": "tool_result", "tool_use_id": "x", "content": 5}],
        [{"type": "tool_result", "tool_use_id": "x", "content": {"type": "text", "text": "x"}}],
        ["x"],
        None,
    ],
)
def test_bad_content(client, content):
    with pytest.raises(anthropic.BadRequestError):
        ask(client, [{"role": "user", "content": content}])


def test_a_text_document(client):
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "who are you?"}}
    assert ask(client, [{"role": "user", "content": [document]}]).content[0].text


def pdf(data: bytes, **more) -> dict:
    source = {"type": "base64", "media_type": "application/pdf", "data": base64.b64encode(data).decode()}
    return {"type": "document", "source": source, **more}


def count(client, *content) -> int:
    return client.messages.count_tokens(model="c", messages=[{"role": "user", "content": [*content]}]).input_tokens


def test_a_pdf(client):
    question = {"type": "text", "text": "who are you?"}
    document = pdf(a_pdf("page one", "page two"), title="a.pdf", cache_control={"type": "ephemeral"})
    asked = [{"role": "user", "content": [document, question]}]
    message = ask(client, asked)
    assert message.content[0].text
    read = "[a.pdf]\n[page 1]\npage one\n\n[page 2]\npage two\n[end of a.pdf]\n\nwho are you?"
    assert count(client, document, question) == count(client, {"type": "text", "text": read})
    looked_at = count(client, document | {"pages": "pictures"}, question)
    labels = "[a.pdf]\n[page 1][page 2][end of a.pdf]\n\nwho are you?"
    patches = 2 * (2 + 1)  # a square is one of nano's patches, between a begin and an end
    assert 0 <= looked_at - count(client, {"type": "text", "text": labels}) - patches <= 2
    assert count(client, document | {"citations": {"enabled": False}}, question) == count(client, document, question)


def test_a_scan_is_looked_at(client):
    scan = pdf(a_scan(Image.new("RGB", (90, 90), "red")), title="a.pdf")
    looked_at = count(client, scan)
    assert looked_at == count(client, scan | {"pages": "pictures"})
    for document, told in ((scan | {"pages": "text"}, "holds no text"), (pdf(locked()), "locked by a password")):
        with pytest.raises(anthropic.BadRequestError, match=told) as caught:
            count(client, document)
        assert "pdfium" not in str(caught.value).lower()


def test_the_wrong_key(server):
    stranger = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError):
        ask(stranger, QUESTION)
