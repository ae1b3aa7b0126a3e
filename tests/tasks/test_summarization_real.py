"""The summarization task on the real graded summaries and conversations of PERL_VLM_DATA."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from perl_vlm.errors import PerlVlmError
from perl_vlm.testing import check_task
from perl_vlm.types import SPLITS
from perl_vlm_summarization import Summarization, SummarizationConfig
from perl_vlm_summarization.documents import document_of
from perl_vlm_summarization.metrics import consistency

pytestmark = pytest.mark.data


@pytest.fixture(autouse=True)
def _import_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # test_summarization_task.py sees to it that the task is imported lightly; here it would cost a process each time.
    monkeypatch.setattr("perl_vlm.testing.check.check_light", lambda task: None)


def open_set(data_root: Path, name: str, **settings: Any) -> Summarization:
    folder = data_root / "summarization" / name
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}")
    return Summarization(SummarizationConfig(source="local", path=str(folder), **settings))


@pytest.mark.parametrize(
    ("name", "documents", "pairs"),
    [
        ("summeval", {"train": 62, "validation": 8, "test": 15}, {"train": 1457, "validation": 201, "test": 336}),
        ("newsroom", {"train": 38, "validation": 4, "test": 9}, {"train": 275, "validation": 38, "test": 77}),
        ("realsumm", {"train": 63, "validation": 7, "test": 15}, {"train": 2003, "validation": 224, "test": 480}),
    ],
)
def test_the_real_graded_summaries(
    data_root: Path, name: str, documents: dict[str, int], pairs: dict[str, int]
) -> None:
    task = open_set(data_root, name)
    check_task(task, samples=6)
    prompts = {split: {example.messages for example in task.examples(split)} for split in SPLITS}
    assert {split: len(found) for split, found in prompts.items()} == documents
    assert {split: len(task.preferences(split)) for split in SPLITS} == pairs
    for split in SPLITS:
        assert {pair.messages for pair in task.preferences(split)} <= prompts[split]
    assert not any(one & other for one, other in itertools.combinations(prompts.values(), 2))


def test_the_real_qags(data_root: Path) -> None:
    task = open_set(data_root, "qags")
    check_task(task, samples=12)
    labels = [rating.label for split in SPLITS for rating in task.preferences(split)]
    assert (len(labels), sum(labels)) == (235, 113)


def test_the_real_dialogsum_serves_as_test(data_root: Path) -> None:
    task = open_set(data_root, "dialogsum_nc")
    assert len(task.examples("test")) == 500
    check_task(task, samples=12, splits=("test",), preferences=False)
    with pytest.raises(PerlVlmError, match="no train records"):
        task.examples("train")


def test_the_proxy_for_consistency_follows_peoples_labels(data_root: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    task = open_set(data_root, "qags", max_document_chars=0)
    ratings = [rating for split in SPLITS for rating in task.preferences(split)]
    proxy = [consistency(document_of(rating.messages[0].text), rating.response) for rating in ratings]
    area = metrics.roc_auc_score([rating.label for rating in ratings], proxy)
    print(f"AUC of the proxy, QAGS: {area:.3f} ({len(ratings)} summaries)")
    assert area > 0.75
    with gzip.open(data_root / "summarization" / "summeval" / "validation.jsonl.gz") as stream:
        documents = [json.loads(line) for line in stream]
    judged = [
        (system["human"]["consistency"] > 4.99, consistency(document["document"], system["summary"]))
        for document in documents
        for system in document["systems"].values()
    ]
    area = metrics.roc_auc_score([label for label, _ in judged], [value for _, value in judged])
    print(f"AUC of the proxy, SummEval: {area:.3f} ({len(judged)} summaries)")
    assert area > 0.65
