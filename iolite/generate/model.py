"""The public Python interface: `load` a model, then `chat` with it, or use its parts.

    import iolite
    model = iolite.load("nano")
    reply = model.chat([{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                                     {"type": "text", "text": "Which shape is it?"}]}])
    print(reply.text)

`chat` answers messages; `render`, `prompt`, `logits` and `generate` are its steps, from text to ids to tokens.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from iolite.cache import KVCache
from iolite.checkpoint.assemble import assemble
from iolite.checkpoint.drafter_packing import bytes_needed
from iolite.checkpoint.names import expected_shapes
from iolite.checkpoint.packing import PackingSource, read_weights
from iolite.checkpoint.pairing import Pair, Unpaired, find_pair, load_pair
from iolite.checkpoint.plan import LEAST_CONTEXT, Part, Plan, plan
from iolite.checkpoint.source import Source, open_source
from iolite.config import GenerationConfig, ModelConfig, ProcessorConfig
from iolite.device import Choice, choose, free_memory
from iolite.errors import UsageError
from iolite.generate.costs import measure
from iolite.generate.grammar import Constraint, ToolChoice, constrain
from iolite.generate.loop import Decoding, Progress, StopStrings, check_fits, prompt_logits
from iolite.generate.matcher import Grammars
from iolite.generate.reply import Reply, TokenLogprobs
from iolite.generate.sampling import SamplingParams
from iolite.generate.speculative import Speculator, check_drafts
from iolite.generate.stream import ReplyStream
from iolite.kernels import cpu
from iolite.memory import human_bytes
from iolite.model.unified import Unified
from iolite.prefix.disk import DiskStore
from iolite.prefix.fingerprint import fingerprint
from iolite.prefix.memory import PrefixCache
from iolite.prompt import Prompt, PromptBuilder, check_tokenizer
from iolite.quant.schemes import scheme_named
from iolite.text.stream import TokenStream
from iolite.text.tokenizer import Tokenizer

Messages = str | Sequence[Mapping[str, Any]]
"""One user message as a string, or a list of messages in OpenAI's or Transformers' shape."""


@dataclass(frozen=True)
class Piece:
    """One drawn token: its id, the text that became certain with it, and why it is the last (None: it is not).

    text lags behind the ids while half a character or the beginning of a stop string is held back; the text of an
    end token is empty, every other special token is spelled out. logprobs: how likely it was, where that is asked for.
    """

    id: int
    text: str
    finish_reason: str | None = None
    logprobs: TokenLogprobs | None = None


def load(
    path: str | os.PathLike[str] = "nano",
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    quantize: str | None = None,
    drafter: str | None = None,
    kv: str = "auto",
    context: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Model:
    """A model, ready to answer, from "nano", a folder, a .gguf file, or a Hugging Face id (with `:QUANT` for
    one of its GGUF files) whose files are on this machine.

    quantize packs float weights to "int4" or "int8" while they are read and keeps the result in a cache folder, from
    which it is mapped the next time. kv is the format of the cache of keys and values. progress(done, in all, what) is
    called while weights are packed or read from the disk.

    drafter guesses tokens ahead, which the model then checks several in a pass; answers stay the same. "auto" takes the
    one that lies with the model or in the Hugging Face cache, a path or an id takes that one, which must fit
    (UsageError), None and "none" take none; `model.drafting` says which. With a drafter or "auto" tokens are also
    guessed by copying from the text so far, and passes are timed once, to know how many guesses pay: `timings.drafting`
    of a reply tells how it went.

    dtype and device are chosen when not given (`model.choice.reason` says why). context limits prompt and answer
    together; by default it is all that the model was made for, or as much of it as fits into the memory that is free
    (then `model.choice.reason` says so too). Raises DownloadError when the model is not here, CheckpointError when its
    files are wrong, UsageError for a setting that is not available and, before anything is allocated, for a model or a
    context that does not fit. IOLITE_MEMORY=16GB in the environment stands for the memory that is free.
    """
    begin = time.perf_counter()
    if quantize is not None:
        scheme_named(quantize)
    source = open_source(os.fspath(path))
    config = source.config
    limit = config.text.max_position_embeddings
    if context is not None and not 1 < context <= limit:
        raise UsageError(f"the context of {context} tokens is not possible", f"this model takes 2 to {limit}")
    scheme = quantize or source.scheme
    parameters = sum(_product(shape) for shape in expected_shapes(config).values())
    choice = choose(device, dtype, config.dtype, parameters, packed=scheme)
    kv_dtype = _kv_dtype(kv, choice, packed=scheme is not None)
    pair = find_pair(source, os.fspath(path), drafter) if drafter and drafter != "none" else None
    planned = _plan_that_fits(source, scheme, kv, choice, context, pair)
    if context is None and planned.context < limit:
        note = f"; a context of {planned.context:,} tokens of {limit:,}, which is what fits in memory"
        choice = replace(choice, reason=choice.reason + note)
    tokenizer = source.tokenizer()
    check_tokenizer(tokenizer, config)
    weights = read_weights(source, quantize, progress)
    network = assemble(config, weights, dtype=choice.dtype, device=choice.device).eval().requires_grad_(False)
    return Model(
        name=str(path),
        folder=source.folder,
        network=network,
        choice=choice,
        builder=PromptBuilder(
            tokenizer,
            source.template(),
            config,
            source.processor(),
        ),
        defaults=source.generation(),
        kv_dtype=kv_dtype,
        scheme=scheme,
        context=planned.context,
        chunk=planned.chunk,
        speculator=_speculator(network, pair, scheme, choice, kv_dtype, progress) if pair else None,
        drafting=pair.note if pair else None,
        load_seconds=time.perf_counter() - begin,
    )


def _speculator(
    network: Unified,
    pair: Pair | Unpaired,
    scheme: str | None,
    choice: Choice,
    kv_dtype: torch.dtype | None,
    progress: Callable[[int, int, str], None] | None,
) -> Speculator:
    """With the drafter of a pair, and without one where none was found; what passes cost is measured here."""
    drafter = None
    if isinstance(pair, Pair):
        drafter = load_pair(pair, scheme, dtype=choice.dtype, device=choice.device, progress=progress)
    return Speculator(network, measure(network, drafter, kv_dtype), drafter)


def _plan_that_fits(
    source: Source, scheme: str | None, kv: str, choice: Choice, asked: int | None, pair: Pair | Unpaired | None
) -> Plan:
    """For the context that was asked for, or the longest that there is memory for, beside the drafter of a pair.

    Raises UsageError, with what would fit, when what was asked for does not, or hardly any context does.
    """
    limit = source.config.text.max_position_embeddings
    tiles = None
    if scheme:
        tiles = {name: format.tile_bytes for name, format in PackingSource(source, scheme).packed_formats().items()}
    drafter = None
    if isinstance(pair, Pair):
        drafter = Part("drafter", "drafter", bytes_needed(pair.source, scheme, choice.dtype.itemsize))
    planned_for = functools.partial(
        plan,
        source.config,
        quantize=scheme,
        kv=kv,
        dtype=choice.dtype_name,
        memory=free_memory(choice.device),
        tiles=tiles,
        drafter=drafter,
        compiled=choice.device.type != "cpu" or cpu.load() is not None,
    )
    planned = planned_for(context=asked or limit)
    if planned.fits is not False:
        return planned
    if asked is None and planned.max_context >= min(LEAST_CONTEXT, limit):
        return planned_for(context=planned.max_context)
    what = f"{source.name} with a context of {planned.context:,} tokens takes {human_bytes(planned.total_bytes)}"
    raise UsageError(f"{what}, and {human_bytes(planned.memory or 0)} of memory are free", planned.advice_text)


def _product(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _kv_dtype(kv: str, choice: Choice, packed: bool) -> torch.dtype | None:
    """What keys and values are kept in; None: what they are computed in. Packed weights compute in float32 on a CPU and
    keep bfloat16: the cache is read for every token, and is half the size."""
    kept = {"auto": None, "bf16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
    if kv not in kept:
        raise UsageError(f"there is no kv format {kv!r}", f"there are {', '.join(kept)}")
    if kv == "auto" and packed and choice.dtype is torch.float32:
        return torch.bfloat16
    return kept[kv]


@dataclass(frozen=True)
class Model:
    """A loaded model with its tokenizer, template and settings. Made by `load`."""

    name: str
    folder: Path
    network: Unified
    choice: Choice
    builder: PromptBuilder
    defaults: GenerationConfig
    context: int  # tokens of prompt and answer together
    chunk: int  # tokens of a prompt in one pass
    kv_dtype: torch.dtype | None  # what keys and values are kept in, None: what is computed in
    scheme: str | None  # "int4" or "int8" of packed weights
    load_seconds: float
    speculator: Speculator | None = None  # guesses tokens ahead
    drafting: str | None = None  # which drafter was found and where, or that none was; None: none was asked for
    prefix_bytes: int | None = None  # budget of `prefixes`, None: what one cache of the whole context takes
    prefixes: PrefixCache = field(init=False, repr=False)  # what was read and need not be read again

    def __post_init__(self) -> None:
        made = PrefixCache(lambda: KVCache(self.config.text, self.context, self.kv_dtype), self.prefix_bytes)
        object.__setattr__(self, "prefixes", made)

    def keep_on_disk(self, folder: str | os.PathLike[str], limit_bytes: int, note: Callable[[str], None]) -> None:
        """From now on sequences are looked for in that folder too, and `prefixes.save()` writes them there.

        limit_bytes: of the folder. note is told, in a sentence, which file was not usable and what was not written.
        Raises UsageError when the folder cannot be made.
        """
        identity = {
            "model": fingerprint(self.network, self.config),
            "adapter": self.prefixes.seed.hex(),
            "dtype": self.choice.dtype_name,
            "kv": str(self.kv_dtype),
        }
        self.prefixes.disk = DiskStore(folder, identity, limit_bytes, note, self.choice.device)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Compiles what answers must look like."""
        return Grammars(self.tokenizer, self.config.text.vocab_size)

    @property
    def config(self) -> ModelConfig:
        return self.builder.config

    @property
    def processor(self) -> ProcessorConfig:
        return self.builder.processor

    @property
    def tokenizer(self) -> Tokenizer:
        return self.builder.tokenizer

    def render(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        preserve_thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text that the checkpoint's template makes of messages, one placeholder for each picture or recording."""
        return self.builder.render(
            messages,
            tools=tools,
            thinking=thinking,
            preserve_thinking=preserve_thinking,
            add_generation_prompt=add_generation_prompt,
        )

    def prompt(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        preserve_thinking: bool = False,
        image_tokens: int | None = None,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """Messages as ids with their media read and expanded. image_tokens is the budget of one picture."""
        return self.builder.build(
            messages,
            tools=tools,
            thinking=thinking,
            preserve_thinking=preserve_thinking,
            image_tokens=image_tokens,
            add_generation_prompt=add_generation_prompt,
        )

    def logits(self, prompt: Prompt | Messages) -> Tensor:
        """Float32 scores [len(prompt.ids), vocabulary] of the token that follows each position."""
        prompt = self._as_prompt(prompt)
        check_fits(prompt, self.context + 1)
        return prompt_logits(self.network, prompt, self.kv_dtype, self.chunk)

    def generate(
        self,
        prompt: Prompt | Messages,
        *,
        max_tokens: int = 256,
        progress: Progress | None = None,
        drafts: int | None = None,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Draws tokens until one ends the answer; each comes as a `Piece`, thoughts and special tokens as they are.

        sampling: temperature, top_k, top_p, min_p, repetition_penalty, logit_bias, seed, stop, stop_ids,
        suppress_tokens, logprobs as in `SamplingParams`; what is not given is the checkpoint's own. Raises ContextError
        at once when the prompt does not fit. drafts, of a model with a drafter: how many tokens to guess ahead, 0 for
        none, None for as many as pay.
        """
        prompt = self._as_prompt(prompt)
        params = self.sampling(max_tokens=max_tokens, **sampling)
        decoding = self._decoding(prompt, params, progress, drafts)
        return self._pieces(decoding)

    def _pieces(self, decoding: Decoding) -> Iterator[Piece]:
        text, stops = TokenStream(self.tokenizer), StopStrings(decoding.params.stop)
        for drawn in decoding:
            reason = drawn.finish_reason
            shown = "" if drawn.id in decoding.params.stop_ids else stops.push(text.push(drawn.id))
            if reason:
                shown += stops.push(text.flush())
                shown += stops.flush()
            reason = "stop" if stops.found else reason
            known = drawn.logprobs.spelled(drawn.id, self.tokenizer) if drawn.logprobs else None
            yield Piece(drawn.id, shown, reason, known)
            if reason:
                return

    @overload
    def chat(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        thinking: bool = ...,
        schema: Mapping[str, Any] | None = ...,
        max_tokens: int = ...,
        temperature: float | None = ...,
        stream: Literal[False] = ...,
        **more: Any,
    ) -> Reply: ...

    @overload
    def chat(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        thinking: bool = ...,
        schema: Mapping[str, Any] | None = ...,
        max_tokens: int = ...,
        temperature: float | None = ...,
        *,
        stream: Literal[True],
        **more: Any,
    ) -> ReplyStream: ...

    def chat(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        schema: Mapping[str, Any] | None = None,
        max_tokens: int = 256,
        temperature: float | None = None,
        stream: bool = False,
        *,
        image_tokens: int | None = None,
        preserve_thinking: bool = False,
        progress: Progress | None = None,
        drafts: int | None = None,
        grammar: str | Mapping[str, str] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
        thinking_budget: int | None = None,
        **sampling: Any,
    ) -> Reply | ReplyStream:
        """Answers messages. With stream=True an iterator of events, whose `reply` is complete after the last one.

        Text, thoughts and tool calls come apart. stop strings act on the text of the answer. Other sampling settings
        and drafts as in `generate`; schema and the rest as in `constraint`. Every mistake in the input is raised before
        the first token, with stream=True too.
        """
        begin = time.perf_counter()
        params = self.sampling(max_tokens=max_tokens, temperature=temperature, **sampling)
        prompt = self.prompt(messages, tools, thinking, preserve_thinking, image_tokens)
        constraint = self.constraint(
            prompt,
            params,
            schema=schema,
            grammar=grammar,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            thinking=thinking,
            thinking_budget=thinking_budget,
        )
        decoding = self._decoding(prompt, params, progress, drafts, constraint)
        answer = ReplyStream(decoding, self.tokenizer, tools, prepare_seconds=time.perf_counter() - begin)
        return answer if stream else answer.run()

    def constraint(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        schema: Mapping[str, Any] | None = None,
        grammar: str | Mapping[str, str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
        thinking: bool = False,
        thinking_budget: int | None = None,
    ) -> Constraint | None:
        """What the answer to a prompt must look like, for that one answer; None when nothing is asked of it.

        schema: a JSON Schema that the text fulfils ({"type": "object"}: any JSON object). grammar: Lark, or {"regex":
        …}. tool_choice: "none", "auto" (the default), "required" or {"type": "function", "function": {"name": …}};
        arguments fulfil the tool's schema. thinking_budget: tokens, after which a thought is closed; what is asked for
        begins after the thought. Raises UsageError for what cannot be honoured.
        """
        return constrain(
            self.grammars,
            prompt.ids,
            params.stop_ids,
            schema=schema,
            grammar=grammar,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            thinking=thinking,
            thinking_budget=thinking_budget,
        )

    def sampling(self, **asked: Any) -> SamplingParams:
        """Sampling settings: what is asked for, and the checkpoint's own for the rest."""
        params = SamplingParams.from_defaults(self.defaults, **asked)
        size = self.config.text.vocab_size
        outside = [i for i in (*params.logit_bias, *params.suppress_tokens, *params.stop_ids) if not 0 <= i < size]
        if outside:
            raise UsageError(f"token {outside[0]} is outside the vocabulary of {size}")
        if len(set(params.suppress_tokens)) == size:
            raise UsageError("every token of the vocabulary is suppressed")
        return params

    def _decoding(
        self,
        prompt: Prompt,
        params: SamplingParams,
        progress: Progress | None,
        drafts: int | None,
        constraint: Constraint | None = None,
    ) -> Decoding:
        check_drafts(drafts, self.speculator)
        return Decoding(
            self.network,
            prompt,
            params,
            context=self.context,
            chunk=self.chunk,
            progress=progress,
            prefixes=self.prefixes,
            speculator=self.speculator,
            drafts=drafts,
            constraint=constraint,
        )

    def _as_prompt(self, prompt: Prompt | Messages) -> Prompt:
        return prompt if isinstance(prompt, Prompt) else self.prompt(prompt)
