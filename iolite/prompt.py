"""Messages with media in them become one `Prompt`: the only kind of input that everything below takes.

The order of parts is kept as written. Each picture, video frame and recording becomes a `Span` of placeholder ids with
its raw array beside it. A placeholder without media, and media without a placeholder, are errors: nothing is dropped.

The steps: `iolite.messages` brings both OpenAI's and Transformers' shapes to one, `iolite.documents` makes texts and
pictures of the documents in them, the checkpoint's template renders them, each placeholder in the text is expanded
(FACTS of the family: one picture is boi + n * image + eoi), and the tokenizer turns the whole text into ids, in which
the spans are then found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from iolite.config import ModelConfig, ProcessorConfig
from iolite.documents import open_documents, read_document
from iolite.errors import CheckpointError, MediaError, MessageError, UsageError
from iolite.media.audio import audio_frames, decode_audio
from iolite.media.image import decode_image, image_patches
from iolite.media.limits import DEFAULT_LIMITS, Limits
from iolite.media.video import Video, decode_video, timestamp_text
from iolite.messages import Attachment, check_tools, normalise
from iolite.text.template import ChatTemplate
from iolite.text.tokenizer import Tokenizer

Kind = Literal["image", "video", "audio"]


@dataclass(frozen=True)
class Span:
    """One picture, one video frame or one recording inside a prompt."""

    kind: Kind
    start: int  # index of its first placeholder in Prompt.ids
    length: int  # tokens
    array: np.ndarray  # float32 [length, values of a patch or a frame of sound]
    positions: np.ndarray | None  # int64 [length, 2]: (column, row) of each patch; None for sound
    digest: str  # SHA-256 of the array and its positions: two pictures share ids, never a digest

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Prompt:
    """Token ids with media expanded, the raw media beside them, and the rendered text they came from."""

    ids: list[int]
    text: str
    spans: tuple[Span, ...] = ()

    def blocks(self) -> np.ndarray:
        """int64 [len(ids)]: the number of the picture or video frame (from 1) each token belongs to, 0 for none."""
        blocks = np.zeros(len(self.ids), np.int64)
        for number, span in enumerate((s for s in self.spans if s.kind != "audio"), start=1):
            blocks[span.start : span.stop] = number
        return blocks


@dataclass(frozen=True)
class PromptBuilder:
    """A checkpoint's tokenizer, template and settings, ready to turn messages into prompts."""

    tokenizer: Tokenizer
    template: ChatTemplate
    config: ModelConfig
    processor: ProcessorConfig
    limits: Limits = DEFAULT_LIMITS
    media_root: Path | None = None
    allow_urls: bool = False

    def render(self, messages: str | Sequence[Mapping[str, Any]], **template: Any) -> str:
        """The template's text, placeholders unexpanded. Keywords as in `ChatTemplate.render`."""
        return self._render(self._opened(messages, None)[0], template)

    def build(
        self, messages: str | Sequence[Mapping[str, Any]], *, image_tokens: int | None = None, **template: Any
    ) -> Prompt:
        """The prompt of messages. image_tokens is the budget of each picture that does not name its own.

        Raises MessageError, MediaError or UsageError before any model work is done.
        """
        if image_tokens is not None:
            self.image_budget(image_tokens)  # a wrong number is told of without a picture too
        messages, attachments = self._opened(messages, image_tokens)
        text = self._render(messages, template)
        pieces = [self._expand(a, image_tokens) for a in attachments]
        return self._join(text, attachments, pieces)

    def _opened(
        self, messages: str | Sequence[Mapping[str, Any]], image_tokens: int | None
    ) -> tuple[list[dict[str, Any]], list[Attachment]]:
        """Messages in one shape and their media, among which are no documents any more."""
        drawn = 0

        def open_one(attachment: Attachment) -> Iterator[str | Attachment]:
            nonlocal drawn
            budget = attachment.max_soft_tokens or image_tokens
            for piece in self._document(attachment, budget, self.limits.max_page_pictures - drawn):
                drawn += isinstance(piece, Attachment)
                yield piece

        return open_documents(*normalise(messages), open_one)

    def _document(self, attachment: Attachment, image_tokens: int | None, room: int) -> Iterator[str | Attachment]:
        """The texts of a document, and of its pages at most `room` pictures."""
        if attachment.source is None:
            raise MessageError("a document comes without a path, bytes or data URI")
        document = read_document(attachment.source, **self._where())
        looked_at = document.looked_at(attachment.pages, self.config.vision is not None, self.limits)
        if len(looked_at) > room:
            most = self.limits.max_page_pictures
            raise MediaError(f"of all PDFs together {most} pages may be pictures", "ask about fewer at once")
        pictures: Iterator[np.ndarray] = iter(())
        budget = None
        if looked_at:
            budget = self.image_budget(image_tokens)
            assert self.config.vision is not None
            patch_size = self.config.vision.model_patch_size
            pictures = document.pictures(looked_at, budget, patch_size, self.limits)
        for piece in document.layout(attachment.name, looked_at):
            yield piece if isinstance(piece, str) else Attachment("image", next(pictures), max_soft_tokens=budget)

    def _render(self, messages: list[dict[str, Any]], template: Mapping[str, Any]) -> str:
        check_tools(template.get("tools"))
        return self.template.render(messages, bos_token=self._token(self.config.text.bos_token_id), **template)

    def _join(self, text: str, attachments: Sequence[Attachment], pieces: list[tuple[str, list[Span]]]) -> Prompt:
        marks = {f"<|{kind}|>": kind for kind in ("image", "audio", "video")}
        parts = _split(text, tuple(marks))
        found = [marks[p] for p in parts if p in marks]
        wanted = [a.kind for a in attachments]
        if found != wanted:
            raise MessageError(
                f"the text holds {len(found)} media placeholders ({', '.join(found) or 'none'}) for {len(wanted)} "
                f"attached media ({', '.join(wanted) or 'none'})",
                "attach each picture, recording or video as a part of a message; do not write <|image|> yourself",
            )
        replacements = iter(pieces)
        spans: list[Span] = []
        expanded: list[str] = []
        for part in parts:
            if part in marks:
                part, own_spans = next(replacements)
                spans += own_spans
            expanded.append(part)
        ids = self.tokenizer.encode("".join(expanded))
        return Prompt(ids, text, self._place(ids, spans))

    def _place(self, ids: list[int], spans: Sequence[Span]) -> tuple[Span, ...]:
        """Finds where each span's run of placeholder ids begins."""
        placed, at = [], 0
        for span in spans:
            token = self._token_ids(span.kind)[1]
            at = ids.index(token, at) if token in ids[at:] else len(ids)
            if ids[at : at + span.length] != [token] * span.length:
                raise CheckpointError(
                    f"the tokenizer does not read {self._token(token)!r} as the id {token} of config.json"
                )
            placed.append(Span(span.kind, at, span.length, span.array, span.positions, span.digest))
            at += span.length
        return tuple(placed)

    def _expand(self, attachment: Attachment, image_tokens: int | None) -> tuple[str, list[Span]]:
        """The text that stands for one attachment, and its spans (not yet placed)."""
        if attachment.kind not in self.config.modalities:
            raise MediaError(
                f"this model cannot take {attachment.kind}: its checkpoint has no weights for it",
                f"it takes {', '.join(self.config.modalities)}",
            )
        if attachment.source is None:
            raise MessageError(f"a part of type {attachment.kind!r} comes without a path, bytes, data URI or array")
        where = self._where()
        if attachment.kind == "audio":
            samples = decode_audio(attachment.source, sampling_rate_in=attachment.sampling_rate, **where)
            return self._sound(samples)
        if attachment.kind == "image":
            budget = self.image_budget(attachment.max_soft_tokens or image_tokens)
            return self._picture(decode_image(attachment.source, **where), "image", budget)
        video = decode_video(
            attachment.source,
            num_frames=attachment.num_frames or self.processor.num_frames,
            fps=attachment.fps,
            **where,
        )
        budget = attachment.max_soft_tokens or self.processor.video_max_soft_tokens
        hear = attachment.sound and self.config.audio is not None
        return self._video(video, self._budget("max_soft_tokens of a video", budget), hear)

    def _where(self) -> dict[str, Any]:
        return {"limits": self.limits, "media_root": self.media_root, "allow_urls": self.allow_urls}

    def image_budget(self, asked: int | None) -> int:
        """The most tokens that one picture becomes; UsageError for a number that this checkpoint does not know."""
        return self._budget("image_tokens", self.processor.image_max_soft_tokens if asked is None else asked)

    def _budget(self, name: str, budget: int) -> int:
        if self.config.vision is None:
            raise UsageError(f"{name} is given, but this model cannot take pictures", "leave it out")
        allowed = self.processor.image_budgets
        if allowed is not None and budget not in allowed:
            raise UsageError(f"{name} must be one of {', '.join(map(str, allowed))}, not {budget}")
        most = self.config.vision.mm_posemb_size  # a picture may be one row of so many patches
        if type(budget) is not int or not 1 <= budget <= most:
            raise UsageError(f"{name} must be from 1 to {most}, not {budget}")
        return budget

    def _token_ids(self, kind: Kind) -> tuple[int, int, int]:
        """(begin, placeholder, end). A video frame has a picture's begin and end."""
        c = self.config
        if kind == "audio":
            return c.boa_token_id, c.audio_token_id, c.eoa_token_id
        return c.boi_token_id, c.image_token_id if kind == "image" else c.video_token_id, c.eoi_token_id

    def _bracket(self, kind: Kind, length: int) -> str:
        begin, mark, end = (self._token(i) for i in self._token_ids(kind))
        return begin + mark * length + end

    def _token(self, token_id: int) -> str:
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            raise CheckpointError(f"config.json names the token {token_id}, which the tokenizer does not have")
        return token

    def _picture(self, pixels: np.ndarray, kind: Kind, budget: int) -> tuple[str, list[Span]]:
        assert self.config.vision is not None
        patches = image_patches(pixels, max_soft_tokens=budget, patch_size=self.config.vision.model_patch_size)
        n = len(patches.pixels)
        span = Span(kind, 0, n, patches.pixels, patches.positions, _digest(kind, patches.pixels, patches.positions))
        return self._bracket(kind, n), [span]

    def _sound(self, samples: np.ndarray) -> tuple[str, list[Span]]:
        frames = audio_frames(samples, self.processor.audio_samples_per_token)
        return self._bracket("audio", len(frames)), [sound_span(frames)]

    def _video(self, video: Video, budget: int, sound: bool) -> tuple[str, list[Span]]:
        """Stamped frames as in the reference, then, if asked for, the whole sound track as one recording."""
        texts, spans = [], []
        for frame, seconds in zip(video.frames, video.timestamps, strict=True):
            text, (span,) = self._picture(frame, "video", budget)
            texts.append(f"{timestamp_text(seconds)} {text}")
            spans.append(span)
        if sound and video.audio is not None:
            text, own = self._sound(video.audio)
            texts.append(text)
            spans += own
        return " ".join(texts), spans


