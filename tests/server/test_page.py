"""What the page asks of its server: files and their costs, answers that are stored as they grow, exports, guards."""

from __future__ import annotations

import json

import httpx
import pytest
from PIL import Image
from support.pdf import a_pdf, a_scan, locked
from support.serving import DEMO, KEY, asking, serving, wait_for

from iolite.server.chats import Chats


@pytest.fixture
def asked(scripted):
    with asking(scripted) as client:
        yield client


def attach(http, data, name="file", type="application/octet-stream"):
    return http.post("/page/files", files={"file": (name, data, type)})


def attached(http, name):
    found = attach(http, (DEMO / name).read_bytes(), name)
    assert found.status_code == 201, found.text
    return found.json()


def events(response):
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]


def ask(http, chat, **turn):
    found = http.post(f"/page/chats/{chat}/answers", json=turn)
    assert found.status_code == 200, found.text
    return events(found)


def new(http, **settings):
    return http.post("/page/chats", json={"settings": settings}).json()["id"]


def test_costs_before_anything_is_sent(http):
    picture = attached(http, "number.png")
    assert picture["kind"] == "image" and picture["info"] == {"width": 400, "height": 200, "costs": {"1": 1, "3": 2}}
    sound = attached(http, "digits.wav")
    assert sound["kind"] == "audio" and sound["info"]["seconds"] == 1.6 and sound["info"]["longest"] == 10.0
    text = attach(http, "héllo".encode()).json()
    assert text["kind"] == "text"
    tokens = len(http.post("/tokenize", json={"text": "héllo"}).json()["tokens"])
    assert text["info"]["tokens"] == tokens
    # What is told is what is paid.
    chat = new(http, max_tokens=1)
    plain = ask(http, chat, text="hm")[0]["prompt_tokens"]
    sent = [{"file": sound["file"], "name": "digits.wav"}]
    assert (
        ask(http, new(http, max_tokens=1), text="hm", files=sent)[0]["prompt_tokens"] == plain + sound["info"]["tokens"]
    )


def paid(http, sent):
    """Tokens of a message with this file, beside those of its words."""
    plain = ask(http, new(http, max_tokens=1), text="hm")[0]["prompt_tokens"]
    return ask(http, new(http, max_tokens=1), text="hm", files=[sent])[0]["prompt_tokens"] - plain


def test_pdfs_are_read_or_looked_at(http):
    found = attach(http, a_pdf("first page", "second page", "third page", size=(900, 300))).json()
    kept = http.get(f"/page/files/{found['file']}")
    assert kept.headers["content-disposition"] == "attachment"
    assert kept.headers["content-type"] == "application/octet-stream"
    info = found["info"]
    assert found["kind"] == "document" and info["pages"] == 3 and info["pictures"] == 0
    assert set(info["costs"]) == {"1", "3"} and info["costs"]["1"] < info["costs"]["3"]
    sent = {"file": found["file"], "name": "document"}
    # What is told is what is paid, but for the line that parts a document from a question.
    assert 0 <= paid(http, sent) - info["tokens"] <= 2
    for budget, cost in info["costs"].items():
        assert 0 <= paid(http, sent | {"tokens": int(budget)}) - cost <= 2
    chat = new(http, max_tokens=1)
    begin = ask(http, chat, text="hm", files=[sent | {"tokens": 1}])[0]
    assert begin["asked"][0]["files"][0]["tokens"] == 1, "how it is read is kept"
    assert http.get("/page/chats", params={"q": "hm"}).json()


def test_pages_without_text_are_looked_at(http):
    red = Image.new("RGB", (300, 100), "red")
    scan = attach(http, a_scan(red, red)).json()
    assert scan["kind"] == "document" and scan["info"]["tokens"] is None and scan["info"]["pictures"] == 2
    sent = {"file": scan["file"], "name": "document"}
    assert (
        paid(http, sent)
        == paid(http, sent | {"tokens": 3})
        >= scan["info"]["costs"]["3"]
        > paid(http, sent | {"tokens": 1})
    )
    long = attach(http, a_scan(*[Image.new("1", (8, 8))] * 65))
    assert (
        long.status_code == 400 and "65 pages without text; 64 pages may be pictures" in long.json()["error"]["message"]
    )
    book = attach(http, a_pdf(*["words"] * 65)).json()["info"]
    assert book["pages"] == 65 and book["tokens"] and book["costs"] == {}


