"""What a server tells of itself, the tokenizer, embeddings; and its OpenAPI document as a source of attacks."""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import replace

import httpx
import numpy as np
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from prometheus_client.parser import text_string_to_metric_families
from support.serving import KEY, asking, serving, wait_for


def test_tokens_there_and_back(http, nano):
    text = "who are you? <turn|>"
    for name in ("text", "content", "prompt"):
        found = http.post("/tokenize", json={name: text}).json()
        assert found["tokens"] == nano.tokenizer.encode(text)
    assert (
        http.post("/tokenize", json={"text": "a", "add_special": True}).json()["tokens"][0]
        == nano.config.text.bos_token_id
    )
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json()["content"] == text
    for wrong in ({}, {"text": 5}, {"text": "\ud800"}):
        assert http.post("/tokenize", content=json.dumps(wrong)).status_code == 400
    assert http.post("/tokenize", json={"text": "a" * 1_000_001}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [-1]}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [10**9]}).json()["content"] == ""


def test_embeddings(server, http):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        texts = ["what number is this?", "what number is it?", "red green blue"]
        found = client.embeddings.create(model="x", input=texts)
        vectors = np.array([item.embedding for item in found.data])
        floats = client.embeddings.create(model="x", input=texts[0], encoding_format="float")
    assert vectors.shape == (3, 192)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    assert np.array(floats.data[0].embedding) == pytest.approx(vectors[0], abs=1e-6)
    ids = http.post("/tokenize", json={"text": texts[0]}).json()["tokens"]
    same = http.post("/v1/embeddings", json={"input": ids}).json()
    assert same["data"][0]["embedding"] == pytest.approx(vectors[0], abs=1e-6)
    assert "not trained" in same["note"]
    for wrong in ("", [], [""], [10**6], ["<|image|>"], "word " * 5000, [[]], [1.5]):
        assert http.post("/v1/embeddings", json={"input": wrong}).status_code == 400, wrong
    assert http.post("/v1/embeddings", json={"input": "a", "dimensions": 3}).status_code == 400


def test_embeddings_are_means_of_hidden_states(nano):
    import torch

    from iolite.cache import KVCache
    from iolite.model.prefill import prefill
    from iolite.prompt import Prompt
    from iolite.server.embeddings import embed

    prompt = Prompt([nano.config.text.bos_token_id, *nano.tokenizer.encode("what number is this? " * 40)], "")
    hidden = torch.cat(
        list(prefill(nano.network, prompt, KVCache(nano.config.text, len(prompt.ids)), chunk_size=10_000))
    )
    mean = hidden[1:].mean(0)
    assert embed(nano, prompt) == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_a_client_that_goes_away_ends_its_embeddings(server, monkeypatch):
    gate, begun = threading.Event(), []

    def embed(model, prompt):
        begun.append(prompt)
        assert gate.wait(60)
        return np.zeros(192, np.float32)

    monkeypatch.setattr("iolite.server.embeddings.embed", embed)
    answers = server.app.state.service.answers
    with contextlib.suppress(httpx.ReadTimeout):
        asked = {"input": ["a"] * 50}
        httpx.post(f"{server.url}/v1/embeddings", json=asked, headers={"x-api-key": KEY}, timeout=0.5)
    wait_for(lambda: answers._places == 0)
    gate.set()
    monkeypatch.undo()
    with asking(server) as http:  # behind what was begun
        assert http.post("/v1/embeddings", json={"input": "a"}).status_code == 200
    assert len(begun) <= 1


def test_embeddings_take_places(nano, monkeypatch):
    with serving(nano, slots=1, waiting=0) as listener, asking(listener) as http:
        monkeypatch.setattr(listener.app.state.service.answers, "_places", 1)
        assert http.post("/v1/embeddings", json={"input": "a"}).status_code == 429


def test_metrics(http):
    http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "who are you?"}]})
    found = http.get("/metrics")
    page = found.text
    assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert families["iolite_tokens"].type == "counter"
    assert families["iolite_time_to_first_token_seconds"].type == "histogram"
    for line in (
        'iolite_tokens_total{kind="drawn"}',
        "iolite_running_answers 0.0",
        'iolite_engine_requests{state="failed"} 0.0',
        "iolite_time_to_first_token_seconds_count",
    ):
        assert line in page


def test_the_manual(http, server):
    page = http.get("/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert all(path in page.text for path in server.app.openapi()["paths"])
    assert "<script" not in page.text and "//" not in page.text.replace("<!doctype", "")


@pytest.fixture(scope="module")
def short(nano):
    """A server whose answers cannot be long."""
    with serving(replace(nano, context=100)) as listener:
        yield listener


def test_no_request_that_the_document_allows_makes_the_server_fail(short):
    """Schemathesis makes requests of the OpenAPI document, right and wrong ones."""
    schema = schemathesis.openapi.from_dict(short.app.openapi())
    schema.config.update(base_url=short.url)
    asked = set()
    for operation in schema.get_all_operations():
        each = operation.ok()

        @settings(max_examples=12, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=each.as_strategy())
        def check(case):
            response = case.call(headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
            asked.add((case.method, case.path))
            assert response.status_code < 500, (case.body, response.text)

        check()
    assert len(asked) > 15
