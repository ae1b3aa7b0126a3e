"""The last layer of a trunk, at the tokens alone whose states are read.

Of a prompt nothing is read after the last layer but its keys and values: the queries, the attention's output and the
feed-forward part of its tokens are made for nothing, forwards and backwards. Of eight layers that is a tenth of a
reward model's step. Within ``only_at`` those parts of the last layer meet the wanted tokens alone; states elsewhere
are wrong then, and nobody's business.

Shape letters: M rows, L columns, n wanted tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from perl_vlm.errors import PerlVlmError
from perl_vlm.models.block_attention import narrowed

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_QUERIES, _OUTPUTS = ("q_proj",), ("o_proj", "out_proj")
_FEED_FORWARD = ("mlp", "feed_forward", "fc1", "fc2")


@dataclass(frozen=True)
class _Wanted:
    """Some tokens of packed rows."""

    shape: torch.Size
    """[M, L]"""
    places: Tensor
    """[n] in M * L."""

    def picked(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before a module that treats each token alone: [M, L, H] -> [1, n, H]."""
        if not args or args[0].shape[:2] != self.shape:
            return None
        return args[0].flatten(0, 1).index_select(0, self.places)[None], *args[1:]

    def laid_out(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor:
        """Behind it: [1, n, O] -> [M, L, O], zero elsewhere."""
        if not isinstance(out, Tensor) or out.shape[:2] != (1, len(self.places)):
            raise PerlVlmError(f"{type(module).__name__} does not treat tokens one by one")
        spread = out.new_zeros(self.shape.numel(), out.shape[-1])
        return spread.index_copy(0, self.places, out[0]).view(*self.shape, -1)


def last_layer(model: Any) -> nn.Module | None:
    """The last layer of a model's language trunk, where it is known how to find it."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    return layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None


_wide: WeakSet[Any] = WeakSet()
"""Models that gave other states this way."""


def narrows(model: Any) -> bool:
    """Whether to try ``only_at`` on a model."""
    return model not in _wide


def stay_wide(model: Any) -> None:
    """Remember that ``only_at`` is not for this model."""
    _wide.add(model)


@contextmanager
def only_at(model: Any, shape: torch.Size, places: Tensor) -> Iterator[None]:
    """Within, the last layer's queries, outputs and feed-forward part are made at some tokens alone.

    Args:
        model: whose trunk runs within, on [M, L] tokens.
        shape: [M, L].
        places: [n] places of the wanted tokens in M * L, each once, on any device.
    """
    layer = last_layer(model)
    if layer is None:
        yield
        return
    wanted = _Wanted(shape, places.to(model.device))
    with ExitStack() as stack:
        attention = next((part for name in _ATTENTION if (part := getattr(layer, name, None)) is not None), None)
        alone = [getattr(layer, name, None) for name in _FEED_FORWARD]
        if attention is not None:
            alone += [getattr(attention, name, None) for name in (*_QUERIES, *_OUTPUTS)]
            if places.device.type == "cpu":  # where masks have blocks
                columns = torch.zeros(shape.numel(), dtype=torch.bool).index_fill(0, places, True).view(shape)
                narrow = _narrowing(columns.any(dim=0))
                stack.callback(attention.register_forward_pre_hook(narrow, with_kwargs=True).remove)
        for part in alone:
            if part is not None:
                stack.callback(part.register_forward_pre_hook(wanted.picked).remove)
                stack.callback(part.register_forward_hook(wanted.laid_out).remove)
        yield


def _narrowing(columns: Tensor) -> Any:
    def narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor):
            kwargs = {**kwargs, "attention_mask": narrowed(mask, columns)}
        return args, kwargs

    return narrow
