"""One sequence from prompt to end: prefill in chunks, then a token a pass, or as many as a `Speculator` gets right.

The slow obvious path: one cache, one sequence. What one call has read, a later one need not read again, if both are
given the same `PrefixCache`. `iolite/engine` is checked against it. Knows ids only; text, thoughts and tool calls are
made of them in `iolite/generate/model.py`.

Letters: M hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from iolite.cache import KVCache
from iolite.errors import ContextError, UsageError
from iolite.generate.continuation import Continuation
from iolite.generate.costs import MOST_DRAFTS
from iolite.generate.grammar import Constraint
from iolite.generate.logprobs import Logprobs
from iolite.generate.passes import Passes, check_numbers
from iolite.generate.reply import Drafting
from iolite.generate.sampling import Sampler, SamplingParams
from iolite.generate.speculative import Speculator
from iolite.model.batch import Media, RaggedBatch, Segment
from iolite.model.prefill import DEFAULT_CHUNK, prefill
from iolite.model.unified import Unified
from iolite.prefix.memory import Lease, PrefixCache
from iolite.prompt import Prompt

Progress = Callable[[int, int], None]
"""Called with (tokens of the prompt done, tokens in all) after every chunk."""


def check_fits(prompt: Prompt, context: int) -> None:
    """ContextError when the prompt leaves no room for one token of an answer; UsageError when it is empty."""
    if not prompt.ids:
        raise UsageError("the prompt has no tokens")
    if len(prompt.ids) >= context:
        raise ContextError(
            f"the prompt has {len(prompt.ids)} tokens and the context is {context}",
            "shorten it, use fewer or smaller media, or load the model with a larger context",
        )


@torch.inference_mode()
def advance(network: Unified, token: int, cache: KVCache) -> Tensor:
    """Hidden state [1, M] of one token that continues the cache's sequence."""
    device = network.language_model.embed_tokens.weight.device
    batch = RaggedBatch(network.config.text, [Segment(cache, 1)], Media(), device)
    hidden: Tensor = network(torch.tensor([token], device=device), batch)
    return hidden


@torch.no_grad()
def prompt_logits(
    network: Unified, prompt: Prompt, kv_dtype: torch.dtype | None = None, chunk: int = DEFAULT_CHUNK
) -> Tensor:
    """Float32 scores [len(prompt.ids), V] of the token after each position, by the passes that generation makes."""
    cache = KVCache(network.config.text, len(prompt.ids), kv_dtype)
    device = network.language_model.embed_tokens.weight.device
    # Made outside inference mode, so that the caller may do with it as with any tensor.
    scores, done = torch.empty(len(prompt.ids), network.config.text.vocab_size, device=device), 0
    for hidden in prefill(network, prompt, cache, chunk_size=chunk):
        scores[done : done + len(hidden)] = network.logits(hidden)
        done += len(hidden)
    return scores


@dataclass(frozen=True)
class Drawn:
    """One token, why it is the last one ("stop", "length", or None while the answer goes on), and how likely it was,
    where that is asked for."""

    id: int
    finish_reason: str | None
    logprobs: Logprobs | None = None


