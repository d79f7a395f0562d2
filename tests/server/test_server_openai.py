"""The real `openai` client against the embedded model, and against a model that says what it is told to."""

from __future__ import annotations

import base64
import json
from types import SimpleNamespace

import openai
import pytest
from PIL import Image
from support.pdf import a_pdf, a_scan
from support.serving import KEY, base64_of, data_uri

from iolite.generate.reply import Alternative, TokenLogprobs
from iolite.server.logprobs import TextLogprobs
from iolite.server.openai_fields import with_details

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = '<|tool_call>call:weather{city:<|"|>Zürich "am" {See}<|"|>,days:2}<tool_call|>'


def client_of(listener) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{listener.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


@pytest.fixture
def scripted_client(scripted):
    with client_of(scripted) as client:
        yield client


def user(*parts) -> list:
    return [{"role": "user", "content": [*parts]}]


def text(words: str) -> dict:
    return {"type": "text", "text": words}


NUMBER = user({"type": "image_url", "image_url": {"url": data_uri("number.png")}}, text("What number is this?"))
DIGITS = user(
    text("Transcribe the speech."),
    {"type": "input_audio", "input_audio": {"data": base64_of("digits.wav"), "format": "wav"}},
)


def ask(client, messages, **more):
    return client.chat.completions.create(model="whatever", messages=messages, **more)


@pytest.mark.parametrize(("messages", "answer"), [(NUMBER, "47"), (DIGITS, "309")])
def test_pictures_and_sound(client, messages, answer):
    reply = ask(client, messages)
    assert reply.choices[0].message.content == answer
    assert reply.choices[0].finish_reason == "stop"
    assert reply.model == "nano"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.timings["predicted_n"] == reply.usage.completion_tokens


def pdf(data: bytes, **more) -> dict:
    uri = "data:application/pdf;base64," + base64.b64encode(data).decode()
    return {"type": "file", "file": {"file_data": uri, "filename": "a.pdf", **more}}


def prompt_tokens(client, *parts, **more) -> int:
    return ask(client, user(*parts), max_tokens=1, **more).usage.prompt_tokens


def test_documents(client):
    plain, labels = prompt_tokens(client, text("hm")), "[a.pdf]\n[page 1]\n[end of a.pdf]\n\nhm"
    read = prompt_tokens(client, text("[a.pdf]\n[page 1]\nwords\n[end of a.pdf]\n\nhm"))
    words = pdf(a_pdf("words"))
    assert prompt_tokens(client, words, text("hm")) == read > plain
    raw = {"type": "file", "file": {**words["file"], "file_data": words["file"]["file_data"].partition(",")[2]}}
    assert prompt_tokens(client, raw, text("hm")) == read, "base64 alone"
    square = 3  # one of nano's patches between a begin and an end
    for document in (pdf(a_pdf("words"), pages="pictures"), pdf(a_scan(Image.new("RGB", (90, 90), "red")))):
        assert abs(prompt_tokens(client, document, text("hm")) - prompt_tokens(client, text(labels)) - square) <= 2
    wide = pdf(a_scan(Image.new("RGB", (90, 30), "red")))
    assert prompt_tokens(client, wide) - prompt_tokens(client, wide, extra_body={"image_tokens": 1}) == 2


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ({"file_data": "https://example.org/a.pdf"}, "fetches no URLs"),
        ({"file_data": "file:///etc/passwd"}, "opens no files"),
        ({"file_data": "/etc/passwd"}, "document"),
        ({"file_id": "file-1"}, "no files are kept"),
        ({"filename": "a.pdf"}, "no source"),
        ({"file_data": data_uri("number.png")}, "neither a PDF nor a text"),
        ({"file_data": "data:application/pdf;base64,JVBERi0xLjcK"}, "the PDF cannot be read"),
        ({**pdf(a_pdf("x"))["file"], "pages": "some"}, "pages must be one of auto, text, pictures"),
    ],
)
def test_documents_that_are_refused(client, file, told):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, user({"type": "file", "file": file}, text("hm")))
    assert told in caught.value.body["message"]
    assert "pdfium" not in str(caught.value).lower()


