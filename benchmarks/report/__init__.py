"""What is shown: figures from samples, tables, targets, plots, and the comparison of two runs.

Imports: measure.
"""
