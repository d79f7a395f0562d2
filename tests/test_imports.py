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
    ("config", "errors", "memory", "device"),
    ("media", "text", "kernels"),
    ("messages", "documents", "prompt", "quant", "cache", "cache_layouts"),
    ("model",),
    ("checkpoint",),
    ("prefix",),
    ("generate",),
    ("engine", "train"),
    ("server", "evals"),
    ("agent",),
    ("cli", "__main__"),
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
    names = [name.split(".") for _, name in imports(ast.parse(file.read_text(encoding="utf-8")))]
    return {name[1] for name in names if name[0] == "iolite" and len(name) > 1} - {"__version__"}


def imports_torch(tree: ast.AST) -> bool:
    return any(name.split(".")[0] in ("torch", "torchvision") for _, name in imports(tree))


def relative(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_lower_never_imports_upper(file: Path) -> None:
    own = part_of(file)
    upper = {part for part in parts_imported(file) if LEVEL[part] > LEVEL[own]}
    assert not upper, f"{relative(file)} is in {own!r} and imports {sorted(upper)}, which stand above it"


@pytest.mark.parametrize("file", [f for f in FILES if part_of(f) == "model"], ids=relative)
def test_the_model_does_not_know_what_changes_it(file: Path) -> None:
    assert not parts_imported(file) & {"quant", "train"}


@pytest.mark.parametrize("file", [f for f in FILES if part_of(f) not in ("__main__", "cli", "server")], ids=relative)
def test_nothing_imports_the_surface(file: Path) -> None:
    assert not parts_imported(file) & {"cli", "server"}


WITHOUT_TORCH = (
    "config.py", "errors.py", "memory.py", "messages.py", "checkpoint/plan.py", "checkpoint/sizes.py",
    "engine/scheduler.py",
)  # fmt: skip
NO_TORCH = [f for f in FILES if part_of(f) == "text" or relative(f) in WITHOUT_TORCH]


@pytest.mark.parametrize("file", NO_TORCH, ids=relative)
def test_text_and_scheduler_never_import_torch(file: Path) -> None:
    assert not imports_torch(ast.parse(file.read_text(encoding="utf-8")))


def test_media_import_torch_in_one_function_only() -> None:
    found = []
    for file in (f for f in FILES if part_of(f) == "media"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and imports_torch(node)]
        found += [f"{relative(file)}: {function.name}" for function in functions]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        outside = [n for node, n in imports(tree) if id(node) not in inside and n.split(".")[0] == "torch"]
        assert not outside, f"{relative(file)} imports torch outside a function"
    assert len(found) == 1, found
    assert "resize" in found[0]


def module_name(file: Path) -> str:
    return ".".join(("iolite", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_light_modules_load_without_torch() -> None:
    """What a command's help, a tokenizer or a decoder needs starts without the seconds that torch takes."""
    light = [module_name(f) for f in FILES if f in NO_TORCH or part_of(f) == "media"]
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
