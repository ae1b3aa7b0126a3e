"""Runs that differ in their seeds alone: which they are, and what is said of them together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from perl_vlm_eval.results import Cell, Figure, Findings
from perl_vlm_eval.runs import FoundRun, kin
from perl_vlm_eval.seeds import summed_up
from perl_vlm_eval.statistics import Estimate


def run(path: Path, stage: str, **settings: Any) -> FoundRun:
    path.mkdir(parents=True)
    path.joinpath("config.yaml").write_text(yaml.safe_dump({"model": "tiny", "eval": {"limit": 4}, **settings}))
    path.joinpath("summary.json").write_text(json.dumps({"stage": stage, "task": "vqa"}))
    return FoundRun(path, path.name, "vqa", {stage: None}, {})  # type: ignore[dict-item]


def test_seeds_and_what_is_not_learned_with_are_of_no_matter(tmp_path: Path) -> None:
    one = run(tmp_path / "a", "rm", seed=0, rm={"lr": 0.1}, ppo={"lr": 1.0})
    other = run(tmp_path / "b", "rm", seed=1, rm={"lr": 0.1}, ppo={"lr": 2.0}, eval={"limit": 8}, device="cuda")
    faster = run(tmp_path / "c", "rm", seed=1, rm={"lr": 0.2}, ppo={"lr": 1.0})
    assert kin(one) == kin(other)
    assert kin(one) != kin(faster)


@pytest.mark.parametrize("within", ["", "adapter"])
def test_runs_that_are_built_upon_count_by_what_they_learned_with(tmp_path: Path, within: str) -> None:
    for name, seed, lr in (("r0", 0, 0.1), ("r1", 1, 0.1), ("r2", 1, 0.3)):
        run(tmp_path / name, "rm", seed=seed, rm={"lr": lr})
        (tmp_path / name / "adapter").mkdir()
    policies = [
        run(tmp_path / f"p{place}", "ppo", seed=place, ppo={"reward_model": str(tmp_path / f"r{place}" / within)})
        for place in range(3)
    ]
    assert kin(policies[0]) == kin(policies[1])
    assert kin(policies[1]) != kin(policies[2])


@pytest.mark.parametrize("text", ["", ".", "~nobody-of-that-name/x", "long " * 100, "verify"])
def test_rewards_that_are_no_folders_are_texts(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = run(tmp_path / "a", "ppo", seed=0, ppo={"reward_model": text}, task={"instruction": "~x" + "y" * 400})
    other = run(tmp_path / "b", "ppo", seed=1, ppo={"reward_model": "else"}, task={"instruction": "~x" + "y" * 400})
    monkeypatch.chdir(tmp_path / "a")
    assert kin(one) != kin(other)


def cell(run: str, seed: int | None, value: float, kin: str = "k") -> Cell:
    figure = Figure(Estimate(value, None, None, 1, 1, "counted"), "share", "higher")
    findings = Findings({"accuracy": figure, "other": figure}, headlines=["accuracy"])
    return Cell("policy", "policy", run, run, "done", findings=findings, kin=kin, seed=seed)


def test_several_seeds_are_one_figure_with_its_spread() -> None:
    cells = [cell("a", 0, 0.5), cell("b", 1, 0.7), cell("again", 1, 0.9), cell("c", 0, 0.1, "else"), cell("d", None, 0)]
    (found,) = summed_up(cells)
    assert found.what == "policy: accuracy"
    assert found.runs == ["a", "b"], "a seed that is there twice counts once"
    assert found.found.mean == pytest.approx(0.6)
    assert found.found.spread == pytest.approx(0.2 / 2**0.5)


def test_a_figure_that_does_not_exist_is_left_out() -> None:
    assert summed_up([cell("a", 0, 0.5), cell("b", 1, float("nan"))]) == []
