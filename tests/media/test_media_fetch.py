"""Where bytes may come from: paths, file:// and data: URIs; and URLs, with everything that can be wrong with them."""

from __future__ import annotations

import base64
import http.server
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from iolite.errors import MediaError
from iolite.media import fetch
from iolite.media.fetch import read_source
from iolite.media.limits import Limits


def test_paths_and_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a b.bin"
    path.write_bytes(b"12345")
    monkeypatch.setenv("HOME", str(tmp_path))
    home = ["~/a b.bin"] if os.name == "posix" else []
    for source in (path, str(path), path.as_uri(), "data:,12345", "data:text/plain;base64,MTIzNDU=", b"12345", *home):
        assert read_source(source, kind="image") == b"12345"
    for loose in ("data:;base64,MTIzNDU", "data:;base64,MTIz\nNDU=", "DATA:;BASE64,MTIzNDU%3D"):
        assert read_source(loose, kind="image") == b"12345"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data:image/png;base64,****", "base64 is damaged"),
        ("data:image/png;base64", "no comma"),
        ("data:,", "is empty"),
        ("file://example.org/x.png", "names another machine"),
        ("no/such/file.png", "is not there"),
        ("bad\0name", "not the name of a file"),
        (os.sep, "is not a file|cannot be opened"),
        (b"", "is empty"),
    ],
)
def test_bad_sources(source: str | bytes, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        read_source(source, kind="image")


def test_size_is_checked_first(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(10**12)  # a terabyte of holes
    with pytest.raises(MediaError, match=r"1,000,000,000,000 bytes; the limit is 268,435,456"):
        read_source(path, kind="video")
    uri = "data:;base64," + base64.b64encode(bytes(100)).decode()
    for source in (uri, bytes(100)):
        with pytest.raises(MediaError, match="the limit is 50"):
            read_source(source, kind="video", limits=Limits(max_bytes=50))
        assert len(read_source(source, kind="video", limits=Limits(max_bytes=100))) == 100


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(MediaError, match="is not a file"):
            read_source(path, kind="audio")


def test_nothing_outside_the_media_folder(tmp_path: Path) -> None:
    root, secret = tmp_path / "media", tmp_path / "secret.png"
    root.mkdir()
    (root / "inside.png").write_bytes(b"fine")
    secret.write_bytes(b"secret")
    (tmp_path / "media-beside").mkdir()
    (tmp_path / "media-beside" / "x.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(secret)
    for source in ("inside.png", str(root / "inside.png"), (root / "inside.png").as_uri(), "./inside.png"):
        assert read_source(source, kind="image", media_root=root) == b"fine"
    for source in ("../secret.png", str(secret), secret.as_uri(), "link.png", "../media-beside/x.png", "/etc/passwd"):
        with pytest.raises(MediaError, match="outside the media folder"):
            read_source(source, kind="image", media_root=root)


# ----------------------------------------------------------------------------------------------------- URLs


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/")
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(bytes(10_000))
        else:
            body = f"{self.path} of {self.headers['Host']}".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of this machine under a public name, the check of its address aside."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(fetch, "_public_address", lambda host, port, label: "127.0.0.1")
        yield f"http://media.example:{server.server_address[1]}"
        server.shutdown()


def test_urls_are_refused_by_default(site: str) -> None:
    for url in (f"{site}/a.png", "HTTPS://example.org/a.png"):
        with pytest.raises(MediaError, match="URLs are not fetched"):
            read_source(url, kind="image")


def test_urls_where_allowed(site: str) -> None:
    got = read_source(f"{site}/a.png?size=1", kind="image", allow_urls=True)
    assert got == f"/a.png?size=1 of {site.removeprefix('http://')}".encode()


def test_redirects_are_not_followed(site: str) -> None:
    with pytest.raises(MediaError, match="the server answered 302"):
        read_source(f"{site}/away", kind="image", allow_urls=True)


def test_answers_are_limited(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MediaError, match="the limit is 5,000"):
        read_source(f"{site}/endless", kind="image", allow_urls=True, limits=Limits(max_bytes=5000))
    with pytest.raises(MediaError, match="the limit is 5"):
        read_source(f"{site}/long", kind="image", allow_urls=True, limits=Limits(max_bytes=5))
    monkeypatch.setattr(fetch, "_FETCH_SECONDS", -1.0)
    with pytest.raises(MediaError, match="not fetched within"):
        read_source(f"{site}/slow", kind="image", allow_urls=True)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.0.0.1",
            "192.168.1.1",
            "172.16.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("::1", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "255.255.255.255"),
    ],
)
def test_private_addresses(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Whatever a name leads to is checked, and one private address among public ones is enough."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 80)) for a in ("93.184.216.34", address)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    with pytest.raises(MediaError, match="private network"):
        read_source("http://example.org/a.png", kind="image", allow_urls=True)


def test_public_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    assert fetch._public_address("example.org", 80, "the picture") == "93.184.216.34"


@pytest.mark.parametrize(
    "url",
    [
        *("http://", "http:///a.png", "http://user:password@example.org/", "http://127.0.0.1\\@example.org/"),
        *("http://example.org:99999/", "http://exa mple.org/", "http://example.org/\r\nHost: other", "http://[::1/"),
        *("http://ex%61mple.org/", "http://exämple.org/"),
    ],
)
def test_urls_that_parsers_could_disagree_on(url: str) -> None:
    with pytest.raises(MediaError, match="not a plain URL"):
        read_source(url, kind="image", allow_urls=True)


@pytest.mark.parametrize("url", ["http://127.0.0.1/", "http://2130706433/", "http://0x7f.1/", "http://[::1]:80/a"])
def test_spellings_of_this_machine(url: str) -> None:
    with pytest.raises(MediaError, match=r"private network|host is not known"):
        read_source(url, kind="image", allow_urls=True)
