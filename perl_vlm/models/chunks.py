"""Work on a few tokens at a time: what a token gives depends on that token alone, so that a batch of logits need never
be held, forwards or backwards.

Shape letters: N tokens, F the columns of a token's features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 2**27
"""How large the float32 logits of one chunk may be. Half a dozen tensors of that size live at once."""
CACHE_BYTES, CACHE_TOKENS = 2**22, 128
"""On a CPU: a chunk whose logits stay in its caches goes through them several times faster, if it is still large enough
to be worth reading the head's weights for."""


def chunk_tokens(vocabulary: int, device: str) -> int:
    """Tokens to a chunk of logits on a kind of device."""
    most = CHUNK_BYTES // (4 * vocabulary)
    if device == "cpu":
        most = min(most, max(CACHE_TOKENS, CACHE_BYTES // (4 * vocabulary)))
    return max(1, most)


def in_chunks(
    work: Callable[..., tuple[Tensor, ...]],
    size: int,
    *columns: Tensor,
    learning: Sequence[int] = (0,),
    frozen: bool = False,
) -> list[Tensor]:
    """``work`` on ``size`` rows of the columns at a time, with little kept for the backward pass.

    Args:
        work: takes some rows of each column and gives numbers for each row, [n] each, that depend on that row alone.
        size: rows at a time.
        columns: [N, ...] each; gradients reach the first, [N, F].
        learning: which of the numbers have gradients.
        frozen: nothing that trains lies in ``work``. Then the gradient of every number with respect to its row is made
            at once, [N, F], and backward has only to scale it. Otherwise backward does the work again.

    Returns:
        [N] of each number.

    Raises:
        ValueError: for a size below 1.
    """
    if size < 1:
        raise ValueError(f"a chunk needs at least one token, got {size}")
    if frozen and torch.is_grad_enabled() and columns[0].requires_grad:
        return list(_RowGradients.apply(work, size, tuple(learning), *columns))
    done = []
    for pieces in zip(*(column.split(size) for column in columns), strict=True):
        if torch.is_grad_enabled():
            done.append(checkpoint(work, *pieces, use_reentrant=False, preserve_rng_state=False))
        else:
            done.append(work(*pieces))
    return [torch.cat(column) for column in zip(*done, strict=True)]


class _RowGradients(torch.autograd.Function):
    """Forward makes the numbers and their gradients with respect to the rows; no chunk is met twice."""

    @staticmethod
    def forward(
        ctx: Any, work: Callable[..., tuple[Tensor, ...]], size: int, learning: tuple[int, ...], *columns: Tensor
    ) -> tuple[Tensor, ...]:
        numbers: list[list[Tensor]] = []
        gradients = [torch.empty_like(columns[0]) for _ in learning]
        for place, pieces in enumerate(zip(*(column.split(size) for column in columns), strict=True)):
            with torch.enable_grad():
                rows = pieces[0].detach().requires_grad_()
                found = work(rows, *pieces[1:])
            for number, own in zip(learning, gradients, strict=True):
                alone = torch.ones_like(found[number])  # rows do not depend on each other
                (grad,) = torch.autograd.grad(found[number], rows, alone, retain_graph=number != learning[-1])
                own[place * size : place * size + len(rows)] = grad
            numbers.append([number.detach() for number in found])
            del found
        ctx.save_for_backward(*gradients)
        ctx.learning, ctx.columns = learning, len(columns)
        made = tuple(torch.cat(number) for number in zip(*numbers, strict=True))
        ctx.mark_non_differentiable(*(number for place, number in enumerate(made) if place not in learning))
        return made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total: Tensor | None = None
        for number, own in zip(ctx.learning, ctx.saved_tensors, strict=True):
            part = own * grads[number].to(own.dtype)[:, None]
            total = part if total is None else total.add_(part)
        return None, None, None, total, *(None for _ in range(ctx.columns - 1))
