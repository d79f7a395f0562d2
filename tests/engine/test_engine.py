"""An engine's life: its queue, cancelling, closing, what fails and whom that concerns, many threads."""

from __future__ import annotations

import gc
import itertools
import json
import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.compare import sample_for
from support.engine import Stepped, assert_same, ids, model_of, plain
from support.oracle import Image, Text

import iolite
from iolite.engine.engine import Engine
from iolite.engine.room import cache_bytes, room_for
from iolite.engine.sequence import Sequence
from iolite.engine.step import Step
from iolite.errors import BusyError, CheckpointError, ContextError, UsageError
from iolite.generate.loop import Decoding
from iolite.generate.sampling import SamplingParams

NAME = "published"
SHORT = SamplingParams(temperature=0, max_tokens=6)
LONG = SamplingParams(temperature=0, max_tokens=300)


@pytest.fixture
def model(load_tiny):
    return model_of(load_tiny(NAME))


def prompt_of(seed=0, *pieces):
    prompt = sample_for(NAME, *(pieces or (Text(9),)), seed=seed).prompt()
    return replace(prompt, spans=tuple(replace(s, digest=f"{seed} {s.digest}") for s in prompt.spans))


def counts(engine):
    stats = engine.stats()
    return stats.finished, stats.cancelled, stats.failed, stats.running, stats.waiting


def until(true):
    """Waits until a condition holds."""
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it does not come true")


def broken_picture(prompt):
    """A prompt one of whose pictures has patches of another size: the pass that it takes part in breaks."""
    first, *rest = prompt.spans
    return replace(prompt, spans=(replace(first, array=first.array[:, :-1]), *rest))


def test_answers_enter_in_order_of_arrival(model):
    engine = Stepped(model, slots=2, waiting=5)
    running = [engine.submit(prompt_of(i), SHORT) for i in range(6)]
    engine.finish()
    assert all(len(ids(one)) == 6 for one in running)
    waited = [one.wait_seconds for one in running]
    assert waited == sorted(waited)[:2] + waited[2:] or waited[0] <= waited[2] <= waited[5]
    assert counts(engine) == (6, 0, 0, 0, 0)


def test_a_full_queue_says_when_to_come_again(model):
    engine = Stepped(model, slots=1, waiting=2)
    running = [engine.submit(prompt_of(i), SHORT) for i in range(3)]
    with pytest.raises(BusyError, match="are waiting already") as refused:
        engine.submit(prompt_of(3), SHORT)
    assert 1 <= refused.value.retry_after <= 60
    assert refused.value.hint
    assert engine.stats().refused == 1
    running[1].cancel()  # whoever waits makes room at once
    engine.submit(prompt_of(3), SHORT)
    engine.finish()
    assert counts(engine) == (3, 1, 0, 0, 0)


def test_what_does_not_fit_is_refused_at_once(model):
    engine = Stepped(model)
    with pytest.raises(ContextError):
        engine.submit(prompt_of(0, Text(model.context)), SHORT)
    for drafts in (-1, 9, True, 1.5, 3):  # 3 would do with a drafter
        with pytest.raises(UsageError):
            engine.submit(prompt_of(), SHORT, drafts=drafts)
    for settings in ({"slots": 0}, {"waiting": -1}, {"slots": 1.5}):
        with pytest.raises(UsageError):
            Engine(model, **settings)
    assert counts(engine) == (0, 0, 0, 0, 0)


def test_an_answer_ends_at_the_context(model):
    engine, prompt = Stepped(model), prompt_of(0, Text(390))
    running = engine.submit(prompt, LONG)
    engine.finish()
    found = list(running)
    assert len(found) == model.context - len(prompt.ids)
    assert [drawn.finish_reason for drawn in found][-2:] == [None, "length"]


