"""Prints what test_kernel_instructions.py compares with: ``python -m kernel_instructions`` in
``tests/``, with another ``csrc/cpu`` as an argument if need be."""

import sys
import tempfile
from pathlib import Path

from kernel_instructions import measure

with tempfile.TemporaryDirectory() as folder:
    found = measure.count(Path(folder), *[Path(argument).resolve() for argument in sys.argv[1:2]])
table: dict[str, list[str]] = {}
for name, each in found.items():
    kernel, _, length = name.split("-")
    table.setdefault(f"{kernel}-{length}", []).append(f"{each:.2f}")
for key in sorted(table):
    print(f'    "{key}": ({", ".join(table[key])}),')
