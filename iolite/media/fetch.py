"""The bytes of a piece of media: from a path, a file:// or data: URI, bytes, or (where allowed) http(s)."""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import os
import socket
import ssl
import stat
import time
import urllib.parse
import urllib.request
from pathlib import Path

from iolite.errors import MediaError
from iolite.media.limits import DEFAULT_LIMITS, Limits
from iolite.media.worker import NOUNS

Source = str | os.PathLike[str] | bytes | bytearray | memoryview

_CONNECT_SECONDS = 10.0
_FETCH_SECONDS = 60.0  # for the whole answer
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 addresses in IPv6 clothes


def label_of(source: object, kind: str) -> str:
    """How errors call it: "the picture 'cat.png'", or just "the picture" when it came without a name."""
    noun = NOUNS[kind]
    if isinstance(source, os.PathLike) or (isinstance(source, str) and source[:5].lower() != "data:"):
        return f"the {noun} {os.fspath(source)[:200]!r}"
    return f"the {noun}"


def read_source(
    source: Source,
    *,
    kind: str,
    limits: Limits = DEFAULT_LIMITS,
    media_root: Path | None = None,
    allow_urls: bool = False,
) -> bytes:
    """The bytes behind `source`, at most `limits.max_bytes` of them; MediaError when there are none to be had.

    kind: one of `worker.NOUNS`, for the error's words.
    media_root: when given, files outside this folder (links followed) are refused.
    allow_urls: whether http(s) URLs are fetched. They are refused otherwise: a URL from a stranger can name a service
        of the network that this machine stands in. When allowed, still only public addresses are, without redirects.
    """
    if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        raise MediaError(
            f"{type(source).__name__} is nothing that a {NOUNS[kind]} can be read from",
            "give a path, a data: URI, bytes, a NumPy array or, for a picture, a PIL image",
        )
    label = label_of(source, kind)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, os.PathLike):
        data = _read_file(Path(source), label, limits, media_root)
    else:
        scheme = source[: source.find(":")].lower() if ":" in source else ""
        if scheme == "data":
            data = _read_data_uri(source, label, limits)
        elif scheme in ("http", "https"):
            data = _read_url(source, label, limits, allow_urls)
        elif scheme == "file":
            data = _read_file(_file_uri(source, label), label, limits, media_root)
        else:
            data = _read_file(Path(os.path.expanduser(source)), label, limits, media_root)
    if not data:
        raise MediaError(f"{label} is empty: 0 bytes")
    _check_size(len(data), label, limits)
    return data


def _check_size(size: int, label: str, limits: Limits) -> None:
    if size > limits.max_bytes:
        raise MediaError(f"{label} has {size:,} bytes; the limit is {limits.max_bytes:,}", "give a smaller file")


def _read_file(path: Path, label: str, limits: Limits, media_root: Path | None) -> bytes:
    if "\0" in str(path):
        raise MediaError(f"{label} is not the name of a file")
    if media_root is not None:
        root = media_root.resolve()
        path = (root / path).resolve()
        if not path.is_relative_to(root):
            raise MediaError(f"{label} lies outside the media folder", "give a path below the media folder")
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise MediaError(f"{label} is not a file")
            _check_size(status.st_size, label, limits)
            return file.read(limits.max_bytes + 1)
    except FileNotFoundError:
        raise MediaError(f"{label} is not there", "check the path") from None
    except OSError as error:
        raise MediaError(f"{label} cannot be opened: {os.strerror(error.errno or 0)}") from None


def _file_uri(uri: str, label: str) -> Path:
    parts = urllib.parse.urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"{label} names another machine", "file:// URIs are for files of this machine")
    return Path(urllib.request.url2pathname(parts.path))


def _read_data_uri(uri: str, label: str, limits: Limits) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma:
        raise MediaError(f"{label} is not a whole data: URI: it has no comma")
    if not head.lower().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    _check_size(len(body) * 3 // 4 - 2, label, limits)
    body = "".join(urllib.parse.unquote(body).split())
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except binascii.Error:
        raise MediaError(f"{label} is a data: URI whose base64 is damaged") from None


def _read_url(url: str, label: str, limits: Limits, allow_urls: bool) -> bytes:
    if not allow_urls:
        raise MediaError(f"{label} is a URL, and URLs are not fetched", "download it first, and give the file")
    parts, port = _split_url(url, label)
    address = _public_address(parts.hostname or "", port, label)
    deadline = time.monotonic() + _FETCH_SECONDS
    connection = _PinnedConnection(parts.hostname or "", port, address, secure=parts.scheme == "https")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.request("GET", target, headers={"User-Agent": "iolite", "Accept-Encoding": "identity"})
        response = connection.getresponse()
        if response.status != 200:
            hint = "give the address that it leads to" if 300 <= response.status < 400 else None
            raise MediaError(f"{label} was not fetched: the server answered {response.status}", hint)
        _check_size(response.length or 0, label, limits)
        data = bytearray()
        while piece := response.read1(1 << 16):
            data += piece
            _check_size(len(data), label, limits)
            if time.monotonic() > deadline:
                raise MediaError(f"{label} was not fetched within {_FETCH_SECONDS:.0f} s")
        return bytes(data)
    except (OSError, http.client.HTTPException):
        raise MediaError(f"{label} could not be fetched: no connection, or one that broke") from None
    finally:
        connection.close()


def _split_url(url: str, label: str) -> tuple[urllib.parse.SplitResult, int]:
    """One parse, used for the check and for the request alike; all that two parsers could differ on is refused."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        parts, port = urllib.parse.SplitResult("", "", "", "", ""), 0
    odd = not url.isascii() or not url.isprintable() or any(c in url for c in ' \\"<>') or "@" in parts.netloc
    if odd or not parts.hostname or "%" in parts.netloc:
        raise MediaError(f"{label} is not a plain URL", "no spaces, backslashes, user names or raw non-ASCII letters")
    return parts, port


def _public_address(host: str, port: int, label: str) -> str:
    """The first address of `host`; all of its addresses must be public ones."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        raise MediaError(f"{label} could not be fetched: its host is not known") from None
    for address in found:
        parsed = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(parsed, ipaddress.IPv6Address):
            nat64 = ipaddress.IPv4Address(parsed.packed[-4:]) if parsed in _NAT64 else None
            teredo = parsed.teredo[1] if parsed.teredo else None
            parsed = parsed.ipv4_mapped or parsed.sixtofour or teredo or nat64 or parsed
        if not parsed.is_global or parsed.is_multicast:
            raise MediaError(f"{label} names a machine of a private network", "only public addresses are fetched")
    return found[0]


class _PinnedConnection(http.client.HTTPConnection):
    """A connection to the address that was checked, whatever the name says by now."""

    def __init__(self, host: str, port: int, address: str, *, secure: bool) -> None:
        super().__init__(host, port, timeout=_CONNECT_SECONDS)
        self.default_port = 443 if secure else 80  # left out of the Host header
        self._address = address
        self._secure = secure

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
