"""Preferences through reward roles: tensors of a batch, raw outputs by objective, scores of whole sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from perl_vlm.data.sequences import to_device
from perl_vlm.train.stage import Stage
from perl_vlm.types import Comparison, Rating, Sequences

Feedback = Comparison | Rating


def collate_feedback(stage: Stage, records: Sequence[Feedback]) -> tuple[Sequences, Tensor | None]:
    """Tensors on the stage's device: 2B rows and margins for pairs, B rows and labels for labels."""
    if stage.task.reward_head().kind == "pairs":
        sequences, targets = stage.collator.comparisons(records)  # type: ignore[arg-type]  # kinds are checked before
    else:
        sequences, targets = stage.collator.ratings(records)  # type: ignore[arg-type]
    return to_device(sequences, stage.device), None if targets is None else targets.to(stage.device)


def head_scores(stage: Stage, raw: Tensor, records: Sequence[Feedback]) -> Tensor:
    """Of raw outputs [B or 2B, O], the one for each record's own objective: [B or 2B]."""
    head = stage.task.reward_head()
    chosen = torch.tensor([head.index(record.objective) for record in records], device=raw.device)
    chosen = chosen.repeat(raw.shape[0] // len(records))
    return raw.gather(1, chosen[:, None])[:, 0]


class FeedbackScores(NamedTuple):
    """A set of records under a reward model, on the CPU. First dimension: records."""

    scores: Tensor
    """[N, 2] rewards of chosen and rejected, or [N, 1]: members combined, objectives mixed, normalised."""
    lengths: Tensor
    """[N, 2 or 1] response lengths in tokens."""
    correct: Tensor
    """[N] 1, 0, or a half for a tie: on the record's own objective."""
    members: Tensor
    """[N, K] the same for each member alone."""
    logits: Tensor
    """[N] of a label its logit, of a pair by how much the chosen one scores higher: what ``correct`` is told by.
    Members are averaged."""
    raw: Tensor
    """[N, K] the same of each member alone, on the scale it was trained on: log-odds."""


@torch.no_grad()
def score_feedback(stage: Stage, names: Sequence[str], records: Sequence[Feedback]) -> FeedbackScores:
    """Score records under one reward role, or under the mean of several."""
    rows: list[Tensor] = []
    sides = 2 if stage.task.reward_head().kind == "pairs" else 1
    for block in stage.blocks(len(records), stage.rows_at_once):
        part = [records[place] for place in block]
        sequences, targets = collate_feedback(stage, part)
        raws = [stage.roles.raw_scores(name, sequences) for name in names]
        heads = [stage.roles.head(name) for name in names]
        mixed = torch.stack([head.mixed(raw) for head, raw in zip(heads, raws, strict=True)]).mean(dim=0)
        if sides == 1:
            # A label is judged by the sign of the logit, which normalisation would move.
            each = torch.stack([head_scores(stage, raw, part) for raw in raws])
            assert targets is not None  # labels always come with targets
            logits = each.mean(dim=0)
            members, hit = (torch.eq(of > 0, targets > 0.5).float() for of in (each, logits))
            odds = each
        else:
            scaled = [(raw - head.mean) / head.std for head, raw in zip(heads, raws, strict=True)]
            each = torch.stack([head_scores(stage, raw, part) for raw in scaled])
            members, hit = _ranked(each), _ranked(each.mean(dim=0))
            chosen, rejected = each.mean(dim=0).chunk(2)
            logits = chosen - rejected
            sides_of = torch.stack([head_scores(stage, raw, part) for raw in raws]).chunk(2, dim=1)
            odds = sides_of[0] - sides_of[1]
        lengths = sequences.response_mask.sum(dim=1).float()
        # Both sides of a record in one row, so that a repeated record is dropped whole.
        both = [mixed.unflatten(0, (sides, -1)).T, lengths.unflatten(0, (sides, -1)).T]
        rows.append(torch.cat([*both, hit[:, None], logits[:, None], members.T, odds.T], dim=1))
    table = stage.gathered(torch.cat(rows), len(records))
    scores, lengths, hit, logits, members, raw = table.split([sides, sides, 1, 1, len(names), len(names)], dim=1)
    return FeedbackScores(scores, lengths, hit[:, 0], members, logits[:, 0], raw)


def _ranked(scores: Tensor) -> Tensor:
    """Of scores [..., 2B], chosen before rejected: 1 where the chosen one is higher, a half where they are equal."""
    chosen, rejected = scores.chunk(2, dim=-1)
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
