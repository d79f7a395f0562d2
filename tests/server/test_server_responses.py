"""`/v1/responses` through the real `openai` client."""

from __future__ import annotations

import base64
import json

import openai
import pytest
from support.pdf import a_pdf
from support.serving import KEY, data_uri

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "of a city",
    "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<|tool_call>call:weather{city:<|"|>Zürich<|"|>}<tool_call|>'
PARTS = [
    {"type": "input_image", "image_url": data_uri("number.png")},
    {"type": "input_text", "text": "What number is this?"},
]
QUESTION = [{"role": "user", "content": PARTS}]


def client_of(listener) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{listener.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


def test_a_picture(client):
    reply = client.responses.create(model="x", input=QUESTION)
    assert reply.output_text == "47"
    assert reply.status == "completed"
    assert reply.usage.output_tokens == 3
    with client.responses.stream(model="x", input=QUESTION) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "47"
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-1] == "response.completed"


def test_a_file(client):
    uri = "data:application/pdf;base64," + base64.b64encode(a_pdf("words")).decode()
    question = {"type": "input_text", "text": "hm"}

    def tokens(part) -> int:
        asked = [{"role": "user", "content": [part, question]}]
        return client.responses.create(model="x", input=asked, max_output_tokens=1).usage.input_tokens

    file = {"type": "input_file", "file_data": uri, "filename": "a.pdf"}
    read = "[a.pdf]\n[page 1]\nwords\n[end of a.pdf]\n\n"
    with_text = client.responses.create(model="x", input=f"{read}hm", max_output_tokens=1)
    assert tokens(file) == with_text.usage.input_tokens
    assert tokens(file | {"pages": "pictures"}) != tokens(file)
    for bad in (
        {"type": "input_file", "file_url": "https://example.org/a.pdf"},
        {"type": "input_file", "file_id": "f"},
    ):
        with pytest.raises(openai.BadRequestError, match=r"fetches no URLs|no files are kept"):
            tokens(bad)


def test_what_is_cut_says_so(client):
    reply = client.responses.create(model="x", input="who are you?", max_output_tokens=2)
    assert reply.status == "incomplete"
    assert reply.incomplete_details.reason == "max_output_tokens"


def test_thoughts_and_tools(script, scripted):
    said = f"<|channel>thought\nhm hm\n<channel|>well{CALL}{CALL}"
    more = {"model": "x", "tools": [WEATHER], "reasoning": {"effort": "low"}}
    with client_of(scripted) as client:
        script.say(said, end="<|tool_response>")
        whole = client.responses.create(input="will it rain?", **more)
        script.say(said, end="<|tool_response>")
        events = list(client.responses.create(input="will it rain?", stream=True, **more))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        for reply in (whole, events[-1].response):
            assert [item.type for item in reply.output] == ["reasoning", "message", "function_call", "function_call"]
            assert reply.output[0].content[0].text == "hm hm"
            assert reply.output_text == "well"
            assert json.loads(reply.output[3].arguments) == {"city": "Zürich"}
        done = [event.item.type for event in events if event.type == "response.output_item.done"]
        assert done == ["reasoning", "message", "function_call", "function_call"]
        history = [{"role": "user", "content": "will it rain?"}, *(item.model_dump() for item in whole.output)]
        history += [
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"} for call in whole.output[2:]
        ]
        script.say("take an umbrella")
        assert client.responses.create(model="x", input=history, tools=[WEATHER]).output_text == "take an umbrella"


def test_schema_and_choice(client, script, scripted):
    schema = {"type": "object", "properties": {"n": {"enum": [4, 7]}}, "required": ["n"], "additionalProperties": False}
    wanted = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    assert json.loads(client.responses.create(model="x", input=QUESTION, text=wanted).output_text)["n"] in (4, 7)
    script.say(CALL, end="<|tool_response>")
    script.ids[0] = script.model.tokenizer.token_id("<turn|>")
    with client_of(scripted) as other:
        choice = {"type": "function", "name": "weather"}
        reply = other.responses.create(model="x", input="hm", tools=[WEATHER], tool_choice=choice)
    assert reply.output[0].name == "weather"


@pytest.mark.parametrize(
    "more",
    [
        {"previous_response_id": "resp_1"},
        {"background": True},
        {"tools": [{"type": "web_search"}]},
        {"max_output_tokens": 0},
        {"text": {"format": {"type": "json_schema", "name": "x"}}},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [{"type": "function_call_output", "call_id": "x", "output": 5}]},
        {"input": []},
    ],
)
def test_what_cannot_be_honoured_is_refused(client, more):
    with pytest.raises(openai.BadRequestError):
        client.responses.create(**({"model": "x", "input": "hi"} | more))
