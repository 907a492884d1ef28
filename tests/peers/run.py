"""Runs tests of timm and transformers twice, models as they are and patched, and compares.

    python tests/peers/run.py [timm] [transformers]

The tests are those of the source distributions of the versions that are installed; pip fetches them
into build/peers. A test with another outcome is listed, and makes the exit status 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "peers"

# What pytest gets to see of each, beside the choice in plugin.py.
FILES = {
    "timm": [f"tests/test_{name}.py" for name in ("factory", "models", "prune", "task", "utils")],
    "transformers": ["tests/test_patched_models.py"],
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


def start(library: str, folder: Path, patched: bool) -> tuple[subprocess.Popen[bytes], Path]:
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


def compare(library: str) -> int:
    """The number of tests with another outcome."""
    folder = fetched(library)
    if library == "transformers":
        complete_transformers(folder)
    started = time.monotonic()
    runs = [start(library, folder, patched) for patched in (False, True)]
    for process, outcomes in runs:
        process.wait()
        if not outcomes.exists():
            print(f"{library}: pytest ended with {process.returncode}; see {outcomes.stem}.txt")
            return 1
    original, patched = (json.loads(outcomes.read_text()) for _, outcomes in runs)
    differ = {
        test: (original.get(test), patched.get(test))
        for test in sorted({*original, *patched})
        if original.get(test) != patched.get(test)
    }
    counts = {o: list(original.values()).count(o) for o in ("passed", "failed", "skipped")}
    print(
        f"{library} {version(library)}: {len(original)} tests, "
        + ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        + f" unpatched; {len(differ)} differ when patched ({time.monotonic() - started:.0f} s)"
    )
    for test, (before, after) in differ.items():
        print(f"  {before} -> {after}: {test}")
    if differ or not counts["passed"]:
        print(f"  what pytest says: {runs[1][1].with_suffix('.txt')}")
    return len(differ) + (not counts["passed"])


if __name__ == "__main__":
    sys.exit(1 if sum(compare(library) for library in sys.argv[1:] or FILES) else 0)
