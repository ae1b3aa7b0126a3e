"""Attention by blocks: PyTorch's numbers and gradients under any mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from perl_vlm.models import block_attention as module
from perl_vlm.models.block_attention import block_attention, blocks_of


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERIES", 6)
    monkeypatch.setattr(module, "KEYS", 4)


def masks() -> dict[str, torch.Tensor]:
    length = 21
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    window = causal & ~causal.tril(-5)
    apart = causal.clone()
    apart[14:, 8:14] = False
    rows = torch.stack([causal, window])[:, None]
    return {"causal": causal[None, None], "window": window[None, None], "apart": apart[None, None], "rows": rows}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("mask", ["causal", "window", "apart", "rows"])
def test_it_is_the_attention_of_pytorch(mask: str, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    seen = masks()[mask].expand(2, -1, -1, -1)
    query = torch.randn(2, heads[0], 21, 8, requires_grad=True)
    key, value = (torch.randn(2, heads[1], 21, 8, requires_grad=True) for _ in range(2))
    asked = torch.randn(2, heads[0], 21, 8)
    found = block_attention(query, key, value, 0.3, blocks_of(seen, torch.float32))
    expected = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    inputs = (query, key, value)
    for one, other in zip(
        torch.autograd.grad(found, inputs, asked), torch.autograd.grad(expected, inputs, asked), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_keys_that_no_query_of_a_block_sees_are_not_met() -> None:
    blocks = blocks_of(masks()["apart"], torch.float32)
    assert [block.stretches for block in blocks] == [((0, 8),), ((0, 12),), ((0, 20),), ((0, 8), (12, 21))]
    assert all(block.bias is not None for block in blocks)


def test_a_block_that_sees_everything_has_no_bias() -> None:
    (first, *_) = blocks_of(torch.ones(1, 1, 6, 6, dtype=torch.bool), torch.float32)
    assert first.bias is None
