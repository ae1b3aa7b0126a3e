"""The low-rank path of a frozen linear layer in three matrix products, in the type of the layer.

peft casts a layer's input to float32 for every adapter, keeps that copy for backward, and adds in float32: for eight
layers of 512 columns this is more memory than the layers' own. Here the products run in the type of the frozen weight,
as autocast would do them, with the adapters' float32 weights rounded for the product alone; kept for backward are the
input, which the query, key and value projections share, and its r columns under A.

Shape letters: T tokens, r the ranks of all active adapters together.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class _LowRank(torch.autograd.Function):
    """y = x W' + b + (x A') B', W frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ down.T
        ctx.save_for_backward(x, weight, down, up, low)
        return _linear(rows, weight, bias).addmm_(low, up.T).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, low = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        to_low = grad @ up
        to_x = to_down = to_up = None
        if ctx.needs_input_grad[0]:
            to_x = (grad @ weight).addmm_(to_low, down).view_as(x)
        if ctx.needs_input_grad[3]:
            to_down = to_low.T @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[4]:
            to_up = grad.T @ low
        return to_x, None, None, to_down, to_up


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    """A frozen linear layer with a low-rank one beside it, [..., in] -> [..., out].

    Args:
        x: [..., in].
        weight: [out, in], frozen.
        bias: [out] or None, frozen.
        down: [r, in], A.
        up: [out, r], B times the adapter's scale.
    """
    if not torch.is_grad_enabled():
        rows = x.reshape(-1, x.shape[-1])
        return _linear(rows, weight, bias).addmm_(rows @ down.T, up.T).view(*x.shape[:-1], weight.shape[0])
    return _LowRank.apply(x, weight, bias, down, up)  # type: ignore[no-untyped-call, no-any-return]


class FusedLinear(PeftLinear):
    """peft's layer, which takes the short way where nothing but plain low-rank adapters is active on a plain layer,
    and peft's own everywhere else: dropout, DoRA, 4 bits, merged weights, autocast, hooks on the frozen layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not names or args or kwargs or not self._is_plain(x, names):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        base = self.get_base_layer()
        return low_rank_linear(x, base.weight, base.bias, *self._matrices(names, x.dtype))

    def _is_plain(self, x: Tensor, names: list[str]) -> bool:
        base = self.get_base_layer()
        if self.disable_adapters or self.merged or base._forward_hooks or base._forward_pre_hooks:
            return False
        weight = base.weight
        if x.dtype != weight.dtype or weight.requires_grad or isinstance(weight, DTensor):
            return False
        if torch.is_autocast_enabled(x.device.type):
            return False
        return not any(
            name in self.lora_variant
            or (self.lora_dropout[name].training and isinstance(self.lora_dropout[name], nn.Dropout))
            or self.lora_B[name].bias is not None
            for name in names
        )

    def _matrices(self, names: list[str], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A of all active adapters and B times their scales, in the layer's type."""
        downs = [self.lora_A[name].weight.to(dtype) for name in names]
        ups = [(self.lora_B[name].weight * self.scaling[name]).to(dtype) for name in names]
        if len(names) == 1:
            return downs[0], ups[0]
        return torch.cat(downs), torch.cat(ups, dim=1)


def fuse(layer: LoraLayer) -> None:
    """Let a layer that peft made take the short way. Others than plain linear ones stay as they are."""
    if type(layer) is PeftLinear and type(layer.get_base_layer()) is nn.Linear:
        layer.__class__ = FusedLinear
