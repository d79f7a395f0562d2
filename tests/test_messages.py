"""Message shapes: what people send, and what they get wrong."""

from __future__ import annotations

import numpy as np
import pytest

from iolite.errors import MessageError
from iolite.messages import Attachment, check_tools, normalise


def content_of(*parts):
    messages, attachments = normalise([{"role": "user", "content": list(parts)}])
    return messages[0]["content"], attachments


def test_string_is_one_user_message():
    assert normalise("Hi") == ([{"role": "user", "content": "Hi"}], [])


@pytest.mark.parametrize(
    ("part", "kind", "source"),
    [
        ({"type": "image", "image": "a.png"}, "image", "a.png"),
        ({"type": "image", "url": "a.png"}, "image", "a.png"),
        ({"type": "image", "path": "a.png"}, "image", "a.png"),
        ({"type": "image_url", "image_url": "data:image/png;base64,AA=="}, "image", "data:image/png;base64,AA=="),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, "image", "a.png"),
        ({"type": "audio", "audio": "b.wav"}, "audio", "b.wav"),
        ({"type": "audio_url", "audio_url": {"url": "b.wav"}}, "audio", "b.wav"),
        (
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}},
            "audio",
            "data:audio/mp3;base64,AAAA",
        ),
        ({"type": "video", "video": "c.mp4"}, "video", "c.mp4"),
        ({"type": "video_url", "video_url": {"url": "c.mp4"}}, "video", "c.mp4"),
        ({"type": "image"}, "image", None),
    ],
)
def test_media_parts_of_both_conventions(part, kind, source):
    content, attachments = content_of(part)
    assert content == [{"type": kind}]
    assert [(a.kind, a.source) for a in attachments] == [(kind, source)]


def test_arrays_carry_their_sampling_rate():
    samples = np.zeros(8, np.float32)
    _, (attachment,) = content_of({"type": "audio", "audio": {"array": samples, "sampling_rate": 8000}})
    assert attachment.source is samples
    assert attachment.sampling_rate == 8000


def test_order_of_parts_and_messages_is_kept():
    messages, attachments = normalise(
        [
            {"role": "user", "content": [{"type": "audio", "audio": "1"}, "text", {"type": "image", "image": "2"}]},
            {"role": "assistant", "content": "ok"},
            {"role": "user", "content": [{"type": "image", "image": "3"}]},
        ]
    )
    assert [a.source for a in attachments] == ["1", "2", "3"]
    assert messages[0]["content"] == [{"type": "audio"}, {"type": "text", "text": "text"}, {"type": "image"}]


def test_settings_of_one_picture_and_one_video():
    _, attachments = content_of(
        {"type": "image", "image": "a", "max_soft_tokens": 560}, {"type": "video", "video": "b", "fps": 2}
    )
    assert attachments == [Attachment("image", "a", max_soft_tokens=560), Attachment("video", "b", fps=2)]


def test_tool_arguments_as_json_text_become_an_object():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, {"b": "c"}]}'}}
    messages, _ = normalise([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert messages[0]["tool_calls"][0]["function"]["arguments"] == {"a": [1, {"b": "c"}]}


def test_tool_result_as_an_object_becomes_json_text():
    messages, _ = normalise([{"role": "tool", "name": "f", "content": {"t": 20, "s": "Zürich"}}])
    assert messages[0]["content"] == '{"t": 20, "s": "Zürich"}'


BAD = {
    "nothing": ([], "non-empty list"),
    "not a list": ({"role": "user", "content": "x"}, "non-empty list"),
    "not an object": (["x"], "message 0 is not an object"),
    "no role": ([{"content": "x"}], "role None"),
    "unknown role": ([{"role": "robot", "content": "x"}], "role 'robot'"),
    "no content": ([{"role": "user"}], "has no content"),
    "content a number": ([{"role": "user", "content": 3}], "content must be a string"),
    "part without type": ([{"role": "user", "content": [{"text": "x"}]}], "part 0 has the type None"),
    "unknown part": ([{"role": "user", "content": ["a", {"type": "smell"}]}], "part 1 has the type 'smell'"),
    "text part without text": ([{"role": "user", "content": [{"type": "text"}]}], "no string under 'text'"),
    "empty source": ([{"role": "user", "content": [{"type": "image", "image": {}}]}], "no source"),
    "bad rate": (
        [{"role": "user", "content": [{"type": "audio", "audio": "a", "sampling_rate": -1}]}],
        "sampling_rate must be a positive",
    ),
    "bad fps": ([{"role": "user", "content": [{"type": "video", "video": "a", "fps": float("nan")}]}], "fps must be"),
    "arguments not JSON": (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        "arguments must be a JSON object",
    ),
    "arguments a list": (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
        "arguments must be a JSON object",
    ),
    "calls that are no list": ([{"role": "assistant", "tool_calls": 5}], "tool_calls must be a list, not int"),
    "media beside calls": (
        [
            {
                "role": "assistant",
                "content": [{"type": "image", "image": "a"}],
                "tool_calls": [{"function": {"name": "f"}}],
            }
        ],
        "has both media and tool_calls",
    ),
    "type that is no text": ([{"role": "user", "content": [{"type": ["image"]}]}], r"has the type \['image'\]"),
    "result that is no JSON": ([{"role": "tool", "content": {"a": {1}}}], "JSON has no form for"),
    "call without a name": ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "no function with a name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_messages_are_refused_and_named(case):
    messages, words = BAD[case]
    with pytest.raises(MessageError, match=words):
        normalise(messages)


@pytest.mark.parametrize("tools", [5, "add", {"name": "add"}, [5], ["add"], [{}], [{"function": 5}], [{"name": 1}]])
def test_bad_tools_are_refused(tools):
    with pytest.raises(MessageError, match="tool"):
        check_tools(tools)


def test_tools_in_either_form():
    check_tools([{"type": "function", "function": {"name": "add"}}, {"name": "add"}])
    check_tools(None)
