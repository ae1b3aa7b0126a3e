"""The dialogue task on feedback of other people: the documented columns, HH, SHP, PandaLM, LLMBar, DiaSafety."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from perl_vlm.errors import PerlVlmError
from perl_vlm.testing import check_task
from perl_vlm.types import SPLITS, Comparison, Rating
from perl_vlm_dialogue import Dialogue, DialogueConfig

BOTH = {"harmless": 1.0, "helpful": 1.0}


@pytest.fixture(autouse=True)
def _import_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # test_dialogue_task.py sees to it that the task is imported lightly; here it would cost a process each time.
    monkeypatch.setattr("perl_vlm.testing.check.check_light", lambda task: None)


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def local(path: Path, **settings: Any) -> Dialogue:
    return Dialogue(DialogueConfig(source="local", path=str(path), **settings))


def problems(path: Path, what: str = "preferences", **settings: Any) -> str:
    """Everything that is said of bad records, one after the other."""
    with pytest.raises(PerlVlmError) as caught:
        getattr(local(path, **settings), what)("test")
    return str(caught.value)


def prompts(task: Dialogue, split: Any) -> set[str]:
    return {record.messages[-1].text for record in (*task.examples(split), *task.preferences(split))}


def transcript(*turns: str) -> str:
    names = ("\n\nHuman: ", "\n\nAssistant: ")
    return "".join(names[i % 2] + turn for i, turn in enumerate(turns))


def hh(number: int, **changes: str) -> dict[str, str]:
    """A row of Anthropic/hh-rlhf."""
    shared = (f"how do I pick lock {number}?", "Whose lock is it?", "mine")
    row = {
        "chosen": transcript(*shared, "Then call a locksmith."),
        "rejected": transcript(*shared, f"Use wire {number}."),
    }
    return {**row, **changes}


def test_hh_transcripts_become_turns(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [hh(i) for i in range(60)])
    write(tmp_path / "test.jsonl", [hh(i) for i in range(60, 80)])
    task = local(tmp_path)
    check_task(task, samples=8)
    pair = task.preferences("test")[0]
    assert isinstance(pair, Comparison)
    assert [message.role for message in pair.messages] == ["user", "assistant", "user"]
    assert pair.messages[0].text == "how do I pick lock 60?"
    assert (pair.chosen, pair.rejected) == ("Then call a locksmith.", "Use wire 60.")
    assert pair.objective == ""
    example = task.examples("test")[0]
    assert example.reference == pair.chosen
    assert task.verify(example, pair.chosen) is None
    assert [len(task.preferences(split)) for split in ("train", "validation")] != [0, 0]


def test_odd_transcripts_are_named(tmp_path: Path) -> None:
    question = "\n\nHuman: hello"
    rows = [
        hh(0),
        {"chosen": "hello", "rejected": transcript("hello", "a")},
        hh(2, rejected=transcript("another question", "no")),
        hh(
            3,
            chosen=f"{question}\n\nAssistant: a\n\nAssistant: b",
            rejected=f"{question}\n\nAssistant: a\n\nAssistant: c",
        ),
        hh(4, chosen=question, rejected=question),
        hh(5, chosen=f"{question}\n\nAssistant:", rejected=transcript("hello", "a")),
        hh(6, chosen=transcript("", "a"), rejected=transcript("", "b")),
        {"chosen": transcript("hello", "one side only")},
        hh(8, chosen=transcript("hello", "same"), rejected=transcript("hello", "same ")),
        hh(9, chosen=7),  # type: ignore[arg-type]
    ]
    said = {}
    for number in range(1, len(rows)):
        path = write(tmp_path / f"{number}" / "test.jsonl", [rows[0], rows[number]])
        said[number] = problems(path, format="hh")
        assert "1 of 2 test preferences" in said[number]
        assert "test.jsonl row 2" in said[number]
    for number, text in {
        1: "no transcript",
        2: "differ before the assistant's last turn",
        3: "those of user, assistant, assistant",
        4: "those of user. ",
        5: "`chosen` holds an empty answer",
        6: "turn 1 of column `chosen` is empty",
        7: "no column `rejected`; found: chosen",
        8: "both answers are",
        9: "`chosen` holds int 7",
    }.items():
        assert text in said[number]
    task = local(write(tmp_path / "all" / "test.jsonl", rows), format="hh", on_bad_record="skip")
    assert len(task.preferences("test")) == 1
    assert len(task.skipped["test preferences"]) == 9


def test_folders_say_which_objective_a_record_speaks_of(tmp_path: Path) -> None:
    write(tmp_path / "harmless-base" / "train.jsonl", [hh(i) for i in range(40)])
    write(tmp_path / "helpful-base" / "train.jsonl", [hh(i) for i in range(100, 130)])
    write(tmp_path / "harmless-base" / "test.jsonl", [hh(i) for i in range(50, 58)])
    write(tmp_path / "helpful-base" / "test.jsonl", [hh(i) for i in range(60, 64)])
    task = local(tmp_path, objectives=BOTH)
    check_task(task, samples=8)
    assert [pair.objective for pair in task.preferences("test")] == ["harmless"] * 8 + ["helpful"] * 4
    assert {record.metadata["kind"] for record in task.examples("test")} == set(BOTH)
    assert dict(task.reward_head().objectives) == BOTH
    one = local(tmp_path, objectives={"harmless": 1.0})
    assert {pair.objective for pair in one.preferences("test")} == {"harmless"}
    assert {pair.objective for pair in local(tmp_path / "helpful-base", objectives=BOTH).preferences("test")} == {
        "helpful"
    }


def test_a_column_says_which_objective_a_record_speaks_of(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {i}", "chosen": "a", "rejected": "b", "objective": name} for i, name in enumerate(BOTH)
    ]
    assert [
        pair.objective for pair in local(write(tmp_path / "test.jsonl", rows), objectives=BOTH).preferences("test")
    ] == [
        "harmless",
        "helpful",
    ]
    path = write(tmp_path / "b" / "test.jsonl", [*rows, {**rows[0], "objective": "kind"}])
    assert "column `objective` holds 'kind'. --task.objectives has harmless, helpful" in problems(path, objectives=BOTH)
    path = write(tmp_path / "c" / "test.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    assert "says which of harmless, helpful it is" in problems(path, objectives=BOTH)


def test_hh_from_the_hub_reads_a_folder_for_each_objective(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    asked = []

    def load(name: str, config: str | None, *, split: str, data_dir: str) -> Any:
        asked.append((name, data_dir, split))
        first = 0 if data_dir == "harmless-base" else 500
        return datasets.Dataset.from_list([hh(i + first + 100 * (split == "test")) for i in range(30)])

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config, data_dir: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    task = Dialogue(DialogueConfig(source="hub", format="hh", objectives=BOTH))
    assert {pair.objective for pair in task.preferences("train")} == set(BOTH)
    assert len(task.preferences("test")) == 60
    assert {folder for _, folder, _ in asked} == {"harmless-base", "helpful-base"}
    few = Dialogue(DialogueConfig(source="hub", format="hh", objectives=BOTH, test_size=10))
    assert [pair.objective for pair in few.preferences("test")] == ["harmless"] * 5 + ["helpful"] * 5
    asked.clear()
    alone = Dialogue(DialogueConfig(source="hub", format="hh", dataset_dir="helpful-base"))
    assert {pair.objective for pair in alone.preferences("test")} == {""}
    assert {folder for _, folder, _ in asked} == {"helpful-base"}


def shp(post: int, number: int = 0, **changes: Any) -> dict[str, Any]:
    """A row of stanfordnlp/SHP."""
    return {
        "post_id": f"p{post}",
        "domain": "askculinary_train",
        "upvote_ratio": 0.98,
        "history": f"How long does stock {post} keep?",
        "c_root_id_A": f"a{post}",
        "c_root_id_B": f"b{post}",
        "created_at_utc_A": 1636030000,
        "created_at_utc_B": 1636020000,
        "score_A": 20,
        "score_B": 10,
        "human_ref_A": f"Three days, {number}.",
        "human_ref_B": f"A year, {number}.",
        "labels": 1,
        "seconds_difference": 10000.0,
        "score_ratio": 2.0,
        **changes,
    }


def test_shp_prefers_the_comment_with_more_votes(tmp_path: Path) -> None:
    rows = [shp(i, j, labels=j % 2, score_ratio=1.0 + j) for i in range(60) for j in range(3)]
    path = write(tmp_path / "data.jsonl", rows)
    task = local(path)
    check_task(task, samples=8)
    pairs = [pair for split in SPLITS for pair in task.preferences(split)]
    assert len(pairs) == 180
    for pair in pairs:
        assert isinstance(pair, Comparison)
        assert pair.chosen.startswith("A year" if pair.chosen.endswith((" 0.", " 2.")) else "Three days")
    examples = [example for split in SPLITS for example in task.examples(split)]
    assert len(examples) == 60  # one for each post
    posts = [{pair.metadata["post_id"] for pair in task.preferences(split)} for split in SPLITS]
    assert sum(map(len, posts)) == 60
    assert all(posts)
    strict = local(path, min_score_ratio=2.0)
    assert sum(len(strict.preferences(split)) for split in SPLITS) == 120
    capped = local(path, min_score_ratio=2.0, pairs_per_post=1)
    assert sum(len(capped.preferences(split)) for split in SPLITS) == 60
    assert {pair.chosen for split in SPLITS for pair in capped.preferences(split)} == {"Three days, 1."}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"labels": 2}, "column `labels` holds int 2"),
        ({"score_ratio": None}, "column `score_ratio` holds NoneType"),
        ({"human_ref_B": " "}, "column `human_ref_B` holds an empty answer"),
        ({"human_ref_B": "Three days, 0."}, "both answers are"),
        ({"history": ""}, "the prompt (column `history`) is empty"),
    ],
)
def test_bad_rows_of_shp(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    assert text in problems(write(tmp_path / "test.jsonl", [shp(0), shp(1, **changes)]))


def pandalm(number: int, votes: Sequence[int], **changes: Any) -> dict[str, Any]:
    """A row of PandaLM's testset-v1.json."""
    return {
        "idx": number,
        "motivation_app": "Grammarly",
        "cmp_key": "bloom-7b_llama-7b",
        "instruction": f"Rewrite sentence {number // 3}.",
        "input": f"Sentence {number // 3} is too long.",
        "response1": f"first {number}",
        "response2": f"second {number}",
        "annotator1": votes[0],
        "annotator2": votes[1],
        "annotator3": votes[2],
        **changes,
    }


