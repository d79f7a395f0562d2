"""An answer that is plain text: nothing in it is taken for a thought or a call."""

from __future__ import annotations

from collections.abc import Iterator

from iolite.generate.logprobs import ScoredDelta, Scores
from iolite.generate.loop import StopStrings
from iolite.generate.reply import Reply, Timings, Usage, explain
from iolite.generate.stream import Drawing
from iolite.text.stream import ContentDelta, TokenStream
from iolite.text.tokenizer import Tokenizer


class PlainStream:
    """Iterates once over the text of one answer, special tokens spelled out; then `reply` is there."""

    def __init__(self, decoding: Drawing, tokenizer: Tokenizer, prepare_seconds: float = 0.0) -> None:
        self._decoding, self._tokenizer, self._prepare_seconds = decoding, tokenizer, prepare_seconds
        self._scores = None if decoding.params.logprobs is None else Scores()
        self._text: list[str] = []
        self._reason = "stop"
        self.stopped_by: str | None = None  # a stop string

    def __iter__(self) -> Iterator[ContentDelta]:
        text, stops = TokenStream(self._tokenizer), StopStrings(self._decoding.params.stop)
        for drawn in self._decoding:
            self._reason = drawn.finish_reason or "stop"
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
            logprobs=self._scores.told if self._scores else None,
        )
