"""`iolite show`: what a model is and what it takes, from its config.json and the headers of its weights.

Weights are neither loaded nor needed; torch is imported for `--system`, which asks it for the devices, and for the
headers of packed weights and of drafters.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from iolite.checkpoint import sizes
from iolite.checkpoint.plan import KV, Part, Plan, plan
from iolite.cli.terminal import put
from iolite.config import ModelConfig, ProcessorConfig
from iolite.errors import UsageError
from iolite.memory import human_bytes, parse_bytes, physical_memory, stated_memory

if TYPE_CHECKING:
    from iolite.checkpoint.source import Source

# What the C++ kernels are for, where they are missing.
_LOST = "Packed weights are multiplied through torch: the same results, several times slower"


@click.command()
@click.argument("model", required=False)
@click.option("-c", "--ctx-size", "--context", "context", type=int, help="Plan for this many tokens of context.")
@click.option("--parallel", type=int, help="Plan for this many sequences at a time, each with its own context.")
@click.option("--memory", metavar="SIZE", help="Plan for this much memory, as in 16GB; by default this machine's.")
@click.option("--kv", type=click.Choice(KV), help="Plan for this format of the cache of keys and values.")
@click.option("--quantize", type=click.Choice([*sizes.TILE_BYTES]), help="Plan for weights packed like this.")
@click.option("--dtype", help="Plan for computing in float32, bfloat16 or float16.")
@click.option("--drafter", is_flag=True, default=None, help="Plan for the model's drafter too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--system", is_flag=True, help="Also this machine: cores, memory, kernels, device, caches.")
def command(model: str | None, as_json: bool, system: bool, **settings: Any) -> None:
    """Describe MODEL (by default nano), or a drafter: its sizes, what it takes, its files and the memory it needs.

    With a setting to plan for, print what takes how much memory instead, whether that fits and, where it does not, what
    would: before anything is downloaded. With --system and no MODEL, only this machine is described.
    """
    asked = {name: value for name, value in settings.items() if value is not None}
    report: dict[str, Any] = {}
    config = planned = None
    if model is not None or asked or not system:
        from iolite.checkpoint.pairing import named_drafter
        from iolite.cli.show_drafter import describe_drafter

        name = "nano" if model is None else model
        if found := named_drafter(name):
            if asked:
                raise UsageError(f"{name} is a drafter", "a plan is of a model: iolite show MODEL --drafter")
            report = describe_drafter(name, found)
        else:
            path, source = _find(name)
            config = ModelConfig.from_folder(path) if source is None else source.config
            planned = make_plan(config, source, **asked)
            report = describe(name, path, config, source, planned)
    if system:
        report["system"] = describe_system(config)
    if as_json:
        put(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    elif asked and planned:
        put(_plan_text(report["model"], planned) + _text({"system": report["system"]} if system else {}))
    else:
        put(_text(report))


def make_plan(config: ModelConfig, source: Source | None, memory: str | None = None, **settings: Any) -> Plan:
    """The plan for `iolite.checkpoint.plan`'s settings; what is not said is taken from the files and this machine."""
    scheme = settings.pop("quantize", None) or (source.scheme if source else None)
    if source and source.scheme and scheme != source.scheme:
        raise UsageError(f"{source.name} is packed as {source.scheme} already", f"leave {scheme} out")
    tiles = None
    if source and source.scheme:
        tiles = {name: format.tile_bytes for name, format in source.packed_formats().items()}
    there = stated_memory() or physical_memory() if memory is None else parse_bytes(memory)
    if settings.pop("drafter", None):
        settings["drafter"] = Part("drafter", "drafter", 2 * sizes.drafter_values(config), "bfloat16")
    return plan(config, quantize=scheme, memory=there, tiles=tiles, **settings)


def _find(name: str) -> tuple[Path, Source | None]:
    """Where a model is, and its files' headers; None of those while its weights are not on this machine."""
    from iolite.checkpoint.hub import cached, is_complete, is_id, resolve
    from iolite.checkpoint.source import open_source

    partly = cached(name) if is_id(name) and not os.path.exists(name) else None
    if partly and (partly / "config.json").is_file() and not is_complete(partly):
        return partly, None
    path = resolve(name)
    return path, open_source(name) if path.is_file() or is_complete(path) else None


