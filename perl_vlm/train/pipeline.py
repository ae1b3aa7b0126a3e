"""Verbs of the command line: open the model once, run the stages on it, leave a run folder behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from perl_vlm.config import RunConfig
from perl_vlm.data.render import Renderer
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.backbone import load_backbone
from perl_vlm.models.roles import HeadKind, Roles, base_fingerprint
from perl_vlm.task import Task
from perl_vlm.train.evaluate import Evaluation, announce, evaluate
from perl_vlm.train.log import say
from perl_vlm.train.ppo import prepare_reward, train_ppo
from perl_vlm.train.publish import publish
from perl_vlm.train.reward import train_reward_model
from perl_vlm.train.rundir import RunDir, fresh_out, latest_out, role_folder, sync_file
from perl_vlm.train.sft import train_sft
from perl_vlm.train.signals import StopOnSignal
from perl_vlm.train.stage import Stage
from perl_vlm.types import Example, Split

RUNS = Path("runs")
TRAINERS: dict[str, Callable[[Stage], dict[str, float]]] = {
    "sft": train_sft,
    "rm": train_reward_model,
    "ppo": train_ppo,
}
TRAINED = {
    "sft": {"sft": "adapter"},
    "rm": {"reward": "adapter"},
    "ppo": {"policy": "adapter", "value": "value"},
}
"""The roles that each stage trains, and the sub-folder of its run that each is saved in."""


@dataclasses.dataclass(frozen=True)
class Session:
    """One task, one configuration, one model in memory."""

    task: Task
    config: RunConfig
    roles: Roles
    renderer: Renderer
    stop: StopOnSignal
    seen: dict[tuple[str, Split], Sequence[Any]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def stage(self, name: str, run: RunDir) -> Stage:
        """A stage that writes into ``run``."""
        return Stage(
            name=name,
            task=self.task,
            config=self.config,
            roles=self.roles,
            renderer=self.renderer,
            collator=self.task.collator(self.renderer),
            run=run,
            stop=self.stop,
            seen=self.seen,
            notes=self.notes,
        )


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
    _refuse_several_processes()
    began = time.monotonic()
    out, settings = choose_out(verb, task, config), plain_settings(config)
    new = not out.exists()
    run = RunDir.create(out, settings, resume=config.resume)
    if config.resume and run.is_done():
        say(f"{run.path} is finished already; nothing to do")
        return 0
    with StopOnSignal() as stop:
        try:
            session = open_session(task, config, stop)
            look_at_data(session.stage(verb, run), verb)
            load_finished(session, verb)
        except PerlVlmError:
            if new:  # nothing has been done yet: the corrected command may use the same folder
                run.config.unlink()
                run.path.rmdir()
            raise
        outcome = Outcome()
        if verb != "run":
            outcome.evaluation = run_stage(session.stage(verb, run), began)
            return 0
        for name in stages_of(config):
            own = RunDir.create(run.path / name, settings, resume=config.resume)
            done = own.read_summary()
            if done is not None and name != "eval":
                reload_stage(session, name, own, done)
                say(f"{name}: done already, loaded from {own.adapter}")
            else:
                outcome.evaluation = run_stage(session.stage(name, own), time.monotonic())
                done = own.read_summary() or {}
            outcome.add(done)
            stop.raise_if_requested()
        summary = summarise(session.stage(verb, run), began, outcome)
        publish(session.stage(verb, run), summary, outcome.evaluation)
        run.write_summary(summary)
        say(f"report: {run.report}")
    return 0


def stages_of(config: RunConfig) -> list[str]:
    """The stages behind ``run``: a reward model is trained only where PPO uses one."""
    stages = ["sft"] if config.sft.enabled and not config.sft.adapter else []
    stages += ["rm"] if config.ppo.reward_model == "learned" else []
    return [*stages, "ppo", "eval"]


def look_at_data(stage: Stage, verb: str) -> None:
    """Open every set that the coming stages need, so that bad records are named before anything trains."""
    sizes, stages = {}, stages_of(stage.config) if verb == "run" else [verb]
    if {"sft", "ppo"} & set(stages):
        examples = stage.examples("train")
        sizes["training examples"] = len(examples)
        if "sft" in stages or ("ppo" in stages and stage.config.ppo.reward_model == "verify"):
            _require_references(examples, stages)
    if "rm" in stages:
        sizes["training preferences"] = len(stage.preferences("train"))
    if "eval" in stages:
        split = stage.config.eval.split
        sizes[f"{split} examples"] = min(len(stage.examples(split)), stage.config.eval.limit)
    for what, skipped in getattr(stage.task, "skipped", {}).items():
        if skipped:
            stage.warn(f"{len(skipped)} bad records were skipped ({what}); the first: {skipped[0]}")
    say("data: " + ", ".join(f"{size:,} {what}" for what, size in sizes.items()))


def _require_references(examples: Sequence[Example], stages: list[str]) -> None:
    # Records that are made on access are alike; a list is looked through whole.
    looked = examples if isinstance(examples, list) else examples[:64]
    without = [example for example in looked if example.reference is None]
    if without:
        raise PerlVlmError(
            f"{len(without)} of {len(looked)} training examples have no reference answer, as {without[0].origin}; "
            f"{'sft' if 'sft' in stages else 'ppo.reward_model verify'} needs one for each. Add a `reference` column"
        )


def run_stage(stage: Stage, began: float) -> Evaluation | None:
    """Train or evaluate one stage and write all that it leaves, its summary last."""
    outcome = Outcome()
    trained = TRAINED.get(stage.name, {})
    if stage.name == "eval":
        outcome.evaluation = evaluate(stage)
        outcome.metrics = outcome.evaluation.metrics
        outcome.ci95 = {key: list(interval) for key, interval in outcome.evaluation.ci95.items()}
        announce(stage, outcome.evaluation)
    else:
        outcome.metrics = TRAINERS[stage.name](stage)
        for role, folder in trained.items():
            stage.roles.save(role, stage.run.path / folder)
            outcome.trainable[role] = stage.roles.counts(role)
        say(f"{stage.name}: {_brief(stage.name, outcome.metrics)} in {time.monotonic() - began:.0f} s")
    summary = summarise(stage, began, outcome)
    summary["files"] = file_hashes(stage.run.path, list(trained.values()))
    publish(stage, summary, outcome.evaluation)
    stage.run.write_summary(summary)
    if stage.name == "sft":
        stage.roles.stack_sft()
    return outcome.evaluation


def summarise(stage: Stage, began: float, outcome: Outcome) -> dict[str, Any]:
    """The content of ``summary.json``."""
    backbone = stage.roles.backbone
    return {
        "task": stage.task.name,
        "stage": stage.name,
        "model": stage.config.model,
        "seed": stage.config.seed,
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory_bytes": peak_memory_bytes(backbone.device),
        "parameters": {"total": backbone.parameter_count, "trainable": outcome.trainable},
        "metrics": outcome.metrics,
        "ci95": outcome.ci95,
        "base_fingerprint": base_fingerprint(stage.roles),
        "notes": list(stage.notes),
    }


def open_session(task: Task, config: RunConfig, stop: StopOnSignal) -> Session:
    """Load the base once and get ready to render for it."""
    backbone = load_backbone(
        config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        device=config.device,
        dtype=config.dtype,
    )
    if task.modality == "image+text" and not backbone.sees_images:
        raise PerlVlmError(
            f"task {task.name} shows pictures, but --model {config.model} is a language model without a vision tower; "
            "choose an image-text-to-text model"
        )
    dtype = str(backbone.model.dtype).removeprefix("torch.")
    say(f"{config.model}: {backbone.parameter_count:,} parameters, {dtype} on {backbone.device}")
    renderer = Renderer(
        backbone, max_prompt_tokens=config.max_prompt_tokens, max_response_tokens=config.max_response_tokens
    )
    return Session(task, config, Roles(backbone, config.lora, tuning=config.tuning, seed=config.seed), renderer, stop)


def choose_out(verb: str, task: Task, config: RunConfig) -> Path:
    """``--out``, or a fresh folder under ``runs/``; with ``--resume`` alone, the latest one."""
    if config.out is not None:
        return Path(config.out)
    name = f"{Path(config.model).name}-s{config.seed}"
    if config.resume:
        latest = latest_out(RUNS, task.name, verb, name)
        if latest is None:
            raise PerlVlmError(
                f"--resume found no run to continue under {RUNS / task.name}/{verb}-{name}*; name it with --out"
            )
        return latest
    return fresh_out(RUNS, task.name, verb, name)


def plain_settings(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as nested plain values, ready for YAML and for ``--config``."""
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    return {key: value for key, value in settings.items() if key not in ("resume", "out")}


