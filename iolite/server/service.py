"""What every route works with."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.requests import Request

from iolite.generate.model import Model
from iolite.server.answers import Answers
from iolite.server.metrics import Meters
from iolite.server.recordings import Recordings
from iolite.server.responses_kept import Responses
from iolite.server.settings import Settings


@dataclass(frozen=True)
class Service:
    """One model that is served. `name` is what the interfaces call it, whatever a request says."""

    model: Model
    settings: Settings
    answers: Answers
    meters: Meters
    name: str
    responses: Responses = field(default_factory=Responses)
    recordings: Recordings = field(default_factory=Recordings)
    started: int = field(default_factory=lambda: int(time.time()))  # Unix time


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
