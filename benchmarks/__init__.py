"""Benchmarks of sdkernels: ``python -m benchmarks --help``; ``README.md`` says what is measured.

A house of six floors; a file imports only from its own floor and from those that the first file of
the floor names:

    run.py, conftest.py, test_speed.py      a run of a preset, on top of everything
    studies    paper                        questions of their own
    report                                  figures, tables, plots
    cases                                   what is timed
    providers                               what is compared
    measure                                 how

``results/`` holds recorded runs.
"""
