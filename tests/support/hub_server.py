"""A model hub on 127.0.0.1, as small as huggingface_hub allows, that can fail in the ways a real one does."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789" * 4
_SMALL = 20_000  # files above this are "large", with their SHA-256 as name


@dataclass
class Hub:
    """What the server holds, how it is to fail, and what it was asked."""

    name: str
    files: dict[str, bytes]
    claimed_sizes: dict[str, int] = field(default_factory=dict)
    claimed_hashes: dict[str, str] = field(default_factory=dict)
    hide: bool = False  # the model is private or missing
    gated: bool = False  # its files need accepted terms
    status: int = 0  # answer everything with this
    cut_after: int | None = None  # close the connection after so many bytes of a large file, once
    stall_after: int | None = None  # or send no more, until `released`
    released: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def downloads(self, name: str) -> list[str]:
        """The Range header ("" for none) of each GET of a file."""
        return [
            headers.get("range", "")
            for method, path, headers in self.requests
            if method == "GET" and path.endswith(f"/{name}")
        ]

    def is_large(self, name: str) -> bool:
        return len(self.files[name]) > _SMALL

    def etag(self, name: str) -> str:
        data = self.files[name]
        if self.is_large(name):
            return self.claimed_hashes.get(name, hashlib.sha256(data).hexdigest())
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def tree(self) -> list[dict[str, object]]:
        rows = []
        for name, data in self.files.items():
            size = self.claimed_sizes.get(name, len(data))
            row: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": "0" * 40}
            if self.is_large(name):
                row["lfs"] = {"oid": self.etag(name), "size": size, "pointerSize": 134}
            else:
                row["oid"] = self.etag(name)
            rows.append(row)
        return rows


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        headers = {key.lower(): value for key, value in self.headers.items()}
        hub.requests.append((self.command, path, headers))
        if hub.status:
            return self.answer(hub.status, b"{}")
        if path.lower() in (f"/api/models/{hub.name}".lower(), f"/api/models/{hub.name}/revision/main".lower()):
            if hub.hide:
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return self.answer(200, json.dumps({"id": hub.name, "sha": COMMIT, "siblings": []}).encode())
        if path == f"/api/models/{hub.name}/tree/{COMMIT}":
            return self.answer(200, json.dumps(hub.tree()).encode())
        found = re.fullmatch(rf"/{re.escape(hub.name)}/resolve/{COMMIT}/(.+)", path)
        if found and found[1] in hub.files:
            if hub.gated:
                return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
            return self.send_file(found[1])
        self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (
            {"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_file(self, name: str) -> None:
        hub, data = self.hub, self.hub.files[name]
        begin = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            begin = int(asked[1])
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hub.etag(name)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command != "GET":
            return
        if not hub.is_large(name):
            self.wfile.write(data[begin:])
            return
        stop, self.hub.cut_after = hub.cut_after, None
        if hub.stall_after is not None:
            self.wfile.write(data[begin : hub.stall_after])
            self.wfile.flush()
            hub.stall_after = None
            hub.stalled.set()
            hub.released.wait(240)
            self.close_connection = True
            return
        self.wfile.write(data[begin:stop])
        if stop is not None:
            self.close_connection = True


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Runs the hub while the body does; `hub.url` is for HF_ENDPOINT."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
