"""A chat of ten turns with the embedded model: pictures, sound, thoughts and calls of tools, over prefixes in memory
and on the disk. What it reads is counted, and its scores are those of a model that reads everything every time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import iolite
from iolite.generate import graph
from iolite.generate.model import Model
from iolite.generate.reply import Reply
from iolite.prompt import Prompt

RATE = 16_000
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object"}}}]
CALL = "<|tool_call>call:add{a:2,b:3}<tool_call|>"


def picture(seed: int) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 255, (96, 96, 3)).astype(np.uint8)
    return {"type": "image", "image": pixels}


def sound(seed: int) -> dict[str, Any]:
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, RATE // 2).astype(np.float32)
    return {"type": "audio", "audio": {"array": samples, "sampling_rate": RATE}}


def thought(text: str) -> str:
    return f"<|channel>thought\n{text}\n<channel|>"


# What is asked, and what the model is made to say. A tool's result follows an answer that calls it.
TURNS: list[tuple[list[Any] | str, list[str]]] = [
    ("What is this about?", ["a red circle"]),
    ([picture(1), "Which number is this?"], [thought("The number looks like 47.") + "47"]),
    ("And now?", [thought("Again. " * 30) + "the same number"]),
    ([picture(2), "Which number is this?"], ["a blue square"]),
    ([sound(1), "What is said?"], [thought("Three digits.") + "309"]),
    ("Add 2 and 3", [thought("A tool can do that.") + CALL, "It is 5."]),
    ("And again", [CALL, thought("Once more.") + CALL, thought("5, then.") + "It is 5, twice."]),
    ([picture(1), sound(2), "Compare them"], ["They are not alike."]),
    ("Thank you", [thought("They are polite.") + "You are welcome. " * 20]),
    ("What was the first number?", ["47"]),
]


class Scripted:
    """A model that says what it is told to; what it would have scored is noted."""

    def __init__(self, model: Model) -> None:
        self.model, self.scores, self._left = model, [], iter(())
        self._score = type(model.network).logits
        model.network.logits = self._logits

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.scores.append(self._score(self.model.network, hidden)[-1])
        rows = torch.full((1, self.model.config.text.vocab_size), -30.0)
        rows[0, next(self._left)] = 30.0
        return rows

    def say(self, messages: list[dict[str, Any]], text: str) -> Reply:
        self.drawn = self.model.tokenizer.encode(text)
        end = "<|tool_response>" if text.endswith("<tool_call|>") else "<turn|>"
        self._left = iter([*self.drawn, self.model.tokenizer.token_id(end)])
        return self.model.chat(messages, tools=TOOLS, thinking=True, temperature=0.0)


def chat(scripted: Scripted) -> Iterator[tuple[Prompt, Reply, bool]]:
    """The prompt and the reply of each request, and whether it begins a turn."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    for asked, answers in TURNS:
        parts = asked if isinstance(asked, list) else [asked]
        content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
        messages.append({"role": "user", "content": content})
        for number, text in enumerate(answers):
            prompt = scripted.model.prompt(messages, tools=TOOLS, thinking=True)
            reply = scripted.say(messages, text)
            yield prompt, reply, number == 0
            messages.append(reply.message)
            for call in reply.tool_calls:
                messages.append({"role": "tool", "tool_call_id": call.id, "content": "5"})


def told(prompt: Prompt, drawn: list[int] | tuple[int, ...] = ()) -> list[tuple]:
    """All that tells the tokens of a sequence from others."""
    tokens: list[tuple] = [(i,) for i in (*prompt.ids, *drawn)]
    for span in prompt.spans:
        for place in range(span.length):
            tokens[span.start + place] = (span.digest, place)
    return tokens


def common(a: list, b: list) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def cold_scores(**settings: Any) -> list[torch.Tensor]:
    """The scores of all tokens of the chat by a model that keeps nothing."""
    scripted = Scripted(replace(iolite.load("nano", device="cpu", **settings), prefix_bytes=0))
    for _, reply, _ in chat(scripted):
        assert reply.usage.cached_tokens == 0
    return scripted.scores


def farthest(scores: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(scores, others, strict=True))


