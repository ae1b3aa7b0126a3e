"""Skeletons of other sizes, and what adapters would add to one."""

from __future__ import annotations

import copy
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import nn

from perl_vlm.config import LoraConfig
from perl_vlm.models.adapters import Adapters
from perl_vlm.models.inspection import Skeleton
from perl_vlm.models.sharding import base_layers
from perl_vlm.models.towers import TOWERS, Tower, tower_of
from perl_vlm.plan.shapes import vision_layers

_counted: WeakKeyDictionary[nn.Module, dict[LoraConfig, dict[Tower, int]]] = WeakKeyDictionary()


def adapter_counts(skeleton: Skeleton, lora: LoraConfig) -> dict[Tower, int]:
    """Parameters of one role's adapter (and projector copy) by tower. Raises PerlVlmError where it does not fit."""
    known = _counted.setdefault(skeleton.model, {})
    if lora not in known:
        adapters = Adapters(copy.deepcopy(skeleton.model))
        adapters.add("role", lora)
        known[lora] = dict.fromkeys(TOWERS, 0)
        for key, value in adapters.parameters("role").items():
            known[lora][tower_of(key)] += value.numel()
    return known[lora]


def shortened(skeleton: Skeleton, language: int, vision: int) -> Skeleton:
    """The same model with so many layers in each tower."""
    model = copy.deepcopy(skeleton.model)
    lists = [module for _, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for found, count in ((base_layers(model), language), (vision_layers(model), vision)):
        for layers in lists:
            if len(layers) == len(found) > count and layers[0] is found[0]:
                del layers[count:]
    return replace(skeleton, model=model)