def test_cancelling_frees_the_place_within_one_step(model):
    engine = Stepped(model, slots=1)
    first, second = engine.submit(prompt_of(0), LONG), engine.submit(prompt_of(1), SHORT)
    while engine.stats().drawn_tokens < 3:
        engine.step()
    first.cancel()
    engine.step()
    assert counts(engine)[1:] == (1, 0, 1, 0)
    assert 3 <= len(ids(first)) <= 4
    engine.finish()
    first.cancel()  # again, and after its end
    second.cancel()
    assert len(ids(second)) == 6
    assert counts(engine) == (1, 1, 0, 0, 0)


def test_whoever_stops_reading_cancels(model):
    """And what was read is there for the next one, the tokens of a prompt that was not finished included."""
    engine = Stepped(model, slots=2)
    prompt = prompt_of(0, Text(60))
    running = engine.submit(prompt, LONG)
    while engine.stats().drawn_tokens < 5:
        engine.step()
    reader = iter(running)
    next(reader)
    reader.close()
    engine.step()
    assert counts(engine) == (0, 1, 0, 0, 0)
    assert running.count == 1
    half = engine.submit(prompt_of(1, Text(60)), LONG)
    engine.step()
    half.cancel()
    engine.step()
    again = [engine.submit(prompt, SHORT), engine.submit(prompt_of(1, Text(60)), SHORT)]
    engine.finish()
    assert again[0].cached_tokens == len(prompt.ids) - 1
    assert again[1].cached_tokens > 0
    for one in again:
        assert_same(model, one.prompt, one.params, ids(one), plain(model, one.prompt, one.params))


def test_an_answer_is_iterated_once(model):
    engine = Stepped(model)
    running = engine.submit(prompt_of(), SHORT)
    engine.finish()
    assert len(ids(running)) == 6
    with pytest.raises(UsageError, match="read already"):
        ids(running)


def test_a_long_prompt_does_not_stall_who_draws(model):
    """Each step draws a token for the first and reads a few of the second's."""
    engine = Stepped(model, slots=2)
    engine._step.pace.tokens = lambda drawing: 8
    engine.submit(prompt_of(0), LONG)
    while not engine.stats().drawn_tokens:
        engine.step()
    engine.submit(prompt_of(1, Text(20), Image(6, 5), Text(200)), SHORT)
    before = engine.stats()
    for _ in range(10):
        engine.step()
    after = engine.stats()
    assert after.drawn_tokens - before.drawn_tokens == 10
    assert 50 < after.prompt_tokens - before.prompt_tokens <= 80 + 30


@pytest.mark.parametrize("alone", [True, False])
def test_scores_that_are_no_numbers_end_one_answer(model, alone):
    """A picture of NaN, beside others that draw and read."""
    engine = Stepped(model, slots=4)
    others = [] if alone else [engine.submit(prompt_of(i, Text(9), Image(3, 2)), SHORT) for i in range(3)]
    prompt = prompt_of(7, Text(3), Image(2, 2), Text(5))
    span = replace(prompt.spans[0], array=np.full_like(prompt.spans[0].array, np.nan))
    damaged = engine.submit(replace(prompt, spans=(span,)), SHORT)
    engine.finish()
    with pytest.raises(CheckpointError, match="not numbers"):
        ids(damaged)
    assert counts(engine) == (len(others), 0, 1, 0, 0)
    assert len(model.prefixes) == len(others)  # its cache is not kept
    for one in others:
        assert_same(model, one.prompt, one.params, ids(one), plain(model, one.prompt, one.params))


@pytest.mark.parametrize("place", range(4))
def test_a_pass_that_breaks_ends_the_answer_whose_fault_it_is(model, place):
    engine = Stepped(model, seed=place, slots=4)
    running = []
    for i in range(4):
        prompt = prompt_of(i, Text(9), Image(3, 2), Text(3), Image(2, 2))
        running.append(engine.submit(broken_picture(prompt) if i == place else prompt, SHORT))
        engine.step()
    engine.finish()
    assert counts(engine) == (3, 0, 1, 0, 0)
    for i, one in enumerate(running):
        if i == place:
            with pytest.raises((RuntimeError, ValueError)):
                ids(one)
        else:
            assert_same(model, one.prompt, one.params, ids(one), plain(model, one.prompt, one.params))


