"""Work on a few tokens at a time, with the gradients made on the way: the same numbers as all at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from perl_vlm.models.chunks import CHUNK_BYTES, chunk_tokens, in_chunks

TOKENS, COLUMNS, WORDS = 11, 6, 40


class Head:
    """Two numbers of each row, and how often it was asked."""

    def __init__(self, *, trains: bool = False) -> None:
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(WORDS, COLUMNS), requires_grad=trains)
        self.calls = 0

    def __call__(self, rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        logits = (rows.float() @ self.weight.T) * scale[:, None]
        return logits.logsumexp(dim=-1), logits.softmax(dim=-1).square().sum(dim=-1)


def rows() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(TOKENS, COLUMNS, generator=draw).requires_grad_(), torch.rand(TOKENS, generator=draw)


def weighted(found: list[Tensor]) -> Tensor:
    """A loss in which each row and number counts otherwise."""
    draw = torch.Generator().manual_seed(2)
    return sum((torch.rand(TOKENS, generator=draw) * number).sum() for number in found if number.requires_grad)  # type: ignore[return-value]


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("learning", [(0,), (1,), (0, 1)])
def test_gradients_made_on_the_way_are_those_of_all_rows_at_once(size: int, learning: tuple[int, ...]) -> None:
    (x, scale), (y, _) = rows(), rows()
    found = in_chunks(Head(), size, x, scale, learning=learning, frozen=True)
    assert [number.requires_grad for number in found] == [place in learning for place in range(2)]
    whole = [number if place in learning else number.detach() for place, number in enumerate(Head()(y, scale))]
    weighted(found).backward()
    weighted(whole).backward()
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other)
    assert y.grad is not None
    torch.testing.assert_close(x.grad, y.grad)


def test_no_chunk_of_a_frozen_head_is_met_twice() -> None:
    for frozen, times in ((True, 1), (False, 2)):
        (x, scale), head = rows(), Head()
        in_chunks(head, 4, x, scale, frozen=frozen)[0].sum().backward()
        assert head.calls == 3 * times
    with torch.no_grad():
        head = Head()
        in_chunks(head, 4, *rows(), frozen=True)
    assert head.calls == 3


def test_a_head_that_trains_gets_its_gradient() -> None:
    (x, scale), head, other = rows(), Head(trains=True), Head(trains=True)
    weighted(in_chunks(head, 4, x, scale)).backward()
    weighted(list(other(rows()[0], scale))).backward()
    assert other.weight.grad is not None
    torch.testing.assert_close(head.weight.grad, other.weight.grad)


def test_half_precision_rounds_each_gradient_once() -> None:
    x, scale = rows()
    narrow = x.detach().bfloat16().requires_grad_()
    weighted(in_chunks(Head(), 4, narrow, scale, learning=(0, 1), frozen=True)).backward()
    weighted(list(Head()(x, scale))).backward()
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.bfloat16
    assert x.grad is not None
    torch.testing.assert_close(narrow.grad.float(), x.grad, atol=0.03, rtol=0.03)


def test_a_cpu_gets_chunks_for_its_caches() -> None:
    assert chunk_tokens(8_000, "cuda") == CHUNK_BYTES // (4 * 8_000)
    assert chunk_tokens(1_000, "cpu") == 1_048
    assert chunk_tokens(150_000, "cpu") == 128
    assert chunk_tokens(10**9, "cpu") == chunk_tokens(10**9, "cuda") == 1
    with pytest.raises(ValueError, match="at least one token"):
        in_chunks(Head(), 0, *rows())
