"""The tracker that everything is measured with: hand-counted cases."""

from __future__ import annotations

import pytest
import torch

from perl_vlm.plan.live import LiveBytes, held_by


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_count_once_and_until_they_are_let_go_of(device: str) -> None:
    with LiveBytes() as live:
        first = torch.zeros(1000, device=device)
        view = first.view(10, 100)
        assert live.now == 4000
        second = view * 2
        assert live.now == 8000
        del first
        assert live.now == 8000, "the view keeps the storage"
        del view
        assert live.now == 4000
        del second
        assert (live.now, live.peak) == (0, 8000)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_autograd_keeps_counts(device: str) -> None:
    weight = torch.zeros(1000, device=device, requires_grad=True)
    with LiveBytes([weight]) as live:
        loss = weight.exp().exp().sum()
        assert live.now == 3 * 4000 + 4, "the weight, both results of exp, the loss"
        loss.backward()
        del loss
        assert live.now == 2 * 4000, "the weight and its gradient"
        assert live.peak > 3 * 4000 + 4
        live.since()
        assert live.peak == live.now


def test_shared_parameters_are_held_once() -> None:
    layer = torch.nn.Linear(10, 10, bias=False)
    pair = torch.nn.Sequential(layer, layer)
    with LiveBytes([*held_by(pair, layer)]) as live:
        assert live.now == 400
        layer.weight.t()
        assert live.now == 400, "a view of what was there is nothing new"
