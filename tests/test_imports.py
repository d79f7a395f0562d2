"""The import table of the design: lower parts never import upper ones, and some never import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import iolite

PACKAGE = Path(iolite.__file__).parent

# From the bottom up. A part may import its own level and those below it.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("config", "errors", "device"),
    ("media", "text", "kernels"),
    ("messages", "prompt", "quant", "cache"),
    ("model",),
    ("checkpoint",),
    ("generate",),
    ("engine", "train"),
    ("server", "evals"),
    ("agent",),
    ("cli",),
)
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}

FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every absolute module name that a tree imports, wherever in it the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield node, node.module or ""
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def parts_imported(file: Path) -> set[str]:
    names = ["iolite", "iolite.cli", *light]
    code = (
        f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom iolite.cli import main\nsys.argv = ['iolite', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
