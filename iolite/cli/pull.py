"""`iolite pull`: a model from the Hugging Face Hub into the shared cache."""

from __future__ import annotations

import click

from iolite.cli.terminal import put, say


@click.command()
@click.argument("model")
@click.option("--check", is_flag=True, help="Read every file that is here and fetch damaged ones again.")
def command(model: str, check: bool) -> None:
    """Download MODEL, a Hugging Face id such as google/gemma-4-12B-it, and print its folder.

    Only what iolite uses is fetched. A download that was interrupted goes on where it stopped. HF_HOME, HF_TOKEN,
    HF_ENDPOINT, HF_HUB_OFFLINE and the proxy variables are honoured.
    """
    from iolite.checkpoint.download import pull

    try:
        folder = pull(model, check=check, report=say)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        raise
    from iolite.checkpoint import hub
    from iolite.checkpoint.pairing import published_drafter

    drafter = published_drafter(model)
    if drafter and not hub.cached(drafter):
        say(f"a drafter was published for it, which makes it faster: iolite pull {drafter}")
    put(f"{folder}\n")
