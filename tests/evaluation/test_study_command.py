"""``perl-vlm study``: what it is asked, and the tables of PE-RLHF from cells whose figures are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perl_vlm.cli import main
from perl_vlm_eval.studies import STUDIES, base, pe_rlhf, pe_rlhf_tables
from perl_vlm_eval.studies.base import cell
from perl_vlm_eval.studies.cells import Outcome
from perl_vlm_eval.studies.command import drive
from perl_vlm_eval.studies.pe_rlhf import PeRlhfSettings

FIGURES = {"full": 0.80, "r4": 0.82, "r1": 0.70}


class Known:  # in place of a Workshop
    """Cells whose figures follow from their settings: the learning rate 2 is best, seeds are a point apart."""

    def __init__(self, out: Path, missing: str = "nothing") -> None:
        self.out, self.missing, self.names = out, missing, list[str]()

    def make(self, cells: Any) -> dict[str, Outcome]:
        return {cell.name: self.outcome(cell) for cell in cells}

    def settings(self, cell: Any) -> tuple[str, float, int]:
        """Arm, learning rate and seed; an evaluation's are those of its policy's folder."""
        name = cell.name
        if cell.name.startswith("eval-"):
            name = Path(cell.arguments[cell.arguments.index("--eval.policy") + 1]).name
        return name.split("-")[2], float(name.split("-")[3][2:]), int(name.split("-")[4][1:])

    def outcome(self, cell: Any) -> Outcome:
        folder = self.out / cell.name
        self.names.append(cell.name)
        assert not cell.needs, "every cell that is asked for can be made at once"
        if self.missing in cell.name:
            return Outcome(folder, "it failed")
        verb = cell.name.split("-")[0]
        arm, lr, seed = self.settings(cell)
        value = FIGURES[arm] - 0.1 * (lr != 2) + 0.01 * seed + (0.001 * seed**2 if arm == "full" else 0)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [{"stage": verb, "step": step, "time": 10.0 + step * (3 if arm == "full" else 2)} for step in range(4)]
        lines.append(  # what is measured on the way takes its time
            {
                "stage": verb, "step": 4, "time": 60.0,
                "eval/accuracy": value, "eval/loss": 1 - value, "eval/scores": value,
            }
        )  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = {
            "peak_memory_bytes": 1000 if arm == "full" else 450,
            "metrics": {"reward_model/pair_accuracy": value, "policy/accuracy": value, "anchor/accuracy": 0.5},
        }
        return Outcome(folder, "", summary)


SETTINGS = PeRlhfSettings(
    task="vqa", ranks=(1, 4), seeds=3, rm_lrs=(1, 2), rm_full_lrs=(2, 3), ppo_lrs=(1, 2), ppo_full_lrs=(2, 3)
)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pe_rlhf_tables, "bare_bytes", lambda: 100)


def test_each_arm_takes_its_best_rate_and_every_seed_is_trained(tmp_path: Path) -> None:
    cells = Known(tmp_path)
    found = drive(pe_rlhf.plan(SETTINGS), cells)
    assert {name: one["reward_model"]["lr"] for name, one in found.figures["arms"].items()} == {
        "tiny/full": 2, "tiny/4": 2, "tiny/1": 2
    }  # fmt: skip
    one, two, three, differences = found.tables
    assert one.title.startswith("Table 1")
    rows = {row[0]: row[1] for row in one.rows}
    assert rows["RM accuracy, full"] == "81.2 ± 1.2"
    assert rows["RM accuracy, LoRA"] == "83.0 ± 1.0"
    assert rows["RM memory, LoRA / full"] == "39 %", "350 of 900 beyond the bare process"
    assert rows["RL speed, LoRA / full"] == "1.50x", "measurements left out"
    assert two.rows[0] == ("vqa, tiny", "81.2 ± 1.2", "83.0 ± 1.0", "71.0 ± 1.0")
    assert two.header == ("", "full", "rank 4", "rank 1")
    assert three.rows[0][-1] == "50.0"
    assert "LoRA of rank 4 83.0 ± 1.0 against 81.2 ± 1.2 of full tuning over 3 seeds: better (p = " in found.verdicts[0]
    assert "LoRA of rank 1 71.0 ± 1.0 against 81.2 ± 1.2 of full tuning over 3 seeds: worse" in found.verdicts[1]
    assert len(differences.rows) == 4
    curves = {curve.title: curve.series for curve in found.curves}
    assert curves["vqa, tiny: policies' metric by rank"]["LoRA"] == [
        (0.0, pytest.approx(0.71)),
        (2.0, pytest.approx(0.83)),
    ]
    assert curves["vqa, tiny: policies' metric by rank"]["anchor"] == [(0.0, 0.5), (2.0, 0.5)]
    assert differences.rows[0][1:3] == ("LoRA of rank 4 less full tuning", "+1.8")
    trials = [name for name in cells.names if name.startswith("rm-tiny-full")]
    assert sorted(set(trials)) == [f"rm-tiny-full-lr{lr}" for lr in ("2-s0", "2-s1", "2-s2", "3-s0")]


def test_trials_are_compared_on_validation_data(tmp_path: Path) -> None:
    asked = next(pe_rlhf.plan(SETTINGS))
    arguments = list(asked[0].arguments)
    assert arguments[arguments.index("--rm.eval_every") + 1] == "25", "an eighth of the steps"
    own = PeRlhfSettings(**{**vars(SETTINGS), "options": ("--rm.eval_every", "7")})
    assert list(next(pe_rlhf.plan(own))[0].arguments).count("--rm.eval_every") == 1


def test_figures_on_test_data_choose_nothing(tmp_path: Path) -> None:
    class Turned(Known):
        """Validation prefers the learning rate that is worse on test data."""

        def outcome(self, cell: Any) -> Outcome:
            found = super().outcome(cell)
            path = found.folder / "metrics.jsonl"
            if cell.name.startswith(("rm", "ppo")):
                last = json.loads(path.read_text().splitlines()[-1])
                turned = {key: 1 - value if key.startswith("eval/") else value for key, value in last.items()}
                path.write_text("\n".join([*path.read_text().splitlines()[:-1], json.dumps(turned)]) + "\n")
            return found

    found = drive(pe_rlhf.plan(SETTINGS), Turned(tmp_path))
    assert found.figures["arms"]["tiny/4"]["reward_model"]["lr"] == 1
    assert found.figures["arms"]["tiny/4"]["policy"]["lr"] == 1


def test_a_reward_that_knows_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = drive(pe_rlhf.plan(SETTINGS), Known(tmp_path / "a")).verdicts
    assert len(known) == 5
    assert "reward model full (2, the smallest of 2)" in known[4], "the search may have ended too soon"
    monkeypatch.setitem(FIGURES, "r4", 0.48)
    found = drive(pe_rlhf.plan(SETTINGS), Known(tmp_path / "b")).verdicts
    assert "are not shown to be above chance" in found[4]
    assert not any("below their anchor" in said for said in found), "48 to 50 of three seeds is no fall from 50"
    monkeypatch.setitem(FIGURES, "r4", 0.40)
    found = drive(pe_rlhf.plan(SETTINGS), Known(tmp_path / "c")).verdicts
    assert found[5] == "tiny: policies are below their anchor in 4."


def test_rates_in_the_middle_of_what_was_tried_are_no_edge(tmp_path: Path) -> None:
    wide = {"rm_lrs": (1, 2, 3), "rm_full_lrs": (1, 2, 3), "ppo_lrs": (1, 2, 3), "ppo_full_lrs": (1, 2, 3)}
    found = drive(pe_rlhf.plan(PeRlhfSettings(**{**vars(SETTINGS), **wide})), Known(tmp_path)).verdicts
    assert not any("edge" in said for said in found)


def test_another_reward_than_the_learned_one(tmp_path: Path) -> None:
    rewards = set()

    class Rewards(Known):
        def outcome(self, cell: Any) -> Outcome:
            words = list(cell.arguments)
            if words[1] == "ppo":
                rewards.add(words[words.index("--ppo.reward_model") + 1])
            return super().outcome(cell)

    found = drive(pe_rlhf.plan(PeRlhfSettings(**{**vars(SETTINGS), "reward": "verify"})), Rewards(tmp_path))
    assert rewards == {"verify"}
    assert "policies' reward is verify" in found.tables[0].note


def test_other_files_make_other_cells(tmp_path: Path) -> None:
    model, config = tmp_path / "model", tmp_path / "own.yaml"
    model.mkdir()
    own = PeRlhfSettings(**{**vars(SETTINGS), "config": str(config), "models": (str(model),)})

    def folder(steps: int) -> str:
        config.write_text(f"rm:\n  steps: {steps}\n")
        base._basis.cache_clear()  # as in another process
        return cell(own, "one", "rm", str(model), {"seed": 1}).folder

    (model / "weights").write_text("these")
    first = folder(3)
    assert folder(3) == first
    assert folder(4) != first, "a config that was edited"
    (model / "weights").write_text("others")
    assert folder(3) != first, "a model that was exported anew"


@pytest.mark.parametrize("verb", ["rm", "ppo", "eval"])
def test_options_reach_every_cell(verb: str) -> None:
    """Stages depend on one another's: all on ``sft.adapter``, an evaluation on how long PPO's answers are."""
    options = ("--sft.adapter", "runs/sft", "--ppo.max_new_tokens=4", "--rm.members", "2")
    own = PeRlhfSettings(**{**vars(SETTINGS), "options": options})
    words = list(cell(own, "one", verb, "tiny", {"seed": 1}).arguments)
    assert words[6:] == [*options, "--seed", "1"], "and what the study itself sets comes last"


def test_holes_are_holes(tmp_path: Path) -> None:
    found = drive(pe_rlhf.plan(SETTINGS), Known(tmp_path / "a", missing="ppo-tiny-full"))
    rows = {row[0]: row[1] for row in found.tables[0].rows}
    assert (rows["RL, full"], rows["RL, LoRA"], rows["RL memory, LoRA / full"]) == ("-", "83.0 ± 1.0", "-")
    assert "too few finished runs" in found.verdicts[2]
    nothing = drive(pe_rlhf.plan(SETTINGS), Known(tmp_path / "b", missing="rm-"))
    assert {cell for row in nothing.tables[1].rows[:1] for cell in row[1:]} == {"-"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["pe-rhlf"], "Did you mean pe-rlhf"),
        (["pe-rlhf"], "needs --task"),
        (["pe-rlhf", "--task", "nothing"], "no task or command 'nothing'"),
        (["pe-rlhf", "--task", "vqa", "--rank", "1"], "no setting rank. Nearest: ranks"),
        (["pe-rlhf", "--task", "vqa", "--ranks", "1,two"], "ranks is"),
        (["pe-rlhf", "--task", "vqa", "--rm_lrs", "1"], "searched equally"),
        (["pe-rlhf", "--task", "vqa", "--parallel", "many"], "--parallel is 'many'"),
        (["pe-rlhf", "--task", "vqa", "--seeds"], "--seeds needs a value"),
    ],
)
def test_arguments_that_are_not_understood(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", *argv]) in (1, 2)
    assert said in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 0
    assert main(["study", "pe-rlhf", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--ranks" in said
    assert all(name in said for name in STUDIES)
