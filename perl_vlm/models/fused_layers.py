"""Frozen layers between the matrix products, with little kept for the backward pass: root-mean-square norms and gated
feed-forward layers.

Written in plain operations, a norm keeps its input in float32 and a gated layer three wide tensors; together that is
more than half of what a trunk keeps for LoRA. Here a norm keeps its input in its own type and one number a row, a gated
layer its two projections. Forwards the operations are the family's own, in the same order, so that no bit changes; on
a CPU they run on as many rows at a time as its caches hold, which is faster too.

Which layers can be replaced is found by trying, not by name: a small copy of each kind is run both ways.

Shape letters: N rows, D columns.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

CACHED = 2**20
"""Elements of a tensor that stays in a CPU's cache together with a few like it."""


def _rows_at_once(tensor: Tensor) -> int:
    """Of [N, D]."""
    return max(1, CACHED // tensor.shape[-1]) if tensor.device.type == "cpu" else max(1, tensor.shape[0])


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _trained(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


# -- norms ---------------------------------------------------------------------------------------------------------

Scale = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""Of a normalised row in float32 and the weight: the layer's output in a type."""


def _narrow_first(row: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight * row.to(dtype)  # Llama


def _narrow_last(row: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight * row).to(dtype)


def _around_one(row: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return row.mul_(1.0 + weight.float()).to(dtype)  # Gemma


SCALES: tuple[Scale, ...] = (_narrow_first, _narrow_last, _around_one)


def _normalise(x: Tensor, weight: Tensor, eps: float, scale: Scale) -> tuple[Tensor, Tensor]:
    """[N, D] -> the layer's output [N, D], and 1 / sqrt(mean x^2 + eps), [N, 1]."""
    size = _rows_at_once(x)
    if len(x) <= size:
        wide = x.float()
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return scale(wide * root, weight, x.dtype), root
    out = torch.empty_like(x)
    inverse = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    for rows, target, root in zip(x.split(size), out.split(size), inverse.split(size), strict=True):
        wide = rows.float()
        root.copy_(torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps))
        target.copy_(scale(wide * root, weight, x.dtype))
    return out, inverse


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, scale: Scale) -> Tensor:
        out, inverse = _normalise(_flat(x), weight, eps, scale)
        ctx.save_for_backward(x, weight, inverse)
        ctx.scale = scale
        return out.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        factor = weight.float() + 1.0 if ctx.scale is _around_one else weight.float()
        rows = _flat(x)
        size, out = _rows_at_once(rows), torch.empty_like(rows)
        pieces = (part.split(size) for part in (rows, _flat(grad), inverse, out))
        for own, theirs, root, target in zip(*pieces, strict=True):
            wide, unit = theirs.float() * factor, own.float() * root  # in float32 `.float()` is no copy
            along = (wide * unit).mean(-1, keepdim=True)
            target.copy_(wide.sub_(unit.mul_(along)).mul_(root))
        return out.view(x.shape), None, None, None


def _norm_forward(scale: Scale, kind: type, self: Any, x: Tensor) -> Tensor:
    weight, eps = self.weight, _eps(self)
    plain = weight.dtype == x.dtype and x.is_contiguous()  # sums over other strides are added up in another order
    if weight.requires_grad or isinstance(weight, DTensor) or not plain:
        own: Tensor = kind.forward(self, x)  # type: ignore[attr-defined]
        return own
    if _trained(x):
        return _RmsNorm.apply(x, weight, eps, scale)
    return _normalise(_flat(x), weight, eps, scale)[0].view(x.shape)


def _eps(layer: Any) -> Any:
    return getattr(layer, "variance_epsilon", getattr(layer, "eps", None))


def _norm_of(layer: nn.Module) -> Callable[..., Tensor] | None:
    """The forward pass that gives what this kind of norm gives, if there is one."""
    weight = getattr(layer, "weight", None)
    if set(dict(layer.named_parameters())) != {"weight"} or weight is None or weight.ndim != 1 or list(layer.buffers()):
        return None
    if not isinstance(_eps(layer), float):
        return None
    small = copy.copy(layer)
    small._parameters = {"weight": None}
    draw = torch.Generator().manual_seed(0)
    for scale in SCALES:
        if all(_same_norm(small, scale, dtype, draw) for dtype in (torch.float32, torch.bfloat16)):
            return partial(_norm_forward, scale, type(layer))
    return None


def _same_norm(small: Any, scale: Scale, dtype: torch.dtype, draw: torch.Generator) -> bool:
    weight = torch.randn(16, generator=draw).to(dtype)
    small.weight = nn.Parameter(weight, requires_grad=False)

    def ours(x: Tensor) -> Tensor:
        return _normalise(x, weight, _eps(small), scale)[0]

    return _alike(small, ours, torch.randn(5, 16, generator=draw).to(dtype))


# -- gated feed-forward layers -------------------------------------------------------------------------------------


def _activated(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    size = _rows_at_once(gate)
    if len(gate) <= size:
        return act(gate).mul_(up)
    out = torch.empty_like(gate)
    for one, other, target in zip(gate.split(size), up.split(size), out.split(size), strict=True):
        torch.mul(act(one), other, out=target)
    return out


class _Gated(torch.autograd.Function):
    """act(gate) * up, of [N, D] each."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _activated(act, gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        to_gate, to_up, size = torch.empty_like(gate), torch.empty_like(up), _rows_at_once(gate)
        pieces = (part.split(size) for part in (gate, up, grad, to_gate, to_up))
        for one, other, back, target, beside in zip(*pieces, strict=True):
            with torch.enable_grad():
                leaf = one.detach().requires_grad_()
                active = ctx.act(leaf.view_as(leaf))  # who counts operations hooks on to what is no leaf alone
            torch.mul(back, active.detach(), out=beside)
            target.copy_(torch.autograd.grad(active, leaf, back * other)[0])
        return to_gate, to_up, None


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    if _trained(gate, up):
        hidden = _Gated.apply(_flat(gate), _flat(up), self.act_fn)
    else:
        hidden = _activated(self.act_fn, _flat(gate), _flat(up))
    out: Tensor = self.down_proj(hidden.view(gate.shape))
    return out


_PARTS = {"gate_proj", "up_proj", "down_proj"}


def _gated_of(layer: nn.Module) -> Callable[..., Tensor] | None:
    """The forward pass that gives what this kind of gated layer gives, if there is one."""
    children = dict(layer.named_children())
    act = getattr(layer, "act_fn", None)
    if not _PARTS <= children.keys() <= {*_PARTS, "act_fn"} or not callable(act) or layer._parameters:
        return None
    if isinstance(act, nn.Module) and act.state_dict():
        return None
    probe = torch.linspace(-2, 2, 9)
    if act(probe).data_ptr() == probe.data_ptr() or not torch.equal(probe, torch.linspace(-2, 2, 9)):
        return None  # it works in place, on what is kept for backward
    small = copy.copy(layer)
    draw = torch.Generator().manual_seed(0)
    small._modules = {**layer._modules, **{name: nn.Linear(6, 6) for name in _PARTS}}
    for name in _PARTS:
        small.get_submodule(name).weight.copy_(torch.randn(6, 6, generator=draw))  # type: ignore[operator]
    same = _alike(small, partial(_gated_forward, small), torch.randn(2, 3, 6, generator=draw))
    return _gated_forward if same else None


# -- putting them in -----------------------------------------------------------------------------------------------


_kinds: dict[tuple[type, Any], type] = {}
"""What kinds of layers become, by the forward pass that they get."""


@torch.no_grad()
def fuse_layers(model: nn.Module) -> int:
    """Let every norm and gated layer that can be replaced keep less; returns how many. Where such a layer's weights
    train, or are spread over processes, it works as before."""
    count = 0
    for layer in model.modules():
        if hasattr(layer, "fused_here") or "forward" in vars(layer):  # done already, or somebody else's
            continue
        forward = _find(layer)
        if forward is not None:
            kind = type(layer)
            key = kind, getattr(forward, "args", None)
            if key not in _kinds:
                _kinds[key] = type(kind.__name__, (kind,), {"forward": _method(forward, kind), "fused_here": True})
            layer.__class__ = _kinds[key]
            count += 1
    return count


def _find(layer: nn.Module) -> Callable[..., Tensor] | None:
    if len(inspect.signature(type(layer).forward).parameters) != 2:
        return None  # it takes more than a tensor
    for look in (_norm_of, _gated_of):
        try:
            with torch.random.fork_rng(devices=[]):
                forward = look(layer)
        except Exception:
            continue
        if forward is not None:
            return forward
    return None


def _alike(layer: nn.Module, ours: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether a layer gives what ``ours`` gives: in training as in evaluation, for small numbers and for such that a
    limit would show."""
    for training in (True, False):
        layer.training = training
        for size in (1.0, 1e3):
            given = layer(size * x)
            if not isinstance(given, Tensor) or not torch.equal(given, ours(size * x)):
                return False
    return True


def _method(function: Callable[..., Tensor], kind: Any) -> Callable[..., Tensor]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs) if kwargs else function(self, *args)

    return forward
