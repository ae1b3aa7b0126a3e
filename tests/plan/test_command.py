"""``perl-vlm plan`` from the command line: what it prints, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perl_vlm.cli import main
from perl_vlm.plan.gpus import find_gpu
from perl_vlm.plan.memory import limit
from perl_vlm.plan.random_models import skeleton_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's config and nothing else."""
    where = tmp_path_factory.mktemp("model")
    skeleton_of("llama").model.config.save_pretrained(where)
    return str(where)


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["plan", *flags, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_table(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", folder, "--stage", "ppo", "--gpu", "24GB", "--ppo.batch_size", "8", "--max-prompt-tokens", "64"]
    assert main(["plan", *flags]) == 0
    out = capsys.readouterr().out
    for word in ("rollout", "scoring", "update", "optimizer step", "peak", "fits: needs", "largest micro-batch", "L4"):
        assert word in out


def test_json_adds_up(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", folder, "--stage", "rm", "--gpu", "H100", "--max_prompt_tokens", "96"]
    found = planned(capsys, *flags, "--max_response_tokens", "24")
    memory = found["memory"]
    assert memory["fits"]
    for phase in memory["phases"].values():
        assert phase["peak"] == sum(size for name, size in phase.items() if name != "peak")
    assert memory["needed"] > max(phase["peak"] for phase in memory["phases"].values())
    assert found["seconds"]["step"] == pytest.approx(sum(v for k, v in found["seconds"].items() if k != "step"))
    batch = found["micro_batch"]
    assert (batch["records"], batch["of"], batch["rows"], batch["tokens_a_row"]) == (32, "pairs", 32, 96 + 2 * 24)
    assert batch["shared_prompts"]


def test_what_does_not_fit_is_told_what_would(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", folder, "--stage", "rm", "--gpu", "1GB", "--max_response_tokens", "64"]
    found = planned(capsys, *flags)
    assert not found["memory"]["fits"]
    changes = {change["flags"]: change for change in found["changes"]}
    assert next(iter(changes)).startswith("--rm.accumulate")
    fitting = [flag for flag, change in changes.items() if change["fits"]]
    assert fitting, changes
    again = planned(capsys, *flags, *fitting[0].split())
    assert again["memory"]["fits"]
    assert again["memory"]["needed"] == changes[fitting[0]]["needed"]
    largest = found["memory"]["largest_micro_batch"]
    assert 0 < largest < 32


def test_the_largest_micro_batch_fits_and_one_more_does_not(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", folder, "--stage", "sft", "--gpu", "1GB", "--max_response_tokens", "64"]
    largest = planned(capsys, *flags)["memory"]["largest_micro_batch"]
    room = limit(find_gpu("1GB").gib)
    needed = [
        planned(capsys, *flags, "--sft.batch_size", str(size))["memory"]["needed"] for size in (largest, largest + 1)
    ]
    assert needed[0] <= room < needed[1]


def test_many_gpus_share(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", folder, "--stage", "rm", "--gpu", "A100", "--max_prompt_tokens", "64"]
    one = planned(capsys, *flags)
    ddp = planned(capsys, *flags, "--gpus", "4")
    fsdp = planned(capsys, *flags, "--gpus", "4", "--strategy", "zero3")

    def base(found: dict[str, Any]) -> int:
        return sum(size for name, size in next(iter(found["memory"]["phases"].values())).items() if "base" in name)

    assert base(one) == base(ddp) > base(fsdp)
    assert ddp["micro_batch"]["records"] == 8
    assert sum(ddp["flop"].values()) == pytest.approx(sum(one["flop"].values()) / 4)
    assert fsdp["seconds"]["between GPUs"] > ddp["seconds"]["between GPUs"] > 0
    assert any("zero3 runs as fsdp" in line for line in fsdp["assumptions"])


def test_a_served_rollout_takes_no_cache_here(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", folder, "--stage", "ppo", "--gpu", "A100", "--max_prompt_tokens", "64"]
    here, there = planned(capsys, *flags), planned(capsys, *flags, "--rollout", "served")
    assert "cache" in here["memory"]["phases"]["rollout"]
    assert "cache" not in there["memory"]["phases"]["rollout (served)"]
    assert "decoding" not in there["seconds"]
    assert here["engine"] is None
    assert there["engine"]["cache"] == 128 * 2 * 3 * 2 * 32 * (64 + 32) * 2


def test_four_bits_and_full_tuning_weigh(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", folder, "--stage", "sft", "--gpu", "A100", "--sft.batch_size", "1"]
    plain, small, full = (
        planned(capsys, *flags, *more)["memory"]["phases"]["optimizer step"]
        for more in ([], ["--load_in_4bit"], ["--tuning", "full"])
    )
    assert small["frozen base (4 bits)"] < 0.6 * plain["frozen base (bfloat16)"]
    assert full["full copies (float32)"] == 2 * full["frozen base (bfloat16)"]
    assert full["AdamW states"] == 2 * full["full copies (float32)"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stage", "rm", "--gpu", "24GB"], "needs --model"),
        (["--model", "tiny", "--gpu", "24GB"], "needs --stage: one of sft, rm, ppo"),
        (["--model", "tiny", "--stage", "rm"], "needs --gpu: its memory, such as 24GB"),
        (["--model", "tiny", "--stage", "dpo", "--gpu", "24GB"], "expected one of sft, rm, ppo"),
        (["--model", "tiny", "--stage", "rm", "--gpu", "RTX409"], "Did you mean RTX4090"),
        (["--model", "tiny", "--stage", "rm", "--gpu", "24 parsecs"], "neither a size such as 24GB"),
        (["--model", "tiny", "--stage", "rm", "--gpu", "24GB", "--lora.rank", "4"], "Nearest: --lora.language_rank"),
        (["--model", "tiny", "--stage", "rm", "--gpu", "24GB", "--rm.accumulate", "5"], "rm.accumulate is 5"),
        (["--model", "tiny", "--stage", "rm", "--gpu", "24GB", "--gpus", "5"], "must be a multiple of 5"),
        (["--model", "tiny", "--stage", "rm", "--gpu", "24GB", "--gpus", "0"], "it must be at least 1"),
        (
            [
                "--model",
                "tiny",
                "--stage",
                "rm",
                "--gpu",
                "24GB",
                "--gpus",
                "2",
                "--strategy",
                "fsdp",
                "--tuning",
                "full",
            ],
            "--tuning full does not go with a sharded base",
        ),
        (["--model", "tiny", "--stage", "rm", "--gpu", "24GB", "--image_tokens", "9999"], "9999 tokens of a prompt"),
    ],
)
def test_what_cannot_be_understood_ends_with_2(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "nothing")
    assert main(["plan", "--model", missing, "--stage", "rm", "--gpu", "24GB"]) == 2
    assert missing in capsys.readouterr().err


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from perl_vlm.cli import main; main(['plan', '--help']); "
        "main(['plan', '--model', 'tiny', '--stage', 'rm', '--gpu', 'X']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--gpu" in done.stdout
    assert "H100" in done.stdout
