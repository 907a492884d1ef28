"""What a call takes: on the host, and on a device."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from benchmarks.measure.workload import Workload


@dataclass
class Clocks:
    """The call under pytest-benchmark's clock; on CUDA two more: the host's and the device's."""

    workload: Workload
    device: torch.device
    host: list[float] = field(default_factory=list)
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

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
        device = [start.elapsed_time(end) * 1e-3 for start, end in self.events[-timed:]]
        return {"host": self.host[-timed:], "device": device}