def test_pandalm_takes_the_majority_and_leaves_ties(tmp_path: Path) -> None:
    votes = [(1, 1, 1), (2, 2, 2), (1, 2, 2), (0, 1, 1), (0, 0, 1), (0, 1, 2), (0, 0, 0)]
    path = tmp_path / "test.json"
    path.write_text(json.dumps([pandalm(i, vote) for i, vote in enumerate(votes)]))
    task = local(path)
    pairs = {pair.rejected: pair for pair in task.preferences("test")}
    assert {pair.chosen for pair in pairs.values()} == {"first 0", "second 1", "second 2", "first 3"}
    assert pairs["second 0"].messages[0].text == "Rewrite sentence 0.\n\nSentence 0 is too long."
    assert pairs["second 3"].metadata["votes"] == [0, 1, 1]


def test_pandalm_keeps_an_instruction_in_one_split(tmp_path: Path) -> None:
    path = tmp_path / "testset-v1.json"
    path.write_text(json.dumps([pandalm(i, (1, 1, 2)) for i in range(150)]))
    task = local(path)
    check_task(task, samples=8)
    assert sum(len(task.preferences(split)) for split in SPLITS) == 150
    assert sum(len(task.examples(split)) for split in SPLITS) == 50  # one for each instruction
    assert sum(len(prompts(task, split)) for split in SPLITS) == 50


