"""What has gone wrong in other servers, tried here: numbers, bodies, bombs, paths, URLs."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from PIL import Image
from support.serving import DEMO, KEY, asking, data_uri, raw, serving

from iolite.media import fetch
from iolite.server import bodies

CHAT = "/v1/chat/completions"
PRIVATE = [
    r"127.0.0.1",
    r"localhost",
    r"[::1]",
    r"0.0.0.0",
    r"2130706433",
    r"127.1",
    r"[::ffff:127.0.0.1]",
    r"0x7f.1",
    r"user@127.0.0.1",
    r"example.org\@127.0.0.1",
    r"169.254.169.254",
    r"10.0.0.1",
]


def picture(url: object, **more) -> dict:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What number is this?"}]}], **more}


def said(found: httpx.Response) -> str:
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["message"]["content"]


def refused(found: httpx.Response) -> str:
    assert found.status_code in (400, 413), (found.status_code, found.text)
    return found.json()["error"]["message"]


# ---- numbers ----

NUMBERS = [-1, -(2**31), 2**31, 2**63, 2**64, 10**400, 1.5, -0.5, 1e999, float("nan"), "1", "x", None, True, [], {}]
FIELDS = [
    "max_tokens",
    "n",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "logit_bias",
    "stop",
    "image_tokens",
    "thinking_budget",
    "top_logprobs",
    "stream_options",
    "tools",
    "messages",
]


@pytest.mark.parametrize("field", FIELDS)
def test_no_number_makes_the_server_fail(http, field):
    for value in NUMBERS:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, field: value}
        found = http.post(CHAT, content=json.dumps(body))
        assert found.status_code in (200, 400), (value, found.text)


@pytest.mark.parametrize("field", ["max_soft_tokens", "num_frames", "fps", "sampling_rate"])
def test_numbers_of_a_part(http, field):
    for value in NUMBERS:
        body = picture(data_uri("number.png"), max_tokens=2)
        body["messages"][0]["content"][0][field] = value
        assert http.post(CHAT, content=json.dumps(body)).status_code in (200, 400), value


# ---- bodies ----


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"5", b"\xff\xfe", b'{"messages": NaN}', b'{"messages": %s}' % (b"9" * 10_000)],
)
def test_what_is_no_request(http, body):
    for path in (CHAT, "/v1/messages", "/v1/completions", "/tokenize"):
        assert http.post(path, content=body).status_code == 400


def test_nesting(http):
    for deep in (b"[" * 100_000, b"[" * 900 + b"]" * 900, b'{"a":' * 900 + b"1" + b"}" * 900):
        for body in (
            deep,
            b'{"messages":' + deep + b"}",
            b'{"messages":[{"role":"user","content":"x","x":' + deep + b"}]}",
        ):
            assert http.post(CHAT, content=body).status_code in (200, 400)
        tool = b'{"type":"function","function":{"name":"f","parameters":' + deep + b"}}"
        body = b'{"max_tokens":2,"messages":[{"role":"user","content":"x"}],"tools":[' + tool + b"]}"
        assert http.post(CHAT, content=body).status_code in (200, 400)


def test_large_bodies(nano):
    with serving(nano, max_body=10_000, max_upload=10_000) as listener, asking(listener) as http:
        assert refused(http.post(CHAT, content=b" " * 10_001))
        assert refused(http.post(CHAT, content=iter([b" " * 6000] * 3)))  # without a length
        assert http.post(CHAT, json={"messages": [{"role": "user", "content": "hi"}]}).status_code == 200
        assert http.post("/v1/messages", content=b" " * 10_001).json()["error"]["type"] == "request_too_large"


def test_many_large_bodies_at_once(nano, monkeypatch):
    """A single byte of a ninth is too much while eight are here."""
    monkeypatch.setattr(bodies, "MOST_LARGEST", 1)
    with serving(nano, max_body=10_000) as listener, asking(listener) as http:
        gate, pieces = threading.Event(), []

        def slowly():
            yield b'{"messages": [{"role": "user", "content": "hi"}]' + b" " * 9_900
            gate.set()
            end.wait(60)
            yield b"}"

        end = threading.Event()
        first = threading.Thread(target=lambda: pieces.append(httpx.post(
            listener.url + CHAT, content=slowly(), headers={"x-api-key": KEY}, timeout=60)))  # fmt: skip
        first.start()
        assert gate.wait(60)
        found = http.post(CHAT, content=b" " * 1000)
        while found.status_code == 400:  # the first one's piece is still on its way
            found = http.post(CHAT, content=b" " * 1000)
        assert found.status_code == 429
        assert "retry-after" in found.headers
        end.set()
        first.join(60)
        assert pieces[0].status_code == 200
        assert http.post(CHAT, content=b" " * 9_000).status_code == 400


def test_many_values(http):
    body = b'{"messages": [' + b"[]," * bodies.MOST_VALUES + b"[]]}"
    assert "values" in refused(http.post(CHAT, content=body))


def test_curl_calls_json_a_form(http):
    sent = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    assert (
        http.post(CHAT, content=sent, headers={"Content-Type": "application/x-www-form-urlencoded"}).status_code == 200
    )


def test_fields_that_nobody_knows(http):
    """Each is compared with all that there are, on the event loop: there may not be thousands."""
    sent = {"messages": [{"role": "user", "content": "hi"}]} | {f"field_{i}": i for i in range(10_000)}
    assert "10000 fields" in refused(http.post(CHAT, json=sent))
    sent = {"messages": [{"role": "user", "content": "hi"}], "options": {f"field_{i}": i for i in range(10_000)}}
    assert "10000 fields" in http.post("/api/chat", json=sent).json()["error"]


def test_lists_of_what_is_no_number(http):
    for path, field in (("/detokenize", "tokens"), ("/v1/embeddings", "input")):
        assert http.post(path, json={field: [1, *["x"] * 300_000]}).status_code == 400


def test_many_fields_in_a_link(server, http):
    """Without the key too."""
    many = "&".join(f"a{i}=1" for i in range(100))
    assert httpx.get(f"{server.url}/health?{many}").status_code == 200
    assert httpx.get(f"{server.url}/?{many}").status_code == 401
    assert http.get(f"/v1/models?{many}").status_code == 200


def test_two_lengths(server):
    """A proxy may take the one and this server the other, and a part of the body for another request."""
    key = f"Host: localhost\r\nx-api-key: {KEY}\r\n"
    hidden = f"GET /v1/models HTTP/1.1\r\n{key}Connection: close\r\n\r\n"
    head = f"POST /tokenize HTTP/1.1\r\n{key}Content-Length: {len(hidden) + 5}\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert raw(server, f"{head}0\r\n\r\n{hidden}".encode()).split()[1] == b"400"
    twice = f"POST /tokenize HTTP/1.1\r\n{key}Content-Length: 5\r\nContent-Length: 6\r\n\r\n123456"
    assert raw(server, twice.encode()).split()[1] == b"400"


def test_a_form_where_none_is_taken(nano):
    """It is counted as what it is not."""
    with serving(nano, max_body=1000, max_upload=10**6) as listener, asking(listener) as http:
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        assert refused(http.post(CHAT, content=b"x" * 2000, headers=form))
        assert http.post("/v1/audio/transcriptions", content=b"--x--", headers=form).status_code == 400


def test_schemas_that_multiply(http):
    """References to what refers twice to another: 30 million values, if somebody followed them."""
    steps = {f"s{i}": {"allOf": [{"$ref": f"#/$defs/s{i + 1}"}] * 2} for i in range(25)}
    schema = {"$defs": steps | {"s25": {"type": "object"}}, "$ref": "#/$defs/s0"}
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert "too much" in refused(http.post(CHAT, json=asked | {"tools": [tool]}))
    wanted = {"type": "json_schema", "json_schema": {"name": "f", "schema": schema}}
    assert http.post(CHAT, json=asked | {"response_format": wanted}).status_code in (200, 400)


@pytest.mark.parametrize(
    "regex", ["(a{1000}){1000}", "(.*a.*b){25}", ".*a.{300}", "|".join(f"w{i}" for i in range(9000))]
)
def test_expressions_that_grow(http, regex):
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "regex": regex}
    assert http.post(CHAT, json=asked).status_code in (200, 400)


def linked(number: int, first: str, link: str, last: str) -> str:
    """Rules each of which names the next."""
    return first + "".join(link.format(i, i + 1) for i in range(number)) + last.format(number)


GRAMMARS = {
    "rules": {"grammar": linked(7500, "start: r0\n", "r{}:r{}\n", 'r{}:"a"\n')},
    "terminals": {"grammar": linked(6000, "start: T0\n", 'T{}:"a" T{}\n', 'T{}:"a"\n')},
    "references": {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(10_000)}},
    "too many": {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(50_000)}},
    "arguments": {"type": "object", "properties": {str(i): {"type": "string"} for i in range(8000)}},
}
GRAMMARS["references"]["$defs"]["10000"] = GRAMMARS["too many"]["$defs"]["50000"] = {"type": "string"}


@pytest.mark.parametrize("deep", GRAMMARS)
def test_rules_in_rules_in_rules(http, deep):
    """They are followed by recursion, in code that is not Python's: a full stack would end the process."""
    asked, given = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}, GRAMMARS[deep]
    if deep == "arguments":
        given = {"tools": [{"type": "function", "function": {"name": "f", "parameters": given}}]}
    elif "grammar" not in given:
        given = {"response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": given}}}
    found = http.post(CHAT, json=asked | given)
    assert found.status_code == (200 if deep in ("rules", "terminals", "references") else 400), found.text


