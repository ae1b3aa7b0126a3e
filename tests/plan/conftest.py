"""What is planned in tests."""

from __future__ import annotations

from typing import Any

import pytest

from perl_vlm.config import LoraConfig, PpoConfig, RmConfig, RunConfig, SftConfig
from perl_vlm.plan.gpus import find_gpu
from perl_vlm.plan.settings import Job, PlanSettings


@pytest.fixture
def make_job() -> Any:
    """A job on a CPU: 2 pairs, 2 demonstrations or 4 episodes of 96 + 24 tokens, rank 8 on the language tower."""

    def make(stage: str, *, image_tokens: int = 0, plan: dict[str, Any] | None = None, **settings: Any) -> Job:
        sections = {
            "rm": RmConfig(**{"batch_size": 2, **settings.pop("rm", {})}),
            "sft": SftConfig(**{"batch_size": 2, **settings.pop("sft", {})}),
            "ppo": PpoConfig(**{"batch_size": 4, "minibatches": 1, "max_new_tokens": 24, **settings.pop("ppo", {})}),
            "lora": LoraConfig(**{"vision_rank": 0, **settings.pop("lora", {})}),
        }
        fixed = {"model": "random", "device": "cpu", "max_prompt_tokens": 96, "max_response_tokens": 24}
        config = RunConfig(**{**fixed, **sections, **settings})
        return Job(config, PlanSettings(stage=stage, **(plan or {})), find_gpu("24GB"), image_tokens)  # type: ignore[arg-type]

    return make
