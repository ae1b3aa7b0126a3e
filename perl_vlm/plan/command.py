"""``perl-vlm plan --model NAME --stage STAGE --gpu GPU``: parse, plan, show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from perl_vlm.cli_parse import flags_help, parse_flags
from perl_vlm.cli_settings import Setting, UsageError, settings_of, with_values
from perl_vlm.config import RunConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.plan.gpus import KNOWN, find_gpu
from perl_vlm.plan.settings import Job, PlanSettings

COMMAND = "perl-vlm plan"
STAGES = ("sft", "rm", "ppo")
_USAGE = """usage: perl-vlm plan --model NAME --stage sft|rm|ppo --gpu 24GB|NAME [--key value ...]

Peak memory and time of a step from a model's config and a run's settings, before anything runs: no weights are read.
Every setting of a run may be given, such as --ppo.batch_size 64 --max_prompt_tokens 512 --tuning full."""
_SHORT = ("steps", "batch_size", "lr")


@dataclass(frozen=True)
class NoTask:
    """A plan is of no task: only the lengths of its prompts and responses matter."""


def plan(argv: Sequence[str]) -> int:
    """Run ``plan`` and return the exit code: 0, whether the stage fits or not.

    Raises UsageError for arguments that are not understood or contradict each other, and PerlVlmError for a model that
    cannot be found or planned.
    """
    known = known_settings()
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0
    values = parse_flags(known, [_underscored(word) for word in argv], COMMAND)
    job, name = job_of(values)
    from perl_vlm.plan.report import make_plan, show

    made = make_plan(job, name)
    if job.plan.json:
        print(json.dumps(made.as_dict(), indent=2))
    else:
        show(made)
    return 0


def known_settings() -> dict[str, Setting]:
    """The planner's own flags, then a run's."""
    return settings_of(PlanSettings()) | settings_of(RunConfig(task=NoTask()))


def help_text() -> str:
    """Usage, the planner's own flags with their defaults, and where the others are listed."""
    own = flags_help(settings_of(PlanSettings(), docs=True))
    gpus = f"GPUs known by name: {', '.join(KNOWN)}"
    return f"{_USAGE}\n\n{own}\n\n{gpus}\n`perl-vlm <task> <verb> --help` lists a run's settings."


def _underscored(word: str) -> str:
    """``--image-tokens`` for ``--image_tokens``: no setting's name has a hyphen."""
    flag, equals, value = word.partition("=")
    return flag.replace("-", "_").replace("__", "--", 1) + equals + value if flag.startswith("--") else word


def job_of(values: Mapping[str, Any]) -> tuple[Job, str]:
    """What is to be planned, and the model's name. Pictures are not counted yet: the model says how large they are.

    Raises UsageError where something is missing or cannot be.
    """
    given = dict(values)
    stage = given.get("stage")
    if stage is None:
        raise UsageError(f"`{COMMAND}` needs --stage: one of {', '.join(STAGES)}")
    if given.get("model") is None:
        raise UsageError(f"`{COMMAND}` needs --model: tiny, a folder or a hub name; its config alone is read")
    if given.get("gpu") is None:
        raise UsageError(f"`{COMMAND}` needs --gpu: its memory, such as 24GB, or its name, one of {', '.join(KNOWN)}")
    for short in _SHORT:
        value = given.pop(short, None)
        if value is not None:
            given.setdefault(f"{stage}.{short}", value)
    own = {key: value for key, value in given.items() if key in settings_of(PlanSettings())}
    try:
        config = with_values(RunConfig(task=NoTask()), {key: value for key, value in given.items() if key not in own})
    except ValueError as error:
        raise UsageError(str(error)) from error
    settings = with_values(PlanSettings(), own)
    job = Job(config, settings, find_gpu(str(settings.gpu)), settings.image_tokens or 0)
    if (settings.image_tokens or 0) < 0:
        raise UsageError(f"--image_tokens is {settings.image_tokens}; it must be 0 (no pictures) or more")
    job.check()
    return job, config.model


def with_pictures(job: Job, tokens: int | None) -> Job:
    """The same job with the model's own picture in each prompt, unless the command line said how many tokens."""
    if job.plan.image_tokens is not None or tokens is None:
        return job
    if tokens > job.config.max_prompt_tokens:
        raise PerlVlmError(
            f"one picture of this model takes {tokens} tokens, and --max_prompt_tokens is "
            f"{job.config.max_prompt_tokens}; raise it, or give --image_tokens"
        )
    return replace(job, image_tokens=tokens)
