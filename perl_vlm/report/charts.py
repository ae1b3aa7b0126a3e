"""Curves and histograms as small SVG pictures, by matplotlib's object interface (no pyplot, no global figures).

No string of the caller enters a picture: titles, labels and legends are set as escaped HTML around it. matplotlib is
imported at the first chart.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color), which stays distinct for colour-blind readers; yellow
# is left out because it is too faint for lines on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")
DASHES = ("solid", "dashed", "dotted")
SMOOTH_FROM = 40
"""Series with at least this many points are drawn as faint points under their running mean."""
MAX_DRAWN = 600
"""At most this many points of a series are drawn; the running mean is taken over all of them first."""
MAX_BINS = 40
LARGEST = 1e100
"""Values beyond this cannot be laid out on an axis in float64 and count as not finite."""


@dataclass(frozen=True)
class LegendEntry:
    """One series as the legend names it."""

    label: str
    color: str
    """``#rrggbb``, from COLORS alone."""
    dash: str
    """A line style that CSS and matplotlib both know."""
    summary: str
    """The series in a few figures."""


@dataclass(frozen=True)
class Chart:
    """A drawn chart."""

    image: str | None
    """``data:image/svg+xml`` URI; None where no series holds a finite value."""
    legend: tuple[LegendEntry, ...]
    left_out: int
    """How many values were NaN, infinite or no number."""


