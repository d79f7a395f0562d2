"""What drafting brings: tokens per second against plain decoding, in turns.

    python bench/mtp.py MODEL --drafter DRAFTER [--acceptance 0,0.5,0.7,0.9] [--tokens 64] [--repeat 7]
    python bench/mtp.py nano --drafter auto --questions 60
    python bench/mtp.py --llama MODEL.gguf DRAFTER.gguf [--drafts 3] [--repeat 2]

For a model of random weights no drafter guesses anything, so acceptance is set: the drafter works for every guess as
always, and what it guessed is replaced by the token that the model is known to draw there, or, as often as the
acceptance says, by a wrong one. A guess counts as accepted with that probability if those before it were; so it is for
llama.cpp, whose server can be told to accept by chance.

    drafted     the drafter runs, and how many guesses to make is iolite's own choice at every step
    replayed    the model's own tokens are proposed at no cost, always as many; beside what passes of that size allow:
                (K + 1) tokens in the time of a pass of K + 1, both measured in the same turn

With --questions a real model answers real questions, with its real drafter. Every turn begins with plain decoding, and
shares are taken within a turn.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from llama_mtp import Server
from llama_mtp import Settings as LlamaSettings
from torch import Tensor

import iolite
from iolite.cache import KVCache
from iolite.evals.machine import hardware, physical_cores
from iolite.evals.speed import Spread
from iolite.generate.continuation import Continuation
from iolite.generate.loop import Decoding
from iolite.generate.model import Model
from iolite.generate.passes import Passes
from iolite.generate.sampling import SamplingParams
from iolite.generate.speculative import Proposal, Speculator
from iolite.model.drafter import Chains
from iolite.model.unified import Unified
from iolite.prompt import Prompt

REPLAYED = (3, 7)  # drafts of a round, all right
HEAD = "| drafts | tokens/s | × plain | drafts a pass | tokens a pass | |\n|---|---|---|---|---|---|"


class Replayed(Speculator):
    """Knows the answer. The drafter works, and what it says is replaced."""

    def __init__(self, base: Speculator, answer: Sequence[int], acceptance: float) -> None:
        """answer: the prompt's ids and those behind it."""
        super().__init__(base.network, base.costs, base.drafter, copies=False)
        self.answer, self.acceptance_set, self.random = answer, acceptance, random.Random(0)

    def chains(self, sequences: Sequence[Continuation]) -> Chains:
        (sequence,) = sequences
        return _ReplayedChains(super().chains(sequences), self, len(sequence.ids))  # type: ignore[return-value]

    def right(self, at: int) -> bool:
        return at < len(self.answer) and self.random.random() < self.acceptance_set


class _ReplayedChains:
    def __init__(self, real: Chains, replayed: Replayed, at: int) -> None:
        self.real, self.replayed, self.at = real, replayed, at

    def step(self) -> tuple[Tensor, Tensor]:
        _, probabilities = self.real.step()
        known, at = self.replayed.answer, self.at
        self.at += 1
        token = known[at] if at < len(known) else 0
        if not self.replayed.right(at):
            token = (token + 1) % self.replayed.network.config.text.vocab_size
        # A drafter of random weights is not sure of anything; one that is right so often would be this sure.
        return torch.tensor([token]), torch.full_like(probabilities, self.replayed.acceptance_set)

    def keep(self, rows: Sequence[int]) -> None:
        pass


class Free(Speculator):
    """Proposes the answer itself, at no cost."""

    def __init__(self, base: Speculator, answer: Sequence[int]) -> None:
        super().__init__(base.network, base.costs)
        self.answer = answer

    def propose(self, sequences: Sequence[Continuation]) -> list[Proposal]:
        (sequence,) = sequences
        start, proposal = len(sequence.ids), Proposal()
        for token in self.answer[start : start + min(sequence.drafts or 0, sequence.left - 1)]:
            proposal.add(token, 1.0)
        return [proposal]


