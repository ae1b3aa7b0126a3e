"""The planner against steps that were really run: peaks of live tensors within 15 %."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from perl_vlm.plan.costs import Drawing, chunk_logits, head_cost, sampler_cost
from perl_vlm.plan.measure import measure
from perl_vlm.plan.memory import memory_of
from perl_vlm.plan.random_models import random_model, skeleton_of
from perl_vlm.plan.settings import Job
from perl_vlm.plan.shapes import shapes_of

TOLERANCE = 0.15


def compare(job: Job, family: str) -> None:
    """Every phase's peak; where a phase is small beside the step's peak, by that peak."""
    skeleton = skeleton_of(family)
    planned = {phase.name: phase.peak for phase in memory_of(skeleton, shapes_of(skeleton), job).phases}
    torch.manual_seed(0)
    real = measure(random_model(family), job)
    assert planned.keys() == real.phases.keys()
    for name, bytes_ in real.phases.items():
        allowed = TOLERANCE * (bytes_ if bytes_ > 0.2 * real.peak else 0.2 * real.peak)
        assert abs(planned[name] - bytes_) <= allowed, f"{name}: planned {planned[name]:,}, measured {bytes_:,}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "stage", "settings"),
    [
        ("qwen3", "rm", {}),
        ("qwen3", "sft", {"sft": {"batch_size": 4, "accumulate": 2}}),
        ("llama", "ppo", {"ppo": {"value": "zero"}}),
        ("llama", "ppo", {"ppo": {"advantage": "rloo", "group_size": 2}}),
        ("qwen3", "rm", {"tuning": "full"}),
        ("smolvlm", "rm", {"image_tokens": 16, "lora": {"vision_rank": 4}}),
        ("smolvlm", "rm", {"image_tokens": 16}),
    ],
    ids=["pairs", "accumulated", "ppo", "rloo", "full", "vision", "frozen-vision"],
)
def test_peaks_are_those_of_a_real_step(
    family: str, stage: str, settings: dict[str, Any], dtype: str, make_job: Callable[..., Job]
) -> None:
    compare(make_job(stage, dtype=dtype, **settings), family)


def test_one_small_step(make_job: Callable[..., Job]) -> None:
    """The quick one of the above."""
    compare(make_job("rm", dtype="float32", max_prompt_tokens=48, max_response_tokens=16), "qwen3")


def test_the_head_costs_a_few_floats_a_logit() -> None:
    scoring = head_cost(torch.float32, Drawing(), training=False)
    training = head_cost(torch.float32, Drawing(), training=True)
    exact = head_cost(torch.float32, Drawing(exact="reverse_kl"), training=True)
    assert scoring.coming == 0
    assert 2 * 4 <= scoring.going <= 12 * 4
    assert training.coming < 2, "a frozen head's gradient is made on the way"
    assert training.going > scoring.going
    assert exact.going >= training.going
    assert (training.kept, exact.kept) == (1, 2)
    again = head_cost(torch.float32, Drawing(), training=True, frozen=False)
    assert again.coming > again.going / 2
    assert again.kept == 0
    assert 2 * 4 <= sampler_cost(torch.float32, Drawing()) <= 24 * 8


def test_a_chunk_is_no_larger_than_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perl_vlm.models.chunks.CHUNK_BYTES", 4 * 1000 * 10)
    assert chunk_logits(3, 1000, "cuda") == 3000
    assert chunk_logits(30, 1000, "cuda") == 10_000
    assert chunk_logits(30, 100_000, "cuda") == 100_000, "one token at least"
    assert chunk_logits(30, 1000, "cpu") == 10_000
    monkeypatch.undo()
    assert chunk_logits(10**6, 150_000, "cpu") == 128 * 150_000, "as many as are worth reading the weights for"
    assert chunk_logits(10**6, 1000, "cpu") == 1048 * 1000
