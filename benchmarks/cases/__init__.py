"""What is timed: ops, kernels, blocks, models and so on, each with its providers; and the presets.

Imports: measure, providers.
"""
