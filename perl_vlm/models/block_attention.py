"""Attention on a CPU that computes only what a mask lets be seen, a block of queries at a time.

PyTorch's own kernel computes all of [T, T] under a mask, and is slow backward. In packed rows less than half of it is
visible: a causal prefix, and responses that do not see each other. Here a block of queries meets only the stretches of
keys that one of its queries sees, in plain matrix products. Backward makes the weights again: kept, they would be a
fifth of what a reward model's step holds, and save a fiftieth of its time.

Shape letters: M rows, H query heads, K key heads, L tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

QUERIES = 128
"""Queries of a block; of 64 to 384 the fastest."""
KEYS = 32
"""Stretches of keys begin and end at multiples of this."""


@dataclass(frozen=True)
class Block:
    """Some queries and the keys that they meet."""

    start: int
    end: int
    stretches: tuple[tuple[int, int], ...]
    """Of keys, from and to."""
    bias: Tensor | None
    """[M or 1, 1, end - start, keys] 0 or the type's lowest number; None where everything is seen."""


def blocks_of(seen: Tensor, dtype: torch.dtype) -> tuple[Block, ...]:
    """Divide a mask into blocks.

    Args:
        seen: [M, 1, L, L] bool.
        dtype: of the scores.
    """
    length, found = seen.shape[-1], []
    anywhere = seen[:, 0].any(dim=0)
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        stretches = _stretches(anywhere[start:end].any(dim=0), length)
        part = torch.cat([seen[:, :, start:end, first:last] for first, last in stretches], dim=-1)
        bias = None
        if not bool(part.all()):
            bias = torch.zeros(part.shape, dtype=dtype).masked_fill_(~part, torch.finfo(dtype).min)
        found.append(Block(start, end, stretches, bias))
    return tuple(found)


def _stretches(wanted: Tensor, length: int) -> tuple[tuple[int, int], ...]:
    """Where keys are wanted, in multiples of ``KEYS``."""
    padded = torch.nn.functional.pad(wanted, (0, -length % KEYS)).view(-1, KEYS).any(dim=1).tolist()
    found: list[tuple[int, int]] = []
    for place, needed in enumerate(padded):
        first, last = place * KEYS, min((place + 1) * KEYS, length)
        if needed and found and found[-1][1] == first:
            found[-1] = (found[-1][0], last)
        elif needed:
            found.append((first, last))
    return tuple(found)


def _answers(query: Tensor, blocks: tuple[Block, ...]) -> Tensor:
    """Where what belongs to each query goes; zero for those that are in no block."""
    complete = sum(block.end - block.start for block in blocks) == query.shape[2]
    return (torch.empty_like if complete else torch.zeros_like)(query, memory_format=torch.contiguous_format)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, blocks: tuple[Block, ...]) -> Tensor:
        out = _answers(query, blocks)
        for block in blocks:
            keys, values = _picked(key, block), _picked(value, block)
            weights = torch.softmax(_scores(query, keys, scale, block), dim=-1)
            out[:, :, block.start : block.end] = _ungrouped(weights @ values, query.shape[1])
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.blocks = scale, blocks
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        (grad,) = grads
        to_query = _answers(query, ctx.blocks)
        to_key, to_value = torch.zeros_like(key), torch.zeros_like(value)
        for block in ctx.blocks:
            keys, values = _picked(key, block), _picked(value, block)
            weights = torch.softmax(_scores(query, keys, ctx.scale, block), dim=-1)
            out = _grouped(grad[:, :, block.start : block.end], key.shape[1])
            asked = _grouped(query[:, :, block.start : block.end], key.shape[1])
            scores = torch._softmax_backward_data(out @ values.mT, weights, -1, weights.dtype).mul_(ctx.scale)
            to_query[:, :, block.start : block.end] = _ungrouped(scores @ keys, query.shape[1])
            _spread(to_key, scores.mT @ asked, block)
            _spread(to_value, weights.mT @ out, block)
        return to_query, to_key, to_value, None, None


