"""From samples (messages with media and an answer) to batches of fixed shape.

`Encoder` turns a sample into the very token sequence that the chat template and `iolite.prompt` give at inference,
followed by the answer. `Layout` fixes the shape of every step: a few buckets, each with a length and a number of rows,
laid end to end in one flat stream of N tokens, so that nothing but attention ever sees padding in two dimensions and a
compiled model never meets a new shape. `BucketBatch` answers the model's question who may look at whom.

Letters: N tokens of a step, B rows and T length of a bucket, P patches, A frames of sound, R rows with a label,
H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from iolite.config import ModelConfig, TextConfig
from iolite.media.audio import audio_frames
from iolite.media.image import image_patches
from iolite.model.attention import Attend
from iolite.model.batch import Media, may_look
from iolite.text.template import ChatTemplate
from iolite.text.tokenizer import Tokenizer

ANSWER, DENSE = 0, 1  # kinds of labelled rows


@dataclass(frozen=True)
class Example:
    """One sample as arrays, small enough to keep thousands of."""

    task: str
    ids: np.ndarray  # int64 [T]: prompt, answer, end of turn
    answer: int  # index of the first answer token; all from here on are to be predicted
    blocks: np.ndarray | None  # int64 [T]: number of the picture a token belongs to, 0 for none; None: no picture
    pixels: np.ndarray | None  # uint8 [P, side * side * 3]
    positions: np.ndarray | None  # int64 [P, 2]
    pixel_index: np.ndarray | None  # int64 [P] into ids
    frames: np.ndarray | None  # float16 [A, samples per token]
    frame_index: np.ndarray | None  # int64 [A] into ids
    dense_index: np.ndarray  # int64 [L]: placeholders that have a label of their own
    dense_labels: np.ndarray  # int64 [L]


class Sample(Protocol):
    """What a recipe hands over: chat messages whose last one is the answer, and their media in order.

    `image_dense[i]` has a word for each token of images[i], `audio_dense[i]` one for each of sounds[i]; "" is none.
    """

    @property
    def task(self) -> str: ...
    @property
    def messages(self) -> list[dict[str, Any]]: ...
    @property
    def answer(self) -> str: ...
    @property
    def images(self) -> list[np.ndarray]: ...
    @property
    def sounds(self) -> list[np.ndarray]: ...
    @property
    def image_dense(self) -> list[list[str]]: ...
    @property
    def audio_dense(self) -> list[list[str]]: ...


class Encoder:
    """Encodes samples; renders and tokenizes each distinct text once."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        config: ModelConfig,
        *,
        image_tokens: int,
        end_of_turn: str = "<turn|>",
    ) -> None:
        """image_tokens is the budget of one picture."""
        self.tokenizer, self.template, self.config = tokenizer, template, config
        self.image_tokens, self.end_of_turn = image_tokens, end_of_turn
        self._texts: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self._words: dict[str, int] = {}

    def __call__(self, sample: Sample) -> Example:
        """The arrays of a sample. Raises ValueError when its media do not fit its messages."""
        prompt, reply = self._tokens(sample.messages[:-1], sample.answer)
        c, media = self.config, _MediaArrays(self.config, self.image_tokens)
        images = iter(zip(sample.images, sample.image_dense, strict=True))
        sounds = iter(zip(sample.sounds, sample.audio_dense, strict=True))
        try:
            for token in prompt:
                if token == c.image_token_id:
                    pixels, words = next(images)
                    self._label(media, media.picture(pixels), words)
                elif token == c.audio_token_id:
                    samples, words = next(sounds)
                    self._label(media, media.sound(samples), words)
                else:
                    media.ids.append(token)
        except StopIteration:
            raise ValueError(f"{sample.task}: fewer media than placeholders") from None
        if next(images, None) or next(sounds, None):
            raise ValueError(f"{sample.task}: more media than placeholders")
        return media.example(sample.task, reply)

    def _tokens(self, messages: list[dict[str, Any]], answer: str) -> tuple[list[int], list[int]]:
        """(prompt with one placeholder for each picture and recording, answer with its end of turn)."""
        key = (repr(messages), answer)
        found = self._texts.get(key)
        if found is None:
            if len(self._texts) > 50_000:
                self._texts.clear()
            bos = self.tokenizer.id_to_token(self.config.text.bos_token_id)
            assert bos is not None
            text = self.template.render(messages, bos_token=bos)
            # A prompt ends, and an answer is ended, with a special token: the two encode apart as they do together.
            found = self.tokenizer.encode(text), self.tokenizer.encode(answer + self.end_of_turn)
            self._texts[key] = found
        return found

    def _label(self, media: _MediaArrays, place: range, words: Sequence[str]) -> None:
        if len(words) != len(place):
            raise ValueError(f"{len(words)} dense labels for {len(place)} tokens")
        for token, word in zip(place, words, strict=True):
            if word:
                media.dense.append((token, self._word(word)))

    def _word(self, word: str) -> int:
        """The first token of a word."""
        if word not in self._words:
            self._words[word] = self.tokenizer.encode(word)[0]
        return self._words[word]


