"""The claims of "Deep Networks with Stochastic Depth", as experiments: see ``docs/paper.md``.

Imports: measure, providers, report.
"""
