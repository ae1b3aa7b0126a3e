"""Charts draw whatever numbers they are given, and say what they drew."""

from __future__ import annotations

import base64
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from perl_vlm.report import charts


def svg_of(chart: charts.Chart) -> ET.Element:
    assert chart.image is not None
    return ET.fromstring(base64.b64decode(chart.image.partition(",")[2]))


EXTREMES: list[list[float]] = [
    [5.0],
    [0.0] * 50,
    [1e99, -1e99],
    [1e-300, 2e-300],
    [1.0, 1.0 + 2e-16],
    [1e17, 1e17],
    list(range(5000)),
]


@pytest.mark.parametrize("values", EXTREMES)
@pytest.mark.filterwarnings("error")
def test_extreme_values_are_drawn_without_a_warning(values: list[float]) -> None:
    svg_of(charts.line_chart({"a": list(enumerate(values))}))
    svg_of(charts.histogram({"a": values}))


@pytest.mark.parametrize("values", EXTREMES)
def test_every_value_falls_into_a_bin(values: list[float]) -> None:
    column = np.asarray(values, dtype=np.float64)
    edges = charts.bin_edges(column)
    assert np.all(np.diff(edges) > 0)
    assert len(edges) <= charts.MAX_BINS + 2
    assert np.histogram(column, edges)[0].sum() == len(values)


def test_whole_numbers_get_a_bin_each() -> None:
    np.testing.assert_array_equal(charts.bin_edges(np.asarray([3.0, 5.0, 3.0])), [2.5, 3.5, 4.5, 5.5])


def test_the_running_mean_is_the_mean_of_its_window() -> None:
    values = np.random.default_rng(0).normal(size=205)
    half = 5  # a twentieth of the series is 10, made odd: 11
    slow = [values[max(0, at - half) : at + half + 1].mean() for at in range(len(values))]
    np.testing.assert_allclose(charts.running_mean(values), slow, rtol=0, atol=1e-12)


def test_the_running_mean_of_a_short_or_constant_series_is_the_series() -> None:
    short = np.asarray([1.0, 9.0, 2.0])
    np.testing.assert_array_equal(charts.running_mean(short), short)
    np.testing.assert_allclose(charts.running_mean(np.full(100, 3.0)), np.full(100, 3.0), atol=1e-12)


def test_one_huge_value_does_not_spoil_the_others() -> None:
    values = np.ones(400)
    values[0] = 1e30
    assert charts.running_mean(values)[-1] == pytest.approx(1.0)


def test_points_are_drawn_in_the_order_of_x() -> None:
    forward = charts.line_chart({"a": [(0, 1.0), (1, 2.0), (2, 5.0)]})
    assert charts.line_chart({"a": [(2, 5.0), (0, 1.0), (1, 2.0)]}) == forward
    assert forward.legend[0].summary == "ends at 5"


def test_many_points_stay_a_small_picture() -> None:
    chart = charts.line_chart({"a": [(step, math.sin(step)) for step in range(50_000)]})
    assert chart.image is not None
    assert len(chart.image) < 250_000


def test_no_text_of_the_caller_enters_a_picture() -> None:
    svg = ET.tostring(svg_of(charts.line_chart({"marker-of-the-caller": [(0, 1.0), (1, 2.0)]})), encoding="unicode")
    assert "marker-of-the-caller" not in svg
    assert "<script" not in svg


def test_series_beyond_the_palette_differ_by_dash() -> None:
    legend = charts.line_chart({str(index): [(0, index)] for index in range(12)}).legend
    assert len({(entry.color, entry.dash) for entry in legend}) == 12


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    charts.histogram({"a": [1.0, 2.0]})
    assert dict(matplotlib.rcParams) == before
