"""``perl-vlm eval``: parse, measure, compare, show."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from perl_vlm import __version__
from perl_vlm.cli_settings import UsageError
from perl_vlm.errors import PerlVlmError

if TYPE_CHECKING:
    from perl_vlm_eval.results import Cell

EVAL = "perl-vlm eval"
_USAGE = """perl-vlm eval --runs FOLDER ... [--suite NAME|FILE.yaml] [--out FOLDER]
       perl-vlm eval compare RESULTS RESULTS ... [--out FOLDER]"""
_ABOUT = """Measures finished runs by a suite of evaluations and writes results.json and report.html; `compare` holds
results of several such commands side by side, on the items they share. The same command again takes over what is
measured already. docs/eval-suite.md says what each figure is."""
PACKAGES = ("torch", "transformers", "peft", "datasets", "evaluate", "scipy")


class _Parser(argparse.ArgumentParser):
    """Errors as the rest of the command line has them."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"`{self.prog}`: {message}. `{self.prog} --help` lists its flags")


def evaluate(argv: Sequence[str]) -> int:
    """Run ``perl-vlm eval`` and return the exit code: 0, or 1 where a cell failed.

    Raises UsageError for arguments and suites that are not understood, PerlVlmError for runs that cannot be measured.
    """
    if argv and argv[0] == "compare":
        return _compare(argv[1:])
    if "-h" in argv or "--help" in argv:
        print(_parser().format_help(), end="")
        return 0
    given = _parser().parse_args(list(argv))
    one_process(EVAL)
    if not given.runs:
        raise UsageError(f"`{EVAL}` needs --runs: folders of finished runs, such as runs/vqa/ppo-tiny-s0")
    from perl_vlm_eval.runs import find_run

    runs = _labelled([find_run(folder) for folder in dict.fromkeys(given.runs)])
    from perl_vlm_eval.suite import read_suite  # from here on torch is imported

    suite = read_suite(given.suite, _present({"limit": given.limit, "split": given.split}))
    out = Path(given.out or f"results/{suite.name}")
    _check_out(out)
    changes = _present(
        {"device": given.device, "dtype": given.dtype, "eval.batch_size": given.batch_size, "seed": given.seed}
    )
    from perl_vlm.train.signals import StopOnSignal, Stopped
    from perl_vlm_eval.logs import copy_samples
    from perl_vlm_eval.runner import predict, run_cells

    began = time.monotonic()
    with StopOnSignal() as stop:
        try:
            if given.predict_only:
                for path in predict(suite, runs, out, changes=changes, say=_say, stop=stop):
                    _say(f"answers: {path}")
                return 0
            cells = run_cells(suite, runs, out, changes=changes, say=_say, stop=stop)
        except Stopped as stopped:
            raise Stopped(
                f"stopped; what was measured until then is kept in {out / 'cells'}. The same command goes on there",
                stopped.code,
            ) from None
    facts = {
        "Suite": f"{suite.name}: {', '.join(line.name for line in suite.lines)}",
        "Runs": "; ".join(f"{run.label} ({run.task}, {run.has}; {run.path})" for run in runs),
        "Machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "Duration": f"{time.monotonic() - began:.0f} s",
    }
    _finish(out, f"perl-vlm eval: {suite.name}", cells, facts)
    for path in copy_samples(out, cells) if given.log_samples else ():
        _say(f"samples: {path}")
    return int(any(cell.status == "failed" for cell in cells))