BAD = {
    "nothing": b"", "no known form": b"\x00\x01\x02" * 50, "a broken picture": b"\x89PNG\r\n\x1a\n" + b"\0" * 50,
    "a broken PDF": b"%PDF-1.7\n" + b"x" * 200, "an empty PDF": a_pdf(""), "a locked PDF": locked(),
    "broken sound": b"RIFF\0\0\0\0WAVE" + b"\1" * 99,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_used(http, name):
    found = attach(http, BAD[name])
    assert found.status_code == 400
    message = found.json()["error"]["message"]
    assert message and "Traceback" not in message and "pdfium" not in message.lower() and "0x" not in message


def test_files_are_shown_but_never_run(http):
    html = attach(http, b"<script>alert(1)</script>", "x.html", "text/html").json()
    svg = attach(http, b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "x.svg", "image/svg+xml").json()
    for found in (html, svg):
        kept = http.get(f"/page/files/{found['file']}")
        assert kept.headers["content-type"] == "application/octet-stream"
        assert kept.headers["content-disposition"] == "attachment"
    picture = http.get(f"/page/files/{attached(http, 'number.png')['file']}")
    assert picture.headers["content-type"] == "image/png" and picture.content == (DEMO / "number.png").read_bytes()
    assert "sandbox" in picture.headers["content-security-policy"]
    assert http.get("/page/files/" + "0" * 64).status_code == 404


def test_an_answer_is_streamed_and_stored(http):
    chat, picture = new(http), attached(http, "number.png")
    sent = [{"file": picture["file"], "name": "number.png", "tokens": 3}]
    found = ask(http, chat, text="What number is this?", files=sent)
    assert [event["type"] for event in found][0 :: len(found) - 1] == ["begin", "end"]
    end = found[-1]["message"]
    assert end["text"] == "47" and end["html"] == "<p>47</p>\n" and end["info"]["state"] == "done"
    assert end["info"]["tokens"] == 3 and end["info"]["first_token"] > 0
    kept = http.get(f"/page/chats/{chat}").json()
    assert kept["title"] == "What number is this?" and kept["head"] == end["id"]
    question, reply = kept["messages"]
    assert reply == end
    assert question["files"][0]["name"] == "number.png" and question["files"][0]["tokens"] == 3
    # A question about what was said, with the picture still there; and the first one again, beside the first answer.
    ask(http, chat, parent=end["id"], text="who are you?")
    again = ask(http, chat, parent=question["id"], again=True)[-1]["message"]
    assert again["parent"] == question["id"] and again["text"] == "47"
    assert len(http.get(f"/page/chats/{chat}").json()["messages"]) == 5


def test_thoughts_and_calls(script, asked):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    chat = new(asked, tools=tools, thinking=True, max_tokens=200)
    script.say("<|channel>thought\nfirst *this*<channel|>let me look<|tool_call>call:weather{}<tool_call|>",
               end="<|tool_response>")  # fmt: skip
    found = ask(asked, chat, text="rain?")
    assert {"begin", "thought", "text", "call", "end"} == {event["type"] for event in found}
    end = found[-1]["message"]
    assert end["thought"] == "<p>first <em>this</em></p>\n" and end["info"]["thought_seconds"] >= 0
    (call,) = end["calls"]
    assert call["name"] == "weather" and call["seconds"] >= 0
    script.say("<channel|>it rains")  # after a result the thought goes on
    answer = ask(asked, chat, parent=end["id"], results=[{"call": call["id"], "text": "rain"}])
    assert answer[0]["asked"][0]["role"] == "tool" and answer[-1]["message"]["text"] == "it rains"
    refused = asked.post(
        f"/page/chats/{chat}/answers", json={"parent": end["id"], "results": [{"call": "x", "text": ""}]}
    )
    assert refused.status_code == 400


def test_stop(script, scripted, asked):
    script.say("on and on " * 200)
    script.gate.clear()
    chat = new(asked)
    with asked.stream("POST", f"/page/chats/{chat}/answers", json={"text": "hm"}) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        begin = json.loads(next(lines)[6:])
        script.gate.set()
        assert json.loads(next(lines)[6:])["type"] == "text"
        assert asked.post(f"/page/answers/{begin['message']['id']}/stop", json={}).status_code == 204
        end = json.loads(list(lines)[-1][6:])["message"]
    assert end["info"]["state"] == "stopped" and end["info"]["notice"] is None
    assert end["text"] and ("on and on " * 200).startswith(end["text"])
    wait_for(lambda: not scripted.app.state.writings)  # the last line is sent a moment before
    assert asked.post("/page/answers/12345/stop", json={}).status_code == 204


def test_a_page_that_is_left_ends_its_answer_and_keeps_it(script, scripted, asked):
    script.say("on and on " * 200)
    chat = new(asked)
    with (
        httpx.Client(base_url=scripted.url, headers={"x-api-key": KEY}, timeout=60) as leaving,
        leaving.stream("POST", f"/page/chats/{chat}/answers", json={"text": "hm"}) as response,
    ):
        next(line for line in response.iter_lines() if '"text"' in line and "settled" in line)
    wait_for(lambda: not scripted.app.state.writings)
    wait_for(lambda: asked.get(f"/page/chats/{chat}").json()["messages"][-1]["info"]["state"] == "stopped")
    text = asked.get(f"/page/chats/{chat}").json()["messages"][-1]["text"]
    assert text and ("on and on " * 200).startswith(text)


def test_a_server_that_died_left_no_answer_in_the_middle(script, tmp_path):
    path = tmp_path / "chats.sqlite"
    chats = Chats(path)
    from iolite.server.chats import Message

    chat = chats.create("old")
    chats.add(chat.id, Message(0, None, "assistant", "half an", info={"state": "writing"}))
    chats.close()
    with serving(script.model, chats=path) as listener, asking(listener) as http:
        (message,) = http.get(f"/page/chats/{chat.id}").json()["messages"]
        assert message["text"] == "half an" and message["info"]["state"] == "stopped"


@pytest.mark.parametrize(
    "turn",
    [
        {},
        {"text": "  "},
        {"parent": 999, "text": "hm"},
        {"again": True},
        {"text": "hm", "files": [{"file": "0" * 64, "name": "x"}]},
        {"text": "hm", "files": [{"file": "../etc", "name": "x"}]},
        {"text": 5},
        {"text": "hm", "more": 1},
    ],
)
def test_turns_that_are_refused_leave_nothing(http, turn):
    chat = new(http)
    found = http.post(f"/page/chats/{chat}/answers", json=turn)
    assert found.status_code == 400 and found.json()["error"]["message"]
    assert http.get(f"/page/chats/{chat}").json()["messages"] == []


def test_too_long_for_the_context_is_told_and_not_stored(http):
    chat = new(http)
    found = http.post(f"/page/chats/{chat}/answers", json={"text": "one two three " * 5000})
    assert found.status_code == 400 and "context" in found.json()["error"]["message"]
    assert http.get(f"/page/chats/{chat}").json()["messages"] == []


def test_halves_of_letters_are_stored_as_something(http):
    def post(path, body):  # as JSON in ASCII, in which they can come
        return http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})

    chat = post("/page/chats", {"settings": {"system": "\ud83d"}}).json()["id"]
    assert (
        events(post(f"/page/chats/{chat}/answers", {"text": "who are you?\ud800"}))[-1]["message"]["info"]["state"]
        == "done"
    )
    assert http.get(f"/page/chats/{chat}").json()["messages"][0]["text"] == "who are you??"


