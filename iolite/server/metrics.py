"""What is counted for `/metrics`, in Prometheus' text form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from iolite.engine.engine import Stats
from iolite.generate.reply import Reply

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Meters:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "iolite_requests", "Requests by route and status", ["route", "status"], registry=self.registry
        )
        self.answers = Counter(
            "iolite_answers", "Complete answers by the reason they ended for", ["finish_reason"], registry=self.registry
        )
        self.notices = Counter("iolite_notices", "Answers that were not what they seem", registry=self.registry)
        self.tokens = Counter("iolite_tokens", "Tokens by kind", ["kind"], registry=self.registry)
        self.first_token = Histogram(
            "iolite_time_to_first_token_seconds",
            "From the request to its answer's first token, waiting for a slot left out",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.decoding = Counter("iolite_decode_seconds", "Time spent on drawing tokens", registry=self.registry)

    def watch(self, stats: Callable[[], Stats]) -> None:
        """Shows what an engine is doing."""
        for name, what, value in (
            ("iolite_running_answers", "Answers that are drawn now", lambda: stats().running),
            ("iolite_waiting_answers", "Answers that wait for a slot", lambda: stats().waiting),
            ("iolite_cache_bytes", "Keys and values that are kept", lambda: stats().cache_bytes),
        ):
            Gauge(name, what, registry=self.registry).set_function(value)
        requests = Gauge(
            "iolite_engine_requests", "Answers begun, and how they ended", ["state"], registry=self.registry
        )
        for state in ("submitted", "finished", "cancelled", "failed"):
            requests.labels(state).set_function(partial(_counter, stats, state))

    def count(self, reply: Reply) -> None:
        """One complete answer."""
        usage = reply.usage
        self.answers.labels(reply.finish_reason).inc()
        self.notices.inc(reply.notice is not None)
        self.tokens.labels("cached").inc(usage.cached_tokens)
        self.tokens.labels("prompt").inc(usage.prompt_tokens - usage.cached_tokens)
        self.tokens.labels("drawn").inc(usage.completion_tokens)
        self.tokens.labels("reasoning").inc(usage.reasoning_tokens)
        self.first_token.observe(reply.timings.time_to_first_token)
        self.decoding.inc(reply.timings.decode_seconds)

    def page(self) -> bytes:
        return generate_latest(self.registry)


def _counter(stats: Callable[[], Stats], name: str) -> float:
    return float(getattr(stats(), name))


class Counting:
    """Counts requests by route and status, those too that the guards refuse."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self.app, self.meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self.meters.requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, sending)
