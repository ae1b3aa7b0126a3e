"""Turn a finished run into what a person reads: ``report.html`` and the model card."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
import yaml

from perl_vlm import __version__
from perl_vlm.data.images import to_png_bytes
from perl_vlm.data.sequences import to_device, with_responses
from perl_vlm.report.card import write_model_card
from perl_vlm.report.html import Curve, Distribution, GalleryItem, Report, write_report
from perl_vlm.rollout.scorers.spec import parse_reward
from perl_vlm.train.evaluate import Answer, Evaluation
from perl_vlm.train.figures import ONE_GROUP
from perl_vlm.train.judge import JUDGE_ROLE
from perl_vlm.train.log import read_log
from perl_vlm.train.rewards import AVERAGE
from perl_vlm.train.stage import Stage
from perl_vlm.train.tables import headline, tables
from perl_vlm.types import Example

GALLERY = 12
SCORED = 512
PACKAGES = ("torch", "transformers", "peft", "accelerate")

# (stage, title, metric keys with their legends, note)
CURVES: tuple[tuple[str, str, dict[str, str], str], ...] = (
    ("sft", "Supervised loss", {"loss": "loss"}, ""),
    ("rm", "Reward model: accuracy", {"accuracy": "training", "eval/accuracy": "validation"}, ""),
    ("rm", "Reward model: loss", {"loss": "training", "eval/loss": "validation"}, ""),
    ("ppo", "Reward", {"objective/scores": "mean reward"}, "{reward}"),
    ("ppo", "Reward on held-out prompts", {"eval/scores": "mean reward"}, "Chooses the policy that is kept."),
    ("ppo", "Judged by the task: sampled answers", {"gold/{primary}": "{primary}"}, "{gold}"),
    ("ppo", "Disagreement of the reward models", {"reward/disagreement": "standard deviation"}, "Grows under hacking."),
    ("ppo", "KL to the reference", {"objective/kl": "nats a response"}, "Sampled estimate (k1)."),
    ("ppo", "Coefficient of the regulariser", {"objective/kl_coef": "beta"}, ""),
    ("ppo", "Entropy of the policy", {"objective/entropy": "nats a token"}, ""),
    ("ppo", "Value function", {"val/explained_variance": "explained variance"}, "1 is perfect, 0 knows nothing."),
    ("ppo", "Gradient norms before clipping", {"grad_norm/policy": "policy", "grad_norm/value": "value"}, ""),
    (
        "ppo",
        "Sampler against recomputation",
        {"rollout/logprob_agreement": "mean exp|delta log-prob|"},
        "1 is perfect.",
    ),
)


def publish(stage: Stage, summary: Mapping[str, Any], evaluation: Evaluation | None) -> None:
    """Write the run's report and model card. Every process takes part in scoring; the first one writes."""
    gallery, distributions = _before_and_after(stage, evaluation) if evaluation and evaluation.policy else ([], [])
    notes = list(dict.fromkeys(stage.parallel.gather_objects(stage.notes)))
    if not stage.parallel.is_main:
        return
    write_report(
        stage.run.report,
        Report(
            title=f"{stage.task.name}: {stage.name} on {stage.config.model}",
            subtitle=_subtitle(stage, summary),
            headline=headline(stage, summary, evaluation),
            tables=tables(stage, summary, evaluation),
            facts=_facts(stage, summary),
            curves=_curves(stage),
            gallery=gallery,
            distributions=distributions,
            settings=_settings(stage),
            notes=[*notes, *_remarks(evaluation)],
        ),
    )
    if stage.name != "eval":
        _card(stage, summary)


def _subtitle(stage: Stage, summary: Mapping[str, Any]) -> str:
    primary, metrics = stage.task.primary_metric, summary["metrics"]
    if f"gain/{primary}" not in metrics:
        return "One stage of a run."
    interval = summary["ci95"].get(f"gain/{primary}")
    if interval is None:
        return f"Whether the policy is better than its anchor cannot be told: {ONE_GROUP}."
    low, high = interval
    verdict = "better than" if low > 0 else "worse than" if high < 0 else "not distinguishable from"
    return f"On held-out examples the policy is {verdict} its anchor."


