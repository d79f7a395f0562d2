"""What is written about iolite is there: the reference is fresh, links lead somewhere, the README's tree exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def generator():
    """docs/reference/generate.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "reference" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cli.md", "python.md"])
def test_the_reference_is_fresh(generator, name):
    written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert written == generator.PAGES[name](), "stale: run `make docs`"


def test_every_public_name_is_in_the_reference(generator):
    import iolite

    described = {name for names in generator.PUBLIC.values() for _, name in names} | {"IoliteError", "__version__"}
    assert set(iolite.__all__) <= described


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = _LINK.findall(_FENCED.sub("", page.read_text(encoding="utf-8")))
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_tree_of_the_readme_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^## The tree\n+```\n(.*?)^```", text, re.MULTILINE | re.DOTALL).group(1)
    folder, found = ROOT, []
    for line in block.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else ROOT
        found.append(folder / name)
        if not line.startswith(" "):
            folder = ROOT / name
    assert len(found) > 10
    assert [str(path) for path in found if not path.exists()] == []