class _MediaArrays:
    """The prompt's ids with media expanded, and the arrays beside them, as they grow."""

    def __init__(self, config: ModelConfig, image_tokens: int) -> None:
        self.config, self.image_tokens = config, image_tokens
        self.ids: list[int] = []
        self.dense: list[tuple[int, int]] = []
        self.pictures: list[tuple[range, np.ndarray, np.ndarray]] = []
        self.sounds: list[tuple[range, np.ndarray]] = []

    def picture(self, pixels: np.ndarray) -> range:
        c = self.config
        assert c.vision is not None
        side = c.vision.model_patch_size
        patches = image_patches(pixels, max_soft_tokens=self.image_tokens, patch_size=side)
        place = self._bracket(c.boi_token_id, c.image_token_id, c.eoi_token_id, len(patches.pixels))
        self.pictures.append((place, patches.pixels, patches.positions))
        return place

    def sound(self, samples: np.ndarray) -> range:
        c = self.config
        assert c.audio is not None
        frames = audio_frames(samples, c.audio.audio_samples_per_token)
        place = self._bracket(c.boa_token_id, c.audio_token_id, c.eoa_token_id, len(frames))
        self.sounds.append((place, frames))
        return place

    def _bracket(self, begin: int, mark: int, end: int, length: int) -> range:
        start = len(self.ids) + 1
        self.ids += [begin, *[mark] * length, end]
        return range(start, start + length)

    def example(self, task: str, reply: list[int]) -> Example:
        ids = np.array(self.ids + reply, np.int64)
        blocks = pixels = positions = pixel_index = frames = frame_index = None
        if self.pictures:
            blocks = np.zeros(len(ids), np.int64)
            for number, (place, _, _) in enumerate(self.pictures, start=1):
                blocks[place.start : place.stop] = number
            pixels = np.concatenate([np.rint(p * 255).astype(np.uint8) for _, p, _ in self.pictures])
            positions = np.concatenate([p for _, _, p in self.pictures])
            pixel_index = np.concatenate([np.arange(p.start, p.stop) for p, _, _ in self.pictures])
        if self.sounds:
            frames = np.concatenate([f.astype(np.float16) for _, f in self.sounds])
            frame_index = np.concatenate([np.arange(p.start, p.stop) for p, _ in self.sounds])
        return Example(
            task=task,
            ids=ids,
            answer=len(self.ids),
            blocks=blocks,
            pixels=pixels,
            positions=positions,
            pixel_index=pixel_index,
            frames=frames,
            frame_index=frame_index,
            dense_index=np.array([place for place, _ in self.dense], np.int64),
            dense_labels=np.array([label for _, label in self.dense], np.int64),
        )


