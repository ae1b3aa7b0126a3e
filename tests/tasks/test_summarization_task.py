"""The summarization task: generated records, judgement, configuration, and what importing it costs."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from perl_vlm.errors import PerlVlmError
from perl_vlm.testing import check_task
from perl_vlm.types import SPLITS, Example, Message
from perl_vlm_summarization import Summarization, SummarizationConfig
from perl_vlm_summarization.documents import Document, cut, document_of
from perl_vlm_summarization.generated import COLORS, FLAWS, SHAPES, random_story
from perl_vlm_summarization.metrics import consistency, facts, length_ratio, rouge

SMALL = SummarizationConfig(train_size=60, validation_size=30, test_size=30)


def example(reference: str | None, document: str = "", **metadata: Any) -> Example:
    return Example("a", (Message("user", (document,)),), reference=reference, metadata=metadata, origin="x.jsonl row 3")


def test_the_generated_task_is_sound() -> None:
    check_task(Summarization(SMALL), samples=30)


def test_importing_the_task_imports_nothing_heavy() -> None:
    code = (
        "import sys, perl_vlm_summarization\n"
        "assert 'perl_vlm_summarization.task' not in sys.modules\n"
        "task = perl_vlm_summarization.Summarization()\n"
        "task.examples('train')[0]; task.preferences('train')[0]; task.demonstrations('train')[0]\n"
        "import perl_vlm_summarization.adapters, perl_vlm.testing\n"
        "heavy = ('torch', 'datasets', 'transformers', 'pyarrow', 'numpy', 'nltk', 'rouge_score')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_records_depend_on_nothing_but_their_place() -> None:
    whole, small = Summarization().examples("train"), Summarization(SMALL).examples("train")
    assert (len(whole), len(small)) == (20_000, 60)
    assert whole[59] == small[59] == small[-1]
    assert list(small) == [small[i] for i in range(60)] == small[:]
    assert small[1] != Summarization(SummarizationConfig(data_seed=1)).examples("train")[1]
    with pytest.raises(IndexError):
        small[60]


def test_documents_of_splits_and_of_preferences_are_others() -> None:
    task = Summarization(SMALL)
    groups = [{r.messages for r in read(split)} for split in SPLITS for read in (task.examples, task.preferences)]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 240


def test_a_documents_split_is_a_matter_of_its_things() -> None:
    for split in SPLITS:
        stories = [random_story(random.Random(f"{split}-{i}"), split) for i in range(20)]
        assert {story.split for story in stories} == {split}
        assert {replace(story, things=story.things[::-1], sentences=("other",)).split for story in stories} == {split}


def test_documents_tell_of_what_their_summaries_say() -> None:
    for record in Summarization(SummarizationConfig(train_size=300)).examples("train"):
        told = record.messages[0].text.removeprefix("summarize this article: ")
        assert record.reference == ", ".join(record.metadata["facts"])
        assert record.metadata["kind"] == f"{len(record.metadata['facts'])} things"
        places = []
        for fact in record.metadata["facts"]:
            color, shape = fact.split()
            assert color in COLORS
            assert shape in SHAPES
            places.append(told.index(fact))
        assert places == sorted(places)


def test_rejected_summaries_have_the_flaw_they_name() -> None:
    counts: Counter[str] = Counter()
    added: Counter[bool] = Counter()
    parts: Counter[int] = Counter()
    for pair in Summarization(SummarizationConfig(train_size=300)).preferences("train"):
        flaw, true = pair.metadata["flaw"], pair.metadata["facts"]
        said = pair.rejected.split(", ")
        counts[flaw] += 1
        assert pair.chosen == ", ".join(true)
        if flaw == "omitted":
            assert len(said) == len(true) - 1
            assert set(said) < set(true)
        elif flaw == "added":
            assert said[:-1] == true
            added[said[-1] in true] += 1
        else:
            ((wrong, right),) = [(a, b) for a, b in zip(said, true, strict=True) if a != b]
            assert wrong not in true
            parts[[a == b for a, b in zip(wrong.split(), right.split(), strict=True)].index(False)] += 1
    assert set(counts) == set(FLAWS)
    assert min(counts.values()) > 60
    assert min(added[True], added[False], parts[0], parts[1]) > 25  # said before, invented; in colour, in shape


def test_demonstrations_are_careless_summaries_of_the_examples() -> None:
    task = Summarization(SummarizationConfig(train_size=400))
    examples, shown = task.examples("train"), task.demonstrations("train")
    assert [one.messages for one in shown] == [one.messages for one in examples]
    assert [one.id for one in shown] == [one.id for one in examples]
    right = {
        kind: [a.reference == b.reference for a, b in zip(shown, examples, strict=True) if a.metadata["kind"] == kind]
        for kind in ("2 things", "3 things")
    }
    for kind, values in right.items():
        # Below a half, so that the likeliest summary of who learns from them is a flawed one.
        assert 0.2 < sum(values) / len(values) < 0.5, kind


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("red circle, blue star", 1.0),
        ("Blue star, red circle.", 1.0),
        ("red circle", 2 / 3),
        ("red circle, blue star, red circle", 4 / 5),
        ("red circle, green star", 1 / 2),
        ("red circle top left, blue star", 1 / 2),
        ("red circle blue star", 0.0),
        (" , ", 0.0),
        ("", 0.0),
    ],
)
def test_facts_are_counted_once_each(response: str, score: float) -> None:
    wanted = ["red circle", "blue star"]
    assert facts(wanted, response) == pytest.approx(score)
    known = example("red circle, blue star", facts=wanted)
    assert Summarization().verify(known, response) == pytest.approx(score)
    assert Summarization().evaluate(known, response)["facts"] == pytest.approx(score)


def test_rouge_by_hand() -> None:
    scores = rouge(["the cat sat on the mat"], "the cat lay on a mat")
    assert scores == pytest.approx({"rouge1": 4 / 6, "rouge2": 1 / 5, "rougeL": 4 / 6})
    assert rouge(["cats running"], "cat run")["rougeL"] == 1.0  # stemmed
    assert rouge(["a b c d", "x y"], "x y")["rougeL"] == 1.0  # the nearest reference
    assert rouge(["a b"], "")["rougeL"] == 0.0


def test_summaries_without_latin_letters_are_compared_whole() -> None:
    assert rouge(["猫が座った"], " 猫が座った ")["rougeL"] == 1.0
    assert rouge(["猫が座った"], "犬が座った")["rougeL"] == 0.0
    assert rouge(["猫が座った", "a cat sat"], "猫が座った")["rougeL"] == 1.0
    assert rouge(["猫が座った", "a cat sat"], "a cat sat")["rougeL"] == 1.0


def test_length_ratio_counts_words() -> None:
    assert length_ratio("one, two - three four.", "One two!") == 0.5
    assert length_ratio("one", "") == 0.0
    assert length_ratio("...", "one two") == 2.0


def test_consistency_by_hand() -> None:
    document = "Anna sold the old house in May."
    assert consistency(document, "Anna sold the old house") == 1.0
    # Of four content words three are there, of four neighbours one pair: "the house" is not said side by side.
    assert consistency(document, "Anna sold Ben the house") == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert consistency(document, "Ben") == 0.0
    assert consistency(document, "") == consistency(document, " . ") == 0.0
    assert consistency(document, "the") == 1.0


@pytest.mark.parametrize("style", ["tldr", "chat"])
@pytest.mark.parametrize("kind", ["post", "article", "conversation"])
def test_of_a_prompt_only_the_document_is_a_source(style: Any, kind: Any) -> None:
    document = Document("Anna sold it.\n\nTITLE: none. POST: no", kind, "Old house", "homes")
    (turn,) = document.prompt(style)
    assert document_of(turn.text) == f"Old house\n\n{document.text}"
    assert document_of(Document("Anna sold it.", kind).prompt(style)[0].text) == "Anna sold it."
    about = Example("a", (Message("system", ("Be brief.",)), turn), reference="x")
    for words in ("summarize this article", "a few sentences", "conversation", "post", "subreddit tl dr", "be brief"):
        said = " ".join(word for word in words.split() if word not in document.text.lower())
        assert Summarization().evaluate(about, said)["consistency"] == 0.0
    assert Summarization().evaluate(about, "Anna sold it.")["consistency"] == 1.0
    assert document_of("Say it in short: Anna sold it.") == "Say it in short: Anna sold it."


def test_of_a_generated_prompt_only_the_document_is_a_source() -> None:
    task = Summarization(SMALL)
    for one in task.examples("train"):
        assert one.messages[0].text == f"summarize this article: {document_of(one.messages[0].text)}"
        assert task.evaluate(one, "summarize article")["consistency"] == 0.0


def test_evaluate_gives_every_figure_and_takes_the_nearest_reference() -> None:
    task = Summarization()
    scores = task.evaluate(example("a dog barked", "The dog barked at night.", references=["a dog barked", "x"]), "x")
    assert set(scores) == {"rouge1", "rouge2", "rougeL", "length_ratio", "consistency"}
    assert scores["rougeL"] == 1.0
    assert scores["length_ratio"] == pytest.approx(1 / 3)
    assert scores["consistency"] == 0.0


def test_without_a_reference_there_is_no_verdict() -> None:
    with pytest.raises(PerlVlmError, match=r"x.jsonl row 3 has no reference summary"):
        Summarization().evaluate(example(None), "red")
    assert Summarization(SummarizationConfig(reference_reward="rougeL")).verify(example(None), "red") is None


def test_rouge_is_a_reward_where_it_is_asked_for() -> None:
    known = example("a b c d", references=["a b c d", "e f"])
    assert Summarization().verify(known, "e f") is None
    task = Summarization(SummarizationConfig(reference_reward="rougeL"))
    assert task.verify(known, "e f") == 1.0
    assert task.verify(known, "a b") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0, "One two. Three four! Five six seven"),
        (35, "One two. Three four! Five six seven"),
        (34, "One two. Three four!"),
        (20, "One two. Three four!"),
        (19, "One two. Three"),  # the first sentence ends before the half
        (8, "One two."),
        (7, "One"),
        (2, "On"),
    ],
)
def test_documents_are_cut_after_a_sentence_else_before_a_word(limit: int, expected: str) -> None:
    text = " One two. Three four! Five six seven\n"
    assert cut(text, limit) == expected
    assert not limit or len(cut(text, limit)) <= limit


def test_a_decimal_point_ends_no_sentence() -> None:
    assert cut("It rose by 3.14159 in a year", 14) == "It rose by"


def test_prompt_styles() -> None:
    post = Document("I lost it.", "post", "Help", "pets")
    assert post.prompt("tldr")[0].text == "SUBREDDIT: r/pets\n\nTITLE: Help\n\nPOST: I lost it.\n\nTL;DR:"
    assert post.prompt("chat")[0].text == "Summarize this post in a few sentences.\n\nHelp\n\nI lost it."
    chat = Document("A: hi\nB: hello", "conversation")
    assert chat.prompt("tldr")[0].text == "POST: A: hi\nB: hello\n\nTL;DR:"
    assert chat.prompt("chat")[0].text == "Summarize this conversation in a few sentences.\n\nA: hi\nB: hello"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"source": "local"}, "task.path is not given"),
        ({"source": "hub"}, "task.dataset is not given.*tldr"),
        ({"source": "hub", "format": "qags", "dataset": "x"}, "reads a local folder"),
        ({"max_document_chars": -1}, "max_document_chars is -1"),
        ({"pairs_per_document": -2}, "pairs_per_document is -2"),
        ({"min_gap": 0.0}, "task.min_gap is 0.0; it must be positive"),
        ({"consistent_from": 0.0}, r"must lie in \(0, 1\]"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SummarizationConfig(**settings)


def test_the_comparisons_are_the_hubs_configuration_of_tldr() -> None:
    assert SummarizationConfig(source="hub", format="tldr").dataset_config == "comparisons"
    named = SummarizationConfig(source="hub", dataset="openai/summarize_from_feedback")
    assert named.dataset_config == "comparisons"
    assert SummarizationConfig(source="hub", format="tldr", dataset="me/mirror").dataset_config is None
    assert SummarizationConfig(source="hub", format="tldr", dataset_config="axis").dataset_config == "axis"
