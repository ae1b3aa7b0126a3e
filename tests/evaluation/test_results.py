"""Cells come back as they were written, and what cannot be compared is not."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from perl_vlm.errors import PerlVlmError
from perl_vlm_eval import statistics
from perl_vlm_eval.comparing import apart, differences_of, sentences
from perl_vlm_eval.results import Cell, Chart, Figure, Findings, Items, Sample, cell_from_json, shown, to_json, written

COUNT = 60
DRAW = np.random.default_rng(0)
BEFORE, AFTER = (DRAW.random(COUNT) < 0.4) * 1.0, (DRAW.random(COUNT) < 0.9) * 1.0


def cell(run: str, values: np.ndarray, *, keys: str = "k", scale: str = "") -> Cell:
    gain = statistics.difference(BEFORE, AFTER)
    names = [f"{keys}{place}" for place in range(COUNT)]
    rewards = (values * 3).tolist()
    rewards[0] = math.nan
    findings = Findings(
        figures={
            "accuracy": Figure(statistics.share(values), "share", "higher"),
            "gain/accuracy": Figure(gain, "share", "higher", "a note"),
        },
        headlines=["gain/accuracy", "accuracy"],
        items=Items(names, names, names, {"accuracy": values.tolist(), "reward": rewards}, {"reward": scale}),
        charts=[Chart("c", {"one": [(0.0, 1.0)]}, "x")],
        samples=[Sample("p", None, "b", "a", ("", "only"))],
        verdicts=["said"],
        warnings=["careful"],
    )
    return Cell("policy", "policy", run, "key", "done", "", 1.0, findings)


def test_a_cell_comes_back_as_it_was() -> None:
    one = cell("a", AFTER)
    text = json.dumps(to_json(one), allow_nan=False)
    back = cell_from_json(json.loads(text))
    assert json.dumps(to_json(back)) == text
    gain = back.findings.figures["gain/accuracy"].estimate
    assert isinstance(gain, statistics.Difference)
    assert gain.p == one.findings.figures["gain/accuracy"].estimate.p  # type: ignore[union-attr]
    assert math.isnan(back.findings.items.values["reward"][0])
    with pytest.raises(PerlVlmError, match="no cell"):
        cell_from_json({"findings": {}})


def test_runs_are_compared_on_the_items_they_share() -> None:
    found = {(one.what, one.a, one.b): one for one in differences_of([cell("a", BEFORE), cell("b", AFTER)])}
    own = found["policy: accuracy", "a", "b"]
    assert (own.words, own.family, own.estimate.items) == ("better", "main", COUNT)
    assert own.p_holm is not None
    assert own.p_holm > own.estimate.p  # type: ignore[operator]
    assert found["policy: accuracy", "anchor", "a"].words == "better"
    said = sentences(list(found.values()))
    assert any(line.startswith("policy: accuracy: b is better than a (60 items, p = ") for line in said)


def test_rewards_of_two_models_are_not_compared_and_those_of_one_are() -> None:
    different = differences_of([cell("a", BEFORE, scale="1"), cell("b", AFTER, scale="2")])
    assert not any(one.what == "policy: reward" for one in different)
    same = [one for one in differences_of([cell("a", BEFORE, scale="1"), cell("b", AFTER, scale="1")])]
    reward = next(one for one in same if one.what == "policy: reward")
    assert reward.estimate.items == COUNT - 1, "an item without a reward is left out"


def test_items_that_only_look_alike_are_not_paired() -> None:
    cells = [cell("a", BEFORE), cell("b", AFTER, keys="other")]
    assert not any((one.a, one.b) == ("a", "b") for one in differences_of(cells))
    assert apart(cells) == ["policy: a and b were measured on different items, so they are not compared"]
    assert apart([cells[0], replace(cells[0], run="c")]) == []


def test_figures_are_written_in_their_units() -> None:
    assert shown(Figure(statistics.Estimate(0.5, 0.25, 0.75, 9, 9, ""), "share")) == "50.0 % [25.0, 75.0]"
    assert shown(Figure(statistics.Estimate(2.5, None, None, 9, 9, "too few"), "nats")) == "2.5 nats"
    assert written(0.031, "share", sign=True) == "+3.1 points"
    assert written(3 * 2**20, "bytes") == "3 MiB"
    assert written(math.nan, "number") == "none"
