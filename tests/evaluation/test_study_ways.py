"""The studies of regularisers and ensembles from ways whose truth is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perl_vlm_eval.studies import STUDIES, ensembles, regularizers
from perl_vlm_eval.studies.base import Part, Plan, StudyFindings, together
from perl_vlm_eval.studies.cells import Outcome, StudyCell
from perl_vlm_eval.studies.command import drive
from perl_vlm_eval.studies.ways import way_of

GOLD = {
    "none": 0.9, "k1": 0.6, "single": 0.6, "mean": 0.7, "min": 0.9, "uncertainty": 0.7, "weight_average": 0.7,
}  # fmt: skip


def results(end: float, seed: int = 0) -> dict[str, Any]:
    """Of the suite ``way``: gold rises from one half to ``end``, the KL by one at each of two points."""
    figures = {}
    for name, kl, gold in (("anchor", 0.0, 0.5), ("round 5", 1.0, (0.5 + end) / 2), ("policy", 4.0, end)):
        for what, value in (("kl", kl), ("gold", gold), ("proxy", kl), ("win_rate", gold)):
            figures[f"way/{name}/{what}"] = {"estimate": {"value": value}, "unit": "share"}
    facts = {"precision": {"estimate": {"value": 0.4 - 0.01 * seed}}, "anchor/precision": {"estimate": {"value": 0.5}}}
    return {
        "cells": [
            {"kind": "hacking", "status": "done", "figures": figures, "verdicts": ["No sign of it."]},
            {"kind": "factuality", "status": "done", "figures": facts},
        ]
    }


class Known:  # in place of a Workshop
    def __init__(self, out: Path) -> None:
        self.out, self.cells = out, dict[str, list[str]]()

    def make(self, cells: Any) -> dict[str, Outcome]:
        return {cell.name: self.outcome(cell) for cell in cells}

    def outcome(self, cell: Any) -> Outcome:
        self.cells[cell.name] = list(cell.arguments)
        if not cell.name.startswith("way-"):
            return Outcome(self.out / cell.name, "" if "k2" not in cell.name else "it failed", {"metrics": {}})
        if "k2" in cell.name:
            return Outcome(self.out / cell.name, "ppo is missing")
        arm, seed = cell.name.split("-")[-2], int(cell.name[-1])
        # LoRA is two points ahead, more or less.
        ahead = 0.02 + 0.001 * seed * (len(arm) % 3) if "-lora-" in cell.name else 0.0
        ahead += 0.0002 * seed if arm in ("none", "single") else 0.0  # seeds never differ quite alike
        return Outcome(self.out / cell.name, "", results(GOLD[arm] + ahead + 0.01 * seed, seed))


def test_a_way_is_read_in_its_order() -> None:
    way = way_of(results(0.8))
    assert way.names == ["anchor", "round 5", "policy"]
    assert way.gold_at(0) == 0.5
    assert way.gold_at(1) == pytest.approx(0.65)
    assert way.gold_at(2.25) == pytest.approx(0.65 + 0.15 / 2), "straight over the square root"
    assert way.precision == {"anchor": 0.5, "policy": 0.4}
    assert way.end == 2


def test_regularisers_side_by_side(tmp_path: Path) -> None:
    cells = Known(tmp_path)
    settings = regularizers.RegularizerSettings(task="vqa", kinds=("none", "k1", "k2"), steps=20, points=4)
    found = drive(regularizers.plan(settings), cells)
    rows = {row[0]: row[1:] for row in found.tables[0].rows}
    assert rows["tiny, full, none"] == ("91.0 ± 1.0", "91.0 ± 1.0", "4.00 ± 0.00", "50.0 ± 0.0", "39.0 ± 1.0", "3")
    assert rows["tiny, lora, k2"] == ("-", "-", "-", "-", "-", "0")
    differences = {(row[0], row[1]): row for row in found.tables[1].rows}
    assert differences["tiny, k1, gold", "LoRA less full tuning"][2] == "+2.2"
    assert differences["tiny, none, KL in nats", "LoRA less full tuning"][-1] == "within noise"
    worse = differences["tiny, full, gold", "k1 less none"]
    assert (*worse[2:4], worse[-1]) == ("-30.0", "[-30.1, -30.0]", "worse")
    assert differences["tiny, lora, k1, factual precision", "the policy less the anchor"][2] == "-11.0"
    assert differences["tiny, k2, gold", "LoRA less full tuning"][-1] == "cannot be told: too few finished runs"
    assert any(said.startswith("tiny, full, gold: k1 61.0 ± 1.0 against 91.0 ± 1.0 of none") for said in found.verdicts)
    noise = [row for row in differences.values() if row[-1] == "within noise"]
    assert f"{len(noise)} of {len(differences)} differences are within the noise of the seeds." in found.verdicts
    assert found.curves[0].series["none"][0] == (0.0, 0.5)
    one = cells.cells["ppo-tiny-lora-none-s1"]
    assert one[:6] == ["vqa", "ppo", "--config", "none", "--model", "tiny"]
    assert {"--ppo.kl_coef", "--ppo.save_every", "--ppo.save_total_limit"} <= set(one)
    assert one[one.index("--ppo.save_every") + 1] == "5"
    assert one[one.index("--ppo.save_total_limit") + 1] == "null"
    assert cells.cells["way-tiny-lora-none-s0"][:3] == ["eval", "--suite", "way"]


def test_ensembles_at_the_same_divergence(tmp_path: Path) -> None:
    cells = Known(tmp_path)
    found = drive(ensembles.plan(ensembles.EnsembleSettings(task="vqa", seeds=2)), cells)
    rows = {row[0]: row[1:] for row in found.tables[0].rows}
    assert rows["tiny, min"][0] == "90.5 ± 0.7"
    assert len(rows) == 5
    assert found.verdicts[1].startswith(
        "tiny, gold at a KL of 4.00 nats: min 90.5 ± 0.7 against 60.5 ± 0.7 of a single"
    )
    assert len(found.verdicts) == 4
    single = cells.cells["ppo-tiny-single-s0"]
    assert single[single.index("--ppo.reward_model") + 1].endswith("rm-tiny/members/0")
    assert any(part.endswith("rm-tiny/members/1") for part in cells.cells["ppo-tiny-single-s1"])
    assert single[single.index("--ppo.value") + 1] == "zero", "all value functions start alike"
    assert cells.cells["rm-tiny"][-3:] == ["3", "--seed", "0"]


@pytest.mark.parametrize("plan", ["regularizers", "ensembles"])
def test_arms_are_asked_for_at_once(plan: str, tmp_path: Path) -> None:
    asked = list[list[str]]()

    class Counted(Known):
        def make(self, cells: Any) -> dict[str, Outcome]:
            asked.append([cell.name for cell in cells])
            return super().make(cells)

    given: dict[str, Any] = {"kinds": ("none", "k1")} if plan == "regularizers" else {"combinations": ("mean", "min")}
    settings = STUDIES[plan].settings(task="vqa", seeds=2, models=("tiny", "other/small"), **given)
    drive(STUDIES[plan].plan(settings), Counted(tmp_path))
    arms = 2 * 2 * 2 * (2 if plan == "regularizers" else 1)
    assert [len(one) for one in asked] == [*([2] if plan == "ensembles" else []), arms, arms]
    assert {name.split("-")[0] for name in asked[-1]} == {"way"}


def test_parts_of_a_plan_may_end_at_different_times(tmp_path: Path) -> None:
    def part(rounds: int) -> Part[int]:
        for turn in range(rounds):
            name = f"{rounds}-{turn}"
            assert (yield [StudyCell(name, ["vqa"])])[name].done
        return rounds

    asked = list[list[str]]()

    class Counted(Known):
        def outcome(self, cell: Any) -> Outcome:
            return Outcome(self.out)

        def make(self, cells: Any) -> dict[str, Outcome]:
            asked.append([cell.name for cell in cells])
            return super().make(cells)

    def plan() -> Plan:
        found = yield from together({"two": part(2), "none": part(0), "one": part(1)})
        return StudyFindings(figures=found)

    assert list(drive(plan(), Counted(tmp_path)).figures.items()) == [("two", 2), ("none", 0), ("one", 1)]
    assert asked == [["2-0", "1-0"], ["2-1"]]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("regularizers", ("--ppo.steps", "180"), "--ppo.steps after .* give --steps"),
        ("regularizers", ("--ppo.kl-coef=0.1",), "give --kl_coef"),
        ("ensembles", ("--ppo.eval_every", "5"), "as the last round left them"),
        ("pe-rlhf", ("--rm.steps", "3", "--seed", "7"), "give --seeds"),
        ("pe-rlhf", ("--ppo.reward_model", "verify"), "give --reward"),
    ],
)
def test_what_a_study_sets_itself_is_not_dropped_in_silence(name: str, options: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        STUDIES[name].settings(task="vqa", options=options)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("regularizers", {"kinds": ("k9",)}), ("regularizers", {"points": 50}), ("regularizers", {"points": 7}),
        ("regularizers", {"tunings": ("dora",)}),
        ("regularizers", {"kinds": ("k1", "none", "k1")}), ("regularizers", {"models": ("small", "mine/small")}),
        ("pe-rlhf", {"ranks": (8, 1, 8)}), ("ensembles", {"members": 1}),
        ("ensembles", {"combinations": ("median",)}), ("ensembles", {"seeds": 0}),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(name: str, wrong: dict[str, Any]) -> None:
    (given,) = wrong.values()
    with pytest.raises(ValueError, match=str(given[0] if isinstance(given, tuple) else given)):
        STUDIES[name].settings(task="vqa", **wrong)
