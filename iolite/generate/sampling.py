"""From logits to a token id: small functions composed into one sampler.

A processor maps (ids so far, logits) to logits; a filter maps logits to logits with -inf at what may not be drawn.
`make_processors` and `make_filters` list those that a `SamplingParams` asks for, in Transformers' order: bias,
repetition penalty, suppressed tokens, temperature, top-k, top-p, min-p. What a constraint does not allow is ruled out
before all of them. Shapes: logits are float32 [vocab].

What looks at the whole vocabulary does so by NumPy on a CPU, on one thread: torch's threads would have to wait for the
cores on which those of the kernels spin, and then take longer than the work.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iolite.config import GenerationConfig
from iolite.errors import UsageError
from iolite.generate.grammar import Constraint

Processor = Callable[[Sequence[int], Tensor], Tensor]
Filter = Callable[[Tensor], Tensor]

MOST_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is drawn and where it ends. Checked when made: a senseless value is a UsageError.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch their filter off. logit_bias adds to the logits of
    token ids. stop strings end the answer and are never shown. seed None draws a fresh one. logprobs changes nothing of
    the answer: with 0 to 20 it is told how likely each token was, and so many of the likeliest in its place.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    suppress_tokens: tuple[int, ...] = ()
    seed: int | None = None
    max_tokens: int = 256
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, math.inf)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf)
        _check_count("top_k", self.top_k, 0)
        _check_count("max_tokens", self.max_tokens, 1)
        if self.seed is not None:
            _check_count("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _check_count("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if self.repetition_penalty == 0:
            raise UsageError("repetition_penalty is 0", "1 switches it off, values above 1 discourage repeats")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError("a stop string is empty or not a string", "give one or more non-empty strings")
        for token, value in self.logit_bias.items():
            _check_count("a token id in logit_bias", token, 0)
            _check_number(f"logit_bias of token {token}", value, -math.inf, 1e6)

    @classmethod
    def from_defaults(cls, defaults: GenerationConfig, **asked: Any) -> SamplingParams:
        """What was asked for (None means not asked) over what the checkpoint's generation_config.json says.

        `stop` may be one string or several, `logit_bias` may have ids spelled as strings (as JSON does).
        """
        unknown = set(asked) - set(cls.__dataclass_fields__)
        if unknown:
            known = ", ".join(sorted(cls.__dataclass_fields__))
            raise UsageError(f"unknown generation setting {sorted(unknown)[0]!r}", f"there are: {known}")
        asked = {name: value for name, value in asked.items() if value is not None}
        if "stop" in asked:
            asked["stop"] = _strings(asked["stop"])
        if "logit_bias" in asked:
            if not isinstance(asked["logit_bias"], Mapping):
                raise UsageError("logit_bias is not an object", "it maps token ids to what is added to their logits")
            asked["logit_bias"] = {_token_id(i): value for i, value in asked["logit_bias"].items()}
        if "stop_ids" in asked:
            asked["stop_ids"] = frozenset(_token_ids("stop_ids", asked["stop_ids"]))
        if "suppress_tokens" in asked:
            asked["suppress_tokens"] = _token_ids("suppress_tokens", asked["suppress_tokens"])
        base = cls(
            temperature=defaults.temperature if defaults.do_sample else 0.0,
            top_k=defaults.top_k,
            top_p=defaults.top_p,
            min_p=defaults.min_p,
            repetition_penalty=defaults.repetition_penalty,
            suppress_tokens=defaults.suppress_tokens,
            stop_ids=frozenset(defaults.eos_token_ids),
        )
        return replace(base, **asked)


def _strings(stop: Any) -> tuple[str, ...]:
    if isinstance(stop, str):
        return (stop,)
    if not isinstance(stop, Sequence):
        raise UsageError(f"stop is {stop!r}", "give one string or a list of strings")
    return tuple(stop)


def _token_id(key: Any) -> int:
    try:
        return int(key) if isinstance(key, str) else operator.index(key)
    except (TypeError, ValueError):
        raise UsageError(f"logit_bias has the key {key!r}", "its keys are token ids") from None


def _token_ids(name: str, ids: Any) -> tuple[int, ...]:
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise UsageError(f"{name} is {ids!r}", "give a list of token ids")
    found = tuple(ids)
    for token in found:
        _check_count(f"a token id in {name}", token, 0)
    return found


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise UsageError(f"{name} is {value!r}, not a number")
    if not low <= value <= high or value == math.inf:
        upper = "" if math.isinf(high) else f" and at most {high:g}"
        raise UsageError(f"{name} is {value}, but must be at least {low:g}{upper}")


def _check_count(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} is {value!r}, not a whole number")
    if value < low or (high is not None and value > high):
        raise UsageError(f"{name} is {value}, but must be at least {low}" + (f" and at most {high}" if high else ""))


def add_bias(ids: Sequence[int], logits: Tensor, *, bias: Mapping[int, float]) -> Tensor:
    """Adds each token's bias; -inf forbids it. An id outside the vocabulary is a UsageError."""
    outside = [token for token in bias if token >= logits.shape[-1]]
    if outside:
        raise UsageError(f"logit_bias names token {outside[0]}, but the vocabulary has {logits.shape[-1]}")
    added = _kept(tuple(bias.values()), logits.dtype, logits.device)
    return logits.index_add(0, _kept(tuple(bias), torch.int64, logits.device), added)


