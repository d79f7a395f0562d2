"""The fields of OpenAI's requests, and of those who extended them, brought to an `Ask`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from iolite.errors import MessageError, UsageError
from iolite.generate.model import Model
from iolite.generate.sampling import MOST_LOGPROBS
from iolite.server.answers import Ask
from iolite.server.fields import (
    MOST_TOKENS,
    Bias,
    Body,
    Choices,
    Messages,
    Penalty,
    Probability,
    Seed,
    Stop,
    Temperature,
    Tokens,
    Tools,
    TopK,
    seed_of,
)
from iolite.server.logprobs import asked_for
from iolite.server.settings import Settings

MOST_GRAMMAR = 100_000  # characters
BESIDE = ("images", "image", "audio", "audios", "video", "videos", "files", "attachments")
Limit = Literal[-1] | Tokens
"""Of an answer. LM Studio and its clients write -1 for none; then there is the server's own."""
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class StreamOptions(Body):
    include_usage: bool = False


class SamplingFields(Body):
    """How tokens are drawn; what is not given is the checkpoint's own."""

    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    repetition_penalty: Penalty | None = None
    repeat_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    logit_bias: Bias | None = None
    max_tokens: Limit | None = None
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    model: str | None = None

    def sampling(self) -> dict[str, Any]:
        """Settings as `Model.sampling` takes them."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty or self.repeat_penalty,
            "seed": seed_of(self.seed),
            "stop": self.stop or None,
            "logit_bias": self.logit_bias or None,
            "max_tokens": None if self.max_tokens == -1 else self.max_tokens,
        }


class ThinkingObject(Body):
    """Anthropic's form, which others have taken over."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None


class ReasoningObject(Body):
    """The form of OpenAI's responses and of OpenRouter."""

    effort: Effort | None = None
    enabled: bool | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None


class ThinkingFields(Body):
    """Whether the model thinks first: every name that clients have for it."""

    reasoning_effort: Effort | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_object: Annotated[bool | ThinkingObject | None, Field(alias="thinking")] = None
    reasoning: ReasoningObject | None = None
    thinking_budget: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] | None = None
    reasoning_budget: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] | None = None

    def thinking(self, settings: Settings) -> bool:
        """The first that is given, or what the server does by default. UsageError for an unknown template setting."""
        template = self.chat_template_kwargs or {}
        unknown = set(template) - {"enable_thinking", "thinking", "preserve_thinking"}
        if unknown or not all(isinstance(value, bool) for value in template.values()):
            raise UsageError("chat_template_kwargs takes enable_thinking and preserve_thinking, true or false")
        named, reasoning = self.thinking_object, self.reasoning or ReasoningObject()
        if isinstance(named, ThinkingObject):
            named = named.type != "disabled"
        more = (template.get("enable_thinking"), template.get("thinking"), named, reasoning.enabled)
        for asked in (self.think, self.enable_thinking, *more):
            if asked is not None:
                return bool(asked)
        effort = self.reasoning_effort or reasoning.effort
        if effort is None:
            return settings.thinking or bool(reasoning.max_tokens)
        return effort not in ("none", "minimal")

    def budget(self) -> int | None:
        """Tokens of a thought; None, which clients also spell -1, is no limit."""
        named = self.thinking_object.budget_tokens if isinstance(self.thinking_object, ThinkingObject) else None
        reasoning = self.reasoning or ReasoningObject()
        budgets = (self.thinking_budget, self.reasoning_budget, named, reasoning.max_tokens)
        asked = next((budget for budget in budgets if budget is not None), None)
        return None if asked == -1 else asked

    def preserve(self) -> bool:
        return bool((self.chat_template_kwargs or {}).get("preserve_thinking"))