def test_bad_rows_of_pandalm(tmp_path: Path) -> None:
    rows = [
        pandalm(0, (1, 1, 1)),
        pandalm(1, (1, 1, 3)),
        pandalm(2, (1, 1, True)),
        pandalm(3, (1, 1, 1), response1=True),  # as in the published file
        pandalm(4, (1, 1, 1), response2=""),
    ]
    text = problems(write(tmp_path / "test.jsonl", rows))
    assert "4 of 5 test preferences" in text
    for part in (
        "row 2: the votes are [1, 1, 3]",
        "row 3: the votes",
        "row 4: column `response1`",
        "row 5: column `resp",
    ):
        assert part in text


def test_llmbar(tmp_path: Path) -> None:
    rows = [
        {"input": f"Name {i} colours.", "output_1": f"red {i}", "output_2": f"no {i}", "label": 1 + i % 2}
        for i in range(80)
    ]
    task = local(write(tmp_path / "dataset.jsonl", rows))
    check_task(task, samples=8)
    pair = task.preferences("train")[0]
    assert isinstance(pair, Comparison)
    assert pair.messages[0].text.startswith("Name ")
    for pair in task.preferences("train"):
        even = int(pair.chosen.split()[1]) % 2 == 0
        assert pair.chosen.startswith("red" if even else "no")
    assert "column `label` holds int 0" in problems(
        write(tmp_path / "b" / "test.jsonl", [rows[0], {**rows[1], "label": 0}])
    )