def peak_memory_bytes(device: torch.device) -> int | None:
    """The device's peak where it counts for itself, else this process's peak resident size (None on Windows)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def file_hashes(folder: Path, parts: list[str]) -> dict[str, str]:
    """SHA-256 of every file under the given sub-folders, each brought to the disk first."""
    hashes = {}
    for path in sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file()):
        sync_file(path)
        hashes[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def load_finished(session: Session, verb: str) -> None:
    """Put in place what earlier runs trained: the supervised adapter, and for ``eval`` the policy."""
    supervised, policy = session.config.sft.adapter, session.config.eval.policy
    if supervised is not None and verb != "sft":
        session.roles.load("sft", role_folder(Path(supervised), "sft"))
        session.roles.stack_sft()
    if verb == "eval":
        if policy is None:
            say("eval: no --eval.policy is given, so the anchor alone is evaluated")
        else:
            session.roles.load("policy", role_folder(Path(policy), "ppo"))


def reload_stage(session: Session, name: str, run: RunDir, summary: dict[str, Any]) -> None:
    """Bring back the roles of a stage that was finished before, after making sure that nobody altered them."""
    for path, digest in summary.get("files", {}).items():
        found = run.path / path
        if not found.is_file() or hashlib.sha256(found.read_bytes()).hexdigest() != digest:
            raise PerlVlmError(
                f"{found} is not what stage {name} wrote (it is missing or was altered). Put it back, or delete "
                f"{run.path} to train that stage again"
            )
    for role, folder in TRAINED[name].items():
        head: HeadKind | None = "reward" if role == "reward" else "value" if role == "value" else None
        session.roles.load(role, run.path / folder, head=head)
    session.notes.extend(note for note in summary.get("notes", []) if note not in session.notes)
    if name == "sft":
        session.roles.stack_sft()
    if name == "ppo":
        prepare_reward(session.stage(name, run))


def _refuse_several_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PerlVlmError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: this version trains in one process, and several would "
            "overwrite each other's run. Start perl-vlm without `accelerate launch` or torchrun"
        )


def _brief(stage: str, metrics: dict[str, float]) -> str:
    wanted = {
        "sft": ("sft/loss", "sft/mean_token_accuracy"),
        "rm": ("reward_model/pair_accuracy", "reward_model/label_accuracy", "reward_model/pair_accuracy_blank_images"),
        "ppo": ("ppo/objective/scores", "ppo/objective/kl", "ppo/rollout/logprob_agreement"),
    }[stage]
    return ", ".join(f"{key.split('/', 1)[1]} {metrics[key]:.4g}" for key in wanted if key in metrics) or "done"
