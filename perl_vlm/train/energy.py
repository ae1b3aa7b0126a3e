"""Energy, where the machine counts it: the processors' packages through Linux's powercap, NVIDIA's GPUs through NVML.

What is read is the whole machine's use, whoever causes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._packages = _packages()
        self._gpus = _gpus()

    def joules(self) -> float | None:
        """Since the start; None where nothing can be read, as on most shared machines."""
        packages, gpus = _packages(), _gpus()
        parts = [
            (packages[name][0] - before) % limit / 1e6  # the counter starts anew at its limit
            for name, (before, limit) in self._packages.items()
            if name in packages
        ]
        parts += [(now - before) / 1e3 for before, now in zip(self._gpus, gpus, strict=False)]
        return sum(parts) if parts else None


def _packages() -> dict[str, tuple[int, int]]:
    """By package, the counter and the number at which it starts anew, in microjoules."""
    found = {}
    for folder in POWERCAP.glob("intel-rapl:*"):
        if folder.name.count(":") == 1:  # the others are parts of a package
            try:
                read = [int((folder / name).read_text()) for name in ("energy_uj", "max_energy_range_uj")]
            except (OSError, ValueError):  # root alone may read it on most machines
                continue
            found[folder.name] = (read[0], max(1, read[1]))
    return found


def _gpus() -> list[int]:
    """Millijoules that each GPU has used since its driver was loaded; none without NVIDIA's library."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        handles: list[Any] = [nvml.nvmlDeviceGetHandleByIndex(place) for place in range(nvml.nvmlDeviceGetCount())]
        return [int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in handles]
    except Exception:  # no library, no driver, no such counter: NVML has an error for each
        return []
