"""Records to padded batches, for text and for image+text alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perl_vlm.data.sequences import take, with_responses
from perl_vlm.errors import BadRecord
from perl_vlm.types import Comparison, Example, Rating, Sequences

if TYPE_CHECKING:
    from perl_vlm.data.rendering import PromptRenderer


class Collator:
    """Turns records into ``Sequences``: prompts left-padded, responses right-padded."""

    def __init__(self, renderer: PromptRenderer) -> None:
        self.renderer = renderer

    def prompts(self, examples: Sequence[Example]) -> Sequences:
        """B prompts, R = 0. An example that comes several times is rendered once."""
        seen: dict[tuple[int, int], int] = {}
        prompt_of = [seen.setdefault((id(one.messages), id(one.images)), len(seen)) for one in examples]
        first = dict(zip(reversed(prompt_of), reversed(examples), strict=True))
        rendered = self.renderer.prompts([first[prompt] for prompt in range(len(seen))])
        if len(seen) == len(examples):
            return rendered
        return replace(take(rendered, prompt_of), prompt_of=tuple(prompt_of))

    def references(self, examples: Sequence[Example]) -> Sequences:
        """B prompts with their reference answers. Raises BadRecord where one has none."""
        responses = []
        for example in examples:
            if not example.reference:
                raise BadRecord(
                    example.origin or example.id,
                    "there is no reference answer to learn from",
                    "Give a `reference` (or `answer`) column, or leave out the sft stage",
                )
            responses.append(self.renderer.response_ids(example.reference, example.origin))
        return with_responses(self.renderer.prompts(examples), responses, self.renderer.backbone.pad_id)

    def comparisons(self, pairs: Sequence[Comparison]) -> tuple[Sequences, Tensor | None]:
        """2B rows, the B chosen ones before the B rejected ones, and the margins [B] where any pair has one."""
        prompts = self.renderer.prompts(pairs)
        rows = list(range(len(pairs)))
        texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        origins = [pair.origin for pair in pairs] * 2
        responses = [self.renderer.response_ids(text, origin) for text, origin in zip(texts, origins, strict=True)]
        sequences = with_responses(take(prompts, rows + rows), responses, self.renderer.backbone.pad_id)
        sequences = replace(sequences, prompt_of=tuple(rows + rows))
        if all(pair.margin is None for pair in pairs):
            return sequences, None
        return sequences, torch.tensor([pair.margin or 0.0 for pair in pairs])

    def ratings(self, ratings: Sequence[Rating]) -> tuple[Sequences, Tensor]:
        """B rows and their labels [B] as 0.0 or 1.0."""
        responses = [self.renderer.response_ids(rating.response, rating.origin) for rating in ratings]
        sequences = with_responses(self.renderer.prompts(ratings), responses, self.renderer.backbone.pad_id)
        return sequences, torch.tensor([float(rating.label) for rating in ratings])
