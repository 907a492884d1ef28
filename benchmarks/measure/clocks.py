"""What a call takes: on the host, and on a device."""

from __future__ import annotations

import time

import torch

from benchmarks.measure.workload import Workload


class Clocks:
    """The call under pytest-benchmark's clock; on CUDA two more: the host's and the device's."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload = workload
        self.device = device
        self.host: list[float] = []
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def run(self) -> None:
        """The result dies here, inside the clock, for every provider alike."""
        if self.device.type != "cuda":
            self.workload.run()
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        begin = time.perf_counter()
        self.workload.run()
        self.host.append(time.perf_counter() - begin)
        end.record()
        torch.cuda.synchronize(self.device)
        self.events.append((start, end))

    def read(self, timed: int) -> dict[str, list[float]]:
        """Seconds until a call returned, and those between the events around it; CUDA only.

        Of the last ``timed`` calls: those before them were to warm up.
        """
        return {
            "host": self.host[-timed:],
            "device": [s.elapsed_time(e) * 1e-3 for s, e in self.events[-timed:]],
        }
