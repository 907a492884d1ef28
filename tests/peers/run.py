"""Runs tests of timm and transformers twice, models as they are and patched, and compares.

    python tests/peers/run.py [--all] [--minutes 30] [timm] [transformers]

The tests are those of the source distributions of the versions that are installed; pip fetches them
into build/peers. A few small models of timm and what all models of transformers share, by default;
--all takes a model of every family. A test with another outcome is listed, and makes the exit
status 1; so does a run that is stopped, because it takes longer than --minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "peers"

# What pytest gets to see of each, beside the choice in plugin.py.
FILES = {
    "timm": [f"tests/test_{name}.py" for name in ("factory", "models", "prune", "task", "utils")],
    "transformers": ["tests/test_patched_models.py"],
}

# What a patched model does otherwise, and says so.
DOCUMENTED = {
    "test_retain_grad_hidden_states_attentions": "attention maps are refused in training",
}


def fetched(library: str) -> Path:
    """The unpacked source distribution of the version that is installed."""
    name = f"{library}-{version(library)}"
    folder = CACHE / name
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Built in isolation, as pip does to learn its name: that takes the index a second time.
        command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest"]
        requirement = f"{library}=={version(library)}"
        subprocess.run([sys.executable, "-m", "pip", *command, CACHE, requirement], check=True)
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    return folder


def complete_transformers(folder: Path) -> None:
    """Its distribution has the tests that all models share, but no model's own."""
    tests = folder / "tests"
    # Mixins of other parts, which are not in the distribution; no test of theirs is wanted here.
    for path, name in (
        ("exporters/test_export.py", "ExportTesterMixin"),
        ("generation/test_utils.py", "GenerationTesterMixin"),
    ):
        (tests / path).parent.mkdir(exist_ok=True)
        (tests / path).write_text(f"class {name}:\n    pass\n")
    for package in (tests, tests / "exporters", tests / "generation"):
        (package / "__init__.py").touch()
    (tests / "test_patched_models.py").write_text((HERE / "transformers_models.py").read_text())


def start(
    library: str, folder: Path, patched: bool, everything: bool
) -> tuple[subprocess.Popen[bytes], Path]:
    outcomes = CACHE / f"{library}-{'patched' if patched else 'original'}.json"
    outcomes.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(HERE), str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])]
        ),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PEER_LIBRARY": library,
        "PEER_PATCHED": "1" if patched else "",
        "PEER_ALL": "1" if everything else "",
        "PEER_OUTCOMES": str(outcomes),
    }
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-q"]
    with open(outcomes.with_suffix(".txt"), "w") as output:
        process = subprocess.Popen(
            [*command, "--tb=short", *FILES[library]],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return process, outcomes


def wait(process: subprocess.Popen[bytes], deadline: float) -> None:
    """Until the deadline; pytest takes ^C for the end, and what was found is written down."""
    try:
        process.wait(max(deadline - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()


def compare(library: str, everything: bool, minutes: float) -> tuple[dict[str, Any], bool]:
    """A line of the table, and whether all is well."""
    folder = fetched(library)
    if library == "transformers":
        complete_transformers(folder)
    started = time.monotonic()
    runs = [start(library, folder, patched, everything) for patched in (False, True)]
    for process, _ in runs:
        wait(process, started + 60 * minutes)
    found: list[dict[str, str]] = []
    for process, outcomes in runs:
        if not outcomes.exists():
            print(f"{library}: pytest ended with {process.returncode}; see {outcomes.stem}.txt")
        found.append(json.loads(outcomes.read_text()) if outcomes.exists() else {})
    original, patched = found
    differ = {
        test: (original.get(test), patched.get(test))
        for test in sorted({*original, *patched})
        if original.get(test) != patched.get(test)
    }
    known = {test for test in differ if test.rpartition("::")[2] in DOCUMENTED}
    for test, (before, after) in differ.items():
        why = f" ({DOCUMENTED[test.rpartition('::')[2]]})" if test in known else ""
        print(f"  {before} -> {after}{why}: {test}")
    ended = all(process.returncode in (0, 1) for process, _ in runs)
    if differ or not ended:
        print(f"  what pytest says: {CACHE}/{library}-*.txt")
    line: dict[str, Any] = {"library": f"{library} {version(library)}", "tests": len(original)}
    for name, outcomes in (("", original), (", patched", patched)):
        for outcome in ("passed", "failed", "skipped"):
            line[outcome + name] = list(outcomes.values()).count(outcome)
    line |= {
        "as documented": len(known),
        "differ": len(differ) - len(known),
        "s": round(time.monotonic() - started),
    }
    if not ended:
        line["library"] += " (stopped)"
    return line, ended and len(differ) == len(known) and line["passed"] > 0


def table(lines: list[dict[str, Any]]) -> str:
    rows = [[*lines[0]], ["---"] * len(lines[0]), *([*map(str, each.values())] for each in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests of timm and transformers, patched and not.")
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help="timm, transformers")
    parser.add_argument("--all", action="store_true", help="a model of every family")
    parser.add_argument("--minutes", type=float, default=30, help="for each library")
    options = parser.parse_args()
    lines, well = [], True
    for library in options.libraries or FILES:
        line, agrees = compare(library, options.all, options.minutes)
        lines.append(line)
        well = well and agrees
    print(f"\nPyTorch {version('torch')}, Python {platform.python_version()}\n\n{table(lines)}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
