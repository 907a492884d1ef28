"""How a study is opened, and what it leaves: ``NAME.json``, and a page of tables, ``NAME.md``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import command
from benchmarks.measure.ending import out_folder
from benchmarks.measure.environment import environment
from benchmarks.measure.store import write_json
from benchmarks.report.table import document

CPU = torch.device("cpu")


class Study:
    """One run of a command; ``record`` is what goes into its JSON."""

    def __init__(
        self, name: str, arguments: Sequence[str] | None, out: Path, device: torch.device = CPU
    ) -> None:
        self.path, self.start = out_folder(out) / f"{name}.json", time.perf_counter()
        called = command.command_line(name, arguments)
        self.record: dict[str, Any] = {"command": called, "environment": environment(device)}

    def write(self, **found: Any) -> dict[str, Any]:
        """The record, with what was found."""
        self.record |= {"seconds": time.perf_counter() - self.start, **found}
        write_json(self.path, self.record)
        return self.record

    def publish(self, title: str, sections: Iterable[str], **found: Any) -> None:
        """The same, and its page, which is printed too."""
        page = document(title, self.write(**found), sections)
        self.path.with_suffix(".md").write_text(page)
        print(f"\n{page}", end="")
