"""Energy from counters that begin anew, and none where there are none."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from perl_vlm.train import energy


def write(folder: Path, now: int) -> None:
    for name, value in (("intel-rapl:0", now), ("intel-rapl:1", 5), ("intel-rapl:0:0", now)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "energy_uj").write_text(f"{value}\n")
        (folder / name / "max_energy_range_uj").write_text("10000000\n")


def test_packages_are_summed_and_parts_of_them_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "_gpus", lambda: [])
    write(tmp_path, 9_000_000)
    meter = energy.EnergyMeter()
    write(tmp_path, 9_500_000)
    assert meter.joules() == pytest.approx(0.5)
    write(tmp_path, 1_000_000)
    assert meter.joules() == pytest.approx(2.0), "the counter went through its end"


def test_a_counter_that_ends_many_times_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "_gpus", lambda: [])
    monkeypatch.setattr(energy, "EVERY", 0.01)
    write(tmp_path, 0)
    meter = energy.EnergyMeter()
    readings = []
    for step in range(1, 7):  # 6 J each: three times through the end of the counter, at 10 J
        write(tmp_path, step * 6_000_000 % 10_000_000)
        deadline = time.monotonic() + 20
        while meter._microjoules < step * 6_000_000 and time.monotonic() < deadline:
            time.sleep(0.005)
        readings.append(meter._microjoules / 1e6)
    assert readings == [6, 12, 18, 24, 30, 36]
    assert meter.joules() == pytest.approx(36.0)


def test_gpus_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = [1_000]
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "_gpus", lambda: list(counters))
    meter = energy.EnergyMeter()
    counters[0] = 4_500
    assert meter.joules() == pytest.approx(3.5)


def test_nothing_to_read_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "_gpus", lambda: [])
    assert energy.EnergyMeter().joules() is None
