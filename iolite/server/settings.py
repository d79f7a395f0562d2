"""How a server listens and what it lets in. Checked when made: a senseless or unsafe setting is a UsageError."""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from iolite.errors import UsageError

DEFAULT_PORT = 8640  # none of the ports that other engines use
LEAST_KEY = 16  # characters of a key that a network is kept out by
MOST_CHOICES = 8  # answers to one request


@dataclass(frozen=True)
class Settings:
    """All sizes in bytes, all times in seconds.

    key: what every request must bring; drawn anew when not given, which is for loopback addresses only, as is
    open_to_all: no key at all. hosts and origins: further names of this server in Host, and pages of other
    origins that may ask it (CORS). media_path: the folder whose files requests may name; without it they name none.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    key: str | None = None
    open_to_all: bool = False
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    allow_urls: bool = False
    media_path: Path | None = None
    slots: int = 4  # answers drawn at once
    waiting: int = 64  # answers that may wait for a slot
    max_tokens: int = 8192  # of an answer whose request names no limit
    thinking: bool = False  # of an answer whose request says nothing about it
    max_body: int = 64 * 2**20  # of a JSON request, media in base64 included
    max_upload: int = 256 * 2**20  # of a recording to be transcribed
    max_media: int = 64  # pictures, recordings and videos of one request
    ping: float = 10.0  # a stream that has nothing to say says so this often
    chats: Path | None = None  # the file of the page's chats; without it they end with the server
    grace: float = 10.0  # that answers get to end when the server is to stop
    secret: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise UsageError(f"port {self.port} is not a port", "give 1 to 65535, or 0 for any that is free")
        if self.slots < 1 or self.waiting < 0:
            raise UsageError("a server needs at least one slot, and room for 0 or more that wait")
        if self.key is not None and (not self.key.isascii() or not self.key.isprintable() or not self.key.strip()):
            raise UsageError("the key must be plain ASCII characters", "leave it out, and one is made")
        if self.open_to_all and (self.key or not self.is_loopback):
            raise UsageError("only a loopback address can do without a key", "leave --no-key out")
        if not self.is_loopback and len(self.key or "") < LEAST_KEY:
            raise UsageError(
                f"{self.host} can be reached from other machines, and needs a key of at least {LEAST_KEY} characters",
                "set IOLITE_API_KEY or give --api-key, or listen on 127.0.0.1",
            )
        for origin in self.origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise UsageError(f"{origin!r} is not an origin", "an origin is like https://chat.example.org")
        if self.media_path is not None and not self.media_path.is_dir():
            raise UsageError(f"the media folder {self.media_path} is not there", "give a folder that is")
        object.__setattr__(self, "secret", self.key or secrets.token_urlsafe(32))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
