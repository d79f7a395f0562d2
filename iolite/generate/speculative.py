"""Speculative decoding: cheap guesses at the next tokens, judged by the model several at a time.

Each round proposes drafts for every sequence, out of its own text (`PromptLookup`) or by a drafter network
(`iolite/model/drafter.py`), judges all of them in one pass of the model, and keeps what the model would have drawn
itself (`Continuation.take`). How many drafts a round proposes is decided anew each time, token by token: a draft is
made, and judged, while the tokens to be expected of it are worth more than the time it takes. Where none is, the round
is a plain step. So a drafter that is not good enough costs next to nothing.

The arithmetic, with times in seconds: r is the rate in tokens a second that rounds are expected to reach, at least that
of plain steps. A draft that is accepted with probability p, forerunners included, is worth p tokens, and time t spent
on other rounds would bring r·t tokens; so it pays if p > r·t. t is what it adds to the model's pass and, before it is
made, the drafter's step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from iolite.errors import UsageError
from iolite.generate.acceptance import Acceptance, Known, sureness
from iolite.generate.continuation import Continuation
from iolite.generate.costs import MOST_DRAFTS, Costs
from iolite.generate.passes import Passes
from iolite.model.drafter import Chains, Drafter
from iolite.model.unified import Unified

_IDLE, _SHORT = 4, 0.01  # rounds without a draft; seconds of a pass
_MARGIN = 1.1  # how much more than it costs the first draft must bring: costs and chances are estimates


def check_drafts(drafts: int | None, speculator: Speculator | None) -> None:
    """UsageError for a number of drafts that cannot be proposed with that speculator. None: as many as pay."""
    if drafts is None:
        return
    if isinstance(drafts, bool) or not isinstance(drafts, int) or not 0 <= drafts <= MOST_DRAFTS:
        raise UsageError(f"drafts is {drafts!r}", f"give 0 to {MOST_DRAFTS}, or leave it out")
    if drafts and not speculator:
        raise UsageError("drafts were asked of a model without a drafter", 'load it with drafter="auto"')


@dataclass
class Proposal:
    """Drafts for one sequence, and what was known of each."""

    tokens: list[int] = field(default_factory=list)
    known: list[tuple[Known, ...]] = field(default_factory=list)
    chance: float = 1.0  # that all of them are right
    value: float = 0.0  # tokens to be expected of them, less what their time is worth
    unjudged: tuple[Known, float] | None = None  # a draft that was made after them and not proposed, and its chance

    def add(self, token: int, chance: float, *known: Known) -> None:
        """chance: that this one is right if the others are."""
        self.tokens.append(token)
        self.known.append(known)
        self.chance *= chance


class Speculator:
    """Proposes drafts for sequences of one model, and learns how they fare. One for all answers of a model."""

    def __init__(self, network: Unified, costs: Costs, drafter: Drafter | None = None, copies: bool = True) -> None:
        """Without a drafter all drafts are copies out of the text so far; copies=False leaves these out."""
        self.network, self.costs, self.drafter, self.copies = network, costs, drafter, copies
        self.acceptance = Acceptance()
        self._idle = 0  # rounds since the last that proposed something

    def round(self, run: Passes, sequences: Sequence[Continuation]) -> list[list[int]]:
        """Draws on in every sequence, none of which may be over, in one pass: one token each, at least."""
        if len(sequences) == 1 and self._rests(sequences[0]):
            (sequence,) = sequences
            drawn = sequence.take((), *run([sequence.cache], [sequence.ids[-1:]]))
            sequence.drafting.add(0, 0, len(drawn))
            self._idle += 1
            return [drawn]
        begin = time.perf_counter()
        proposals = self.propose(sequences)
        contexts = [sequence.cache.length for sequence in sequences]
        plain = self.costs.of_pass([1] * len(sequences), contexts)
        proposed = time.perf_counter()
        tokens = [[s.ids[-1], *p.tokens] for s, p in zip(sequences, proposals, strict=True)]
        counts = [len(own) for own in tokens]
        hidden, logits = run([sequence.cache for sequence in sequences], tokens)
        done = time.perf_counter()
        self.costs.saw(counts, contexts, done - proposed)
        found = []
        for sequence, proposal, h, scores in zip(
            sequences, proposals, hidden.split(counts), logits.split(counts), strict=True
        ):
            found.append(self.take(sequence, proposal, h, scores, done - begin, plain))
        return found

    def take(
        self, sequence: Continuation, proposal: Proposal, hidden: Tensor, logits: Tensor, seconds: float, plain: float
    ) -> list[int]:
        """What is drawn after a pass over a sequence's newest token and its drafts, and learns how these fared.

        seconds: of drafts and pass; plain: what a pass without drafts takes. Both 0 where the pass was also for
        something else.
        """
        self._idle = 0 if proposal.tokens else self._idle + 1
        drawn = sequence.take(proposal.tokens, hidden, logits)
        accepted = self.learn(proposal, drawn)
        sequence.drafting.add(len(proposal.tokens), accepted, len(drawn), seconds, plain)
        return drawn

    def _rests(self, sequence: Continuation) -> bool:
        """Whether not even to think about drafts in this round: in three of four where there were none for a while and
        a pass is so short that thinking takes a share of it."""
        return sequence.drafts is None and self._idle >= _IDLE and self._idle % 4 != 0 and self.costs.passes[0] < _SHORT

    @torch.inference_mode()
    def propose(self, sequences: Sequence[Continuation]) -> list[Proposal]:
        """Drafts for each sequence: as many as it asks for, or as many as pay; none where none do."""
        turn = _Turn(self, sequences)
        proposals = [turn.copied(i) for i in range(len(sequences))]
        if self.drafter is None:
            return proposals
        rest = []
        for i, (sequence, proposal) in enumerate(zip(sequences, proposals, strict=True)):
            # At its rate, rounds with the drafter are worth this much more than plain steps.
            if sequence.drafts is not None or not proposal.tokens or proposal.value < turn.rate / turn.plain_rate - 1:
                if proposal.tokens and sequence.drafts is None:
                    self.acceptance.passed_over(proposal.known[0][0])
                proposals[i] = Proposal()
                turn.counts[i] = 1
                rest.append(i)
        turn.draft(rest, proposals)
        return proposals

    def chains(self, sequences: Sequence[Continuation]) -> Chains:
        """The drafter's, behind each sequence's newest token."""
        assert self.drafter is not None
        device = self.network.language_model.embed_tokens.weight.device
        tokens = torch.tensor([sequence.ids[-1] for sequence in sequences], device=device)
        hidden = torch.stack([sequence.hidden for sequence in sequences if sequence.hidden is not None])
        return Chains(self.drafter, self.network, tokens, hidden, [sequence.cache for sequence in sequences])

    def learn(self, proposal: Proposal, drawn: Sequence[int]) -> int:
        """How many drafts were accepted, after taking it into account."""
        accepted = 0
        for token, known, real in zip(proposal.tokens, proposal.known, drawn, strict=False):
            for each in known:
                self.acceptance.saw(each, float(token == real))
            if token != real:
                break
            accepted += 1
        if proposal.unjudged and accepted == len(proposal.tokens):
            self.acceptance.saw(*proposal.unjudged)
        return accepted


class _Turn:
    """One round's decisions: what the pass costs so far, and what is worth adding to it."""

    def __init__(self, speculator: Speculator, sequences: Sequence[Continuation]) -> None:
        self.speculator, self.sequences = speculator, sequences
        self.costs, self.acceptance = speculator.costs, speculator.acceptance
        self.contexts = [sequence.cache.length for sequence in sequences]
        self.counts = [1] * len(sequences)  # tokens of the pass
        self.plain_rate = len(sequences) / self.costs.of_pass(self.counts, self.contexts)
        self.rate = self._best_rate() if speculator.drafter else self.plain_rate

    def _best_rate(self) -> float:
        """Tokens a second, of all sequences: plain, or with the number of drafts that is best by experience."""
        n, best, tokens, chance = len(self.sequences), self.plain_rate, 1.0, 1.0
        step = self.costs.of_draft(self.contexts)
        for count in range(1, MOST_DRAFTS + 1):
            chance *= self.acceptance.rate(("depth", count))
            tokens += chance
            rate = n * tokens / (self.costs.of_pass([1 + count] * n, self.contexts) + count * step)
            if rate <= best:
                break
            best = rate
        return best

    def most(self, i: int) -> int:
        """Drafts that sequence i has use for: the pass itself draws one more token."""
        asked = self.sequences[i].drafts
        return min(MOST_DRAFTS if asked is None else asked, self.sequences[i].left - 1)

    def growth(self, i: int, beyond: int = 0) -> float:
        """Seconds that one more draft of sequence i, and `beyond` others before it, adds to the pass."""
        less, more = list(self.counts), list(self.counts)
        less[i] += beyond
        more[i] += beyond + 1
        return self.costs.of_pass(more, self.contexts) - self.costs.of_pass(less, self.contexts)

    def pays(self, chance: float, seconds: float) -> bool:
        return chance > self.rate * seconds

    def copied(self, i: int) -> Proposal:
        """Drafts out of the sequence's own text."""
        sequence, proposal = self.sequences[i], Proposal()
        tokens, match = sequence.lookup.find(self.most(i)) if self.speculator.copies else ([], 0)
        for at, token in enumerate(tokens):
            known: Known = ("copied", min(at, 4)) if at else ("match", match)
            chance, seconds = self.acceptance.rate(known), self.growth(i)
            if sequence.drafts is None and not self.pays(proposal.chance * chance, seconds):
                self.acceptance.passed_over(known)
                break
            proposal.add(token, chance, known)
            proposal.value += proposal.chance - self.rate * seconds
            self.counts[i] += 1
            if token in sequence.stop_ids:
                break
        return proposal

    def draft(self, rest: Sequence[int], proposals: Sequence[Proposal]) -> None:
        """Drafts for sequences `rest` by the drafter, in step, each for as long as it pays."""
        active = [i for i in rest if self._goes_on(i, proposals[i], len(rest))]
        if not active:
            return
        chains = self.speculator.chains([self.sequences[i] for i in active])
        begin, steps, together = time.perf_counter(), 0, [self.contexts[i] for i in active]
        while active:
            steps += 1
            tokens, probabilities = chains.step()
            rows = [
                row
                for row, (i, token, probability) in enumerate(
                    zip(active, tokens.tolist(), probabilities.tolist(), strict=True)
                )
                if self._take(i, proposals[i], token, probability) and self._goes_on(i, proposals[i], len(active))
            ]
            active = [active[row] for row in rows]
            if active:
                chains.keep(rows)
        self.costs.saw_drafts(steps, together, time.perf_counter() - begin)

    def _goes_on(self, i: int, proposal: Proposal, together: int) -> bool:
        """Whether one more step of the drafter pays for a sequence, which shares it with others."""
        ended = proposal.tokens and proposal.tokens[-1] in self.sequences[i].stop_ids
        if ended or len(proposal.tokens) >= self.most(i):
            return False
        if self.sequences[i].drafts is not None:
            return True
        step = self.costs.of_draft(self.contexts[i : i + 1]) / together
        count, chance, value = len(proposal.tokens), proposal.chance, 0.0
        margin = 1.0 if count else _MARGIN
        # A pass does not grow evenly: several more may pay where one more does not.
        for more in range(1, self.most(i) - count + 1):
            chance *= self.acceptance.rate(("depth", count + more))
            if chance <= margin * self.rate * step:
                break  # from here on not even the drafter's steps would pay
            value += chance - margin * self.rate * (step + self.growth(i, more - 1))
            if value > 0:
                return True
        self.acceptance.passed_over(("depth", count + 1))
        return False

    def _take(self, i: int, proposal: Proposal, token: int, probability: float) -> bool:
        """Adds a draft to a proposal if it is worth judging."""
        depth, sure = ("depth", len(proposal.tokens) + 1), sureness(probability)
        chance = self.acceptance.rate(sure)
        if self.sequences[i].drafts is None and not self.pays(proposal.chance * chance, self.growth(i)):
            self.acceptance.passed_over(sure)
            proposal.unjudged = depth, chance
            return False
        proposal.add(token, chance, depth, sure)
        self.counts[i] += 1
        return True
