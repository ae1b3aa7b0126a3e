"""What the evaluation suite adds to the time of generating a policy's answers, and how heavy its report is.

    perl-vlm vqa run --out runs/vqa/first && python benchmarks/eval_cost.py runs/vqa/first

Measures the evaluation `policy` of each run on 1,000 items: greedy answers of anchor and policy, which are the
yardstick; what the suite itself does with them (metrics, intervals, tests, samples, results.json, report.html); and
what asks the models again by default (the reward that the policy was trained on, divergence on 256 sampled answers).
Then the same items ten times over, as 10,000 rows: the size of the report, and the time that a headless Chromium
takes to load it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "eval_cost.json"
AGAIN = 10


@contextmanager
def timed(into: dict[str, Any], name: str) -> Iterator[None]:
    """Seconds that the work inside takes."""
    began = time.monotonic()
    yield
    into[name] = round(time.monotonic() - began, 2)


def measure(run: str, limit: int, out: Path) -> dict[str, Any]:
    """Seconds of each part, and the report of ten times the items."""
    from functools import partial

    from perl_vlm.train.judge import totals
    from perl_vlm.train.signals import StopOnSignal
    from perl_vlm.train.stage import spaced
    from perl_vlm_eval.evaluations.policy_figures import OWN_REWARD, Measured
    from perl_vlm_eval.opened import OpenRun
    from perl_vlm_eval.runs import find_run

    found: dict[str, Any] = {"run": Path(run).name}
    opened = OpenRun(find_run(run), {}, out / "scratch" / "run", StopOnSignal())
    stage, examples = opened.stage, opened.stage.some_examples("test", limit)
    found |= {"task": opened.task.name, "items": len(examples)}
    with timed(found, "answers_seconds"):
        sides = {"anchor": "reference", "policy": "policy"}
        answers = {label: opened.answers(stage, role, examples) for label, role in sides.items()}
    found["tokens"] = sum(len(one.tokens) for own in answers.values() for one in own)
    with timed(found, "own_seconds"):
        measured = Measured(stage, examples, answers, opened.kept)
        write(out, measured.findings())
    with timed(found, "reward_seconds"):
        if opened.rewards is not None:
            measured.scored_by(OWN_REWARD, partial(totals, stage, opened.rewards), opened.own_reward_identity)
    with timed(found, "kl_seconds"):
        measured.moved(spaced(examples, 256))
    many = [replace(one, id=f"{one.id}/{turn}") for turn in range(AGAIN) for one in examples]
    ten = Measured(stage, many, {label: own * AGAIN for label, own in answers.items()}, opened.kept)
    page = write(out, ten.findings())
    return {**found, "report_rows": len(many), "report_bytes": page.stat().st_size, "report_load_seconds": loaded(page)}


def write(out: Path, findings: Any) -> Path:
    """A cell's files, results.json and the report, which is returned."""
    from perl_vlm_eval import command
    from perl_vlm_eval.results import Cell
    from perl_vlm_eval.runner import keep

    cell = Cell("policy", "policy", "run", "key", "done", "", 0.0, replace(findings, said=()))
    keep(out, cell)
    say: Callable[[str], None] = command._say
    command._say = lambda text: None
    try:
        command._finish(out, "cost", [cell], {})
    finally:
        command._say = say
    return out / "report.html"


def loaded(page: Path) -> float | None:
    """Seconds until a browser has loaded a page, the best of three; None where there is no browser."""
    browser = shutil.which("chromium")
    if browser is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        seconds = []
        for _ in range(3):
            tab, began = opened.new_page(), time.monotonic()
            tab.goto(page.resolve().as_uri(), wait_until="load")
            seconds.append(time.monotonic() - began)
            tab.close()
        opened.close()
    return round(min(seconds), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="finished runs with a policy")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows = []
    for run in given.runs:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(run, given.limit, Path(folder))
        for name in ("own", "reward", "kl"):
            row[f"{name}_share"] = round(row[f"{name}_seconds"] / row["answers_seconds"], 3)
        rows.append(row)
        print(json.dumps(row, indent=1))
    hardware = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    versions = {name: version(name) for name in ("torch", "transformers", "perl-vlm")}
    content = {
        "what": "the suite's cost beside greedy answers of anchor and policy",
        "command": "python benchmarks/eval_cost.py RUN ...", "hardware": hardware, "versions": versions, "runs": rows,
    }  # fmt: skip
    given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
