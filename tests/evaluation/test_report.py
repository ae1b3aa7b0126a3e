"""The page of a suite: light however many items it speaks of."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from perl_vlm_eval.comparing import differences_of
from perl_vlm_eval.report import print_tables, write_page
from perl_vlm_eval.results import Cell, Chart, Figure, Findings, Items, Sample
from perl_vlm_eval.statistics import share

ROWS = 10_000


def noisy(seed: int) -> str:
    """A picture that no compression makes small, as a PNG in base64."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (240, 320, 3), dtype=np.uint8)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def cell(run: str, seed: int) -> Cell:
    draw = np.random.default_rng(seed)
    right = (draw.random(ROWS) < 0.7).astype(float)
    names = [f"item {place}" for place in range(ROWS)]
    pictures = [noisy(place) for place in range(4)]
    samples = [
        Sample(
            f"what is {name}?", "red", "blue", "red", before_right=False, after_right=True, image=pictures[place % 4]
        )
        for place, name in enumerate(names[:500])
    ]
    findings = Findings(
        figures={"accuracy": Figure(share(right), "share", "higher")},
        headlines=["accuracy"],
        items=Items(names, names, names, {"accuracy": right.tolist()}),
        charts=[Chart("Length", {"policy": draw.normal(30, 5, ROWS).tolist()})],
        samples=samples,
    )
    return Cell("policy", "policy", run, run, "done", findings=findings)


def test_tables_that_are_cut_say_so_and_the_terminal_warns(tmp_path: Path) -> None:
    def small(place: int) -> Cell:
        right = (np.random.default_rng(place).random(20) < 0.7).astype(float)
        names, figure = [str(one) for one in range(20)], Figure(share(right), "share", "higher")
        items = Items(names, names, names, {"accuracy": right.tolist()})
        found = Findings({"accuracy": figure}, ["accuracy"], items, warnings=["by words alone"])
        return Cell("policy", "policy", f"run-{place}", "key", "done", findings=found)

    cells = [small(place) for place in range(12)]
    tests = differences_of(cells)
    write_page(tmp_path / "report.html", "many", cells, tests, [], {}, {})
    assert "The first 60 of 66; all are in results.json." in (tmp_path / "report.html").read_text()
    stream = io.StringIO()
    print_tables(cells[:1], [], [], Console(file=stream, width=100))
    assert "run-0: by words alone" in stream.getvalue()
    assert stream.getvalue().split("accuracy")[1].splitlines()[0].split()[-1] == "20", "its sample size"


def test_ten_thousand_rows_make_a_page_of_less_than_five_megabytes(tmp_path: Path) -> None:
    cells = [cell(f"run-{place}", place) for place in range(3)]
    write_page(tmp_path / "report.html", "many", cells, differences_of(cells), [], {}, {})
    text = (tmp_path / "report.html").read_text()
    assert len(text) < 5_000_000
    assert 5 <= text.count("data:image/png") <= 48, "a sample of them is shown"
    assert "10,000 items" in text
    assert text.count("what is item") >= 40, "samples without their pictures too"
