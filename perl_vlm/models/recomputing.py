"""Activation checkpointing: a layer keeps its input alone and is computed again in the backward pass.

transformers' own switch works in training mode only, in which a model drops out; here it is a matter of whether
gradients are wanted. What a layer depends on besides its input (active adapters, dropout, the kind of attention) is
noted in the forward pass and put back for the second one. The last layer of the language trunk is left out: backward
begins there, so that nothing would be saved.

Source: Chen et al., "Training deep nets with sublinear memory cost", 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from perl_vlm.errors import PerlVlmError
from perl_vlm.models.last_layer import last_layer

Noted = Callable[[], AbstractContextManager[Any]]
"""Called in a forward pass; within what it returns the layer is computed again."""

_kinds: dict[type, type] = {}


def recompute_layers(model: Any, note: Noted) -> int:
    """Let the layers of a model's towers compute their activations again for backward; returns how many do.

    Args:
        model: changed in place. Doing it again puts another ``note`` in the place of the first.
        note: see ``Noted``.

    Raises:
        PerlVlmError: for a model whose layers are not marked as such.
    """
    layers = recomputable(model)
    if not layers:
        raise PerlVlmError(f"{type(model).__name__} has no layers to compute again; leave out --checkpointing")
    for layer in layers:
        kind = type(layer)
        if "recomputed" not in vars(kind):
            layer.__class__ = _kinds.setdefault(kind, _recomputed(kind))
        layer.__dict__["note_for_backward"] = note
    return len(layers)


def recomputable(model: Any) -> list[nn.Module]:
    """The layers that ``recompute_layers`` is for."""
    last = last_layer(model)
    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer) and layer is not last]


def _recomputed(kind: Any) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        note: Noted = self.note_for_backward
        if not torch.is_grad_enabled() or not _learns(self, (*args, *kwargs.values())):
            return kind.forward(self, *args, **kwargs)
        return checkpoint(
            partial(kind.forward, self, **kwargs),
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), note()),
        )

    return type(kind.__name__, (kind,), {"forward": forward, "recomputed": True})


def _learns(layer: nn.Module, given: tuple[Any, ...]) -> bool:
    """Whether backward comes by: a frozen tower below all adapters keeps nothing anyway."""
    if any(isinstance(value, Tensor) and value.requires_grad for value in given):
        return True
    return any(parameter.requires_grad for parameter in layer.parameters())
