"""From hidden states to log-probs, entropies and exact divergences of response tokens, a chunk of tokens at a time.

A batch of logits, [B, R, V], is by far the largest tensor of a language model's training step: 8 responses of 512
tokens over 150,000 words are 2.5 GB in float32, and several such tensors live at once. Here the LM head meets a chunk
of the real response tokens at a time, what is wanted is computed, with its gradient, and the logits are dropped.

Shape letters: B sequences, R response tokens, V vocabulary, H hidden size, and N real response tokens of a batch, row
by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perl_vlm.errors import PerlVlmError
from perl_vlm.formulas import exact_divergence, token_logprobs_entropy, top_p_mask
from perl_vlm.models.chunks import chunk_tokens, in_chunks


class ResponseLogprobs(NamedTuple):
    """What the policy loss needs of one forward pass; every entry outside the response mask is zero."""

    logprobs: Tensor
    """[B, R] log-prob of each response token under the distribution it was drawn from, float32."""
    entropy: Tensor
    """[B, R] entropy of the distribution each token was drawn from, in nats."""
    values: Tensor | None = None
    """[B, R] V(state before each token), where a value head on the same trunk was asked for."""
    likeliest: Tensor | None = None
    """[B, R] 1 where the token was the most likely one."""
    divergence: Tensor | None = None
    """[B, R] exact divergence from the reference, where one was asked for."""


class TokenRules(NamedTuple):
    """Which tokens are special to sampling."""

    ends: tuple[int, ...]
    """End a response."""
    never: tuple[int, ...] = ()
    """Are never drawn: placeholders of images. One in a response would be taken for an image that was not given."""


def token_rules(model: Any, ends: tuple[int, ...]) -> TokenRules:
    """The rules of a model that ends its responses with ``ends``; placeholders are those its configuration names."""
    config = model.config
    named = (getattr(config, f"{medium}_token_{kind}", None) for medium in _MEDIA for kind in ("id", "index"))
    ids = {int(token) for token in named if isinstance(token, int)}
    return TokenRules(ends, tuple(sorted(ids - set(ends))))


_MEDIA = ("image", "video", "audio")


@dataclass(frozen=True)
class ResponseStates:
    """What a model's trunk says at the N real response tokens of a batch, before the LM head.

    The adapters that were active have done their work by now, so that two roles' states can be compared although only
    one of them is active at a time. The head belongs to no adapter.
    """

    hidden: Tensor | None
    """[N, H] last hidden state before each token; None where the model does not show it."""
    features: Tensor
    """[N, F] what ``head`` takes: the hidden states, or for a model with a head of its own kind the logits."""
    head: Callable[[Tensor], Tensor]
    """[n, F] -> [n, V], the model's own logits."""
    vocabulary: int
    """V."""
    tokens: Tensor
    """[N] the response tokens."""
    steps: Tensor
    """[N] the place of each token in its response, from 0."""
    mask: Tensor
    """[B, R] bool, true at the N tokens."""
    rules: TokenRules
    frozen_head: bool = False
    """Whether gradients end at the hidden states: the head has weights, and they do not train."""

    def chunk(self, wanted: int | None) -> int:
        """Tokens a chunk: as asked, or as many as suit the device."""
        return chunk_tokens(self.vocabulary, self.features.device.type) if wanted is None else wanted

    def spread(self, values: Tensor) -> Tensor:
        """[N] -> [B, R], zero outside the mask."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


# -- the distribution a token is drawn from ------------------------------------------------------------------------


def filter_top_p(logits: Tensor, top_p: float, keep: Tensor | None = None) -> Tensor:
    """Rule out what lies outside the nucleus, the smallest set of tokens of probability ``top_p`` or more.

    Args:
        logits: [..., V] tempered logits.
        top_p: 0 < top_p <= 1; 1 changes nothing.
        keep: [...] tokens never ruled out. In recomputation these are the sampled ones: rounding, or an update of the
            policy since, may have moved one over the edge of the nucleus, where its log-prob would be minus infinity.
    """
    if top_p == 1.0:
        return logits
    kept = top_p_mask(logits, top_p)
    if keep is not None:
        kept = kept.scatter(-1, keep[..., None], True)
    return logits.masked_fill(~kept, float("-inf"))


def drawn_from(
    logits: Tensor,
    steps: Tensor,
    rules: TokenRules,
    *,
    temperature: float,
    top_p: float,
    min_new_tokens: int,
    keep: Tensor | None = None,
) -> Tensor:
    """The model's logits -> logits of the distribution that tokens are drawn from, float32.

    The sampler and every recomputation come through here, so that they cannot differ. In this order: placeholders are
    ruled out, and ends in the first ``min_new_tokens`` tokens; the rest is tempered; then the nucleus is taken.

    Args:
        logits: [..., V].
        steps: [...] (or broadcasting to it) the place of the token in its response, from 0.
        rules: from ``token_rules``.
        temperature: > 0.
        top_p: see ``filter_top_p``, as is ``keep``.
        min_new_tokens: none of the first so many tokens may be an end.

    Raises:
        ValueError: for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = logits.float()
    if rules.never:
        logits = logits.masked_fill(_among(rules.never, logits), float("-inf"))
    if min_new_tokens > 0:
        early = (steps < min_new_tokens)[..., None]
        logits = logits.masked_fill(early & _among(rules.ends, logits), float("-inf"))
    return filter_top_p(logits if temperature == 1.0 else logits / temperature, top_p, keep)