def penalise_repeats(ids: Sequence[int], logits: Tensor, *, penalty: float) -> Tensor:
    """Divides positive and multiplies negative logits of every token already in ids (CTRL, arXiv 1909.05858)."""
    seen = torch.tensor(sorted(set(ids)), device=logits.device)
    score = logits[seen]
    return logits.index_copy(0, seen, torch.where(score < 0, score * penalty, score / penalty))


def suppress(ids: Sequence[int], logits: Tensor, *, tokens: Sequence[int]) -> Tensor:
    """Forbids the tokens."""
    return logits.index_fill(0, _kept(tuple(tokens), torch.int64, logits.device), -math.inf)


@functools.lru_cache(maxsize=256)
def _kept(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As a tensor, which is the same for every token of an answer."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keeps the k largest, and what equals the smallest of them."""
    k = min(k, logits.shape[-1])
    if not logits.is_cpu:
        return logits.masked_fill(logits < torch.topk(logits, k).values[-1], -math.inf)
    scores = logits.numpy()
    candidates = no_smaller_than_kth(scores, k)
    values = scores[candidates]
    return _only(scores, candidates[values >= np.partition(values, -k)[-k]])


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the most probable tokens until their probabilities reach p, the token that reaches it included."""
    scores = logits.cpu().numpy()
    alive = np.flatnonzero(scores > -np.inf)  # after top-k these are few, and a full sort of the vocabulary is spared
    order = alive[np.argsort(-scores[alive], kind="stable")]
    probabilities = np.exp(scores[order] - scores[order[0]])
    probabilities /= probabilities.sum()
    keep = probabilities.cumsum() - probabilities < p
    keep[0] = True
    return _only(scores, order[keep]).to(logits.device)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keeps what is at least p times as probable as the most probable token."""
    scores = logits.cpu().numpy()
    return _only(scores, np.flatnonzero(scores >= scores.max() + math.log(p))).to(logits.device)


def temper(logits: Tensor, temperature: float) -> Tensor:
    """Logits, less the largest (or a tiny temperature would overflow), over the temperature."""
    temperature = max(temperature, 1e-37)  # what is less is 0 in float32, and 0 / 0 for the largest
    if not logits.is_cpu:
        return (logits - logits.max()) / temperature
    scores = logits.numpy()
    with np.errstate(over="ignore"):  # to -inf, which is right
        return torch.from_numpy((scores - scores.max()) / np.float32(temperature))


def no_smaller_than_kth(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest of scores [n] and perhaps of some others: of all that reach the k-th largest among the
    largest of every 256. To look at all of them so takes a fraction of the time that partitioning them does."""
    blocks = len(scores) // 256
    if blocks < k:
        return np.arange(len(scores))
    most = scores[: 256 * blocks].reshape(blocks, 256).max(-1)
    return np.flatnonzero(scores >= np.partition(most, -k)[-k])


def _only(scores: np.ndarray, kept: np.ndarray) -> Tensor:
    """Scores with -inf at all but the kept indices."""
    out = np.full_like(scores, -np.inf)
    out[kept] = scores[kept]
    return torch.from_numpy(out)


def keep_allowed(logits: Tensor, mask: np.ndarray) -> Tensor:
    """Keeps the tokens of a mask, bool [vocab]."""
    if not logits.is_cpu:
        return logits.masked_fill(torch.from_numpy(~mask).to(logits.device), -math.inf)
    scores = logits.numpy().copy()
    np.copyto(scores, -np.inf, where=~mask)
    return torch.from_numpy(scores)


def make_processors(params: SamplingParams) -> list[Processor]:
    """What changes the logits in view of the tokens so far; these act under greedy choice too."""
    found: list[Processor] = []
    if params.logit_bias:
        found.append(lambda ids, logits: add_bias(ids, logits, bias=params.logit_bias))
    if params.repetition_penalty != 1:
        found.append(lambda ids, logits: penalise_repeats(ids, logits, penalty=params.repetition_penalty))
    if params.suppress_tokens:
        found.append(lambda ids, logits: suppress(ids, logits, tokens=params.suppress_tokens))
    return found


def make_filters(params: SamplingParams) -> list[Filter]:
    """What shapes the distribution that is drawn from; empty under greedy choice."""
    if params.temperature == 0:
        return []
    found: list[Filter] = [lambda logits: temper(logits, params.temperature)]
    if params.top_k > 0:
        found.append(lambda logits: keep_top_k(logits, params.top_k))
    if params.top_p < 1:
        found.append(lambda logits: keep_top_p(logits, params.top_p))
    if params.min_p > 0:
        found.append(lambda logits: keep_min_p(logits, params.min_p))
    return found


def likeliest(logits: Tensor) -> list[int]:
    """The token with the largest score of each row [n, vocab]."""
    found: list[int] = (logits.numpy().argmax(-1) if logits.is_cpu else logits.argmax(-1)).tolist()
    return found


def draw(logits: Tensor, generator: torch.Generator) -> int:
    """One token from softmax(logits), by the inverse of the cumulative distribution in float64.

    The uniform number comes from the CPU, so a seed means the same on every device. It is below 1 by at least 2^-53,
    so its product with the total stays below the total, and a token of probability zero is never the first to pass it.
    """
    scores = logits.cpu().numpy()
    alive = np.flatnonzero(scores > -np.inf)  # after top-k they are few
    cumulative = np.exp(scores[alive].astype(np.float64) - scores[alive].max()).cumsum()
    target = float(torch.rand((), dtype=torch.float64, generator=generator)) * cumulative[-1]
    return int(alive[np.searchsorted(cumulative, target, side="right")])


class Sampler:
    """Draws the next token of one sequence; what changes in it is that sequence's random generator and constraint."""

    def __init__(self, params: SamplingParams, constraint: Constraint | None = None) -> None:
        """constraint: of this one sequence, told of every token that is drawn here."""
        self.params, self.constraint = params, constraint
        self.processors = make_processors(params)
        self.filters = make_filters(params)
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def logits(self, ids: Sequence[int], logits: Tensor) -> Tensor:
        """The logits [vocab] of the distribution that is drawn from (under greedy choice: whose largest is taken).

        UsageError where the constraint leaves no token.
        """
        mask = self.constraint.mask() if self.constraint else None
        logits = allowed = logits.float() if mask is None else keep_allowed(logits.float(), mask)
        for process in self.processors:
            logits = process(ids, logits)
        if self.constraint and logits.max() == -math.inf:
            logits = allowed  # a bias against all that is allowed yields to the constraint
        for keep in self.filters:
            logits = keep(logits)
        return logits

    def __call__(self, ids: Sequence[int], logits: Tensor) -> int:
        """ids is the whole sequence so far, prompt included; logits [vocab] are the model's for the next token."""
        shaped = self.logits(ids, logits)
        token = likeliest(shaped[None])[0] if self.params.temperature == 0 else draw(shaped, self.generator)
        if self.constraint:
            self.constraint.saw(token)
        return token
