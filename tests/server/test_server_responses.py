"""`/v1/responses` through the real `openai` client."""

from __future__ import annotations

import base64
import json
import tracemalloc

import openai
import pytest
from support.pdf import a_pdf
from support.serving import KEY, data_uri

from iolite.server.errors import UnknownError
from iolite.server.responses_kept import Responses, bytes_of

NEWS = {"type": "function", "name": "news", "parameters": {"type": "object"}}
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
        script.drawn = 0
        choice = {"type": "allowed_tools", "mode": "required", "tools": [choice]}
        reply = other.responses.create(model="x", input="hm", tools=[NEWS, WEATHER], tool_choice=choice)
    assert reply.output[0].name == "weather"


@pytest.mark.parametrize(
    "more",
    [
        {"conversation": "conv_1"},
        {"top_logprobs": 2},
        {"top_logprobs": 21, "include": ["message.output_text.logprobs"]},
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


def test_a_conversation_goes_on_by_id(client):
    first = client.responses.create(model="x", input=QUESTION, instructions="Be brief.")
    again = client.responses.create(model="x", input="who are you?", previous_response_id=first.id)
    assert again.previous_response_id == first.id
    history = [*QUESTION, *(item.model_dump() for item in first.output), {"role": "user", "content": "who are you?"}]
    whole = client.responses.create(model="x", input=history, store=False)
    assert again.output_text == whole.output_text
    assert again.usage.input_tokens == whole.usage.input_tokens
    kept = client.responses.retrieve(first.id)
    assert (kept.output_text, kept.usage, kept.instructions) == ("47", first.usage, "Be brief.")
    assert first.store and not whole.store


def test_what_was_read_is_not_read_again(client):
    """The picture too, and over several turns; a stream is kept before it says that it is complete."""
    settings = {"model": "x", "temperature": 0}
    last = client.responses.create(input=QUESTION, **settings)
    for words in ("and what colour is it?", "who are you?", "are you sure?"):
        read = last.usage.input_tokens - 4  # without the empty thought that only the last answer begins with
        with client.responses.stream(input=words, previous_response_id=last.id, **settings) as stream:
            last = stream.get_final_response()
        assert last.usage.input_tokens_details.cached_tokens >= read


def test_calls_and_their_outputs_by_id(script, scripted):
    with client_of(scripted) as client:
        script.say(f"<|channel>thought\nhm hm\n<channel|>{CALL}", end="<|tool_response>")
        more = {"model": "x", "tools": [WEATHER], "reasoning": {"effort": "low"}}
        first = client.responses.create(input="will it rain?", **more)
        call = next(item for item in first.output if item.type == "function_call")
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        script.say("so\n<channel|>take an umbrella")  # the prompt has begun the thought
        reply = client.responses.create(input=[output], previous_response_id=first.id, **more)
        assert reply.output_text == "take an umbrella"
        assert reply.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1  # that ends it
        items = client.responses.input_items.list(reply.id, order="asc").data
        assert [item.type for item in items] == ["message", "reasoning", "function_call", "function_call_output"]
        script.say("for ever")
        last = client.responses.create(input="how long?", previous_response_id=reply.id, **more)
        assert last.output_text == "for ever"


def test_input_items_come_in_pages(client):
    words = [{"role": "user", "content": f"message {i}"} for i in range(5)]
    first = client.responses.create(model="x", input=words, max_output_tokens=2)
    second = client.responses.create(model="x", input="who?", previous_response_id=first.id, max_output_tokens=2)
    texts = [item.content[0].text for item in client.responses.input_items.list(second.id, limit=2, order="asc")]
    assert texts == [*(f"message {i}" for i in range(5)), first.output_text, "who?"]
    page = client.responses.input_items.list(second.id, limit=3)
    assert [item.content[0].text for item in page.data] == ["who?", first.output_text, "message 4"]
    assert page.has_more and page.first_id == page.data[0].id
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list(second.id, after="msg_0")


def test_what_is_not_kept_is_not_found(client):
    kept, let_go = (client.responses.create(model="x", input="who are you?", store=store) for store in (True, False))
    client.responses.delete(kept.id)
    asks = (
        lambda name: client.responses.create(model="x", input="hi", previous_response_id=name),
        client.responses.retrieve,
        client.responses.delete,
        client.responses.input_items.list,
    )
    for name in (kept.id, let_go.id, "resp_1"):
        for ask in asks:
            with pytest.raises(openai.NotFoundError) as caught:
                ask(name)
            assert "send the conversation whole" in caught.value.message
            assert (caught.value.type, caught.value.code) == ("not_found_error", "not_found")


def test_a_response_outlives_those_it_goes_on_from(client):
    first = client.responses.create(model="x", input=QUESTION)
    second = client.responses.create(model="x", input="who are you?", previous_response_id=first.id)
    client.responses.delete(first.id)
    assert client.responses.input_items.list(second.id, order="asc").data[0].content[0].type == "input_image"
    client.responses.create(model="x", input="and?", previous_response_id=second.id)


def response(name: str, text: str = "answer") -> dict:
    return {"id": name, "output": [{"type": "message", "role": "assistant", "content": text}]}


def asked(text: str) -> list:
    return [{"type": "message", "role": "user", "content": text}]


def test_the_longest_unused_are_forgotten_and_bytes_are_counted_once():
    kept = Responses(most=3, most_bytes=100_000)
    kept.keep(response("a"), asked("x" * 40_000), None)
    for name, before in (("b", "a"), ("c", "b")):  # together more than the limit, if each had the long one for itself
        kept.keep(response(name), asked("and?"), kept.find(before))
    assert 40_000 < kept.bytes < 60_000
    kept.find("a")
    kept.keep(response("d"), asked("x"), None)
    with pytest.raises(UnknownError):
        kept.find("b")
    assert [item["content"][:4] for item in kept.find("c").conversation()[::2]] == ["xxxx", "and?", "and?"]
    kept.keep(response("e"), asked("y" * 80_000), None)
    assert len(kept) < 3
    assert kept.bytes <= 100_000
    kept.keep(response("f"), asked("y" * 200_000), kept.find("e"))  # too large by itself
    assert (len(kept), kept.bytes) == (0, 0)


def test_bytes_are_no_fewer_than_those_in_memory():
    tracemalloc.start()
    made = json.loads(json.dumps(asked("ü" * 100_000) * 50 + [{f"key {i}": [i, 0.5, "hä"] for i in range(20_000)}]))
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken <= bytes_of(made) < 2 * taken


def test_how_likely_tokens_were(client, nano):
    more = {"model": "x", "temperature": 0, "include": ["message.output_text.logprobs"]}
    part = client.responses.create(input=QUESTION, top_logprobs=3, **more).output[0].content[0]
    assert "".join(token.token for token in part.logprobs) == part.text == "47"
    question = [{"role": "user", "content": PARTS}]
    expected = nano.logits(nano.prompt(question))[-1].double().log_softmax(-1).topk(3).values.tolist()
    assert [other.logprob for other in part.logprobs[0].top_logprobs] == pytest.approx(expected, abs=1e-3)
    events = list(client.responses.create(input=QUESTION, stream=True, top_logprobs=3, **more))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    (done,) = (event for event in events if event.type == "response.output_text.done")
    for event in deltas:
        assert "".join(token.token for token in event.logprobs) == event.delta
    for told in (done.logprobs, [token for event in deltas for token in event.logprobs]):
        assert [token.token for token in told] == [token.token for token in part.logprobs]
        assert [token.logprob for token in told] == pytest.approx([t.logprob for t in part.logprobs], abs=1e-3)
    assert len(events[-1].response.output[0].content[0].logprobs) == len(part.logprobs)
    assert client.responses.create(input=QUESTION, **more).output[0].content[0].logprobs[0].top_logprobs == []
    assert client.responses.create(model="x", input=QUESTION).output[0].content[0].logprobs == []
    raw = client.responses.with_raw_response.create(model="x", input="hi", include=["reasoning.encrypted_content"])
    assert raw.headers["x-iolite-ignored"] == "include"
