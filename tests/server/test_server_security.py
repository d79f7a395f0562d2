"""Who gets in: Host, Origin, key, and settings that would let too many in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import httpx
import pytest
from support.serving import KEY, asking, raw, serving, wait_for

from iolite.errors import UsageError
from iolite.server.settings import Settings

CHAT = "/v1/chat/completions"


def test_nothing_but_health_without_the_key(server):
    with httpx.Client(base_url=server.url) as stranger:
        paths = [*server.app.openapi()["paths"], "/openapi.json"]
        assert len(paths) > 5
        for path in [*paths, "/", "/nothing"]:
            found = stranger.get(path).status_code, stranger.post(path, json={}).status_code
            assert found == ((200, 405) if path == "/health" else (401, 401)), path


@pytest.mark.parametrize("key", ["wrong", KEY[:-1], KEY + "x", KEY.upper(), "\xff"])
def test_wrong_keys(server, key):
    sent = {"Authorization": f"Bearer {key}".encode("latin-1")}
    found = httpx.get(f"{server.url}/v1/models", headers=sent)
    assert found.status_code == 401
    assert found.headers["www-authenticate"] == "Bearer"
    assert KEY not in found.text


@pytest.mark.parametrize("header", [{"Authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}])
def test_both_ways_to_send_the_key(server, header):
    assert httpx.get(f"{server.url}/v1/models", headers=header).status_code == 200


def test_the_link_sets_a_cookie_and_leaves_the_key_out_of_the_address(server):
    with httpx.Client(base_url=server.url) as browser:
        found = browser.get("/", params={"token": KEY})
        assert found.status_code == 303
        assert found.headers["location"] == "/"
        cookie = found.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and KEY not in cookie
        assert browser.get("/v1/models").status_code == 200
        # Another server's page on the same machine is the same site, and its requests carry the cookie too.
        assert browser.get("/v1/models", headers={"Sec-Fetch-Site": "same-site"}).status_code == 401
        assert browser.get("/v1/models", headers={"Origin": "http://127.0.0.1:1"}).status_code == 403
    assert httpx.get(f"{server.url}/", params={"token": "wrong"}).status_code == 401
    assert httpx.get(f"{server.url}//evil.example", params={"token": KEY}).headers["location"] == "/evil.example"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "127.0.0.1@evil.example", "", "a b",
             "10.0.0.1", "[::2]", "evil.example:80:80"],
)  # fmt: skip
def test_names_that_are_not_this_servers(server, host):
    request = f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    assert raw(server, request.encode()).split()[1] in (b"403", b"400")


def test_two_hosts_are_none(server):
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert raw(server, request).split()[1] in (b"403", b"400")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "LOCALHOST:8080", "[::1]:80", "127.9.9.9"])
def test_names_of_this_machine(server, host):
    assert httpx.get(f"{server.url}/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://localhost.evil.example", "file://", ""])
def test_pages_of_other_origins(http, origin):
    for method in ("GET", "POST", "OPTIONS"):
        found = http.request(method, CHAT, headers={"Origin": origin, "Access-Control-Request-Method": "POST"})
        assert found.status_code == 403
        assert "access-control-allow-origin" not in found.headers


def test_an_origin_that_was_named(nano):
    friend = {"Origin": "https://friend.example"}
    with serving(nano, origins=("https://friend.example",)) as listener, asking(listener) as client:
        assert client.get("/v1/models", headers=friend).headers["access-control-allow-origin"] == friend["Origin"]
        asked = friend | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        assert httpx.options(listener.url + CHAT, headers=asked).status_code == 200
        local = httpx.options(listener.url + CHAT, headers=asked | {"Access-Control-Request-Private-Network": "true"})
        assert local.headers["access-control-allow-private-network"] == "true"
        asked["Access-Control-Request-Method"] = "DELETE"
        assert httpx.options(f"{listener.url}/v1/responses/x", headers=asked).status_code == 200
        assert httpx.get(f"{listener.url}/v1/models", headers=friend).status_code == 401
        assert client.get("/v1/models", headers={"Origin": "https://other.example"}).status_code == 403


def test_a_page_of_this_server_may_ask(server, http):
    assert http.get("/v1/models", headers={"Origin": server.url}).status_code == 200


def test_a_name_that_was_given(nano):
    with serving(nano, hosts=("box.example",)) as listener, asking(listener) as client:
        assert client.get("/v1/models", headers={"Host": "box.example"}).status_code == 200
        assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403


def test_without_a_key_on_loopback_only(nano):
    with serving(nano, key=None, open_to_all=True) as listener:
        assert httpx.get(f"{listener.url}/v1/models").status_code == 200
        assert httpx.get(f"{listener.url}/v1/models", headers={"Host": "evil.example"}).status_code == 403
        assert httpx.get(f"{listener.url}/v1/models", headers={"Origin": "http://evil.example"}).status_code == 403
    for wrong in (
        {"host": "0.0.0.0"},
        {"host": "192.168.0.7"},
        {"host": "::"},
        {"host": "example.org"},
        {"host": "0.0.0.0", "key": "short"},
        {"host": "0.0.0.0", "open_to_all": True},
        {"key": KEY, "open_to_all": True},
        {"key": "ключ-к-серверу-0123456789"},
        {"key": " "},
        {"origins": ("*",)},
        {"origins": ("https://a.example/",)},
        {"port": 65_536},
    ):
        with pytest.raises(UsageError) as caught:
            Settings(**wrong)
        assert caught.value.hint or "slot" in str(caught.value)
    assert Settings(host="0.0.0.0", key=KEY).secret == KEY
    assert len(Settings().secret) >= 32
    assert Settings().secret != Settings().secret


def test_other_methods(http):
    for path in ("/", "/health", "/v1/models", "/metrics", "/api/tags", "/docs"):
        found = http.head(path)
        assert (found.status_code, found.content) == (200, b"")
        assert found.headers["content-length"] == str(len(http.get(path).content)) or path == "/metrics"
    for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "TRACE"):
        found = http.request(method, CHAT)
        assert (found.status_code, found.headers["allow"]) == (405, "POST")


def test_headers_of_every_answer(http, server):
    for found in (http.get("/v1/models"), http.get("/nothing"), httpx.get(f"{server.url}/v1/models")):
        assert found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["referrer-policy"] == "no-referrer"
        assert found.headers["content-security-policy"].startswith("default-src 'none'")
        assert "server" not in found.headers


def test_a_port_that_is_taken(nano, server):
    from iolite.server.listen import Listener

    port = int(server.url.rpartition(":")[2])
    with pytest.raises(UsageError, match="cannot be listened on") as caught:
        Listener(nano, Settings(port=port))
    assert "--port" in caught.value.hint


@pytest.mark.parametrize("path", ["/api/pull", "/api/create", "/api/delete", "/api/push", "/api/copy", "/load_model"])
def test_no_route_makes_or_removes_models(http, path):
    for method in ("POST", "DELETE", "PUT"):
        assert http.request(method, path, json={"name": "x", "model": "x"}).status_code in (404, 405)


@pytest.mark.parametrize(
    "path", ["/../etc/passwd", "/v1/models/..%2f..%2fetc%2fpasswd", "/%2e%2e/%2e%2e/etc/passwd", "/\\x"]
)
def test_paths_lead_to_no_file(http, path):
    found = http.get(path)
    assert found.status_code == 404
    assert "root:" not in found.text


def takes_no_connections(base: str) -> bool:
    try:
        httpx.get(f"{base}/health")
    except httpx.ConnectError:
        return True
    return False


@pytest.mark.parametrize("hurry", [False, True])
def test_the_command_prints_a_link_and_ends_on_sigint(hurry):
    """The real command in a process of its own. A second Ctrl+C ends an answer that would take long."""
    command = [sys.executable, "-m", "iolite.cli", "serve", "--port", "0", "--drafter", "none"]
    environment = {name: value for name, value in os.environ.items() if name != "IOLITE_API_KEY"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as process:
        try:
            link = process.stdout.readline().strip()
            base, _, token = link.partition("/?token=")
            assert base.startswith("http://127.0.0.1:") and len(token) >= 32
            with httpx.Client(base_url=base, headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
                sent = {"messages": [{"role": "user", "content": "who are you?"}]}
                assert client.post(CHAT, json=sent).json()["choices"][0]["message"]["content"]
                long = {"prompt": "what is", "max_tokens": 4000, "stream": True}
                with client.stream("POST", "/v1/completions", json=long) as response:
                    next(response.iter_lines())
                    if hurry:
                        process.send_signal(signal.SIGINT)
                        wait_for(lambda: takes_no_connections(base))
                        process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGINT)
            _, talk = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode in ((0, 128 + signal.SIGINT) if hurry else (0,))
    assert "Traceback" not in talk
