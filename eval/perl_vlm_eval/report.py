"""A suite's results for people: tables for the terminal, and one page of HTML that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from perl_vlm.report.html import Curve, Distribution, GalleryItem, Report, Table, write_report
from perl_vlm_eval.comparing import Test, apart, sentences
from perl_vlm_eval.results import Cell, Chart, Sample, shown, written
from perl_vlm_eval.seeds import OverSeeds

GALLERY = 48
"""Samples in a report, over all its cells: pictures make a page heavy."""
GALLERY_BYTES = 3_000_000
"""Of pictures in base64, over all samples; further ones are shown without theirs."""
ROWS_A_TABLE = 60
POINTS = 2_000
"""Values of a histogram that are drawn from; the rest tells the eye nothing."""


def write_page(
    path: Path,
    title: str,
    cells: Sequence[Cell],
    tests: Sequence[Test],
    seeds: Sequence[OverSeeds],
    facts: dict[str, str],
    settings: Any,
) -> None:
    """Write ``report.html``: figures by evaluation, differences, curves, samples, and what could not be measured."""
    done = [cell for cell in cells if cell.findings.figures]
    write_report(
        path,
        Report(
            title=title,
            subtitle="95 % intervals; differences are paired, their p-values corrected by Holm for their number.",
            headline=_headline(done),
            tables=[*_figures(done), *_seeds(seeds), *_tests(tests)],
            facts=facts,
            curves=[_curve(cell, chart) for cell in done for chart in cell.findings.charts if chart.x],
            gallery=_gallery(done),
            distributions=[_histogram(cell, chart) for cell in done for chart in cell.findings.charts if not chart.x],
            settings=settings,
            notes=[*sentences(tests), *_said(done), *apart(done), *_holes(cells)],
        ),
    )


def print_tables(cells: Sequence[Cell], tests: Sequence[Test], seeds: Sequence[OverSeeds], console: Console) -> None:
    """The main figures, their spread over seeds, and every difference of the main family."""
    done = [cell for cell in cells if cell.findings.figures]
    for name in dict.fromkeys(cell.evaluation for cell in done):
        own = [cell for cell in done if cell.evaluation == name]
        figures = list(dict.fromkeys(figure for cell in own for figure in cell.findings.headlines))
        rows = [(figure, *(_shown(cell, figure) for cell in own), _items(own, figure)) for figure in figures]
        print_table(console, name, ("figure", *(cell.run for cell in own), "items"), rows)
    for table in _seeds(seeds):
        print_table(console, table.title, table.header, table.rows)
    main = [test for test in tests if test.family == "main"]
    if main:
        rows = [(test.what, f"{test.b} - {test.a}", *_difference(test)) for test in main]
        print_table(console, "differences", ("figure", "of", "difference", "p (Holm)", "verdict"), rows)
    for cell in done:
        for said in (*cell.findings.verdicts, *cell.findings.warnings):
            console.print(Text(f"{cell.run}: {said}"))
    for hole in (*apart(done), *_holes(cells)):
        console.print(Text(hole))


def print_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for the terminal; nothing in it is taken for markup."""
    table = TerminalTable(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE, pad_edge=False)
    for place, heading in enumerate(header):
        table.add_column(Text(heading), justify="left" if not place else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _headline(cells: Sequence[Cell]) -> list[tuple[str, str, str]]:
    found = []
    for cell in cells:
        for name in cell.findings.headlines[:2]:
            estimate = cell.findings.figures[name].estimate
            how = f"{estimate.items:,} items, {estimate.method}" if estimate.items > 1 else estimate.method
            found.append((f"{cell.run}: {name}", _shown(cell, name), how))
    return found[:8]


def _figures(cells: Sequence[Cell]) -> list[Table]:
    tables = []
    for name in dict.fromkeys(cell.evaluation for cell in cells):
        own = [cell for cell in cells if cell.evaluation == name]
        figures = list(dict.fromkeys(figure for cell in own for figure in cell.findings.figures))
        rows = [(figure, *(_shown(cell, figure) for cell in own), _items(own, figure)) for figure in figures]
        notes = dict.fromkeys(
            f"{figure}: {note}" for cell in own for figure in cell.findings.figures
            if (note := cell.findings.figures[figure].note) and not note.startswith("p = ")
        )  # fmt: skip
        more = len(rows) - ROWS_A_TABLE
        note = "; ".join(notes) + (f"; {more} more figures in results.json" if more > 0 else "")
        tables.append(Table(name, ("figure", *(cell.run for cell in own), "items"), rows[:ROWS_A_TABLE], note))
    return tables


def _shown(cell: Cell, name: str) -> str:
    figure = cell.findings.figures.get(name)
    if figure is None:
        return ""
    return written(figure.estimate.value, figure.unit, sign=True) + _ends(figure) if "gain" in name else shown(figure)


def _ends(figure: Any) -> str:
    low, high = figure.estimate.low, figure.estimate.high
    if low is None or high is None:
        return ""
    return " [" + ", ".join(written(end, figure.unit, bare=True, sign=True) for end in (low, high)) + "]"


def _items(cells: Sequence[Cell], name: str) -> str:
    counts = {cell.findings.figures[name].estimate.items for cell in cells if name in cell.findings.figures}
    return " / ".join(f"{count:,}" for count in sorted(counts))


def _seeds(seeds: Sequence[OverSeeds]) -> list[Table]:
    if not seeds:
        return []
    rows = []
    for one in seeds:
        found = one.found
        ends = [written(end, one.unit, bare=True) for end in (found.low, found.high)]
        spread = written(found.spread, one.unit, bare=True)
        reach = " to ".join(written(end, one.unit, bare=True) for end in (found.least, found.most))
        middle = f"{written(found.mean, one.unit)} ± {spread}"
        rows.append((one.what, ", ".join(one.runs), middle, f"[{', '.join(ends)}]", reach))
    note = (
        "Runs that differ in nothing but their seeds: mean and standard deviation, Student's interval of the mean over "
        "seeds, and the least and the most."
    )
    return [Table("Over seeds", ("figure", "runs", "mean", "95 %", "from"), rows, note)]


def _tests(tests: Sequence[Test]) -> list[Table]:
    header = ("figure", "difference of", "difference", "p (Holm)", "verdict")
    notes = {
        "main": "One family: the chance of any false alarm among them stays below 5 %.",
        "further": "Looked for among many: a family of their own, corrected among themselves.",
    }
    titles = {"main": "Differences", "further": "Further differences"}
    tables = []
    for family, note in notes.items():
        rows = [(test.what, f"{test.b} less {test.a}", *_difference(test)) for test in tests if test.family == family]
        if rows:
            if len(rows) > ROWS_A_TABLE:
                note += f" The first {ROWS_A_TABLE} of {len(rows):,}; all are in results.json."
            tables.append(Table(titles[family], header, rows[:ROWS_A_TABLE], note))
    return tables


def _difference(test: Test) -> tuple[str, str, str]:
    value = written(test.estimate.value, test.unit, sign=True) + _ends(test)
    return value, "none" if test.p_holm is None else f"{test.p_holm:.2g}", test.words


def _curve(cell: Cell, chart: Chart) -> Curve:
    series = {name: [(float(x), float(y)) for x, y in own] for name, own in chart.series.items()}
    return Curve(f"{cell.run}: {chart.title}", chart.x, series, chart.note)


def _histogram(cell: Cell, chart: Chart) -> Distribution:
    series = {name: list(own)[:: max(1, len(own) // POINTS)] for name, own in chart.series.items()}
    return Distribution(f"{cell.run}: {chart.title}", series, chart.note)


def _gallery(cells: Sequence[Cell]) -> list[GalleryItem]:
    with_samples = [cell for cell in cells if cell.findings.samples]
    each = GALLERY // max(1, len(with_samples))
    found, size = [], 0
    for cell in with_samples:
        for one in cell.findings.samples[:each]:
            size += len(one.image or "")
            found.append(_item(cell, one if size <= GALLERY_BYTES else replace(one, image=None)))
    return found


def _item(cell: Cell, sample: Sample) -> GalleryItem:
    return GalleryItem(
        image_png=None if sample.image is None else base64.b64decode(sample.image),
        prompt=f"{sample.prompt}\n({cell.run}, {cell.evaluation})",
        reference=sample.reference,
        before=sample.before if sample.labels[0] else None,
        after=sample.after,
        before_right=sample.before_right,
        after_right=sample.after_right,
        reward_before=sample.before_score,
        reward_after=sample.after_score,
        labels=sample.labels,
    )


def _said(cells: Sequence[Cell]) -> list[str]:
    verdicts = [f"{cell.run}: {verdict}" for cell in cells for verdict in cell.findings.verdicts]
    return verdicts + [f"{cell.run}, {cell.evaluation}: {text}" for cell in cells for text in cell.findings.warnings]


def _holes(cells: Sequence[Cell]) -> list[str]:
    return [f"{cell.run}: {cell.evaluation} failed: {cell.why}" for cell in cells if cell.status == "failed"]
