"""Energy, where the machine counts it: the processors' packages through Linux's powercap, NVIDIA's GPUs through NVML.

What is read is the whole machine's use, whoever causes it.
"""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
EVERY = 60.0
"""Seconds between readings: a package's counter begins anew after some 262 kJ, at 400 W every eleven minutes."""


class EnergyMeter:
    """Counts from when it is made. A thread reads the packages' counters often enough to miss none of their ends."""

    def __init__(self) -> None:
        self._last = _packages()
        self._microjoules = 0
        self._gpus = _gpus()
        self._lock = threading.Lock()
        if self._last:
            threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True, name="energy").start()

    def joules(self) -> float | None:
        """Since the start; None where nothing can be read, as on most shared machines."""
        self.read()
        gpus = [(now - before) / 1e3 for before, now in zip(self._gpus, _gpus(), strict=False)]
        return self._microjoules / 1e6 + sum(gpus) if self._last or gpus else None

    def read(self) -> None:
        """Add what the packages' counters say since they were read last."""
        with self._lock:
            now = _packages()
            self._last = {name: reading for name, reading in self._last.items() if name in now}
            for name, (before, limit) in self._last.items():
                self._microjoules += (now[name][0] - before) % limit  # the counter starts anew at its limit
                self._last[name] = now[name]


def _watch(meter: weakref.ref[EnergyMeter]) -> None:
    while True:
        time.sleep(EVERY)
        own = meter()
        if own is None:
            return
        own.read()
        del own  # or it would live until the next reading


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
