"""TruthfulQA: MC1 and MC2 by hand and their invariants, its three schemas, its splits, and pairs of answers."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl_vlm.errors import PerlVlmError
from perl_vlm.testing import check_task
from perl_vlm.types import SPLITS, Example
from perl_vlm_instructions import Instructions, InstructionsConfig
from perl_vlm_instructions.overlap import near_groups
from perl_vlm_instructions.truthfulqa import mc_scores

LOG = math.log
COLUMNS = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]


@pytest.mark.parametrize(
    ("labels", "best", "logprobs", "mc1", "mc2"),
    [
        # probabilities 0.5, 0.1 | 0.3, 0.1
        ([1, 1, 0, 0], 0, [LOG(0.5), LOG(0.1), LOG(0.3), LOG(0.1)], 1, 0.6),
        # another true answer is the likeliest: MC2 sees it, MC1 does not
        ([1, 1, 0, 0], 1, [LOG(0.5), LOG(0.1), LOG(0.3), LOG(0.1)], 0, 0.6),
        # a tie with a false answer is no win
        ([1, 0], 0, [LOG(0.2), LOG(0.2)], 0, 0.5),
        ([1, 0], 0, [0.0, -math.inf], 1, 1.0),
        ([1, 0], 0, [-math.inf, -3.0], 0, 0.0),
        # so improbable that each probability alone is 0 in floating point
        ([1, 0], 0, [-1000.0, -1000.0 - LOG(3)], 1, 0.75),
        # the third is none of MC2's
        ([1, 0, None], 0, [LOG(0.2), LOG(0.1), LOG(0.7)], 1, 2 / 3),
    ],
)
def test_mc_scores_by_hand(labels: list[int | None], best: int, logprobs: list[float], mc1: int, mc2: float) -> None:
    false = [place for place, label in enumerate(labels) if label == 0]
    assert mc_scores(labels, best, false, logprobs) == pytest.approx({"mc1": mc1, "mc2": mc2})


def test_mc1_has_false_answers_of_its_own() -> None:
    logprobs = [LOG(0.2), LOG(0.1), LOG(0.7)]
    assert mc_scores([1, 0, None], 0, [1, 2], logprobs)["mc1"] == 0
    assert mc_scores([1, 0, None], 0, [1], logprobs)["mc1"] == 1


QUESTIONS = st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(
    lambda sizes: st.tuples(
        st.just(sizes),
        st.lists(st.floats(-80, 0), min_size=sum(sizes), max_size=sum(sizes)),
        st.integers(0, sizes[0] - 1),
    )
)


def judged(question: tuple[tuple[int, int], list[float], int]) -> dict[str, float]:
    (true, false), logprobs, best = question
    return mc_scores([1] * true + [0] * false, best, range(true, true + false), logprobs)


@given(QUESTIONS)
def test_mc2_agrees_with_the_plain_sum_and_mc1_with_the_plain_maximum(question: Any) -> None:
    (true, false), logprobs, best = question
    found = judged(question)
    mass = [math.exp(logprob) for logprob in logprobs]
    assert found["mc2"] == pytest.approx(sum(mass[:true]) / sum(mass), abs=1e-9)
    assert found["mc1"] == float(all(logprobs[best] > logprobs[true + i] for i in range(false)))
    assert 0 <= found["mc2"] <= 1


@given(QUESTIONS, st.floats(-50, 50))
def test_scores_do_not_depend_on_a_shift_common_to_all(question: Any, shift: float) -> None:
    sizes, logprobs, best = question
    moved = judged((sizes, [round(logprob, 3) + round(shift, 3) for logprob in logprobs], best))
    assert moved["mc2"] == pytest.approx(judged((sizes, [round(x, 3) for x in logprobs], best))["mc2"], abs=1e-9)


@given(QUESTIONS, st.floats(0.01, 5))
def test_a_likelier_false_answer_never_helps(question: Any, more: float) -> None:
    (true, false), logprobs, best = question
    worse = judged(((true, false), [*logprobs[:-1], logprobs[-1] + more], best))
    found = judged(question)
    assert worse["mc2"] <= found["mc2"] + 1e-12
    assert worse["mc1"] <= found["mc1"]


@given(QUESTIONS, st.randoms())
def test_the_order_of_the_choices_does_not_matter(question: Any, random: Any) -> None:
    (true, false), logprobs, best = question
    order = list(range(true + false))
    random.shuffle(order)
    labels = [1 if place < true else 0 for place in order]
    wrong = [place for place, label in enumerate(labels) if label == 0]
    found = mc_scores(labels, order.index(best), wrong, [logprobs[place] for place in order])
    assert found == pytest.approx(judged(question))


@pytest.mark.parametrize(
    ("logprobs", "wrong"),
    [
        ([-1.0], "1 log-probs were given for 2 choices"),
        ([-1.0, math.nan], "no probabilities"),
        ([math.inf, -1.0], "no probabilities"),
        ([-math.inf, -math.inf], "no probabilities"),
    ],
)
def test_log_probs_that_cannot_be(logprobs: list[float], wrong: str) -> None:
    with pytest.raises(PerlVlmError, match=wrong):
        mc_scores([1, 0], 0, [1], logprobs)


def unlike(number: int) -> str:
    """A question that shares few words with others."""
    letters = hashlib.sha256(str(number).encode()).hexdigest()
    return f"Why {' '.join(letters[place : place + 4] for place in range(0, 20, 4))}?"


def row(number: int, **changes: str) -> dict[str, str]:
    return {
        "Type": "Adversarial" if number % 2 else "Non-Adversarial",
        "Category": "Misconceptions",
        "Question": f"What is number {number}?",
        "Best Answer": f"Number {number} is a number",
        "Correct Answers": f"It is {number}; Number {number} is a number;",
        "Incorrect Answers": f"It is not {number}; Number {number} is a cat; Nobody knows",
        "Source": "https://example.org/a,b",
    } | changes


def write_csv(folder: Path, rows: list[dict[str, str]], name: str = "TruthfulQA.csv") -> Path:
    with (folder / name).open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return folder


def local(path: Path, **settings: Any) -> Instructions:
    return Instructions(InstructionsConfig(source="local", path=str(path), **settings))


def test_the_csv_is_recognised_and_sound(tmp_path: Path) -> None:
    task = local(write_csv(tmp_path, [row(i, Question=unlike(i)) for i in range(120)]))
    check_task(task, samples=12)
    sizes = {split: len(task.examples(split)) for split in SPLITS}
    assert sum(sizes.values()) == 120
    assert sizes["train"] > 80
    assert min(sizes.values()) > 3


def test_a_question_of_the_csv(tmp_path: Path) -> None:
    task = local(write_csv(tmp_path, [row(i) for i in range(4)]), benchmark=True)
    example = task.examples("test")[3]
    assert example.messages[0].text == "What is number 3?"
    assert example.reference == "Number 3 is a number."
    assert example.choices == (
        "It is 3.", "Number 3 is a number.", "It is not 3.", "Number 3 is a cat.", "Nobody knows.",
    )  # fmt: skip
    assert example.metadata["labels"] == [1, 1, 0, 0, 0]
    assert (example.metadata["best"], example.metadata["mc1_false"]) == (1, [2, 3, 4])
    assert (example.metadata["kind"], example.metadata["category"]) == ("adversarial", "Misconceptions")
    json.dumps(dict(example.metadata))


def test_choices_are_judged_by_mc1_and_answers_by_the_nearest(tmp_path: Path) -> None:
    task = local(write_csv(tmp_path, [row(3)]), benchmark=True)
    example = task.examples("test")[0]
    assert task.judge_choices(example, [-1.0, -2.0, -3.0, -3.0, -3.0])["score"] == 1.0
    found = task.judge_choices(example, [-1.0, -3.0, -2.0, -3.0, -3.0])
    assert (found["score"], found["mc1"]) == (0.0, 0.0)
    assert found["mc2"] == pytest.approx(
        (math.exp(-1) + math.exp(-3)) / (math.exp(-1) + math.exp(-2) + 3 * math.exp(-3))
    )
    assert task.evaluate(example, "It is the 3") == {"score": 1.0, "rouge_l_acc": 1.0}
    assert task.evaluate(example, "Number 3 is really a cat")["score"] == 0.0
    assert task.evaluate(example, "I have no comment.")["score"] == 1.0
    assert task.evaluate(example, "")["score"] == 0.0
    assert task.verify(example, "It is 3") is None


def test_every_false_answer_is_rejected_once_the_best_true_one_first(tmp_path: Path) -> None:
    pairs = local(write_csv(tmp_path, [row(3)]), benchmark=True).preferences("test")
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        ("Number 3 is a number.", "It is not 3."),
        ("It is 3.", "Number 3 is a cat."),
        ("Number 3 is a number.", "Nobody knows."),
    ]


def test_what_is_listed_among_both_is_no_pair(tmp_path: Path) -> None:
    both = row(3, **{"Correct Answers": "Unknown", "Incorrect Answers": "unknown; A cat", "Best Answer": "It is 3"})
    task = local(write_csv(tmp_path, [both]), benchmark=True)
    assert [pair.rejected for pair in task.preferences("test")] == ["A cat."]
    assert task.examples("test")[0].choices == ("It is 3.", "Unknown.", "unknown.", "A cat.")
    check_task(task, splits=("test",))


def test_every_answer_is_closed_with_one_period(tmp_path: Path) -> None:
    """As the published evaluation formats them, whatever the CSV has; else the period alone tells answers apart."""
    changes = {
        "Best Answer": "It is so. ",
        "Correct Answers": "It is so.; Really?;; It may be ",
        "Incorrect Answers": 'No.;Never; "Not at all"',
    }
    example = local(write_csv(tmp_path, [row(1, **changes)]), benchmark=True).examples("test")[0]
    assert example.choices == ("It is so.", "Really?.", "It may be.", "No.", "Never.", '"Not at all".')
    assert (example.reference, example.metadata["best"]) == ("It is so.", 0)


def test_near_relatives_are_in_one_split(tmp_path: Path) -> None:
    """What is learned of one would answer the other."""
    places = ("Scotland", "Northern Ireland", "Wales", "Cornwall")
    rows = [
        row(4 * i + n, Question=f"{unlike(i).rstrip('?')} in {place}?")
        for i in range(60)
        for n, place in enumerate(places)
    ]
    task = local(write_csv(tmp_path, rows))
    splits: dict[str, set[str]] = {}
    for split in SPLITS:
        for record in (*task.examples(split), *task.preferences(split)):
            splits.setdefault(record.messages[0].text.partition(" in ")[0], set()).add(split)
    assert len(splits) == 60
    assert {len(found) for found in splits.values()} == {1}
    assert set.union(*splits.values()) == set(SPLITS)


def test_near_groups_by_hand() -> None:
    texts = ["b c d e", "a b c d", "c d e f", "x y", "x Y", "z"]
    # Of five words a-e three are shared, of b-f too; a-d and c-f share two of six, and meet in the third.
    assert near_groups(texts) == [["a b c d", "b c d e", "c d e f"], ["x Y", "x y"], ["z"]]
    assert near_groups(texts, threshold=0.7) == [["a b c d"], ["b c d e"], ["c d e f"], ["x Y", "x y"], ["z"]]


def test_the_question_alone_decides_on_the_split(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    asks = [unlike(i) for i in range(60)]
    one = local(write_csv(tmp_path / "a", [row(i, Question=asks[i]) for i in range(60)]), train_size=5)
    changed = {"Best Answer": "It is so"}
    other = local(write_csv(tmp_path / "b", [row(i, Question=asks[i], **changed) for i in range(60)][::-1]))
    everything = {example.messages[0].text for example in other.examples("train")}
    assert {example.messages[0].text for example in one.examples("train")} < everything
    for split in ("validation", "test"):
        asked = {example.messages[0].text for example in one.examples(split)}
        assert asked == {example.messages[0].text for example in other.examples(split)}
        assert asked == {pair.messages[0].text for pair in one.preferences(split)}


def test_a_benchmark_tests_on_everything_and_trains_on_nothing(tmp_path: Path) -> None:
    task = local(write_csv(tmp_path, [row(i) for i in range(30)]), benchmark=True)
    asked = [example.messages[0].text for example in task.examples("test")]
    assert sorted(asked) == sorted(f"What is number {i}?" for i in range(30))
    assert len(local(tmp_path, benchmark=True, test_size=7).examples("test")) == 7
    for split in ("train", "validation"):
        with pytest.raises(PerlVlmError, match=f"there are no {split} records. Pass --task.benchmark false"):
            task.preferences(split)


def hub_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "question": unlike(i),
            "mc1_targets": {"choices": [f"Number {i}", "A cat", "A dog"], "labels": [1, 0, 0]},
            "mc2_targets": {"choices": [f"Number {i}", f"It is {i}", "A cat"], "labels": [1, 1, 0]},
        }
        for i in range(count)
    ]


def test_the_multiple_choice_columns_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, hub_rows(3))))
    task = local(tmp_path, benchmark=True)
    example = task.examples("test")[0]
    assert example.choices == ("Number 0", "It is 0", "A cat", "A dog")
    assert example.metadata["labels"] == [1, 1, 0, None]
    assert (example.metadata["best"], example.metadata["mc1_false"]) == (0, [2, 3])
    assert "kind" not in example.metadata
    assert task.judge_choices(example, [-2.0, -9.0, -3.0, -1.0])["mc1"] == 0.0
    check_task(task, splits=("test",))


def test_the_generation_columns_of_the_hub(tmp_path: Path) -> None:
    rows = [
        {
            "type": "Adversarial", "category": "Law", "question": f"What is {i}?", "best_answer": f"It is {i}",
            "correct_answers": [f"It is {i}", f"{i} it is"], "incorrect_answers": ["A cat"], "source": "x",
        }
        for i in range(3)
    ]  # fmt: skip
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    example = local(tmp_path, benchmark=True).examples("test")[2]
    assert example.choices == ("It is 2.", "2 it is.", "A cat.")
    assert (example.metadata["kind"], example.metadata["best"]) == ("adversarial", 0)


def test_the_hub_with_its_one_split_serves_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    seen: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, split: str) -> Any:
        seen.append((name, config, split))
        return datasets.Dataset.from_list(hub_rows(80))

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["validation"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    task = Instructions(InstructionsConfig(source="hub", format="truthfulqa"))
    sizes = [len(task.examples(split)) for split in SPLITS]
    assert sum(sizes) == 80
    assert min(sizes) > 0
    assert set(seen) == {("truthfulqa/truthful_qa", "multiple_choice", "validation")}


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        ([row(1, **{"Incorrect Answers": " ; "})], "row 1: the question has no false answer"),
        ([row(1, **{"Best Answer": ""})], "column `Best Answer` holds NoneType"),
        ([row(1), row(2, Question="")], "row 2: column `Question` holds NoneType"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict[str, str]], wrong: str) -> None:
    with pytest.raises(PerlVlmError, match=wrong):
        local(write_csv(tmp_path, rows), benchmark=True).examples("test")


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"mc2_targets": {"choices": ["a"], "labels": [1, 0]}}, r"mc2_targets` holds dict.*of equal length"),
        ({"mc2_targets": {"choices": ["a", "b"], "labels": [1, 2]}}, "labels 1 and 0"),
        ({"mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "labels 2 choices as right. MC1 has exactly one"),
        ({"mc1_targets": None}, "mc1_targets` holds NoneType"),
        ({"question": 3}, "column `question` holds int 3"),
    ],
)
def test_bad_targets_are_named(tmp_path: Path, change: dict[str, Any], wrong: str) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(hub_rows(1)[0] | change))
    with pytest.raises(PerlVlmError, match=wrong):
        local(tmp_path, format="truthfulqa", benchmark=True).examples("test")


def test_a_missing_column_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"Questions": "why?"}))
    with pytest.raises(PerlVlmError, match=r"no column `Question`.*--task.columns '\{Question: Questions\}'"):
        local(tmp_path, format="truthfulqa", benchmark=True).examples("test")


def as_judged(task: Instructions, example: Example) -> dict[str, float]:
    """What a model does that gives every choice the same log-prob."""
    return task.judge_choices(example, [-1.0] * len(example.choices))


@pytest.mark.data
def test_the_real_questions(data_root: Path) -> None:
    task = local(data_root / "instructions" / "truthfulqa", benchmark=True)
    examples = task.examples("test")
    assert len(examples) == 817
    assert all(example.choices[example.metadata["best"]] == example.reference for example in examples)
    assert all(choice.endswith(".") for example in examples for choice in example.choices)
    assert all(task.evaluate(example, example.reference or "")["score"] == 1.0 for example in examples)
    assert sum(as_judged(task, example)["mc1"] for example in examples) == 0
    shares = [as_judged(task, example)["mc2"] for example in examples]
    assert sum(shares) / 817 == pytest.approx(
        sum(example.metadata["labels"].count(1) / len(example.choices) for example in examples) / 817
    )
    task = local(data_root / "instructions" / "truthfulqa")
    check_task(task, samples=24)
    asked = {split: {example.messages[0].text for example in task.examples(split)} for split in SPLITS}
    assert sum(map(len, asked.values())) == 817
    assert min(map(len, asked.values())) > 40
    for group in near_groups(set().union(*asked.values())):
        assert sum(bool(asked[split] & set(group)) for split in SPLITS) == 1
