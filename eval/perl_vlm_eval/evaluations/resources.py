"""What a run has cost, as it wrote it down, and what can be read of its weights."""

from __future__ import annotations

from dataclasses import dataclass

from perl_vlm_eval.evaluations.base import Evaluation
from perl_vlm_eval.opened import OpenRun
from perl_vlm_eval.results import Figure, Findings, Unit
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
            total = parameters.get("total")
            for role, counts in parameters.get("trainable", {}).items():
                share = sum(counts.values()) / total if total else None
                figures |= _one(f"{name}/trainable/{role}", share, "share")
            figures |= _one(f"{name}/step_seconds", step_seconds(run, name), "seconds")
        return Findings(
            figures=figures, headlines=[one for one in figures if one.endswith(("peak_memory", "step_seconds"))]
        )


def _one(name: str, value: float | None, unit: Unit) -> dict[str, Figure]:
    if value is None:
        return {}
    return {name: Figure(Estimate(float(value), None, None, 1, 1, "counted once"), unit, "lower")}