def sound_span(frames: np.ndarray, start: int = 0) -> Span:
    """The span of a recording: float32 frames [n, samples of a token], whose placeholders begin at start."""
    return Span("audio", start, len(frames), frames, None, _digest("audio", frames, None))


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raises CheckpointError when tokenizer.json and config.json are not of one model: ids beyond the vocabulary, or
    other ids for the tokens that begin a text and stand for media."""
    size = config.text.vocab_size
    if tokenizer.vocab_size > size:
        raise CheckpointError(f"tokenizer.json has {tokenizer.vocab_size} tokens, but config.json has {size}")
    named = {"<bos>": config.text.bos_token_id}
    if config.vision:
        named |= {"<|image>": config.boi_token_id, "<|image|>": config.image_token_id}
        named |= {"<image|>": config.eoi_token_id, "<|video|>": config.video_token_id}
    if config.audio:
        named |= {"<|audio>": config.boa_token_id, "<|audio|>": config.audio_token_id}
        named |= {"<audio|>": config.eoa_token_id}
    for token, told in named.items():
        found = tokenizer.token_id(token)
        if found != told:
            raise CheckpointError(
                f"config.json says that {token} is token {told}, but tokenizer.json has it as {found}"
            )


def _split(text: str, marks: tuple[str, ...]) -> list[str]:
    """text cut before and after each mark."""
    parts, rest = [], text
    while rest:
        at, mark = min(((rest.find(m), m) for m in marks if m in rest), default=(len(rest), ""))
        parts += [p for p in (rest[:at], mark) if p]
        rest = rest[at + len(mark) :]
    return parts


def _digest(kind: Kind, array: np.ndarray, positions: np.ndarray | None) -> str:
    digest = hashlib.sha256(f"{kind} {array.shape} {array.dtype}".encode())
    digest.update(array.tobytes())
    if positions is not None:
        digest.update(positions.tobytes())
    return digest.hexdigest()
