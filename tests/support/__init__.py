"""What several tests share: tiny random checkpoints, prompts over every modality, and the reference's answers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch


def import_torchvision() -> None:
    """Imports torchvision, which Transformers' media processors need, also beside a torch without CUDA.

    Its wheel is built for the CUDA torch; beside a CPU torch its own compiled operators are missing, and the import
    fails where it describes them to torch. Nothing here uses those operators, so the descriptions are left out.
    """
    register_fake = torch.library.register_fake

    def skip_torchvision(op: Any, *args: Any, **kwargs: Any) -> Any:
        def leave(function: Callable[..., Any]) -> Callable[..., Any]:
            return function

        ours = isinstance(op, str) and op.startswith("torchvision::")
        return leave if ours else register_fake(op, *args, **kwargs)

    with mock.patch.object(torch.library, "register_fake", skip_torchvision):
        importlib.import_module("torchvision")


import_torchvision()