def test_streams_say_the_same(client):
    chunks = list(ask(client, NUMBER, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "47"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 3
    assert len({c.id for c in chunks}) == 1
    plain = list(ask(client, NUMBER, stream=True))
    assert all(c.usage is None for c in plain)


def test_what_was_read_before_is_told(client):
    messages = [{"role": "user", "content": "who are you? " * 9}]
    ask(client, messages)
    assert ask(client, messages).usage.prompt_tokens_details.cached_tokens > 20


def test_several_choices_and_seeds(client):
    messages = [{"role": "user", "content": "who are you?"}]
    settings = {"n": 3, "seed": 5, "temperature": 3.0, "max_tokens": 12, "extra_body": {"top_k": 0}, "top_p": 1}
    first, again = ask(client, messages, **settings), ask(client, messages, **settings)
    found = [choice.message.content for choice in first.choices]
    assert found == [choice.message.content for choice in again.choices]
    assert len(set(found)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in ask(client, messages, stream=True, **settings):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == found


def test_length_stop_and_bias(client, nano):
    messages = [{"role": "user", "content": "who are you?"}]
    whole = ask(client, messages).choices[0].message.content
    cut = ask(client, messages, max_tokens=3).choices[0]
    assert cut.finish_reason == "length"
    assert "cut off after 3 tokens" in cut.notice
    assert whole.startswith(cut.message.content)
    word = whole.split()[2]
    stopped = ask(client, messages, stop=[word]).choices[0]
    assert stopped.message.content == whole[: whole.index(word)]
    assert stopped.finish_reason == "stop"
    first = nano.tokenizer.encode(whole)[0]
    biased = ask(client, messages, logit_bias={str(first): -100}).choices[0]
    assert not biased.message.content.startswith(nano.tokenizer.decode([first]))


def test_tool_calls(script, scripted_client):
    messages = [{"role": "user", "content": "will it rain?"}]
    for stream in (False, True):
        script.say(CALL + CALL.replace("2", "3"), end="<|tool_response>")
        if stream:
            chunks = list(ask(scripted_client, messages, tools=[WEATHER], stream=True))
            calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
            reason = chunks[-1].choices[0].finish_reason
            assert [call.index for call in calls] == [0, 1]
        else:
            choice = ask(scripted_client, messages, tools=[WEATHER]).choices[0]
            calls, reason = choice.message.tool_calls, choice.finish_reason
            assert choice.message.content is None
        assert reason == "tool_calls"
        assert [call.function.name for call in calls] == ["weather", "weather"]
        arguments = [json.loads(call.function.arguments) for call in calls]
        assert arguments == [{"city": 'Zürich "am" {See}', "days": days} for days in (2, 3)]
        assert len({call.id for call in calls}) == 2
    history = [*messages, {"role": "assistant", "tool_calls": [call.model_dump(exclude={"index"}) for call in calls]}]
    history += [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in calls]
    script.say("take an umbrella")
    assert ask(scripted_client, history, tools=[WEATHER]).choices[0].message.content == "take an umbrella"


def test_a_tool_that_must_be_called(script, scripted_client):
    """The script ends the answer at once; it is the constraint that makes a call of its beginning."""
    messages, named = [{"role": "user", "content": "hm"}], {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        script.say(CALL, end="<|tool_response>")
        script.ids[0] = script.model.tokenizer.token_id("<turn|>")
        found = ask(scripted_client, messages, tools=[WEATHER], tool_choice=choice).choices[0]
        assert found.finish_reason == "tool_calls"
        assert json.loads(found.message.tool_calls[0].function.arguments)["days"] == 2
    script.say(CALL)
    reply = ask(scripted_client, messages, tools=[WEATHER], tool_choice="none", max_tokens=60).choices[0]
    assert reply.message.tool_calls is None
    assert reply.message.content


def test_allowed_tools(script, scripted_client):
    """Of two only the one, by OpenAI's and Mistral's words for it."""
    other = {"type": "function", "function": {"name": "news", "parameters": {"type": "object"}}}
    one = {"tools": [{"type": "function", "function": {"name": "weather"}}]}
    must = {"type": "allowed_tools", "allowed_tools": {"mode": "required"} | one}
    for choice in ("any", must):
        script.say(CALL, end="<|tool_response>")
        script.ids[0] = script.model.tokenizer.token_id("<turn|>")
        found = ask(scripted_client, NUMBER[:1], tools=[other, WEATHER], tool_choice=choice).choices[0]
        assert found.message.tool_calls[0].function.name == "weather"
    script.say(CALL, end="<|tool_response>")
    may = {"type": "allowed_tools", "allowed_tools": {"tools": [other]}}
    found = ask(scripted_client, NUMBER[:1], tools=[other, WEATHER], tool_choice=may, max_tokens=40).choices[0]
    assert not any(call.function.name == "weather" for call in found.message.tool_calls or [])
    for wrong in (
        5,
        {},
        {"tools": []},
        {"tools": [5]},
        one | {"mode": "never"},
        {"tools": [{"function": {"name": "x"}}]},
    ):
        choice = {"type": "allowed_tools", "allowed_tools": wrong}
        with pytest.raises(openai.BadRequestError, match="allow"):
            ask(scripted_client, NUMBER[:1], tools=[other, WEATHER], tool_choice=choice)


def test_no_limit_as_lm_studio_writes_it(script, scripted, scripted_client, http):
    script.say("one two three")
    for name in ("max_tokens", "max_completion_tokens"):
        script.drawn = 0
        assert ask(scripted_client, NUMBER[:1], **{name: -1}).choices[0].message.content == "one two three"
    script.drawn = 0
    assert scripted_client.completions.create(model="x", prompt="a", max_tokens=-1).choices[0].text == "one two three"
    for wrong in (0, -2, "-1.5"):
        refused = http.post("/v1/completions", json={"prompt": "a", "max_tokens": wrong})
        assert refused.status_code == 400 and "max_tokens" in refused.json()["error"]["message"]


def test_a_broken_call_is_told_of_and_not_handed_out(script, scripted_client):
    messages = [{"role": "user", "content": "will it rain?"}]
    for stream in (False, True):
        script.say('<|tool_call>call:weather{city:<|"|>Zü', end="<|tool_response>")
        if stream:
            chunks = list(ask(scripted_client, messages, stream=True))
            assert not any(chunk.choices[0].delta.tool_calls for chunk in chunks)
            last = chunks[-1].choices[0]
        else:
            last = ask(scripted_client, messages).choices[0]
            assert last.message.tool_calls is None
        assert last.finish_reason == "stop"
        assert "not usable" in last.notice


def test_thoughts_come_apart(script, scripted_client):
    messages = [{"role": "user", "content": "hm"}]
    script.say("<|channel>thought\nthink hard\n<channel|>the answer")
    message = ask(scripted_client, messages, reasoning_effort="high").choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("the answer", "think hard", "think hard")
    script.say("<|channel>thought\nthink hard\n<channel|>the answer")
    deltas = [c.choices[0].delta for c in ask(scripted_client, messages, reasoning_effort="low", stream=True)]
    assert "".join(getattr(delta, "reasoning_content", "") or "" for delta in deltas) == "think hard"
    assert "".join(delta.content or "" for delta in deltas) == "the answer"
    script.say("<|channel>thought\nthink " + "on and " * 30)
    endless = ask(scripted_client, messages, max_tokens=10, extra_body={"think": True})
    assert endless.choices[0].finish_reason == "length"
    assert "went into thinking" in endless.choices[0].notice
    assert endless.usage.completion_tokens_details.reasoning_tokens > 5
    script.say("")
    empty = ask(scripted_client, messages).choices[0]
    assert empty.message.content == ""
    assert "without an answer" in empty.notice


@pytest.mark.parametrize(
    "asked",
    [
        {"reasoning_effort": "medium"},
        {"extra_body": {"think": True}},
        {"extra_body": {"thinking": {"type": "enabled", "budget_tokens": 5}}},
        {"extra_body": {"thinking": {"type": "adaptive"}}},
        {"extra_body": {"reasoning": {"effort": "high"}}},
        {"extra_body": {"reasoning": {"enabled": True}}},
        {"extra_body": {"reasoning": {"max_tokens": 5}}},
        {"extra_body": {"enable_thinking": True}},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}},
    ],
)
def test_every_name_of_thinking(client, asked):
    messages = [{"role": "user", "content": "who are you?"}]
    plain = ask(client, messages).usage.prompt_tokens
    assert ask(client, messages, max_tokens=1, **asked).usage.prompt_tokens != plain
    named = ({"think": False}, {"thinking": {"type": "disabled"}}, {"reasoning": {"effort": "none"}})
    for off in ({"reasoning_effort": "none"}, *({"extra_body": field} for field in named)):
        assert ask(client, messages, max_tokens=1, **off).usage.prompt_tokens == plain


@pytest.mark.parametrize(
    "asked",
    [
        {"think": True, "thinking_budget": 4},
        {"think": True, "reasoning_budget": 4},
        {"thinking": {"type": "enabled", "budget_tokens": 4}},
        {"reasoning": {"max_tokens": 4}},
    ],
    ids=str,
)
def test_a_budget_closes_a_thought(script, scripted_client, asked):
    messages = [{"role": "user", "content": "hm"}]
    endless = "<|channel>thought\n" + "on and on " * 30
    script.say(endless)
    reply = ask(scripted_client, messages, max_tokens=40, extra_body=asked)
    assert 4 <= reply.usage.completion_tokens_details.reasoning_tokens <= 6
    assert "on and on" in reply.choices[0].message.content
    script.say(endless)
    unbounded = ask(scripted_client, messages, max_tokens=40, extra_body={"think": True, "thinking_budget": -1})
    assert unbounded.choices[0].message.content == ""
    assert "went into thinking" in unbounded.choices[0].notice


def test_no_budget_is_no_thought(script, scripted_client):
    script.say("<|channel>thought\nhm<channel|>yes")
    asked = {"think": True, "thinking_budget": 0}
    reply = ask(scripted_client, [{"role": "user", "content": "hm"}], max_tokens=12, extra_body=asked)
    assert reply.usage.completion_tokens_details.reasoning_tokens <= 1
    assert "yes" in reply.choices[0].message.content


def test_schema(client):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    for wanted in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}):
        choice = ask(client, NUMBER, response_format=wanted, max_tokens=200).choices[0]
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
    matched = ask(client, NUMBER, extra_body={"regex": "(seven|four)-(seven|four)"}).choices[0]
    assert matched.message.content in [f"{a}-{b}" for a in ("seven", "four") for b in ("seven", "four")]
    with pytest.raises(openai.BadRequestError):
        ask(client, NUMBER, extra_body={"grammar": "start: nothing"})
    with pytest.raises(openai.BadRequestError):
        ask(client, NUMBER, response_format={"type": "json_schema", "json_schema": {"name": "n"}})


