"""What `iolite show` says of a drafter: which models it is for, and its own sizes, from the headers of its files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iolite.config import DRAFTER_TYPE, FULL
from iolite.memory import human_bytes


def describe_drafter(name: str, path: Path) -> dict[str, Any]:
    """Everything that the headers say, for JSON. Raises CheckpointError for a drafter that is damaged."""
    from iolite.checkpoint.drafter import find_drafter

    source = find_drafter(path)
    text, kinds = source.text, source.text.layer_types
    keys = {}
    for kind in dict.fromkeys(kinds):
        layer = kinds.index(kind)
        keys[kind] = {"kv_heads": text.layer_kv_heads(layer), "head_dim": text.layer_head_dim(layer)}
    full = sum(kind == FULL for kind in kinds)
    scalars = [shape for name, shape in source.shapes.items() if name.endswith("layer_scalar")]
    files = [path] if path.is_file() else [p for p in sorted(path.iterdir()) if p.is_file()]
    return {
        "model": name,
        "path": str(path),
        "architecture": DRAFTER_TYPE,
        "drafts_for": {
            "hidden_size": source.backbone_hidden_size,
            "vocabulary": text.vocab_size,
            "sliding_window": text.sliding_window,
            "keys": keys,
        },
        "text": {
            "layers": len(kinds),
            "sliding_layers": len(kinds) - full,
            "full_layers": full,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "heads": text.num_attention_heads,
        },
        "parameters": {"total": sum(math.prod(shape) for shape in source.shapes.values()) - len(scalars)},
        "weights": {
            "here": True,
            "dtype": "+".join(sorted(source.sizes)),
            "scheme": source.scheme,
            "tensors": len(source.shapes),
            "bytes": sum(source.sizes.values()),
            "bytes_by_dtype": source.sizes,
        },
        "files": {p.name: p.stat().st_size for p in files},
    }


def drafter_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The report for people: (subject, what there is to say)."""
    t, w, whose = report["text"], report["weights"], report["drafts_for"]
    heads = [f"{keys['kv_heads']} heads of {keys['head_dim']} on {kind.removesuffix('_attention')} layers"
             for kind, keys in whose["keys"].items()]  # fmt: skip
    return [
        ("drafter", report["model"]),
        ("folder", report["path"]),
        ("drafts for", f"models of width {whose['hidden_size']:,} with a vocabulary of {whose['vocabulary']:,}"),
        ("reads", f"their keys and values: {', '.join(heads)}, a window of {whose['sliding_window']:,}"),
        ("parameters", f"{report['parameters']['total']:,}"),
        ("layers", f"{t['layers']}: {t['sliding_layers']} sliding, {t['full_layers']} full"),
        ("width", f"{t['hidden_size']:,}, feed-forward {t['intermediate_size']:,}, {t['heads']} heads"),
        ("weights", f"{human_bytes(w['bytes'])} in {w['dtype']}, {w['tensors']} tensors"),
        ("files", ", ".join(f"{name} ({human_bytes(size)})" for name, size in report["files"].items())),
    ]
