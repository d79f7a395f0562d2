"""One step of the engine: a pass over the newest tokens of those who draw and chunks of the prompts of others.

What goes wrong with one sequence ends that one. A pass that breaks is repeated for each of its sequences by itself, to
see whose fault it was; a cache that the broken pass may have damaged is read again.

Letters: M hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch
from torch import Tensor

from iolite.cache import KVCache
from iolite.engine.pace import Pace
from iolite.engine.sequence import Sequence
from iolite.generate.costs import MOST_DRAFTS
from iolite.generate.passes import are_numbers, check_numbers
from iolite.generate.speculative import Proposal, Speculator
from iolite.kernels.threads import MUCH, threads
from iolite.model.batch import RaggedBatch
from iolite.model.unified import Unified
from iolite.prefix.memory import PrefixCache
from iolite.prompt import Prompt

_MOST_RESTARTS = 1


@dataclass
class Turn:
    """What a pass does for one sequence."""

    sequence: Sequence
    part: Prompt  # a chunk of its prompt, or its newest token and drafts
    scored: int  # of how many of the last tokens the scores are wanted
    proposal: Proposal | None = None  # None: it reads its prompt
    found: tuple[Tensor, Tensor] | None = None  # hidden states [scored, M] and scores [scored, V]
    sound: bool = True  # all the pass's scores are numbers; else those of each turn are looked at

    @property
    def cache(self) -> KVCache:
        return self.sequence.lease.cache


@dataclass
class Done:
    """What came of a step."""

    drawn: list[tuple[Sequence, list[int]]] = field(default_factory=list)
    failed: list[tuple[Sequence, Exception]] = field(default_factory=list)
    read: int = 0  # tokens of prompts


class Step:
    """Runs steps with one model; holds no sequence between them."""

    def __init__(self, network: Unified, prefixes: PrefixCache, speculator: Speculator | None, pace: Pace) -> None:
        self.network, self.prefixes, self.speculator, self.pace = network, prefixes, speculator, pace
        self.device = network.language_model.embed_tokens.weight.device
        self._threads = torch.get_num_threads()
        self._floats = sum(weight.numel() for weight in network.parameters())  # packed ones are the kernels' affair

    @torch.inference_mode()
    def __call__(self, drawing: Items[Sequence], share: Callable[[int], list[tuple[Sequence, int]]]) -> Done:
        """Draws on in every sequence of `drawing`; share(most) says whose prompts are read on, and by how much."""
        with threads(1):
            return self._go(drawing, share)

    def _go(self, drawing: Items[Sequence], share: Callable[[int], list[tuple[Sequence, int]]]) -> Done:
        begin, done = time.perf_counter(), Done()
        turns = list(self._draw(drawing, done))
        computed = sum(turn.scored for turn in turns)
        turns += self._read(share(self.pace.tokens(computed)))
        if not turns:
            return done
        contexts = [turn.cache.length for turn in turns]
        proposed = time.perf_counter()
        self._run(turns, done)
        ended = time.perf_counter()
        done.read = sum(len(turn.part.ids) for turn in turns if turn.proposal is None)
        self.pace.saw(computed, done.read, ended - proposed)
        costs = self.speculator.costs if self.speculator else None
        seconds = plain = 0.0
        if costs and not done.read:  # else the step says nothing about drafts
            seconds, plain = ended - begin, costs.of_pass([1] * len(turns), contexts)
            costs.saw([turn.scored for turn in turns], contexts, ended - proposed)
        for turn in turns:
            if turn.found and turn.scored:
                self._take(turn, *turn.found, seconds, plain, done)
        return done

    def _draw(self, sequences: Items[Sequence], done: Done) -> Iterator[Turn]:
        """The turns of those who draw, with their drafts."""
        for sequence, proposal in self._propose(sequences, done):
            sequence.lease.before_pass(1 + MOST_DRAFTS)
            tokens = [sequence.continuation.ids[-1], *proposal.tokens]
            yield Turn(sequence, Prompt(tokens, ""), len(tokens), proposal)

    def _propose(self, sequences: Items[Sequence], done: Done) -> list[tuple[Sequence, Proposal]]:
        if not self.speculator or not sequences:
            return [(sequence, Proposal()) for sequence in sequences]
        try:
            proposals = self.speculator.propose([sequence.continuation for sequence in sequences])
        except Exception as error:
            if len(sequences) == 1:
                done.failed.append((sequences[0], error))
                return []
            return [found for sequence in sequences for found in self._propose([sequence], done)]
        return list(zip(sequences, proposals, strict=True))

    def _read(self, shares: Items[tuple[Sequence, int]]) -> Iterator[Turn]:
        for sequence, tokens in shares:
            sequence.lease.before_pass(tokens)
            last = sequence.whole and tokens == sequence.unread
            yield Turn(sequence, sequence.part(tokens), int(last))

    def _run(self, turns: Items[Turn], done: Done) -> None:
        """Finds what the pass gives each turn. Those for which it gave nothing have failed, or begin again."""
        lengths = [turn.cache.length for turn in turns]
        try:
            self._pass(turns)
        except Exception as error:
            if len(turns) == 1:
                done.failed.append((turns[0].sequence, error))
                return
            for turn, length in zip(turns, lengths, strict=True):
                if _recovered(turn, length):
                    self._run([turn], done)
                else:
                    self._restart(turn.sequence, error, done)

    def _restart(self, sequence: Sequence, error: Exception, done: Done) -> None:
        """Has a sequence read again what it held when that error came, the first time."""
        if sequence.restarts == _MOST_RESTARTS:
            done.failed.append((sequence, error))
            return
        try:
            sequence.restart(self.prefixes)
        except Exception as another:
            done.failed.append((sequence, another))

    def _pass(self, turns: Items[Turn]) -> None:
        """One pass of the model for all of them."""
        tokens = sum(len(turn.part.ids) for turn in turns)
        with threads(self._threads if tokens * self._floats > MUCH else 1):
            self._compute(turns)

    def _compute(self, turns: Items[Turn]) -> None:
        if len(turns) == 1 and turns[0].proposal:
            turns[0].found = turns[0].sequence.alone([turns[0].cache], [turns[0].part.ids])
            return
        caches, parts = [turn.cache for turn in turns], [turn.part for turn in turns]
        ids = torch.tensor([token for part in parts for token in part.ids], device=self.device)
        batch = RaggedBatch.from_parts(self.network.config.text, caches, parts, self.device)
        rows, scored = self.network(ids, batch), [turn.scored for turn in turns]
        lengths = [len(part.ids) for part in parts]
        if lengths != scored:
            hidden = rows.split(lengths)
            rows = torch.cat([h[len(h) - count :] for h, count in zip(hidden, scored, strict=True)])
        if not len(rows):
            return
        found = self.network.logits(rows)
        sound = are_numbers(found)
        for turn, h, logits in zip(turns, rows.split(scored), found.split(scored), strict=True):
            turn.found, turn.sound = (h, logits), sound

    def _take(self, turn: Turn, hidden: Tensor, logits: Tensor, seconds: float, plain: float, done: Done) -> None:
        """Draws what the scores of a turn's last tokens allow."""
        sequence = turn.sequence
        try:
            if not turn.sound:
                check_numbers(logits)
            if turn.proposal is None:
                drawn = sequence.begin(hidden, logits)
            elif self.speculator:
                drawn = self.speculator.take(sequence.continuation, turn.proposal, hidden, logits, seconds, plain)
            else:
                drawn = sequence.continuation.take((), hidden, logits)
            done.drawn.append((sequence, drawn))
        except Exception as error:
            done.failed.append((sequence, error))


def _recovered(turn: Turn, length: int) -> bool:
    """Whether the sequence of a pass that was broken off is as it was before, with so many tokens."""
    if length and not (turn.sequence.lease.recover() and turn.cache.earliest <= length):
        return False
    turn.cache.rewind(length)
    return True
