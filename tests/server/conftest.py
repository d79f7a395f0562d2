"""Servers of the embedded model, and of one with random weights that says what it is told to."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from support.serving import Script, asking, serving

from iolite.server.listen import Listener


@pytest.fixture(scope="session")
def nano():
    import iolite

    return iolite.load("nano")


@pytest.fixture(scope="session")
def server(nano) -> Iterator[Listener]:
    """The embedded model."""
    with serving(nano) as listener:
        yield listener


@pytest.fixture(scope="session")
def http(server) -> Iterator[httpx.Client]:
    with asking(server) as client:
        yield client


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """The embedded model's sizes with random weights."""
    from support.folder import random_folder

    import iolite

    return iolite.load(random_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture
def script(random_model, monkeypatch) -> Script:
    """Makes the model with random weights say what the test wants."""
    script = Script(random_model)
    monkeypatch.setattr(random_model.network, "logits", script.logits)
    return script


@pytest.fixture
def scripted(script) -> Iterator[Listener]:
    """A server of that model."""
    with serving(script.model) as listener:
        yield listener
        script.gate.set()
