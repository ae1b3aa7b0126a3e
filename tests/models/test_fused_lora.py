"""The short way through an adapted linear layer: peft's numbers, with less kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from perl_vlm.config import LoraConfig
from perl_vlm.models.adapters import Adapters
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.fused_lora import FusedLinear, low_rank_linear, weights_stay

KeptBytes = Callable[[], AbstractContextManager[dict[int, int]]]
LORA = LoraConfig(language_rank=4, vision_rank=0)


def adapted(backbone: Backbone, names: tuple[str, ...], lora: LoraConfig = LORA) -> tuple[Adapters, FusedLinear]:
    """Random adapters, all active and training, and one of the layers they are on."""
    adapters = Adapters(backbone.model)
    torch.manual_seed(0)
    for name in names:
        adapters.add(name, lora)
        for parameter in adapters.parameters(name).values():
            parameter.data.normal_()
    adapters.activate(names)
    adapters.train_only(names)
    layer = next(module for module in backbone.model.modules() if isinstance(module, FusedLinear))
    return adapters, layer


def run(layer: FusedLinear, x: Tensor, *, peft: bool) -> list[Tensor]:
    """Output, gradient of the input and of every adapter weight."""
    x = x.clone().requires_grad_(True)
    for parameter in layer.parameters():
        parameter.grad = None
    output = PeftLinear.forward(layer, x) if peft else layer(x)
    output.float().square().sum().backward()
    assert x.grad is not None
    trained = [parameter.grad for parameter in layer.parameters() if parameter.requires_grad]
    assert all(grad is not None for grad in trained)
    return [output.detach(), x.grad, *(grad for grad in trained if grad is not None)]


@pytest.mark.parametrize("names", [("policy",), ("sft", "policy")])
@pytest.mark.parametrize("shape", [(3, 5), (7,)])
def test_float32_is_what_peft_computes(names: tuple[str, ...], shape: tuple[int, ...], text_backbone: Backbone) -> None:
    _, layer = adapted(text_backbone, names)
    x = torch.randn(*shape, layer.in_features)
    found, expected = run(layer, x, peft=False), run(layer, x, peft=True)
    assert len(found) == 2 + 2 * len(names)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-5)
    assert all(grad.dtype == torch.float32 for grad in found)


def test_bfloat16_is_within_its_rounding(text_backbone: Backbone) -> None:
    _, layer = adapted(text_backbone, ("sft", "policy"))
    x = torch.randn(64, layer.in_features)
    exact = run(layer, x, peft=True)
    layer.get_base_layer().to(torch.bfloat16)
    for one, other in zip(run(layer, x.bfloat16(), peft=False), exact, strict=True):
        away = (one.float() - other).square().mean().sqrt() / other.square().mean().sqrt()
        assert away < 0.02
    output, to_x, *gradients = run(layer, x.bfloat16(), peft=False)
    assert output.dtype == to_x.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in gradients)


def test_no_wide_copy_of_the_input_is_kept(kept_bytes: KeptBytes, text_backbone: Backbone) -> None:
    _, layer = adapted(text_backbone, ("policy",))
    layer.get_base_layer().to(torch.bfloat16)
    x = torch.randn(4096, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    with kept_bytes() as ours:
        layer(x)
    with kept_bytes() as theirs:
        PeftLinear.forward(layer, x)
    weights = sum(p.numel() * 4 for p in layer.parameters())
    assert sum(ours.values()) <= 2 * x.numel() + 2 * 4 * 4096 + weights, "the input as it came, and r columns"
    assert sum(theirs.values()) > 4 * x.numel()


def test_without_an_active_adapter_nothing_is_added(text_backbone: Backbone) -> None:
    adapters, layer = adapted(text_backbone, ("policy",))
    adapters.activate(())
    x = torch.randn(3, layer.in_features)
    assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_dropout_takes_the_long_way(text_backbone: Backbone) -> None:
    adapters, layer = adapted(text_backbone, ("policy",), LoraConfig(language_rank=4, vision_rank=0, dropout=0.5))
    adapters.drop_out(())
    x = torch.randn(3, layer.in_features)
    assert torch.equal(layer(x), layer(x))
    adapters.drop_out(("policy",))
    assert not torch.equal(layer(x), layer(x))


def test_hooks_on_the_frozen_layer_are_called(text_backbone: Backbone) -> None:
    _, layer = adapted(text_backbone, ("policy",))
    called: list[nn.Module] = []
    layer.get_base_layer().register_forward_hook(lambda module, *_: called.append(module))
    layer(torch.randn(3, layer.in_features))
    assert called


def test_while_weights_stay_they_are_rounded_once(text_backbone: Backbone) -> None:
    adapters, layer = adapted(text_backbone, ("policy", "reward"))
    layer.get_base_layer().to(torch.bfloat16)
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    adapters.activate(["policy"])
    before = layer(x).detach()
    with weights_stay():
        assert torch.equal(layer(x), before)
        first, second = (list(layer._matrices(["policy"], torch.bfloat16)) for _ in range(2))
        assert all(one is other for one, other in zip(first, second, strict=True))
        adapters.activate(["reward"])
        other = layer(x)
    assert not torch.equal(other, before), "another adapter's are its own"
    layer.lora_B["policy"].weight.data.mul_(2)
    adapters.activate(["policy"])
    assert not torch.equal(layer(x), before), "nothing is remembered afterwards"


def test_gradients_agree_with_numeric_ones() -> None:
    torch.manual_seed(0)
    x, down, up = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((5, 3), (2, 3), (4, 2)))
    weight, bias = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, *two: low_rank_linear(x, weight, bias, *two), (x, down, up))
    assert torch.autograd.gradcheck(lambda x, *two: low_rank_linear(x, weight, None, *two), (x, down, up))
