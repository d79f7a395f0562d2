"""A model with random weights that says what it is told to, behind the real commands."""

from __future__ import annotations

import io
import sys
import wave

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """The folder of the embedded model's sizes with random weights."""
    from support.folder import random_folder

    return random_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a picture and a recording of 1.2 s, as the working directory."""
    Image.new("RGB", (144, 48), "red").save(tmp_path / "a.png")
    with wave.open(str(tmp_path / "talk.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.random.default_rng(0).integers(-9000, 9000, 19_200).astype("<i2").tobytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def piped(monkeypatch):
    """Puts bytes on stdin."""

    def use(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    use(b"")
    return use


@pytest.fixture
def says(random_model, monkeypatch, piped):
    """Makes the model say a text again and again, and notes the prompts it is given."""
    import torch

    import iolite
    from iolite.cli import options

    model = iolite.load(random_model)
    prompts = []
    state = {"next": 0}

    def use(text: str, end: str = "<turn|>") -> list:
        ids = [*model.tokenizer.encode(text), model.tokenizer.token_id(end)]

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            rows = torch.full((hidden.shape[0], model.config.text.vocab_size), -30.0)
            rows[-1, ids[state["next"] % len(ids)]] = 30.0
            state["next"] += 1
            return rows

        monkeypatch.setattr(model.network, "logits", logits)
        return prompts

    build = type(model).prompt

    def noted(self, *args, **kwargs):
        state["next"] = 0
        prompts.append(build(self, *args, **kwargs))
        return prompts[-1]

    monkeypatch.setattr(type(model), "prompt", noted)
    monkeypatch.setattr(options, "load_model", lambda name, threads, **settings: model)
    return use
