"""Energy from counters that begin anew, and none where there are none."""

from __future__ import annotations

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