@dataclass
class Row:
    """Samples of one way to draw."""

    seconds: list[float] = field(default_factory=list)  # a token
    ratios: list[float] = field(default_factory=list)  # of plain decoding's in the same turn
    allowed: list[float] = field(default_factory=list)
    passes: int = 0
    drafted: int = 0
    tokens: int = 0
    same: bool = True  # as plain decoding's tokens

    def add(self, seconds: float, plain_seconds: float) -> None:
        """A sample: seconds a token, and of plain decoding in the same turn."""
        self.seconds.append(seconds)
        self.ratios.append(plain_seconds / seconds)

    def count(self, drawn: Drawn, expected: Sequence[int]) -> None:
        self.same &= drawn.ids == list(expected)
        if how := drawn.decoding.drafting:
            self.passes += how.passes
            self.drafted += how.drafted
            self.tokens += how.tokens

    def line(self, name: str) -> str:
        rate, ratio = Spread.of(1 / s for s in self.seconds), Spread.of(self.ratios)
        note = "" if self.same else "other tokens than plain decoding"
        if self.allowed:
            share = Spread.of(100 * a / b for a, b in zip(self.ratios, self.allowed, strict=True))
            note = f"passes allow × {Spread.of(self.allowed)}: {share} % of it{'; ' * bool(note)}{note}"
        passes = max(1, self.passes)
        drafts = f"{self.drafted / passes:.2f} | {self.tokens / passes:.2f}" if self.passes else "– | 1.00"
        return f"| {name} | {rate} | {ratio} | {drafts} | {note} |"


@dataclass
class Drawn:
    """An answer: the prompt's ids and those behind it, and how it went."""

    ids: list[int]
    decoding: Decoding

    @property
    def seconds(self) -> float:
        """A token, but for the first."""
        return self.decoding.decode_seconds / (self.decoding.count - 1)


def draw(
    model: Model,
    prompt: Prompt,
    params: SamplingParams,
    speculator: Speculator | None = None,
    drafts: int | None = None,
) -> Drawn:
    decoding = Decoding(
        model.network,
        prompt,
        params,
        context=model.context,
        chunk=model.chunk,
        prefixes=model.prefixes,
        speculator=speculator,
        drafts=drafts,
    )
    return Drawn([*prompt.ids, *(token.id for token in decoding)], decoding)


def pass_seconds(network: Unified, kv_dtype: torch.dtype | None, counts: Sequence[int]) -> list[float]:
    """Of a pass of each number of tokens, the mean of three."""
    cache, run, found = KVCache(network.config.text, 256, kv_dtype), Passes(network), []
    run([cache], [[5] * 16])
    for count in counts:
        begin = time.perf_counter()
        for _ in range(3):
            run([cache], [[5] * count])
            cache.rewind(16)
        found.append((time.perf_counter() - begin) / 3)
    return found


