"""LoRA against full tuning, both perl-vlm's own: memory and speed of the reward model and of PPO.

    python benchmarks/lora_vs_full.py

The reference workloads (README.md beside this file); PPO with a value function of its own. Beside the ratios stand
those of PE-RLHF's main table (2403.10704, v2), which are of other models and machines: LoRA's peak memory as a share of
full tuning's, and how many times as fast it is.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from measuring import DTYPES, Arm, Study, ratio, start
from workloads import (
    EPISODES,
    PAIRS,
    SHAPE,
    SMOKE_EPISODES,
    SMOKE_PAIRS,
    SMOKE_SHAPE,
    pairs_flop,
    ppo_flop,
    spec_of,
)

ARMS = ("rm lora", "rm full", "ppo lora", "ppo full")
PAPER_SETS = ("Harmless", "SHP", "TL;DR", "BOLT", "UI", "VQA")
PAPER = {
    "rm": {"memory": (0.431, 0.48, 0.50, None, 0.56, 0.74), "speed": (1.6, 1.5, 1.7, None, 1.9, 1.15)},
    "ppo": {"memory": (0.80, 0.75, 0.75, 0.80, 0.74, 0.74), "speed": (1.3, 1.15, 1.15, 1.05, 1.20, 1.24)},
}
"""PE-RLHF, Table 1: LoRA over full tuning."""


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    from stages import run

    return run(spec)


def arms_of(args: Any, folder: Path) -> list[Arm]:
    shape = SMOKE_SHAPE if args.smoke else SHAPE
    pairs, episodes = (SMOKE_PAIRS, SMOKE_EPISODES) if args.smoke else (PAIRS, EPISODES)
    made = []
    for dtype in args.dtypes:
        for name in args.arms:
            verb, _, tuning = name.partition(" ")
            if verb == "rm":
                spec = spec_of(name, folder, shape, pairs, dtype, args, tuning=tuning)
                flop = pairs_flop(shape, pairs, tuning=tuning)
            else:
                spec = spec_of(name, folder, shape, episodes, dtype, args, tuning=tuning, value="adapter")
                flop = ppo_flop(shape, episodes, value="adapter", tuning=tuning)
            made.append(Arm(name, spec, flop))
    return made


def ratios(rows: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for dtype in DTYPES:
        for verb in ("rm", "ppo"):
            lora, full = f"{verb} lora, {dtype}", f"{verb} full, {dtype}"
            for what, key in (("memory", "peak_bytes"), ("speed", "items_a_second")):
                value = ratio(rows, lora, full, key)
                if value is not None:
                    found[f"{verb} {what}, LoRA / full, {dtype}"] = value
    for verb, columns in PAPER.items():
        for what, values in columns.items():
            known = {name: value for name, value in zip(PAPER_SETS, values, strict=True) if value is not None}
            found[f"{verb} {what}, LoRA / full, PE-RLHF"] = known
    return found


def main() -> None:
    args = start(__file__, __doc__ or "", measure, ARMS)
    with tempfile.TemporaryDirectory(prefix="perl-vlm-bench-") as folder:
        study = Study(Path(__file__).resolve(), "LoRA r = 8 against full tuning, perl-vlm's own", "items", args.out)
        rows = study.compare(arms_of(args, Path(folder)), args.repeats, args.smoke)
    study.finish(ratios(rows))


if __name__ == "__main__":
    main()
