"""Fields that an interface does not have: what would change the answer is refused, of the rest the names are told."""

from __future__ import annotations

import json

import pytest

HI = [{"role": "user", "content": "hi"}]
CHAT, TEXT, ANTHROPIC, OLLAMA = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/api/chat"
BODIES = {
    CHAT: {"messages": HI, "max_tokens": 2},
    TEXT: {"prompt": "what is", "max_tokens": 2},
    ANTHROPIC: {"messages": HI, "max_tokens": 2},
    OLLAMA: {"messages": HI, "options": {"num_predict": 2}, "stream": False},
}


def message_of(found) -> str:
    error = found.json()["error"]
    return error if isinstance(error, str) else error["message"]


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT, {"json_schema": {"type": "object"}}),
        (CHAT, {"stop_token_ids": [5]}),
        (CHAT, {"n_predict": 3}),
        (CHAT, {"continue_final_message": True}),
        (CHAT, {"chat_template": "x"}),
        (CHAT, {"images": ["AAAA"]}),
        (CHAT, {"options": {"temperature": 0}}),
        (TEXT, {"grammar": 'start: "a"'}),
        (TEXT, {"response_format": {"type": "json_object"}}),
        (TEXT, {"messages": HI}),
        (TEXT, {"think": True}),
        (ANTHROPIC, {"seed": 4}),
        (ANTHROPIC, {"stop": ["a"]}),
        (ANTHROPIC, {"response_format": {"type": "json_object"}}),
        (OLLAMA, {"temperature": 0.5}),
        (OLLAMA, {"images": ["AAAA"]}),
        (OLLAMA, {"system": "x"}),
        (OLLAMA, {"tool_choice": "required"}),
        (OLLAMA, {"max_tokens": 5}),
    ],
    ids=str,
)
def test_what_would_change_the_answer_is_refused(http, path, more):
    found = http.post(path, json=BODIES[path] | more)
    assert found.status_code == 400
    assert next(iter(more)) in message_of(found)


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT, {"reasoning_format": "auto", "samplers": [], "logit_bias": {}, "format": ""}),
        (TEXT, {"tools": [], "response_format": {"type": "text"}, "suffix": None}),
        (ANTHROPIC, {"n": 1, "logprobs": False}),
        (OLLAMA, {"tool_choice": "auto", "raw": False}),
    ],
    ids=str,
)
def test_values_that_change_nothing_are_taken(http, path, more):
    assert http.post(path, json=BODIES[path] | more).status_code == 200


def test_how_answers_are_drawn_changes_no_count(http):
    asked = {"messages": HI, "max_tokens": 5, "temperature": 1}
    assert http.post("/v1/messages/count_tokens", json=asked).status_code == 200


@pytest.mark.parametrize(
    ("more", "about"),
    [
        ({"stop": ["a"] * 17}, "stop: List should have at most 16 items"),
        ({"stop": ""}, "stop: String should have at least 1 character"),
        ({"stop": 5}, "stop: Input should be a valid string"),
        ({"think": "often"}, "think: Input should be 'low', 'medium'"),
        ({"messages": [5]}, "messages.0: Input should be a valid dict"),
        ({"stream_options": {"include_usage": "maybe"}}, "stream_options.include_usage: Input"),
    ],
)
def test_complaints_name_the_field_and_what_it_may_be(http, more, about):
    found = http.post(CHAT, content=json.dumps(BODIES[CHAT] | more))
    assert found.status_code == 400
    assert message_of(found).startswith(about)


def test_a_placeholder_in_a_text_without_media(http):
    for path, body in ((TEXT, {"prompt": "<|image|>"}), ("/api/generate", {"prompt": "<|audio|>", "raw": True})):
        found = http.post(path, json=body)
        assert found.status_code == 400
        assert "placeholder" in message_of(found)
