"""What the bodies of all interfaces have in common: bounded numbers, and fields that nobody here has heard of.

A field that would change the answer and is not honoured is refused, and so is one that is probably misspelt. Any other
unknown one is let pass, and named in the header x-iolite-ignored of the answer.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from iolite.errors import UsageError
from iolite.server.settings import MOST_CHOICES

MOST_TOKENS = 2**31 - 1
_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")

Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Temperature = Annotated[float, Field(ge=0, le=100)]
Probability = Annotated[float, Field(ge=0, le=1)]
TopK = Annotated[int, Field(ge=0, le=2**20)]
Penalty = Annotated[float, Field(gt=0, le=100)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = StopText | Annotated[list[StopText], Field(max_length=16)]
Bias = Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], float], Field(max_length=1024)]
Message = dict[str, Any]
Messages = Annotated[list[Message], Field(min_length=1, max_length=10_000)]
Tools = Annotated[list[dict[str, Any]], Field(max_length=512)]

MOST_UNKNOWN = 64  # fields of a request; each is compared with all that there are

# Field -> the values with which it changes nothing. Fields of one interface are unknown ones of the others.
CHANGING: Mapping[str, tuple[Any, ...]] = {
    # what is read
    "messages": (None, []),
    "prompt": (None, ""),
    "input": (None, ""),
    "system": (None, ""),
    "instructions": (None, ""),
    "images": (None, []),
    "image": (None,),
    "audio": (None,),
    "audios": (None, []),
    "videos": (None, []),
    "files": (None, []),
    "documents": (None, []),
    "context": (None, []),
    "echo": (None, False),
    "suffix": (None, ""),
    "raw": (None, False),
    "template": (None, ""),
    "chat_template": (None, ""),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "truncate_prompt_tokens": (None, -1),
    "image_tokens": (None,),
    "max_soft_tokens": (None,),
    # thoughts
    "think": (None, False),
    "thinking": (None, False, {"type": "disabled"}),
    "enable_thinking": (None, False),
    "reasoning": (None, {}),
    "reasoning_effort": (None, "none"),
    "reasoning_format": (None, "auto", "deepseek"),
    "thinking_budget": (None, -1),
    "reasoning_budget": (None, -1),
    # tools and forms
    "tools": (None, []),
    "tool_choice": (None, "auto", "none"),
    "parallel_tool_calls": (None, True),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "web_search_options": (None,),
    "response_format": (None, {"type": "text"}),
    "format": (None, ""),
    "json_schema": (None,),
    "grammar": (None, ""),
    "regex": (None, ""),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
    "modalities": (None, ["text"]),
    "verbosity": (None, "medium"),
    # how tokens are drawn, and how many
    "options": (None, {}),
    "temperature": (None,),
    "top_p": (None, 1),
    "top_k": (None,),
    "min_p": (None, 0),
    "top_a": (None, 0),
    "top_n_sigma": (None, -1),
    "typical_p": (None, 1),
    "tfs_z": (None, 1),
    "mirostat": (None, 0),
    "dry_multiplier": (None, 0),
    "xtc_probability": (None, 0),
    "dynatemp_range": (None, 0),
    "samplers": (None, []),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "repeat_penalty": (None, 1),
    "length_penalty": (None, 1),
    "repetition_context_size": (None,),
    "seed": (None,),
    "logit_bias": (None, {}),
    "logits_processors": (None, []),
    "bad_words": (None, []),
    "allowed_token_ids": (None, []),
    "use_beam_search": (None, False),
    "n": (None, 1),
    "best_of": (None, 1),
    "stop": (None, []),
    "stop_sequences": (None, []),
    "stop_token_ids": (None, []),
    "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True),
    "ignore_eos": (None, False),
    "min_tokens": (None, 0),
    "max_tokens": (None,),
    "max_completion_tokens": (None,),
    "max_output_tokens": (None,),
    "max_new_tokens": (None,),
    "n_predict": (None, -1),
    "num_predict": (None, -1),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "n_probs": (None, 0),
    "prompt_logprobs": (None,),
    "lora": (None, []),
    "adapter": (None,),
}


class Body(BaseModel):
    """A request's JSON object; further fields are kept, for `ignored` to judge."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())


def ignored(
    body: Body, own: Mapping[str, tuple[Any, ...]] | None = None, common: Mapping[str, tuple[Any, ...]] = CHANGING
) -> list[str]:
    """The names of unknown fields, which change nothing; UsageError for one that would, or is misspelt.

    own: fields like those of `CHANGING` that the interface has besides.
    """
    names, unknown, changing = [], body.model_extra or {}, {**common, **(own or {})}
    if len(unknown) > MOST_UNKNOWN:
        raise UsageError(f"the request has {len(unknown)} fields that are not known here", "leave them out")
    for name, value in unknown.items():
        shown = name if _PLAIN.fullmatch(name) else "a field"
        if name in changing:
            if not any(_same(value, neutral) for neutral in changing[name]):
                raise UsageError(f"{shown} is not available here", "leave it out")
            continue
        near = difflib.get_close_matches(name[:64], type(body).model_fields, n=1, cutoff=0.85)
        if near and value is not None:
            raise UsageError(f"there is no field {shown}", f"did you mean {near[0]}?")
        names.append(shown)
    return names


def _same(value: Any, neutral: Any) -> bool:
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)  # 1 == True in Python


def headers_for(names: list[str]) -> dict[str, str]:
    """The header that names what was ignored."""
    return {"x-iolite-ignored": ", ".join(sorted(names)[:32])} if names else {}


def seed_of(seed: int | None) -> int | None:
    """A seed as our generators take it; negative ones, which other engines draw at random for, are seeds too."""
    return None if seed is None else seed % 2**64