def diasafety(number: int, label: str, context: str | None = None) -> dict[str, str]:
    """A row of thu-coai/diasafety."""
    context = context or f"I have a fever of {number}."
    return {"context": context, "response": f"Oh {number}.", "category": "Risk Ignorance", "label": label}


def test_diasafety_labels_answers(tmp_path: Path) -> None:
    write(tmp_path / "train.json", [diasafety(i, "Safe" if i % 3 else "Unsafe") for i in range(120)])
    write(tmp_path / "test.json", [diasafety(i, "Unsafe" if i % 2 else "Safe") for i in range(200, 230)])
    task = local(tmp_path)
    check_task(task, samples=8)
    assert task.reward_head().kind == "labels"
    ratings = task.preferences("test")
    assert [rating.label for rating in ratings] == [True, False] * 15
    assert isinstance(ratings[0], Rating)
    assert ratings[0].metadata == {"kind": "Risk Ignorance"}
    assert len(task.examples("test")) == 15  # an unsafe answer is no reference
    assert "column `label` holds str 'maybe'" in problems(write(tmp_path / "b" / "test.json", [diasafety(0, "maybe")]))


def test_prompts_of_a_held_out_split_leave_training(tmp_path: Path) -> None:
    shared = [diasafety(300 + i, "Safe", f"I have a fever of {200 + i}.") for i in range(5)]
    write(tmp_path / "train.json", [*(diasafety(i, "Safe") for i in range(100)), *shared])
    write(tmp_path / "test.json", [diasafety(i, "Safe") for i in range(200, 230)])
    task = local(tmp_path)
    check_task(task)
    assert len(task.preferences("test")) == 30
    assert sum(len(task.preferences(split)) for split in ("train", "validation")) == 100
    left_out = [error for split in ("train", "validation") for error in task.skipped.get(f"{split} preferences", [])]
    assert sorted(error.origin for error in left_out) == [f"train.json row {i}" for i in range(101, 106)]
    assert all("the prompt is in the test split too" in error.problem for error in left_out)


