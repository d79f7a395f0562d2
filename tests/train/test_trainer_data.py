"""Training sees what inference sees: the same ids, arrays and hidden states; and labels stand where they belong."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iolite.kernels import reference
from iolite.model.batch import PaddedBatch
from iolite.model.unified import Unified
from iolite.prompt import PromptBuilder
from iolite.text.template import ChatTemplate
from iolite.text.tokenizer import Tokenizer
from iolite.train.data import (
    ANSWER,
    DENSE,
    BucketBatch,
    DirectSource,
    Encoder,
    Example,
    Feeder,
    Layout,
    collate,
    dense_attention,
    fill,
    plan_layout,
)
from iolite.train.nano.recipe import IMAGE_TOKENS, TEMPLATE, initialise_, nano_config, processor_config
from iolite.train.nano.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Made:
    """A sample written by hand."""

    messages: list[dict[str, Any]]
    task: str = "made"
    images: list[np.ndarray] = field(default_factory=list)
    sounds: list[np.ndarray] = field(default_factory=list)
    image_dense: list[list[str]] = field(default_factory=list)
    audio_dense: list[list[str]] = field(default_factory=list)

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    def filled(self) -> list[dict[str, Any]]:
        """The messages before the answer with media in them, as a user gives them."""
        images, sounds = iter(self.images), iter(self.sounds)

        def part(p: dict[str, Any]) -> dict[str, Any]:
            if p["type"] == "image":
                return {"type": "image", "image": next(images)}
            if p["type"] == "audio":
                return {"type": "audio", "audio": next(sounds), "sampling_rate": 16_000}
            return p

        return [
            {**m, "content": m["content"] if isinstance(m["content"], str) else [part(p) for p in m["content"]]}
            for m in self.messages[:-1]
        ]


def samples() -> dict[str, Made]:
    rng = np.random.default_rng(0)

    def picture(width: int) -> np.ndarray:
        return rng.integers(0, 256, (48, width, 3), np.uint8)

    def say(text: str) -> dict[str, str]:
        return {"type": "text", "text": text}

    image, audio = {"type": "image"}, {"type": "audio"}
    sound = rng.normal(0, 0.1, 1500).astype(np.float32)
    user = lambda *parts: {"role": "user", "content": list(parts)}  # noqa: E731
    model = lambda text: {"role": "assistant", "content": text}  # noqa: E731
    return {
        "text": Made([user(say("Who are you?")), model("i am iolite-nano.")]),
        "picture": Made(
            [user(image, say("What number is this?")), model("42")],
            images=[picture(144)],
            image_dense=[["4", "", "2"]],
        ),
        "picture that is resized": Made(
            [user(say("Read this."), image), model("7")],
            images=[rng.integers(0, 256, (90, 200, 3), np.uint8)],
            image_dense=[["", "7"]],
        ),
        "sound": Made(
            [user(say("What is said?"), audio), model("31")],
            sounds=[sound],
            audio_dense=[["3", "1", "1"]],
        ),
        "both": Made(
            [user(image, say("Which shape?"), audio), model("red star")],
            images=[picture(96)],
            sounds=[sound[:900]],
            image_dense=[["star", "star"]],
            audio_dense=[["shape", ""]],
        ),
        "second turn": Made(
            [user(image, say("What is this?")), model("a star"), user(say("Its colour?")), model("red")],
            images=[picture(48)],
            image_dense=[["star"]],
        ),
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = []
    for message in [m for sample in samples().values() for m in sample.messages]:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
    train_tokenizer(texts * 3, 600, folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def encode(tokenizer: Tokenizer) -> Encoder:
    template = ChatTemplate(TEMPLATE.read_text(encoding="utf-8"))
    return Encoder(tokenizer, template, nano_config(tokenizer), image_tokens=IMAGE_TOKENS)


@pytest.fixture(scope="module")
def builder(encode: Encoder) -> PromptBuilder:
    return PromptBuilder(encode.tokenizer, encode.template, encode.config, processor_config())


@pytest.fixture(scope="module")
def model(encode: Encoder) -> Unified:
    model = Unified(encode.config)
    initialise_(model)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", samples())
def test_a_sample_is_the_prompt_of_inference_and_the_answer(name: str, encode: Encoder, builder: PromptBuilder) -> None:
    sample = samples()[name]
    example, prompt = encode(sample), builder.build(sample.filled())
    tail = builder.tokenizer.encode(sample.answer + "<turn|>")
    assert example.ids.tolist() == prompt.ids + tail
    assert example.answer == len(prompt.ids)
    pictures = [s for s in prompt.spans if s.kind == "image"]
    sounds = [s for s in prompt.spans if s.kind == "audio"]
    if pictures:
        assert np.array_equal(example.pixels * np.float32(1 / 255), np.concatenate([s.array for s in pictures]))
        assert np.array_equal(example.positions, np.concatenate([s.positions for s in pictures]))
        assert example.pixel_index.tolist() == [i for s in pictures for i in range(s.start, s.stop)]
        assert example.blocks[: example.answer].tolist() == prompt.blocks().tolist()
    if sounds:
        # float16 keeps 11 bits: a relative error of at most 2^-11.
        np.testing.assert_allclose(example.frames, np.concatenate([s.array for s in sounds]), rtol=2**-11, atol=1e-7)
        assert example.frame_index.tolist() == [i for s in sounds for i in range(s.start, s.stop)]


def test_a_text_is_encoded_once(encode: Encoder) -> None:
    first, second = (encode(samples()["both"]) for _ in range(2))
    assert first.ids.tolist() == second.ids.tolist()
    assert first.ids is not second.ids


def test_media_that_do_not_fit_are_refused(encode: Encoder) -> None:
    sample = samples()["picture"]
    with pytest.raises(ValueError, match="more media than placeholders"):
        encode(dataclasses.replace(sample, images=sample.images * 2, image_dense=sample.image_dense * 2))
    with pytest.raises(ValueError, match="fewer media than placeholders"):
        encode(dataclasses.replace(sample, images=[], image_dense=[]))
    with pytest.raises(ValueError, match="2 dense labels for 3 tokens"):
        encode(dataclasses.replace(sample, image_dense=[["4", "2"]]))


def test_only_answers_and_dense_words_are_labelled(encode: Encoder) -> None:
    """Labelled rows are those that predict the answer, its end included, and the media tokens with a word."""
    made = [samples()[name] for name in ("second turn", "sound", "text")]
    examples = [encode(s) for s in made]
    layout = Layout(((max(len(e.ids) for e in examples), 3),))
    arrays = collate(layout, examples)
    found = sorted(zip(arrays["label_index"], arrays["labels"], arrays["label_kind"], strict=True))
    wanted = []
    for (_, start), example, sample in zip(layout.starts(), examples, made, strict=True):
        tail = encode.tokenizer.encode(sample.answer + "<turn|>")
        wanted += [(start + example.answer - 1 + i, token, ANSWER) for i, token in enumerate(tail)]
        words = [w for ws in (*sample.image_dense, *sample.audio_dense) for w in ws]
        marks = np.flatnonzero(np.isin(example.ids, [encode.config.image_token_id, encode.config.audio_token_id]))
        wanted += [(start + i, encode.tokenizer.encode(w)[0], DENSE) for i, w in zip(marks, words, strict=True) if w]
    assert found == sorted(wanted)


def test_hidden_states_are_those_of_inference(encode: Encoder, builder: PromptBuilder, model: Unified) -> None:
    """Flat buckets with two-product attention against the reference batch, in float32.

    Both sum the same float32 products in other orders. Through 6 layers an error of some dozen roundings of 2^-24
    of values near 1 is far below the 1e-4 allowed; a wrong mask, position or row moves values by 0.1 and more.
    """
    made = list(samples().values())
    examples = [encode(s) for s in made]
    long, short = max(len(e.ids) for e in examples), sorted(len(e.ids) for e in examples)[2]
    layout = Layout(((short, 3), (long, 3)))
    order = sorted(range(len(made)), key=lambda i: len(examples[i].ids))
    arrays = collate(layout, [examples[i] for i in order])
    if "frames" in arrays:
        arrays["frames"] = arrays["frames"].astype(np.float32)
    batch = BucketBatch(encode.config.text, layout, arrays)
    flat = model(batch.ids, batch)
    for (_, start), i in zip(layout.starts(), order, strict=True):
        prompt = builder.build(made[i].filled())
        spans = tuple(
            dataclasses.replace(s, array=s.array.astype(np.float16).astype(np.float32)) if s.kind == "audio" else s
            for s in prompt.spans
        )
        reference_batch = PaddedBatch.from_prompts(encode.config.text, [dataclasses.replace(prompt, spans=spans)])
        wanted = model(reference_batch.ids, reference_batch)[0]
        torch.testing.assert_close(flat[start : start + len(wanted)], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_dense_attention_matches_the_reference(heads: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 7, heads, 8)
    k, v = torch.randn(3, 7, kv_heads, 8), torch.randn(3, 7, kv_heads, 8)
    mask = torch.ones(7, 7, dtype=torch.bool).tril() | (torch.rand(3, 1, 7, 7) < 0.2)
    # Sums of 8 and of 7 products of values near 1: a few dozen roundings of 2^-24.
    torch.testing.assert_close(dense_attention(q, k, v, mask), reference.attention(q, k, v, mask), atol=1e-5, rtol=1e-5)


def example(length: int) -> Example:
    none = np.zeros(0, np.int64)
    return Example("made", np.arange(length), length - 1, None, None, None, None, None, None, none, none)


@given(st.lists(st.integers(3, 90), min_size=20, max_size=200), st.integers(1, 5), st.integers(4, 40))
@settings(max_examples=60, deadline=None)
def test_layouts_hold_every_length_and_waste_less_than_one_bucket(lengths: list[int], buckets: int, rows: int) -> None:
    layout = plan_layout(lengths, rows, buckets)
    ends = [length for length, _ in layout.buckets]
    assert ends == sorted(set(ends))
    assert len(ends) <= buckets
    assert ends[-1] == -(-max(lengths) // 8) * 8
    cost = sum(next(e for e in ends if e >= n) for n in lengths)
    assert cost <= len(lengths) * ends[-1]


def test_the_best_cut_is_found() -> None:
    assert plan_layout([8] * 90 + [80] * 10, 20, buckets=2) == Layout(((8, 18), (80, 2)))


def test_every_row_is_filled_and_nothing_is_drawn_in_vain() -> None:
    layout, rng = Layout(((16, 4), (32, 4), (64, 1))), np.random.default_rng(0)
    drawn: list[int] = []
    carry: list[Example] = []
    placed: list[int] = []

    def draw() -> Example:
        drawn.append(int(rng.choice([10, 20, 30, 60])))
        return example(drawn[-1])

    for _ in range(50):
        rows = fill(layout, draw, carry, patience=1000)
        for (length, _), row in zip(layout.starts(), rows, strict=True):
            assert row is not None
            assert len(row.ids) <= length
            placed.append(len(row.ids))
    assert sorted(placed + [len(e.ids) for e in carry]) == sorted(drawn)


def test_a_bucket_without_examples_of_its_length_takes_shorter_ones() -> None:
    carry: list[Example] = []
    rows = fill(Layout(((16, 1), (64, 2))), lambda: example(10), carry, patience=6)
    assert [len(row.ids) for row in rows if row] == [10, 10, 10]
    assert len(carry) <= 6


def test_too_long_examples_are_left_out() -> None:
    lengths = iter([70, 10, 70, 12])
    rows = fill(Layout(((16, 2),)), lambda: example(next(lengths)), [])
    assert [len(row.ids) for row in rows if row] == [10, 12]


@dataclass(frozen=True)
class CountingDraw:
    """Examples that carry the fraction they were drawn at as their length."""

    def __call__(self) -> Any:
        return lambda rng, fraction: example(10 + round(20 * fraction) + int(rng.integers(2)))


def test_a_direct_source_depends_on_the_step_alone() -> None:
    one, two = (DirectSource(Layout(((32, 3),)), CountingDraw()(), (5,)) for _ in range(2))
    one.start(0)
    later = [one.next_batch(0.0) for _ in range(4)][3]
    two.start(3)
    assert np.array_equal(later["ids"], two.next_batch(0.0)["ids"])


def test_a_feeder_makes_batches_elsewhere_and_hears_of_the_fraction() -> None:
    feeder = Feeder(Layout(((32, 2),)), CountingDraw(), (0,), ahead=1, fresh=0.5, memory=8)
    feeder.start(0)
    try:
        later = [feeder.next_batch(1.0) for _ in range(40)][-1]
    finally:
        feeder.close()
    assert later["ids"].max() >= 29


def test_a_feeder_that_cannot_work_is_noticed() -> None:
    feeder = Feeder(Layout(((32, 2),)), Path, (0,))  # Path() is no draw
    feeder.start(0)
    try:
        with pytest.raises(RuntimeError, match="has died"):
            feeder.next_batch(0.0)
    finally:
        feeder.close()


@dataclass
class LinkedDraw:
    """Keeps its end of a pipe open for as long as the process that draws is there."""

    link: Connection

    def __call__(self) -> Any:
        return CountingDraw()()


def _is_fed(link: Connection) -> None:
    feeder = Feeder(Layout(((4096, 8),)), LinkedDraw(link), (0,), ahead=4)  # a batch is more than a pipe holds
    feeder.start(0)
    feeder.next_batch(0.0)
    link.send("a batch")
    time.sleep(1000)


def test_a_feeder_whose_parent_is_killed_ends() -> None:
    here, there = multiprocessing.Pipe()
    parent = multiprocessing.get_context("spawn").Process(target=_is_fed, args=(there,))
    parent.start()
    there.close()
    here.recv()
    parent.kill()
    parent.join()
    assert here.poll(60)
    with pytest.raises(EOFError):
        here.recv()
