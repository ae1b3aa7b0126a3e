"""A task that plays episodes in a live environment, measured as any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perl_vlm import registry
from perl_vlm.cli import main

TASK = """
from dataclasses import dataclass, replace
from perl_vlm.task import Task
from perl_vlm.types import Example, Message, Step

@dataclass
class Corridor:
    max_turns: int = 2

    def step(self, prompts, responses):
        return [
            Step(float("a" in response)) if prompt.metadata["door"] else
            Step(0.0, replace(prompt, id=prompt.id + "/2", metadata={**prompt.metadata, "door": 1}))
            for prompt, response in zip(prompts, responses)
        ]

    def close(self):
        pass

class Walk(Task):
    name, modality, primary_metric = "walk", "text", "through"

    def examples(self, split):
        return [Example(f"{split}-{i}", (Message("user", (f"door {i}",)),), metadata={"door": 0}) for i in range(24)]

    def environment(self):
        return Corridor()

    def evaluate(self, example, response):
        return {"through": float(example.metadata["episode_return"] > 0)}
"""


@pytest.mark.slow
def test_episodes_are_measured_and_cannot_be_hacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = tmp_path / "site" / "walk_task-1.0.dist-info"
    meta.mkdir(parents=True)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: walk-task\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text(f"[{registry.GROUP}]\nwalk = walk_task:Walk\n")
    (tmp_path / "site" / "walk_task.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path / "site")
    run, out = tmp_path / "runs" / "walk", tmp_path / "results"
    settings = ["--ppo.steps", "2", "--ppo.batch_size", "8", "--ppo.max_new_tokens", "3", "--ppo.advantage", "rloo"]
    settings += ["--ppo.group_size", "2", "--ppo.reward_model", "verify", "--lora.vision_rank", "0"]
    assert main(["walk", "ppo", *settings, "--config", "none", "--out", str(run)]) == 0
    assert main(["eval", "--runs", str(run), "--limit", "12", "--out", str(out), "--log_samples"]) == 0
    assert "hacking: left out: walk is rewarded by its environment" in capsys.readouterr().out
    cells = {one["evaluation"]: one for one in json.loads((out / "results.json").read_text())["cells"]}
    assert {name: one["status"] for name, one in cells.items()} == {
        "reward_model": "skipped", "policy": "done", "hacking": "skipped", "resources": "done",
    }  # fmt: skip
    figures = cells["policy"]["figures"]
    assert figures["through"]["estimate"]["items"] == 12
    assert {"kl", "entropy", "gain/through", "win_rate/through"} <= figures.keys()
    assert len((out / "samples" / "runs-walk-policy.jsonl").read_text().splitlines()) == 12
