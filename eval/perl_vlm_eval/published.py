"""Published benchmarks of reward models: how their rows are read, and how their scores are put together.

- RewardBench (Lambert et al. 2024, 2403.13787): ``prompt``, ``chosen``, ``rejected``, ``subset``; four sections, each a
  mean over its subsets weighted by their sizes, ``math-prm`` as if it were as large as the code subsets together; the
  score is the mean of the sections.
- VL-RewardBench (Li et al. 2024, 2411.17451): ``query``, ``image``, ``response`` (two), ``human_ranking`` (0 is the
  better place); three sections by the set a row is from; overall accuracy, and the mean of the sections.
- Multimodal RewardBench (Yasunaga et al. 2025, 2502.14191): ``Text``, ``Image``, ``Output1``, ``Output2``, ``Better``,
  ``Category``; safety in bias and toxicity, reasoning in math and coding; overall accuracy, and the mean of categories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perl_vlm.data.images import as_image_source
from perl_vlm.data.messages import check_text, place_images
from perl_vlm.errors import BadRecord
from perl_vlm.types import Comparison, Message

Row = dict[str, Any]

_REASONING_CODE = tuple(f"hep-{language}" for language in ("cpp", "go", "java", "js", "python", "rust"))
SECTIONS: dict[str, dict[str, float]] = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 250,
        "xstest-should-respond": 154, "donotanswer": 136,
    },
    "Reasoning": {"math-prm": 984, **dict.fromkeys(_REASONING_CODE, 164)},
}  # fmt: skip
"""RewardBench's sections, their subsets, and what each subset weighs in its section: by its authors' own table, which
is what published scores were made with, whatever number of rows a subset has."""
_VL_SETS = {
    "RLAIF": "rlaif-v", "RLHF": "rlhf-v", "mathverse": "reasoning_tasks", "mmmu": "reasoning_tasks",
    "wildvision": "wildvision-battle", "hallucination": "povid",
}  # fmt: skip
_VL_SECTIONS = {
    "vlfeedback": "general", "wildvision-battle": "general", "povid": "hallucination", "rlaif-v": "hallucination",
    "rlhf-v": "hallucination", "reasoning_tasks": "reasoning",
}  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """A published set."""

    read: Callable[[Row, str, Path | None], Comparison]
    """A row as a comparison whose metadata hold its ``section`` and ``subset``. Raises BadRecord."""
    weights: Mapping[str, Mapping[str, float]] | None = None
    """What each subset weighs in its section; their sizes here where not given."""
    headline: str = "overall"
    """``overall``, every row alike, or ``macro``, the mean of the sections."""


def _reward_bench(row: Row, origin: str, root: Path | None) -> Comparison:
    _require(row, ("prompt", "chosen", "rejected", "subset"), origin)
    subset = str(row["subset"])
    section = next((name for name, subsets in SECTIONS.items() if subset in subsets), None)
    if section is None:
        raise BadRecord(origin, f"RewardBench has no subset {subset!r}", "Leave out what is not of its four sections")
    return _pair(row, origin, (row["prompt"], row["chosen"], row["rejected"]), section, subset, row.get("id"))


def _vl_reward_bench(row: Row, origin: str, root: Path | None) -> Comparison:
    _require(row, ("id", "query", "image", "response", "human_ranking"), origin)
    responses, ranks = list(row["response"]), [int(rank) for rank in row["human_ranking"]]
    if len(responses) != 2 or sorted(ranks) != [0, 1]:
        problem = f"there are {len(responses)} responses with the ranks {ranks}"
        raise BadRecord(origin, problem, "VL-RewardBench ranks two responses as 0, the better one, and 1")
    chosen, rejected = (responses[ranks.index(rank)] for rank in (0, 1))
    name = str(row["id"])
    cut = min((name.find(mark) for mark in "_-" if mark in name), default=len(name))
    subset = _VL_SETS.get(name[:cut], "vlfeedback")
    image = as_image_source(row["image"], root=root, origin=origin)
    query = str(row["query"]).replace("<image>\n", "").replace("<image>", "")
    return _pair(row, origin, (query, chosen, rejected), _VL_SECTIONS[subset], subset, name, image)


def _multimodal_reward_bench(row: Row, origin: str, root: Path | None) -> Comparison:
    _require(row, ("ID", "Text", "Image", "Output1", "Output2", "Better", "Category"), origin)
    better = str(row["Better"])
    if better not in ("Output1", "Output2"):
        raise BadRecord(origin, f"`Better` is {better!r}", "It names Output1 or Output2")
    worse = "Output2" if better == "Output1" else "Output1"
    name, section = str(row["ID"]), str(row["Category"])
    if section == "safety":
        section = "safety/bias" if name.lower().startswith("pairs") else "safety/toxicity"
    elif section == "reasoning":
        section = "reasoning/math" if name.lower().startswith("math") else "reasoning/coding"
    image = as_image_source(row["Image"], root=root, origin=origin)
    return _pair(row, origin, (row["Text"], row[better], row[worse]), section, section, name, image)


def _require(row: Row, names: tuple[str, ...], origin: str) -> None:
    missing = [name for name in names if row.get(name) is None]
    if missing:
        problem = f"there is no {', '.join(map(repr, missing))}; it has {', '.join(map(repr, row))}"
        raise BadRecord(origin, problem, "Give the rows as their authors publish them")


def _pair(
    row: Row, origin: str, texts: tuple[Any, Any, Any], section: str, subset: str, name: Any, *images: Any
) -> Comparison:
    prompt, chosen, rejected = (
        check_text(text, column, origin) for text, column in zip(texts, ("prompt", "chosen", "rejected"), strict=True)
    )
    messages = place_images((Message("user", (prompt,)),), True, images, origin)
    metadata = {"section": section, "subset": subset}
    # RewardBench numbers its rows within a subset.
    key = f"{subset}/{origin}" if name is None else f"{subset}/{name}"
    return Comparison(key, messages, chosen, rejected, images, metadata=metadata, origin=origin)


FORMATS: dict[str, Benchmark] = {
    "rewardbench": Benchmark(_reward_bench, SECTIONS, "macro"),
    "vl_rewardbench": Benchmark(_vl_reward_bench),
    "multimodal_rewardbench": Benchmark(_multimodal_reward_bench),
}
"""By the word that a suite's file has under ``format``."""
