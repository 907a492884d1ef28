"""How a command ends where its output goes nowhere: in one sentence."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


class BadFolder(ValueError):
    """A folder that cannot be written to; the message says which option named it."""


def out_folder(path: Path, option: str = "--out") -> Path:
    """``path``, made where it is not there.

    Raises:
        BadFolder: it cannot be made, or nothing can be written to it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        reason = error.strerror or error
        raise BadFolder(f"{option}: expected a folder to write to, got {path} ({reason})") from None


def in_one_sentence(program: str, command: Callable[[], int]) -> int:
    """The exit code of ``command``; 141 where nobody reads its output, 2 for a bad folder."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BadFolder as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # What is left in the buffer goes nowhere, or Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"{program}: the output was closed before its end", file=sys.stderr)
        return 141
