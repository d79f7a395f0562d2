"""Chains of drafts over whole dialogues: what they see, what they score, what they cost, and how far they get."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from support.compare import assert_near, sample_for
from support.drafting import drafts
from support.oracle import Audio, Image, Piece, Text
from support.tiny import randomise
from torch import Tensor

from iolite.cache import KVCache
from iolite.checkpoint.drafter import check_pair
from iolite.config import FULL, SLIDING
from iolite.kernels import ops
from iolite.model.batch import Media, RaggedBatch, Segment
from iolite.model.drafter import CachedView, Drafter
from iolite.model.prefill import prefill
from iolite.model.unified import Unified
from iolite.quant.linear import quantize_
from iolite.train.drafter.chains import chains, kept_drafts, unroll
from iolite.train.drafter.loss import FLOOR, chain_loss, step_weights
from iolite.train.drafter.measure import Rounds, acceptance, count_rounds, measure, portions
from iolite.train.drafter.reading import Dialogue, read
from iolite.train.drafter.trainer import Shape, new_drafter, shaped_config

Load = Callable[[str], Unified]

PIECES: tuple[tuple[Piece, ...], ...] = ((Text(3),), (Text(40),), (Text(9), Image(4, 3), Audio(9), Text(2)))


def random_drafter(model: Unified, layers: int = 3, hidden: int = 40) -> Drafter:
    """Every weight far from where a fresh one begins."""
    drafter = Drafter(shaped_config(model.config, Shape(layers, hidden, 56)), model.config.text.hidden_size)
    randomise(drafter, seed=11)
    return drafter


def dialogues(name: str, replies: Sequence[int] = (9, 5, 12), seed: int = 0) -> list[Dialogue]:
    """Prompts shorter and longer than the window and with media, and random replies."""
    rng = np.random.default_rng(seed)
    samples = [sample_for(name, *pieces, seed=seed + i) for i, pieces in enumerate(PIECES)]
    return [
        Dialogue(sample.prompt(), tuple(rng.integers(20, 96, length).tolist()))
        for sample, length in zip(samples, replies, strict=True)
    ]


@torch.inference_mode()
def by_cache(model: Unified, drafter: Drafter, dialogue: Dialogue, steps: int) -> list[Tensor]:
    """Of every token of the reply but the last the scores of the steps that have a token to guess, with a real cache
    that ends before it."""
    cache, found = KVCache(model.config.text), []
    state = torch.cat(list(prefill(model, dialogue.prompt, cache)))[-1:]
    for at, token in enumerate(dialogue.reply[:-1]):
        view, hidden, rows = CachedView(model, [cache]), state, []
        for taken in dialogue.reply[at:-1][:steps]:
            scores, hidden = drafter(model.language_model.embed(torch.tensor([taken])), hidden, view)
            rows.append(scores)
        found.append(torch.cat(rows))
        batch = RaggedBatch(model.config.text, [Segment(cache, 1)], Media(), torch.device("cpu"))
        state = model(torch.tensor([token]), batch)
    return found


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["published", "narrow", "own-values", "full-first"])
def test_a_chain_sees_what_it_would_see_in_a_cache(name: str, steps: int, load_tiny: Load) -> None:
    """Windows of 8 to 24, shared and separate keys and values, media, several dialogues in one pass."""
    model, some = load_tiny(name), dialogues(name)
    drafter = random_drafter(model)
    reading = read(model, some)
    found = chains(reading, steps)
    with torch.no_grad():
        scores = torch.stack(list(unroll(drafter, model, reading, found)), 1)  # [n, steps, V]
    expected = [rows for dialogue in some for rows in by_cache(model, drafter, dialogue, steps)]
    assert len(scores) == len(expected)
    for own, real, rows in zip(scores, found.real.T, expected, strict=True):
        assert int(real.sum()) == len(rows)
        assert_near(own[real], rows)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_packed_model_is_read_as_it_is(scheme: str, load_tiny: Load) -> None:
    """By the reference: kernels round activations to int8, and a sum in another order can fall to the other side."""
    model, some = copy.deepcopy(load_tiny("published")), dialogues("published")
    quantize_(model, scheme)
    drafter = random_drafter(model)
    with ops.only_reference():
        reading = read(model, some)
        found = chains(reading, 3)
        scores = torch.stack(list(unroll(drafter, model, reading, found)), 1)
        expected = [rows for dialogue in some for rows in by_cache(model, drafter, dialogue, 3)]
    assert_near(scores.detach()[found.real.T], torch.cat(expected))
    scores = torch.stack(list(unroll(drafter, model, read(model, some), found)), 1)  # with kernels
    assert (scores.detach()[found.real.T] - torch.cat(expected)).square().mean().sqrt() < 0.1
    scores.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in drafter.parameters())


def test_a_reading_is_what_generation_computes(load_tiny: Load) -> None:
    model, some = load_tiny("published"), dialogues("published")
    reading = read(model, some)
    for dialogue, start in zip(some, reading.starts, strict=True):
        whole = dataclasses.replace(dialogue.prompt, ids=[*dialogue.prompt.ids, *dialogue.reply])
        alone = torch.cat(list(prefill(model, whole, KVCache(model.config.text))))
        assert_near(reading.hidden[start : start + dialogue.length], alone)
        assert reading.ids[start : start + dialogue.length].tolist() == whole.ids


def test_gradients_go_through_all_steps_and_not_into_the_model(load_tiny: Load) -> None:
    """The last step alone asks: what is projected back reaches it only by way of the steps before."""
    model = copy.deepcopy(load_tiny("published")).requires_grad_(True)
    drafter = random_drafter(model)
    reading = read(model, dialogues("published"))
    found = chains(reading, 4)
    *_, last = unroll(drafter, model, reading, found)
    last[found.real[-1]].logsumexp(-1).sum().backward()
    for name, parameter in drafter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in model.parameters())

    drafter.zero_grad()
    first = next(unroll(drafter, model, reading, found))
    first.logsumexp(-1).sum().backward()
    assert drafter.post_projection.weight.grad is None


def test_chains_start_at_replies_only_and_end_with_them(load_tiny: Load) -> None:
    some = [*dialogues("published"), Dialogue(sample_for("published", Text(5)).prompt(), (30,))]
    reading = read(load_tiny("published"), some)
    found = chains(reading, 4)
    assert found.owners.bincount().tolist() == [8, 4, 11]  # a reply of one token has none
    truth = found.truth(reading)
    for n in range(len(found.newest)):
        dialogue = some[found.owners[n]]
        at = int(found.positions[n]) - len(dialogue.prompt.ids)
        assert reading.ids[found.newest[n]] == dialogue.reply[at]
        expected = dialogue.reply[at + 1 :][:4]
        assert truth[:, n][found.real[:, n]].tolist() == list(expected)

    rng = torch.Generator().manual_seed(0)
    fewer = chains(reading, 4, 7, rng)
    assert len(fewer.newest) == 7
    assert fewer.newest.tolist() == sorted(set(fewer.newest.tolist()) & set(found.newest.tolist()))
    scores = torch.stack(list(unroll(random_drafter(load_tiny("published")), load_tiny("published"), reading, fewer)))
    assert scores.isfinite().all()


def test_the_weight_of_a_step_is_what_hangs_on_it() -> None:
    """The gradient of the expected number of accepted drafts, which torch finds from its definition."""
    chances = torch.tensor([[0.9, 0.5, 0.3], [0.8, 0.6, 0.9], [0.7, 0.9, 0.2]], requires_grad=True)
    real = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    (chances * real).cumprod(0).sum().backward()
    assert chances.grad is not None
    torch.testing.assert_close(step_weights(chances, real), chances.grad.clamp(min=FLOOR) * real)
    assert step_weights(torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)).tolist() == [
        [1.0],
        [pytest.approx(FLOOR)],
    ]


def test_the_loss_is_least_where_the_drafter_says_what_the_model_says() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 10, generator=rng)
    wanted, truth, real = logits.softmax(-1), logits.argmax(-1), torch.ones(3, 4, dtype=torch.bool)
    scores = logits.clone().requires_grad_(True)
    same = chain_loss(scores, wanted, truth, real)
    same.total.backward()
    assert scores.grad is not None and scores.grad.abs().max() < 1e-6
    assert same.accepted == 3
    other = chain_loss(torch.randn(3, 4, 10, generator=rng), wanted, truth, real)
    assert other.total > same.total
    assert other.accepted < 3
    hard = chain_loss(logits * 50, wanted, truth, real, soft=False)  # sure of itself, and right
    assert hard.total < 0.01 < chain_loss(logits * 50, wanted, truth, real).total


def test_kept_drafts_are_those_before_the_first_wrong_one() -> None:
    truth = torch.tensor([[1, 1, 1], [2, 2, 2], [3, 3, 3]])
    guesses = torch.tensor([[1, 0, 1], [2, 2, 2], [0, 3, 3]])
    scores = torch.nn.functional.one_hot(guesses, 4).float()
    real = torch.tensor([[True, True, True], [True, True, False], [True, True, False]])
    assert kept_drafts(scores, truth, real).tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("kept", "passes", "accepted"),
    [
        ([], 0, 0),
        ([0], 1, 0),
        ([1], 1, 1),  # the end itself was drafted: the pass gives one token, not two
        ([0, 0, 0], 3, 0),
        ([2, 1, 0], 1, 2),
        ([1, 0, 0, 1], 3, 2),
        ([4, 0, 0, 0, 0, 0], 2, 4),
    ],
)
def test_rounds_of_an_answer(kept: list[int], passes: int, accepted: int) -> None:
    assert Rounds.walk(kept) == Rounds(len(kept), passes, accepted)


def test_figures_of_many_answers() -> None:
    rounds = [Rounds(6, 2, 4), Rounds(1, 1, 0), Rounds(0, 0, 0), Rounds(3, 3, 0)] * 20
    found = acceptance(rounds, 4)
    assert found.mean_length == pytest.approx(10 / 6)
    assert found.drafts_a_pass == pytest.approx(4 / 6)
    assert found.most == pytest.approx(10 / 4)
    assert found.ci95[0] < found.mean_length < found.ci95[1]
    assert acceptance([Rounds(0, 0, 0)], 4).to_dict()["passes"] == 0


def test_portions_hold_everything_once() -> None:
    some = [Dialogue(sample_for("published", Text(length)).prompt(), (1, 2)) for length in (5, 3000, 9, 2000, 5000)]
    found = list(portions(some))
    assert sorted(i for part in found for i in part) == [0, 1, 2, 3, 4]
    assert all(len(part) == 1 or len(part) * max(some[i].length for i in part) <= 4096 for part in found)


@torch.inference_mode()
def answer_by_rounds(
    model: Unified, drafter: Drafter, dialogue: Dialogue, count: int, limit: int, stop: set[int]
) -> tuple[tuple[int, ...], Rounds]:
    """Speculative decoding as one would write it first: a cache, drafts, a pass over them, and back to what was
    right."""
    cache = KVCache(model.config.text)
    hidden = torch.cat(list(prefill(model, dialogue.prompt, cache)))[-1:]
    reply, passes, accepted = [int(model.logits(hidden).argmax())], 0, 0
    while reply[-1] not in stop and len(reply) < limit:
        newest = torch.tensor([reply[-1]])
        guesses = [int(token) for token, _ in drafts(drafter, model, newest, hidden, [cache], count)]
        batch = RaggedBatch(model.config.text, [Segment(cache, count + 1)], Media(), torch.device("cpu"))
        begin = cache.length
        states = model(torch.tensor([reply[-1], *guesses]), batch)
        passes += 1
        for place, token in enumerate(model.logits(states).argmax(-1).tolist()):
            reply.append(token)
            if place < count and guesses[place] == token:
                accepted += 1
            if reply[-1] in stop or len(reply) == limit or place == count or guesses[place] != token:
                break
        cache.rewind(begin + place + 1)
        hidden = states[place : place + 1]
    return tuple(reply), Rounds(len(reply) - 1, passes, accepted)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", ["published", "narrow"])
def test_counted_rounds_are_those_of_decoding(name: str, count: int, load_tiny: Load) -> None:
    """With a drafter that has learnt some of these answers, and ends among the drafts."""
    model = load_tiny(name)
    asked = [Dialogue(sample_for(name, Text(4 + i), seed=i).prompt(), ()) for i in range(12)]
    stop = set(range(20, 34))
    drafter = random_drafter(model)
    replies = [answer_by_rounds(model, drafter, one, 1, 14, stop)[0] for one in asked]
    known = [dataclasses.replace(one, reply=reply) for one, reply in zip(asked, replies, strict=True)]
    learn(drafter, model, known[:8], steps=60)
    expected = [answer_by_rounds(model, drafter, one, count, 14, stop) for one in asked]
    assert [reply for reply, _ in expected] == replies
    assert count_rounds(drafter, model, known, count) == [rounds for _, rounds in expected]
    assert sum(rounds.accepted for _, rounds in expected) > 5  # or nothing was compared
    assert any(rounds.accepted == 0 < rounds.passes for _, rounds in expected)
    whole = measure(drafter, model, {"all": known}, count)["all"]
    assert whole.tokens == sum(len(reply) - 1 for reply in replies)


def learn(drafter: Drafter, model: Unified, known: Sequence[Dialogue], steps: int) -> None:
    reading = read(model, known)
    found = chains(reading, 4)
    truth = found.truth(reading)
    wanted = model.logits(reading.hidden[found.inputs.flatten()]).softmax(-1).view(*truth.shape, -1)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        chain_loss(
            torch.stack(list(unroll(drafter, model, reading, found))), wanted, truth, found.real
        ).total.backward()
        optimizer.step()


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("name", ["published", "full-first", "two-global-heads"])
def test_a_new_drafter_fits_its_model(name: str, layers: int, load_tiny: Load) -> None:
    model = load_tiny(name)
    config = shaped_config(model.config, Shape(layers, 24))
    assert config.layer_types == (SLIDING,) * (layers - 1) + (FULL,)
    assert (config.hidden_size, config.intermediate_size) == (24, 192)
    check_pair(model.config.text, config, model.config.text.hidden_size)
    reading = read(model, dialogues(name))
    drafter = new_drafter(model, config, reading, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(
        drafter.parameters(), new_drafter(model, config, reading, seed=0).parameters(), strict=True
    ))  # fmt: skip
    with torch.no_grad():
        scores = torch.stack(list(unroll(drafter, model, reading, chains(reading, 4))))
    assert 0.5 < scores.std() < 2


@pytest.mark.parametrize(("kind", "own"), [(FULL, FULL), (SLIDING, SLIDING)])
def test_a_model_with_layers_of_one_kind(kind: str, own: str, load_tiny: Load) -> None:
    config = load_tiny("published").config
    text = dataclasses.replace(config.text, layer_types=(kind,) * config.text.num_hidden_layers)
    assert set(shaped_config(dataclasses.replace(config, text=text), Shape()).layer_types) == {own}
