"""``perl-vlm eval`` from end to end, on a run that was really trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from perl_vlm.cli import main
from perl_vlm.rollout.scorers import transport
from perl_vlm_eval import opened
from perl_vlm_eval.evaluations import policy_figures
from perl_vlm_eval.evaluations.policies import Policies
from perl_vlm_eval.evaluations.reward_models import RewardModels
from perl_vlm_eval.results import Findings

pytestmark = pytest.mark.slow

SUITE = """
name: small
evaluations:
- kind: reward_model
  limit: 40
- kind: policy
  limit: 24
  kl_prompts: 16
  best_of: 4
  best_of_prompts: 8
- kind: resources
"""


@pytest.fixture
def suite(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(SUITE)
    return str(path)


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def cell(out: Path, evaluation: str) -> dict[str, Any]:
    return next(one for one in results(out)["cells"] if one["evaluation"] == evaluation)


def test_everything_is_measured_kept_and_shown(
    whole_run: Path, suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results"
    assert main(["eval", "--suite", suite, "--runs", str(whole_run), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "pair_accuracy" in said
    assert "gain/accuracy" in said
    assert results(out)["tests"][0]["estimate"]["test"]

    reward = cell(out, "reward_model")["figures"]
    for name in (
        "pair_accuracy", "ece", "score_length_correlation", "margin_length_correlation", "accuracy_blank_pictures",
        "accuracy_shuffled_pictures", "accuracy_swapped_pictures", "solvable_blind", "disagreement",
    ):  # fmt: skip
        assert reward[name]["estimate"]["items"] == 40, name
        # All these answers are two tokens long: with length nothing varies.
        assert (reward[name]["estimate"]["low"] is None) == ("length" in name), name
    policy = cell(out, "policy")["figures"]
    for name in (
        "accuracy", "anchor/accuracy", "gain/accuracy", "win_rate/accuracy", "kl", "entropy", "ended", "distinct_1",
        "response_tokens", "empty", "repeated", "reward", "gain/reward", "win_rate/reward", "best_of_4",
    ):  # fmt: skip
        assert name in policy, name
    assert {"f1", "anchor/f1", "gain/f1"} <= policy.keys(), "the task's figures of a whole set"
    assert {"gain/response_tokens", "best_of_1", "best_of_2"} <= policy.keys()
    assert policy["kl"]["estimate"]["items"] == 16
    assert policy["kl"]["estimate"]["value"] > 0
    cost = cell(out, "resources")["figures"]
    assert 0 < cost["ppo/trainable/policy"]["estimate"]["value"] < 1
    tests = results(out)["tests"]
    assert {one["family"] for one in tests} == {"main", "further"}
    assert all(one["p_holm"] is None or one["p_holm"] >= one["estimate"]["p"] for one in tests)

    page = (out / "report.html").read_text()
    assert "Reliability" in page
    assert "data:image/png" in page
    assert len(page) < 5_000_000
    for path in out.rglob("*.json"):
        assert "NaN" not in path.read_text()

    def refuse(*args: object) -> Findings:
        raise AssertionError("measured again")

    for kind in (RewardModels, Policies):
        monkeypatch.setattr(kind, "measure", refuse)
    before = results(out)
    assert main(["eval", "--suite", suite, "--runs", str(whole_run), "--out", str(out)]) == 0
    assert results(out)["cells"] == before["cells"]
    assert "measured before" in capsys.readouterr().out


def test_what_changes_is_measured_anew_and_what_fails_is_a_hole(
    whole_run: Path, suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    full = Policies.measure

    def failing(self: RewardModels, run: object) -> Findings:
        measured.append("reward_model")
        raise ZeroDivisionError("nothing to divide")

    def counting(self: Policies, run: Any) -> Findings:
        measured.append("policy")
        return full(self, run)

    monkeypatch.setattr(RewardModels, "measure", failing)
    monkeypatch.setattr(Policies, "measure", counting)
    run, out = tmp_path / "runs" / "copy", tmp_path / "results"
    shutil.copytree(whole_run, run)
    given = ["eval", "--suite", suite, "--runs", str(run), "--out", str(out)]
    assert main(given) == 1
    hole = cell(out, "reward_model")
    assert hole["status"] == "failed"
    assert "ZeroDivisionError: nothing to divide" in hole["why"]
    assert cell(out, "policy")["status"] == "done"
    assert "reward_model failed: ZeroDivisionError" in capsys.readouterr().out
    assert "reward_model failed" in (out / "report.html").read_text()

    assert main(given) == 1
    assert measured == ["reward_model", "policy", "reward_model"], "what failed is tried again, what is done is not"
    assert main([*given, "--limit", "20"]) == 1
    assert measured[3:] == ["reward_model", "policy"], "other items"
    weights = run / "ppo" / "adapter" / "adapter_config.json"
    weights.write_text(weights.read_text() + "\n")
    assert main(given) == 1
    assert measured[5:] == ["reward_model", "policy"], "other weights"


def test_a_judge_that_is_down_costs_nothing_else(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, out = tmp_path / "judged.yaml", tmp_path / "results"
    judges = f"['openai:http://127.0.0.1:9/v1#gone', '{whole_run / 'rm'}', verify, nowhere/rm]"
    suite.write_text(f"evaluations:\n- kind: policy\n  limit: 12\n  kl_prompts: 0\n  judges: {judges}\n")
    monkeypatch.setattr(transport.time, "sleep", lambda seconds: None)
    given = ["eval", "--suite", str(suite), "--runs", str(whole_run), "--out", str(out)]
    assert main(given) == 1
    found = cell(out, "policy")
    assert found["status"] == "failed"
    assert [one.partition(":")[0] for one in found["missing"]] == ["openai", "nowhere/rm"]
    assert "give the same command again" in found["why"]
    assert {"accuracy", "gain/accuracy", "reward", "win_rate/verify"} <= found["figures"].keys()
    assert any(name.endswith("rm") for name in found["figures"]), "the other reward model's word is there"
    assert "gain/accuracy" in capsys.readouterr().out
    assert any("its word is no evidence" in warning for warning in found["warnings"])

    def refuse(*args: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(opened, "greedy_answers", refuse)
    assert main(given) == 1
    again = cell(out, "policy")
    assert again["figures"]["accuracy"] == found["figures"]["accuracy"]

    both = tmp_path / "both"
    shutil.copytree(out, tmp_path / "copy")
    assert main(["eval", "compare", str(out), str(tmp_path / "copy"), "--out", str(both)]) == 0
    assert [one["status"] for one in results(both)["cells"]] == ["failed", "failed"]
    assert "gain/accuracy" in results(both)["cells"][0]["figures"], "what it has is compared all the same"
    assert main(["eval", "compare", str(both), str(out)]) == 0


def test_what_breaks_a_part_costs_that_part_alone(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, out = tmp_path / "best.yaml", tmp_path / "results"
    suite.write_text("evaluations:\n- kind: policy\n  limit: 12\n  kl_prompts: 4\n  best_of: 2\n  best_of_prompts: 4\n")
    given = ["eval", "--suite", str(suite), "--runs", str(whole_run), "--out", str(out)]
    monkeypatch.setattr(policy_figures, "best_of_n", lambda *given: 1 / 0)
    assert main(given) == 1
    found = cell(out, "policy")
    assert found["missing"] == ["best of 2: ZeroDivisionError: division by zero"]
    assert {"accuracy", "kl"} <= found["figures"].keys()

    def refuse(*args: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.undo()
    for name in ("_moved", "drawn"):
        monkeypatch.setattr(policy_figures, name, refuse)
    assert main(given) == 0
    assert cell(out, "policy")["figures"]["kl"] == found["figures"]["kl"]
    assert not list((out / "cells").glob("*.partial.json"))


def test_several_processes_are_refused(
    whole_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for argv in (["eval", "--runs", str(whole_run)], ["study", "pe-rlhf", "--task", "vqa"]):
        assert main(argv) == 2
        assert "runs in one process, and 2 were started" in capsys.readouterr().err


def test_another_task_s_examples_may_be_asked(whole_run: Path, tmp_path: Path) -> None:
    suite, out = tmp_path / "other.yaml", tmp_path / "results"
    settings = "{kinds: [color], test_size: 64}"
    suite.write_text(
        f"evaluations:\n- kind: policy\n  name: colors\n  task: vqa\n  task_settings: {settings}\n  limit: 12\n"
        "  kl_prompts: 4\n- kind: policy\n  name: odd\n  task: vqa\n  task_settings: {kindz: [color]}\n"
    )
    assert main(["eval", "--suite", str(suite), "--runs", str(whole_run), "--out", str(out)]) == 1
    figures = cell(out, "colors")["figures"]
    assert "accuracy/color" in figures
    assert "reward" not in figures, "its reward model was not trained on these"
    assert "no setting kindz. Nearest: kinds" in cell(out, "odd")["why"]


def test_what_was_said_is_logged_and_answers_alone_can_be_had(
    whole_run: Path, suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results"
    given = ["eval", "--suite", suite, "--runs", str(whole_run), "--out", str(out)]
    assert main([*given, "--predict_only"]) == 0
    assert not (out / "results.json").exists()
    answered = [json.loads(line) for line in (out / "samples" / "vqa-first-policy.jsonl").read_text().splitlines()]
    assert len(answered) == 24
    assert answered[0]["images"] == 1
    assert answered[0]["policy"].keys() == {"response", "accuracy"}
    assert "samples/vqa-first-policy.jsonl" in capsys.readouterr().out

    monkeypatch.setattr(opened, "greedy_answers", lambda *given: pytest.fail("decoded again"))
    assert main([*given, "--log_samples"]) == 0
    logged = [json.loads(line) for line in (out / "samples" / "vqa-first-policy.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in answered[0]} for line in logged] == answered
    accuracy = cell(out, "policy")["figures"]["accuracy"]["estimate"]["value"]
    assert sum(line["figures"]["accuracy"] for line in logged) / 24 == pytest.approx(accuracy)
    rewards = [json.loads(line) for line in (out / "samples" / "vqa-first-reward_model.jsonl").read_text().splitlines()]
    right = [line["chosen"]["score"] > line["rejected"]["score"] for line in rewards]
    assert sum(right) / 40 == pytest.approx(cell(out, "reward_model")["figures"]["pair_accuracy"]["estimate"]["value"])
    kl = cell(out, "policy")["figures"]["kl"]["estimate"]["value"]

    (out / "samples" / "vqa-first-policy.jsonl").unlink()
    assert main([*given, "--log_samples"]) == 0, "of what was measured before, too"
    assert (out / "samples" / "vqa-first-policy.jsonl").is_file()
    monkeypatch.undo()
    assert main([*given, "--seed", "7"]) == 0
    again = cell(out, "policy")["figures"]
    assert again["kl"]["estimate"]["value"] != kl, "another draw of sampled answers"
    assert again["accuracy"]["estimate"]["value"] == accuracy, "greedy answers are what they are"


def test_nothing_to_predict_is_said(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--runs", str(whole_run / "rm"), "--out", str(tmp_path / "results")]
    assert main(["eval", *given, "--predict_only"]) == 1
    assert "asks any of these runs for answers" in capsys.readouterr().err


def test_seeds_of_one_run_are_summarised(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, suite, out = tmp_path / "runs" / "second", tmp_path / "few.yaml", tmp_path / "results"
    suite.write_text("evaluations:\n- kind: policy\n  limit: 12\n  kl_prompts: 0\n")
    shutil.copytree(whole_run / "ppo", copy)
    for name, given, other in (("config.yaml", "\nseed: 0", "\nseed: 1"), ("summary.json", '"seed": 0', '"seed": 1')):
        text = (copy / name).read_text()
        assert text.count(given) == 1
        (copy / name).write_text(text.replace(given, other))
    runs = [str(whole_run / "ppo"), str(copy)]
    assert main(["eval", "--suite", str(suite), "--runs", *runs, "--out", str(out)]) == 0
    assert "Over seeds" in capsys.readouterr().out
    assert "Over seeds" in (out / "report.html").read_text()
    found = {one["what"]: one for one in results(out)["seeds"]}
    assert found["policy: accuracy"]["runs"] == ["first/ppo", "runs/second"]
    assert found["policy: accuracy"]["found"]["seeds"] == 2

    for place, given in enumerate(runs):
        assert main(["eval", "--suite", str(suite), "--runs", given, "--out", str(tmp_path / f"part{place}")]) == 0
        assert results(tmp_path / f"part{place}")["seeds"] == []
    parts, both = [str(tmp_path / "part0"), str(tmp_path / "part1")], tmp_path / "both"
    assert main(["eval", "compare", *parts, "--out", str(both)]) == 0
    assert {one["what"]: one["found"] for one in results(both)["seeds"]} == {
        what: one["found"] for what, one in found.items()
    }
    assert main(["eval", "compare", str(both), str(tmp_path / "part0")]) == 0
    assert "Over seeds" in capsys.readouterr().out


def test_two_results_side_by_side(
    whole_run: Path, suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "runs" / "second"
    shutil.copytree(whole_run, copy)
    for name, run in (("one", whole_run), ("two", copy)):
        assert main(["eval", "--suite", suite, "--runs", str(run), "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    both = tmp_path / "both"
    assert main(["eval", "compare", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(both)]) == 0
    found = [one for one in results(both)["tests"] if one["what"] == "policy: accuracy" and one["a"] != "anchor"]
    assert [(one["a"], one["b"], one["words"]) for one in found] == [("vqa/first", "runs/second", "within noise")]
    assert found[0]["estimate"]["value"] == 0
    assert found[0]["estimate"]["items"] == 24
    assert (both / "report.html").is_file()
    assert main(["eval", "compare", str(both), str(tmp_path / "one")]) == 0, "a comparison's folder stands alone"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: shutil.rmtree(run / "adapter"), "has no adapter"),
        (lambda run: (run / "summary.json").unlink(), "is not finished"),
        (lambda run: (run / "config.yaml").unlink(), "is no run"),
        (lambda run: (run / "summary.json").write_text("{}"), "names no task and stage"),
        (
            lambda run: (run / "summary.json").write_text('{"task": "nothing", "stage": "ppo"}'),
            "no task or command 'nothing'",
        ),
    ],
)
def test_runs_that_cannot_be_measured_are_named(
    spoil: Any, said: str, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "ppo"
    shutil.copytree(whole_run / "ppo", run)
    spoil(run)
    assert main(["eval", "--runs", str(run), "--out", str(tmp_path / "results")]) == 1
    printed = capsys.readouterr()
    assert said in printed.err + printed.out
    assert "Traceback" not in printed.err


def test_flags_that_are_not_understood(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--help"]) == 0
    assert "--output_path" in capsys.readouterr().out
    for argv, said in (
        ([], "needs --runs"),
        (["--runs", "nowhere"], "is no folder"),
        (["--runs", "x", "--limit", "0"], "0 is not 1 or more"),
        (["--rums", "x"], "--rums"),
        (["compare", "one"], "two or more"),
        (["compare", "one", "two"], "no results.json"),
    ):
        assert main(["eval", *argv]) in (1, 2), argv
        assert said in capsys.readouterr().err, argv
    assert main(["eval", "--suite", "none", "--runs", str(whole_run)]) == 2
    assert "no suite 'none'" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["eval", "--runs", str(whole_run), "--out", str(tmp_path)]) == 1
    assert "no suite's results" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep"
