"""Suites are read strictly: what is wrong is named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from perl_vlm.cli_settings import UsageError
from perl_vlm_eval.suite import read_suite, shipped


@pytest.mark.parametrize("name", shipped())
def test_shipped_suites_are_understood(name: str) -> None:
    suite = read_suite(name)
    assert suite.name == name
    assert suite.lines


def test_settings_are_typed_and_may_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "name: mine\nevaluations:\n- kind: policy\n  judges: [runs/rm, 'openai:http://h/v1#m']\n  limit: 50\n"
        "- {kind: resources, name: cost}\n"
    )
    suite = read_suite(str(path), {"limit": 7, "split": "validation"})
    policy, cost = suite.lines
    assert (suite.name, policy.name, cost.name) == ("mine", "policy", "cost")
    assert policy.evaluation.settings.judges == ("runs/rm", "openai:http://h/v1#m")
    assert (policy.evaluation.settings.limit, policy.evaluation.settings.split) == (7, "validation")
    assert policy.settings != read_suite(str(path)).lines[0].settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("evaluations: []", "should hold `evaluations:`"),
        ("- kind: policy", "should hold `evaluations:`"),
        ("evaluations:\n- limit: 3", "evaluation 1: found {'limit': 3}"),
        ("evaluations:\n- kind: polices", "no kind 'polices'. Did you mean policy? There are"),
        ("evaluations:\n- kind: policy\n  limt: 3", "no setting limt. Nearest: limit"),
        ("evaluations:\n- kind: policy\n  limit: many", "evaluation 1: limit is 'many'; expected"),
        ("evaluations:\n- kind: policy\n  best_of: 1", "best_of is 1; it must be 0, or 2 or more"),
        ("evaluations:\n- kind: policy\n- kind: policy", "policy is there twice"),
        ("evaluations:\n- kind: policy\nrepeat: 3", "'repeat'"),
        ("evaluations: [", "no YAML file"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"own\.yaml") as caught:
        read_suite(str(path))
    assert said in str(caught.value)


def test_unknown_suites() -> None:
    with pytest.raises(UsageError, match="Nearest: standard"):
        read_suite("standart")
    with pytest.raises(UsageError, match="cannot be read"):
        read_suite("nowhere.yaml")
