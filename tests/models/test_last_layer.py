"""The last layer at the tokens alone whose states are read."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, Qwen3Config

from perl_vlm.config import LoraConfig
from perl_vlm.data.sequences import with_responses
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.last_layer import last_layer, narrows, stay_wide
from perl_vlm.models.roles import Roles
from perl_vlm.types import Sequences

CONFIG: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
RESPONSES = ((3, 6), (1, 4))


def build(**more: Any) -> Roles:
    torch.manual_seed(0)
    config: PreTrainedConfig = Qwen3Config(**CONFIG, **more)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    words: Any = type("Words", (), {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})()
    roles = Roles(
        Backbone("random", None, model, words, words, (2,), False, GenerationConfig()), LoraConfig(language_rank=4)
    )
    roles.add("reward", head="reward")
    roles.add("policy")
    roles.add_head_on("value", "policy")
    with torch.no_grad():
        for parameter in (*roles.parameters("reward").values(), *roles.parameters("policy").values()):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return roles


def batch() -> Sequences:
    draw = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 61, (9,), generator=draw).tolist() for _ in RESPONSES]
    ids = torch.tensor([prompt for prompt, counts in zip(prompts, RESPONSES, strict=True) for _ in counts])
    alone = Sequences(ids, torch.ones_like(ids), torch.zeros(len(ids), 0, dtype=torch.bool), {}, (0,) * len(ids))
    responses = [torch.randint(3, 61, (count,), generator=draw).tolist() for counts in RESPONSES for count in counts]
    made = with_responses(alone, responses, 0)
    return Sequences(**{**vars(made), "prompt_of": (0, 0, 1, 1)})


def numbers(roles: Roles) -> list[Tensor]:
    """Scores, log-probs, values, and the gradients of all three."""
    sequences = batch()
    roles.train_only("reward", "policy")
    scores = roles.raw_scores("reward", sequences, training=True)
    scores.square().sum().backward()
    out = roles.logprobs("policy", sequences, training=True, value_head="value")
    assert out.values is not None
    (out.logprobs.sum() + out.values.square().sum()).backward()
    trained = [*roles.parameters("reward").values(), *roles.parameters("policy").values()]
    assert all(parameter.grad is not None for parameter in trained)
    return [scores, out.logprobs, out.values, *(parameter.grad for parameter in trained)]  # type: ignore[list-item]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_same_numbers_as_from_the_whole_layer(attention: str) -> None:
    narrow, wide = build(attn_implementation=attention), build(attn_implementation=attention)
    stay_wide(wide.backbone.model)
    for one, other in zip(numbers(narrow), numbers(wide), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)
    assert narrows(narrow.backbone.model)


def test_the_last_layer_meets_the_tokens_alone_that_are_read() -> None:
    roles = build()
    numbers(roles)  # the comparison is over
    layers: Any = roles.backbone.model.get_decoder().layers
    seen: dict[str, list[int]] = {}
    watched = {
        "last": layers[-1].mlp.down_proj,
        "before": layers[-2].mlp.down_proj,
        "queries": layers[-1].self_attn.q_proj,
    }
    for name, part in watched.items():
        part.register_forward_hook(
            lambda module, args, out, name=name: seen.setdefault(name, []).append(args[0].shape[:-1].numel())
        )
    sequences = batch()
    with torch.no_grad():
        roles.raw_scores("reward", sequences)
        roles.logprobs("policy", sequences)
    whole = 2 * (9 + 9)
    read = sum(sum(counts) for counts in RESPONSES) + len(RESPONSES)
    assert seen == {"last": [4, read], "before": [whole, whole], "queries": [4, read]}
    assert not last_layer(roles.backbone.model).mlp._forward_hooks, "nothing is left behind"  # type: ignore[union-attr]


class Neighbours(nn.Module):
    """A feed-forward part that looks at the token before."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x + 0.5 * x.mean(dim=1, keepdim=True))


def test_a_layer_that_mixes_tokens_is_found_out() -> None:
    def mixing() -> Roles:
        roles = build()
        layer: Any = last_layer(roles.backbone.model)
        layer.mlp = Neighbours(layer.mlp)
        return roles

    # Mixing makes packed rows differ from separate ones too, so here both are refused.
    roles = mixing()
    with pytest.warns(UserWarning, match="row of its own"):
        numbers(roles)
    assert not narrows(roles.backbone.model)


class WholeRows(Neighbours):
    """Cannot take tokens that are picked out of their rows: here 4 or 16 of them."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] in (4, 16):
            raise ValueError("whole rows are wanted")
        return self.own(x)


def test_a_layer_that_cannot_be_cut_stays_whole_and_prompts_are_still_shared() -> None:
    roles, plain = build(), build()
    layer: Any = last_layer(roles.backbone.model)
    layer.mlp = WholeRows(layer.mlp)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = numbers(roles)
    assert not narrows(roles.backbone.model)
    for one, other in zip(found, numbers(plain), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)
