"""Keys and values of one sequence: all of them on full-attention layers, a ring of the last ones on sliding layers.

A layer's cache takes the new tokens' keys and values and hands back everything that the new queries may need as
`Keys`: buffers, and in which rows of them the keys lie, so that attention reads them where they are. How a token lies
in a row is `iolite/cache_layouts.py`.

A ring holds more than its window: by as much, the slack, a sequence can go back and go on from there (`rewind`). That
is how dropped thoughts, an edited turn and rejected drafts are forgotten without reading anything again.

Letters: n new tokens, K key-value heads, D head size.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from iolite.cache_layouts import Layout, layout_of, to_int8
from iolite.config import TextConfig
from iolite.kernels.contracts import Keys

SLACK = 1024  # tokens a ring holds beyond its window, and so how far back a rewind may go
_CPU = torch.device("cpu")
_FIRST_ROOM = 64  # tokens; doubled as needed where memory is not given page by page


class LayerCache(ABC):
    """Rows of keys and values: `limit` at most, each the [K, width] numbers of one token in one or two buffers.

    In memory the rows of one head follow one another, so that a thread that attends for it reads one stream. On a CPU
    the whole room is reserved at once and the system gives it page by page as it is written to; elsewhere it grows.
    """

    def __init__(self, layout: Layout, limit: int, dtype: torch.dtype | None) -> None:
        """dtype: what the numbers are kept in, None for what they come in; int8 has a float32 scale for each vector."""
        self.layout, self.limit, self.dtype = layout, limit, dtype
        self.buffers: list[Tensor] = []  # [rows, K, width]
        self.scales: list[Tensor] = []  # [rows, K], of int8
        self.used = 0  # rows that have ever been written
        self.row_bytes = 0  # of one token, 0 before the first; kept, for it is asked for often and of many caches

    @abstractmethod
    def extend(self, k: Tensor, v: Tensor, start: int, key_weight: Tensor | None = None) -> Keys:
        """Stores k, v [n, K, D] of positions start..start+n and returns what the new queries may look at.

        Queries have to go through `layout.queries` and their output through `layout.output`.
        """

    def encode(self, k: Tensor, v: Tensor, key_weight: Tensor | None) -> list[Tensor]:
        """What goes into `stores` for new tokens: their numbers, then in int8 their scales."""
        rows = self.layout.encode(k, v, key_weight)
        if self.dtype is torch.int8:
            packed = [to_int8(row) for row in rows]
            return [q for q, _ in packed] + [scale for _, scale in packed]
        return [row.to(self.dtype or row.dtype) for row in rows]

    @property
    def stores(self) -> list[Tensor]:
        """Everything that has rows: the buffers, then their scales."""
        return self.buffers + self.scales

    def names(self) -> list[str]:
        """Of the stores."""
        scales = self.layout.names if self.dtype is torch.int8 else ()
        return [*self.layout.names, *(f"{name}_scale" for name in scales)]

    def keys(self, stores: Sequence[Tensor], first: int, count: int, room: int) -> Keys:
        count_buffers = len(self.layout.names)
        k, v = self.layout.views(stores[:count_buffers])
        scales = stores[count_buffers:]
        return Keys(k, v, first, count, room, scales[0] if scales else None, scales[-1] if scales else None)

    def reserve(self, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        """Makes room for that many rows. dtype: of the numbers, where this cache has none of its own."""
        room = self.buffers[0].shape[0] if self.buffers else 0
        if rows <= room:
            return
        dtype = self.dtype or dtype
        shapes = [(width, dtype) for width in self.layout.widths]
        shapes += [(1, torch.float32) for _ in shapes if dtype is torch.int8]
        old, heads = self.stores, self.layout.heads
        made = None
        if device.type == "cpu" and not old:
            made = [_pages((heads, self.limit, width), kept) for width, kept in shapes]
        if made is None or any(store is None for store in made):
            rows = min(self.limit, max(rows, 2 * room, _FIRST_ROOM))
            made = [torch.zeros(heads, rows, width, dtype=kept, device=device) for width, kept in shapes]
        new = [store.transpose(0, 1) for store in made if store is not None]
        count = len(self.layout.widths)
        self.buffers, self.scales = new[:count], [scale[..., 0] for scale in new[count:]]
        self.row_bytes = sum(store[0].numel() * store.element_size() for store in self.stores)
        for store, before in zip(self.stores, old, strict=False):
            store[:room] = before

    def place(self, start: int, n: int) -> None:
        """Makes room for float32 numbers of positions start..start+n on the CPU that somebody else will write."""
        if self.used < start + n and self.used < self.limit:
            self.used = min(start + n, self.limit)
            self.reserve(self.used, _CPU, torch.float32)

    def put(self, rows: Sequence[Tensor], first: int) -> None:
        """Writes encoded rows from row `first` on, around the end if need be."""
        n, room = rows[0].shape[0], min(rows[0].shape[0], self.limit - first)
        self.used = max(self.used, self.limit if n > room else first + n)
        self.reserve(self.used, rows[0].device, rows[0].dtype)
        for store, new in zip(self.stores, rows, strict=True):
            store[first : first + room] = new[:room]
            if n > room:
                store[: n - room] = new[room:]

    def copy_to(self, other: LayerCache, rows: int) -> None:
        """The first rows into an empty cache of the same kind."""
        rows = min(rows, self.used)
        if rows:
            other.put([store[:rows] for store in self.stores], 0)

    @property
    def num_bytes(self) -> int:
        return self.used * self.row_bytes


class GrowingCache(LayerCache):
    """Every token of the sequence, in order: for full-attention layers."""

    def extend(self, k: Tensor, v: Tensor, start: int, key_weight: Tensor | None = None) -> Keys:
        self.put(self.encode(k, v, key_weight), start)
        return self.keys(self.stores, 0, start + k.shape[0], self.limit)


class RingCache(LayerCache):
    """The last tokens, a window and some slack, at row position % limit: for sliding layers."""

    def __init__(self, layout: Layout, window: int, slack: int, dtype: torch.dtype | None) -> None:
        super().__init__(layout, window + slack, dtype)
        self.window = window
        self.oldest = 0  # the first position that has not been overwritten

    def extend(self, k: Tensor, v: Tensor, start: int, key_weight: Tensor | None = None) -> Keys:
        n = k.shape[0]
        past = min(start, self.window - 1)  # the first new query sees that many tokens before itself
        rows = self.encode(k, v, key_weight)
        if self.fits(start, n):
            self.write(rows, start)
            return self.keys(self.stores, (start - past) % self.limit, past + n, self.limit)
        # A chunk that would overwrite what its own first queries still look at is read from a copy.
        read = [torch.cat(pair) for pair in zip(self.last(start, past), rows, strict=True)] if past else rows
        self.write(rows, start)
        return self.keys(read, 0, past + n, past + n)

    def write(self, rows: Sequence[Tensor], start: int) -> None:
        """Puts encoded rows of positions start.. in their places; of many only the end survives."""
        end = start + rows[0].shape[0]
        first = max(start, end - self.limit)
        self.put([new[first - start :] for new in rows], first % self.limit)
        self.oldest = max(self.oldest, end - self.limit)

    def place(self, start: int, n: int) -> None:
        super().place(start, n)
        if start + n - self.limit > self.oldest:
            self.oldest = start + n - self.limit

    def fits(self, start: int, n: int) -> bool:
        """Whether n new tokens leave what their first query sees where it is."""
        return min(start, self.window - 1) + n <= self.limit

    def last(self, end: int, count: int) -> list[Tensor]:
        """Copies of the rows of positions end - count .. end, in order."""
        rows = torch.arange(end - count, end, device=self.stores[0].device) % self.limit
        return [store[rows] for store in self.stores]

    @property
    def earliest(self) -> int:
        """The shortest length that the sequence can go back to: the next query sees window - 1 tokens before itself."""
        return self.oldest + self.window - 1 if self.oldest else 0


class KVCache:
    """The caches of all layers of one sequence, and how many tokens they hold."""

    def __init__(
        self,
        config: TextConfig,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        slack: int = SLACK,
        shared: bool = True,
    ) -> None:
        """dtype is the format that keys and values are kept in (float32, bfloat16, float16 or int8); None keeps the one
        they are computed in. shared=False keeps keys and values apart on every layer."""
        self.config, self.dtype, self.slack, self.shared = config, dtype, slack, shared
        self.max_length = min(max_length or config.max_position_embeddings, config.max_position_embeddings)
        self.layers: list[LayerCache] = []
        for i in range(config.num_hidden_layers):
            layout = layout_of(config, i, shared)
            if config.is_full(i):
                self.layers.append(GrowingCache(layout, self.max_length, dtype))
            else:
                self.layers.append(RingCache(layout, config.sliding_window, slack, dtype))
        self.rings = [layer for layer in self.layers if isinstance(layer, RingCache)]  # of one size
        self.length = 0

    def place(self, n: int, key_weights: Sequence[Tensor]) -> bool:
        """Makes room for n more tokens, computed in float32 on the CPU, that a kernel will write to all layers; the
        caller adds n to `length` afterwards. False, and nothing done, where a ring is too small to write in place."""
        if self.rings and not self.rings[0].fits(self.length, n):
            return False
        for layer, weight in zip(self.layers, key_weights, strict=True):
            layer.layout.take(weight)
            layer.place(self.length, n)
        return True

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows that have been written; what is reserved beyond them takes no memory on a CPU."""
        return sum([layer.used * layer.row_bytes for layer in self.layers])

    @property
    def earliest(self) -> int:
        """The shortest length besides 0 that `rewind` can go back to."""
        # All rings have one size, and of a pass that was broken off the first has the most.
        return self.rings[0].earliest if self.rings else 0

    def rewind(self, length: int) -> None:
        """Forgets all tokens from position `length` on. It costs nothing and loses nothing else.

        Raises ValueError for a length that is greater than now, or less than `earliest` and not 0.
        """
        if not (length == 0 or self.earliest <= length <= self.length):
            raise ValueError(f"a cache of {self.length} tokens can go back to {self.earliest} or 0, not to {length}")
        self.length = length
        if length == 0:
            for ring in self.rings:
                ring.oldest = 0
            for layer in self.layers:
                layer.layout.forget()  # the model may have been trained meanwhile

    def copy(self, length: int) -> KVCache:
        """An independent cache of the first `length` tokens. Raises ValueError where `rewind` would."""
        if not (length == 0 or self.earliest <= length <= self.length):
            raise ValueError(f"a cache of {self.length} tokens can be copied from {self.earliest} on, not at {length}")
        other = KVCache(self.config, self.max_length, self.dtype, self.slack, self.shared)
        for old, new in zip(self.layers, other.layers, strict=True):
            if isinstance(old, RingCache) and isinstance(new, RingCache):
                new.oldest = old.oldest if length else 0
                old.copy_to(new, old.limit if old.oldest else length)
            else:
                old.copy_to(new, length)
        other.length = length
        return other

    def state(self) -> dict[str, Tensor]:
        """Everything that a file has to keep beside the length, by name: rows in the order of their positions."""
        tensors: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            if self.length == 0:
                continue
            if isinstance(layer, RingCache):
                rows = layer.last(self.length, self.length - max(layer.oldest, self.length - layer.limit))
            else:
                rows = [store[: self.length] for store in layer.stores]
            tensors |= {f"layers.{i}.{name}": store for name, store in zip(layer.names(), rows, strict=True)}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor], length: int) -> None:
        """Takes up what `state` gave, into a cache that is empty. Raises ValueError for tensors that are not those of
        such a cache: another model's, of another format, or too few rows."""
        if self.length or not 0 <= length <= self.max_length:
            raise ValueError(f"a cache of {self.length} tokens, {self.max_length} at most, cannot take up {length}")
        layers = enumerate(self.layers if length else ())
        names = {f"layers.{i}.{name}" for i, layer in layers for name in layer.names()}
        if set(tensors) != names:
            raise ValueError(f"not the tensors of this cache: {', '.join(sorted(set(tensors) ^ names)[:3])}")
        for i, layer in enumerate(self.layers if length else ()):
            rows = [tensors[f"layers.{i}.{name}"] for name in layer.names()]
            _check_rows(layer, rows, length)
            if isinstance(layer, RingCache):
                layer.write(rows, length - rows[0].shape[0])
                layer.oldest = length - rows[0].shape[0]
            else:
                layer.put(rows, 0)
        self.length = length


