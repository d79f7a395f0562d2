"""Going on with plain text: nothing in the prompt or the answer is taken for a turn, a thought or a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from iolite.errors import MessageError, UsageError
from iolite.generate.logprobs import ScoredDelta, Scores
from iolite.generate.loop import StopStrings
from iolite.generate.model import Model
from iolite.generate.reply import Reply, Timings, TokenLogprobs, Usage, explain
from iolite.generate.stream import Drawing
from iolite.prompt import Prompt
from iolite.text.stream import ContentDelta, TokenStream
from iolite.text.tokenizer import Tokenizer


def plain_prompt(model: Model, text: str | Sequence[int]) -> Prompt:
    """The prompt that a text, or its ids, is by itself; the token that every text begins with is added where it is not
    there. Raises UsageError for ids outside the vocabulary, MessageError for placeholders of media."""
    config = model.config
    first = config.text.bos_token_id
    if isinstance(text, str):
        bos = model.tokenizer.id_to_token(first) or ""
        text = text if text.startswith(bos) else bos + text
        ids = model.tokenizer.encode(text)
    else:
        ids = list(text) if text and text[0] == first else [first, *text]
        if max(ids) >= config.text.vocab_size:
            raise UsageError("a token id is outside the vocabulary", f"there are {config.text.vocab_size}")
    if {config.image_token_id, config.audio_token_id, config.video_token_id} & set(ids):
        raise MessageError("the text holds a placeholder of media", "media come with messages")
    return Prompt(ids, text if isinstance(text, str) else "")


class PlainStream:
    """Iterates once over the text of one answer, special tokens spelled out; then `reply` is there.

    ends: its logprobs are those of all tokens that were drawn, also of an end token and of others without a text.
    """

    def __init__(
        self, decoding: Drawing, tokenizer: Tokenizer, prepare_seconds: float = 0.0, ends: bool = False
    ) -> None:
        self._drawn: list[TokenLogprobs] | None = [] if ends else None
        self._decoding, self._tokenizer, self._prepare_seconds = decoding, tokenizer, prepare_seconds
        self._scores = None if decoding.params.logprobs is None else Scores()
        self._text: list[str] = []
        self._reason = "stop"
        self.stopped_by: str | None = None  # a stop string

    def __iter__(self) -> Iterator[ContentDelta]:
        text, stops = TokenStream(self._tokenizer), StopStrings(self._decoding.params.stop)
        for drawn in self._decoding:
            self._reason = drawn.finish_reason or "stop"
            if self._drawn is not None and drawn.logprobs:
                self._drawn.append(drawn.logprobs.spelled(drawn.id, self._tokenizer))
            if drawn.id not in self._decoding.params.stop_ids:
                came = text.push(drawn.id)
                if self._scores and drawn.logprobs:
                    self._scores.came(came, drawn.logprobs.spelled(drawn.id, self._tokenizer))
                yield from self._show(stops.push(came))
            if stops.found:
                self._reason, self.stopped_by = "stop", stops.match
                return
        yield from self._show(stops.push(text.flush()) + stops.flush())

    def _show(self, text: str) -> Iterator[ContentDelta]:
        if text:
            self._text.append(text)
            yield ScoredDelta(text, self._scores.shown(text)) if self._scores else ContentDelta(text)

    @property
    def reply(self) -> Reply:
        """The whole answer, once the iteration is over."""
        run, prompt_tokens, text = self._decoding, len(self._decoding.prompt.ids), "".join(self._text)
        cached = run.cached_tokens
        times = self._prepare_seconds, run.prefill_seconds, run.decode_seconds
        return Reply(
            text=text,
            reasoning="",
            finish_reason=self._reason,
            usage=Usage(prompt_tokens, run.count, 0, cached),
            timings=Timings(*times, prompt_tokens, run.count, cached, run.drafting),
            notice=explain(text, self._reason, [], "", run.count),
            logprobs=self._logprobs(),
        )

    def _logprobs(self) -> list[TokenLogprobs] | None:
        if self._scores is None:
            return None
        return self._scores.told if self._drawn is None or self.stopped_by else self._drawn
