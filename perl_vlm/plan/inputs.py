"""What goes through a model on the meta device: a batch's masks, and its pictures through the vision tower."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from perl_vlm.plan.settings import Batch
from perl_vlm.plan.shapes import Shapes, vision_layers
from perl_vlm.types import Sequences


def run_tower(model: Any, shapes: Shapes, batch: Batch) -> Tensor:
    """A vision tower's layers one after the other over all pictures of a batch, as the stage would run them."""
    picture = shapes.picture
    assert picture is not None
    patches = round(batch.image_tokens * picture.per_token)
    tiles, each = (max(1, -(-patches // picture.patches)), picture.patches) if picture.fixed else (1, patches)
    tiles *= batch.read_prompts
    layers = vision_layers(model)
    taken = inspect.signature(layers[0].forward).parameters
    extra: dict[str, Any] = {}
    weight = next(layers[0].parameters())
    if "cu_seqlens" in taken:
        extra["cu_seqlens"] = torch.arange(0, (tiles + 1) * each, each, dtype=torch.int32)
        hidden = weight.new_empty(tiles * each, shapes.vision_hidden)
    else:
        hidden = weight.new_empty(tiles, each, shapes.vision_hidden)
    if "position_embeddings" in taken:
        vision = model.config.vision_config
        heads = getattr(vision, "num_attention_heads", None) or vision.num_heads
        turned = weight.new_empty(hidden.shape[-2], shapes.vision_hidden // heads, dtype=torch.float32)
        extra["position_embeddings"] = (turned, turned)
    if "attention_mask" in taken:
        extra["attention_mask"] = None
    for layer in layers:
        out = layer(hidden, **extra)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden


def one_prompt(batch: Batch) -> Sequences:
    """A prompt and its responses, at full length."""
    shape = (batch.group, batch.prompt + batch.response)
    ones = torch.ones(shape, dtype=torch.long)
    mask = torch.ones(batch.group, batch.response, dtype=torch.bool)
    return Sequences(ones, ones, mask, {}, (0,) * batch.group, prompt_of=(0,) * batch.group)


def on_meta(masks: Any, rows: int) -> Any:
    """The masks of one row as those of several, on the meta device, blocks included."""
    if isinstance(masks, dict):
        return {kind: on_meta(mask, rows) for kind, mask in masks.items()}
    made = torch.empty(rows, *masks.shape[1:], dtype=masks.dtype, device="meta")
    blocks = getattr(masks, "blocks", None)
    if blocks is not None:
        made.blocks = tuple(  # type: ignore[attr-defined]
            replace(block, bias=None if block.bias is None else on_meta(block.bias, rows)) for block in blocks
        )
    return made
