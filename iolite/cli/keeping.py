"""A chat that is kept: its messages after every turn, and its cache beside them, so that it goes on after a restart.

`chat.json` is what `/save` writes; the folder `chat.json.cache` holds what the model has read, as in
`iolite/prefix/disk.py`. It may be deleted at any time: the next turn then reads the whole conversation again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from iolite.cli.terminal import say, working
from iolite.errors import UsageError

if TYPE_CHECKING:
    from iolite.cli.conversation import Conversation
    from iolite.generate.model import Model

# A cache is written whole. Up to this size that takes about as long as a few tokens of a large model; a larger one is
# written when it has grown by an eighth, and at the end, so that all writes together are some nine times its size.
EVERY_TURN = 256_000_000
GROWTH = 1 / 8


class Keeper:
    """Writes one conversation of one model."""

    def __init__(self, path: Path, model: Model, limit_bytes: int) -> None:
        """limit_bytes: of the cache. Raises UsageError when there is no such place."""
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path} cannot be written: there is no folder {path.absolute().parent}")
        self.path, self.model = path, model
        model.keep_on_disk(path.with_name(f"{path.name}.cache"), limit_bytes, lambda note: say(f"note: {note}"))

    def save(self, talk: Conversation) -> None:
        """After a turn. Raises CheckpointError when the disk does not take it; what was there before then stays."""
        talk.write(self.path, self.model.name)
        self._save_cache(0.0 if self.model.prefixes.num_bytes <= EVERY_TURN else GROWTH)

    def close(self) -> None:
        """When the chat is over."""
        self._save_cache(0.0)

    def forget(self, talk: Conversation) -> None:
        """When everything that was said is to be forgotten."""
        disk = self.model.prefixes.disk
        assert disk is not None
        disk.clear()
        talk.write(self.path, self.model.name)

    def _save_cache(self, growth: float) -> None:
        with working("Keeping the conversation"):
            self.model.prefixes.save(most=1, growth=growth)