def set_acceptance(model: Model, acceptances: Sequence[float], tokens: int, repeat: int) -> Iterator[str]:
    """The rows of a model whose answers are replayed."""
    base = model.speculator
    assert base is not None and base.drafter is not None, "a drafter is needed"
    rng = random.Random(0)
    prompt = Prompt([rng.randrange(3, model.config.text.vocab_size) for _ in range(16)], "")
    params = SamplingParams(temperature=0, max_tokens=tokens)
    expected = draw(model, prompt, params).ids
    drafted = {a: Replayed(base, expected, a) for a in acceptances}
    rows: dict[str, Row] = {}

    def sample(name: str, speculator: Speculator | None, drafts: int | None, plain: float | None) -> float:
        drawn, row = draw(model, prompt, params, speculator, drafts), rows.setdefault(name, Row())
        row.add(drawn.seconds, plain or drawn.seconds)
        row.count(drawn, expected)
        return drawn.seconds

    for turn in range(repeat):
        plain = sample("plain", None, None, None)
        for acceptance, speculator in drafted.items():
            sample(f"drafted, acceptance {acceptance:g}", speculator, None, plain)
        for drafts in REPLAYED:
            name = f"replayed, {drafts} at a time"
            one, more = pass_seconds(model.network, model.kv_dtype, (1, drafts + 1))
            sample(name, Free(base, expected), drafts, draw(model, prompt, params).seconds)
            rounds = -(-(tokens - 1) // (drafts + 1))  # the last has fewer tokens to draw
            rows[name].allowed.append((tokens - 1) * one / (rounds * more))
        print(f"turn {turn + 1}: plain {1 / plain:.2f} tokens/s", file=sys.stderr, flush=True)
    for name, row in rows.items():
        yield row.line(name)


def questions(model: Model, count: int, repeat: int) -> Iterator[str]:
    """The rows of a real model that answers questions about held-out pictures and sounds, and chats."""
    from iolite.evals.nano import NAMES, default_store, open_store
    from iolite.evals.nano import questions as asked

    store = open_store(default_store())
    each = max(1, count // len(NAMES))
    prompts = [model.prompt(q.messages) for task in NAMES for q in asked(store, task, each)]
    ways: dict[str, tuple[Speculator | None, int | None]] = {"plain": (None, None)}
    if model.speculator:
        ways["drafter and copies, as many as pay"] = (model.speculator, None)
        ways |= {f"drafter, {k} at a time": (model.speculator, k) for k in (1, 2, 4)}
    rows: dict[str, Row] = {name: Row() for name in ways}
    expected: dict[int, list[int]] = {}
    params = model.sampling(max_tokens=64)
    for _ in range(repeat):
        plain = 0.0
        for name, (speculator, drafts) in ways.items():
            seconds, tokens = 0.0, 0
            for i, prompt in enumerate(prompts):
                drawn = draw(model, prompt, params, speculator, drafts)
                rows[name].count(drawn, expected.setdefault(i, drawn.ids))
                seconds += drawn.decoding.decode_seconds
                tokens += drawn.decoding.count - 1
            plain = plain or seconds / tokens
            rows[name].add(seconds / tokens, plain)
    for name, row in rows.items():
        yield row.line(name)


def llama(
    model: str, drafter: str, acceptances: Sequence[float], drafts: int, tokens: int, repeat: int
) -> Iterator[str]:
    """llama.cpp's rows: its server is started anew for each, plain first in every turn."""
    rows: dict[str, Row] = {}
    prompt = [2, *range(1000, 1015)]
    for _ in range(repeat):
        plain = 0.0
        for acceptance in (None, *acceptances):
            name = "plain" if acceptance is None else f"{drafts} drafted, acceptance {acceptance:g}"
            row = rows.setdefault(f"llama.cpp: {name}", Row())
            number = 0 if acceptance is None else drafts
            settings = LlamaSettings(model, drafter, number, acceptance, threads=physical_cores(), context=512)
            with Server(settings) as server:
                server.answer(prompt, 4)
                answer = server.answer(prompt, tokens, seed=1)
            plain = plain or 1 / answer.rate
            row.add(1 / answer.rate, plain)
            if number:
                row.passes += answer.passes
                row.drafted += answer.drafted
                row.tokens += tokens - 1
            print(f"{name}: {answer.rate:.2f} tokens/s", file=sys.stderr, flush=True)
    for name, row in rows.items():
        yield row.line(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--acceptance", default="0,0.5,0.7,0.9", help="set acceptances")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--questions", type=int, help="ask that many real questions instead")
    parser.add_argument("--llama", nargs=2, metavar="FILE", help="a GGUF model and its GGUF drafter")
    parser.add_argument("--drafts", type=int, default=3, help="of llama.cpp, whose kernels take rows by fours")
    arguments = parser.parse_args()
    acceptances = [float(text) for text in arguments.acceptance.split(",")]
    print(json.dumps(hardware()), file=sys.stderr)
    lines: Callable[[], Iterator[str]]
    if arguments.llama:
        lines = lambda: llama(*arguments.llama, acceptances, arguments.drafts, arguments.tokens, arguments.repeat)  # noqa: E731
    elif arguments.model is None:
        parser.error("name a model, or --llama")
    else:
        model = iolite.load(arguments.model, drafter=arguments.drafter)
        print(model.drafting, file=sys.stderr)
        if arguments.questions:
            lines = lambda: questions(model, arguments.questions, arguments.repeat)  # noqa: E731
        else:
            lines = lambda: set_acceptance(model, acceptances, arguments.tokens, arguments.repeat)  # noqa: E731
    print(HEAD)
    for line in lines():
        print(line, flush=True)


if __name__ == "__main__":
    main()
