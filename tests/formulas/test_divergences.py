"""Sampled divergences and the exact one: hand-worked tables, limiting cases, slow loops, expectations."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perl_vlm.formulas import clamped_k1, exact_kl, js_proxy, k1, k2, k3, token_logprobs

Estimate = Callable[[Tensor, Tensor], Tensor]
ALL: list[Estimate] = [k1, clamped_k1, k2, k3, js_proxy]
LOG2 = math.log(2.0)

SLOW: dict[Estimate, Callable[[float, float], float]] = {
    k1: lambda p, q: math.log(p / q),
    clamped_k1: lambda p, q: max(math.log(p / q), 0.0),
    k2: lambda p, q: math.log(p / q) ** 2 / 2,
    k3: lambda p, q: q / p - 1 - math.log(q / p),
    js_proxy: lambda p, q: (max(math.log(2 * p / (p + q)), 0) + max(math.log(2 * q / (p + q)), 0)) / 2,
}

probabilities = st.floats(0.001, 1.0)


@pytest.mark.parametrize(
    ("estimate", "above", "below"),
    [
        # pi = 1/2, pi_ref = 1/4, then the other way round. m = 3/8.
        (k1, LOG2, -LOG2),
        (clamped_k1, LOG2, 0.0),
        (k2, LOG2**2 / 2, LOG2**2 / 2),
        (k3, LOG2 - 0.5, 1 - LOG2),
        (js_proxy, math.log(4 / 3) / 2, math.log(4 / 3) / 2),
    ],
)
def test_by_hand(estimate: Estimate, above: float, below: float) -> None:
    high, low = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    assert estimate(high, low).item() == pytest.approx(above, abs=1e-6)
    assert estimate(low, high).item() == pytest.approx(below, abs=1e-6)


@settings(max_examples=80, deadline=None)
@given(probabilities, probabilities)
def test_slow_formulas_agree(p: float, q: float) -> None:
    logp, logq = torch.tensor([[math.log(p)]]), torch.tensor([[math.log(q)]])
    for estimate, slow in SLOW.items():
        assert estimate(logp, logq).item() == pytest.approx(slow(p, q), rel=1e-4, abs=1e-5)


@settings(max_examples=80, deadline=None)
@given(probabilities, probabilities)
def test_signs_and_bounds(p: float, q: float) -> None:
    logp, logq = torch.tensor([[math.log(p)]]), torch.tensor([[math.log(q)]])
    assert k1(logp, logq).item() == -k1(logq, logp).item()
    for never_negative in (clamped_k1, k2, k3, js_proxy):
        assert never_negative(logp, logq).item() >= -1e-6  # a rounding of expm1 may fall short of 0
    assert js_proxy(logp, logq).item() <= LOG2 / 2 + 1e-6
    assert js_proxy(logp, logq).item() == pytest.approx(js_proxy(logq, logp).item(), abs=1e-6)


def test_equal_policies_are_at_no_distance() -> None:
    logp = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) - 3
    for estimate in ALL:
        torch.testing.assert_close(estimate(logp, logp), torch.zeros(3, 5), atol=1e-6, rtol=0)


def test_limits() -> None:
    far = js_proxy(torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]]))
    torch.testing.assert_close(far, torch.full((1, 2), LOG2 / 2))
    # Close together k3 and k2 agree to second order, which exp(x) - 1 - x in float32 would round away.
    logp, near = torch.tensor([[-1.0]], dtype=torch.float64), torch.tensor([[-1.0 - 1e-5]], dtype=torch.float64)
    assert k3(logp, near).item() == pytest.approx(5e-11, rel=1e-4)
    small, zero = torch.tensor([[1e-5]]), torch.tensor([[0.0]])
    assert k3(zero, small).item() == pytest.approx(k2(zero, small).item(), abs=1e-11)


def policies() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(1, 1, 12, generator=generator)
    return p, p + 0.3 * torch.randn(1, 1, 12, generator=generator)


def test_k1_and_k3_are_unbiased_and_k2_nearly() -> None:
    p, q = policies()
    kl = exact_kl(p, q).item()
    count = 200_000
    weights = torch.softmax(p[0, 0], dim=-1)
    drawn = torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(4))[None]
    logp = torch.log_softmax(p, -1)[0, 0][drawn]
    logq = torch.log_softmax(q, -1)[0, 0][drawn]
    for unbiased in (k1, k3):
        values = unbiased(logp, logq)
        error = values.std().item() / math.sqrt(count)
        assert error < 0.1 * kl  # the bound below can tell a bias of 40 % from none, with much to spare
        assert abs(values.mean().item() - kl) < 4 * error
    assert k2(logp, logq).mean().item() == pytest.approx(kl, rel=0.15)
    assert k3(logp, logq).std() < 0.5 * k1(logp, logq).std()
    assert clamped_k1(logp, logq).mean().item() > 1.5 * kl


def test_expectations_over_the_whole_vocabulary() -> None:
    p, q = (logits.double() for logits in policies())
    logp, logq = torch.log_softmax(p, -1)[0], torch.log_softmax(q, -1)[0]
    kl = exact_kl(p, q).item()

    def mean(estimate: Estimate) -> float:
        return (logp.exp() * estimate(logp, logq)).sum().item()

    assert mean(k1) == pytest.approx(kl, rel=1e-9)
    assert mean(k3) == pytest.approx(kl, rel=1e-9)
    assert mean(k2) != pytest.approx(kl, rel=1e-3)
    assert mean(clamped_k1) > kl


def test_exact_kl_by_hand() -> None:
    p = torch.tensor([[[0.5, 0.5]]]).log()
    q = torch.tensor([[[0.25, 0.75]]]).log()
    assert exact_kl(p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert exact_kl(q, p).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    # At T = 1/2 the odds of q are 1 to 9.
    want = 0.5 * math.log(0.5 / 0.1) + 0.5 * math.log(0.5 / 0.9)
    assert exact_kl(p, q, temperature=0.5).item() == pytest.approx(want, rel=1e-5)


def test_exact_kl_against_a_loop_and_torch() -> None:
    generator = torch.Generator().manual_seed(5)
    p, q = torch.randn(2, 3, 6, generator=generator), torch.randn(2, 3, 6, generator=generator)
    got = exact_kl(p, q, temperature=0.7)
    a, b = torch.softmax(p / 0.7, -1), torch.softmax(q / 0.7, -1)
    for row in range(2):
        for t in range(3):
            pairs = zip(a[row, t].tolist(), b[row, t].tolist(), strict=True)
            assert got[row, t].item() == pytest.approx(sum(x * math.log(x / y) for x, y in pairs), rel=1e-4)
    want = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p / 0.7), torch.distributions.Categorical(logits=q / 0.7)
    )
    torch.testing.assert_close(got, want)


def test_exact_kl_limits() -> None:
    p = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(exact_kl(p, p + 4.0), torch.zeros(2, 3), atol=1e-6, rtol=0)  # logits up to a constant
    banned = p.clone()
    banned[..., 0] = -math.inf
    torch.testing.assert_close(exact_kl(banned, banned), torch.zeros(2, 3))
    assert exact_kl(banned, p).isfinite().all()
    assert (exact_kl(p, banned) == math.inf).all()


def test_exact_kl_has_a_clean_gradient_where_tokens_are_ruled_out() -> None:
    p = torch.tensor([[[0.3, -0.2, -math.inf]]], requires_grad=True)
    exact_kl(p, torch.tensor([[[0.0, 0.0, -math.inf]]])).sum().backward()
    assert p.grad is not None
    assert p.grad.isfinite().all()
    assert p.grad[0, 0, 0].item() > 0


def test_bf16_is_upcast() -> None:
    logp, logq = torch.tensor([[-1.0]], dtype=torch.bfloat16), torch.tensor([[-1.25]], dtype=torch.bfloat16)
    for estimate in ALL:
        got = estimate(logp, logq)
        assert got.dtype == torch.float32
        assert got.item() == estimate(logp.float(), logq.float()).item()
    p, q = (logits.bfloat16() for logits in policies())
    torch.testing.assert_close(exact_kl(p, q), exact_kl(p.float(), q.float()), rtol=0, atol=0)


def test_shapes_are_checked() -> None:
    for estimate in ALL:
        with pytest.raises(ValueError, match=r"logp \(2, 3\), logp_ref \(3,\)"):
            estimate(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"logits_q is \(1, 2, 4\)"):
        exact_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="temperature"):
        exact_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), temperature=0.0)


def test_the_temperature_is_the_one_of_the_logprobs() -> None:
    p, q = (logits.double() for logits in policies())
    tokens = torch.arange(12)[None]
    wide_p, wide_q = p.expand(1, 12, 12), q.expand(1, 12, 12)
    logp = token_logprobs(wide_p, tokens, temperature=0.6)
    logq = token_logprobs(wide_q, tokens, temperature=0.6)
    expected = (logp.exp() * k1(logp, logq)).sum().item()
    assert exact_kl(p, q, temperature=0.6).item() == pytest.approx(expected)
