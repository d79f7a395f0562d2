"""The text of a PDF, read in a child process with limits on memory and time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from iolite.errors import MediaError

MOST_PAGES = 2_000
MOST_TEXT = 1_000_000  # characters
MEMORY = 2 * 2**30  # bytes
SECONDS = 60
_PROGRAM = Path(__file__).with_name("pdf_child.py")
_KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PATH", "SYSTEMROOT", "TMPDIR", "TEMP")
_REFUSED = {
    "locked": "the PDF is locked by a password",
    "long": f"the PDF has more than {MOST_PAGES:,} pages or {MOST_TEXT:,} characters",
}


def pdf_pages(data: bytes) -> list[str]:
    """The text layer of each page. MediaError for what is no PDF, for too much, and for one that has no text."""
    limits = json.dumps([MEMORY, SECONDS, MOST_PAGES, MOST_TEXT])
    command = [sys.executable, "-I", "-S", str(_PROGRAM), json.dumps([path for path in sys.path if path]), limits]
    environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, env=environment, timeout=SECONDS + 10, check=False
        )
        answer = json.loads(done.stdout) if done.returncode == 0 else {}
    except subprocess.TimeoutExpired:
        raise MediaError(f"the PDF could not be read within {SECONDS} s") from None
    except ValueError:
        answer = {}
    if "pages" not in answer:
        raise MediaError(_REFUSED.get(answer.get("refused", ""), "the PDF cannot be read"), "send its text instead")
    pages = [str(page).strip() for page in answer["pages"]]
    if not any(pages):
        raise MediaError("the PDF holds no text, only pictures of it", "attach its pages as pictures")
    return pages
