"""How the benchmarks measure: each arm in a process of its own, in turn, and the machine's matmul peak in the same run.

A benchmark is a script with a function ``measure(spec)`` that runs one arm in this process and returns a meter's
result. Its ``main`` hands the arms to ``compare``, which starts the script again with ``--child`` for each of them.
Nothing here imports perl_vlm: an arm may run in an environment that has none.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16")
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")
QUIET = {
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_DISABLED": "true",
}  # fmt: skip
PEAK = "matmul peak"


# -- in the child --------------------------------------------------------------------------------------------------


def memory() -> tuple[int, int]:
    """This process's resident memory and its peak, in bytes (Linux)."""
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            found[name] = int(value.split()[0]) * 1024
    return found["VmRSS"], found["VmHWM"]


MODULES = (
    "torch._dynamo", "transformers.models.qwen3.modeling_qwen3", "transformers.models.idefics3.modeling_idefics3",
    "transformers.models.idefics3.processing_idefics3", "transformers.generation.utils", "transformers.trainer",
    "peft", "accelerate", "datasets", "PIL.Image",
)  # fmt: skip
"""What every arm comes to import sooner or later: part of the bare process, as the trainers themselves are."""


class Meter:
    """Time and peak memory of the steps of one arm, beyond the bare process.

    Make it once the arm's libraries are imported and before a model is made. Where a GPU is used, memory is what torch
    allocated there.
    """

    def __init__(self) -> None:
        import torch

        for module in MODULES:
            importlib.import_module(module)

        self._cuda = torch.cuda if torch.cuda.is_available() else None
        gc.collect()
        self.bare = 0 if self._cuda else memory()[0]
        self.loading = 0
        self._laps: list[tuple[float, float, int]] = []
        self._forget_peak()

    def _forget_peak(self) -> None:
        if self._cuda:
            self._cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def lap(self) -> None:
        """The end of a step; the first call is the beginning of the first step, and the peak starts anew there."""
        if self._cuda:
            self._cuda.synchronize()
        peak = (self._cuda.max_memory_allocated() if self._cuda else memory()[1]) - self.bare
        if not self._laps:
            self.loading = peak
            self._forget_peak()
        self._laps.append((time.perf_counter(), time.process_time(), peak))

    def result(self, warmup: int, **more: Any) -> dict[str, Any]:
        """What the steps after the first ``warmup`` took, and the peak of all of them.

        Raises RuntimeError where there was no step after those.
        """
        import torch

        pairs = list(zip(self._laps, self._laps[1:], strict=False))[warmup:]
        if not pairs:
            raise RuntimeError(f"{max(0, len(self._laps) - 1)} steps were seen; {warmup} are left out as warm-up")
        return {
            "seconds": [round(after[0] - before[0], 4) for before, after in pairs],
            "cpu_seconds": [round(after[1] - before[1], 4) for before, after in pairs],
            "peak_bytes": self._laps[-1][2],
            "loading_peak_bytes": self.loading,
            "bare_bytes": self.bare,
            "threads": torch.get_num_threads(),
            **more,
        }


def matmul_peak(size: int, tries: int) -> dict[str, Any]:
    """FLOP/s of square matrix products in each type, the best of several."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    best = {}
    for name in DTYPES:
        one, other = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        seconds = []
        for _ in range(tries + 1):
            began = time.perf_counter()
            one @ other
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        best[name] = 2 * size**3 / min(seconds[1:])
    return best


# -- in the parent -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    name: str
    spec: Mapping[str, Any]
    """What the child is told; ``dtype`` and ``items`` (pairs or episodes a step) are among it."""
    flop: float
    """What a step needs by the accounting."""
    python: str = sys.executable

    @property
    def row(self) -> str:
        return f"{self.name}, {self.spec['dtype']}"


@dataclass
class Study:
    """A benchmark's file: rows by name, each with the run that it was measured in.

    Rows that are not measured again stay, so that a long table can be made in parts; a ratio of rows of different runs
    is marked.
    """

    script: Path
    what: str
    unit: str
    out: Path | None
    content: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kept = json.loads(self.out.read_text("utf-8")) if self.out is not None and self.out.is_file() else {}
        self.content = {
            "what": self.what,
            "hardware": hardware(),
            "versions": versions(),
            "runs": kept.get("runs", {}),
            "rows": kept.get("rows", {}),
        }

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return self.content["rows"]

    def save(self) -> None:
        if self.out is not None:
            self.out.parent.mkdir(exist_ok=True)
            self.out.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def compare(self, arms: Sequence[Arm], repeats: int, smoke: bool) -> dict[str, dict[str, Any]]:
        """Measure the arms in turn, ``repeats`` times over; returns all rows of the file."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        run: dict[str, Any] = {
            "command": command_of(self.script, sys.argv[1:]),
            "repeats": repeats,
            "matmul_peak": {},
        }
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(repeats):
            measured = run_child(self.script, {"arm": PEAK, "size": 256 if smoke else 2048, "tries": 3 if smoke else 6})
            for dtype, flops in measured.items():
                run["matmul_peak"][dtype] = max(flops, run["matmul_peak"].get(dtype, 0.0))
            for arm in arms:
                found.setdefault(arm.row, []).append(run_child(self.script, arm.spec, arm.python))
                row = summarise(arm, found[arm.row], run["matmul_peak"])
                self.content["rows"][arm.row] = {**row, "run": stamp}
                self.content["runs"][stamp] = run
                print(line(arm.row, row, self.unit), flush=True)
                self.save()
        for arm in arms:  # the peak of later rounds may have been higher
            row = summarise(arm, found[arm.row], run["matmul_peak"])
            self.content["rows"][arm.row] = {**row, "run": stamp}
        used = {row["run"] for row in self.content["rows"].values()}
        self.content["runs"] = {stamp: run for stamp, run in self.content["runs"].items() if stamp in used}
        return self.content["rows"]

    def finish(self, ratios: Mapping[str, Any]) -> None:
        """Write the file with its ratios, and print the table."""
        self.content["ratios"] = dict(ratios)
        self.save()
        print(table(self.content["rows"], self.unit))
        for name, value in ratios.items():
            print(f"{name}: {json.dumps(value)}")
        if self.out is not None:
            print(f"written to {self.out}")


