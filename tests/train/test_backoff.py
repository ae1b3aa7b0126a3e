"""Memory runs out in the middle of a step: it is begun again with smaller micro-batches, and learns the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perl_vlm.config import LoraConfig, PpoConfig, RmConfig, RunConfig, SftConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.roles import Roles
from perl_vlm.task import Task
from perl_vlm.train.log import read_log
from perl_vlm.train.pipeline import open_session
from perl_vlm.train.ppo import train_ppo
from perl_vlm.train.reward import train_reward_model
from perl_vlm.train.rundir import RunDir
from perl_vlm.train.sft import train_sft
from perl_vlm.train.signals import StopOnSignal
from perl_vlm.types import Comparison, Example, Message, Split

KINDS: dict[str, Callable[[], RuntimeError]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
}


class Words(Task):
    """Questions of a few words, answered by one of two."""

    name, modality, primary_metric = "words", "text", "reward"

    def examples(self, split: Split) -> Sequence[Example]:
        return [Example(f"{split}-{n}", (Message("user", (f"{n} red?",)),), reference="yes") for n in range(16)]

    def preferences(self, split: Split) -> Sequence[Comparison]:
        return [Comparison(one.id, one.messages, "yes", "no blue") for one in self.examples(split)]

    def evaluate(self, example: Example, response: str) -> dict[str, float]:
        return {"reward": float(response == example.reference)}

    def verify(self, example: Example, response: str) -> float:
        return float(len(response) % 3)


STAGES: dict[str, Callable[..., Any]] = {"sft": train_sft, "rm": train_reward_model, "ppo": train_ppo}


def run(stage: str, out: Path) -> tuple[list[dict[str, Any]], Any]:
    plain: dict[str, Any] = {"steps": 2, "batch_size": 8, "warmup": 0, "lr": 1e-3}
    ppo = PpoConfig(
        **plain,
        epochs=1,
        minibatches=2,
        max_new_tokens=3,
        reward_model="verify",
        value="zero",
    )
    config = RunConfig(
        model="tiny", device="cpu", dtype="float32", lora=LoraConfig(language_rank=2, vision_rank=0),
        sft=SftConfig(**plain), rm=RmConfig(**plain, normalise="none"), ppo=ppo,
    )  # fmt: skip
    opened = open_session(Words(), config, StopOnSignal()).stage(stage, RunDir.create(out, {}, resume=False))
    STAGES[stage](opened)
    return read_log(opened.run.metrics), opened


def cramped(monkeypatch: pytest.MonkeyPatch, error: Callable[[], RuntimeError], room: int) -> list[int]:
    """No more than ``room`` rows of a training pass fit, and the rest of the gradient is lost with the pass."""
    seen: list[int] = []
    for name in ("raw_scores", "logprobs"):
        usual = getattr(Roles, name)

        def limited(roles: Roles, role: str, sequences: Any, *rest: Any, _usual: Any = usual, **options: Any) -> Any:
            seen.append(len(sequences))
            if len(sequences) > room:
                for parameter in roles.parameters(role).values() if role != "reference" else ():
                    parameter.grad = torch.full_like(parameter, 7.0)  # what a backward pass that broke off left behind
                raise error()
            return _usual(roles, role, sequences, *rest, **options)

        monkeypatch.setattr(Roles, name, limited)
    return seen


@pytest.mark.parametrize("error", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_does_not_fit_is_made_in_smaller_parts(
    stage: str, error: Callable[[], RuntimeError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(stage, tmp_path / "whole")
    room = 4 if stage == "rm" else 2  # a pair is two rows
    seen = cramped(monkeypatch, error, room)
    parts, opened = run(stage, tmp_path / "parts")
    assert max(seen) > room
    assert seen[-1] <= room
    assert opened.fits
    assert set(opened.fits.values()) == {2}
    assert any("memory ran out" in note for note in opened.notes)
    for one, other in zip(parts, whole, strict=True):
        for key in ("loss", "loss/policy_avg", "grad_norm", "objective/kl", "accuracy"):
            if key in other:
                assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


def test_one_record_that_does_not_fit_ends_the_run_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cramped(monkeypatch, KINDS["cuda"], 0)
    with pytest.raises(PerlVlmError, match=r"memory ran out in sft with 1 records at once: CUDA out of memory.*plan"):
        run("sft", tmp_path / "run")


def test_one_record_that_does_not_fit_is_tried_with_checkpointing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last resort before giving up; what is learned is the same."""
    whole, _ = run("sft", tmp_path / "whole")
    usual = Roles.logprobs

    def limited(roles: Roles, role: str, sequences: Any, *rest: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and not (roles.recomputing and len(sequences) == 1):
            raise KINDS["cuda"]()
        return usual(roles, role, sequences, *rest, **options)

    monkeypatch.setattr(Roles, "logprobs", limited)
    parts, opened = run("sft", tmp_path / "parts")
    assert opened.roles.recomputing
    assert any("computed again for backward" in note for note in opened.notes)
    for one, other in zip(parts, whole, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_other_errors_are_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cramped(monkeypatch, lambda: RuntimeError("shapes do not fit"), 0)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run("rm", tmp_path / "run")


def test_several_processes_are_told_to_ask_for_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from perl_vlm.train.backoff import in_micro_batches

    _, opened = run("sft", tmp_path / "run")

    def work(rows: Sequence[int]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    two = replace(opened, parallel=replace(opened.parallel, world=2))
    with pytest.raises(PerlVlmError, match=r"a larger --sft\.accumulate"):
        in_micro_batches(two, "records", range(4), 4, work)