def _facts(stage: Stage, summary: Mapping[str, Any]) -> dict[str, str]:
    facts = {
        "Task": stage.task.name,
        "Model": f"{stage.config.model} ({summary['parameters']['total']:,} parameters)",
        "Tuning": stage.config.tuning,
        "Seed": str(stage.config.seed),
        "Device": f"{stage.device}, base in {str(stage.roles.backbone.model.dtype).removeprefix('torch.')}",
        "Duration": f"{summary['seconds']:.0f} s",
        "Peak memory": f"{(summary['peak_memory_bytes'] or 0) / 2**20:,.0f} MiB (whole process)",
    }
    total = summary["parameters"]["total"]
    for role, counts in summary["parameters"]["trainable"].items():
        parts = ", ".join(f"{tower} {number:,}" for tower, number in counts.items() if number)
        facts[f"Trainable: {role}"] = f"{sum(counts.values()):,} ({sum(counts.values()) / total:.2%}): {parts}"
    return facts


def _curves(stage: Stage) -> list[Curve]:
    logs = [stage.run.metrics] if stage.name != "run" else sorted(stage.run.path.glob("*/metrics.jsonl"))
    lines = [line for path in logs for line in read_log(path)]
    specs = [term.spec for term in parse_reward(stage.config.ppo.reward_model)]
    alone = {"verify": "The task's own check.", "learned": "In standard deviations of the reward model."}
    notes = {
        "{reward}": alone.get(specs[0], "") if len(specs) == 1 else f"{stage.config.ppo.reward_model}.",
        "{gold}": "This check is part of the reward." if "verify" in specs else "Never used in training.",
    }
    curves = []
    for name, title, keys, note in CURVES:
        series = {}
        for key, legend in keys.items():
            key, legend = (text.replace("{primary}", stage.task.primary_metric) for text in (key, legend))
            points = [
                (line["step"], line[key]) for line in lines if line["stage"] == name and line.get(key) is not None
            ]
            if points:
                series[legend] = points
        if series:
            for mark, text in notes.items():
                note = note.replace(mark, text)
            curves.append(Curve(title, "round" if name == "ppo" else "step", series, note))
    return curves


def _before_and_after(stage: Stage, evaluation: Evaluation) -> tuple[list[GalleryItem], list[Distribution]]:
    examples, anchor, policy = evaluation.examples[:SCORED], evaluation.anchor, evaluation.policy
    rewards = [name for name in stage.roles.names if name.split("-")[0] in ("reward", "untrained")]
    names = [name for name in rewards if AVERAGE not in name and not name.startswith(JUDGE_ROLE)]
    if stage.task.environment() is not None:
        names = []  # what a reward model says of one turn says little of an episode
    before = _scores(stage, names, examples, anchor) if names else None
    after = _scores(stage, names, examples, policy) if names else None
    primary = stage.task.primary_metric
    items = []
    for place in _choose(examples, anchor, policy, primary):
        example = examples[place]
        items.append(
            GalleryItem(
                image_png=to_png_bytes(example.images[0].load()) if example.images else None,
                prompt=example.messages[-1].text,
                reference=example.reference,
                before=anchor[place].response,
                after=policy[place].response,
                before_right=_right(anchor[place].judged[primary]),
                after_right=_right(policy[place].judged[primary]),
                reward_before=before[place] if before else None,
                reward_after=after[place] if after else None,
            )
        )
    distributions = []
    if any(not answer.logprobs for answer in anchor):
        lengths = {name: _lengths(answers) for name, answers in (("anchor", anchor), ("policy", policy))}
        distributions = [Distribution("Length of the answers", lengths, "In tokens, the end of the turn included.")]
    if before and after:
        note = f"Scores of the greedy answers to the first {len(examples)} examples"
        note += ", the mean over the reward models." if len(names) > 1 else "."
        distributions.insert(0, Distribution("Learned reward", {"anchor": before, "policy": after}, note))
    return items, distributions


def _lengths(answers: Sequence[Answer]) -> list[float]:
    """Of what was decoded, not chosen."""
    return [float(len(answer.tokens)) for answer in answers if not answer.logprobs]


def _right(judged: float) -> bool | None:
    """Whether an answer is right; one that is so in part is neither right nor wrong."""
    return True if judged >= 1.0 else False if judged <= 0.0 else None