@pytest.mark.parametrize("where", ["layers.3", "norm"])
@pytest.mark.parametrize("grown", [False, True])
def test_passes_that_break_by_chance_change_nothing(model, monkeypatch, where, grown):
    """Every third pass of several breaks, before or after its tokens count as read; grown: only two, and they damage
    what their caches held, so that all of it is read again."""
    module, passes, whole = model.network.language_model.get_submodule(where), itertools.count(), Step._pass

    def fail(*_):
        raise RuntimeError("out of memory")

    def breaking(step, turns):
        hook = None
        number = next(passes) if len(turns) > 1 else 0
        if number in (4, 12) or (number % 3 == 2 and not grown):
            hook = module.register_forward_pre_hook(fail)
        try:
            whole(step, turns)
        finally:
            if hook:
                hook.remove()
            if hook and grown:
                for store in [store for turn in turns for layer in turn.cache.layers for store in layer.stores]:
                    store.fill_(float("nan"))

    wanted = [(prompt_of(i, Text(9 + 7 * i), Image(3, 2)), SHORT) for i in range(5)]
    expected = [plain(model, *one) for one in wanted]
    monkeypatch.setattr(Step, "_pass", breaking)
    if grown:
        monkeypatch.setattr("iolite.prefix.memory.Lease.recover", lambda lease: False)
        monkeypatch.setattr("iolite.engine.step._MOST_RESTARTS", 2)
    engine = Stepped(model, slots=3)
    running = [engine.submit(*one) for one in wanted]
    engine.finish()
    for one, given, answer in zip(running, wanted, expected, strict=True):
        assert_same(model, *given, ids(one), answer)
    assert counts(engine) == (5, 0, 0, 0, 0)
    assert next(passes) > (12 if grown else 6)


def test_a_sampler_that_fails_ends_its_own_answer(model):
    engine = Stepped(model, slots=3)
    wrong = SamplingParams(temperature=0, logit_bias={10_000: 1.0})  # the vocabulary is smaller
    running = [engine.submit(prompt_of(i), wrong if i == 1 else SHORT) for i in range(3)]
    engine.finish()
    with pytest.raises(UsageError, match="vocabulary"):
        ids(running[1])
    assert [len(ids(running[i])) for i in (0, 2)] == [6, 6]
    assert counts(engine) == (2, 0, 1, 0, 0)


def test_caches_in_use_stay_within_their_room(model, monkeypatch):
    """Twice a whole context's: requests of a third of it run by twos, however many places there are."""
    whole = cache_bytes(model, model.context)
    monkeypatch.setattr("iolite.engine.room.free_memory", lambda device: 4 * whole)
    assert (room_for(model, 1), room_for(model, 8)) == (whole, 2 * whole)
    engine = Stepped(model, slots=8)
    assert model.prefixes.budget_bytes == room_for(model, 8)
    running = [engine.submit(prompt_of(i, Text(200)), replace(SHORT, max_tokens=100)) for i in range(5)]
    most = 0
    while len(engine._scheduler):
        engine.step()
        most = max(most, engine.stats().running)
        assert engine.stats().cache_bytes <= model.prefixes.budget_bytes
    assert most == 2
    assert all(len(ids(one)) == 100 for one in running)


def test_closing_lets_answers_end(model):
    with Engine(model) as engine:
        running = [engine.submit(prompt_of(i), SHORT) for i in range(6)]
        engine.close(seconds=300)
        assert [len(ids(one)) for one in running] == [6] * 6
        with pytest.raises(BusyError, match="being closed"):
            engine.submit(prompt_of(), SHORT)
    assert counts(engine) == (6, 0, 0, 0, 0)


