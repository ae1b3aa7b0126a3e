"""Norms and gated layers that keep less for backward: the family's own numbers, bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from perl_vlm.models import fused_layers
from perl_vlm.models.fused_layers import fuse_layers

KeptBytes = Callable[[], AbstractContextManager[dict[int, int]]]
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "llama norm": lambda: LlamaRMSNorm(32, eps=1e-5),
    "gemma norm": lambda: Gemma3RMSNorm(32),
    "olmo norm": lambda: Olmo2RMSNorm(32),
    "llama gated": lambda: LlamaMLP(LlamaConfig(**SIZES)),
    "gemma gated": lambda: Gemma3MLP(Gemma3TextConfig(**SIZES)),
    "biased gated": lambda: LlamaMLP(LlamaConfig(**SIZES, mlp_bias=True)),
}


def layer(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    made = LAYERS[kind]()
    for parameter in made.parameters():
        parameter.data.normal_()
    return made.to(dtype).requires_grad_(False)


def run(made: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input."""
    x = x.clone().requires_grad_()
    out = made(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("cached", [2**20, 3 * 32])
def test_the_familys_own_numbers(kind: str, dtype: torch.dtype, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layers, "CACHED", cached)
    own, fused = layer(kind, dtype), layer(kind, dtype)
    assert fuse_layers(fused) == 1
    x = (3 * torch.randn(2, 7, 32)).to(dtype)
    (theirs, their_gradient), (ours, our_gradient) = run(own, x), run(fused, x)
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(fused(x), theirs)
    allowed = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.05}
    torch.testing.assert_close(our_gradient, their_gradient, **allowed)  # type: ignore[arg-type]


def test_rows_that_do_not_lie_together_are_summed_as_the_family_sums_them() -> None:
    own, fused = layer("gemma norm", torch.float32), layer("gemma norm", torch.float32)
    fuse_layers(fused)
    x = torch.randn(2, 32, 700).transpose(1, 2)
    assert torch.equal(fused(x), own(x))


@pytest.mark.parametrize(("kind", "share"), [("llama norm", 0.55), ("gemma norm", 0.55), ("llama gated", 0.75)])
def test_less_is_kept(kind: str, share: float, kept_bytes: KeptBytes) -> None:
    own, fused = layer(kind, torch.bfloat16), layer(kind, torch.bfloat16)
    fuse_layers(fused)
    x = torch.randn(512, 32, dtype=torch.bfloat16, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in (*own.parameters(), *fused.parameters())}
    found = []
    for made in (own, fused):
        with kept_bytes() as kept:
            made(x)
        found.append(sum(size for storage, size in kept.items() if storage not in weights))
    assert 0 < found[1] < share * found[0]


@pytest.mark.parametrize("kind", ["llama norm", "llama gated"])
def test_weights_that_train_get_their_gradients(kind: str) -> None:
    own, fused = layer(kind, torch.float32), layer(kind, torch.float32)
    fuse_layers(fused)
    fused = copy.deepcopy(fused)  # as full tuning's copies are made
    x = torch.randn(5, 32)
    for made in (own, fused):
        made.requires_grad_(True)
        run(made, x)
    for one, other in zip(fused.parameters(), own.parameters(), strict=True):
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad)


class Centred(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(dim=-1, keepdim=True))


class Sparse(Qwen3MLP):
    """Some of its instances keep a part of their columns only, as Gemma 3n's do."""

    share = 0.0

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        if self.share:
            gate = gate.masked_fill(gate < gate.quantile(self.share, dim=-1, keepdim=True), 0.0)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


class Limited(Qwen3MLP):
    """Clamps what only large inputs reach, as DeepSeek V4's do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10.0)) * self.up_proj(x))


class Dropping(Qwen3MLP):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class GatedNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        out = super().forward(hidden_states)
        return out if gate is None else out * gate


@pytest.mark.parametrize(
    "made",
    [
        lambda: Limited(Qwen3Config(**SIZES)),
        lambda: Dropping(Qwen3Config(**SIZES)),
        lambda: GatedNorm(32),
        lambda: Qwen3MLP(Qwen3Config(**SIZES, hidden_act="linear")),
    ],
    ids=["a clamp", "dropout", "a second argument", "an activation that returns its input"],
)
def test_what_a_small_trial_would_not_show_is_left_alone(made: Callable[[], nn.Module]) -> None:
    own = made()
    assert fuse_layers(nn.ModuleList([own])) == 0
    assert not hasattr(own, "fused_here")


def test_two_norms_may_read_one_tensor() -> None:
    norms = [layer("llama norm", torch.float32) for _ in range(2)]
    x = torch.randn(4, 32, requires_grad=True)
    before = x.detach().clone()
    found = []
    for fuse in (False, True):
        if fuse:
            fuse_layers(nn.ModuleList(norms))
        x.grad = None
        (norms[0](x) * norms[1](x).square()).sum().backward()
        found.append(x.grad)
        assert torch.equal(x, before), "backward leaves its input alone"
    torch.testing.assert_close(*found)


def test_trying_draws_nothing() -> None:
    state = torch.get_rng_state()
    model = nn.ModuleList([layer("llama gated", torch.float32), layer("llama norm", torch.float32)])
    torch.set_rng_state(state)
    assert fuse_layers(model) == 2
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(3, 32)
    assert torch.equal(model[1](hidden_states=x), model[1](x)), "named arguments go the long way"


def test_what_only_looks_alike_stays_as_it_is() -> None:
    sparse, plain = (Sparse(Qwen3Config(**SIZES)) for _ in range(2))
    sparse.share = 0.5
    patched = LlamaRMSNorm(32)
    patched.forward = lambda x: x  # type: ignore[method-assign,assignment]
    model = nn.ModuleList([Centred(32), sparse, patched, nn.LayerNorm(32), plain])
    assert fuse_layers(model) == 1
    assert [type(made).forward is not kind.forward for made, kind in zip(model, (Centred, Sparse), strict=False)] == [
        False, False,
    ]  # fmt: skip
    assert isinstance(plain, Sparse)
    assert fuse_layers(model) == 0, "done once"
    x = torch.randn(3, 32)
    assert torch.equal(sparse(x), Sparse.forward(sparse, x))
    assert patched(x) is x


def test_a_model_on_the_meta_device_is_no_other() -> None:
    with torch.device("meta"):
        model = nn.ModuleList([LlamaRMSNorm(32), LlamaMLP(LlamaConfig(**SIZES))])
    assert fuse_layers(model) == 2
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
