"""Verbs of the command line: open the model once, run the stages on it, leave a run folder behind."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perl_vlm.config import RunConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.roles import HeadKind, base_fingerprint
from perl_vlm.task import Task
from perl_vlm.train.costs import Costs
from perl_vlm.train.evaluate import Evaluation, announce, evaluate
from perl_vlm.train.log import say
from perl_vlm.train.parallel import Parallel
from perl_vlm.train.ppo import train_ppo
from perl_vlm.train.publish import publish
from perl_vlm.train.reward import member_names, train_reward_model
from perl_vlm.train.reward_report import brief
from perl_vlm.train.rewards import Rewards
from perl_vlm.train.rundir import RunDir, sync_file
from perl_vlm.train.session import (
    Session,
    check_model,
    check_processes,
    choose_out,
    load_finished,
    look_at_data,
    make_run,
    open_session,
    plain_settings,
    stages_of,
)
from perl_vlm.train.sft import train_sft
from perl_vlm.train.signals import StopOnSignal
from perl_vlm.train.stage import Stage

TRAINERS: dict[str, Callable[[Stage], dict[str, float]]] = {
    "sft": train_sft,
    "rm": train_reward_model,
    "ppo": train_ppo,
}


def trained_by(name: str, config: RunConfig) -> dict[str, str]:
    """The roles that a stage trains, and the sub-folder of its run that each is saved in."""
    if name == "sft":
        return {"sft": "adapter"}
    if name == "rm":
        names = member_names(config.rm.members)
        return {"reward": "adapter"} if len(names) == 1 else {role: f"members/{k}" for k, role in enumerate(names)}
    if name == "ppo":
        return {"policy": "adapter"} | ({} if config.ppo.value_kind == "none" else {"value": "value"})
    return {}


@dataclasses.dataclass
class Outcome:
    """What the stages of a run have given so far."""

    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    ci95: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    trainable: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    evaluation: Evaluation | None = None

    def add(self, summary: dict[str, Any]) -> None:
        """Take over a finished stage's figures."""
        self.metrics |= summary["metrics"]
        self.ci95 |= summary["ci95"]
        self.trainable |= summary["parameters"]["trainable"]


def run_verb(verb: str, task: Task, config: RunConfig) -> int:
    """Run ``sft``, ``rm``, ``ppo``, ``eval`` or ``run`` to its end; the process's exit code."""
    parallel = Parallel.start(config.device)
    try:
        return _run(verb, task, config, parallel)
    finally:
        try:
            environment = task.environment()
            if environment is not None:
                environment.close()
        finally:
            parallel.stop()


def _run(verb: str, task: Task, config: RunConfig, parallel: Parallel) -> int:
    began, settings = time.monotonic(), plain_settings(config)
    check_processes(task, config, verb, parallel)
    out = parallel.broadcast_object(choose_out(verb, task, config) if parallel.is_main else None)
    assert out is not None  # the first process's
    new = not out.exists()
    run = make_run(out, settings, config, parallel)
    if config.resume and run.is_done():
        say(f"{run.path} is finished already; nothing to do")
        return 0
    with StopOnSignal() as stop:
        try:
            session = open_session(task, config, stop, parallel)
            check_model(session, verb)
            look_at_data(session.stage(verb, run), verb)
            load_finished(session, verb)
        except PerlVlmError:
            if new and parallel.is_main:  # nothing has been done yet: the corrected command may use the same folder
                run.config.unlink()
                run.path.rmdir()
            raise
        if verb != "run":
            run_stage(session.stage(verb, run), began)
            return 0
        costs = Costs(run, began)
        with costs.kept(session.roles.backbone.device, main=parallel.is_main):
            outcome = _run_stages(session, run, settings, parallel, stop)
        stage = session.stage(verb, run)
        finish(stage, summarise(stage, costs, outcome), outcome.evaluation)
        say(f"report: {run.report}")
    return 0


def _run_stages(
    session: Session, run: RunDir, settings: dict[str, Any], parallel: Parallel, stop: StopOnSignal
) -> Outcome:
    """The stages of ``run``, each in a folder of its own; those that are done already are loaded."""
    outcome, config = Outcome(), session.config
    for name in stages_of(config):
        own = make_run(run.path / name, settings, config, parallel)
        done = own.read_summary()
        if done is not None and name != "eval":
            reload_stage(session, name, own, done)
            say(f"{name}: done already, loaded from {own.adapter}")
        else:
            outcome.evaluation = run_stage(session.stage(name, own), time.monotonic())
            if name == "sft":
                session.roles.stack_sft()
            done = own.read_summary() or {}
        outcome.add(done)
        stop.raise_if_requested()
    return outcome


