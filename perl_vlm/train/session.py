"""What stands before the first step of a run: its folder, its model, a look at its data, what earlier runs trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perl_vlm.config import RunConfig
from perl_vlm.data.clip_render import renderer_for
from perl_vlm.data.rendering import PromptRenderer
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.backbone import load_backbone
from perl_vlm.models.roles import Roles
from perl_vlm.models.sharding import shard_base
from perl_vlm.rollout.protocol import Client
from perl_vlm.rollout.scorers.spec import parse_reward
from perl_vlm.rollout.served import ServedEngine, check_servable
from perl_vlm.task import Task
from perl_vlm.train.judge import refuse_judge, refuse_missing
from perl_vlm.train.log import say
from perl_vlm.train.parallel import Parallel, engine, engine_line
from perl_vlm.train.rundir import RunDir, fresh_out, latest_out, role_folder
from perl_vlm.train.signals import StopOnSignal
from perl_vlm.train.stage import Stage
from perl_vlm.types import Example, Split

RUNS = Path("runs")


@dataclasses.dataclass(frozen=True)
class Session:
    """One task, one configuration, one model in memory."""

    task: Task
    config: RunConfig
    roles: Roles
    renderer: PromptRenderer
    stop: StopOnSignal
    parallel: Parallel = dataclasses.field(default_factory=Parallel)
    seen: dict[tuple[str, Split], Sequence[Any]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def stage(self, name: str, run: RunDir) -> Stage:
        """A stage that writes into ``run``."""
        stage = Stage(
            name=name,
            task=self.task,
            config=self.config,
            roles=self.roles,
            renderer=self.renderer,
            collator=self.task.collator(self.renderer),
            run=run,
            stop=self.stop,
            parallel=self.parallel,
            seen=self.seen,
            notes=self.notes,
        )
        served = name == "ppo" and self.config.ppo.engine == "served"
        return dataclasses.replace(stage, engine=_engine(stage)) if served else stage


def _client(config: RunConfig) -> Client:
    assert config.ppo.engine_url is not None  # PpoConfig sees to it
    return Client(config.ppo.engine_url, timeout=config.ppo.engine_timeout)


def _engine(stage: Stage) -> ServedEngine:
    config, where = stage.config.ppo, stage.run.path.absolute()
    own = f"{where.name}-{hashlib.sha256(str(where).encode()).hexdigest()[:8]}"  # runs may share the folder
    return ServedEngine(
        stage.roles,
        "policy",
        stage.renderer,
        _client(stage.config),
        where / "engine" if config.engine_adapters is None else Path(config.engine_adapters) / own,
        requests=config.engine_requests,
        canary_every=config.canary_every,
        warn=stage.warn,
        is_main=stage.parallel.is_main,
        share=stage.parallel.broadcast_object,
    )


def check_processes(task: Task, config: RunConfig, verb: str, parallel: Parallel) -> None:
    """Refuse what several processes cannot do, before anything is written."""
    if parallel.world > 1 and verb in ("ppo", "eval", "run") and task.environment() is not None:
        raise PerlVlmError(
            f"{task.name} plays episodes in a live environment, which `{verb}` does in one process; start it without "
            "`accelerate launch`"
        )
    if engine(parallel) == "fsdp2" and verb in ("ppo", "run") and config.ppo.engine == "served":
        raise PerlVlmError(
            "ppo.engine served looks now and then whether the server applies the adapter, in one process, and this "
            "launch shards the base (FSDP2). Launch with configs/accelerate/ddp.yaml, or use ppo.engine local"
        )
    if engine(parallel) == "fsdp2" and (config.tuning == "full" or config.lora.dora):
        raise PerlVlmError(
            f"{'tuning full' if config.tuning == 'full' else 'lora.dora'} needs the base's weights whole in every "
            "process, and this launch shards them (FSDP2). Launch with configs/accelerate/ddp.yaml"
        )
    for name in ("sft", "rm", "ppo"):
        own = getattr(config, name)
        if verb in (name, "run") and own.batch_size % (parallel.world * own.accumulate):
            raise PerlVlmError(
                f"{name}.batch_size is {own.batch_size}, which {parallel.world} processes x {name}.accumulate "
                f"{own.accumulate} cannot share evenly; make it a multiple of {parallel.world * own.accumulate}"
            )


def check_model(session: Session, verb: str) -> None:
    """Refuse a model that cannot do what the verb asks of it."""
    backbone = session.roles.backbone
    if verb != "rm" and not backbone.generates:
        raise PerlVlmError(
            f"--model {session.config.model} is {backbone.what}, so `{verb}` cannot use "
            f"it. Train a reward model with it (`perl-vlm {session.task.name} rm`), then name that run in "
            "--ppo.reward_model of a run on a language model"
        )


def make_run(out: Path, settings: dict[str, Any], config: RunConfig, parallel: Parallel) -> RunDir:
    """The run's folder, made by the first process and then looked at by the others."""
    if parallel.is_main:
        RunDir.create(out, settings, resume=config.resume)
    parallel.barrier()
    return RunDir(out) if parallel.is_main else RunDir.create(out, settings, resume=True)


