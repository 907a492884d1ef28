"""How a command of ``python -m benchmarks`` is asked, and what a record says of how it was."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from pathlib import Path


def parser(command: str, text: str, out: Path | None = None) -> argparse.ArgumentParser:
    """With ``--out``, a folder, where ``out`` gives its default."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks {command}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if out is not None:
        made.add_argument(
            "--out", type=Path, default=out, metavar="DIR", help=f"folder (default: {out})"
        )
    return made


def command_line(command: str, arguments: Iterable[str] | None) -> str:
    """
    >>> command_line("scaling", ["--out", "my runs"])
    "python -m benchmarks scaling --out 'my runs'"
    """
    words = ["python", "-m", "benchmarks", *command.split(), *(arguments or ())]
    return shlex.join(words)