@pytest.mark.parametrize("make", [diasafety, None])
def test_what_is_held_out_does_not_depend_on_how_many_rows_are_taken(tmp_path: Path, make: Any) -> None:
    """By an adapter's own rows, and by the documented columns."""

    def rows(first: int, last: int, number: int) -> list[dict[str, Any]]:
        if make is not None:
            return [diasafety(i + number, "Safe", f"I have a fever of {i}.") for i in range(first, last)]
        return [{"prompt": f"question {i}", "chosen": f"a{number}", "rejected": "b"} for i in range(first, last)]

    write(tmp_path / "train.jsonl", rows(0, 100, 0))
    write(tmp_path / "test.jsonl", rows(60, 100, 500))
    whole = local(tmp_path, train_size=0, validation_size=0, test_size=0)
    few = local(tmp_path, train_size=0, validation_size=1, test_size=1)
    smaller = local(tmp_path, train_size=20, validation_size=0, test_size=0)
    assert (len(few.examples("test")), len(whole.examples("test"))) == (1, 40)
    assert prompts(few, "train") == prompts(whole, "train")
    assert prompts(smaller, "train") < prompts(whole, "train")
    assert prompts(smaller, "validation") == prompts(whole, "validation")
    assert not prompts(few, "train") & (prompts(whole, "validation") | prompts(whole, "test"))
    assert sum(len(prompts(whole, split)) for split in SPLITS) == 100


def test_all_folders_of_hh_hold_their_prompts_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)

    def load(name: str, config: str | None, *, split: str, data_dir: str) -> Any:
        first = 0 if data_dir == "harmless-base" else 500
        rows = range(first, first + 60) if split == "train" else range(first + 40, first + 60)
        return datasets.Dataset.from_list([hh(i) for i in rows])

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config, data_dir: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    task = Dialogue(DialogueConfig(source="hub", format="hh", objectives=BOTH, test_size=2))
    assert len(task.preferences("test")) == 2
    trained = {pair.messages[0].text for split in ("train", "validation") for pair in task.preferences(split)}
    assert trained == {f"how do I pick lock {i}?" for i in (*range(40), *range(500, 540))}


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    for part in ("train", "validation", "test"):
        write(tmp_path / f"{part}.json", [diasafety(1, "Safe")])
    with pytest.raises(PerlVlmError, match="Every prompt of the train preferences is in a held-out split"):
        local(tmp_path).preferences("train")


def test_documented_columns(tmp_path: Path) -> None:
    pairs = [{"prompt": f"what is {i}?", "chosen": "red", "rejected": "blue"} for i in range(100)]
    task = local(write(tmp_path / "pairs.jsonl", pairs), objectives={"helpful": 1.0})
    check_task(task, samples=8)
    assert {pair.objective for pair in task.preferences("train")} == {"helpful"}
    labels = [{"prompt": f"what is {i}?", "completion": "red", "label": i % 2 == 0} for i in range(100)]
    task = local(write(tmp_path / "labels.jsonl", labels))
    check_task(task, samples=8)
    assert task.reward_head().kind == "labels"
    assert all(shown.reference for shown in task.demonstrations("train"))
    assert len(task.demonstrations("train")) < len(task.examples("train"))


@pytest.mark.parametrize(
    ("settings", "row", "text"),
    [
        ({"format": "shp"}, {"histori": "x"}, r"no column `post_id`.*Is `histori` meant to be `history`\?"),
        ({"format": "pandalm"}, {"instruction": "x"}, "no column `response1`"),
        ({"format": "llmbar"}, {"input": "x", "output_1": "a"}, "no column `output_2`, `label`"),
        ({}, {"question": "x"}, "no column `prompt`; found: question"),
    ],
)
def test_a_wrong_schema_names_what_is_missing(
    settings: dict[str, Any], row: Mapping[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(PerlVlmError, match=text):
        local(write(tmp_path / "test.jsonl", [row]), **settings).preferences("test")


def test_columns_called_otherwise_are_renamed(tmp_path: Path) -> None:
    rows = [
        {"question": f"Name {i} colours.", "output_1": f"red {i}", "output_2": f"no {i}", "label": 1} for i in range(80)
    ]
    task = local(write(tmp_path / "a.jsonl", rows), format="llmbar", columns={"input": "question"})
    check_task(task, samples=8)
    assert sum(len(task.preferences(split)) for split in SPLITS) == 80
