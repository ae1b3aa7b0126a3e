"""Regularisers of LoRA PPO (2309.09055): every one with the same number of steps, win rate against exact KL from the
anchor, factual precision before and after, and full tuning beside, which the paper lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any, ClassVar

from perl_vlm.config.checks import require
from perl_vlm.report.html import Curve, Table
from perl_vlm_eval.seeds import over_seeds
from perl_vlm_eval.studies.base import Part, Plan, StudyFindings, StudySettings, even_start, spread, together
from perl_vlm_eval.studies.differences import BySeed, Compared, figures_of, sentences, table_of, tested
from perl_vlm_eval.studies.ways import MEASURED, Way, check_points, followed, rounds

KINDS = ("none", "k1", "clamped_k1", "k2", "k3", "js_proxy", "reverse_kl", "forward_kl", "js")
TUNINGS = ("lora", "full")
PUBLISHED = {
    "none": (34.5, 43.8, 48.2, 48.3, 48.2),
    "k1": (35.6, 41.9, 46.7, 48.1, 47.6),
    "js_proxy": (34.6, 44.8, 49.8, 49.8, 48.7),
}
"""Win rate in percent against text-davinci-003 after 20, 60, 100, 140 and 180 PPO steps: the paper's LoRA arms."""


@dataclass(frozen=True)
class RegularizerSettings(StudySettings):
    """Settings of ``regularizers``."""

    reward: str = "verify"
    """What policies are trained against, as ppo.reward_model takes it; a finished run's folder for a learned one."""
    kinds: tuple[str, ...] = KINDS
    """Regularisers, as ppo.kl names them."""
    tunings: tuple[str, ...] = TUNINGS
    """lora, full or both: matched in everything but how many weights learn, and their learning rates."""
    steps: int = 40
    """PPO rounds of every arm."""
    points: int = 5
    """At how many of them, evenly, a policy is measured."""
    lr: float = 1e-3
    """Learning rate of LoRA policies."""
    full_lr: float = 3e-5
    """Learning rate of fully tuned ones."""
    kl_coef: float = 0.02
    """Coefficient of every regulariser, the paper's."""
    limit: int = 512
    """At most this many held-out prompts."""

    sets: ClassVar[Mapping[str, str]] = {
        "tuning": "give --tunings", "ppo.reward_model": "give --reward", "ppo.kl": "give --kinds",
        "ppo.kl_coef": "give --kl_coef", "ppo.lr": "give --lr and --full_lr", "lr": "give --lr and --full_lr",
        **MEASURED,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        odd = [kind for kind in self.kinds if kind not in KINDS] + [one for one in self.tunings if one not in TUNINGS]
        require(not odd, f"{', '.join(odd)} is no regulariser or tuning; there are {', '.join((*KINDS, *TUNINGS))}")
        check_points(self.steps, self.points)


def plan(settings: RegularizerSettings) -> Plan:
    """See ``studies.base.Plan``."""
    arms: dict[tuple[str, str, str], Part[dict[int, Way]]] = {}
    for model in settings.models:
        for tuning in settings.tunings:
            for kind in settings.kinds:
                options: dict[str, Any] = {
                    "tuning": tuning, "ppo.reward_model": settings.reward, "ppo.kl": kind,
                    "ppo.kl_coef": 0.0 if kind == "none" else settings.kl_coef,
                    "ppo.lr": settings.full_lr if tuning == "full" else settings.lr,
                    **rounds(settings.steps, settings.points), **even_start(settings, model),
                }  # fmt: skip
                name = f"{PurePath(model).name}-{tuning}-{kind}"
                arms[model, tuning, kind] = followed(settings, name, model, partial(_same, options), settings.limit)
    return _findings(settings, (yield from together(arms)))


def _same(options: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
    """Options that do not depend on the seed."""
    return options


def _findings(settings: RegularizerSettings, ways: Mapping[tuple[str, str, str], Mapping[int, Way]]) -> StudyFindings:
    rows, figures, curves = [], dict[str, Any](), []
    shares = all(way.share for own in ways.values() for way in own.values())
    for model in settings.models:
        for tuning in settings.tunings:
            series: dict[str, list[tuple[float, float]]] = {}
            for kind in settings.kinds:
                own = ways[model, tuning, kind]
                rows.append((f"{PurePath(model).name}, {tuning}, {kind}", *_row(list(own.values()))))
                figures[f"{model}/{tuning}/{kind}"] = {str(seed): vars(way) for seed, way in own.items()}
                if own:
                    series[kind] = _mean_way(list(own.values()))
            if series:
                title = f"{PurePath(model).name}, {tuning}: win rate against the anchor"
                note = "Means over seeds; held-out prompts, sampled answers, ties are halves."
                curves.append(Curve(title, "exact KL from the anchor, in nats", series, note))
    compared = tested(list(_compared(settings, ways, shares)))
    header = ("arm", "gold", "win rate", "KL, nats", "precision before", "after", "seeds")
    note = (
        f"After {settings.steps} rounds, on held-out prompts; mean and standard deviation over seeds"
        f"{', shares in percent' if shares else ''}. Precision is the share of claims that references support, by "
        "shared words alone (the offline fallback)."
    )
    tables = [Table("Regularisers", header, rows, note), table_of(compared), _published()]
    return StudyFindings(tables, curves, sentences(compared), {"arms": figures, "differences": figures_of(compared)})


def _compared(
    settings: RegularizerSettings, ways: Mapping[tuple[str, str, str], Mapping[int, Way]], shares: bool
) -> Iterator[Compared]:
    """Full tuning and LoRA under one regulariser, every regulariser and none, precision before and after."""

    def gold(model: str, tuning: str, kind: str) -> BySeed:
        return {seed: way.gold[way.end] for seed, way in ways[model, tuning, kind].items()}

    def away(model: str, tuning: str, kind: str) -> BySeed:
        return {seed: way.kl[way.end] for seed, way in ways[model, tuning, kind].items()}

    for model in settings.models:
        for kind in settings.kinds if len(settings.tunings) == 2 else ():
            full, lora = (gold(model, tuning, kind) for tuning in ("full", "lora"))
            yield Compared(f"{model}, {kind}, gold", "full tuning", "LoRA", full, lora, shares)
            full, lora = (away(model, tuning, kind) for tuning in ("full", "lora"))
            yield Compared(f"{model}, {kind}, KL in nats", "full tuning", "LoRA", full, lora, False, None)
        for tuning in settings.tunings:
            for kind in settings.kinds:
                if kind != "none" and "none" in settings.kinds:
                    without, own = (gold(model, tuning, one) for one in ("none", kind))
                    yield Compared(f"{model}, {tuning}, gold", "none", kind, without, own, shares)
            for kind in settings.kinds:
                known = {s: w.precision for s, w in ways[model, tuning, kind].items() if len(w.precision) == 2}
                if known:
                    before, after = ({s: own[side] for s, own in known.items()} for side in ("anchor", "policy"))
                    yield Compared(
                        f"{model}, {tuning}, {kind}, factual precision", "the anchor", "the policy", before, after
                    )


def _row(ways: Sequence[Way]) -> tuple[str, ...]:
    if not ways:
        return ("-",) * 5 + ("0",)
    scale = 100.0 if all(way.share for way in ways) else 1.0
    ends = [("gold", scale), ("win_rate", 100.0), ("kl", 1.0)]
    cells = [spread(over_seeds([getattr(way, name)[way.end] for way in ways]), scale) for name, scale in ends]
    for side in ("anchor", "policy"):
        known = [way.precision[side] for way in ways if side in way.precision]
        cells.append(spread(over_seeds(known)) if known else "-")
    return (*cells, str(len(ways)))


def _mean_way(ways: Sequence[Way]) -> list[tuple[float, float]]:
    """(KL, win rate) at each point, averaged over seeds."""
    count = min(len(way.kl) for way in ways)
    return [
        (sum(way.kl[place] for way in ways) / len(ways), sum(way.win_rate[place] for way in ways) / len(ways))
        for place in range(count)
    ]


def _published() -> Table:
    rows = [(kind, *(f"{value:g}" for value in values)) for kind, values in PUBLISHED.items()]
    note = "LLaMA 7B on AlpacaFarm, win rate in percent against text-davinci-003; SFT 37.0, full-tuning PPO 46.7."
    return Table("The paper's, by PPO step", ("regulariser", "20", "60", "100", "140", "180"), rows, note)
