"""A program of its own: a PDF on stdin, the text of its pages on stdout as a JSON list. `pdf.py` runs it."""

from __future__ import annotations

import io
import json
import sys


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])  # the parent's, so that the same packages are found without `site`
    memory, seconds, most_pages, most_text = json.loads(sys.argv[2])
    import pypdf

    if sys.platform.startswith("linux"):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reader = pypdf.PdfReader(io.BytesIO(sys.stdin.buffer.read()))
    if reader.is_encrypted and not reader.decrypt(""):
        print(json.dumps({"refused": "locked"}))
        return
    pages: list[str] = []
    left = most_text
    for page in reader.pages:
        if len(pages) == most_pages or left <= 0:
            print(json.dumps({"refused": "long"}))
            return
        pages.append(page.extract_text())
        left -= len(pages[-1])
    print(json.dumps({"pages": pages}))


if __name__ == "__main__":
    main()
