"""Time and memory of a step against one size at a time, with what the accounting says beside.

    python benchmarks/scaling.py --plot

Reward model and PPO (value adapter), LoRA, at the reference workloads (README.md beside this file); from there the
length of prompts, the length of responses, the batch, the number of reward models, the width of the model and its
vocabulary are varied, one at a time. ``--plot`` draws what the file has into docs/images/scaling.svg; with ``--axes``
and no name after it nothing is measured before.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import Arm, Study, start
from workloads import (
    EPISODES,
    PAIRS,
    SHAPE,
    SMOKE_EPISODES,
    SMOKE_PAIRS,
    SMOKE_SHAPE,
    Load,
    Shape,
    pairs_flop,
    ppo_flop,
    spec_of,
)

ARMS = ("rm", "ppo")
AXES = {
    "prompt": "prompt tokens",
    "response": "response tokens",
    "batch": "pairs or episodes",
    "models": "reward models K",
    "hidden": "hidden size",
    "vocabulary": "vocabulary size",
}
POINTS: dict[str, dict[str, Sequence[int]]] = {
    "prompt": {"rm": (96, 192, 384, 768, 1536), "ppo": (32, 64, 128, 256, 512)},
    "response": {"rm": (24, 48, 96, 192), "ppo": (24, 48, 96, 192)},
    "batch": {"rm": (2, 4, 8, 16), "ppo": (4, 8, 16, 32)},
    "models": {"rm": (1, 2, 4), "ppo": (1, 2, 4)},
    "hidden": {"rm": (256, 512, 768), "ppo": (256, 512, 768)},
    "vocabulary": {"rm": (2000, 8000, 32000, 128000), "ppo": (2000, 8000, 32000, 128000)},
}
SMOKE_POINTS: dict[str, Sequence[int]] = {
    "prompt": (12, 16), "response": (6, 8), "batch": (2, 4), "models": (1, 2), "hidden": (64, 128),
    "vocabulary": (64, 128),
}  # fmt: skip
IMAGE = Path(__file__).resolve().parents[1] / "docs" / "images" / "scaling.svg"


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    from stages import run

    return run(spec)


def varied(shape: Shape, load: Load, axis: str, value: int) -> tuple[Shape, Load, int]:
    """The workload with one size changed, and its number of reward models."""
    if axis in ("hidden", "vocabulary"):
        return replace(shape, **{axis: value}), load, 1
    if axis == "models":
        return shape, load, value
    return shape, replace(load, **{axis: value}), 1


def arms_of(args: Any, folder: Path) -> list[Arm]:
    made = []
    for dtype in args.dtypes:
        for verb in args.arms:
            if args.smoke:
                start_shape, start_load = SMOKE_SHAPE, SMOKE_PAIRS if verb == "rm" else SMOKE_EPISODES
            else:
                start_shape, start_load = SHAPE, PAIRS if verb == "rm" else EPISODES
            for axis in args.axes:
                for value in SMOKE_POINTS[axis] if args.smoke else POINTS[axis][verb]:
                    shape, load, models = varied(start_shape, start_load, axis, value)
                    more: dict[str, Any] = {"models": models, "axis": axis, "at": value}
                    if verb == "rm":
                        flop = pairs_flop(shape, load, models=models)
                    else:
                        flop = ppo_flop(shape, load, value="adapter", rewards=models)
                        more["value"] = "adapter"
                    name = f"{verb}, {axis} {value}"
                    made.append(Arm(name, spec_of(verb, folder, shape, load, dtype, args, **more), flop))
    return made


def series(rows: dict[str, Any], verb: str, axis: str, dtype: str) -> list[dict[str, Any]]:
    """The rows of one curve, smallest first."""
    chosen = [
        row
        for row in rows.values()
        if (row["settings"]["arm"], row["settings"]["axis"], row["dtype"]) == (verb, axis, dtype)
    ]
    return sorted(chosen, key=lambda row: row["settings"]["at"])


def ratios(rows: dict[str, Any]) -> dict[str, Any]:
    """Of each curve: the exponent with which time and accounting grow from the first point to the last, and memory
    beyond the base's weights at the last over that at the first."""
    found = {}
    for dtype in sorted({row["dtype"] for row in rows.values()}):
        for verb in ARMS:
            for axis in AXES:
                curve = series(rows, verb, axis, dtype)
                if len(curve) < 2:
                    continue
                first, last = curve[0], curve[-1]
                wide = math.log(last["settings"]["at"] / first["settings"]["at"])
                found[f"{verb}, {axis}, {dtype}"] = {
                    "from": first["settings"]["at"],
                    "to": last["settings"]["at"],
                    "time_exponent": round(math.log(last["seconds_a_step"] / first["seconds_a_step"]) / wide, 3),
                    "accounting_exponent": round(
                        math.log(last["flop_needed_a_step"] / first["flop_needed_a_step"]) / wide, 3
                    ),
                    "memory_beyond_weights": round(beyond_weights(last) / max(1.0, beyond_weights(first)), 3),
                }
    return found


