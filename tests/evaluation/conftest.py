"""A small finished run that the suite's tests measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from perl_vlm.cli import main

TRAINED = [
    "--config", "none", "--lora.language_rank", "4", "--lora.vision_rank", "4",
    "--rm.steps", "4", "--rm.batch_size", "8", "--rm.members", "2", "--rm.lr", "1e-3", "--rm.eval_pairs", "32",
    "--ppo.steps", "2", "--ppo.batch_size", "16", "--ppo.max_new_tokens", "4", "--ppo.lr", "1e-3",
    "--eval.limit", "24", "--eval.batch_size", "16", "--eval.bootstrap", "100",
    "--task.train_size", "128", "--task.validation_size", "64", "--task.test_size", "64",
]  # fmt: skip


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``perl-vlm vqa run`` leaves: an ensemble of two reward models and a policy."""
    out = tmp_path_factory.mktemp("runs") / "vqa" / "first"
    assert main(["vqa", "run", *TRAINED, "--out", str(out)]) == 0
    return out
