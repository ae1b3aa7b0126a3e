"""Log-probabilities and entropy of a tempered policy, how well two recomputations of them agree, and sampling from it.

Shape letters: B sequences, R response tokens, V vocabulary. z are logits, T the temperature, all logarithms natural.
A logit of minus infinity is a token ruled out: it has probability 0 and adds nothing to an entropy, nor to a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perl_vlm.formulas._checks import check_positive, check_shapes, keep, upcast
from perl_vlm.formulas.masking import masked_mean

_ROUNDING = 1e-6
"""By how much a sum of probabilities may miss ``top_p``: float32 logits do not tell probabilities better."""


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
    return _of(_tempered(logits, temperature), tokens)


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
    return _entropy(_tempered(logits, temperature))


def token_logprobs_entropy(logits: Tensor, tokens: Tensor, *, entropy_gradient: bool = True) -> tuple[Tensor, Tensor]:
    """``token_logprobs`` and ``token_entropy`` of one softmax, for logits that are tempered already.

    Args:
        logits: [B, R, V].
        tokens: [B, R] ids within the vocabulary; they are not looked at first.
        entropy_gradient: whether gradients go through the entropy too.

    Returns:
        [B, R] and [B, R].

    Raises:
        ValueError: where the shapes do not fit.
    """
    check_shapes(logits=(logits, "BRV"), tokens=(tokens, "BR"))
    logp = _tempered(logits, 1.0)
    return _of(logp, tokens), _entropy(logp if entropy_gradient else logp.detach())


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


def top_p_mask(logits: Tensor, top_p: float) -> Tensor:
    """The smallest set of most likely tokens whose probability reaches ``top_p``: the nucleus.

    A token is in it while the tokens before it, in the order of their probability, fall short of ``top_p``; so at least
    one always is. Of equally likely tokens on the edge those with the lower ids are taken. Sums are float64, since
    those of a large vocabulary in float32 need not reach 1; one that misses ``top_p`` by a millionth reaches it.

    Args:
        logits: [..., V], already tempered: the temperature changes the nucleus.
        top_p: in (0, 1]. 1 keeps every token. Below 1 no token of probability 0 is kept.

    Returns:
        [..., V] bool, true for the tokens kept.

    Raises:
        ValueError: where ``top_p`` lies outside (0, 1] or the vocabulary is empty.

    Source: Holtzman et al., "The curious case of neural text degeneration", 1904.09751.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1]")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits is {tuple(logits.shape)}: there is no vocabulary to choose from")
    if top_p == 1:
        return torch.ones_like(logits, dtype=torch.bool)
    with torch.no_grad():
        probs, order = torch.softmax(logits.double(), dim=-1).sort(dim=-1, descending=True, stable=True)
        before = probs.cumsum(dim=-1) - probs
        kept = before < top_p - _ROUNDING
        kept[..., 0] = True
        return torch.zeros_like(kept).scatter(-1, order, kept)


def inverse_cdf(probs: Tensor, uniform: Tensor, *, check: bool = True) -> Tensor:
    """``min {v : p_0 + ... + p_v > u (p_0 + ... + p_{V-1})}``: one token for each row, drawn by one uniform number.

    Exact sampling that is a function of its arguments: a row's token depends neither on the rows beside it nor on a
    global generator. Sums are float64. Rounding cannot make it choose a token of probability 0.

    Args:
        probs: [B, V], 0 or more; a row need not sum to 1.
        uniform: [B] u in [0, 1), better float64: float32 numbers are 6e-8 apart, too coarse for the rarest tokens.
        check: look at the values. Not to do so saves waiting for an accelerator at every token; the caller then looks
            at ``uniform`` before and at the log-probs of the drawn tokens after. A row with NaN draws a token of NaN.

    Returns:
        [B] int64 ids.

    Raises:
        ValueError: where the shapes do not fit, or with ``check`` where a u lies outside [0, 1), or (the rows are
            named) a row has a negative probability, one that is not finite, or none above 0.

    Source: Devroye, "Non-uniform random variate generation", 1986, chapter III.2.
    """
    check_shapes(probs=(probs, "BV"), uniform=(uniform, "B"))
    probs, uniform = probs.double(), uniform.double()
    cumulative, possible = probs.cumsum(dim=-1), probs > 0
    if check:
        _check_distribution(probs, uniform)
    places = torch.arange(probs.shape[1], device=probs.device)
    # Asked of possible tokens alone: an accelerator sums in parallel, and a rounding may then rise at a token of
    # probability 0, or leave the last possible token short of the whole sum.
    beyond = possible & (cumulative > uniform[:, None] * cumulative[:, -1:])
    first = torch.where(beyond, places, probs.shape[1]).amin(dim=-1)
    last = torch.where(possible, places, 0).amax(dim=-1)
    return torch.minimum(first, last)


def _check_distribution(probs: Tensor, uniform: Tensor) -> None:
    if not bool(((uniform >= 0) & (uniform < 1)).all()):
        raise ValueError(f"the uniform numbers run from {uniform.min()} to {uniform.max()}; they must lie in [0, 1)")
    bad = (~(probs.isfinite() & (probs >= 0)).all(dim=-1) | ~(probs > 0).any(dim=-1)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"rows {bad} of the probabilities are no distribution: some must be above 0, all finite")


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    check_positive(temperature=temperature)
    logits = upcast(logits)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def _of(logp: Tensor, tokens: Tensor) -> Tensor:
    return logp.gather(-1, tokens.long()[..., None])[..., 0]


def _entropy(logp: Tensor) -> Tensor:
    # 0 log 0 = 0: without the limit a ruled-out token would make the entropy NaN.
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(dim=-1)
