"""``evaluate.Metric``s that come with the package: ``evaluate.load`` would fetch a script from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from perl_vlm.stats import auc, wins
from perl_vlm_eval.metrics.calibration import calibration_error
from perl_vlm_eval.metrics.texts import distinct

_NUMBER, _TEXT = "float64", "string"


def _info(text: str | None, **features: Any) -> evaluate.MetricInfo:
    text = text or ""  # docstrings are left out under -OO
    return evaluate.MetricInfo(
        description=text, citation="", inputs_description=text, features=datasets.Features(features)
    )


class PairAccuracy(evaluate.Metric):
    """The share of pairs whose chosen response scores higher, a tie being half of one. ``predictions`` are pairs of
    scores, chosen before rejected."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(type(self).__doc__, predictions=datasets.Sequence(datasets.Value(_NUMBER), length=2))

    def _compute(self, predictions: Sequence[Sequence[float]]) -> dict[str, float]:
        scores = np.asarray(predictions, dtype=np.float64)
        return {"pair_accuracy": float(wins(scores[:, 1], scores[:, 0]).mean())}


class Auc(evaluate.Metric):
    """The area under the ROC curve of scores (``predictions``) for labels (``references``), exact."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(type(self).__doc__, predictions=datasets.Value(_NUMBER), references=datasets.Value("bool"))

    def _compute(self, predictions: Sequence[float], references: Sequence[bool]) -> dict[str, float]:
        return {"auc": auc(np.asarray(predictions), np.asarray(references, dtype=bool))}


class CalibrationError(evaluate.Metric):
    """The expected calibration error of probabilities (``predictions``) for labels (``references``), over ``bins`` with
    equally many items."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(type(self).__doc__, predictions=datasets.Value(_NUMBER), references=datasets.Value("bool"))

    def _compute(self, predictions: Sequence[float], references: Sequence[bool], bins: int = 10) -> dict[str, float]:
        given, came = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        return {"ece": calibration_error(given, came, bins)}


class LengthCorrelation(evaluate.Metric):
    """Pearson's correlation of scores (``predictions``) with lengths (``references``); 0 where either does not vary."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(type(self).__doc__, predictions=datasets.Value(_NUMBER), references=datasets.Value(_NUMBER))

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        scores, lengths = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        flat = scores.std() == 0 or lengths.std() == 0
        return {"length_correlation": 0.0 if flat else float(np.corrcoef(scores, lengths)[0, 1])}


class DistinctNgrams(evaluate.Metric):
    """Distinct over all n-grams of some answers (``predictions``), for n of 1, 2 and 3."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(type(self).__doc__, predictions=datasets.Value(_TEXT))

    def _compute(self, predictions: Sequence[str]) -> dict[str, float]:
        return {f"distinct_{n}": distinct(predictions, n) for n in (1, 2, 3)}


class Rouge(evaluate.Metric):
    """ROUGE-1, -2 and -L (F1, with stems) of answers (``predictions``) against ``references``, by the package
    rouge-score."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(type(self).__doc__, predictions=datasets.Value(_TEXT), references=datasets.Value(_TEXT))

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
        rows = [scorer.score(wanted, said) for wanted, said in zip(references, predictions, strict=True)]
        return {name: float(np.mean([row[name].fmeasure for row in rows])) for name in rows[0]}


METRICS: dict[str, type[evaluate.Metric]] = {
    "pair_accuracy": PairAccuracy,
    "auc": Auc,
    "ece": CalibrationError,
    "length_correlation": LengthCorrelation,
    "distinct": DistinctNgrams,
    "rouge": Rouge,
}
"""By name."""