def _choose(examples: Sequence[Example], anchor: Sequence[Answer], policy: Sequence[Answer], primary: str) -> list[int]:
    """Places in order of appearance: half of the gallery gained, a quarter lost, a quarter changed nothing. What is
    shown is no measure of how often it happens; the headline is."""
    kinds: dict[str, list[int]] = {"gained": [], "lost": [], "same": []}
    for place in range(len(examples)):
        change = policy[place].judged[primary] - anchor[place].judged[primary]
        kinds["gained" if change > 0 else "lost" if change < 0 else "same"].append(place)
    return [*kinds["gained"][: GALLERY // 2], *kinds["lost"][: GALLERY // 4], *kinds["same"][: GALLERY // 4]]


@torch.no_grad()
def _scores(stage: Stage, names: Sequence[str], examples: Sequence[Example], answers: Sequence[Answer]) -> list[float]:
    """The reward of each answer, the members of an ensemble averaged."""
    parts = []
    for block in stage.blocks(len(examples), stage.config.eval.batch_size):
        prompts = stage.collator.prompts([examples[place] for place in block])
        tokens = [answers[place].tokens for place in block]
        sequences = to_device(with_responses(prompts, tokens, stage.roles.backbone.pad_id), stage.device)
        parts.append(torch.stack([stage.roles.scores(name, sequences) for name in names]).mean(dim=0))
    return list(stage.gathered(torch.cat(parts), len(examples)).tolist())


def _settings(stage: Stage) -> dict[str, Any]:
    return dict(yaml.safe_load(stage.run.config.read_text(encoding="utf-8")))


def _remarks(evaluation: Evaluation | None) -> list[str]:
    if evaluation is None or not evaluation.policy:
        return []
    remarks = [
        "The gallery shows the first answers that became better, became worse and stayed as they were, in the order of "
        "the evaluation set; it is no measure of how often each happens."
    ]
    if evaluation.judge:
        remarks.append(f"The answers were also scored by a judge: {evaluation.judge}.")
    return remarks


def _card(stage: Stage, summary: Mapping[str, Any]) -> None:
    config = stage.config
    write_model_card(
        stage.run.readme,
        title=f"{stage.task.name} {stage.name} adapter for {config.model}",
        base_model=config.model,
        base_revision=stage.roles.backbone.revision,
        stage=stage.name,
        task=stage.task.name,
        license=None,
        metrics=summary["metrics"],
        ci95={key: (low, high) for key, (low, high) in summary["ci95"].items()},
        parameters=summary["parameters"],
        command=shlex.join(["perl-vlm", *sys.argv[1:]]),
        versions={"perl-vlm": __version__, **{name: version(name) for name in PACKAGES}},
        how_to_load=_how_to_load(stage),
        limits=_limits(stage),
        settings=_settings(stage),
        pipeline_tag=_pipeline_tag(stage),
        tuning=config.tuning,
    )


def _pipeline_tag(stage: Stage) -> str:
    if stage.roles.backbone.kind != "causal":
        return "text-classification" if stage.roles.backbone.kind == "encoder" else "zero-shot-image-classification"
    return "image-text-to-text" if stage.roles.backbone.sees_images else "text-generation"


def _how_to_load(stage: Stage) -> str:
    """Python that brings the trained model back without perl-vlm, where other libraries know its kind."""
    config, backbone = stage.config, stage.roles.backbone
    inner = "members/0" if stage.name == "rm" and config.rm.members > 1 else "adapter"
    inner = f"ppo/{inner}" if stage.name == "run" else inner
    if backbone.kind == "clip":
        return (
            f"# perl-vlm scores with it\nperl-vlm {stage.task.name} ppo --model ... --ppo.reward_model <this folder>\n"
        )
    generating = "AutoModelForImageTextToText" if backbone.sees_images else "AutoModelForCausalLM"
    auto = "AutoModel" if backbone.kind == "encoder" else generating
    if config.tuning == "full":
        return f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained('{inner}')\n"
    base = "<perl_vlm package>/models/tiny" if config.model == "tiny" else config.model
    text = f"from peft import PeftModel\nfrom transformers import {auto}\n\nbase = {auto}.from_pretrained({base!r})\n"
    text += f"model = PeftModel.from_pretrained(base, '{inner}')\n"
    if stage.name == "rm":
        text += (
            f"# the reward, from {inner}/head.safetensors, at the response's last token:\n"
            "# sum(mix * (weight @ hidden + bias - mean) / std)\n"
        )
    return text


def _limits(stage: Stage) -> list[str]:
    limits = [
        "A reward model measures what its preferences say, on prompts like theirs; elsewhere it is a guess.",
        "Measured on one task and one seed. Reinforcement learning changes what the model prefers to say; it teaches "
        "no new perception or knowledge.",
    ]
    if stage.config.model == "tiny":
        limits.append("The bundled base has seen drawings of coloured shapes only. It is for trying the method out.")
    if "untrained" in stage.config.ppo.reward_model:
        limits.append("Its reward head was never trained: this run is a control.")
    return limits
