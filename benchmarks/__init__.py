"""Benchmarks of sdkernels: ``python -m benchmarks --help``; ``README.md`` says what is measured and
what is where. A file imports only from its own folder and from those that the folder's first file
names."""

# python -m benchmarks NAME: what it is for, and where it is, which is imported when it is called
# for: some need neither pytest nor plots.
COMMANDS = {
    "report": ("rebuild report and plots of a run", "benchmarks.report.rebuild"),
    "compare": ("ratios of two runs, 1 on a regression", "benchmarks.report.compare"),
    "break-even": ('the rule behind min_saving="auto"', "benchmarks.studies.break_even"),
    "patched-classes": ("every class that patch() knows", "benchmarks.studies.patched_classes"),
    "patch-coverage": ("what patch() reaches, and what not", "benchmarks.studies.patch_coverage"),
    "batch-norm": ("what compaction changes with BatchNorm", "benchmarks.studies.batch_norm"),
    "scaling": ("what the slowest of many ranks costs", "benchmarks.studies.scaling.command"),
    "host-cost": ("what a call costs without the extension", "benchmarks.studies.host_cost"),
    "multi-crop": ("crops of several sizes in one tensor", "benchmarks.studies.multi_crop"),
    "cuda-bandwidth": ("device time of every kernel on a GPU", "benchmarks.studies.cuda_bandwidth"),
}
