"""The summarization task: a short text that says what a longer one says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from perl_vlm.data.adapters import Adapter, DataTask, What
from perl_vlm.data.config import DataConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.types import Example, Split
from perl_vlm_summarization import metrics
from perl_vlm_summarization.documents import document_of

TLDR = "openai/summarize_from_feedback"


@dataclass(frozen=True)
class SummarizationConfig(DataConfig):
    """Where documents and summaries come from, and how they are put."""

    HUB: ClassVar[Mapping[str, str]] = {
        "tldr": TLDR,
        "tldr_posts": "vwxyzjn/summarize_from_feedback_tldr_3_filtered",
        "dialogsum": "knkarthick/dialogsum",
        "samsum": "knkarthick/samsum",
        "summeval": "mteb/summeval",
    }
    LOCAL_ONLY: ClassVar[tuple[str, ...]] = ("realsumm", "newsroom", "qags")

    format: Literal[
        "auto", "columns", "tldr", "tldr_posts", "dialogsum", "samsum", "summeval", "realsumm", "newsroom", "qags"
    ] = "auto"
    """How records are written; auto tells by the columns."""
    prompt_style: Literal["auto", "tldr", "chat"] = "auto"
    """For data sets known by name: tldr labels the fields and ends in `TL;DR:`; chat puts an instruction before the
    document; auto takes tldr for Reddit's posts, chat elsewhere."""
    max_document_chars: int = 6000
    """For data sets known by name: longer documents are cut after a sentence, at most this many characters in (0 for
    whole documents)."""
    articles: bool = False
    """For tldr: whether the comparisons about news articles, which its validation part holds, are taken too."""
    aspect: Literal["mean", "coherence", "consistency", "fluency", "relevance", "informativeness", "recall"] = "mean"
    """For graded summaries: which grade makes one of two better; mean is over all that the set has."""
    min_gap: float | None = None
    """For graded summaries: the least difference in grades that makes a pair; when not given, 1 of five points, and 0.2
    of realsumm's recall. The margin of a pair is the difference as a share of the scale."""
    pairs_per_document: int = 32
    """For graded summaries: at most this many pairs of one document (0 for all)."""
    consistent_from: float = 1.0
    """For qags: from which share of supported sentences on a summary is labelled good."""
    reference_reward: Literal["none", "rougeL"] = "none"
    """What verify, the programmatic reward, is where no facts are known: none, or ROUGE-L against the reference."""

    def __post_init__(self) -> None:
        if self.source == "hub" and self.hub_name == TLDR and self.dataset_config is None:
            object.__setattr__(self, "dataset_config", "comparisons")
        super().__post_init__()
        for name in ("max_document_chars", "pairs_per_document"):
            if getattr(self, name) < 0:
                raise ValueError(f"task.{name} is {getattr(self, name)}; it must be 0 (no limit) or more")
        if self.min_gap is not None and not self.min_gap > 0:
            raise ValueError(f"task.min_gap is {self.min_gap}; it must be positive, or equal grades would make pairs")
        if not 0 < self.consistent_from <= 1:
            raise ValueError(f"task.consistent_from is {self.consistent_from}; it must lie in (0, 1]")


class Summarization(DataTask):
    """Summaries, judged by ROUGE-L against a reference."""

    name = "summarization"
    modality = "text"
    primary_metric = "rougeL"
    Config = SummarizationConfig

    config: SummarizationConfig

    def generated(self, what: What, split: Split) -> Sequence[Any]:
        """Documents in the words of the bundled model; the true summary against a flawed one."""
        from perl_vlm_summarization.generated import Generated

        return Generated(what, split, self.config.size(split), self.config.data_seed)

    def open_adapter(self) -> Adapter:
        """The adapter of the configured format."""
        from perl_vlm_summarization.adapters import open_adapter

        return open_adapter(self.config)

    def demonstrations(self, split: Split) -> Sequence[Example]:
        """The examples that have a reference; for generated ones, with the summaries of a careless annotator, so that
        feedback has something to mend."""
        if self.config.source != "generated":
            return [example for example in self.examples(split) if example.reference is not None]
        from perl_vlm_summarization.generated import Generated

        return Generated("demonstrations", split, self.config.size(split), self.config.data_seed)

    def evaluate(self, example: Example, response: str) -> dict[str, float]:
        """Judge one summary.

        Returns:
            ``rouge1``, ``rouge2``, ``rougeL`` (F measures, the nearest of several references), ``length_ratio`` (words
            of the response / words of the reference) and ``consistency``, a cheap proxy (``metrics.consistency``).
            ``facts`` (F1) too, for generated documents.

        Raises:
            PerlVlmError: the example has no reference.
        """
        if example.reference is None:
            raise PerlVlmError(
                f"{example.origin or example.id} has no reference summary to compare with. Add a column `reference`, "
                "or evaluate on data that has them."
            )
        # What is said around the document is no source: an instruction's words are in every prompt.
        document = "\n".join(document_of(turn.text) for turn in example.messages if turn.role != "system")
        scores = metrics.rouge(example.metadata.get("references") or [example.reference], response)
        scores["length_ratio"] = metrics.length_ratio(example.reference, response)
        scores["consistency"] = metrics.consistency(document, response)
        if "facts" in example.metadata:
            scores["facts"] = metrics.facts(example.metadata["facts"], response)
        return scores

    def verify(self, example: Example, response: str) -> float | None:
        """F1 of the facts for generated documents; ROUGE-L where ``reference_reward`` asks for it and there is a
        reference; None otherwise, for no program tells a good summary from a bad one."""
        if "facts" in example.metadata:
            return metrics.facts(example.metadata["facts"], response)
        if self.config.reference_reward == "none" or example.reference is None:
            return None
        return metrics.rouge(example.metadata.get("references") or [example.reference], response)["rougeL"]
