"""Verbs of the command line: open the model once, run the stages on it, leave a run folder behind."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from perl_vlm.config import RunConfig
from perl_vlm.data.render import Renderer, check_chat_model
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.backbone import load_backbone
from perl_vlm.models.roles import Roles
from perl_vlm.task import Task
from perl_vlm.train.evaluate import Evaluation, announce, evaluate
from perl_vlm.train.log import say
from perl_vlm.train.ppo import prepare_reward, train_ppo
from perl_vlm.train.publish import publish
from perl_vlm.train.reward import train_reward_model
from perl_vlm.train.rundir import RunDir, fresh_out, latest_out
from perl_vlm.train.sft import train_sft
from perl_vlm.train.signals import StopOnSignal
from perl_vlm.train.stage import Stage
from perl_vlm.types import Split

RUNS = Path("runs")


@dataclasses.dataclass(frozen=True)
class Session:
    """One task, one configuration, one model in memory."""

    task: Task
    config: RunConfig
    roles: Roles
    renderer: Renderer
    stop: StopOnSignal
    seen: dict[tuple[str, Split], Sequence[Any]] = dataclasses.field(default_factory=dict)

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
        )


def run_verb(verb: str, task: Task, config: RunConfig) -> int:
    """Run ``sft``, ``rm``, ``ppo``, ``eval`` or ``run`` to its end; the process's exit code."""
    began = time.monotonic()
    out = choose_out(verb, task, config)
    settings = plain_settings(config)
    run = RunDir.create(out, settings, resume=config.resume)
    if config.resume and run.is_done():
        say(f"{run.path} is finished already; nothing to do")
        return 0
    with StopOnSignal() as stop:
        session = open_session(task, config, stop)
        look_at_data(session.stage(verb, run), verb)
        stages = {"run": stages_of(config)}.get(verb, [verb])
        _load_finished(session, verb)
        metrics: dict[str, float] = {}
        ci95: dict[str, tuple[float, float]] = {}
        evaluation, notes = None, []
        for name in stages:
            own = RunDir.create(run.path / name, settings, resume=config.resume) if verb == "run" else run
            stage = session.stage(name, own)
            done = own.read_summary() if verb == "run" else None
            if done is not None and name != "eval":
                _reload(session, name, own)
                metrics |= done["metrics"]
                say(f"{name}: done already, loaded from {own.adapter}")
                continue
            evaluation = run_stage(stage, verb) or evaluation
            notes += stage.notes
            finished = own.read_summary()
            if finished is not None:
                metrics |= finished["metrics"]
                ci95 |= {key: (low, high) for key, (low, high) in finished["ci95"].items()}
        if verb == "run":
            summary = summarise(session, verb, began, metrics, ci95)
            publish(session.stage(verb, run), summary, evaluation, notes)
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
    sizes = {}
    if verb in ("sft", "ppo", "run"):
        sizes["training examples"] = len(stage.examples("train"))
    if verb == "rm" or ("rm" in stages_of(stage.config) and verb == "run"):
        sizes["training preferences"] = len(stage.preferences("train"))
    if verb in ("eval", "run"):
        split = stage.config.eval.split
        sizes[f"{split} examples"] = min(len(stage.examples(split)), stage.config.eval.limit)
    say("data: " + ", ".join(f"{size:,} {what}" for what, size in sizes.items()))


def run_stage(stage: Stage, verb: str) -> Evaluation | None:
    """Train or evaluate one stage and write all that it leaves."""
    began = time.monotonic()
    evaluation: Evaluation | None = None
    ci95: dict[str, tuple[float, float]] = {}
    if stage.name == "eval":
        evaluation = evaluate(stage)
        metrics, ci95 = evaluation.metrics, evaluation.ci95
        announce(stage, evaluation)
    else:
        trainers: dict[str, Callable[[Stage], dict[str, float]]] = {
            "sft": train_sft,
            "rm": train_reward_model,
            "ppo": train_ppo,
        }
        metrics = trainers[stage.name](stage)
        for role in _trained_roles(stage.name):
            folder = stage.run.adapter if role != "value" else stage.run.path / "value"
            stage.roles.save(role, folder)
            say(stage.roles.describe(role))
        if stage.name == "sft":
            stage.roles.stack_sft()
        say(f"{stage.name}: {_brief(stage.name, metrics)} in {time.monotonic() - began:.0f} s")
    session = Session(stage.task, stage.config, stage.roles, stage.renderer, stage.stop)
    summary = summarise(session, stage.name, began, metrics, ci95)
    publish(stage, summary, evaluation, stage.notes)
    stage.run.write_summary(summary)
    return evaluation


def summarise(
    session: Session,
    verb: str,
    began: float,
    metrics: dict[str, float],
    ci95: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    """The content of ``summary.json``."""
    roles = session.roles
    trained = [name for name in roles.names if name != "reference"]
    return {
        "task": session.task.name,
        "stage": verb,
        "model": session.config.model,
        "seed": session.config.seed,
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory_bytes": peak_memory_bytes(roles.backbone.device),
        "parameters": {
            "total": roles.backbone.parameter_count,
            "trainable": {name: roles.counts(name) for name in trained},
        },
        "metrics": metrics,
        "ci95": {key: list(interval) for key, interval in ci95.items()},
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
    check_chat_model(renderer)
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
    settings = dataclasses.asdict(config)
    return {key: value for key, value in settings.items() if key not in ("resume", "out")}


def peak_memory_bytes(device: torch.device) -> int:
    """The device's peak where it counts for itself, else this process's peak resident size."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _trained_roles(stage: str) -> tuple[str, ...]:
    return {"sft": ("sft",), "rm": ("reward",), "ppo": ("policy", "value")}[stage]


def _load_finished(session: Session, verb: str) -> None:
    """Put in place what earlier runs trained: the supervised adapter, and for ``eval`` the policy."""
    supervised, policy = session.config.sft.adapter, session.config.eval.policy
    if supervised is not None and verb != "sft":
        session.roles.load("sft", _adapter_folder(supervised))
        session.roles.stack_sft()
    if verb == "eval":
        if policy is None:
            say("eval: no --eval.policy is given, so the anchor alone is evaluated")
        else:
            session.roles.load("policy", _adapter_folder(policy))


def _adapter_folder(given: str) -> Path:
    """The adapter inside a run's folder, or the folder itself."""
    nested = [Path(given) / "adapter", Path(given) / "ppo" / "adapter"]
    return next((folder for folder in nested if folder.is_dir()), Path(given))


def _reload(session: Session, name: str, run: RunDir) -> None:
    role = _trained_roles(name)[0]
    session.roles.load(role, run.adapter, head="reward" if role == "reward" else None)
    if name == "sft":
        session.roles.stack_sft()
    if name == "ppo" and session.config.ppo.reward_model == "untrained":
        prepare_reward(session.stage(name, run))


def _brief(stage: str, metrics: dict[str, float]) -> str:
    wanted = {
        "sft": ("sft/loss", "sft/mean_token_accuracy"),
        "rm": ("reward_model/pair_accuracy", "reward_model/label_accuracy", "reward_model/pair_accuracy_blank_images"),
        "ppo": ("ppo/objective/scores", "ppo/objective/kl", "ppo/rollout/logprob_agreement"),
    }[stage]
    return ", ".join(f"{key.split('/', 1)[1]} {metrics[key]:.4g}" for key in wanted if key in metrics) or "done"
