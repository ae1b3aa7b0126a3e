"""What logits cost: the LM head's chunks in training and scoring, and the sampler's tensors at each token.

Vocabularies are too large to be counted by hand of a formula that changes: the functions themselves run on a few tokens
over a small vocabulary, and their bytes for each logit are read off.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from perl_vlm.config import EXACT_REGULARIZERS, PpoConfig
from perl_vlm.models.chunks import chunk_tokens
from perl_vlm.models.logits import ResponseStates, TokenRules, divergence_of, logprobs_of
from perl_vlm.plan.live import LiveBytes
from perl_vlm.rollout.decoding import Chooser

_TOKENS, _VOCABULARY, _HIDDEN = 16, 4096, 4


class HeadCost(NamedTuple):
    """Bytes for each logit of a chunk."""

    going: float
    """Forwards."""
    coming: float
    """Backwards; 0 without gradients, and for a frozen head, whose share is done forwards."""
    kept: int = 0
    """Gradients with respect to the features of the tokens, kept from one to the other: how many for each token."""


class Drawing(NamedTuple):
    """What of the sampler's settings decides about tensors."""

    top_p: float = 1.0
    min_new_tokens: int = 0
    exact: str | None = None
    """The exact divergence that is computed, if any."""
    entropy: bool = False
    """Whether entropies have gradients."""


def drawing(config: PpoConfig) -> Drawing:
    """As PPO's settings have it."""
    exact = config.kl if config.kl in EXACT_REGULARIZERS else None
    return Drawing(config.top_p, config.min_new_tokens, exact, config.entropy_coef != 0)


def chunk_logits(tokens: int, vocabulary: int, device: str) -> int:
    """Logits of the largest chunk that the head meets."""
    return min(tokens, chunk_tokens(vocabulary, device)) * vocabulary


@lru_cache(maxsize=32)
def head_cost(dtype: torch.dtype, how: Drawing, *, training: bool, frozen: bool = True) -> HeadCost:
    """Measured on the chunked log-probs (and divergence) themselves; ``frozen``: the head does not train."""
    weight = torch.zeros(_VOCABULARY, _HIDDEN, dtype=dtype)
    features = torch.zeros(_TOKENS, _HIDDEN, dtype=dtype, requires_grad=training)
    ones = torch.ones(1, _TOKENS, dtype=torch.bool)
    steps = torch.arange(_TOKENS)

    def head(hidden: Tensor) -> Tensor:
        return hidden @ weight.T

    states = ResponseStates(
        features, features, head, _VOCABULARY, torch.zeros_like(steps), steps, ones, TokenRules((1,)), frozen
    )
    with torch.set_grad_enabled(training), LiveBytes() as live:
        out = logprobs_of(
            states, top_p=how.top_p, min_new_tokens=how.min_new_tokens, temperature=0.7, chunk=_TOKENS,
            entropy_gradient=how.entropy,
        )  # fmt: skip
        going = live.peak
        away = None
        if how.exact is not None:
            other = states if not training else _detached(states)
            away = divergence_of(
                how.exact, states, other, temperature=0.7, min_new_tokens=how.min_new_tokens, chunk=_TOKENS // 2
            )
            going = max(going, live.peak)
        if not training:
            return HeadCost(going / (_TOKENS * _VOCABULARY), 0.0)
        loss = out.logprobs.sum() if away is None else out.logprobs.sum() + away.sum()
        live.since()
        loss.backward()
        kept = 1 + int(how.entropy) + int(how.exact is not None) if frozen else 0
        return HeadCost(going / (_TOKENS * _VOCABULARY), live.peak / (_TOKENS * _VOCABULARY), kept)


def _detached(states: ResponseStates) -> ResponseStates:
    from dataclasses import replace

    return replace(states, features=states.features.detach(), hidden=None)


@lru_cache(maxsize=32)
def sampler_cost(dtype: torch.dtype, how: Drawing) -> float:
    """Bytes for each logit of a decoding step, the model's own included: measured on the chooser itself."""
    scores = torch.zeros(_TOKENS, _VOCABULARY, dtype=dtype)
    noise = torch.full((_TOKENS, 1), 0.5, dtype=torch.float64)
    chooser = Chooser(TokenRules((1,)), 0.7, how.top_p, how.min_new_tokens, noise)
    with torch.no_grad(), LiveBytes() as live:
        chooser(scores, torch.arange(_TOKENS), 0)
    return live.peak / (_TOKENS * _VOCABULARY) + scores.element_size()