def test_closing_at_once_ends_answers_with_an_error(model):
    engine = Engine(model, slots=1)
    running = [engine.submit(prompt_of(i), LONG) for i in range(3)]
    until(lambda: engine.stats().drawn_tokens > 2)
    running[2].cancel()
    engine.close()
    for one in running[:2]:
        with pytest.raises(BusyError, match="before the answer was complete"):
            ids(one)
    assert ids(running[2]) == []
    assert counts(engine) == (0, 1, 2, 0, 0)
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_breaks_leaves_nobody_waiting(model, monkeypatch):
    engine, found = Engine(model, slots=1), []
    running = [engine.submit(prompt_of(i), LONG) for i in range(3)]

    def read(one):
        try:
            ids(one)
        except RuntimeError as error:
            found.append(str(error))

    readers = [threading.Thread(target=read, args=(one,)) for one in running]
    for reader in readers:
        reader.start()
    until(lambda: engine.stats().drawn_tokens > 2)
    monkeypatch.setattr("iolite.engine.scheduler.Scheduler.share", lambda *_: 1 / 0)
    for reader in readers:
        reader.join(60)
    assert len(found) == 3
    assert all("ZeroDivisionError" in error for error in found)
    with pytest.raises(RuntimeError, match="the engine has stopped"):
        engine.submit(prompt_of(), SHORT)
    assert engine.stats().broken
    engine.close()


def test_many_threads(model):
    """Readers come, read, stop reading, cancel from elsewhere and go; every answer is accounted for."""
    wanted = [(prompt_of(i % 7, Text(9), Image(2, 2)), replace(SHORT, temperature=1.0, seed=i)) for i in range(40)]
    expected = [plain(model, *one) for one in wanted]
    failures, refused = [], []

    def client(number):
        rng = random.Random(number)
        for i in range(number, 40, 8):
            try:
                running = engine.submit(*wanted[i])
            except BusyError as error:
                refused.append(error.retry_after)
                continue
            most, found = rng.choice((100, 100, 2)), []
            if rng.random() < 0.2:
                threading.Timer(0.01, running.cancel).start()
            for drawn in running:
                found.append(drawn.id)
                if len(found) == most:
                    break
            if found != expected[i][: len(found)]:
                failures.append((i, found, expected[i]))

    with Engine(model, slots=3, waiting=4) as engine:
        clients = [threading.Thread(target=client, args=(i,)) for i in range(8)]
        for one in clients:
            one.start()
        for one in clients:
            one.join(120)
        until(lambda: counts(engine)[3:] == (0, 0))
    stats = engine.stats()
    for i, found, answer in failures:
        assert_same(model, *wanted[i], found, answer[: len(found)])
    assert stats.refused == len(refused)
    assert stats.finished + stats.cancelled == stats.submitted == 40 - len(refused)
    assert stats.failed == 0
    assert stats.finished > 10


def test_drafts_that_fail_end_one_answer(load_tiny):
    """A speculator that cannot propose for one sequence proposes for the others."""
    from support.drafting import CHEAP

    from iolite.generate.speculative import Speculator

    class Fails(Speculator):
        def propose(self, sequences):
            if any(len(sequence.ids) > 30 for sequence in sequences):
                raise FloatingPointError("sureness")
            return super().propose(sequences)

    network = load_tiny(NAME)
    model = model_of(network, Fails(network, CHEAP))
    engine = Stepped(model, slots=3)
    running = [engine.submit(prompt_of(i, Text(40 if i == 1 else 9)), SHORT) for i in range(3)]
    engine.finish()
    with pytest.raises(FloatingPointError):
        ids(running[1])
    assert [len(ids(running[i])) for i in (0, 2)] == [6, 6]
    assert counts(engine) == (2, 0, 1, 0, 0)


