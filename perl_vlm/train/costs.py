"""What a run costs: time, peak memory and energy, over all the times that it was begun again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from perl_vlm.train.energy import EnergyMeter
from perl_vlm.train.rundir import RunDir, write_whole

_READ = ("peak_memory_bytes", "energy_joules")


class Costs:
    """Counts from ``began`` on, and adds what was kept when an earlier process had to stop.

    Args:
        run: where that is kept, in ``costs.json``.
        began: as ``time.monotonic`` gives it.
    """

    def __init__(self, run: RunDir, began: float) -> None:
        self._path, self._began, self._meter = run.path / "costs.json", began, EnergyMeter()
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        self._before: dict[str, Any] = found if isinstance(found, dict) and {"seconds", *_READ} <= found.keys() else {}

    def total(self, device: torch.device) -> dict[str, Any]:
        """``seconds``, ``peak_memory_bytes`` and ``energy_joules``; the last two None where they cannot be read."""
        before, peak, energy = self._before, peak_memory_bytes(device), self._meter.joules()
        if before:
            kept_peak, kept_energy = (before[name] for name in _READ)
            peak = None if peak is None or kept_peak is None else max(peak, kept_peak)
            energy = None if energy is None or kept_energy is None else energy + kept_energy
        seconds = time.monotonic() - self._began + before.get("seconds", 0.0)
        return {"seconds": round(seconds, 1), "peak_memory_bytes": peak, "energy_joules": energy}

    @contextmanager
    def kept(self, device: torch.device, *, main: bool) -> Iterator[None]:
        """Keep what was spent where the work inside stops before its end. A process that is killed keeps nothing.

        Args:
            main: whether this process writes files.
        """
        try:
            yield
        except BaseException:
            if main:
                write_whole(self._path, json.dumps(self.total(device)) + "\n")
            raise


def peak_memory_bytes(device: torch.device) -> int | None:
    """The device's peak where it counts for itself, else this process's peak resident size (None on Windows)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
