"""Flags that several commands take, spelled as people know them from other engines."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from iolite.cli.attachments import kind_of

if TYPE_CHECKING:
    from iolite.generate.model import Model

DRAFTER = "auto"  # what --drafter is where it is not given

Command = TypeVar("Command", bound=Callable[..., Any])

SAMPLING = (
    click.option("-n", "--max-tokens", type=int, default=2048, show_default=True, help="Longest answer, in tokens."),
    click.option(
        "--temp", "--temperature", "temperature", type=float, help="How freely to draw; 0: always the likeliest token."
    ),
    click.option("--top-p", type=float, help="Draw from the likeliest tokens that make up this probability."),
    click.option("--top-k", type=int, help="Draw from this many of the likeliest tokens; 0: from all."),
    click.option("--min-p", type=float, help="Leave out what is less likely than this times the likeliest."),
    click.option(
        "--repeat-penalty",
        "--repetition-penalty",
        "repetition_penalty",
        type=float,
        help="Above 1: repeat less; 1: off.",
    ),
    click.option("--seed", type=int, help="Same seed, same answer; by default a new one."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text. May be repeated."),
)
LOADING = (
    click.option(
        "-c",
        "--ctx-size",
        "context",
        type=int,
        help="Tokens of prompt and answer together; by default all that the model takes.",
    ),
    click.option("-t", "--threads", type=click.IntRange(1, 1024), help="CPU threads to compute with."),
    click.option("--device", help="cpu, cuda, cuda:N or mps; by default the fastest there is."),
    click.option("--dtype", help="float32, bfloat16 or float16; by default what suits model and device."),
    click.option(
        "--quantize", type=click.Choice(["int4", "int8"]), help="Pack float weights; what comes out is kept in a cache."
    ),
    click.option(
        "--kv",
        type=click.Choice(["auto", "bf16", "float32", "int8"]),
        default="auto",
        show_default=True,
        help="Format of the cache of keys and values.",
    ),
    click.option(
        "--drafter",
        metavar="auto|none|PATH",
        default=DRAFTER,
        show_default=True,
        help="Small network that guesses tokens ahead, for MODEL to check in one pass. auto: the one that lies with "
        "MODEL or in the Hugging Face cache; PATH: this folder, .gguf file or id.",
    ),
)
_LOADING = ("context", "threads", "device", "dtype", "quantize", "kv", "drafter")  # the parameters of LOADING
IMAGE_TOKENS = click.option(
    "--image-max-tokens",
    "--image-tokens",
    "image_tokens",
    type=int,
    help="Most tokens of one picture; more for small text. The 12B takes 70, 140, 280 (its default), 560 or 1120.",
)
THINKING = click.option(
    "--thinking/--no-thinking", default=False, help="Let the model think before it answers (off by default)."
)
SYSTEM = click.option("--system", metavar="TEXT", help="System prompt.")
VERBOSE = click.option("--verbose", is_flag=True, help="Print load time and tokens per second to stderr.")


class Number(click.FloatRange):
    """A finite number within a range: click's own takes nan, which is neither too small nor too large."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def add(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator from several; the help lists them in this order."""

    def decorate(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def looks_like_model(word: str) -> bool:
    """Whether a word on the command line means a model: "nano", a model folder, or OWNER/NAME as on Hugging Face."""
    if word == "nano" or os.path.isfile(os.path.join(word, "config.json")) or word.lower().endswith(".gguf"):
        return True
    from iolite.checkpoint.hub import is_id

    return is_id(word) and not kind_of(word) and not os.path.exists(word)


def take_loading(settings: dict[str, Any]) -> dict[str, Any]:
    """Takes the values of LOADING out of a command's settings."""
    return {name: settings.pop(name) for name in _LOADING}


def load_model(name: str, threads: int | None, drafter: str = DRAFTER, **settings: Any) -> Model:
    """`iolite.load`, with a spinner on the terminal while it works."""
    from iolite.cli.terminal import loading

    with loading(name) as progress:
        import torch

        from iolite.generate.model import load

        if threads:
            from iolite.kernels import cpu

            torch.set_num_threads(threads)
            if cpu.load() is not None:
                cpu.set_threads(threads)
        return load(name, progress=progress, drafter=None if drafter == "none" else drafter, **settings)
