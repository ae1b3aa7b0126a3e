"""Gather the figures of finished runs into one small JSON file.

    python benchmarks/collect_runs.py runs/vqa/run-tiny-s0 runs/vqa/run-tiny-s1 --out benchmarks/results/vqa_tiny.json

Each argument is the folder of a finished ``perl-vlm <task> run``; what is copied from its ``summary.json`` is what it
measured, unrounded, with the settings that differ from the defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from perl_vlm.config import RunConfig
from perl_vlm.train.rundir import flatten

KEPT = ("anchor", "policy", "gain", "win_rate", "reward_model", "eval")


def kept(name: str) -> bool:
    """Figures of a whole run: the parts of it, such as kinds of question, stay in its report."""
    group, _, rest = name.partition("/")
    return group in KEPT and "/" not in rest


def figures(folder: Path) -> dict[str, Any]:
    """What one run measured."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    settings = flatten(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    defaults = flatten(json.loads(json.dumps(asdict(RunConfig()))))
    metrics = summary["metrics"]
    return {
        "run": folder.name,
        "task": summary["task"],
        "model_fingerprint": summary["base_fingerprint"][:12],
        "seed": summary["seed"],
        "seconds": summary["seconds"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "metrics": {key: value for key, value in metrics.items() if kept(key)},
        "ci95": {key: value for key, value in summary["ci95"].items() if kept(key)},
        "settings": {
            key: value
            for key, value in settings.items()
            if key not in ("seed", "model") and value != defaults.get(key) and not key.startswith("task.")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--note", default="", help="what the reader should know of how these were run")
    args = parser.parse_args()
    import peft
    import torch
    import transformers

    result = {
        "note": args.note,
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores, no GPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "runs": [figures(folder) for folder in args.runs],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for run in result["runs"]:
        found = run["metrics"]
        print(f"{run['run']}, {run['seconds']:.0f} s")
        for key, (low, high) in run["ci95"].items():
            group, _, name = key.partition("/")
            if group == "gain":
                before, after = found[f"anchor/{name}"], found[f"policy/{name}"]
                print(f"  {name}: {before:.3f} -> {after:.3f}, gain {found[key]:+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()
