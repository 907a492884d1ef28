"""Command line of the benchmarks: ``python -m benchmarks --help``."""

from __future__ import annotations

import importlib
import os
import sys

from benchmarks import COMMANDS
from benchmarks.measure.ending import in_one_sentence


def main(arguments: list[str] | None = None) -> int:
    """Runs a command, or a preset where none is named; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells when it starts and stops
    try:
        import sdkernels  # noqa: F401
    except ImportError as error:
        print(
            f"python -m benchmarks: sdkernels is not importable ({error}); `make bench` builds it "
            "first",
            file=sys.stderr,
        )
        return 1
    name, rest = "benchmarks.run", arguments
    if arguments and arguments[0] in COMMANDS:
        name, rest = COMMANDS[arguments[0]][1], arguments[1:]
    program = "python -m benchmarks" + (f" {arguments[0]}" if rest is not arguments else "")
    return in_one_sentence(program, lambda: importlib.import_module(name).main(rest))


if __name__ == "__main__":
    sys.exit(main())
