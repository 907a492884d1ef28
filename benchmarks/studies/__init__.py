"""Runs that answer a question of their own, each a command of ``python -m benchmarks``.

Imports: measure, providers, cases, report.
"""
