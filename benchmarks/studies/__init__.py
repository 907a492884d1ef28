"""Runs that answer a question of their own, each a command of ``python -m benchmarks``;
``study.py`` is how they are opened and what they leave.

Imports: measure, providers, cases, report.
"""
