"""Forward and backward passes without numbers: a model on the meta device runs as in training, and what would be alive
is counted.

So what autograd keeps of a layer is not written down here for each family; autograd itself says it, adapters and fused
layers included. Written down is what depends on the device that is planned for, because the meta device has no kernel
of its own to show it: attention (``fused_attention``) and mixed precision.

Shape letters: M rows, L tokens of a row, H hidden size, A attention heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from perl_vlm.models import block_attention as attention

_NARROWED = (torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm)
"""What autocast computes in the narrow type, of what models are made of."""
_WIDENED = (torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax, torch.nn.functional.layer_norm)
"""What it computes in float32."""


class _FusedAttention(torch.autograd.Function):
    """Keeps what the fused kernels keep under a mask: their inputs, the mask as numbers, the output and a float32
    log-sum for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows, heads, length, _ = query.shape
        bias = None if mask is None else mask
        if mask is not None and mask.dtype == torch.bool:
            bias = torch.empty(mask.shape, dtype=query.dtype, device=query.device)
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        sums = torch.empty(rows, heads, length, dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, bias, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return *(torch.empty_like(part) for part in (query, key, value)), None


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """[M, A, L, D] -> [M, A, L, D], shapes alone, with the memory of PyTorch's fused attention (its flash kernel on a
    CPU, flash or memory-efficient on CUDA): no [L, L] of scores, but the mask as numbers, once for each call."""
    return _FusedAttention.apply(query, key, value, mask)


class _StandIns(TorchFunctionMode):
    """Puts ``fused_attention`` in the place of PyTorch's, and computes in ``narrow`` what autocast would."""

    def __init__(self, narrow: torch.dtype | None) -> None:
        super().__init__()
        self.narrow = narrow
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = (self._cast(part) for part in args[:3])
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            groups = query.shape[1] // key.shape[1]
            if groups > 1:
                key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
            return fused_attention(query, key, value, mask)
        if self.narrow is not None and func in _NARROWED:
            args = tuple(self._cast(part) for part in args)
            kwargs = {name: self._cast(part) for name, part in kwargs.items()}
        elif self.narrow is not None and func in _WIDENED:
            args = tuple(part.float() if isinstance(part, Tensor) else part for part in args)
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        if self.narrow is None or not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.narrow)
        # Weights are cast once for all passes of an autocast block.
        if id(value) not in self._casts:
            self._casts[id(value)] = value, value.to(self.narrow)
        return self._casts[id(value)][1]


@contextmanager
def stand_ins(narrow: torch.dtype | None = None) -> Iterator[None]:
    """Within, attention is ``fused_attention``; with ``narrow``, products are computed in it, as autocast does."""
    asked = torch.is_autocast_enabled

    def known(device: str = "cuda") -> bool:
        return device != "meta" and asked(device)  # torch has no autocast for meta, and raises where it is asked

    mode, usual = _StandIns(narrow), attention.block_attention

    def in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float, blocks: Any) -> Tensor:
        if mode.narrow is None:
            return usual(query, key, value, scale, blocks)
        query, key, value = (part.to(mode.narrow) for part in (query, key, value))
        inner, mode.narrow = mode.narrow, None  # as autocast is off in a function of our own
        try:
            return usual(query, key, value, scale, blocks)
        finally:
            mode.narrow = inner

    with (
        mode,
        patch.object(torch, "is_autocast_enabled", known),
        patch.object(attention, "block_attention", in_blocks),
    ):
        yield


class _Bump(torch.autograd.Function):
    """Holds so many bytes for a moment, in the forward pass and in the backward pass, and some tensors from one to the
    other."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, going: int, coming: int, mark: Callable[[], None], *kept: Tensor) -> Tensor:
        ctx.coming, ctx.mark, ctx.kept = coming, mark, len(kept)
        ctx.save_for_backward(*kept)
        _hold(going, mark)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _hold(ctx.coming, ctx.mark)
        return grads[0], None, None, None, *(None for _ in range(ctx.kept))


def _hold(size: int, mark: Callable[[], None]) -> None:
    mark()
    torch.empty(size, dtype=torch.uint8, device="meta")
    mark()


def bump(hidden: Tensor, going: int, coming: int, mark: Callable[[], None], *kept: Tensor) -> Tensor:
    """The same tensor, on whose way ``going`` bytes are held for a moment forwards and ``coming`` bytes backwards, and
    the tensors ``kept`` in between. ``mark`` is called before and after."""
    return _Bump.apply(hidden, going, coming, mark, *kept)


class _Joined(torch.autograd.Function):
    """Pictures put where their placeholders stand: a copy of the embeddings that both gradients go through."""

    @staticmethod
    def forward(ctx: Any, embeds: Tensor, seen: Tensor, back: Callable[[], None]) -> Tensor:
        ctx.shape, ctx.back = (seen.shape, seen.dtype), back
        return torch.empty_like(embeds)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype = ctx.shape
        ctx.back()
        return grads[0], grads[0].new_empty(shape, dtype=dtype), None


def joined(embeds: Tensor, seen: Tensor, back: Callable[[], None]) -> Tensor:
    """[M, L, H] embeddings with what the vision tower saw, of any shape, in their midst.

    ``back`` is called once backward has come through the language tower.
    """
    return _Joined.apply(embeds, seen, back)
