"""iolite: encoder-free multimodal language models on the computer in front of you.

Public names are imported on first use, so that `import iolite` costs nothing and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {  # name -> the module that defines it
    "load": "iolite.generate.model",
    "Model": "iolite.generate.model",
    "Reply": "iolite.generate.reply",
    "Prompt": "iolite.prompt",
    "IoliteError": "iolite.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'iolite' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