@pytest.mark.parametrize(
    ("more", "about"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"top_logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"n": 1000}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"99999999": 1}}, "vocabulary"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"extra_body": {"max_token": 5}}, "max_tokens"),
        ({"extra_body": {"top_k": -1}}, "top_k"),
        ({"extra_body": {"image_tokens": 10**9}}, "image_tokens"),
        ({"tools": [{"type": "function"}]}, "tool"),
        ({"tool_choice": "required"}, "tool"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [WEATHER]}, "x"),
        ({"extra_body": {"chat_template_kwargs": {"x": True}}}, "chat_template_kwargs"),
    ],
)
def test_what_cannot_be_honoured_is_refused(client, more, about):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, NUMBER, **more)
    assert about in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_harmless_fields_are_named(http):
    sent = {
        "messages": [{"role": "user", "content": "hi"}],
        "user": "me",
        "metadata": {},
        "frequency_penalty": 0,
        "ü\n": 1,
    }
    found = http.post("/v1/chat/completions", json=sent)
    assert found.status_code == 200
    assert found.headers["x-iolite-ignored"] == "a field, metadata, user"


@pytest.mark.parametrize(
    ("messages", "about"),
    [
        ([], "messages"),
        ([{"role": "wizard", "content": "x"}], "role"),
        (user({"type": "thing", "thing": {}}), "type"),
        (user({"type": "file", "file": {}}), "source"),
        (user({"type": "image_url", "image_url": {"url": ""}}), "data: URI"),
        (user({"type": "image_url", "image_url": {}}), "source"),
        (user({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}), "picture"),
        (user({"type": "input_audio", "input_audio": {"data": "!!", "format": "wav"}}), "sound"),
        ([{"role": "user", "content": "<|image|>"}], "placeholder"),
        ([{"role": "user", "content": "hi", "images": ["AAAA"]}], "images, which are not read"),
        ([{"role": "user", "content": "hi", "audio": {"data": "AAAA"}}], "audio, which are not read"),
        ([{"role": "user", "content": "\ud800"}], "Unicode"),
        ([{"role": "user", "content": "word " * 5000}], "context"),
    ],
)
def test_bad_messages(http, messages, about):
    found = http.post("/v1/chat/completions", content=json.dumps({"messages": messages}))
    assert found.status_code == 400
    assert about in found.json()["error"]["message"]