def beyond_weights(row: dict[str, Any]) -> float:
    """Peak memory without the bare process and without the base."""
    return float(row["peak_bytes"] - row["repeats"][0]["base_bytes"])


def plot(content: dict[str, Any], path: Path) -> None:
    """Measured time and memory, and the accounting's time at the measured matmul peak, log over log."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    rows = content["rows"]
    curves = sorted({(row["settings"]["arm"], row["dtype"]) for row in rows.values()})
    figure, panels = pyplot.subplots(2, len(AXES), figsize=(3.2 * len(AXES), 6), squeeze=False)
    for column, (axis, label) in enumerate(AXES.items()):
        for number, (verb, dtype) in enumerate(curves):
            curve = series(rows, verb, axis, dtype)
            if not curve:
                continue
            at = [row["settings"]["at"] for row in curve]
            needed = [
                row["flop_needed_a_step"] / content["runs"][row["run"]]["matmul_peak"][dtype] for row in curve
            ]  # fmt: skip
            colour = f"C{number}"
            panels[0][column].plot(
                at, [row["seconds_a_step"] for row in curve], "o-", color=colour, label=f"{verb}, {dtype}"
            )
            panels[0][column].plot(at, needed, "--", color=colour, label=f"{verb}, accounting at the matmul peak")
            panels[1][column].plot(at, [row["peak_bytes"] / 2**20 for row in curve], "o-", color=colour)
            panels[1][column].plot(at, [beyond_weights(row) / 2**20 for row in curve], ":", color=colour)
        for line in (0, 1):
            panels[line][column].set_xscale("log", base=2)
            panels[line][column].set_yscale("log")
            panels[line][column].set_xlabel(label)
    panels[0][0].set_ylabel("seconds a step")
    panels[1][0].set_ylabel("MiB beyond the bare process\n(dotted: and beyond the weights)")
    shown = max((panel.get_legend_handles_labels() for panel in panels[0]), key=lambda pair: len(pair[0]))
    figure.legend(*shown, loc="lower center", ncols=4, fontsize="small")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    print(f"drawn to {path}")


def main() -> None:
    def extend(parser: Any) -> None:
        parser.add_argument("--axes", nargs="*", choices=list(AXES), default=list(AXES))
        parser.add_argument("--plot", nargs="?", const=IMAGE, type=Path, help="draw the file's rows; SVG or PNG")
        parser.set_defaults(dtypes=["bfloat16"], repeats=2)

    args = start(__file__, __doc__ or "", measure, ARMS, extend)
    with tempfile.TemporaryDirectory(prefix="perl-vlm-bench-") as folder:
        study = Study(Path(__file__).resolve(), "time and memory of a step against each size", "items", args.out)
        rows = study.compare(arms_of(args, Path(folder)), args.repeats, args.smoke) if args.axes else study.rows
    study.finish(ratios(rows))
    if args.plot is not None:
        plot(study.content, args.plot)


if __name__ == "__main__":
    main()