def describe(name: str, path: Path, config: ModelConfig, source: Source | None, planned: Plan) -> dict[str, Any]:
    """Everything that the config, the processor's settings, the files' headers and the plan say, for JSON."""
    files = source.files if source and path.is_file() else [p for p in sorted(path.iterdir()) if p.is_file()]
    processor = source.processor() if source else ProcessorConfig.from_folder(path, config)
    text = config.text
    full = sum(text.is_full(layer) for layer in range(text.num_hidden_layers))
    return {
        "model": name,
        "path": str(path),
        "architecture": "gemma4_unified",
        "modalities": list(config.modalities),
        "context": text.max_position_embeddings,
        "parameters": parameters(config),
        "text": {
            "layers": text.num_hidden_layers,
            "sliding_layers": text.num_hidden_layers - full,
            "full_layers": full,
            "sliding_window": text.sliding_window,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "heads": text.num_attention_heads,
            "sliding_kv_heads": text.num_key_value_heads,
            "full_kv_heads": text.num_global_key_value_heads,
            "head_dim": text.head_dim,
            "full_head_dim": text.global_head_dim,
            "vocabulary": text.vocab_size,
            "tied_head": config.tie_word_embeddings,
        },
        "media": _media(config, processor),
        "weights": _weights(config, source),
        "kv_cache": kv_cache(config, planned.kv),
        "drafter": _drafter(source, name),
        "files": {p.name: p.stat().st_size for p in files},
        **_plan_numbers(planned),
    }


def _drafter(source: Source | None, name: str) -> dict[str, Any] | None:
    """The drafter that `--drafter auto` takes with this model, and what it passes over; None where there is neither."""
    from iolite.checkpoint.pairing import AUTO, Pair, find_pair

    found = find_pair(source, name, AUTO) if source else None
    if found is None or not (isinstance(found, Pair) or found.passed):
        return None
    pair = found if isinstance(found, Pair) else None
    return {
        "path": str(pair.source.files[0]) if pair else None,
        "where": pair.where if pair else None,
        "passed_over": list(found.passed),
    }


def _plan_numbers(planned: Plan) -> dict[str, Any]:
    """The plan for JSON: what is asked for most beside the rest of the report, all of it under "plan"."""
    whole = planned.to_dict()
    first = "weights_bytes", "cache_bytes", "cache_bytes_per_token", "total_bytes", "fits", "max_context"
    return {**{key: whole[key] for key in first}, "plan": whole}


def parameters(config: ModelConfig) -> dict[str, int]:
    """How many trained numbers each part has, and in all. `layer_scalar` is stored but not trained, so not counted."""
    from iolite.checkpoint.names import expected_shapes, is_buffer, part

    count: dict[str, int] = {}
    for name, shape in expected_shapes(config).items():
        if not is_buffer(name):
            count[part(name)] = count.get(part(name), 0) + math.prod(shape)
    return {"total": sum(count.values()), **count}


