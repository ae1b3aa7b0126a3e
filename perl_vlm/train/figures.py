"""Figures with their intervals: what several answers or records come to, and how a figure is written for people."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from perl_vlm.config import RunConfig
from perl_vlm.data.images import content_key
from perl_vlm.stats import Interval, Labels, Numbers, bootstrap_auc, bootstrap_mean, paired_bootstrap
from perl_vlm.types import Comparison, Example, Rating

ONE_GROUP = "all that was measured is one group (a picture, a prompt or a conversation), and an interval needs two"
"""Why a figure has no interval, and a gain no verdict."""


class Figures(dict[str, float]):
    """Figures by name, and beside them the 95 % intervals of some: of one group alone there is none, since a resample
    of it is always the same and would look like certainty."""

    def __init__(self, config: RunConfig, values: Mapping[str, float] | None = None) -> None:
        super().__init__(values or {})
        self.ci95: dict[str, Interval] = {}
        self._config = config

    def __or__(self, other: Any) -> Any:
        """Both, with the intervals of both; dict's own would drop them."""
        joined = Figures(self._config, {**self, **other})
        joined.ci95 = {**self.ci95, **getattr(other, "ci95", {})}
        return joined

    def mean(self, name: str, values: Numbers, groups: Sequence[Hashable]) -> None:
        """Add a mean."""
        self._add(name, groups, *bootstrap_mean(values, groups=groups, **self._settings))

    def gain(self, name: str, before: Numbers, after: Numbers, groups: Sequence[Hashable]) -> None:
        """Add a mean difference of pairs."""
        self._add(name, groups, *paired_bootstrap(before, after, groups=groups, **self._settings))

    def auc(self, name: str, scores: Numbers, labels: Labels, groups: Sequence[Hashable]) -> None:
        """Add an area under the ROC curve."""
        self._add(name, groups, *bootstrap_auc(scores, labels, groups=groups, **self._settings))

    def _add(self, name: str, groups: Sequence[Hashable], value: float, interval: Interval) -> None:
        self[name] = value
        if len(set(groups)) > 1:
            self.ci95[name] = interval

    @property
    def _settings(self) -> dict[str, int]:
        return {"resamples": self._config.eval.bootstrap, "seed": self._config.seed}


def group_of(record: Example | Comparison | Rating) -> Hashable:
    """What a record is drawn together with in a bootstrap: ``metadata["group"]`` where the task gives one (a
    conversation, a document), else its pictures, else its prompt."""
    group = record.metadata.get("group")
    return str(group) if group is not None else tuple(map(content_key, record.images)) or record.messages


def shown(value: float, share: bool, interval: Sequence[float] | None = None, *, gain: bool = False) -> str:
    """A figure and its interval as people read them.

    Args:
        share: a number between 0 and 1, written in percent, and its gain in points.
        gain: a difference, written with its sign.
    """
    if not share:
        form = "+.3g" if gain else ".3g"
        return f"{value:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")
    form, unit = ("+.1f", " points") if gain else (".1f", "%")
    ends = f" [{100 * interval[0]:{form}}, {100 * interval[1]:{form}}]" if interval else ""
    return f"{100 * value:{form}}{unit}{ends}"
