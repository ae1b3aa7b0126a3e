"""Labels instead of pairs, choices instead of answers, and a policy with all its checkpoints."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perl_vlm.cli import main
from perl_vlm.stats import auc

pytestmark = pytest.mark.slow


def measured(out: Path, suite: str, run: Path, tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / f"{out.name}.yaml"
    path.write_text(suite)
    assert main(["eval", "--suite", str(path), "--runs", str(run), "--out", str(out)]) == 0
    (cell,) = json.loads((out / "results.json").read_text())["cells"]
    figures: dict[str, Any] = cell["figures"]
    return figures


def test_labels_have_an_area_and_a_majority(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 48), ("validation", 16), ("test", 40)):
        rows = [
            {"prompt": f"order {split} {place}", "completion": ["yes", "no"][place % 2], "label": place % 4 != 0}
            for place in range(count)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "runs" / "labels"
    given = ["--task.source", "local", "--task.path", str(data), "--config", "none", "--lora.vision_rank", "0"]
    assert main(["dialogue", "rm", *given, "--rm.steps", "2", "--rm.batch_size", "8", "--out", str(run)]) == 0
    figures = measured(tmp_path / "out", "evaluations:\n- kind: reward_model\n", run, tmp_path)
    assert {"label_accuracy", "auc", "ece", "score_length_correlation"} <= figures.keys()
    assert "pair_accuracy" not in figures
    assert figures["majority_accuracy"]["estimate"]["value"] == 0.75
    assert figures["auc"]["estimate"]["items"] == 40
    (kept,) = (tmp_path / "out" / "cells").glob("*.json")
    items = json.loads(kept.read_text())["findings"]["items"]
    assert sum(items["labels"]["auc"]) == 30
    scores = np.array(items["values"]["auc"])
    good = np.array(items["labels"]["auc"]) > 0.5
    assert auc(scores, good) == pytest.approx(figures["auc"]["estimate"]["value"]), "what runs are compared by"


def test_choices_are_judged_by_log_prob(whole_run: Path, tmp_path: Path) -> None:
    header = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]
    with (tmp_path / "TruthfulQA.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        for place in range(12):
            best, wrong = f"Thing {place} is red", f"Thing {place} is blue"
            writer.writerow(["A", "B", f"What is thing {place} of {place * 7}?", best, f"{best}; It is red", wrong, ""])
    settings = f"{{source: local, path: {tmp_path}, format: truthfulqa, benchmark: true}}"
    suite = f"evaluations:\n- kind: policy\n  task: instructions\n  task_settings: {settings}\n  limit: 12\n"
    figures = measured(tmp_path / "out", suite, whole_run, tmp_path)
    assert {"mc1", "mc2", "gain/mc1", "win_rate/score"} <= figures.keys()
    assert not {"kl", "distinct_1", "response_tokens"} & figures.keys(), "nothing was written"


def test_every_checkpoint_that_was_kept_is_a_point(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "kept"
    given = ["--config", "none", "--lora.language_rank", "4", "--lora.vision_rank", "4", "--ppo.steps", "3"]
    given += ["--ppo.batch_size", "16", "--ppo.max_new_tokens", "4", "--ppo.lr", "1e-2", "--ppo.warmup", "0"]
    given += ["--ppo.save_every", "1", "--ppo.save_total_limit", "null", "--ppo.reward_model", str(whole_run / "rm")]
    given += ["--task.train_size", "64", "--task.test_size", "32"]
    assert main(["vqa", "ppo", *given, "--out", str(run)]) == 0
    figures = measured(tmp_path / "out", "evaluations:\n- kind: hacking\n  limit: 24\n", run, tmp_path)
    names = [name.split("/")[1] for name in figures if name.startswith("way/") and name.endswith("/kl")]
    assert names == ["anchor", "round 1", "round 2", "policy"]
    away = [figures[f"way/{name}/kl"]["estimate"]["value"] for name in names]
    assert away[0] == 0
    assert len(set(away)) == 4, "each is another policy"
    assert away[-1] == figures["kl"]["estimate"]["value"]