def look_at_data(stage: Stage, verb: str) -> None:
    """Open every set that the coming stages need, so that bad records and missing sets are named before anything
    trains."""
    config, stages = stage.config, stages_of(stage.config) if verb == "run" else [verb]
    specs = [term.spec for term in parse_reward(config.ppo.reward_model)]
    sizes = {}
    live = stage.task.environment() is not None
    if "ppo" in stages:
        examples = stage.examples("train")
        sizes["training examples"] = len(examples)
        if live and specs != ["verify"]:
            raise PerlVlmError(
                f"ppo.reward_model is {config.ppo.reward_model}, but task {stage.task.name} plays episodes in a live "
                "environment, which pays for whole episodes; give --ppo.reward_model verify"
            )
        if "verify" in specs and not live:
            _require_references(examples, "ppo.reward_model verify")
    if "sft" in stages:
        demonstrations = stage.demonstrations("train")
        sizes["demonstrations"] = len(demonstrations)
        _require_references(demonstrations, "sft")
        stage.demonstrations("validation", needed=False)  # samples are drawn from it at the end
    if "rm" in stages:
        sizes["training preferences"] = len(stage.preferences("train"))
        if config.rm.eval_every and not len(stage.preferences("validation")):
            raise PerlVlmError(
                f"rm.eval_every is {config.rm.eval_every}, but task {stage.task.name} has no validation preferences to "
                "choose the best weights by. Give some, or pass --rm.eval_every null"
            )
        stage.preferences("validation")
        stage.preferences(config.eval.split)
    if "ppo" in stages:
        if "learned" in specs and "rm" not in stages:
            command = f"perl-vlm {stage.task.name}"
            raise PerlVlmError(
                f"ppo needs a reward model: train one with `{command} rm` and name its folder in --ppo.reward_model, "
                f"or use --ppo.reward_model verify for the task's own reward; `{command} run` does both stages"
            )
        if config.ppo.eval_every:
            stage.examples("validation")
        refuse_missing(specs)
        if config.ppo.engine == "served":
            check_servable(stage.roles)
            _client(config).look()
    if "eval" in stages:
        refuse_judge(config.eval.judge, live=live, trained="rm" in stages)
        split = config.eval.split
        sizes[f"{split} examples"] = min(len(stage.examples(split)), config.eval.limit)
    for what, skipped in getattr(stage.task, "skipped", {}).items():
        if skipped:
            stage.warn(f"{len(skipped)} records were left out ({what}); the first: {skipped[0]}")
    say("data: " + ", ".join(f"{size:,} {what}" for what, size in sizes.items()))


def _require_references(examples: Sequence[Example], who: str) -> None:
    # Records that are made on access are alike; a list is looked through whole.
    looked = examples if isinstance(examples, list) else examples[:64]
    without = [example for example in looked if example.reference is None]
    if without:
        raise PerlVlmError(
            f"{len(without)} of {len(looked)} training examples have no reference answer, as {without[0].origin}; "
            f"{who} needs one for each. Add a `reference` column"
        )


def open_session(task: Task, config: RunConfig, stop: StopOnSignal, parallel: Parallel | None = None) -> Session:
    """Load the base once and get ready to render for it."""
    parallel = parallel or Parallel()
    backbone = load_backbone(
        config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        device=_loading_device(config, parallel),
        dtype=config.dtype,
        load_in_4bit=config.load_in_4bit,
    )
    if engine(parallel) == "fsdp2":
        shard_base(backbone.model, parallel)
    if parallel.world > 1:
        say(engine_line(parallel))
    if task.modality == "image+text" and not backbone.sees_images:
        raise PerlVlmError(
            f"task {task.name} shows pictures, but --model {config.model} is a language model without a vision tower; "
            "choose an image-text-to-text model"
        )
    dtype = str(backbone.model.dtype).removeprefix("torch.")
    say(f"{config.model}: {backbone.parameter_count:,} parameters, {dtype} on {backbone.device}")
    renderer = renderer_for(
        backbone, max_prompt_tokens=config.max_prompt_tokens, max_response_tokens=config.max_response_tokens
    )
    roles = Roles(backbone, config.lora, tuning=config.tuning, seed=config.seed)
    if config.checkpointing:
        roles.recompute()
    return Session(task, config, roles, renderer, stop, parallel)


def _loading_device(config: RunConfig, parallel: Parallel) -> str:
    """A base that will be sharded is loaded on the CPU, and goes to the device layer by layer."""
    if parallel.world == 1:
        return config.device
    return "cpu" if engine(parallel) == "fsdp2" else str(parallel.device)


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


def stages_of(config: RunConfig) -> list[str]:
    """The stages behind ``run``: a reward model is trained only where PPO uses one."""
    stages = ["sft"] if config.sft.enabled and not config.sft.adapter else []
    stages += ["rm"] if any(term.spec == "learned" for term in parse_reward(config.ppo.reward_model)) else []
    return [*stages, "ppo", "eval"]
