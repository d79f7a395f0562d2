"""What iolite raises when the input, and not iolite, is at fault.

    IoliteError                a message of one or two lines, and an optional hint saying what to do
    ├── UsageError             a flag, an argument or a setting that cannot be used
    ├── MessageError           chat messages or tools of the wrong form
    ├── MediaError             a picture, sound or video that cannot be read or is over a limit
    ├── CheckpointError        model files: missing, truncated, contradictory or unsupported
    │   └── ConfigError        a config.json whose values we cannot honour
    ├── DownloadError          a model that is neither here nor to be fetched
    ├── ContextError           a prompt longer than the model's (or the plan's) context
    ├── BusyError              an engine that takes no more requests now; `retry_after` says when it may
    └── ProcessError           another process of the same run has ended

A command prints `error: MESSAGE`, then `hint: HINT`, and exits with 2. Anything else that is raised is our bug.
"""

from __future__ import annotations


class IoliteError(Exception):
    """Base of every error that a user can cause and mend."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(IoliteError):
    """A flag, an argument or a setting that cannot be used."""


class MessageError(IoliteError):
    """Chat messages or tools of the wrong form."""


class MediaError(IoliteError):
    """A picture, sound or video that cannot be read or is over a limit."""


class CheckpointError(IoliteError):
    """Model files that are missing, truncated, contradictory or unsupported."""


class ConfigError(CheckpointError):
    """A configuration whose values we cannot honour."""


class DownloadError(IoliteError):
    """A model that is neither here nor to be fetched."""


class ContextError(IoliteError):
    """A prompt longer than the context."""


class BusyError(IoliteError):
    """An engine that has as many requests as it takes, or is being closed."""

    def __init__(self, message: str, hint: str | None = None, *, retry_after: float = 1.0) -> None:
        """retry_after: seconds after which it may be worth asking again."""
        super().__init__(message, hint)
        self.retry_after = retry_after


class ProcessError(IoliteError):
    """Another process, without which a run cannot go on, has ended."""
