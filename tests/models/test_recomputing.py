"""Activations computed again for backward: the same gradients, with less kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from perl_vlm.config import LoraConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.recomputing import recompute_layers
from perl_vlm.models.roles import Roles
from perl_vlm.types import Sequences

KeptBytes = Callable[[], AbstractContextManager[dict[int, int]]]
Tuning = Literal["lora", "full"]


@pytest.fixture
def fresh() -> Callable[[], Backbone]:
    """A text model of four layers, its weights the same each time."""

    def make() -> Backbone:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        words: Any = type("Words", (), {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})()
        return Backbone("random", None, model, words, words, (2,), False, GenerationConfig())

    return make


def batch(backbone: Backbone, prompt_of: tuple[int, ...] | None = (0, 0, 1, 1)) -> Sequences:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (4, 20), generator=draw)
    ids[1, :14], ids[3, :14] = ids[0, :14], ids[2, :14]
    return Sequences(ids, torch.ones_like(ids), torch.ones(4, 6, dtype=torch.bool), {}, (0,) * 4, prompt_of=prompt_of)


def build(backbone: Backbone, tuning: Tuning, *, recompute: bool, dropout: float = 0.0) -> Roles:
    roles = Roles(backbone, LoraConfig(language_rank=4, vision_rank=0, dropout=dropout), tuning=tuning)
    if recompute:
        roles.recompute()
    for name in ("policy", "other"):
        roles.add(name)
    torch.manual_seed(1)
    with torch.no_grad():
        for name in ("policy", "other"):
            for parameter in roles.parameters(name).values():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    roles.train_only("policy", "other")
    return roles


def gradients(roles: Roles, sequences: Sequences, *, between: bool = False) -> list[Tensor]:
    """Of the policy's log-probs. ``between``: another role acts before backward."""
    torch.manual_seed(2)
    loss = roles.logprobs("policy", sequences, training=True).logprobs.square().sum()
    if between:
        with torch.no_grad():
            roles.logprobs("other", sequences)
    loss.backward()
    found = []
    for parameter in roles.parameters("policy").values():
        if parameter.grad is not None:
            found.append(parameter.grad)
            parameter.grad = None
    return found


@pytest.mark.parametrize("prompt_of", [(0, 0, 1, 1), None])
@pytest.mark.parametrize(("tuning", "dropout"), [("lora", 0.0), ("lora", 0.5), ("full", 0.0)])
def test_the_same_gradients(
    tuning: Tuning, dropout: float, prompt_of: tuple[int, ...] | None, fresh: Callable[[], Backbone]
) -> None:
    found = []
    for recompute in (False, True):
        backbone = fresh()
        roles = build(backbone, tuning, recompute=recompute, dropout=dropout)
        gradients(roles, batch(backbone, prompt_of))  # packed rows are compared once
        found.append(gradients(roles, batch(backbone, prompt_of), between=tuning == "lora"))
    plain, again = found
    assert len(plain) > 8
    assert any(grad.abs().max() > 0 for grad in plain)
    for one, other in zip(again, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_less_is_kept(fresh: Callable[[], Backbone], kept_bytes: KeptBytes) -> None:
    found = []
    for recompute in (False, True):
        backbone = fresh()
        roles, wide = build(backbone, "lora", recompute=recompute), batch(backbone)
        ids = wide.input_ids.repeat(1, 8)
        wide = replace(wide, input_ids=ids, attention_mask=torch.ones_like(ids))
        weights = {value.untyped_storage().data_ptr() for value in backbone.model.parameters()}
        roles.logprobs("policy", wide)
        with kept_bytes() as kept:
            roles.logprobs("policy", wide)
        found.append(sum(size for storage, size in kept.items() if storage not in weights))
    assert found[1] < 0.5 * found[0]


def test_nothing_is_computed_again_where_no_gradient_is_wanted(fresh: Callable[[], Backbone]) -> None:
    backbone = fresh()
    roles = build(backbone, "lora", recompute=True)
    calls: list[Any] = []
    layer: Any = backbone.model.get_decoder().layers[0]
    layer.input_layernorm.register_forward_hook(lambda *rest: calls.append(1))
    with torch.no_grad():
        roles.logprobs("policy", batch(backbone, None))
    before = len(calls)
    gradients(roles, batch(backbone, None))
    assert len(calls) == before + 2, "forwards, and again"


def test_a_model_without_such_layers_is_named() -> None:
    with pytest.raises(PerlVlmError, match="Linear has no layers to compute again"):
        recompute_layers(torch.nn.Linear(2, 2), lambda: torch.no_grad())
