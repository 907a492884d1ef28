"""How a figure is taken: workloads, clocks, memory, operations, the check before, the machine.

Imports nothing else of the benchmarks.
"""
