"""Sums, means and whitening over the real tokens of a padded batch.

Shape letters: B sequences, R response tokens. Masks are bool (or integer, nonzero = real) and come from lengths.
Whatever stands in the padding, NaN included, reaches neither a result nor a gradient. Results are float32 (float64 for
float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from perl_vlm.formulas._checks import as_mask, check_same_shape, check_shapes, keep


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """``sum_i m_i x_i`` over everything, or along ``dim``; 0 where nothing is masked in.

    Args:
        x: any shape, usually [B, R].
        mask: the same shape.
        dim: the dimension to sum along; everything when None.

    Raises:
        ValueError: where the shapes differ or the mask is floating-point.
    """
    check_same_shape(x=x, mask=mask)
    kept = keep(x, mask)
    return kept.sum() if dim is None else kept.sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """``sum_i m_i x_i / sum_i m_i`` over everything, or along ``dim``, where an empty row gives 0.

    With ``dim=None`` every token has the same weight; with ``dim=1`` every sequence of [B, R] has its own mean.

    Raises:
        ValueError: where the shapes differ, or with ``dim=None`` an empty mask: the mean of nothing is no number.
    """
    total = masked_sum(x, mask, dim)
    if dim is None:
        return total / _count(mask, at_least=1)
    return total / as_mask(mask).sum(dim=dim).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, *, unbiased: bool = False) -> Tensor:
    """``sum_i m_i (x_i - mean)^2 / n`` over everything, with ``n = sum_i m_i``, or ``n - 1`` where ``unbiased``.

    Computed in two passes, so that a large mean costs no precision.

    Raises:
        ValueError: where the shapes differ, for an empty mask, and for a single entry where ``unbiased``.
    """
    check_same_shape(x=x, mask=mask)
    count = _count(mask, at_least=2 if unbiased else 1)
    squares = (keep(x, mask) - masked_mean(x, mask)) ** 2
    return masked_sum(squares, mask) / (count - 1 if unbiased else count)


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, epsilon: float = 1e-8) -> Tensor:
    """``(x - mean) / sqrt(var + epsilon)``, plus the old mean where ``shift_mean`` is False.

    Afterwards the masked entries have variance 1 and mean 0, or variance 1 and the mean they had before. Entries that
    are all alike become 0 (or keep their value). Mean and variance are those of the tensor given, so give the whole
    round, not one process's share of it.

    Args:
        x: any shape, usually [B, R].
        mask: the same shape.
        shift_mean: whether the mean is shifted to 0.
        epsilon: keeps the division finite.

    Returns:
        The shape of x, zero outside the mask.

    Raises:
        ValueError: where the shapes differ or the mask is empty.

    Source: Huang et al., "The N+ implementation details of RLHF with PPO", 2403.17031 (variance without Bessel's
    correction; rewards keep their mean, advantages do not).
    """
    mean, variance = masked_mean(x, mask), masked_var(x, mask)
    whitened = (keep(x, mask) - mean) * torch.rsqrt(variance + epsilon)
    return keep(whitened if shift_mean else whitened + mean, mask)


def last_valid(mask: Tensor) -> Tensor:
    """Index of the last real token in each row: ``max {t : m_t}``, [B, R] -> [B] int64, padding on either side.

    Raises:
        ValueError: naming the rows without any real token.
    """
    check_shapes(mask=(mask, "BR"))
    real = as_mask(mask)
    empty = (~real.any(dim=1)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"rows {empty} of the mask {tuple(mask.shape)} have no real token, so they have no last one")
    positions = torch.arange(real.shape[1], device=real.device)
    return torch.where(real, positions, torch.zeros_like(positions)).amax(dim=1)


def take_at(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, index[b]]`` for every b: [B, R] and int64 [B] -> [B] in the dtype of x.

    Raises:
        ValueError: where the shapes do not fit or an index lies outside [0, R).
    """
    check_shapes(x=(x, "BR"), index=(index, "B"))
    outside = ((index < 0) | (index >= x.shape[1])).nonzero()[:, 0].tolist()
    if outside:
        raise ValueError(f"rows {outside} have an index outside [0, {x.shape[1]})")
    return x.gather(1, index[:, None])[:, 0]


def _count(mask: Tensor, *, at_least: int) -> Tensor:
    count = as_mask(mask).sum()
    if count < at_least:
        raise ValueError(
            f"the mask {tuple(mask.shape)} marks {int(count)} entries as real; at least {at_least} needed here"
        )
    return count
