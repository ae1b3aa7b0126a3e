"""What a run has cost, as it wrote it down, and what can be read of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perl_vlm.train.log import read_log
from perl_vlm_eval.evaluations.base import Evaluation
from perl_vlm_eval.opened import OpenRun
from perl_vlm_eval.results import Better, Figure, Findings, Unit
from perl_vlm_eval.runs import step_seconds
from perl_vlm_eval.statistics import Estimate


@dataclass(frozen=True)
class ResourceSettings:
    """``resources`` has no settings."""


class Resources(Evaluation):
    """``resources``: time, peak memory and trainable share of each stage that a run has."""

    kind = "resources"
    Settings = ResourceSettings

    def depends_on(self, opened: OpenRun) -> str:
        """What the runs wrote down."""
        files = [path for run in opened.found.stages.values() for path in (run.summary, run.metrics) if path.is_file()]
        return "".join(path.read_text(encoding="utf-8") for path in files)

    def measure(self, opened: OpenRun) -> Findings:
        """Of figures that were counted once there is no interval."""
        figures: dict[str, Figure] = {}
        for name, run in opened.found.stages.items():
            summary = run.read_summary() or {}
            parameters = summary.get("parameters", {})
            figures |= _one(f"{name}/seconds", summary.get("seconds"), "seconds")
            figures |= _one(f"{name}/peak_memory", summary.get("peak_memory_bytes"), "bytes")
            figures |= _one(f"{name}/energy", summary.get("energy_joules"), "joules")
            total = parameters.get("total")
            for role, counts in parameters.get("trainable", {}).items():
                share = sum(counts.values()) / total if total else None
                figures |= _one(f"{name}/trainable/{role}", share, "share")
            seconds = step_seconds(run, name)
            figures |= _one(f"{name}/step_seconds", seconds, "seconds")
            tokens = _tokens(read_log(run.metrics), name)
            if seconds and tokens:
                figures |= _one(f"{name}/tokens_a_second", tokens / seconds, "number", "higher")
        return Findings(
            figures=figures, headlines=[one for one in figures if one.endswith(("peak_memory", "step_seconds"))]
        )


def _one(name: str, value: float | None, unit: Unit, better: Better = "lower") -> dict[str, Figure]:
    if value is None:
        return {}
    return {name: Figure(Estimate(float(value), None, None, 1, 1, "counted once"), unit, better)}


def _tokens(lines: Sequence[Mapping[str, Any]], stage: str) -> float | None:
    """Of a step in the middle: those that a reward model read, or those that a policy answered."""
    own = [line for line in lines if line.get("stage") == stage]
    found = [
        float(line["num_tokens"]) if "num_tokens" in line else line["episodes"] * line["response/mean_length"]
        for line in own
        if line.get("num_tokens") or (line.get("episodes") and line.get("response/mean_length"))
    ]
    return sorted(found)[len(found) // 2] if found else None
