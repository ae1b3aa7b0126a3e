"""The model card of a run: a README.md with the front matter that model hubs read.

Front matter is dumped as YAML, text is escaped for Markdown, and code stands in fences longer than any run of
backticks inside, so that no value can leave its place. Nothing is read from the environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from perl_vlm.report.charts import finite
from perl_vlm.report.files import write_atomically
from perl_vlm.report.html import settings_yaml

_STAGE_TAGS = {"rm": "reward-model", "run": "ppo"}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_MARKDOWN = re.compile(r"([\\`*_\[\]()#!|~$])")


def write_model_card(
    path: Path,
    *,
    title: str,
    base_model: str,
    base_revision: str | None,
    stage: str,
    task: str,
    license: str | None,
    metrics: Mapping[str, float],
    ci95: Mapping[str, tuple[float, float]],
    parameters: Mapping[str, Any],
    command: str,
    versions: Mapping[str, str],
    how_to_load: str,
    limits: Sequence[str],
    settings: Any,
    pipeline_tag: str = "image-text-to-text",
    tuning: str = "lora",
) -> None:
    """Write the model card to ``path`` at once or not at all; missing folders are made.

    Args:
        path: usually ``README.md`` of the run's folder.
        title: the heading.
        base_model: hub name or folder of the frozen base; a folder's path is left out of the front matter, where
            hubs accept names alone.
        base_revision: commit of a hub model.
        stage: ``sft``, ``rm``, ``ppo`` or ``run``; decides a tag.
        task: name of the task, also a tag.
        license: a hub's licence identifier such as ``apache-2.0``, or None where nobody has chosen one.
        metrics: name -> value; one that is not finite is shown as not measured.
        ci95: name -> (low, high) of the 95 % interval of the metric of that name.
        parameters: counts of parameters, nested as in summary.json.
        command: what was typed.
        versions: package -> version.
        how_to_load: a Python snippet.
        limits: what the model must not be trusted with, a sentence or paragraph each.
        settings: the resolved configuration: nested mappings or dataclasses.
        pipeline_tag: the hub's task name.
        tuning: ``lora``, or ``full`` for a whole model.

    Raises OSError where the file cannot be written.
    """
    front = {
        "base_model": base_model if _HUB_NAME.fullmatch(base_model) else None,
        "library_name": "peft" if tuning == "lora" else "transformers",
        "license": license,
        "pipeline_tag": pipeline_tag,
        "tags": ["perl-vlm", tuning, _STAGE_TAGS.get(stage, stage), task],
    }
    facts = {"base model": base_model, "base revision": base_revision or "not pinned", "stage": stage, "task": task}
    sections = [
        "---\n" + _front_matter(front) + "---",
        f"# {_text(title)}",
        _table(("", ""), facts.items()),
        "Made with perl-vlm: low-rank adapters, in PEFT's format, on a frozen base."
        if tuning == "lora"
        else "Made with perl-vlm: every weight of the base model was tuned.",
        "## How to load\n\n" + _fence("python", how_to_load),
        *_section("Measured", _table(("metric", "value", "95 % interval"), _metric_rows(metrics, ci95))),
        *_section("Limits", "\n".join(f"- {_text(limit)}" for limit in limits)),
        *_section("Parameters", _table(("part", "count"), _flat(parameters))),
        "## How it was made\n\n" + _fence("sh", command),
        *_section("", _table(("package", "version"), versions.items())),
        *_section("Settings", _fence("yaml", settings_yaml(settings)) if settings else ""),
    ]
    write_atomically(Path(path), "\n\n".join(sections) + "\n")


def _front_matter(values: Mapping[str, Any]) -> str:
    """YAML on one line a value: a hub ends the front matter at the first line of three dashes, even inside a text."""
    import yaml

    kept = {key: _one_line(value) for key, value in values.items() if value is not None}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=float("inf"))


def _one_line(value: Any) -> Any:
    return " ".join(value.split()) if isinstance(value, str) else [_one_line(entry) for entry in value]


def _section(heading: str, body: str) -> list[str]:
    return [f"## {heading}\n\n{body}" if heading else body] if body else []


def _text(value: object) -> str:
    """``value`` on one line, as Markdown that shows it literally: no markup, no HTML, no link, no cell border."""
    line = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _MARKDOWN.sub(r"\\\1", line)
    # At the head of a list item a dash, a plus or a number would open a list of its own.
    line = re.sub(r"^(\d*)([-+.])(?=[\s-]|$)", r"\1\\\2", line)
    # Hubs turn bare addresses into links.
    return re.sub(r"(?i)://|\bwww\.", lambda found: found[0].replace(":", "&#58;").replace(".", "&#46;"), line)


def _fence(language: str, code: str) -> str:
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code.rstrip()}\n{fence}"


def _table(heading: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(heading) + " |", "|" + " --- |" * len(heading), *lines])


def _metric_rows(metrics: Mapping[str, float], ci95: Mapping[str, tuple[float, float]]) -> Iterator[tuple[str, ...]]:
    for name in dict.fromkeys([*metrics, *ci95]):
        interval = " to ".join(_measured(bound) for bound in ci95[name]) if name in ci95 else ""
        yield name, _measured(metrics.get(name)), interval


def _measured(value: Any) -> str:
    shown = finite(value)
    return "not measured" if shown is None else f"{shown:.4g}"


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name} / ")
        else:
            yield f"{above}{name}", f"{value:,}" if isinstance(value, int) else str(value)
