"""A prompt that is spoken: the answer of the one that holds the whole recording, in any company."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.compare import assert_near, sample_for
from support.engine import Stepped, assert_same, ids, model_of, plain
from support.oracle import Audio, Image, Text

import iolite
from iolite.engine.engine import Engine
from iolite.engine.listening import LiveSequence
from iolite.engine.step import Step
from iolite.errors import BusyError, CheckpointError, ContextError, UsageError
from iolite.generate.loop import prompt_logits
from iolite.generate.sampling import SamplingParams
from iolite.media.audio import audio_frames, decode_audio
from iolite.prompt import sound_span

DIGITS = Path(__file__).parents[2] / "docs" / "demo" / "digits.wav"
NAME = "published"
PARAMS = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture
def model(load_tiny):
    return model_of(load_tiny(NAME))


def spoken(seed=0, frames=30, *before):
    """(the whole prompt, its template with a recording of one frame, the frames)."""
    whole = sample_for(NAME, *(before or (Text(7),)), Audio(frames), Text(5), seed=seed).prompt()
    span = whole.spans[-1]
    whole = replace(whole, spans=(*whole.spans[:-1], sound_span(span.array, span.start)))
    other = sound_span(np.zeros_like(span.array[:1]), span.start)
    ids = whole.ids[: span.start + 1] + whole.ids[span.stop :]
    return whole, replace(whole, ids=ids, spans=(*whole.spans[:-1], other)), span.array


def listen(engine, template, params=PARAMS, most=60):
    return engine.listen(template, params, most=most)


def hear_all(engine, listening, frames, rng):
    """In pieces of any size, with steps and silences between."""
    while len(frames):
        count = rng.choice((1, 1, 2, 5))
        listening.hear(frames[:count])
        frames = frames[count:]
        for _ in range(rng.choice((0, 1, 1, 3))):
            engine.step()


def idle(engine):
    stats = engine.stats()
    return not (stats.running or stats.waiting or stats.listening) and not list(engine.prefixes._out)


@pytest.mark.parametrize("before", [(Text(7),), (Text(3), Image(4, 3), Audio(5), Text(2)), (Text(150),)])
def test_it_is_the_prompt_that_holds_the_whole_recording(model, before, monkeypatch):
    whole, template, frames = spoken(1, 30, *before)
    expected, scores = plain(model, whole, PARAMS), prompt_logits(model.network, whole)[-1]
    engine, seen, real = Stepped(model), [], model.network.logits
    listening = listen(engine, template)
    hear_all(engine, listening, frames, random.Random(0))
    monkeypatch.setattr(model.network, "logits", lambda hidden: seen.append(real(hidden)) or seen[-1])
    running = listening.commit()
    engine.finish()
    assert ids(running) == expected
    assert_near(seen[0], scores[None])
    assert running.prompt.ids == whole.ids
    assert [span.digest for span in running.prompt.spans] == [span.digest for span in whole.spans]
    assert idle(engine)


def test_frames_are_read_before_the_end_is_known(model):
    whole, template, frames = spoken()
    engine = Stepped(model)
    listening = listen(engine, template)
    for at in range(len(frames)):
        listening.hear(frames[at : at + 1])
        engine.step()
    read = engine.stats().prompt_tokens
    assert read == len(listening.opening.ids) + len(frames)
    running = listening.commit()
    engine.finish()
    assert ids(running) == plain(model, whole, PARAMS)
    assert engine.stats().prompt_tokens - read == len(listening.closing)
    assert running.cached_tokens == read


def test_in_any_company(model):
    """Several speak while others draw; everybody gets the answer that they would get alone."""
    rng, engine = random.Random(3), Stepped(model, seed=3, slots=2, waiting=10, listeners=3)
    talks = [spoken(seed, 20 + seed) for seed in range(3)]
    chats = [sample_for(NAME, Text(40), seed=10 + i).prompt() for i in range(4)]
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=12)
    asked = [engine.submit(prompt, params) for prompt in chats]
    listening = [listen(engine, template, params) for _, template, _ in talks]
    left = {i: frames for i, (_, _, frames) in enumerate(talks)}
    answers = {}
    while left:
        i = rng.choice(sorted(left))
        if len(left[i]):
            listening[i].hear(left[i][:3])
            left[i] = left[i][3:]
        else:
            del left[i]
            answers[i] = listening[i].commit()
        engine.step()
    engine.finish()
    for prompt, running in zip(chats, asked, strict=True):
        assert_same(model, prompt, params, ids(running), plain(model, prompt, params))
    for i, (whole, _, _) in enumerate(talks):
        assert_same(model, whole, params, ids(answers[i]), plain(model, whole, params))
    stats = engine.stats()
    assert stats.finished == stats.submitted == 7
    assert idle(engine)


def test_who_is_silent_holds_up_nobody(model):
    """Neither the only slot is taken, nor does the engine's thread spin or wait."""
    _, template, frames = spoken()
    with Engine(model, slots=1, waiting=0, listeners=2) as engine:
        silent = [listen(engine, template) for _ in range(2)]
        for listening in silent:
            listening.hear(frames[:4])
        prompt = sample_for(NAME, Text(9)).prompt()
        assert ids(engine.submit(prompt, PARAMS)) == plain(model, prompt, PARAMS)
        wait_until(lambda: engine.stats().prompt_tokens >= 2 * (len(silent[0].opening.ids) + 3))
        steps = quiet(engine)
        time.sleep(0.05)
        assert engine.stats().steps == steps
        for listening in silent:
            listening.cancel()
        wait_until(lambda: idle(engine))