@dataclass(frozen=True)
class Layout:
    """The shape of one step: (T, B) of each bucket, shortest first."""

    buckets: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        return sum(length * rows for length, rows in self.buckets)

    @property
    def num_rows(self) -> int:
        return sum(rows for _, rows in self.buckets)

    @cached_property
    def positions(self) -> np.ndarray:
        """int64 [N]: each token's place in its own sequence."""
        return np.concatenate([np.tile(np.arange(length), rows) for length, rows in self.buckets])

    def starts(self) -> Iterator[tuple[int, int]]:
        """(T, first token) of each row, in order."""
        at = 0
        for length, rows in self.buckets:
            for _ in range(rows):
                yield length, at
                at += length


def plan_layout(lengths: Sequence[int], rows: int, buckets: int = 4, multiple: int = 8) -> Layout:
    """The buckets that waste least on sequences of these lengths: their ends by dynamic programming over the lengths
    rounded up to a multiple, their rows in proportion to the share of sequences that falls into each."""
    rounded = np.sort(-(-np.asarray(lengths) // multiple) * multiple)
    ends = np.unique(rounded)
    upto = np.searchsorted(rounded, ends, side="right")  # how many sequences fit each end
    best: list[tuple[float, tuple[int, ...]]] = [
        (float(e * n), (i,)) for i, (e, n) in enumerate(zip(ends, upto, strict=True))
    ]
    answers = [best[-1]]
    for _ in range(1, min(buckets, len(ends))):
        best = [
            min(
                (best[j][0] + float(ends[i] * (upto[i] - upto[j])), (*best[j][1], i)) for j in range(len(best)) if j < i
            )
            if i
            else best[0]
            for i in range(len(ends))
        ]
        answers.append(best[-1])
    cuts = min(answers)[1]
    counts = np.diff([0, *[upto[i] for i in cuts]]) / len(rounded) * rows
    return Layout(tuple((int(ends[i]), max(1, round(float(n)))) for i, n in zip(cuts, counts, strict=True)))


def fill(layout: Layout, draw: Callable[[], Example], carry: list[Example], patience: int = 48) -> list[Example | None]:
    """One example for each row: the smallest bucket with a free row, else a later step (carry, changed in place).

    Examples longer than the longest bucket are left out. A bucket for which nothing of its length turns up is filled
    with shorter ones once `patience` are waiting.
    """
    lengths = [length for length, _ in layout.starts()]
    rows: list[Example | None] = [None] * len(lengths)
    waiting, carry[:] = list(carry), []

    def place(example: Example, upwards: bool) -> bool:
        need = len(example.ids)
        fitting = [
            i for i, (length, row) in enumerate(zip(lengths, rows, strict=True)) if row is None and length >= need
        ]
        shortest = next(length for length in lengths if length >= need)
        if fitting and (upwards or lengths[fitting[0]] == shortest):
            rows[fitting[0]] = example
            return True
        return False

    while waiting or None in rows:
        example = waiting.pop(0) if waiting else draw()
        if len(example.ids) > lengths[-1]:
            continue
        if not place(example, upwards=False):
            carry.append(example)
        if None in rows and len(carry) >= patience:
            carry[:] = [e for e in carry if not place(e, upwards=True)][: patience // 2]
    return rows


Arrays = dict[str, np.ndarray]


def collate(layout: Layout, rows: Sequence[Example | None]) -> Arrays:
    """The arrays of one step. `labels`, `label_index` and `label_kind` [R] name the rows of the flat stream whose
    output is trained, what they should say, and whether they belong to an answer or to media."""
    ids = np.zeros(layout.num_tokens, np.int64)
    blocks = np.zeros(layout.num_tokens, np.int64)
    lists: dict[str, list[np.ndarray]] = {
        key: [] for key in ("pixels", "positions", "pixel_index", "frames", "frame_index")
    }
    label_index, labels, kinds = [], [], []
    for (_, start), e in zip(layout.starts(), rows, strict=True):
        if e is None:
            continue
        ids[start : start + len(e.ids)] = e.ids
        if e.pixels is not None and e.positions is not None and e.pixel_index is not None:
            assert e.blocks is not None
            blocks[start : start + len(e.ids)] = e.blocks
            lists["pixels"].append(e.pixels)
            lists["positions"].append(e.positions)
            lists["pixel_index"].append(e.pixel_index + start)
        if e.frames is not None and e.frame_index is not None:
            lists["frames"].append(e.frames)
            lists["frame_index"].append(e.frame_index + start)
        label_index += [np.arange(e.answer - 1, len(e.ids) - 1) + start, e.dense_index + start]
        labels += [e.ids[e.answer :], e.dense_labels]
        kinds += [np.full(len(e.ids) - e.answer, ANSWER), np.full(len(e.dense_labels), DENSE)]
    arrays = {key: np.concatenate(found) for key, found in lists.items() if found}
    arrays |= {"ids": ids, "blocks": blocks}
    arrays |= {
        "label_index": np.concatenate(label_index),
        "labels": np.concatenate(labels),
        "label_kind": np.concatenate(kinds),
    }
    return arrays


class BucketBatch:
    """One step's batch, in the form `iolite.model` asks for (its `Batch`): a flat stream, attention by bucket."""

    plain = None

    def __init__(self, config: TextConfig, layout: Layout, arrays: Arrays, device: torch.device | str = "cpu") -> None:
        t = {key: torch.from_numpy(value).to(device) for key, value in arrays.items()}
        self.config, self.layout = config, layout
        self.ids = t["ids"]
        self.positions = torch.from_numpy(layout.positions).to(device)
        self.media = Media(
            pixels=t["pixels"].float() * (1 / 255) if "pixels" in t else None,
            positions=t.get("positions"),
            pixel_index=t.get("pixel_index"),
            frames=t["frames"].float() if "frames" in t else None,
            frame_index=t.get("frame_index"),
        )
        self.label_index, self.labels, self.label_kind = t["label_index"], t["labels"], t["label_kind"]
        sliding, full, at = [], [], 0
        for length, rows in layout.buckets:
            blocks = t["blocks"][at : at + length * rows].view(rows, length)
            row = torch.arange(length, device=device)[None]
            full.append(may_look(row, row, None, None, None)[:, None])
            sliding.append(may_look(row, row, blocks, blocks, config.sliding_window)[:, None])
            at += length * rows
        self._sliding = BucketAttention(layout.buckets, tuple(sliding))
        self._full = BucketAttention(layout.buckets, tuple(full))

    def attend(self, layer: int, key_weight: Tensor | None = None) -> Attend:
        return self._full if self.config.is_full(layer) else self._sliding

    def finish(self) -> None:
        pass


@dataclass(frozen=True)
class BucketAttention:
    """Attention inside each row of each bucket; masks[i] is bool [B or 1, 1, T, T], True where a token may look."""

    buckets: tuple[tuple[int, int], ...]
    masks: tuple[Tensor, ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, H, D], k and v [N, K, D] -> [N, H, D]."""
        outs, at = [], 0
        for (length, rows), mask in zip(self.buckets, self.masks, strict=True):
            here = slice(at, at + rows * length)
            shape = (rows, length)
            out = dense_attention(
                q[here].unflatten(0, shape), k[here].unflatten(0, shape), v[here].unflatten(0, shape), mask
            )
            outs.append(out.flatten(0, 1))
            at += rows * length
        return torch.cat(outs)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`kernels.reference.attention` as two batched products: on a CPU, with the short sequences of training, forward
    and backward take about half the time of torch's fused attention with a mask."""
    B, T, H, D = q.shape
    K, S = k.shape[2], k.shape[1]
    group = H // K  # query heads of one key-value head stand together, so that one product serves them all
    q = q.unflatten(2, (K, group)).permute(0, 2, 3, 1, 4).reshape(B * K, group * T, D)
    k = k.permute(0, 2, 3, 1).reshape(B * K, D, S)
    v = v.permute(0, 2, 1, 3).reshape(B * K, S, D)
    scores = torch.bmm(q, k).float().view(B, H, T, S).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).to(v.dtype).view(B * K, group * T, S)
    return torch.bmm(weights, v).view(B, K, group, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


class DirectSource:
    """Batches made in the process itself, each from its own step's dice: a resumed run sees what it would have seen."""

    def __init__(
        self, layout: Layout, draw: Callable[[np.random.Generator, float], Example], seed: Sequence[int] = (0,)
    ) -> None:
        """draw(rng, fraction) makes one example; fraction is the share of the time budget that is spent."""
        self.layout, self.draw, self.seed = layout, draw, tuple(seed)
        self.step = 0

    def start(self, step: int) -> None:
        self.step = step

    def next_batch(self, fraction: float) -> Arrays:
        rng = np.random.default_rng((*self.seed, self.step))
        self.step += 1
        return collate(self.layout, fill(self.layout, lambda: self.draw(rng, fraction), carry=[]))

    def close(self) -> None:
        pass


class Feeder:
    """Batches made a few steps ahead in a process of their own, at low priority.

    Some of the examples are drawn again from the last `memory` ones (`fresh` is the share of new ones): where making an
    example costs much beside training on it, a second look is cheaper than a new one and nearly as good.
    """

    def __init__(
        self,
        layout: Layout,
        make_draw: Callable[[], Callable[[np.random.Generator, float], Example]],
        seed: Sequence[int],
        *,
        ahead: int = 6,
        fresh: float = 1.0,
        memory: int = 4096,
    ) -> None:
        """make_draw is called in the new process, so it must be picklable; see `DirectSource` for what it returns."""
        context = multiprocessing.get_context("spawn")
        self._queue: Any = context.Queue(maxsize=ahead)
        self._fraction = context.Value("d", 0.0)
        self._seed = tuple(seed)
        self._start = lambda step: context.Process(
            target=_feed,
            args=(layout, make_draw, (*self._seed, step), fresh, memory, self._queue, self._fraction),
            daemon=True,
        )
        self._process: Any = None

    def start(self, step: int) -> None:
        self._process = self._start(step)
        self._process.start()

    def next_batch(self, fraction: float) -> Arrays:
        self._fraction.value = fraction
        while True:
            try:
                arrays: Arrays = self._queue.get(timeout=2)
                return arrays
            except queue.Empty:
                if not self._process.is_alive():
                    raise RuntimeError("the process that makes batches has died") from None

    def close(self) -> None:
        self._process.terminate()
        self._process.join()


def _feed(
    layout: Layout,
    make_draw: Callable[[], Callable[[np.random.Generator, float], Example]],
    seed: tuple[int, ...],
    fresh: float,
    memory: int,
    out: Any,
    fraction: Any,
) -> None:
    """The feeder's process: fills the queue until it is terminated or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(2)
    torch.set_num_threads(1)
    out.cancel_join_thread()  # whose wait for a reader would not end when the parent was killed
    draw, rng, parent = make_draw(), np.random.default_rng(seed), os.getppid()
    dice = random.Random(int(rng.integers(1 << 62)))
    kept: list[Example] = []
    carry: list[Example] = []

    def one() -> Example:
        if len(kept) >= memory // 4 and dice.random() >= fresh:
            return kept[dice.randrange(len(kept))]
        example = draw(rng, fraction.value)
        if fresh < 1:
            if len(kept) < memory:
                kept.append(example)
            else:
                kept[dice.randrange(memory)] = example
        return example

    while os.getppid() == parent:
        arrays = collate(layout, fill(layout, one, carry))
        while os.getppid() == parent:
            try:
                out.put(arrays, timeout=5)
                break
            except queue.Full:
                continue