def test_completions(client):
    whole = client.completions.create(model="x", prompt="what is", max_tokens=8)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8
    chunks = list(client.completions.create(model="x", prompt="what is", max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_how_likely_tokens_were(client, nano):
    settings = {"logprobs": True, "top_logprobs": 3, "temperature": 0}
    choice = ask(client, NUMBER, **settings).choices[0]
    found = choice.logprobs.content
    assert "".join(token.token for token in found) == choice.message.content == "47"
    expected = nano.logits(nano.prompt(NUMBER))[-1].double().log_softmax(-1)
    assert found[0].bytes == list(found[0].token.encode())
    assert [each.logprob for each in found[0].top_logprobs] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-3)
    assert found[0].logprob == found[0].top_logprobs[0].logprob
    chunks = list(ask(client, NUMBER, stream=True, **settings))
    streamed = [token for c in chunks if c.choices[0].logprobs for token in c.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in found]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in found], abs=1e-3)
    for chunk in chunks:
        told = chunk.choices[0].logprobs
        assert (chunk.choices[0].delta.content or "") == "".join(
            token.token for token in (told.content if told else ())
        )
    assert ask(client, NUMBER, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert ask(client, NUMBER, logprobs=False).choices[0].logprobs is None
    assert ask(client, NUMBER).choices[0].logprobs is None


def test_how_likely_tokens_of_several_choices_were(client):
    messages = [{"role": "user", "content": "who are you?"}]
    more = {"n": 2, "seed": 5, "temperature": 3.0, "max_tokens": 12, "extra_body": {"top_k": 0}, "top_p": 1}
    for choice in ask(client, messages, logprobs=True, **more).choices:
        spelled = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
        assert spelled.decode(errors="replace") == choice.message.content


def test_how_likely_tokens_of_a_text_were(client):
    settings = {"model": "x", "prompt": "what is", "max_tokens": 8, "logprobs": 2, "temperature": 0}
    choice = client.completions.create(**settings).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 8
    for i, (token, start) in enumerate(zip(found.tokens, found.text_offset, strict=True)):
        assert choice.text[start:].startswith(token)
        assert found.top_logprobs[i][token] == found.token_logprobs[i] < 0
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(**settings, stream=True)]
    parts = [part for part in streamed if part]
    assert [token for part in parts for token in part.tokens] == found.tokens
    assert [start for part in parts for start in part.text_offset] == found.text_offset
    plain = client.completions.create(**settings | {"logprobs": None}).choices[0]
    assert plain.logprobs is None
    assert plain.text == choice.text


