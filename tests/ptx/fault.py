"""Runs the kernels of faults.cu that are named, and prints what came of each, as JSON."""

import ctypes
import json
import sys

from . import build

if __name__ == "__main__":
    path, ptx = build.faults()
    library = build.load(path, build.Kernels(ptx))
    library.run_fault.restype = ctypes.c_char_p
    print(json.dumps({name: library.run_fault(name.encode()).decode() for name in sys.argv[1:]}))