class Decoding:
    """Iterates once over the tokens of one answer, the end token included, and keeps its own time.

    Time spent by the consumer between two tokens is not counted. Closing the iterator early is fine, and so is Ctrl+C:
    what was read by then is kept.
    """

    def __init__(
        self,
        network: Unified,
        prompt: Prompt,
        params: SamplingParams,
        *,
        context: int,
        chunk: int = DEFAULT_CHUNK,
        kv_dtype: torch.dtype | None = None,
        progress: Progress | None = None,
        prefixes: PrefixCache | None = None,
        speculator: Speculator | None = None,
        drafts: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """prefixes: where to look for what was read before, and to leave what is read now; its caches are used as they
        are. Without it the whole prompt is read, into a cache of kv_dtype that nobody sees again. speculator: draws
        several tokens in a pass where that pays, the same ones; drafts: how many it proposes, None: as many as pay.
        constraint: what the answer must look like; it serves one answer."""
        check_fits(prompt, context)
        self.network, self.prompt, self.params, self.progress = network, prompt, params, progress
        self.speculator, self.drafts = (None if drafts == 0 else speculator), drafts
        self.constraint = constraint
        self.chunk = chunk
        self.limit = min(params.max_tokens, context - len(prompt.ids))
        if prefixes is None:
            prefixes = PrefixCache(lambda: KVCache(network.config.text, context, kv_dtype), 0)
        self.prefixes = prefixes
        self.prefill_seconds = 0.0  # up to and including the first token
        self.decode_seconds = 0.0
        self.count = 0
        self.cached_tokens = 0  # of the prompt, that were read before
        self.drafting: Drafting | None = None  # how that went

    def __iter__(self) -> Iterator[Drawn]:
        sampler, ids = Sampler(self.params, self.constraint), list(self.prompt.ids)
        begin = time.perf_counter()
        with self.prefixes.lend(self.prompt, ids) as lease:
            self.cached_tokens = lease.reused
            sequence = Continuation(lease.cache, ids, sampler, self.params.stop_ids, self.limit, self.drafts)
            if self.speculator:
                self.drafting = sequence.drafting
            rounds, took = self._rounds(sequence, lease), 0.0
            for tokens in rounds:
                took = time.perf_counter() - begin
                if self.count == 0:
                    self.prefill_seconds = took
                else:
                    self.decode_seconds += took
                for token, logprobs in zip(tokens, sequence.logprobs, strict=True):
                    self.count += 1
                    reason = self._finish_reason(token)
                    yield Drawn(token, reason, logprobs)
                    if reason:
                        return
                begin = time.perf_counter()

    @torch.inference_mode()
    def _rounds(self, sequence: Continuation, lease: Lease) -> Iterator[list[int]]:
        """What every pass draws: one token after the prefill, then one or more."""
        run = Passes(self.network)
        hidden = self._read(lease)
        logits = self.network.logits(hidden)
        check_numbers(logits)
        yield sequence.take((), hidden, logits)
        while True:
            lease.before_pass(1 + MOST_DRAFTS)
            if self.speculator:
                yield self.speculator.round(run, [sequence])[0]
            else:
                yield sequence.take((), *run([lease.cache], [sequence.ids[-1:]]))

    def _read(self, lease: Lease) -> Tensor:
        """Reads what is new of the prompt; hidden state [1, M] of its last token."""
        # A picture is read in one pass, however large.
        most = max([DEFAULT_CHUNK, *(span.length for span in self.prompt.spans)])
        lease.before_pass(most)
        for hidden in prefill(self.network, self.prompt, lease.cache, chunk_size=self.chunk, progress=self.progress):
            last = hidden[-1:]
            lease.before_pass(most)
        return last

    def _finish_reason(self, token: int) -> str | None:
        if token in self.params.stop_ids:
            return "stop"
        return "length" if self.count == self.limit else None


class StopStrings:
    """Ends a text at the first of several strings, which may begin in one token and end in another.

    What could be the beginning of a stop string is held back until it is known not to be one, so no part of a stop
    string is ever handed out.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.held = ""
        self.found = False
        self.match: str | None = None  # which one it was

    def push(self, text: str) -> str:
        """More text comes in, what is safe to show comes out; after a stop string was found, nothing does."""
        if self.found or not self.stops:
            return "" if self.found else text
        text = self.held + text
        starts = [(at, stop) for at, stop in ((text.find(stop), stop) for stop in self.stops) if at >= 0]
        if starts:
            self.found, self.held = True, ""
            at, self.match = min(starts)
            return text[:at]
        keep = max(self._overlap(text, stop) for stop in self.stops)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when the text has ended without a stop string."""
        held, self.held = self.held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of text that begins stop."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