def number(value: float) -> str:
    """``value`` to three significant digits with a true minus sign; ``not finite`` for NaN and infinities."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else "not finite"


def finite(value: Any) -> float | None:
    """``value`` as a float that an axis can hold, or None."""
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return result if abs(result) <= LARGEST else None


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]]) -> Chart:
    """Draw each series of (x, y) points: short ones as a line, long ones as a running mean over faint points.

    The running mean is centred and spans a twentieth of the series; at the ends it narrows to what is there.
    """
    import numpy as np

    points = {label: sorted(_finite_pairs(pairs)) for label, pairs in series.items()}
    given = sum(len(pairs) for pairs in series.values())
    kept = sum(len(pairs) for pairs in points.values())
    lines = {label: np.asarray(pairs, dtype=np.float64) for label, pairs in points.items() if pairs}
    smooth = {label: running_mean(line[:, 1]) for label, line in lines.items()}
    summaries = {label: f"ends at {number(values[-1])}" for label, values in smooth.items()}
    legend = _legend(series, summaries)
    if not lines:
        return Chart(None, legend, given - kept)
    with _axes() as (axes, picture):
        for entry in legend:
            if entry.label in lines:
                _draw_line(axes, entry, lines[entry.label], smooth[entry.label])
        axes.margins(x=0.02, y=0.08)
        axes.grid(axis="y")
    return Chart(_uri(picture), legend, given - kept)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred running mean of ``values`` [N] over max(1, N // 20) neighbours -> [N]; short series come back as is."""
    import numpy as np

    if len(values) < SMOOTH_FROM:
        return values
    # An odd width keeps the mean centred. Convolution, unlike a difference of cumulated sums, does not let one huge
    # value spoil the digits of all that follow.
    window = np.ones(len(values) // 20 | 1)
    return np.convolve(values, window, mode="same") / np.convolve(np.ones_like(values), window, mode="same")


def histogram(series: Mapping[str, Sequence[float]]) -> Chart:
    """Draw the series as histograms over shared bins, each as a share of its own count.

    Whole numbers over a short range get one bin a value.
    """
    import numpy as np
    from matplotlib.ticker import PercentFormatter

    values = {label: np.asarray(_finite_values(column), dtype=np.float64) for label, column in series.items()}
    left_out = sum(len(series[label]) - len(column) for label, column in values.items())
    columns = {label: column for label, column in values.items() if len(column)}
    summaries = {
        label: f"n = {len(column)}, mean {number(column.mean())}, median {number(float(np.median(column)))}"
        for label, column in columns.items()
    }
    legend = _legend(series, summaries)
    if not columns:
        return Chart(None, legend, left_out)
    edges = bin_edges(np.concatenate(list(columns.values())))
    with _axes() as (axes, picture):
        for entry in legend:
            if entry.label in columns:
                column = columns[entry.label]
                share = np.histogram(column, edges)[0] / len(column)
                axes.stairs(share, edges, fill=True, color=entry.color, alpha=0.16, linewidth=0)
                axes.stairs(share, edges, color=entry.color, linestyle=entry.dash, linewidth=1.6)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
    return Chart(_uri(picture), legend, left_out)


def bin_edges(values: np.ndarray) -> np.ndarray:
    """Increasing bin edges [M + 1] over all ``values`` [N >= 1], M at most MAX_BINS."""
    import numpy as np

    low, high = float(values.min()), float(values.max())
    if high - low < MAX_BINS and np.array_equal(values, np.round(values)) and abs(low) < 2**50:
        return np.arange(low, high + 2) - 0.5
    room = max(abs(low), abs(high), 1e-12) * 1e-6
    if high - low < room:
        low, high = low - room, high + room
    return np.linspace(low, high, min(MAX_BINS, max(10, round(len(values) ** 0.5))) + 1)


def _finite_values(column: Sequence[Any]) -> list[float]:
    return [number for value in column if (number := finite(value)) is not None]


def _finite_pairs(pairs: Sequence[tuple[Any, Any]]) -> Iterator[tuple[float, float]]:
    for x, y in pairs:
        at, value = finite(x), finite(y)
        if at is not None and value is not None:
            yield at, value


def _legend(series: Mapping[str, Any], summaries: Mapping[str, str]) -> tuple[LegendEntry, ...]:
    return tuple(
        LegendEntry(
            label=label,
            color=COLORS[index % len(COLORS)],
            dash=DASHES[index // len(COLORS) % len(DASHES)],
            summary=summaries.get(label, "no data"),
        )
        for index, label in enumerate(series)
    )


def _draw_line(axes: Axes, entry: LegendEntry, line: np.ndarray, smooth: np.ndarray) -> None:
    x, y = line[:, 0], line[:, 1]
    step = -(-len(x) // MAX_DRAWN)
    short = len(x) < SMOOTH_FROM
    if not short:
        axes.plot(x[::step], y[::step], "o", color=entry.color, alpha=0.22, markersize=2.2, markeredgewidth=0)
    axes.plot(
        x[::step],
        smooth[::step],
        color=entry.color,
        linestyle=entry.dash,
        linewidth=1.8,
        marker="o" if short else None,
        markersize=3.5,
    )


_STYLE = {
    "axes.edgecolor": "#b8bec8",
    "axes.facecolor": "none",
    "axes.formatter.limits": (-4, 5),
    "axes.formatter.use_mathtext": False,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 9.0,
    "grid.color": "#e3e6eb",
    "grid.linewidth": 0.7,
    "savefig.facecolor": "none",
    # Text stays text, in the fonts of the reader's machine; a fixed salt makes equal charts equal to the byte.
    "svg.fonttype": "none",
    "svg.hashsalt": "perl-vlm",
    "xtick.color": "#b8bec8",
    "xtick.labelcolor": "#555d6b",
    "ytick.color": "#b8bec8",
    "ytick.labelcolor": "#555d6b",
}

_AXES = (0.115, 0.155, 0.85, 0.775)
"""Left, bottom, width, height in shares of a picture: room for eight characters of a label and for the power of ten
that is set apart. A layout that looks at the labels would draw every picture twice."""


@contextmanager
def _axes() -> Iterator[tuple[Axes, io.BytesIO]]:
    """Axes to draw on, and the stream that holds the finished SVG once the block has ended."""
    import matplotlib.style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    picture = io.BytesIO()
    # From matplotlib's defaults, so that a user's matplotlibrc cannot change or break the report.
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(5.4, 2.8))
        FigureCanvasSVG(figure)
        axes = figure.add_axes(_AXES)
        axes.set_axisbelow(True)
        yield axes, picture
        figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None})


def _uri(picture: io.BytesIO) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(picture.getvalue()).decode("ascii")
