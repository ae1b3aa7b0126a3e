"""What a frozen vision tower made of a batch's pictures, kept for the next pass over the same batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from perl_vlm.models.towers import tower_of

KEPT = 1
"""Batches of pictures: passes over one batch follow each other."""


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The module that is the vision tower; None where there is none."""
    return next((module for name, module in model.named_modules() if name and tower_of(name) == "vision"), None)


@contextmanager
def remembering_pictures(model: nn.Module) -> Iterator[None]:
    """Within, a vision tower that nothing adapts and nothing trains runs once for equal pictures: reference, policy,
    value and reward models see the same features. Pictures are compared pixel by pixel, which costs nothing beside the
    tower. A tower that some role adapts, be it active or not, runs as often as it is asked."""
    tower = vision_tower(model)
    if tower is None or not _is_frozen(tower) or "forward" in vars(tower):
        yield
        return
    usual, kept = tower.forward, list[tuple[list[Any], Any, Any]]()

    def forward(*arguments: Any, **options: Any) -> Any:
        given, layout = tree_flatten((arguments, options))
        if any(isinstance(value, Tensor) and value.requires_grad for value in given):
            return usual(*arguments, **options)
        for values, form, made in kept:
            if form == layout and _same(values, given):
                return _anew(made)
        made = usual(*arguments, **options)
        kept.append((given, layout, _anew(made)))
        del kept[:-KEPT]
        return made

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward


def _is_frozen(tower: nn.Module) -> bool:
    adapted = any(isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) for module in tower.modules())
    return not adapted and not any(parameter.requires_grad for parameter in tower.parameters())


def _anew(made: Any) -> Any:
    """The same tensors in another container: Qwen-VL and others write into the output that they are given."""
    return tree_map(lambda leaf: leaf, made)


def _same(one: list[Any], other: list[Any]) -> bool:
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else type(a) is type(b) and bool(a == b)
        for a, b in zip(one, other, strict=True)
    )