class ChatRequest(SamplingFields, ThinkingFields):
    """`POST /v1/chat/completions`. Contents take text, image_url, input_audio, audio_url, video_url and more."""

    messages: Messages
    max_completion_tokens: Limit | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    grammar: Annotated[str, Field(max_length=MOST_GRAMMAR)] | None = None
    regex: Annotated[str, Field(max_length=MOST_GRAMMAR)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    image_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_soft_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    image_max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None

    def ask(self, model: Model, settings: Settings) -> Ask:
        sampling = self.sampling()
        if self.max_completion_tokens is not None:
            sampling["max_tokens"] = None if self.max_completion_tokens == -1 else self.max_completion_tokens
        sampling["logprobs"] = asked_for(bool(self.logprobs), self.top_logprobs, "set logprobs to true as well")
        tools, choice = allowed(self.tools or [], self.tool_choice)
        return Ask(
            messages=with_details(with_nothing_beside(self.messages), model),
            tools=tools or None,
            tool_choice=choice,
            schema=schema_of(self.response_format),
            grammar={"regex": self.regex} if self.regex is not None else self.grammar,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            thinking=self.thinking(settings),
            preserve_thinking=self.preserve(),
            thinking_budget=self.budget(),
            image_tokens=self.image_tokens or self.max_soft_tokens or self.image_max_tokens,
            sampling=sampling,
            choices=self.n or 1,
        )


def allowed(
    tools: Sequence[Mapping[str, Any]], choice: Any
) -> tuple[Sequence[Mapping[str, Any]], str | Mapping[str, Any] | None]:
    """The tools that an answer is to know of, and a choice as `Model.chat` takes it, of all forms that OpenAI's
    interfaces and Mistral's have. UsageError for tools that are allowed and not there."""
    if choice == "any":
        return tools, "required"
    if not isinstance(choice, Mapping) or choice.get("type") != "allowed_tools":
        return tools, choice
    inner = choice.get("allowed_tools", choice)
    listed, mode = (inner.get("tools"), inner.get("mode", "auto")) if isinstance(inner, Mapping) else (None, None)
    if not isinstance(listed, list) or mode not in ("auto", "required"):
        hint = 'like {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": […]}}, or "required"'
        raise UsageError("tool_choice has no list of allowed tools and mode", hint)
    names, known = [_name_of(tool) for tool in listed], {_name_of(tool) for tool in tools}
    if not names or not known.issuperset(names):
        raise UsageError("tool_choice allows what is no tool of the request", "allow some of the functions in tools")
    return [tool for tool in tools if _name_of(tool) in names], mode


def _name_of(tool: Any) -> str | None:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def schema_of(response_format: Mapping[str, Any] | None, name: str = "response_format") -> Mapping[str, Any] | None:
    """The JSON schema that an answer must have; None: it is free. UsageError for a format of another kind.

    name: of the field, for that.
    """
    if response_format is None or response_format.get("type") == "text":
        return None
    if response_format.get("type") == "json_object":
        return {"type": "object"}
    wrapped = response_format.get("json_schema")
    schema = wrapped.get("schema") if isinstance(wrapped, Mapping) else None
    if response_format.get("type") != "json_schema" or not isinstance(schema, Mapping):
        hint = 'like {"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}'
        raise UsageError(f"{name} is neither text nor json_object nor a json_schema with its schema", hint)
    return schema


def with_nothing_beside(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The messages; MessageError for media beside a content, as Ollama has them, which nobody would read here."""
    for number, message in enumerate(messages):
        for name in BESIDE:
            if message.get(name):
                raise MessageError(f"message {number} has {name}, which are not read", "make them parts of its content")
    return messages


def with_details(messages: Sequence[Mapping[str, Any]], model: Model) -> list[Mapping[str, Any]]:
    """Messages in which a picture's `detail` ("low" or "high") is a number of tokens, where the model has budgets to
    choose from."""
    budgets = model.processor.image_budgets
    if not budgets:
        return list(messages)
    tokens = {"low": min(budgets), "high": max(budgets)}

    def part(item: Any) -> Any:
        source = item.get("image_url") if isinstance(item, Mapping) else None
        detail = (source if isinstance(source, Mapping) else item).get("detail") if isinstance(item, Mapping) else None
        if not isinstance(detail, str) or detail not in tokens or "max_soft_tokens" in item:
            return item
        return {**item, "max_soft_tokens": tokens[detail]}

    return [
        {**message, "content": [part(item) for item in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
