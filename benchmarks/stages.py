"""perl-vlm's own arms: the stages that its commands run, on the benchmarks' workloads, with a meter at every step."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measuring import Meter
from workloads import RANK, picture, prompt_text, response_text

from perl_vlm.config import EvalConfig, LoraConfig, PpoConfig, RmConfig, RunConfig
from perl_vlm.data.collate import Collator
from perl_vlm.task import Task
from perl_vlm.train.ppo import train_ppo
from perl_vlm.train.reward import add_reward_role, member_names, train_reward_model
from perl_vlm.train.rundir import RunDir
from perl_vlm.train.session import open_session
from perl_vlm.train.signals import StopOnSignal
from perl_vlm.train.stage import Stage
from perl_vlm.types import Comparison, Example, ImageSlot, Message, Sequences, Split

RECORDS = 32
"""To train on; batches go round them."""


@dataclass(frozen=True)
class Picture:
    """A picture of the workload."""

    shape: Mapping[str, Any]
    number: int

    def load(self) -> Any:
        return picture(self.shape, self.number)


class Separate(Collator):
    """Says of no two rows that they share a prompt."""

    def comparisons(self, pairs: Sequence[Comparison]) -> tuple[Sequences, Any]:
        sequences, margins = super().comparisons(pairs)
        return replace(sequences, prompt_of=None), margins


class Synthetic(Task):
    """Random words, and pictures where the model sees. ``config`` is the spec of an arm."""

    name = "synthetic"
    modality = "text"
    primary_metric = "length"
    Config = dict

    def _prompt(self, number: int) -> dict[str, Any]:
        shape = self.config["shape"]
        text = prompt_text(shape, self.config["load"], number)
        if not shape["vision"]:
            return {"messages": (Message("user", (text,)),)}
        return {"messages": (Message("user", (ImageSlot(), text)),), "images": (Picture(shape, number),)}

    def _numbers(self, split: Split) -> range:
        return range(RECORDS) if split == "train" else range(RECORDS, RECORDS + 2)

    def examples(self, split: Split) -> list[Example]:
        return [Example(f"{split}-{number}", reference="w9", **self._prompt(number)) for number in self._numbers(split)]

    def preferences(self, split: Split) -> list[Comparison]:
        shape, load = self.config["shape"], self.config["load"]
        return [
            Comparison(
                f"{split}-{number}",
                chosen=response_text(shape, load, number, "chosen"),
                rejected=response_text(shape, load, number, "rejected"),
                **self._prompt(number),
            )
            for number in self._numbers(split)
        ]

    def evaluate(self, example: Example, response: str) -> dict[str, float]:
        return {"length": float(len(response))}

    def verify(self, example: Example, response: str) -> float:
        return reward_of(response)

    def collator(self, renderer: Any) -> Collator:
        return (Collator if self.config.get("shared", True) else Separate)(renderer)


def reward_of(response: str) -> float:
    """A reward in Python that differs between responses: the share of words with an even number."""
    numbers = [word[1:] for word in response.split()]
    return sum(number.isdigit() and int(number) % 2 == 0 for number in numbers) / max(1, len(numbers))


class _Log:
    """A stage's log that tells the meter when a step is over."""

    def __init__(self, log: Any, meter: Meter) -> None:
        self._log, self._meter = log, meter

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._log.log(step, values)
        self._meter.lap()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


class Metered(Stage):
    """A stage whose steps are measured; everything else is the stage's own."""

    meter: Meter

    def metric_log(self, start_step: int) -> Any:
        log = _Log(super().metric_log(start_step), self.meter)
        self.meter.lap()
        return log


def settings(spec: Mapping[str, Any]) -> RunConfig:
    """A run's configuration, of what a spec says."""
    load, steps = spec["load"], spec["warmup"] + spec["steps"]
    common = {"steps": steps, "batch_size": load["batch"], "save_every": 10**6, "warmup": 0, "lr": 1e-4}
    grouped = load["group"] > 1
    return RunConfig(
        model=spec["folder"],
        dtype=spec["dtype"],
        tuning=spec.get("tuning", "lora"),
        max_prompt_tokens=load["prompt"],
        max_response_tokens=load["response"],
        lora=LoraConfig(language_rank=RANK, vision_rank=0),
        rm=RmConfig(**common, members=spec.get("models", 1), normalise="none", eval_pairs=2),
        ppo=PpoConfig(
            **common,
            epochs=load["epochs"],
            minibatches=1,
            max_new_tokens=load["response"],
            min_new_tokens=load["response"],
            group_size=load["group"],
            advantage="rloo" if grouped else "gae",
            value="auto" if grouped else {"adapter": "zero"}.get(spec["value"], spec["value"]),
            reward_model="verify" if grouped else "learned",
        )
        if "value" in spec
        else PpoConfig(),
        eval=EvalConfig(bootstrap=2),
        task=dict(spec),
    )


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Train as a spec says, a reward model, or a policy where it names a value function; returns the meter's result.

    Raises RuntimeError where prompts or responses have other lengths than the workload says.
    """
    meter = Meter()
    verb = "ppo" if "value" in spec else "rm"
    with tempfile.TemporaryDirectory(prefix="perl-vlm-bench-") as scratch:
        config = settings(spec)
        session = open_session(Synthetic(config.task), config, StopOnSignal())
        made = session.stage(verb, RunDir.create(Path(scratch) / verb, {}, resume=False))
        stage = Metered(**vars(made))
        object.__setattr__(stage, "meter", meter)  # the stage is frozen
        _check_lengths(stage, spec)
        if verb == "rm":
            train_reward_model(stage)
        else:
            if config.ppo.reward_model == "learned":
                for name in member_names(config.rm.members):
                    add_reward_role(stage, name)
            train_ppo(stage)
        trained = ["policy", "value"] if verb == "ppo" else member_names(config.rm.members)
        trainable = sum(sum(stage.roles.counts(name).values()) for name in trained if name in stage.roles)
        base = stage.roles.backbone
        return meter.result(
            spec["warmup"],
            trainable=trainable,
            trainable_share_of_base=round(trainable / base.parameter_count, 5),
            base_bytes=base.parameter_count * base.model.dtype.itemsize,
        )


def _check_lengths(stage: Stage, spec: Mapping[str, Any]) -> None:
    load = spec["load"]
    sequences, _ = stage.collator.comparisons(stage.task.preferences("test"))  # type: ignore[arg-type]
    found = sequences.prompt_width, sequences.response_mask.shape[1], int(sequences.attention_mask.min())
    if found != (load["prompt"], load["response"], 1):
        raise RuntimeError(
            f"prompts and responses have {found[:2]} tokens, {load['prompt']}, {load['response']} wanted"
        )
