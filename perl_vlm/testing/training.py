"""The part of ``check_task`` that needs a model: records are rendered for it, and every stage takes a step on them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from perl_vlm.config import EvalConfig, PpoConfig, RmConfig, RunConfig, SftConfig
from perl_vlm.errors import BadRecord, PerlVlmError
from perl_vlm.task import Task
from perl_vlm.testing.hooks import Fault, require
from perl_vlm.train.pipeline import run_stage
from perl_vlm.train.rundir import RunDir
from perl_vlm.train.session import look_at_data, open_session
from perl_vlm.train.signals import StopOnSignal
from perl_vlm.train.stage import Stage, spaced
from perl_vlm.types import SPLITS, Split

ROWS = 4


def check_training(
    task: Task,
    model: str,
    samples: int,
    max_prompt_tokens: int,
    splits: Sequence[Split] = SPLITS,
    preferences: bool = True,
) -> None:
    """Render ``samples`` records of each sort for the model, then take one step of every stage that the task's data
    allows: supervised, reward model, PPO, evaluation.

    Without preferences PPO learns from a head that was not trained, in a live environment from what episodes return;
    without a ``train`` split nothing is trained.

    Raises:
        Fault: a record that does not fit, or a stage that fails or whose figures are not finite.
    """
    live = task.environment() is not None
    reward = "verify" if live else "learned" if preferences else "untrained"
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            model=model, device="cpu", dtype="float32", max_prompt_tokens=max_prompt_tokens, task=task.config,
            sft=SftConfig(steps=1, batch_size=ROWS, warmup=0),
            rm=RmConfig(steps=1, batch_size=ROWS, warmup=0, eval_pairs=ROWS, normalise="none"),
            ppo=PpoConfig(steps=1, batch_size=ROWS, epochs=1, minibatches=1, max_new_tokens=8, warmup=0,
                          reward_model=reward),
            eval=EvalConfig(limit=ROWS, batch_size=ROWS, bootstrap=100, split=held_out(splits)),
        )  # fmt: skip
        try:
            session = open_session(task, config, StopOnSignal())
        except PerlVlmError as error:
            raise Fault(f"{type(task).__name__}: {error}") from error
        for split in SPLITS:  # what is not there is not asked for
            gone = _SORTS if split not in splits else () if preferences else ("preferences",)
            session.seen.update({(what, split): [] for what in gone})
        stages = {name: session.stage(name, RunDir.create(Path(folder) / name, {}, resume=False)) for name in _STAGES}
        _render(task, stages["ppo"], samples, "train" if "train" in splits else held_out(splits), preferences)
        for name in _stages(task, splits, preferences):
            _run(task, stages[name])


_STAGES = ("sft", "rm", "ppo", "eval")
_SORTS = ("examples", "demonstrations", "preferences")


def held_out(splits: Sequence[Split]) -> Split:
    """The split to evaluate on: the one that is held out most."""
    return max(splits, key=SPLITS.index)


def _stages(task: Task, splits: Sequence[Split], preferences: bool) -> list[str]:
    """Those that the task's data allows."""
    if "train" not in splits:
        return ["eval"]
    demonstrations = task.demonstrations("train")
    taught = all(demonstrations[place].reference for place in range(min(ROWS, len(demonstrations))))
    return [name for name in _STAGES if (name != "sft" or taught) and (name != "rm" or preferences)]


def _render(task: Task, stage: Stage, samples: int, split: Split, preferences: bool) -> None:
    for what in ("examples", "preferences") if preferences else ("examples",):
        records = getattr(task, what)(split)
        for record in spaced(records, samples):
            try:
                stage.renderer.prompts([record])
            except BadRecord as error:
                text = f"{what}: {error.problem} ({error.origin}). Shorten what the task shows, or check it with a "
                raise Fault(f"{type(task).__name__}: {text}longer max_prompt_tokens") from error


def _run(task: Task, stage: Stage) -> None:
    try:
        if stage.name != "ppo":
            look_at_data(stage, stage.name)
        run_stage(stage, 0.0)
    except (PerlVlmError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        text = f"one step of the stage {stage.name} fails ({type(error).__name__}: {error})"
        raise Fault(f"{type(task).__name__}: {text}") from error
    metrics = (stage.run.read_summary() or {}).get("metrics", {})
    odd = {key: value for key, value in metrics.items() if not math.isfinite(value)}
    require(task, not odd, f"one step of the stage {stage.name} gives figures that are not finite: {odd}")
