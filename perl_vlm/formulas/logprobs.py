"""Log-probabilities and entropy of a tempered policy, and how well two recomputations of them agree.

Shape letters: B sequences, R response tokens, V vocabulary. z are logits, T the temperature, all logarithms natural.
A logit of minus infinity is a token ruled out: it has probability 0 and adds nothing to an entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perl_vlm.formulas._checks import check_positive, check_shapes, keep, upcast
from perl_vlm.formulas.masking import masked_mean


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``log pi_T(a_t) = z_t[a_t] / T - log sum_v exp(z_t[v] / T)``.

    The temperature must be the sampler's: without it, ratio and KL compare two different policies.

    Args:
        logits: [B, R, V]; row t predicts token t. bf16 is taken to float32 before the softmax.
        tokens: [B, R] integer ids.
        temperature: T > 0.

    Returns:
        [B, R] float32 (float64 for float64 logits), at most 0.

    Raises:
        ValueError: where the shapes do not fit, T is not positive, or an id lies outside the vocabulary.
    """
    check_shapes(logits=(logits, "BRV"), tokens=(tokens, "BR"))
    vocabulary = logits.shape[-1]
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary):
        raise ValueError(
            f"token ids run from {int(tokens.min())} to {int(tokens.max())}; the logits cover 0 to {vocabulary - 1}"
        )
    return _tempered(logits, temperature).gather(-1, tokens.long()[..., None])[..., 0]


def token_entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``H_t = -sum_v pi_T(v) log pi_T(v)`` in nats, between 0 and log V.

    Args:
        logits: [B, R, V].
        temperature: T > 0.

    Returns:
        [B, R] float32 (float64 for float64 logits).

    Raises:
        ValueError: for another number of dimensions, or T not positive.
    """
    check_shapes(logits=(logits, "BRV"))
    logp = _tempered(logits, temperature)
    # 0 log 0 = 0: without this a ruled-out token would make the entropy NaN.
    finite = logp.masked_fill(logp == float("-inf"), 0.0)
    return -(logp.exp() * finite).sum(dim=-1)


def logprob_agreement(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """``mean_t exp(|a_t - b_t|)`` over the masked tokens: by what factor, on average, two computations of the same
    token's probability differ. 1 is perfect; above about 1.05 the policy learns from samples of another model.

    Args:
        a: [B, R] log-probs, such as the sampler's.
        b: [B, R] log-probs of the same tokens, such as the recomputed ones.
        mask: [B, R].

    Returns:
        A scalar, at least 1.

    Raises:
        ValueError: where the shapes differ or the mask is empty.

    Source: NVIDIA NeMo RL's "multiplicative probability error of sampled tokens" (guide "Add New Models"), with its
    limit of 1.05.
    """
    check_shapes(a=(a, "BR"), b=(b, "BR"), mask=(mask, "BR"))
    return masked_mean((keep(a, mask) - keep(b, mask)).abs().exp(), mask)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    check_positive(temperature=temperature)
    return torch.log_softmax(upcast(logits) / temperature, dim=-1)
