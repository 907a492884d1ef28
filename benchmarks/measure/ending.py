"""How a command ends where its output goes nowhere: in one sentence."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


class BadInput(ValueError):
    """A file, folder or option that a command cannot work with; the message says all of it."""


def out_folder(path: Path) -> Path:
    """``path``, made where it is not there.

    Raises:
        BadInput: it cannot be made, or nothing can be written to it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(f"--out: expected a folder to write to, got {path} ({reason})") from None


def in_one_sentence(program: str, command: Callable[[], int], *bad_input: type[Exception]) -> int:
    """The exit code of ``command``; 141 where nobody reads its output, 2 for bad input.

    Args:
        bad_input: what it raises for that, besides BadInput.
    """
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer goes nowhere, or Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"{program}: the output was closed before its end", file=sys.stderr)
        return 141
    except (BadInput, *bad_input) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
