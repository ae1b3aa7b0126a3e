"""How far a policy is from its reference: estimates on sampled tokens, and the exact sum over the vocabulary.

Shape letters: B sequences, R response tokens, V vocabulary. Symbols: l = log pi(a), l0 = log pi_ref(a) of a token a
that was sampled from pi; rho = pi_ref(a) / pi(a) = exp(l0 - l). The estimates take tensors of any one shape, usually
[B, R], and answer in that shape, float32 (float64 for float64 inputs). What they are worth *in expectation* holds only
where a ~ pi; on other samples none of them estimates KL(pi || pi_ref).

Sources: the table of regularisers in "Exploring the impact of low-rank adaptation on the performance, efficiency, and
regularization of RLHF", 2309.09055 (all five); J. Schulman, "Approximating KL divergence", 2020 (k1, k2, k3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perl_vlm.formulas._checks import check_positive, check_same_shape, check_shapes, upcast


def k1(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """``l - l0``. Of either sign; unbiased for KL(pi || pi_ref), with a high variance.

    As a penalty in the reward, its sum over a response is the log-ratio of the whole response.

    Raises:
        ValueError: where the shapes differ.
    """
    check_same_shape(logp=logp, logp_ref=logp_ref)
    return upcast(logp) - upcast(logp_ref)


def clamped_k1(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """``max(l - l0, 0)``. Never negative; no estimate of the KL: its mean is above KL(pi || pi_ref) as soon as pi can
    sample a token that pi_ref likes better.

    AlpacaFarm's and LLaVA-RLHF's default, there called the KL. It forgives what the reference likes better and pays
    nothing back for it, so that noise alone costs reward.

    Raises:
        ValueError: where the shapes differ.
    """
    return k1(logp, logp_ref).clamp(min=0.0)


def k2(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """``(l - l0)^2 / 2``. Never negative; biased, but equal to KL(pi || pi_ref) to second order where the policies are
    close, with a low variance.

    Raises:
        ValueError: where the shapes differ.
    """
    return 0.5 * k1(logp, logp_ref) ** 2


def k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """``(rho - 1) - log rho``, the Bregman form. Never negative; unbiased for KL(pi || pi_ref) where pi gives
    probability to every token that pi_ref does; low variance unless rho is heavy-tailed.

    Raises:
        ValueError: where the shapes differ.
    """
    log_rho = -k1(logp, logp_ref)
    # expm1 keeps the second-order term that exp(x) - 1 rounds away near 0.
    return torch.expm1(log_rho) - log_rho


def js_proxy(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """``(max(l - log m, 0) + max(l0 - log m, 0)) / 2`` with ``m = (pi + pi_ref) / 2``, all at the sampled token.

    Between 0 and log(2) / 2, symmetric in its arguments. A stand-in for the Jensen-Shannon divergence and no estimate
    of it: the divergence also averages over tokens drawn from pi_ref, and has no clamp.

    Raises:
        ValueError: where the shapes differ.
    """
    check_same_shape(logp=logp, logp_ref=logp_ref)
    logp, logp_ref = upcast(logp), upcast(logp_ref)
    log_m = torch.logaddexp(logp, logp_ref) - math.log(2.0)
    return 0.5 * ((logp - log_m).clamp(min=0.0) + (logp_ref - log_m).clamp(min=0.0))


def exact_kl(logits_p: Tensor, logits_q: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``KL(p || q)_t = sum_v p_T(v) (log p_T(v) - log q_T(v))`` in nats, both tempered by T.

    Args:
        logits_p: [B, R, V]; a logit of minus infinity rules a token out, which then adds nothing.
        logits_q: [B, R, V]; infinite where q rules out what p allows.
        temperature: T > 0.

    Returns:
        [B, R] float32 (float64 for float64 logits), at least 0 up to rounding.

    Raises:
        ValueError: where the shapes differ or T is not positive.

    Source: Kullback and Leibler, "On information and sufficiency", 1951.
    """
    check_shapes(logits_p=(logits_p, "BRV"), logits_q=(logits_q, "BRV"))
    check_positive(temperature=temperature)
    log_p = torch.log_softmax(upcast(logits_p) / temperature, dim=-1)
    log_q = torch.log_softmax(upcast(logits_q) / temperature, dim=-1)
    p = log_p.exp()
    # 0 log(0 / q) = 0, also where both are ruled out and the difference of their logarithms is NaN.
    difference = torch.where(p == 0, torch.zeros_like(p), log_p - log_q)
    return (p * difference).sum(dim=-1)