def finish(stage: Stage, summary: dict[str, Any], evaluation: Evaluation | None) -> None:
    """Write report, card and, last, the summary that marks the run as done."""
    publish(stage, summary, evaluation)
    if stage.parallel.is_main:
        stage.run.write_summary(summary)
    stage.parallel.barrier()


def run_stage(stage: Stage, began: float) -> Evaluation | None:
    """Train or evaluate one stage and write all that it leaves, its summary last."""
    costs = Costs(stage.run, began)
    with costs.kept(stage.device, main=stage.parallel.is_main):
        outcome = _worked(stage, began)
    summary = summarise(stage, costs, outcome)
    if stage.parallel.is_main:
        summary["files"] = file_hashes(stage.run.path, list(trained_by(stage.name, stage.config).values()))
    finish(stage, summary, outcome.evaluation)
    return outcome.evaluation


def _worked(stage: Stage, began: float) -> Outcome:
    """What a stage gives; its adapters are saved."""
    outcome = Outcome()
    trained = trained_by(stage.name, stage.config)
    if stage.name == "eval":
        outcome.evaluation = evaluate(stage)
        outcome.metrics = outcome.evaluation.metrics
        outcome.ci95 = {key: list(interval) for key, interval in outcome.evaluation.ci95.items()}
        announce(stage, outcome.evaluation)
    else:
        outcome.metrics = TRAINERS[stage.name](stage)
        outcome.ci95 = {key: list(interval) for key, interval in getattr(outcome.metrics, "ci95", {}).items()}
        for role, folder in trained.items():
            if stage.parallel.is_main:
                stage.roles.save(role, stage.run.path / folder)
            outcome.trainable[role] = stage.roles.counts(role)
        stage.parallel.barrier()
        say(f"{stage.name}: {_brief(stage.name, outcome)} in {time.monotonic() - began:.0f} s")
    return outcome


def summarise(stage: Stage, costs: Costs, outcome: Outcome) -> dict[str, Any]:
    """The content of ``summary.json``."""
    backbone = stage.roles.backbone
    return {
        "task": stage.task.name,
        "stage": stage.name,
        "model": stage.config.model,
        "seed": stage.config.seed,
        **costs.total(backbone.device),
        "parameters": {"total": backbone.parameter_count, "trainable": outcome.trainable},
        "metrics": outcome.metrics,
        "ci95": outcome.ci95,
        "base_fingerprint": base_fingerprint(stage.roles),
        "notes": list(stage.notes),
    }


def file_hashes(folder: Path, parts: list[str]) -> dict[str, str]:
    """SHA-256 of every file under the given sub-folders, each brought to the disk first."""
    hashes = {}
    for path in sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file()):
        sync_file(path)
        hashes[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def reload_stage(session: Session, name: str, run: RunDir, summary: dict[str, Any]) -> None:
    """Bring back the roles of a stage that was finished before, after making sure that nobody altered them."""
    for path, digest in summary.get("files", {}).items():
        found = run.path / path
        if not found.is_file() or hashlib.sha256(found.read_bytes()).hexdigest() != digest:
            raise PerlVlmError(
                f"{found} is not what stage {name} wrote (it is missing or was altered). Put it back, or delete "
                f"{run.path} to train that stage again"
            )
    for role, folder in trained_by(name, session.config).items():
        head: HeadKind | None = "reward" if role.startswith("reward") else "value" if role == "value" else None
        session.roles.load(role, run.path / folder, head=head)
    session.notes.extend(note for note in summary.get("notes", []) if note not in session.notes)
    if name == "sft":
        session.roles.stack_sft()
    if name == "ppo":
        Rewards(session.stage(name, run))  # the report scores with the same reward roles as in an unbroken run


def _brief(stage: str, outcome: Outcome) -> str:
    if stage == "rm":
        return brief(outcome.metrics, outcome.ci95) or "done"
    wanted = {
        "sft": ("sft/loss", "sft/mean_token_accuracy"),
        "ppo": ("ppo/objective/scores", "ppo/objective/kl", "ppo/rollout/logprob_agreement"),
    }[stage]
    metrics = outcome.metrics
    return ", ".join(f"{key.split('/', 1)[1]} {metrics[key]:.4g}" for key in wanted if key in metrics) or "done"
