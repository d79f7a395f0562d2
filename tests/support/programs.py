"""An honest way to skip a test that needs a system program."""

from __future__ import annotations

import os
import shutil

import pytest


def need_program(name: str, package: str | None = None) -> None:
    """Skips the test, saying why, when a program is missing; fails instead where all are promised.

    `.ci/run` installs every program and sets IOLITE_TEST_ALL=1, so that nothing is skipped there for that reason.
    """
    if shutil.which(name):
        return
    reason = f"{name} is not installed (Debian package {package or name})"
    if os.environ.get("IOLITE_TEST_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
