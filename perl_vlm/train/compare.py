"""From judged answers to figures: means by role and kind, paired gains, win rates, and how they are announced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from perl_vlm.config import RunConfig
from perl_vlm.stats import wins
from perl_vlm.train.figures import Figures, group_of, shown
from perl_vlm.types import Example

JUDGE, POSITIVE = "judge", "judge_positive"
SHOWN = 8
"""At most so many figures of one sort are announced; the report has all."""


@dataclass(frozen=True)
class Answer:
    """One greedy answer, choice or episode, and its judgement."""

    response: str
    tokens: list[int]
    """Ids, the end token included where the model gave one."""
    judged: dict[str, float]
    logprobs: tuple[float, ...] = ()
    """Of each choice, where there were some to choose from; the response is the likeliest one then."""
    turns: int = 1

    def with_judgement(self, verdict: Mapping[str, float]) -> Answer:
        """The same answer, judged by someone else too."""
        return replace(self, judged={**self.judged, **verdict})


def kinds_of(examples: Sequence[Example]) -> dict[str, list[int]]:
    """The places of the examples of each ``metadata["kind"]``, by name."""
    found: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        if "kind" in example.metadata:
            found.setdefault(str(example.metadata["kind"]), []).append(place)
    return dict(sorted(found.items()))


def role_figures(label: str, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
    """Means over one role's answers: ``label/<key>`` and, for every kind, ``label/<key>/<kind>``; and the mean length
    of what was decoded."""
    means = {f"{label}/{key}": _mean(answers, key) for key in keys_of(answers)}
    lengths = [len(answer.tokens) for answer in answers if not answer.logprobs]
    if lengths:
        means[f"{label}/response_tokens"] = sum(lengths) / len(lengths)
    for kind, places in kinds_of(examples).items():
        own = [answers[place] for place in places]
        means |= {f"{label}/{key}/{kind}": _mean(own, key) for key in keys_of(own)}
    return means


def compared(
    config: RunConfig, examples: Sequence[Example], anchor: Sequence[Answer], policy: Sequence[Answer], primary: str
) -> Figures:
    """``gain/<key>`` for every judgement; ``gain/<key>/<kind>`` and ``win_rate/<key>`` for the primary one and the
    judge's. All with intervals, but for what is one prompt or picture alone."""
    figures, groups = Figures(config), [group_of(example) for example in examples]

    def sides(key: str, places: Sequence[int]) -> tuple[list[float], list[float], list[object]]:
        known = [place for place in places if key in anchor[place].judged and key in policy[place].judged]
        before, after = ([side[place].judged[key] for place in known] for side in (anchor, policy))
        return before, after, [groups[place] for place in known]

    for key in keys_of([*anchor, *policy]):
        before, after, own = sides(key, range(len(examples)))
        if not before:
            continue
        figures.gain(f"gain/{key}", before, after, own)
        if key not in (primary, JUDGE):
            continue
        figures.mean(f"win_rate/{key}", wins(before, after), own)
        for kind, places in kinds_of(examples).items():
            before, after, own = sides(key, places)
            if before:
                figures.gain(f"gain/{key}/{kind}", before, after, own)
    return figures


def keys_of(answers: Sequence[Answer]) -> list[str]:
    """Every metric that any answer has; a task may give one for some examples only."""
    return list(dict.fromkeys(key for answer in answers for key in answer.judged))


def shares_of(answers: Sequence[Answer]) -> frozenset[str]:
    """The metrics that lie in [0, 1] for every answer; a judge's score is a score even where all happen to."""
    outside = {key for answer in answers for key, value in answer.judged.items() if not 0 <= value <= 1}
    return frozenset(keys_of(answers)) - outside - {JUDGE}


def _mean(answers: Sequence[Answer], key: str) -> float:
    values = [answer.judged[key] for answer in answers if key in answer.judged]
    return sum(values) / len(values)


def headlines(
    primary: str, metrics: Mapping[str, float], ci95: Mapping[str, Sequence[float]], shares: Set[str], judge: str
) -> Iterator[str]:
    """The figures in a few lines for the terminal.

    Args:
        primary: the metric that decides.
        metrics, ci95: of an evaluation.
        shares: the metrics that are written in percent.
        judge: who scored beside the task; empty for no one.
    """
    line = _versus(primary, primary, metrics, ci95, primary in shares)
    yield line + (f", KL {metrics['policy/kl']:.3f} nats" if "policy/kl" in metrics else "")
    by_kind = {key: value for key, value in metrics.items() if key.startswith(f"gain/{primary}/")}
    if len(by_kind) > 1:
        parts = [
            f"{key.removeprefix(f'gain/{primary}/')} {shown(value, primary in shares, ci95.get(key), gain=True)}"
            for key, value in by_kind.items()
        ]
        yield f"gain in {primary} by kind: {_some(parts)}"
    if judge:
        line = f"judged by {judge}: {_versus(JUDGE, 'score', metrics, ci95, False)}"
        if f"anchor/{POSITIVE}" in metrics:
            line += f"; found good: {_from_to(POSITIVE, metrics, True)}"
        yield line
    # Every key of the anchor's without a kind after it, but for those above.
    others = [key.removeprefix("anchor/") for key in metrics if key.startswith("anchor/")]
    others = [key for key in others if key not in (primary, JUDGE, POSITIVE) and not _has_kind(key, others)]
    if others:
        yield "also " + _some(f"{key} {_from_to(key, metrics, key in shares)}" for key in others)


def _has_kind(key: str, keys: Sequence[str]) -> bool:
    return any(key.startswith(f"{other}/") for other in keys)


def _versus(key: str, name: str, metrics: Mapping[str, float], ci95: Mapping[str, Sequence[float]], share: bool) -> str:
    line = f"{name} of the anchor {shown(metrics[f'anchor/{key}'], share)}"
    if f"gain/{key}" not in metrics:
        return line
    gain = shown(metrics[f"gain/{key}"], share, ci95.get(f"gain/{key}"), gain=True)
    won = shown(metrics[f"win_rate/{key}"], True, ci95.get(f"win_rate/{key}"))
    return f"{line}, of the policy {shown(metrics[f'policy/{key}'], share)}: gain {gain}, wins {won}"


def _from_to(key: str, metrics: Mapping[str, float], share: bool) -> str:
    both = [metrics[name] for name in (f"anchor/{key}", f"policy/{key}") if name in metrics]
    return " -> ".join(shown(value, share) for value in both)


def _some(parts: Iterator[str] | Sequence[str]) -> str:
    listed = list(parts)
    more = f", and {len(listed) - SHOWN} more in the report" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