def wait_until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.005)


def quiet(engine):
    """The number of steps, once it does not change any more."""
    steps = -1
    while steps != engine.stats().steps:
        steps = engine.stats().steps
        time.sleep(0.05)
    return steps


def test_what_was_said_is_found_again(model):
    """By the next turn, which holds the recording; of one that was broken off, what came before it."""
    whole, template, frames = spoken()
    engine = Stepped(model)
    listening = listen(engine, template)
    listening.hear(frames)
    running = listening.commit()
    engine.finish()
    answer = ids(running)
    turn = replace(whole, ids=[*whole.ids, *answer, 5, 6])
    next_one = engine.submit(turn, PARAMS)
    engine.finish()
    assert ids(next_one) == plain(model, turn, PARAMS)
    assert next_one.cached_tokens >= len(whole.ids)
    # Another recording after the same beginning, broken off, and then the same again.
    _, template, frames = spoken(4, 30, Text(60))
    for _ in range(2):
        listening = listen(engine, template)
        listening.hear(frames)
        before = engine.stats().cached_tokens
        engine.step()
        engine.step()
        listening.cancel()
        engine.step()
        assert idle(engine)
    assert engine.stats().cached_tokens == before  # counted for those that are answered
    assert engine.prefixes.counters.reused >= len(listening.opening.ids) - 1


@pytest.mark.parametrize("at", ["before the first step", "while it is heard", "committed", "drawing"])
def test_it_can_be_cancelled_at_any_time(model, at):
    _, template, frames = spoken()
    engine = Stepped(model)
    listening = listen(engine, template)
    running = None
    if at != "before the first step":
        listening.hear(frames)
        engine.step()
    if at in ("committed", "drawing"):
        running = listening.commit()
    if at == "drawing":
        engine.step()
        engine.step()
    listening.cancel()
    engine.step()
    assert idle(engine)
    stats = engine.stats()
    assert stats.cancelled == stats.submitted == 1
    if running:
        assert len(ids(running)) < PARAMS.max_tokens


def test_bounds(model):
    _, template, frames = spoken()
    engine = Stepped(model, listeners=1)
    listening = listen(engine, template, most=20)
    with pytest.raises(BusyError) as refused:
        listen(engine, template)
    assert refused.value.retry_after > 0
    with pytest.raises(UsageError, match="no recording"):
        listening.commit()
    listening.hear(frames[:20])
    assert listening.left == 0
    for wrong in (frames[20:21], frames[:0, :-1], frames[0]):
        with pytest.raises(UsageError):
            listening.hear(wrong)
    running = listening.commit()
    with pytest.raises(UsageError):
        listening.commit()
    with pytest.raises(UsageError):
        listening.hear(frames[:1])
    with pytest.raises(BusyError):  # until the answer has ended
        listen(engine, template)
    engine.finish()
    assert len(ids(running)) == PARAMS.max_tokens
    listen(engine, template).cancel()
    for wrong in (sample_for(NAME, Text(5)).prompt(), sample_for(NAME, Audio(2), Image(2, 2)).prompt()):
        with pytest.raises(UsageError, match="recording"):
            listen(engine, wrong)


def test_the_context_bounds_the_recording(model):
    """400 tokens: what is left of them may be heard, and one token is drawn."""
    _, template, frames = spoken(0, 60, Text(380))
    engine = Stepped(model)
    listening = listen(engine, template)
    assert 0 < listening.most < 20
    listening.hear(frames[: listening.most])
    running = listening.commit()
    engine.finish()
    assert [drawn.finish_reason for drawn in running] == ["length"]
    with pytest.raises(ContextError):
        listen(engine, spoken(0, 5, Text(395))[1])


