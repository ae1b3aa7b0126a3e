"""What the evaluation suite adds to the time of generating a policy's answers.

    perl-vlm vqa run --out runs/vqa/first && python benchmarks/eval_cost.py runs/vqa/first

Measures the evaluation `policy` of one run on 1,000 items, once as it is by default, and once without what asks the
models again (the divergence on sampled answers, the reward that was trained on): statistics, metrics and samples alone.
The report and results.json are timed beside. Greedy answers of anchor and policy are the yardstick.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "eval_cost.json"


def measure(run: str, limit: int) -> dict[str, Any]:
    """Seconds of each part."""
    from perl_vlm.train.signals import StopOnSignal
    from perl_vlm_eval.comparing import differences_of
    from perl_vlm_eval.evaluations.policies import Policies, PolicySettings
    from perl_vlm_eval.opened import OpenRun
    from perl_vlm_eval.report import write_page
    from perl_vlm_eval.results import Cell
    from perl_vlm_eval.runs import find_run

    found: dict[str, Any] = {"items": limit}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        opened = OpenRun(find_run(run), {}, out / "scratch" / "run", StopOnSignal())
        examples = opened.stage.some_examples("test", limit)
        found["items"] = len(examples)
        began = time.monotonic()
        for role in ("reference", "policy"):
            opened.answers(opened.stage, role, examples)
        found["answers_seconds"] = time.monotonic() - began
        evaluation = Policies(PolicySettings(limit=limit))
        began = time.monotonic()
        findings = evaluation.measure(opened)  # with the answers that are kept
        found["all_else_seconds"] = time.monotonic() - began
        own = Policies(PolicySettings(limit=limit, kl_prompts=0))
        opened.__dict__["rewards"] = None
        began = time.monotonic()
        own.measure(opened)
        found["own_seconds"] = time.monotonic() - began
        began = time.monotonic()
        cells = [Cell("policy", "policy", "run", "key", "done", "", 0.0, findings)]
        write_page(out / "report.html", "run", cells, differences_of(cells), [], {}, {})
        found["report_seconds"] = time.monotonic() - began
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run with a policy")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    found = measure(given.run, given.limit)
    found["own_share"] = (found["own_seconds"] + found["report_seconds"]) / found["answers_seconds"]
    found["all_share"] = (found["all_else_seconds"] + found["report_seconds"]) / found["answers_seconds"]
    hardware = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    versions = {name: version(name) for name in ("torch", "transformers", "perl-vlm")}
    content = {"what": "the suite's cost beside decoding", "hardware": hardware, "versions": versions, "seconds": found}
    given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name, value in found.items():
        print(f"{name:20} {value:.3g}")


if __name__ == "__main__":
    main()