def test_torch_is_left_as_it_was(model):
    before, engine = torch.get_num_threads(), Stepped(model)
    running = engine.submit(prompt_of(), SHORT)
    engine.finish()
    assert len(ids(running)) == 6
    assert (torch.is_grad_enabled(), torch.get_num_threads()) == (True, before)


@pytest.mark.parametrize("much", [0, 1_000_000])
def test_large_passes_compute_on_all_threads(model, monkeypatch, much):
    """And small ones, and the samplers, on one."""
    seen, own, compute = [], torch.get_num_threads(), Step._compute
    monkeypatch.setattr("iolite.engine.step.MUCH", much)
    torch.set_num_threads(3)
    try:
        monkeypatch.setattr(Step, "_compute", lambda *given: (seen.append(torch.get_num_threads()), compute(*given)))
        engine = Stepped(model, slots=2)
        engine.submit(prompt_of(0, Text(39)), SHORT)
        engine._step.pace.tokens = lambda drawing: 40
        engine.finish()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(own)
    assert seen == ([3] * 6 if not much else [3] + [1] * 5)


def test_constraints_see_what_is_drawn_and_nothing_else():
    """Of several answers at a time each keeps to its own schema, and is the one that it is alone."""
    model, values, wanted, complete = iolite.load("nano"), ["x", "yy", "zzz"], [], 0
    schema = {"type": "object", "properties": {"a": {"enum": values}}, "required": ["a"], "additionalProperties": False}
    for i in range(4):
        params = model.sampling(temperature=1.0, seed=i, max_tokens=60)
        wanted.append((model.prompt(f"Question {i}?"), params, None if i == 2 else schema))

    def constraint(prompt, params, schema):
        return model.constraint(prompt, params, schema=schema)

    with Engine(model, slots=3) as engine:
        running = [engine.submit(*one[:2], constraint=constraint(*one)) for one in wanted]
        found = [ids(one) for one in running]
    for one, answer in zip(wanted, found, strict=True):
        alone = Decoding(model.network, *one[:2], context=model.context, constraint=constraint(*one))
        assert answer == [drawn.id for drawn in alone]
        if one[2] and answer[-1] in one[1].stop_ids:
            assert json.loads(model.tokenizer.decode(answer[:-1])) in [{"a": value} for value in values]
            complete += 1
    assert complete


def test_a_reader_hears_when_it_has_read_all_that_there_is(model):
    engine = Stepped(model, slots=1)
    running, seen, heard = engine.submit(prompt_of(), SHORT), [], []
    running.before_wait = lambda: (heard.append(len(seen)), engine.step(), engine.step())
    for drawn in running:
        seen.append(drawn.id)
    assert len(seen) == 6 and heard[0] == 0 and heard == sorted(set(heard)) and len(heard) <= 4


def test_tokens_are_not_gathered_beyond_the_last_one(model):
    engine = Stepped(model, slots=2)
    whole, left = engine.submit(prompt_of(0), SHORT), engine.submit(prompt_of(1), LONG)
    whole.gather(0.001)
    engine.step()
    left.cancel()
    begin = time.monotonic()
    left.gather(60)
    while engine._stirs():
        engine.step()
    whole.gather(60)
    assert time.monotonic() - begin < 60


def test_an_answer_that_has_ended_lets_its_cache_go_at_once(model):
    """A cache of the 12B is hundreds of megabytes, and the garbage collector may come much later."""

    def left():
        return [found for found in gc.get_objects() if type(found) is Sequence]

    gc.collect()
    gc.disable()
    others = left()  # of tests before this one
    try:
        with Engine(model) as engine:
            finished = engine.submit(prompt_of(1), SHORT)
            list(finished)
            cancelled = engine.submit(prompt_of(2), LONG)
            next(iter(cancelled))
            cancelled.cancel()
            until(lambda: counts(engine)[:2] == (1, 1))
        until(lambda: len(left()) <= len(others))
        assert finished.count == 6  # who has read an answer keeps what it says
    finally:
        gc.enable()
