"""Command line of the benchmarks: ``python -m benchmarks --help``."""

from __future__ import annotations

import importlib
import os
import sys

# Each is imported when it is called for: some need neither pytest nor plots.
COMMANDS = {
    "report": "benchmarks.report.rebuild",
    "compare": "benchmarks.report.compare",
    "break-even": "benchmarks.studies.break_even",
    "patched-classes": "benchmarks.studies.patched_classes",
    "batch-norm": "benchmarks.studies.batch_norm",
    "scaling": "benchmarks.studies.scaling.command",
    "cuda-bandwidth": "benchmarks.studies.cuda_bandwidth",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command, or a preset where none is named; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler talks, as soon as it is loaded
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
        name, rest = COMMANDS[arguments[0]], arguments[1:]
    try:
        code: int = importlib.import_module(name).main(rest)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer goes nowhere, or Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(
            "python -m benchmarks: the output was closed before its end; what was measured is kept",
            file=sys.stderr,
        )
        return 141
    return code


if __name__ == "__main__":
    sys.exit(main())
