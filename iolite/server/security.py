"""Who may ask: every request's Host, Origin and key are looked at before anything else of it.

Host keeps out pages that point a name of their own at this address (DNS rebinding), Origin those of other sites, and
the key everybody who was not given it, on this machine too. A browser gets the key as a link, and keeps what is derived
from it in a cookie that no script can read and no other site can use.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import socket
import urllib.parse
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from iolite.server import static_files
from iolite.server.errors import Problem, response_of
from iolite.server.settings import Settings
from iolite.server.static_files import static

_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9_.-]{1,253})(?::[0-9]{1,5})?")
OPEN = frozenset({"/health"})  # what needs no key: it tells nothing
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


class Guard:
    """Lets a request through to the application, or answers it."""

    def __init__(self, app: ASGIApp, settings: Settings, port: int) -> None:
        self.app, self.settings = app, settings
        self.cookie = f"iolite_{port}"  # cookies know no ports, servers do
        self.cookie_value = hmac.new(settings.secret.encode(), b"iolite page", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        problem = self.stranger(headers) or (None if self.preflight(scope, headers) else self.keyless(scope, headers))
        if problem and scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif problem:
            asks = self.is_person(scope, headers, problem)
            found = static("sign-in.html", 401) if asks else response_of(path, problem)
            await found(scope, receive, self._with_headers(send))
        elif scope["type"] == "http" and (token := self.token(scope)) and self.is_key(token):
            response = RedirectResponse("/" + path.lstrip("/"), 303)  # "//name" would be another server
            response.set_cookie(self.cookie, self.cookie_value, httponly=True, samesite="strict")
            await response(scope, receive, self._with_headers(send))
        else:
            await self.app(scope, receive, self._with_headers(send))

    def stranger(self, headers: Headers) -> Problem | None:
        """What is wrong with the headers: with the name by which the server was called, or the page that calls it."""
        if "transfer-encoding" in headers and "content-length" in headers:
            return Problem(400, "two headers tell how long the request is")  # a proxy may believe the other one
        named = headers.getlist("host")
        match = _HOST.fullmatch(named[0].lower()) if len(named) == 1 else None
        if not match or not self.is_own_name(match[1]):
            return Problem(403, "this server does not go by the name in the Host header; see --allow-host")
        for origin in headers.getlist("origin"):
            own = origin.lower() in (f"http://{match[0]}", f"https://{match[0]}")
            if not own and origin not in self.settings.origins:
                return Problem(403, "pages of other origins may not ask this server; see --allow-origin")
        return None

    def is_own_name(self, name: str) -> bool:
        """Addresses that the server listens on, localhost, and what was named. An address in Host is no rebinding:
        that needs a name, which is then in Host."""
        if name in ("localhost", self.settings.host.lower(), *(host.lower() for host in self.settings.hosts)):
            return True
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return not self.settings.is_loopback and name == socket.gethostname().lower()
        return address.is_loopback or not self.settings.is_loopback

    def preflight(self, scope: Scope, headers: Headers) -> bool:
        """A browser's question whether a page of another origin may ask; it never brings a key."""
        asks = scope.get("method") == "OPTIONS" and "access-control-request-method" in headers
        return asks and headers.get("origin") in self.settings.origins

    def is_person(self, scope: Scope, headers: Headers, problem: Problem) -> bool:
        """Whether somebody without a key has gone to the page, who can be asked for it."""
        return problem.status == 401 and scope["path"] == "/" and "text/html" in headers.get("accept", "")

    def keyless(self, scope: Scope, headers: Headers) -> Problem | None:
        if self.settings.open_to_all or scope["path"] in OPEN or scope["path"].startswith(static_files.OPEN):
            return None
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        offered = [bearer.strip() if kind.lower() == "bearer" else "", headers.get("x-api-key", ""), self.token(scope)]
        if any(self.is_key(key) for key in offered if key) or self.has_cookie(headers):
            return None
        return Problem(401, "the key is missing or wrong; send it as `Authorization: Bearer KEY`", "invalid_api_key")

    def is_key(self, offered: str) -> bool:
        return hmac.compare_digest(offered.encode("utf-8", "replace"), self.settings.secret.encode())

    def token(self, scope: Scope) -> str:
        """The key in a link, as `?token=KEY`; only for pages that are gone to, so no key lies in addresses for long."""
        if scope.get("method") != "GET":
            return ""
        try:
            query = urllib.parse.parse_qs(scope.get("query_string", b"").decode("latin-1"), max_num_fields=64)
        except ValueError:  # more fields than any link has
            return ""
        return query.get("token", [""])[-1]

    def has_cookie(self, headers: Headers) -> bool:
        """The browser's cookie, unless it comes from a page of another port of this machine."""
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return False
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return False
        return morsel is not None and hmac.compare_digest(morsel.value.encode(), self.cookie_value.encode())

    def _with_headers(self, send: Send) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        return sending