def _among(ids: tuple[int, ...], logits: Tensor) -> Tensor:
    """[V] bool. A placeholder may have no logit: PaliGemma's first ones come after the vocabulary."""
    return _marked(ids, logits.shape[-1], logits.device)


@lru_cache(maxsize=16)
def _marked(ids: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    # Kept: ids go to an accelerator one by one, and the sampler asks at every token.
    marked = torch.zeros(size, dtype=torch.bool)
    marked[[token for token in ids if token < size]] = True
    return marked.to(device)


# -- what is computed of it ----------------------------------------------------------------------------------------


def logprobs_of(
    states: ResponseStates,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    min_new_tokens: int = 0,
    value_head: Any = None,
    chunk: int | None = None,
    entropy_gradient: bool = True,
) -> ResponseLogprobs:
    """Log-probs and entropies of the response tokens, as the sampler drew them, without ever holding [B, R, V].

    Args:
        states: from ``response_states``.
        temperature, top_p, min_new_tokens: the sampler's.
        value_head: a module whose ``value`` takes [N, H] to [N].
        chunk: tokens at a time; by default as many as suit the device. The result does not depend on it.
        entropy_gradient: whether the entropies have gradients; without, a pass through the head is saved.
    """

    def work(features: Tensor, tokens: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
        logits = drawn_from(
            states.head(features), steps, states.rules,
            temperature=temperature, top_p=top_p, min_new_tokens=min_new_tokens, keep=tokens,
        )[None]  # fmt: skip
        likeliest = torch.eq(logits[0].argmax(dim=-1), tokens).float()
        logprobs, entropy = token_logprobs_entropy(logits, tokens[None], entropy_gradient=entropy_gradient)
        return logprobs[0], entropy[0], likeliest

    logprobs, entropy, likeliest = in_chunks(
        work, states.chunk(chunk), states.features, states.tokens, states.steps,
        learning=(0, 1) if entropy_gradient else (0,), frozen=states.frozen_head,
    )  # fmt: skip
    values = None
    if value_head is not None:
        if states.hidden is None:
            raise PerlVlmError(
                "this model shows no last hidden state to read a value from; use a value role of its own"
            )
        values = states.spread(value_head.value(states.hidden))
    return ResponseLogprobs(states.spread(logprobs), states.spread(entropy), values, states.spread(likeliest))


def divergence_of(
    name: str,
    policy: ResponseStates,
    reference: ResponseStates,
    *,
    temperature: float = 1.0,
    min_new_tokens: int = 0,
    chunk: int | None = None,
) -> Tensor:
    """An exact divergence between policy and reference at every response token, [B, R], zero outside the responses.

    Both distributions are tempered, and what is ruled out in sampling is ruled out in both; but neither is cut to its
    nucleus: two nuclei rarely hold the same tokens, and then KL is infinite.

    Args:
        name: see ``formulas.exact_divergence``.
        policy: states of the same batch under the policy. Gradients reach its hidden states (and its head, where that
            trains).
        reference: states of the same batch under the reference, each with its own model's head.
        temperature, min_new_tokens: the sampler's.
        chunk: as in ``logprobs_of``.

    Raises:
        ValueError: where the states are of different batches, or the name is unknown.
    """
    if not torch.equal(policy.mask, reference.mask) or not torch.equal(policy.tokens, reference.tokens):
        raise ValueError("policy and reference must be states of the same batch; their response tokens differ")

    def work(ours: Tensor, theirs: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
        p, q = (
            drawn_from(
                states.head(features), steps, states.rules,
                temperature=temperature, top_p=1.0, min_new_tokens=min_new_tokens,
            )
            for states, features in ((policy, ours), (reference, theirs))
        )  # fmt: skip
        return (exact_divergence(name, p, q),)

    # Two sets of logits live at once.
    size = policy.chunk(chunk) if chunk is not None else max(1, policy.chunk(None) // 2)
    (divergence,) = in_chunks(work, size, policy.features, reference.features, policy.steps, frozen=policy.frozen_head)
    return policy.spread(divergence)