def test_a_pass_that_breaks_is_repeated(model, monkeypatch):
    """While a recording is heard, and in its answer: the same tokens come of it."""
    whole, template, frames = spoken()
    expected = plain(model, whole, PARAMS)
    real, breaks, restarted = Step._pass, [], []

    def broken(self, turns):
        spoken_turns = [turn for turn in turns if isinstance(turn.sequence, LiveSequence)]
        if len(turns) > 1 and spoken_turns and any(breaks):
            breaks.clear()
            spoken_turns[0].cache.length = 0  # what there was is damaged
            restarted.append(when)
            raise RuntimeError("a pass that broke")
        real(self, turns)

    monkeypatch.setattr(Step, "_pass", broken)
    for when in range(5):
        engine, breaks[:] = Stepped(model), []
        other = engine.submit(sample_for(NAME, Text(9), seed=9).prompt(), replace(PARAMS, max_tokens=40))
        listening = listen(engine, template)
        for at in range(0, 30, 10):
            listening.hear(frames[at : at + 10])
            breaks[:] = [at == 10 and when == 0]
            engine.step()
        running = listening.commit()
        for step in range(1, 5):
            breaks[:] = [when == step]
            engine.step()
        engine.finish()
        assert_same(model, whole, PARAMS, ids(running), expected)
        assert len(ids(other)) == 40
        assert idle(engine)
    assert restarted == [0, 1, 2, 3, 4]


def test_what_fails_is_told(model, monkeypatch):
    _, template, frames = spoken()
    engine = Stepped(model)
    listening = listen(engine, template)
    listening.hear(frames)
    monkeypatch.setattr(model.network, "logits", lambda hidden: torch.full((len(hidden), 96), float("nan")))
    running = listening.commit()
    engine.finish()
    with pytest.raises(CheckpointError):
        ids(running)
    assert idle(engine)


def test_closing_ends_those_who_speak(model):
    _, template, frames = spoken()
    engine = Engine(model)
    listening = listen(engine, template)
    listening.hear(frames)
    engine.close()
    with pytest.raises(BusyError):
        ids(listening.commit())
    with pytest.raises(BusyError):
        listen(engine, template)
    assert idle(engine)


def test_from_threads(model):
    """Speakers on threads of their own, chats beside them."""
    talks = [spoken(seed, 25) for seed in range(4)]
    expected = [plain(model, whole, PARAMS) for whole, _, _ in talks]
    found = {}
    with Engine(model, slots=2, listeners=4) as engine:

        def speak(i):
            rng, (_, template, frames) = random.Random(i), talks[i]
            listening = listen(engine, template)
            for frame in frames:
                listening.hear(frame[None])
                time.sleep(rng.choice((0, 0, 0.002)))
            found[i] = ids(listening.commit())

        threads = [threading.Thread(target=speak, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        chats = [engine.submit(sample_for(NAME, Text(20), seed=i).prompt(), PARAMS) for i in range(6)]
        assert all(len(ids(chat)) > 0 for chat in chats)
        for thread in threads:
            thread.join(60)
        wait_until(lambda: idle(engine))
    for i, (whole, _, _) in enumerate(talks):
        assert_same(model, whole, PARAMS, found[i], expected[i])


def test_the_embedded_model_hears_the_same_words():
    """In float32: the same scores for a recording as it is spoken as for the whole file, and the same answer."""
    model = iolite.load("nano", dtype="float32")
    samples = decode_audio(str(DIGITS))

    def prompt(sound):
        text = {"type": "text", "text": model.processor.transcribe_prompt}
        sound = {"type": "audio", "audio": sound, "sampling_rate": 16_000}
        return model.prompt([{"role": "user", "content": [text, sound]}])

    whole, params, seen = prompt(samples), model.sampling(temperature=0, max_tokens=16), []
    expected, scores = plain(model, whole, params), prompt_logits(model.network, whole)[-1]
    with Engine(model) as engine:
        listening = engine.listen(prompt(samples[:640]), params)
        for frame in audio_frames(samples):
            listening.hear(frame[None])
        wait_until(lambda: engine.stats().prompt_tokens == len(whole.ids) - len(listening.closing))
        real = model.network.logits
        model.network.logits = lambda hidden: seen.append(real(hidden)) or seen[-1]
        running = listening.commit()
        assert ids(running) == expected
    assert running.prompt.ids == whole.ids
    assert_near(seen[0], scores[None])
    assert model.tokenizer.decode(expected[:-1]) == "309"
