"""Drafting through the public interface: `load(drafter=)`, `drafts=`, and what a reply tells of it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from support.folder import random_folder

import iolite
from iolite.checkpoint.drafter import write_folder
from iolite.checkpoint.gguf_drafter import DrafterSource, drafter_shapes
from iolite.checkpoint.source import open_source
from iolite.config import FULL, SLIDING
from iolite.errors import DownloadError, UsageError
from iolite.text.tokenizer import Tokenizer

QUESTION = "what number do you see in the red square and what number in the blue square please"


def write_random(folder, model, width=None):
    text = open_source(str(model)).config.text
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "layer_types": (SLIDING, FULL)}
    small, width, rng = dataclasses.replace(text, **shape), width or text.hidden_size, torch.Generator().manual_seed(1)
    shapes = drafter_shapes(small, width)
    weights = {name: torch.randn(shape, generator=rng) / max(shape) ** 0.5 for name, shape in shapes.items()}
    source = DrafterSource("random", small, width, lambda: Tokenizer.from_folder(model), shapes, weights.__getitem__)
    write_folder(folder, source)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = random_folder(tmp_path_factory.mktemp("models") / "m")
    write_random(folder / "drafter", folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder):
    return iolite.load(folder)


@pytest.fixture(scope="module", params=["auto", "path", "int8"])
def model(folder, request):
    """With the drafter of its folder, with one that was named, and with both packed."""
    named = "auto" if request.param == "auto" else str(folder / "drafter")
    return iolite.load(folder, drafter=named, quantize="int8" if request.param == "int8" else None)


def test_the_drafter_is_found_and_named(model):
    assert model.speculator.drafter is not None
    assert model.drafting.startswith("the drafter is ")
    assert len(model.speculator.costs.passes) == 9 and model.speculator.costs.draft > 0


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 4, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("drafts", [None, 3, 8])
def test_answers_are_those_without_it(model, folder, plain, drafts, settings):
    without = plain if model.scheme is None else iolite.load(folder, quantize=model.scheme)
    settings = settings | {"max_tokens": 40, "stop_ids": []}
    expected = [piece.id for piece in without.generate(QUESTION, **settings)]
    assert [piece.id for piece in model.generate(QUESTION, **settings, drafts=drafts)] == expected
    assert [piece.id for piece in model.generate(QUESTION, **settings, drafts=0)] == expected


def test_a_reply_tells_how_it_went(model, plain):
    reply = model.chat(QUESTION, max_tokens=30, temperature=0.0, stop_ids=[], drafts=4)
    told = json.loads(reply.to_json())["timings"]["drafting"]
    assert told["tokens"] == reply.usage.completion_tokens - 1 == 29
    assert told["drafted"] >= 4 and 0 <= told["accepted"] < told["drafted"]
    assert told["passes"] + told["accepted"] in (29, 30)  # the last draft may have ended it
    assert told["mean_accepted_length"] == pytest.approx(29 / told["passes"])
    assert told["drafts_per_pass"] == pytest.approx(told["drafted"] / told["passes"])
    assert told["speedup"] > 0 and told["seconds"] > 0
    assert model.chat(QUESTION, max_tokens=3, drafts=0).timings.drafting is None
    assert plain.chat(QUESTION, max_tokens=3).timings.drafting is None


def test_a_stream_may_be_left_among_drafts_and_gone_on_with(folder, plain):
    """What was drafted and accepted but not asked for is not lost, and nothing else is kept."""
    model = iolite.load(folder, drafter="auto", dtype="float32", device="cpu")
    settings = {"max_tokens": 24, "temperature": 0.0, "stop_ids": []}
    expected = [piece.id for piece in plain.generate(QUESTION, **settings)]
    for taken in (1, 2, 5, 9):
        pieces = model.generate(QUESTION, **settings, drafts=8)
        assert [next(pieces).id for _ in range(taken)] == expected[:taken]
        pieces.close()
    before = model.prefixes.counters.reused
    assert [piece.id for piece in model.generate(QUESTION, **settings, drafts=5)] == expected
    assert model.prefixes.counters.reused > before


def test_stop_strings_act_in_the_middle_of_accepted_drafts(model, plain):
    ids = [piece.id for piece in plain.generate(QUESTION, max_tokens=30, temperature=0.0, stop_ids=[])]
    text = plain.tokenizer.decode(ids)
    stop = text[len(text) // 2 : len(text) // 2 + 5]
    expected = plain.chat(QUESTION, max_tokens=30, temperature=0.0, stop_ids=[], stop=stop)
    if model.scheme is None:
        found = model.chat(QUESTION, max_tokens=30, temperature=0.0, stop_ids=[], stop=stop, drafts=8)
        assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
        assert stop not in found.text


def test_without_a_drafter_the_text_itself_is_drafted_from(folder, tmp_path):
    """A model that repeats itself, as random ones do: what it copies is guessed."""
    import shutil

    alone = shutil.copytree(folder, tmp_path / "alone", ignore=shutil.ignore_patterns("drafter"))
    model = iolite.load(alone, drafter="auto")
    assert model.drafting.startswith("no drafter was found in ")
    drafting = model.chat(QUESTION, max_tokens=120, temperature=0.0, stop_ids=[], drafts=8).timings.drafting
    assert drafting.accepted > 30


def test_a_drafter_of_another_width_is_refused_with_both_sizes(folder, tmp_path):
    other = write_random(tmp_path / "other", folder, width=256)
    with pytest.raises(UsageError, match="hidden states of 256, but the model has 192"):
        iolite.load(folder, drafter=str(other))


@pytest.mark.parametrize("name", ["nowhere", "google/gemma-4-12B-it-assistant"])
def test_a_drafter_that_is_not_here(folder, name):
    with pytest.raises(DownloadError, match=name):
        iolite.load(folder, drafter=name)


def test_none_means_none(folder):
    assert iolite.load(folder, drafter="none").speculator is None


@pytest.mark.parametrize("drafts", [-1, 9, True, "4", 2.5])
def test_a_senseless_number_of_drafts(model, drafts):
    with pytest.raises(UsageError, match="drafts is"):
        model.chat("hi", drafts=drafts)


def test_drafts_need_a_drafter(plain):
    with pytest.raises(UsageError, match="without a drafter"):
        plain.chat("hi", drafts=2)