@pytest.mark.parametrize(
    "messages",
    [[{"role": "user" if i % 2 == 0 else "assistant", "content": "x"} for i in range(9999)],
     [{"role": "user", "content": [{"type": "text", "text": "x"}] * 100_000}],
     [{"role": "user", "content": "word " * 5_000_000}]],
    ids=["messages", "parts", "words"],
)  # fmt: skip
def test_more_than_any_context_holds(http, messages):
    assert refused(http.post(CHAT, json={"messages": messages}))


# ---- media ----


PLAYLISTS = [
    b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n",
    b"ffconcat version 1.0\nfile /etc/passwd\n",
    b"v=0\nm=audio 5004 RTP/AVP 0\nc=IN IP4 127.0.0.1\n",
    b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
]


@pytest.mark.parametrize("data", PLAYLISTS, ids=["m3u8", "concat", "sdp", "svg"])
@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_media_that_name_other_files(http, kind, data):
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{kind}/x;base64,{base64.b64encode(data).decode()}"}}
    message = refused(http.post(CHAT, json={"messages": [{"role": "user", "content": [part]}]}))
    assert "cannot be read" in message
    assert "passwd" not in message


def test_bombs(http):
    """A picture of 400 million pixels in few bytes, a lying header, and a small one that says nothing of memory."""
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    lying = base64.b64decode(data_uri("number.png").partition(",")[2])[:40] + b"\xff" * 60
    for data in (bomb.getvalue(), lying, b"\x89PNG\r\n\x1a\n", b"%!PS\n/x {x} def x", b"\x00" * 1000):
        message = refused(http.post(CHAT, json=picture("data:image/png;base64," + base64.b64encode(data).decode())))
        assert not any(word in message for word in ("PIL", "object at", "0x", "Traceback", "libav", "Errno", "/"))
    tiny = io.BytesIO()
    Image.new("RGB", (1, 1)).save(tiny, "PNG")
    assert (
        http.post(CHAT, json=picture("data:;base64," + base64.b64encode(tiny.getvalue()).decode())).status_code == 200
    )


