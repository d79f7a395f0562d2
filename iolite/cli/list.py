"""`iolite list`: the models on this machine."""

from __future__ import annotations

import json
from datetime import datetime

import click

from iolite.cli.terminal import put
from iolite.memory import human_bytes


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """List the models on this machine that iolite can run: the embedded one and those of the Hugging Face cache."""
    from iolite.checkpoint.hub import list_models

    models = list_models()
    if as_json:
        rows = [
            {
                "id": m.name,
                "path": str(m.folder),
                "bytes": m.size,
                "modified": datetime.fromtimestamp(m.modified).astimezone().isoformat(timespec="seconds"),
                "dtype": m.config.dtype,
                "modalities": list(m.config.modalities),
                "complete": m.complete,
            }
            for m in models
        ]
        put(json.dumps({"models": rows}, indent=2, ensure_ascii=False) + "\n")
        return
    table = [("MODEL", "SIZE", "FORMAT", "MODIFIED", "")]
    for m in models:
        day = datetime.fromtimestamp(m.modified).strftime("%Y-%m-%d")
        note = "" if m.complete else f"incomplete: iolite pull {m.name}"
        table.append((m.name, human_bytes(m.size), m.config.dtype, day, note))
    widths = [max(len(row[i]) for row in table) for i in range(5)]
    for row in table:
        put("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")
