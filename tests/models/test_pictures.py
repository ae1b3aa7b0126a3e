"""A frozen vision tower sees a batch's pictures once, and an adapted one as often as it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from perl_vlm.config import LoraConfig
from perl_vlm.data.collate import Collator
from perl_vlm.data.render import Renderer
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.pictures import remembering_pictures, vision_tower
from perl_vlm.models.roles import REFERENCE, Roles
from perl_vlm.types import Example, Sequences


@contextmanager
def runs(roles: Roles) -> Iterator[list[Any]]:
    """A mark for each time that the tower's layers run."""
    tower, seen = vision_tower(roles.backbone.model), list[Any]()
    assert tower is not None
    first = next(module for name, module in tower.named_modules() if name.endswith("layers.0"))
    handle = first.register_forward_pre_hook(lambda *_: seen.append(None))
    try:
        yield seen
    finally:
        handle.remove()


def made(backbone: Backbone, vision_rank: int) -> Roles:
    roles = Roles(backbone, LoraConfig(language_rank=4, vision_rank=vision_rank), seed=3)
    roles.add("policy")
    roles.add("reward", head="reward")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("policy", "reward"):
            for parameter in roles.parameters(name).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return roles


def passes(roles: Roles, batch: Sequences) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            roles.logprobs(REFERENCE, batch).logprobs,
            roles.logprobs("policy", batch).logprobs,
            roles.scores("reward", batch),
        ]


@pytest.fixture
def batches(renderer: Renderer, make_examples: Callable[[int], list[Example]]) -> list[Sequences]:
    examples = make_examples(4)
    return [Collator(renderer).references(part) for part in (examples[:2], examples[2:])]


def test_a_frozen_tower_runs_once_for_a_batch(backbone: Backbone, batches: list[Sequences]) -> None:
    roles = made(backbone, 0)
    expected = [passes(roles, batch) for batch in batches]  # the head is learnt, packing is compared
    with runs(roles) as seen:
        passes(roles, batches[0])
        assert len(seen) == 3
        seen.clear()
        with remembering_pictures(roles.backbone.model):
            found = [passes(roles, batch) for batch in batches]
        assert len(seen) == 2, "one for each batch: other pictures are looked at"
        passes(roles, batches[0])
        assert len(seen) == 5, "nothing is remembered afterwards"
    for one, other in zip(found, expected, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert torch.equal(mine, theirs)


def test_an_adapted_tower_runs_for_every_role(backbone: Backbone, batches: list[Sequences]) -> None:
    roles = made(backbone, 4)
    expected = passes(roles, batches[0])
    with runs(roles) as seen, remembering_pictures(roles.backbone.model):
        found = passes(roles, batches[0])
    assert len(seen) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert (expected[0] - expected[1]).abs().max() > 0


def test_gradients_are_those_of_a_tower_that_ran_twice(backbone: Backbone, batches: list[Sequences]) -> None:
    roles = made(backbone, 0)
    roles.train_only("policy", "reward")

    def gradients() -> list[torch.Tensor]:
        loss = roles.logprobs("policy", batches[0]).logprobs.sum() + roles.scores("reward", batches[0]).sum()
        loss.backward()
        grads = [
            p.grad.clone()
            for name in ("policy", "reward")
            for p in roles.parameters(name).values()
            if p.grad is not None
        ]
        for name in ("policy", "reward"):
            roles.clear_gradients(name)
        return grads

    gradients()
    expected = gradients()
    with runs(roles) as seen, remembering_pictures(roles.backbone.model):
        found = gradients()
    assert len(seen) == 1
    assert len(found) > 10
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_model_without_pictures_is_left_alone(text_backbone: Backbone) -> None:
    with remembering_pictures(text_backbone.model):
        assert vision_tower(text_backbone.model) is None