def test_many_media(http):
    part = {"type": "image_url", "image_url": {"url": data_uri("number.png")}}
    found = http.post(CHAT, json={"messages": [{"role": "user", "content": [part] * 65}]})
    assert "65 media; 64" in refused(found)


PATHS = [
    r"/etc/passwd",
    r"../../etc/passwd",
    r"file:///etc/passwd",
    r"file://localhost/etc/passwd",
    r"FILE:///etc/passwd",
    r"~/.ssh/id_rsa",
    r"docs/demo/number.png",
    r"C:\x",
    r"\\host\share",
    r"/proc/self/environ",
    r"concat:/etc/passwd",
    r"file:/etc/passwd",
    r"pipe:0",
]
URLS = [
    r"http://127.0.0.1/",
    r"https://example.org/x.png",
    r"HTTP://169.254.169.254/latest",
    r"http://[::1]/",
    r"ftp://x/y",
    r"http:/\127.0.0.1",
    r"gopher://127.0.0.1",
]


@pytest.mark.parametrize("source", [*PATHS, *URLS, "\0", ""])
@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_neither_paths_nor_urls(http, source, kind):
    named = f"{kind}_url"
    for part in (
        {"type": kind, kind: source},
        {"type": kind, "url": source},
        {"type": kind, "path": source},
        {"type": kind, kind: {"path": source}},
        {"type": named, named: {"url": source}},
    ):
        message = refused(http.post(CHAT, json={"messages": [{"role": "user", "content": [part]}]}))
        assert "root:" not in message
    frames = {"type": "video", "video": [data_uri("number.png"), source]}
    refused(http.post(CHAT, json={"messages": [{"role": "user", "content": [frames]}]}))