def test_change_search_export_delete(http):
    chat = new(http, system="be brief", temperature=0)
    ask(http, chat, text="who are you? 0451")
    changed = http.patch(f"/page/chats/{chat}", json={"title": "Näme/../x"}).json()
    assert changed["title"] == "Näme/../x" and changed["settings"]["temperature"] == 0
    assert [c["id"] for c in http.get("/page/chats", params={"q": "0451"}).json()] == [chat]
    document = http.get(f"/page/chats/{chat}/export", params={"form": "markdown"})
    assert document.text.startswith("# Näme/../x\n\n> be brief\n") and "## You\n\nwho are you? 0451" in document.text
    assert (
        "attachment" in document.headers["content-disposition"] and "/.." not in document.headers["content-disposition"]
    )
    whole = http.get(f"/page/chats/{chat}/export").json()
    assert [m["role"] for m in whole["messages"]] == ["user", "assistant"]
    assert http.patch(f"/page/chats/{chat}", json={"head": 99999}).status_code == 400
    assert http.patch(f"/page/chats/{chat}", json={"settings": {"temperature": -1}}).status_code == 400
    assert http.delete(f"/page/chats/{chat}").status_code == 204
    for path in ("", "/export"):
        assert http.get(f"/page/chats/{chat}{path}").status_code == 404
    assert http.get("/page/chats", params={"q": "0451"}).json() == []


def test_the_policy(http):
    page = http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "<script>" not in page.text and " style=" not in page.text and " onclick" not in page.text
    for name in ("app.js", "page.css", "icon.svg", "sign-in.html"):
        assert http.get(f"/page/static/{name}").status_code == 200
    for name in ("nothing.js", "..%2fpage.py", "%2e%2e%2fpage.py", ".."):
        assert http.get(f"/page/static/{name}").status_code == 404


def test_what_needs_the_key(server):
    with httpx.Client(base_url=server.url) as stranger:
        for path in ("/page/chats", "/page/about", "/page/files/" + "0" * 64, "/page/chats/x", "/page/chats/x/export"):
            assert stranger.get(path).status_code == 401
        assert stranger.post("/page/chats", json={}).status_code == 401
        assert stranger.get("/page/static/page.css").status_code == 200, "a page that asks for the key needs its looks"
        sign_in = stranger.get("/", headers={"Accept": "text/html"})
        assert sign_in.status_code == 401 and 'name="token"' in sign_in.text
        assert (
            stranger.get("/page/chats", headers={"Accept": "text/html"}).headers["content-type"] == "application/json"
        )


def test_pages_elsewhere_may_not_change_chats(server):
    with httpx.Client(base_url=server.url) as browser:
        browser.get("/", params={"token": KEY})
        assert browser.get("/page/chats").status_code == 200
        for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            assert browser.post("/page/chats", json={}, headers=headers).status_code in (401, 403)
