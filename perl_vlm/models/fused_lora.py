"""The low-rank path of a frozen linear layer in three matrix products, in the type of the layer.

peft casts a layer's input to float32 for every adapter, keeps that copy for backward, and adds in float32: for eight
layers of 512 columns this is more memory than the layers' own. Here the products run in the type of the frozen weight,
as autocast would do them, with the adapters' float32 weights rounded for the product alone; kept for backward are the
input, which the query, key and value projections share, and its r columns under A.

Shape letters: T tokens, r the rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_made: ContextVar[dict[tuple[int, str, torch.dtype], tuple[Tensor, Tensor]] | None] = ContextVar("made", default=None)


@contextmanager
def weights_stay() -> Iterator[None]:
    """Within, no adapter's weights change and no gradient is wanted: they are rounded to the layer's type once, and not
    at every token that is decoded."""
    before = _made.set({})
    try:
        with torch.no_grad():
            yield
    finally:
        _made.reset(before)


class _LowRank(torch.autograd.Function):
    """y = x W' + b + sum_i (x A_i') B_i', W frozen. Adapters are added one after the other, so that one whose B is zero
    changes no bit of what the others give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *matrices: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, lows = _linear(rows, weight, bias), []
        for down, up in _pairs(matrices):
            lows.append(rows @ down.T)
            y.addmm_(lows[-1], up.T)
        ctx.save_for_backward(x, weight, *matrices, *lows)
        ctx.count = len(lows)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *rest = ctx.saved_tensors
        matrices, lows = rest[: 2 * ctx.count], rest[2 * ctx.count :]
        grad, rows = grads[0].reshape(-1, weight.shape[0]), x.reshape(-1, x.shape[-1])
        to_x = grad @ weight if ctx.needs_input_grad[0] else None
        to_matrices: list[Tensor | None] = []
        for place, (down, up) in enumerate(_pairs(matrices)):
            to_low = grad @ up
            if to_x is not None:
                to_x.addmm_(to_low, down)
            wanted = ctx.needs_input_grad[3 + 2 * place :]
            to_matrices += [to_low.T @ rows if wanted[0] else None, grad.T @ lows[place] if wanted[1] else None]
        return None if to_x is None else to_x.view_as(x), None, None, *to_matrices


def _pairs(matrices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(matrices[::2], matrices[1::2], strict=True)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *matrices: Tensor) -> Tensor:
    """A frozen linear layer with low-rank ones beside it, [..., in] -> [..., out].

    Args:
        x: [..., in].
        weight: [out, in], frozen.
        bias: [out] or None, frozen.
        matrices: for each adapter A, [r, in], and B times the adapter's scale, [out, r].
    """
    if torch.is_grad_enabled():
        return _LowRank.apply(x, weight, bias, *matrices)
    rows = x.reshape(-1, x.shape[-1])
    y = _linear(rows, weight, bias)
    for down, up in _pairs(matrices):
        y.addmm_(rows @ down.T, up.T)
    return y.view(*x.shape[:-1], weight.shape[0])


class FusedLinear(PeftLinear):
    """peft's layer, which takes the short way where nothing but plain low-rank adapters is active on a plain layer,
    and peft's own everywhere else: dropout, DoRA, 4 bits, merged weights, autocast, hooks on the frozen layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not names or args or kwargs or not self._is_plain(x, names):
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        return low_rank_linear(x, base.weight, base.bias, *self._matrices(names, x.dtype))

    def _is_plain(self, x: Tensor, names: list[str]) -> bool:
        base = self.get_base_layer()
        if self.disable_adapters or self.merged or base._forward_hooks or base._forward_pre_hooks:
            return False
        weight = base.weight
        if x.dtype != weight.dtype or weight.requires_grad or isinstance(weight, DTensor):
            return False
        if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
            return False
        return not any(
            name in self.lora_variant
            or (self.lora_dropout[name].training and isinstance(self.lora_dropout[name], nn.Dropout))
            or self.lora_B[name].bias is not None
            for name in names
        )

    def _matrices(self, names: list[str], dtype: torch.dtype) -> Iterator[Tensor]:
        """Of each active adapter A and B times its scale, in the layer's type."""
        made = _made.get()
        for name in names:
            key = id(self), name, dtype
            pair = None if made is None else made.get(key)
            if pair is None:
                up = (self.lora_B[name].weight * self.scaling[name]).to(dtype)
                pair = self.lora_A[name].weight.to(dtype), up
            if made is not None:
                made[key] = pair
            yield from pair


def fuse(layer: LoraLayer) -> None:
    """Let a layer that peft made take the short way. Others than plain linear ones stay as they are."""
    if type(layer) is PeftLinear and type(layer.get_base_layer()) is nn.Linear:
        layer.__class__ = FusedLinear