def test_a_media_folder(nano, tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "number.png").write_bytes((DEMO / "number.png").read_bytes())
    (tmp_path / "secret.png").write_bytes((DEMO / "number.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with serving(nano, media_path=folder) as listener, asking(listener) as http:
        assert said(http.post(CHAT, json=picture(f"file://{folder}/number.png"))) == "47"
        for path in (
            f"file://{tmp_path}/secret.png",
            f"file://{folder}/../secret.png",
            f"file://{folder}/%2e%2e/secret.png",
            f"file://{folder}/link.png",
            f"file://{folder}",
            f"{folder}/number.png",
            "file:///etc/passwd",
        ):
            assert refused(http.post(CHAT, json=picture(path)))


def test_urls_that_are_allowed_lead_to_no_private_network(nano):
    asked = []

    class Inside(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    inside = HTTPServer(("127.0.0.1", 0), Inside)
    thread = threading.Thread(target=inside.serve_forever)
    thread.start()
    port = inside.server_port
    try:
        with serving(nano, allow_urls=True) as listener, asking(listener) as http:
            for host in PRIVATE:
                assert refused(http.post(CHAT, json=picture(f"http://{host}:{port}/x.png"))), host
    finally:
        inside.shutdown()
        thread.join()
        inside.server_close()
    assert asked == []


def test_a_public_url_without_redirects(nano, monkeypatch):
    """With the check of addresses replaced, since tests have no network: a picture is fetched, a redirect is not."""

    class Outside(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302 if self.path == "/away" else 200)
            self.send_header("Location", "/number.png")
            self.end_headers()
            self.wfile.write((DEMO / "number.png").read_bytes())

        def log_message(self, *args):
            pass

    outside = HTTPServer(("127.0.0.1", 0), Outside)
    thread = threading.Thread(target=outside.serve_forever)
    thread.start()
    monkeypatch.setattr(fetch, "_public_address", lambda host, port, label: "127.0.0.1")
    try:
        with serving(nano, allow_urls=True) as listener, asking(listener) as http:
            base = f"http://pictures.example:{outside.server_port}"
            assert said(http.post(CHAT, json=picture(f"{base}/number.png"))) == "47"
            assert "302" in refused(http.post(CHAT, json=picture(f"{base}/away")))
    finally:
        outside.shutdown()
        thread.join()
        outside.server_close()


def test_a_name_that_leads_elsewhere_by_the_time_it_is_used(nano, monkeypatch):
    """It is looked up once, and what was found then is connected to."""
    looked_up, connected = [], []
    real, real_connect = socket.getaddrinfo, socket.create_connection

    def getaddrinfo(host, port, *more, **named):
        if host != "rebound.example":
            return real(host, port, *more, **named)
        looked_up.append(host)
        address = "93.184.215.14" if len(looked_up) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(address, timeout, **named):
        if named:  # the test's own client
            return real_connect(address, timeout, **named)
        connected.append(address)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(fetch.socket, "create_connection", connect)
    with serving(nano, allow_urls=True) as listener, asking(listener) as http:
        refused(http.post(CHAT, json=picture("http://rebound.example/x.png")))
    assert looked_up == ["rebound.example"]
    assert connected == [("93.184.215.14", 80)]


# ---- what the model says ----


def test_an_error_of_ours_tells_the_client_nothing(nano, monkeypatch, capfd):
    from iolite.server.answers import Answers

    def fail(self, ask):
        raise RuntimeError(f"secret {KEY}")

    with serving(nano) as listener, asking(listener) as http:
        monkeypatch.setattr(Answers, "_prompts", fail)
        for path in (CHAT, "/v1/messages", "/api/chat"):
            body = {"messages": [{"role": "user", "content": "hi"}]}
            body |= {"max_tokens": 2} if path == "/v1/messages" else {}
            for _ in range(3):  # over one connection, which stays
                found = http.post(path, json=body)
                assert found.status_code == 500
                assert "secret" not in found.text
    assert f"secret {KEY}" in capfd.readouterr().err


def test_the_key_is_in_no_log(nano, capfd):
    with serving(nano) as listener:
        assert httpx.get(f"{listener.url}/?token={KEY}").status_code == 303
        assert httpx.get(f"{listener.url}/nothing?token={KEY}", follow_redirects=True).status_code == 404
        assert httpx.get(f"{listener.url}/?token={KEY[:-1]}").status_code == 401
        httpx.get(f"{listener.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    told = capfd.readouterr()
    assert KEY[:-1] not in told.out + told.err
