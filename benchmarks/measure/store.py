"""What an unfinished run has measured so far: one file a case, so that it can be continued."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure.ending import BadInput
from benchmarks.measure.environment import MACHINE

FOLDER = "unfinished"
_SAME = (*MACHINE, "sdkernels", "commit")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a reader never sees half a file."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(value, indent=1))
    os.replace(part, path)


def read_json(path: Path) -> Any:
    """Plain or compressed: where only ``x.json.gz`` is there, ``x.json`` is read from that.

    Raises:
        OSError: there is none of them.
        ValueError: it holds no JSON.
    """
    packed = path.with_name(path.name + ".gz")
    if packed.exists() and not path.exists():
        path = packed
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """In what an unfinished run is another one; empty where it can go on.

    >>> differences({"preset": "quick", "gpu": None}, {"preset": "full", "gpu": None})
    "preset ('quick', now 'full')"
    """
    return ", ".join(
        f"{name} ({there.get(name)!r}, now {value!r})"
        for name, value in here.items()
        if there.get(name) != value
    )


@dataclass(frozen=True)
class Store:
    """The finished cases of a run, in a folder of their own."""

    folder: Path

    @classmethod
    def open(
        cls,
        directory: Path,
        settings: dict[str, Any],
        environment: dict[str, Any],
        fresh: bool = False,
    ) -> Store:
        """The cases of an unfinished run in ``directory``, or none.

        Args:
            settings: what a run must share with the one it continues: preset, filter, device.
            environment: machine, versions and commit must be the same too.
            fresh: start over, whatever lies there.

        Raises:
            BadInput: an unfinished run of something else is there, and ``fresh`` is not set.
        """
        store = cls(directory / FOLDER)
        header = settings | {name: environment[name] for name in _SAME}
        if fresh:
            store.discard()
        store.folder.mkdir(parents=True, exist_ok=True)
        path = store.folder / "run.json"
        there = json.loads(path.read_text()) if path.exists() else header
        if differing := differences(there, header):
            raise BadInput(
                f"{store.folder} holds an unfinished run with another {differing}; finish it with "
                "the same arguments, or start over with --fresh"
            )
        write_json(path, header)
        return store

    def _path(self, name: str) -> Path:
        # Names may be longer than a file's name may be.
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"

    def load(self, name: str) -> Any:
        """What was saved under a case's name; None where nothing was."""
        path = self._path(name)
        return json.loads(path.read_text()) if path.exists() else None

    def save(self, name: str, value: Any) -> None:
        write_json(self._path(name), value)

    def discard(self) -> None:
        """The run is finished, or nothing in it is to be believed."""
        shutil.rmtree(self.folder, ignore_errors=True)
