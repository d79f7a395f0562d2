"""How much memory the caches of all sequences may take together."""

from __future__ import annotations

from iolite.checkpoint import sizes
from iolite.device import free_memory
from iolite.generate.model import Model

ANSWER = 1024  # tokens of an answer that room is kept for; few are longer, and those that are may take more


def cache_bytes(model: Model, tokens: int) -> int:
    """Of a sequence of that many tokens."""
    kv = model.choice.dtype_name if model.kv_dtype is None else str(model.kv_dtype).removeprefix("torch.")
    return sizes.cache_bytes(model.config.text, min(tokens, model.context), kv)


def room_for(model: Model, slots: int) -> int:
    """Bytes for that many sequences as long as the context, or half of what is free, but at least for one: so much was
    planned for when the model was loaded."""
    whole = cache_bytes(model, model.context)
    free = free_memory(model.choice.device)
    return slots * whole if free is None else max(whole, min(slots * whole, free // 2))
