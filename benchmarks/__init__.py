"""Benchmarks of sdkernels: ``python -m benchmarks --help``; ``README.md`` says what is measured."""
