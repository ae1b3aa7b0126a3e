"""Metrics as ``evaluate.Metric``s that need no network, and the plain functions behind them.

``PairAccuracy().compute(predictions=[[2.0, 1.0], ...])``, or batch by batch with ``add_batch``; with ``num_process``,
``process_id`` and ``experiment_id`` several processes add their parts and the first computes.
"""

from perl_vlm_eval.metrics.offline import (
    METRICS,
    Auc,
    CalibrationError,
    DistinctNgrams,
    LengthCorrelation,
    PairAccuracy,
    Rouge,
)

__all__ = ["METRICS", "Auc", "CalibrationError", "DistinctNgrams", "LengthCorrelation", "PairAccuracy", "Rouge"]