def kv_cache(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Bytes of keys and values in a number format, for one sequence.

    Full-attention layers keep every token; sliding layers keep one window and what a sequence can go back by, however
    long the context is. For the 12B in bfloat16: 10,240 bytes a token and 671 MB.
    """
    text = config.text
    limit = text.max_position_embeddings
    full, ring = sizes.cache_rows(text, dtype)
    lengths = [n for n in (8_192, 32_768, 131_072) if n < limit] + [limit]
    return {
        "dtype": dtype,
        "bytes_per_token": full,
        "sliding_bytes": ring * sizes.ring_rows(text, limit),
        "bytes_at": {str(n): sizes.cache_bytes(text, n, dtype) for n in lengths},
    }


def describe_system(config: ModelConfig | None) -> dict[str, Any]:
    """This machine, and what iolite would compute with on it."""
    from iolite.device import choose
    from iolite.evals import machine

    choice = choose(
        checkpoint_dtype=config.dtype if config else "bfloat16",
        parameters=parameters(config)["total"] if config else None,
    )
    hardware, versions, kernels = machine.hardware(), machine.versions(), machine.kernels()
    return {
        "platform": versions["platform"],
        "python": versions["python"],
        "torch": versions["torch"],
        "processor": hardware["processor"],
        "cores": os.cpu_count(),
        "usable_cores": hardware["logical_cores"],
        "physical_cores": hardware["cores"],
        "threads": kernels["threads"],
        "memory_bytes": hardware["memory_bytes"],
        "kernels": {"isa": kernels["isa"], "reason": kernels["reason"], "lost": _LOST if kernels["reason"] else None},
        "gpu": machine.gpu(),
        "caches": _caches(),
        "device": str(choice.device),
        "dtype": choice.dtype_name,
        "reason": choice.reason,
    }


def _caches() -> list[dict[str, Any]]:
    """The folders that models and packed weights are kept in, and the bytes in them."""
    from iolite.checkpoint.hub import cache_folder

    own = os.environ.get("IOLITE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "iolite"
    folders = {"downloads": cache_folder(), "packed weights": Path(own).expanduser()}
    return [{"holds": holds, "path": str(path), "bytes": _bytes_below(path)} for holds, path in folders.items()]


def _bytes_below(folder: Path) -> int:
    """What the files in a folder take, 0 where there is none; a link counts as a link."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # another program may be clearing up
                total += os.lstat(os.path.join(where, name)).st_size
    return total


def _media(config: ModelConfig, processor: ProcessorConfig) -> dict[str, Any]:
    media: dict[str, Any] = {}
    if config.vision:
        side = config.vision.model_patch_size
        budgets = processor.image_budgets
        media["image"] = {
            "patch": side,
            "tokens": processor.image_max_soft_tokens,
            "budgets": list(budgets) if budgets else f"1 to {config.vision.mm_posemb_size}",
        }
        media["video"] = {"frames": processor.num_frames, "tokens_per_frame": processor.video_max_soft_tokens}
    if config.audio:
        media["audio"] = {
            "sampling_rate": processor.sampling_rate,
            "samples_per_token": processor.audio_samples_per_token,
            "seconds_at_once": processor.audio_seq_length * processor.audio_samples_per_token / processor.sampling_rate,
        }
    return media


def _weights(config: ModelConfig, source: Source | None) -> dict[str, Any]:
    """What is stored, checked against the config; without weight files, what would be."""
    from iolite.checkpoint.names import expected_shapes

    shapes = expected_shapes(config)
    if source is None:
        values = sum(math.prod(shape) for shape in shapes.values())
        return {"here": False, "dtype": config.dtype, "bytes": values * sizes.BYTES.get(config.dtype, 2)}
    stored = source.sizes()
    return {
        "here": True,
        "dtype": "+".join(sorted(stored)),
        "scheme": source.scheme,
        "tensors": len(shapes),
        "bytes": sum(stored.values()),
        "bytes_by_dtype": dict(stored),
    }


def _text(report: Mapping[str, Any]) -> str:
    """The report for people: one subject a line."""
    rows: list[tuple[str, str]] = []
    if "drafts_for" in report:
        from iolite.cli.show_drafter import drafter_rows

        rows += drafter_rows(report)
    elif "model" in report:
        rows += _model_rows(report)
    if "system" in report:
        rows += _system_rows(report["system"])
    return "".join(f"{label:<12}  {value}\n" for label, value in rows)


def _system_rows(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    memory = human_bytes(s["memory_bytes"]) if s["memory_bytes"] else "unknown"
    cores = f"{s['physical_cores']} cores to use (logical: {s['usable_cores']} of {s['cores']})"
    kernels, gpu = s["kernels"], s["gpu"]
    code = f"C++ for {kernels['isa']}" if kernels["isa"] else f"plain torch: {kernels['reason']}. {kernels['lost']}"
    cuda = f"{gpu['cuda']} on {', '.join(gpu['devices'])}" if gpu["cuda"] else gpu["reason"]
    return [
        ("machine", f"{s['processor']}, {cores}, {memory} of memory, {s['platform']}"),
        ("software", f"Python {s['python']}, torch {s['torch']}"),
        ("threads", str(s["threads"])),
        ("kernels", code),
        ("CUDA", f"{cuda}; Triton {gpu['triton'] or 'is not installed'}"),
        *(("cache", f"{c['path']}: {c['holds']}, {human_bytes(c['bytes'])}") for c in s["caches"]),
        ("computes in", s["reason"]),
    ]


def _model_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    t, p, w, kv = (report[key] for key in ("text", "parameters", "weights", "kv_cache"))
    parts = ", ".join(f"{name} {count:,}" for name, count in p.items() if name != "total")
    cache = ", ".join(f"{human_bytes(size)} at {int(n):,}" for n, size in kv["bytes_at"].items())
    files = ", ".join(f"{name} ({human_bytes(size)})" for name, size in report["files"].items())
    here = f"{w['tensors']} tensors" if w["here"] else "not here; the size they would have"
    return [
        ("model", report["model"]),
        ("folder", report["path"]),
        ("takes", ", ".join(report["modalities"])),
        ("context", f"{report['context']:,} tokens"),
        ("parameters", f"{p['total']:,}: {parts}"),
        (
            "layers",
            f"{t['layers']}: {t['sliding_layers']} with a window of {t['sliding_window']:,}, "
            f"{t['full_layers']} with full attention",
        ),
        (
            "width",
            f"{t['hidden_size']:,}, feed-forward {t['intermediate_size']:,}, {t['heads']} heads of "
            f"{t['head_dim']} (full: {t['full_head_dim']}), {t['sliding_kv_heads']} key-value heads "
            f"(full: {t['full_kv_heads']})",
        ),
        ("vocabulary", f"{t['vocabulary']:,}, {'tied' if t['tied_head'] else 'separate'} head"),
        *_media_rows(report["media"]),
        ("weights", f"{human_bytes(w['bytes'])} in {w['dtype']}, {here}"),
        (
            "KV cache",
            f"{kv['bytes_per_token']:,} bytes a token + {human_bytes(kv['sliding_bytes'])} in {kv['dtype']}: {cache}",
        ),
        *_drafter_row(report["drafter"]),
        ("files", files),
        ("memory", _memory_row(report["plan"])),
    ]


def _drafter_row(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    passed = "; passed over ".join(["", *found["passed_over"]])
    return [("drafter", f"{found['where'] or 'none that fits'}{passed}")]


def _memory_row(p: Mapping[str, Any]) -> str:
    weights, total = p["scheme"] or p["dtype"], human_bytes(p["total_bytes"])
    needs = f"{total} with {p['context']:,} tokens, weights in {weights}, cache in {p['kv']}"
    if p["fits"] is None:
        return needs
    there = human_bytes(p["memory_bytes"])
    return f"{needs}: fits in {there}" if p["fits"] else f"{needs}: not in {there}; --context N says what fits"


def _plan_text(name: str, planned: Plan) -> str:
    """A table of what takes how much, and whether it fits."""
    p = planned
    many = f"{p.parallel} sequences of {p.context:,} tokens" if p.parallel > 1 else f"{p.context:,} tokens"
    rows = [(f"{name}, {many}", "BYTES", "", "FORMAT")]
    rows += [(part.name, f"{part.bytes:,}", human_bytes(part.bytes), part.dtype or "") for part in p.parts]
    rows += [("in all", f"{p.total_bytes:,}", human_bytes(p.total_bytes), "")]
    wide = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{a:<{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}  {d}".rstrip() for a, b, c, d in rows]
    token = f"each further token of a sequence: {p.cache_bytes_per_token:,} bytes"
    return "\n".join([*lines, "", token, p.verdict]) + "\n"


def _media_rows(media: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if "image" in media:
        i, v = media["image"], media["video"]
        budgets = i["budgets"] if isinstance(i["budgets"], str) else ", ".join(map(str, i["budgets"]))
        rows.append(
            ("pictures", f"up to {i['tokens']} tokens of {i['patch']} x {i['patch']} pixels; allowed: {budgets}")
        )
        rows.append(("video", f"{v['frames']} frames of up to {v['tokens_per_frame']} tokens"))
    if "audio" in media:
        a = media["audio"]
        each = 1000 * a["samples_per_token"] / a["sampling_rate"]
        rows.append(("sound", f"{each:g} ms a token, {a['seconds_at_once']:g} s at once"))
    return rows