def command_of(script: Path, arguments: Sequence[str]) -> str:
    """The command without this machine's paths: another one has its own."""
    shown = [
        "PYTHON" if before == "--trl112" else Path(given).name if before == "--out" else given
        for before, given in zip(["", *arguments], arguments, strict=False)
    ]
    return shlex.join(["python", f"benchmarks/{script.name}", *shown])


def run_child(script: Path, spec: Mapping[str, Any], python: str = sys.executable) -> Any:
    """What a script says of one arm, in a process of its own. Ends the program where the child fails."""
    command = [python, str(script), "--child", json.dumps(spec)]
    with tempfile.TemporaryDirectory(prefix="perl-vlm-bench-") as scratch:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **QUIET}, cwd=scratch
        )
    if done.returncode:
        raise SystemExit(f"{spec['arm']} failed:\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summarise(arm: Arm, found: Sequence[dict[str, Any]], peaks: Mapping[str, float]) -> dict[str, Any]:
    """Medians over the repeats of an arm. Each repeat's own figure is the median of its steps."""
    seconds = statistics.median(statistics.median(one["seconds"]) for one in found)
    dtype = arm.spec["dtype"]
    return {
        "dtype": dtype,
        "seconds_a_step": round(seconds, 4),
        "items_a_second": round(arm.spec["items"] / seconds, 4),
        "peak_bytes": int(statistics.median(one["peak_bytes"] for one in found)),
        "flop_needed_a_step": arm.flop,
        "share_of_matmul_peak": round(arm.flop / seconds / peaks[dtype], 4),
        "settings": {key: value for key, value in arm.spec.items() if key != "folder"},
        "repeats": list(found),
    }


def line(name: str, row: Mapping[str, Any], unit: str) -> str:
    return (
        f"{name:<44} {row['seconds_a_step']:>8.3f} s/step {row['items_a_second']:>8.2f} {unit}/s "
        f"{row['peak_bytes'] / 2**20:>8.0f} MiB {row['share_of_matmul_peak']:>7.1%} of the peak"
    )


def table(rows: Mapping[str, Mapping[str, Any]], unit: str) -> str:
    """The rows as Markdown."""
    lines = [f"| arm | s/step | {unit}/s | MiB beyond the bare process | of matmul peak |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {row['seconds_a_step']:.3f} | {row['items_a_second']:.2f} | {row['peak_bytes'] / 2**20:.0f} | "
        f"{row['share_of_matmul_peak']:.1%} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def ratio(rows: Mapping[str, Mapping[str, Any]], over: str, under: str, key: str) -> Any:
    """``over`` divided by ``under``; None where a row is missing. Rows of two runs are said to be."""
    if over not in rows or under not in rows:
        return None
    value = round(rows[over][key] / rows[under][key], 3)
    return value if rows[over]["run"] == rows[under]["run"] else {"value": value, "of_two_runs": True}


def hardware() -> dict[str, Any]:
    """What the figures hang on."""
    import torch

    names = [
        text.partition(":")[2].strip()
        for text in (Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else [])
        if text.startswith("model name")
    ]
    return {
        "machine": platform.machine(),
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of the libraries in this process's environment, where they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def start(
    script: str, doc: str, measure: Callable[[dict[str, Any]], dict[str, Any]], arms: Sequence[str],
    extend: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:  # fmt: skip
    """The command line that the benchmarks share. In a child, measures the arm, prints it and ends the process."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=arms, default=list(arms))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=3, help="processes for each arm")
    parser.add_argument("--steps", type=int, default=3, help="measured steps in each process")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--out", type=Path, help="JSON; by default under benchmarks/results, and none with --smoke")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, one step: does every arm run at all?")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    if extend is not None:
        extend(parser)
    args = parser.parse_args()
    if args.child:
        spec = json.loads(args.child)
        found = matmul_peak(spec["size"], spec["tries"]) if spec["arm"] == PEAK else measure(spec)
        print(json.dumps(found))
        raise SystemExit(0)
    if args.smoke:
        args.repeats = args.steps = args.warmup = 1
    elif args.out is None:
        args.out = Path(script).parent / "results" / f"{Path(script).stem}.json"
    return args