def _grouped(heads: Tensor, groups: int) -> Tensor:
    """[M, H, n, D] -> [M, K, H / K * n, D]: query heads that share a key head stand one below the other."""
    rows, count, length, size = heads.shape
    return heads.reshape(rows, groups, count // groups * length, size)


def _ungrouped(heads: Tensor, count: int) -> Tensor:
    rows, groups, length, size = heads.shape
    return heads.reshape(rows, count, length * groups // count, size)


def _scores(query: Tensor, keys: Tensor, scale: float, block: Block) -> Tensor:
    asked = _grouped(query[:, :, block.start : block.end], keys.shape[1])
    scores = (asked * scale) @ keys.mT
    if block.bias is None:
        return scores
    rows, groups, _, width = scores.shape
    return (scores.view(rows, groups, -1, block.end - block.start, width) + block.bias[:, :, None]).view_as(scores)


def _picked(tensor: Tensor, block: Block) -> Tensor:
    parts = [tensor[:, :, first:last] for first, last in block.stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _spread(total: Tensor, own: Tensor, block: Block) -> None:
    at = 0
    for first, last in block.stretches:
        total[:, :, first:last] += own[:, :, at : at + last - first]
        at += last - first


def block_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, blocks: tuple[Block, ...]) -> Tensor:
    """Softmax attention, [M, H, L, D].

    Args:
        query: [M, H, L, D].
        key, value: [M, K, L, D], K dividing H.
        scale: of the scores.
        blocks: from ``blocks_of``.
    """
    return _BlockAttention.apply(query, key, value, scale, blocks)


def next_token_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    """Attention of one query a row, [M, H, 1, D], without a copy of the keys for every query head that shares them.

    Args:
        query: [M, H, 1, D].
        key, value: [M, K, L, D], K dividing H.
        scale: of the scores.
        seen: [M or 1, 1, 1, L] bool; None where everything is.
    """
    scores = (_grouped(query, key.shape[1]) * scale) @ key.mT
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return _ungrouped(scores.softmax(dim=-1) @ value, query.shape[1])


# -- as transformers calls it --------------------------------------------------------------------------------------

_NAME = "perl_vlm_blocks"


def with_blocks(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask, [M, 1, L, L] bool, with its blocks on it, for attention under ``blockwise``."""
    seen.blocks = blocks_of(seen, dtype)  # type: ignore[attr-defined]
    return seen


def narrowed(mask: Tensor, columns: Tensor) -> Tensor:
    """The same mask, with blocks for the queries of some columns alone; what attention gives at others is zero. A mask
    without blocks stays as it is.

    Args:
        mask: as ``with_blocks`` made it.
        columns: [L] bool.
    """
    blocks = getattr(mask, "blocks", None)
    if blocks is None:
        return mask
    found = []
    for block in blocks:
        edges = torch.nn.functional.pad(columns[block.start : block.end].int(), (1, 1)).diff()
        begins, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
        for first, last in zip(begins, ends, strict=True):
            bias = None if block.bias is None else block.bias[:, :, first:last]
            found.append(Block(block.start + first, block.start + last, block.stretches, bias))
    mask = mask.view_as(mask)
    mask.blocks = tuple(found)  # type: ignore[attr-defined]
    return mask


def has_blocks(model: Any) -> bool:
    """Whether packed rows of a model get the attention of this module: then they are faster even where they are no
    shorter."""
    return model.device.type == "cpu" and model.config.get_text_config()._attn_implementation == "sdpa"


@contextmanager
def blockwise(model: Any) -> Iterator[None]:
    """Within, the language tower of a model that uses PyTorch's attention uses this one for masks with blocks."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = _NAME if before == "sdpa" else before
    try:
        yield
    finally:
        config._attn_implementation = before


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    blocks = getattr(attention_mask, "blocks", None)
    plain = not dropout and not any(options.get(name) is not None for name in ("softcap", "position_bias", "s_aux"))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # as PyTorch's own attention does
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if plain and blocks is not None and key.shape[-1] == value.shape[-1]:
        return block_attention(query, key, value, scale, blocks).transpose(1, 2).contiguous(), None
    seen_or_not = attention_mask is None or attention_mask.dtype == torch.bool
    if plain and seen_or_not and query.shape[2] == 1 and device == "cpu" and not torch.is_grad_enabled():
        return next_token_attention(query, key, value, scale, attention_mask).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)


AttentionInterface.register(_NAME, _forward)
AttentionMaskInterface.register(_NAME, sdpa_mask)
