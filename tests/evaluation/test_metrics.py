"""Metrics work without a network, and across processes."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

import numpy as np
import pytest

from perl_vlm_eval.metrics import METRICS, Auc, CalibrationError, DistinctNgrams, LengthCorrelation, PairAccuracy, Rouge
from perl_vlm_eval.metrics.calibration import bins_of, calibration_error, noise_floor
from perl_vlm_eval.metrics.texts import distinct, ngrams, overlap, repeated


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a metric opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_each_gives_its_figure(tmp_path: Path) -> None:
    pairs = [[2.0, 1.0], [1.0, 3.0], [1.0, 1.0], [5.0, 0.0]]
    assert PairAccuracy(cache_dir=tmp_path).compute(predictions=pairs) == {"pair_accuracy": 0.625}
    scores, labels = [0.9, 0.1, 0.4, 0.6], [True, False, True, False]
    assert Auc(cache_dir=tmp_path).compute(predictions=scores, references=labels) == {"auc": 0.75}
    right = CalibrationError(cache_dir=tmp_path).compute(predictions=[1.0, 0.0], references=[True, False], bins=2)
    assert right == {"ece": 0.0}
    found = LengthCorrelation(cache_dir=tmp_path).compute(predictions=[1.0, 2.0, 3.0], references=[2.0, 4.0, 6.0])
    assert found == {"length_correlation": pytest.approx(1.0)}
    flat = LengthCorrelation(cache_dir=tmp_path).compute(predictions=[1.0, 1.0], references=[2.0, 4.0])
    assert flat == {"length_correlation": 0.0}
    said = DistinctNgrams(cache_dir=tmp_path).compute(predictions=["a b a", "b a"])
    assert said == {"distinct_1": 2 / 5, "distinct_2": 2 / 3, "distinct_3": 1.0}
    rouge = Rouge(cache_dir=tmp_path).compute(predictions=["the cat sat"], references=["the cat sat"])
    assert rouge == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert len(METRICS) == 6


def _part(rank: int, folder: str, answers: object) -> None:
    metric = PairAccuracy(num_process=2, process_id=rank, experiment_id="both", cache_dir=folder)
    own = [[2.0, 1.0], [1.0, 0.0]] if rank == 0 else [[0.0, 1.0], [0.0, 1.0]]
    metric.add_batch(predictions=own)
    answers.put((rank, metric.compute()))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_two_processes_make_one_figure(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    parts = [context.Process(target=_part, args=(rank, str(tmp_path), answers)) for rank in range(2)]
    for part in parts:
        part.start()
    found = dict(answers.get(timeout=120) for _ in parts)
    for part in parts:
        part.join(30)
    assert found == {0: {"pair_accuracy": 0.5}, 1: None}


def test_calibration_by_hand_and_in_the_limit() -> None:
    said, came = np.array([0.2, 0.2, 0.9, 0.9]), np.array([0.0, 1.0, 1.0, 1.0])
    assert bins_of(said, came, 2) == [(pytest.approx(0.2), 0.5, 2), (pytest.approx(0.9), 1.0, 2)]
    assert calibration_error(said, came, 2) == pytest.approx(0.5 * 0.3 + 0.5 * 0.1)
    draw = np.random.default_rng(0)
    told = draw.uniform(0, 1, 4000)
    calm = calibration_error(told, (draw.random(4000) < told) * 1.0)
    assert calm < noise_floor(told) < 0.05
    sure = np.where(told > 0.5, 0.99, 0.01)
    assert calibration_error(sure, (draw.random(4000) < told) * 1.0) > 5 * noise_floor(sure)
    assert bins_of(said[:1], came[:1], 10) == [(pytest.approx(0.2), 0.0, 1)]


def test_texts() -> None:
    assert ngrams("The cat, the CAT", 2) == [("the", "cat"), ("cat", ","), (",", "the"), ("the", "cat")]
    assert np.isnan(distinct(["", " "], 1))
    assert repeated(["Yes", " yes ", "no"]) == [True, True, False]
    assert overlap("the red cat", "I saw the red dog and a cat") == 0.5
    assert overlap("cat", "a cat") == 1.0
    assert overlap("", "anything") == 0.0
