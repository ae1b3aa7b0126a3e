"""PPO whose rollouts come from a server: trained, resumed after the server died, in environments of several turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perl_vlm.config import LoraConfig, PpoConfig, RunConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.roles import REFERENCE
from perl_vlm.task import Task
from perl_vlm.train.log import read_log
from perl_vlm.train.parallel import Parallel
from perl_vlm.train.pipeline import open_session
from perl_vlm.train.ppo import train_ppo
from perl_vlm.train.rundir import RunDir
from perl_vlm.train.sampling import sample_episodes
from perl_vlm.train.session import Session, look_at_data
from perl_vlm.train.signals import StopOnSignal
from perl_vlm.train.stage import Stage
from perl_vlm.types import Example, Message, Split, Step


class Talk(Task):
    """A point for each letter."""

    name, modality, primary_metric = "talk", "text", "points"

    def examples(self, split: Split) -> Sequence[Example]:
        return [Example(f"{split}-{n}", (Message("user", (f"talk {n}",)),), reference="a") for n in range(8)]

    def evaluate(self, example: Example, response: str) -> dict[str, float]:
        return {"points": self.verify(example, response)}

    def verify(self, example: Example, response: str) -> float:
        return float(len(response))


class TwoTurns:
    """Every episode has two."""

    max_turns = 2

    def step(self, prompts: Sequence[Example], responses: Sequence[str]) -> list[Step]:
        more = (Message("user", ("and then?",)),)
        return [
            Step(1.0, replace(prompt, messages=more) if "talk" in prompt.messages[0].text else None)
            for prompt in prompts
        ]

    def close(self) -> None:
        pass


class Live(Talk):
    """The same in a live environment."""

    def __init__(self) -> None:
        super().__init__()
        self.world = TwoTurns()

    def environment(self) -> TwoTurns:
        return self.world


@pytest.fixture
def text_server(start: Callable[..., Any], text_backbone: Backbone) -> Any:
    return start(text_backbone.name)


@pytest.fixture
def open_run(tmp_path: Path, text_server: Any) -> Callable[..., tuple[Session, RunDir]]:
    """A session on the served model and its run's folder; the same folder each time."""

    def make(task: Task | None = None, *, resume: bool = False, **ppo: Any) -> tuple[Session, RunDir]:
        settings: dict[str, Any] = {
            "steps": 2, "batch_size": 4, "epochs": 1, "minibatches": 1, "lr": 1e-2, "warmup": 0,
            "schedule": "constant", "max_new_tokens": 3, "reward_model": "verify", "advantage": "rloo",
            "group_size": 2, "kl": "none", "save_every": 1, "engine": "served", "engine_url": text_server.url,
        }  # fmt: skip
        config = RunConfig(
            model=text_server.folder, device="cpu", dtype="float32", ppo=PpoConfig(**{**settings, **ppo}),
            lora=LoraConfig(language_rank=2), resume=resume,
        )  # fmt: skip
        run = RunDir.create(tmp_path / "run", {"model": "served"}, resume=resume)
        return open_session(task or Talk(), config, StopOnSignal()), run

    return make


def stage_of(session: Session, run: RunDir) -> Stage:
    stage = session.stage("ppo", run)
    assert stage.engine is not None
    stage.engine.client.limits |= {"retries": 1, "backoff": 0.001}
    return stage


@pytest.mark.slow
def test_a_round_that_the_server_did_not_finish_is_repeated_on_resume(
    open_run: Callable[..., tuple[Session, RunDir]], text_server: Any
) -> None:
    stage = stage_of(*open_run())
    engine = stage.engine
    assert engine is not None
    seen = engine.sample_rollout

    def dies_in_the_second_round(*given: Any, **named: Any) -> Any:
        if engine.name is not None:
            text_server.faults.lives = 1
        return seen(*given, **named)

    engine.sample_rollout = dies_in_the_second_round  # type: ignore[method-assign]
    with pytest.raises(PerlVlmError, match=r"failed 2 times.*--resume"):
        train_ppo(stage)
    assert [line["step"] for line in read_log(stage.run.metrics)] == [1]
    text_server.faults.lives = None
    stage = stage_of(*open_run(resume=True))
    train_ppo(stage)
    lines = read_log(stage.run.metrics)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["rollout/logprob_agreement"] < 1 + 1e-3 for line in lines)
    assert not any("sampler" in note for note in stage.notes)
    # What the first process left on the server was taken away, and so was the last adapter at the end.
    assert not text_server.adapters


@pytest.mark.slow
def test_every_turn_of_an_episode_is_served_from_one_push(
    open_run: Callable[..., tuple[Session, RunDir]], text_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perl_vlm.rollout.served.look", lambda *given, **named: None)
    stage = stage_of(*open_run(Live()))
    stage.roles.add("policy")
    examples = stage.examples("train")[:3]
    episodes = sample_episodes(stage, "policy", examples, 0, range(3), 8)
    assert len(episodes.prompts) == 6
    assert episodes.begins == [0, 2, 4]
    assert len(text_server.asked) == 6
    assert len(text_server.loaded) == 1
    assert len({asked["seed"] for asked in text_server.asked}) == 6


@pytest.mark.slow
def test_nobody_but_the_policy_in_training_is_served(
    open_run: Callable[..., tuple[Session, RunDir]], text_server: Any
) -> None:
    session, run = open_run()
    assert session.stage("eval", run).engine is None
    assert session.stage("rm", run).engine is None
    stage = stage_of(session, run)
    sample_episodes(stage, REFERENCE, stage.examples("train")[:2], 0, range(2), 8)
    assert text_server.asked == []


@pytest.mark.slow
def test_a_missing_server_is_named_before_anything_trains(
    open_run: Callable[..., tuple[Session, RunDir]], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, run = open_run(engine_url="http://127.0.0.1:9", engine_timeout=2.0)
    monkeypatch.setattr("perl_vlm.rollout.scorers.transport.time.sleep", lambda seconds: None)
    with pytest.raises(PerlVlmError, match=r"the rollout server http://127\.0\.0\.1:9/health failed"):
        look_at_data(session.stage("ppo", run), "ppo")
    assert session.parallel == Parallel()
