"""Writes the reference beside this file: cli.md from the help of every command, python.md from docstrings.

`make docs` runs it; tests/test_docs.py fails when a file is stale. Sources are parsed, not imported, so nothing heavy
is loaded and what is printed is what stands in the code.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path

import click

import iolite
from iolite.cli import COMMANDS, cli

HERE = Path(__file__).parent
PACKAGE = Path(iolite.__file__).parent
WIDTH = 100  # columns of a help text

# Heading -> what stands under it, as (module below iolite, class or function).
PUBLIC: dict[str, list[tuple[str, str]]] = {
    "Loading": [("generate.model", "load"), ("device", "Choice")],
    "The model": [("generate.model", "Model"), ("generate.model", "Piece")],
    "Replies": [
        ("generate.reply", "Reply"),
        ("generate.reply", "ToolCall"),
        ("generate.reply", "Usage"),
        ("generate.reply", "Timings"),
        ("generate.reply", "TokenLogprobs"),
        ("generate.reply", "Alternative"),
    ],
    "Streams": [
        ("generate.stream", "ReplyStream"),
        ("text.stream", "ContentDelta"),
        ("generate.logprobs", "ScoredDelta"),
        ("text.stream", "ReasoningDelta"),
        ("text.stream", "ToolCallStart"),
        ("text.stream", "ToolCallDelta"),
        ("text.stream", "ToolCallEnd"),
    ],
    "Sampling": [("generate.sampling", "SamplingParams")],
    "Prompts": [("prompt", "Prompt"), ("prompt", "Span")],
}


def command_page() -> str:
    """cli.md: `--help` of iolite, of each command and of each command's own commands."""
    root = click.Context(cli, info_name="iolite", terminal_width=WIDTH, max_content_width=WIDTH, **cli.context_settings)
    sections = [_help(cli, root, 2)]
    for name in COMMANDS:
        command = cli.get_command(root, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=root)
        sections.append(_help(command, context, 2))
        for inner_name, inner in sorted(getattr(command, "commands", {}).items()):
            sections.append(_help(inner, click.Context(inner, info_name=inner_name, parent=context), 3))
    intro = (
        "# Commands\n\nWhat `--help` says; `make docs` writes this page. The answer goes to stdout, everything else to "
        "stderr.\nExit codes: 0 done, 2 the input is at fault (`error: …`, then `hint: …`), 130 interrupted.\n"
    )
    return "\n".join([intro, *sections])


def _help(command: click.Command, context: click.Context, level: int) -> str:
    return f"{'#' * level} {context.command_path}\n\n```text\n{command.get_help(context).strip()}\n```\n"


def python_page() -> str:
    """python.md: signatures and docstrings of what is public, and the tree of errors."""
    intro = (
        "# Python\n\nSignatures and docstrings of the public interface; `make docs` writes this page. `iolite.load`, "
        "`Model`, `Reply`,\n`Prompt` and `IoliteError` are imported from `iolite`, the rest from the module that is "
        "named.\nThe [guide](../guides/python.md) shows them at work.\n"
    )
    sections = [intro]
    for heading, names in PUBLIC.items():
        sections.append(f"## {heading}\n")
        for module, name in names:
            sections += _describe(_Module(PACKAGE / f"{module.replace('.', '/')}.py"), f"iolite.{module}", name)
    errors = _Module(PACKAGE / "errors.py")
    sections.append(f"## Errors\n\n`iolite.errors`\n\n{_doc(errors.tree)}\n")
    return "\n".join(sections)


class _Module:
    """The source of one module, as a tree and as lines."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self.tree, self.lines = ast.parse(text), text.splitlines()

    def find(self, name: str) -> ast.ClassDef | ast.FunctionDef:
        for node in self.tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                return node
        raise LookupError(name)

    def head(self, function: ast.FunctionDef) -> str:
        """The lines from `def` to the colon."""
        lines = self.lines[function.lineno - 1 : function.body[0].lineno - 1]
        return textwrap.dedent("\n".join(lines)).removeprefix("def ").rstrip().removesuffix(":")

    def fields(self, node: ast.ClassDef) -> str:
        """The annotated names of a class with their comments, as they stand there."""
        found = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        return "\n".join(textwrap.dedent("\n".join(self.lines[item.lineno - 1 : item.end_lineno])) for item in found)


def _describe(module: _Module, where: str, name: str) -> list[str]:
    """Markdown of one function, or of one class with its fields, properties and methods."""
    node = module.find(name)
    head = [f"### {name}", f"`{where}`"]
    if isinstance(node, ast.FunctionDef):
        return [_paragraphs(*head, _code(module.head(node)), _doc(node))]
    fields = module.fields(node)
    found = [_paragraphs(*head, _doc(node), _code(fields) if fields else "")]
    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or method.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator) for decorator in method.decorator_list}
        if "property" in decorators:
            assert method.returns is not None
            found.append(_paragraphs(f"`{name}.{method.name}: {ast.unparse(method.returns)}`", _doc(method)))
        elif "overload" not in decorators:
            found.append(_paragraphs(f"#### {name}.{method.name}", _code(module.head(method)), _doc(method)))
    return found


def _paragraphs(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text) + "\n"


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _doc(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    return inspect.cleandoc(ast.get_docstring(node) or "")


PAGES = {"cli.md": command_page, "python.md": python_page}


def main() -> None:
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