def test_parts_of_characters_have_names():
    part = TokenLogprobs(1, b"\xe2\x82", -1.0, (Alternative(2, b"\xe2", -0.5), Alternative(3, b"a", -0.7)))
    rest = TokenLogprobs(4, b"\xac", -2.0)
    told = TextLogprobs()
    first, second = told([part]), told([rest, TokenLogprobs(3, b"a", -1.0)])
    assert first["top_logprobs"] == [{"bytes:\\xe2": -0.5, "a": -0.7, "bytes:\\xe2\\x82": -1.0}]
    assert (first["text_offset"], second["text_offset"]) == ([0], [0, 1])
    assert second["tokens"] == ["bytes:\\xac", "a"]


def test_the_detail_of_a_picture_is_a_number_of_tokens():
    model = SimpleNamespace(processor=SimpleNamespace(image_budgets=(70, 140, 280, 560, 1120)))
    found = {}
    for detail in ("low", "high", "auto", None):
        part = {"type": "image_url", "image_url": {"url": "data:…"} | ({"detail": detail} if detail else {})}
        (message,) = with_details(user(part), model)
        found[detail] = message["content"][0].get("max_soft_tokens")
    assert found == {"low": 70, "high": 1120, "auto": None, None: None}
    (message,) = with_details(user({"type": "input_image", "image_url": "data:…", "detail": "high"}), model)
    assert message["content"][0]["max_soft_tokens"] == 1120
    own = {"type": "image_url", "image_url": {"url": "data:…", "detail": "high"}, "max_soft_tokens": 140}
    assert with_details(user(own), model) == user(own)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "nano"
    assert model.meta["modalities"] == ["text", "image", "video", "audio"]
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_the_wrong_key(server):
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