# Scores of size 10 in float32 are rounded to 6e-7; sums in other orders, through all layers: a hundred of those.
TOLERANCE = 6e-5


@pytest.fixture(scope="module")
def cold() -> list[torch.Tensor]:
    return cold_scores(dtype="float32")


@pytest.mark.parametrize("restarts", [False, True])
def test_each_turn_reads_what_is_new_and_scores_as_a_cold_run(cold, tmp_path, restarts):
    model = iolite.load("nano", dtype="float32", device="cpu")
    notes: list[str] = []
    scripted, seen, begun = Scripted(model), [], 0
    requests = 0
    for prompt, reply, begins in chat(scripted):
        found = common(told(prompt), seen)
        assert reply.usage.cached_tokens == reply.timings.cached_tokens == found
        assert reply.timings.prefilled_tokens == len(prompt.ids) - found
        # Of a turn that is over, what was said in it is rendered anew, without its thoughts; nothing before it is.
        assert found >= begun
        begun = len(prompt.ids) if begins else begun
        seen = told(prompt, scripted.drawn)
        requests += 1
        if restarts:
            if model.prefixes.disk is None:
                model.keep_on_disk(tmp_path / "kept", 100_000_000, notes.append)
            assert model.prefixes.save() == 1
            model.prefixes.clear()
            model.keep_on_disk(tmp_path / "kept", 100_000_000, notes.append)
    assert requests == 13
    assert notes == []
    assert len(model.prefixes) == (0 if restarts else 1)
    worst = farthest(scripted.scores, cold)
    assert worst <= TOLERANCE, worst


def test_steps_of_fixed_shapes_go_on_from_what_was_read(cold, monkeypatch):
    """What a GPU records and plays back, here operator by operator."""
    scripted = Scripted(iolite.load("nano", dtype="float32", device="cpu"))

    def record(work, _device):
        text = scripted.model.config.text
        out = torch.empty(1, text.hidden_size), torch.empty(1, text.vocab_size)
        return lambda: [kept.copy_(new) for kept, new in zip(out, work(), strict=True)], out

    monkeypatch.setattr(graph, "wanted", lambda _device: True)
    monkeypatch.setattr(graph, "capture", record)
    found = sum(reply.usage.cached_tokens for _, reply, _ in chat(scripted))
    assert found > 1000
    worst = farthest(scripted.scores, cold)
    assert worst <= TOLERANCE, worst


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_packed_weights_go_on_from_what_was_read(tmp_path, monkeypatch, kv):
    monkeypatch.setenv("IOLITE_CACHE", str(tmp_path / "packed"))
    scripted = Scripted(iolite.load("nano", device="cpu", quantize="int8", kv=kv))
    found = 0
    for _, reply, _ in chat(scripted):
        found += reply.usage.cached_tokens
        scripted.model.keep_on_disk(tmp_path / "kept", 100_000_000, pytest.fail)
        assert scripted.model.prefixes.save() == 1
        scripted.model.prefixes.clear()
    assert found > 1000
    # Kernels for one token and for many round activations to 8 bits apart: some go the other way. Keys of other tokens
    # would move scores by their own size, 10.
    worst = farthest(scripted.scores, cold_scores(quantize="int8", kv=kv))
    assert worst <= 1.0, worst


def test_answers_of_the_embedded_model_are_those_of_a_cold_run():
    """Greedy text over four turns, beside a model that keeps nothing."""
    warm = iolite.load("nano", dtype="float32", device="cpu")
    cold = replace(iolite.load("nano", dtype="float32", device="cpu"), prefix_bytes=0)
    messages: list[dict[str, Any]] = []
    for asked in ("Hello!", "Which number is this?", "What is said?", "What is 3 + 4?"):
        media = {"Which": [picture(1)], "What is said?": [sound(1)]}.get(asked if "said" in asked else asked[:5], [])
        messages.append({"role": "user", "content": [*media, {"type": "text", "text": asked}]})
        replies = [model.chat(messages, temperature=0.0, max_tokens=40) for model in (warm, cold)]
        assert replies[0].text == replies[1].text
        assert (replies[0].usage.cached_tokens > 0) == (len(messages) > 1)
        messages.append(replies[0].message)