def _check_rows(layer: LayerCache, rows: Sequence[Tensor], length: int) -> None:
    """ValueError unless these are the rows that a layer needs for a sequence of that length."""
    heads, count = layer.layout.heads, rows[0].shape[0]
    shapes: list[tuple[int, ...]] = [(count, heads, width) for width in layer.layout.widths]
    shapes += [(count, heads)] * (len(rows) - len(shapes))
    least = min(length, layer.window - 1) if isinstance(layer, RingCache) else length
    most = min(length, layer.limit)
    if [tuple(row.shape) for row in rows] != shapes or not least <= count <= most:
        raise ValueError(f"rows of shapes {[tuple(row.shape) for row in rows]} for {length} tokens")
    buffers = len(layer.layout.widths)
    kinds = {row.dtype for row in rows[:buffers]}
    allowed = {layer.dtype} if layer.dtype else {torch.float32, torch.bfloat16, torch.float16}
    if len(kinds) != 1 or not kinds <= allowed or any(row.dtype is not torch.float32 for row in rows[buffers:]):
        raise ValueError(f"rows in {sorted(map(str, kinds))}, not in {sorted(map(str, allowed))}")


def _pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Zeros that take memory as they are written to; None where the system does not promise that much."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, **private)  # else a forked child would write to it too
    except (OSError, ValueError):
        return None
    return torch.frombuffer(memory, dtype=dtype).view(shape)
