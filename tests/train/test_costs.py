"""What a run cost, over every time it was begun again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from perl_vlm.train import costs
from perl_vlm.train.costs import Costs
from perl_vlm.train.rundir import RunDir

CPU = torch.device("cpu")


def stopped(run: RunDir, spent: float, monkeypatch: pytest.MonkeyPatch, *, joules: float | None, peak: int) -> None:
    monkeypatch.setattr(costs.EnergyMeter, "joules", lambda self: joules)
    monkeypatch.setattr(costs, "peak_memory_bytes", lambda device: peak)
    with pytest.raises(KeyboardInterrupt), Costs(run, time.monotonic() - spent).kept(CPU, main=True):
        raise KeyboardInterrupt


def test_what_was_spent_before_a_stop_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    stopped(run, 100, monkeypatch, joules=50.0, peak=900)
    stopped(run, 20, monkeypatch, joules=5.0, peak=700)
    monkeypatch.setattr(costs.EnergyMeter, "joules", lambda self: 2.0)
    monkeypatch.setattr(costs, "peak_memory_bytes", lambda device: 800)
    found = Costs(run, time.monotonic() - 3).total(CPU)
    assert found["seconds"] == pytest.approx(123, abs=1)
    assert found["energy_joules"] == 57.0
    assert found["peak_memory_bytes"] == 900
    monkeypatch.setattr(costs.EnergyMeter, "joules", lambda self: None)
    assert Costs(run, time.monotonic()).total(CPU)["energy_joules"] is None, "a part of it is not known"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seconds": 1}'])
def test_a_damaged_file_costs_nothing_but_what_it_held(tmp_path: Path, text: str) -> None:
    (tmp_path / "costs.json").write_text(text)
    assert Costs(RunDir(tmp_path), time.monotonic()).total(CPU)["seconds"] < 5


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), Costs(RunDir(tmp_path), 0.0).kept(CPU, main=False):
        raise ValueError("x")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="x"), Costs(RunDir(tmp_path), 0.0).kept(CPU, main=True):
        raise ValueError("x")
    assert json.loads((tmp_path / "costs.json").read_text())["seconds"] > 0