def one_process(command: str) -> None:
    """Refuse to be started by a launcher of several processes: each would measure the whole, over the others' files."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdecimal() and int(count) > 1:
        raise UsageError(
            f"`{command}` runs in one process, and {count} were started (WORLD_SIZE); start it without `accelerate "
            "launch`. `perl-vlm study --parallel 0,1` takes several GPUs, one a cell"
        )


def _compare(argv: Sequence[str]) -> int:
    parser = _Parser(prog=f"{EVAL} compare", description="Results side by side, on the items they share.")
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="folders that `perl-vlm eval` wrote")
    parser.add_argument("--out", metavar="FOLDER", help="write results.json and report.html of the comparison there")
    if "-h" in argv or "--help" in argv:
        print(parser.format_help(), end="")
        return 0
    given = parser.parse_args(list(argv))
    if len(given.results) < 2:
        parser.error("two or more results are compared; one was given")
    cells: list[Cell] = []
    for folder in given.results:
        own = read_results(Path(folder))
        taken = {cell.run for cell in cells}
        cells += [
            replace(cell, run=f"{Path(folder).name}: {cell.run}" if cell.run in taken else cell.run) for cell in own
        ]
    shared = {cell.evaluation for cell in cells}
    if not any(sum(cell.evaluation == name for cell in cells) > 1 for name in shared):
        raise PerlVlmError(
            "these results have no evaluation in common, so nothing can be compared: they have "
            f"{', '.join(sorted(shared))}"
        )
    if given.out is not None:
        if Path(given.out).resolve() in [Path(folder).resolve() for folder in given.results]:
            raise PerlVlmError(f"--out {given.out} is one of the results that are compared; give another folder")
        _check_out(Path(given.out))
        from perl_vlm_eval.runner import keep

        for cell in cells:
            if cell.findings.figures:  # so that its folder stands alone
                keep(Path(given.out), cell)
    facts = {"Compared": ", ".join(given.results)}
    _finish(None if given.out is None else Path(given.out), "perl-vlm eval: comparison", cells, facts)
    return 0


def read_results(folder: Path) -> list[Cell]:
    """The cells that ``results.json`` in a folder names, with their items.

    Raises PerlVlmError where there is none, or it is of another version.
    """
    from perl_vlm_eval.results import SCHEMA, Cell, cell_from_json, read_json

    path = folder if folder.is_file() else folder / "results.json"
    if not path.is_file():
        raise PerlVlmError(f"{folder} holds no results.json; name a folder that `{EVAL} --out` wrote")
    content = read_json(path)
    found = content.get("schema") if isinstance(content, Mapping) else None
    if found != SCHEMA:
        raise PerlVlmError(f"{path} is of schema {found}, and this version reads {SCHEMA}; evaluate again")
    cells = []
    for given in content["cells"]:
        ending = "json" if given["status"] == "done" else "partial.json"
        if given["figures"]:
            kept = cell_from_json(read_json(path.parent / "cells" / f"{given['key']}.{ending}"))
            own = {name: given[name] for name in ("run", "evaluation", "kin", "seed")}
            cells.append(replace(kept, **own))
        else:
            names = ("evaluation", "kind", "run", "key", "status", "why")
            cells.append(Cell(**{name: given[name] for name in names}))
    return cells


def _finish(out: Path | None, title: str, cells: Sequence[Cell], facts: dict[str, str]) -> None:
    """Write the results, where there is a folder for them, and show them."""
    from rich.console import Console

    from perl_vlm_eval.comparing import differences_of
    from perl_vlm_eval.report import print_tables, write_page
    from perl_vlm_eval.seeds import summed_up

    tests, seeds = differences_of(cells), summed_up(cells)
    made = {"perl_vlm": __version__, "python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    if out is not None:
        _write(out, title, cells, {"tests": tests, "seeds": seeds}, facts, made)
        write_page(out / "report.html", title, cells, tests, seeds, facts, made)
    print_tables(cells, tests, seeds, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    if out is not None:
        _say(f"results: {out / 'results.json'}, report: {out / 'report.html'}")


def _write(
    out: Path,
    title: str,
    cells: Sequence[Cell],
    over_all: Mapping[str, Any],
    facts: dict[str, str],
    made: dict[str, str],
) -> None:
    from perl_vlm.report.files import write_atomically
    from perl_vlm_eval.results import SCHEMA, to_json

    shown = []
    for cell in cells:
        findings = to_json(cell.findings)
        shown.append(
            {**{key: value for key, value in to_json(cell).items() if key != "findings"},
             **{key: findings[key] for key in ("figures", "headlines", "verdicts", "warnings", "missing")}}
        )  # fmt: skip
    content = {
        "schema": SCHEMA, "title": title, "made_with": made, "facts": facts, "cells": shown, **to_json(over_all),
    }  # fmt: skip
    write_atomically(out / "results.json", json.dumps(content, indent=1, allow_nan=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=EVAL, usage=_USAGE, description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=[], metavar="FOLDER", help="finished runs to measure")
    parser.add_argument("--suite", default="standard", help="a shipped suite by name, or a YAML file (standard)")
    parser.add_argument("--out", "--output_path", metavar="FOLDER", help="where results go (results/SUITE)")
    parser.add_argument("--limit", type=_positive, metavar="N", help="at most N items in every evaluation")
    parser.add_argument("--split", choices=("train", "validation", "test"), help="of every evaluation (test)")
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of sampled answers, in place of the seeds that the runs were trained with",
    )
    parser.add_argument("--log_samples", action="store_true", help="write what every item said to OUT/samples")
    parser.add_argument(
        "--predict_only", action="store_true", help="answer what is asked of policies, write it to OUT/samples, and end"
    )
    parser.add_argument("--batch_size", type=_positive, metavar="N", help="prompts decoded at once")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:1, in place of the runs' own")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), help="of the base, in place of the runs' own"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _present(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}


def _labelled(runs: Sequence[Any]) -> list[Any]:
    """Runs whose short names are the same by more of their paths."""
    labels = [run.label for run in runs]
    return [replace(run, label=str(run.path)) if labels.count(run.label) > 1 else run for run in runs]


def _check_out(out: Path) -> None:
    foreign = out.is_dir() and any(out.iterdir()) and not ((out / "cells").is_dir() or (out / "results.json").is_file())
    if out.is_file() or foreign:
        raise PerlVlmError(f"--out {out} holds something that is no suite's results; give another folder")


def _say(text: str) -> None:
    print(f"eval: {text}", flush=True)
