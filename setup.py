"""Puts together what pyproject.toml calls dynamic, and the extension; see build_tools/."""

import os
import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))
from build_tools.decision import decide, inspect_environment, point_to_toolkit
from build_tools.extension import configure
from build_tools.metadata import metadata

COMMANDS = ("bdist_wheel", "editable_wheel", "sdist", "build_ext")


def main() -> None:
    point_to_toolkit(os.environ)
    environment = inspect_environment(os.environ)
    decision = decide(environment)
    if decision.target == "stop":
        raise SystemExit(f"sdkernels: {decision.reason}")
    command = next((word for word in sys.argv[1:] if word in COMMANDS), "")
    if command != "sdist":
        kind = "pure Python" if decision.target == "none" else decision.target
        print(f"sdkernels: {kind} build ({decision.reason})", flush=True)
    setup(
        **metadata(environment, decision, command, os.environ),
        **configure(environment, decision),
    )


if __name__ == "__main__":
    main()
