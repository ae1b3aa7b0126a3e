"""Log-probs, entropy and agreement: hand-worked tables, limiting cases, slow loops."""

from __future__ import annotations

import math

import pytest
import torch

from perl_vlm.formulas import logprob_agreement, masked_mean, token_entropy, token_logprobs

# softmax of (0, log 2, log 5) is (1/8, 2/8, 5/8).
LOGITS = torch.tensor([[[0.0, math.log(2.0), math.log(5.0)]] * 3])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_logprobs_by_hand() -> None:
    got = token_logprobs(LOGITS, torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(got, torch.tensor([[1 / 8, 2 / 8, 5 / 8]]).log())
    # At T = 1/2 the odds are squared: 1, 4, 25 of 30.
    got = token_logprobs(LOGITS, torch.tensor([[0, 1, 2]]), temperature=0.5)
    torch.testing.assert_close(got, torch.tensor([[1 / 30, 4 / 30, 25 / 30]]).log())


def test_entropy_by_hand() -> None:
    want = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert token_entropy(LOGITS)[0].tolist() == pytest.approx([want] * 3)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_slow_loop_agrees(temperature: float) -> None:
    logits, tokens = draw(2, 3, 7) * 3, torch.tensor([[0, 6, 3], [2, 2, 5]])
    logprobs = token_logprobs(logits, tokens, temperature=temperature)
    entropy = token_entropy(logits, temperature=temperature)
    for b in range(2):
        for t in range(3):
            weights = [math.exp(z / temperature) for z in logits[b, t].tolist()]
            p = [weight / sum(weights) for weight in weights]
            assert logprobs[b, t].item() == pytest.approx(math.log(p[tokens[b, t]]), rel=1e-5, abs=1e-6)
            assert entropy[b, t].item() == pytest.approx(-sum(q * math.log(q) for q in p), rel=1e-4, abs=1e-6)


def test_limits_of_the_temperature() -> None:
    logits, tokens = draw(2, 3, 7), torch.zeros(2, 3, dtype=torch.long)
    hot, cold = {"temperature": 1e6}, {"temperature": 1e-4}
    torch.testing.assert_close(token_entropy(logits, **hot), torch.full((2, 3), math.log(7)))
    torch.testing.assert_close(token_logprobs(logits, tokens, **hot), torch.full((2, 3), -math.log(7)))
    torch.testing.assert_close(token_entropy(logits, **cold), torch.zeros(2, 3))
    torch.testing.assert_close(token_logprobs(logits, logits.argmax(-1), **cold), torch.zeros(2, 3))


def test_ruled_out_tokens_have_no_entropy_and_no_bad_gradient() -> None:
    logits = torch.tensor([[[0.0, 0.0, -math.inf]]], requires_grad=True)
    entropy = token_entropy(logits)
    assert entropy.item() == pytest.approx(math.log(2))
    (entropy.sum() + token_logprobs(logits, torch.tensor([[0]])).sum()).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[[0.5, -0.5, 0.0]]]))
    assert token_logprobs(logits, torch.tensor([[2]])).item() == -math.inf


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[1e4, 1e4 - math.log(3.0)]]])
    assert token_logprobs(logits, torch.tensor([[0]])).item() == pytest.approx(math.log(0.75), abs=1e-3)


def test_bf16_logits_are_upcast_before_the_softmax() -> None:
    logits, tokens = draw(2, 4, 50).bfloat16(), torch.randint(50, (2, 4), generator=torch.Generator().manual_seed(2))
    got = token_logprobs(logits, tokens)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, token_logprobs(logits.double(), tokens).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(token_entropy(logits), token_entropy(logits.float()), rtol=0, atol=0)


def test_a_confident_token_counts_although_its_logprob_is_zero() -> None:
    # Some systems take the mask from `logprob != 0`; a confident token would fall out of every mean.
    logprobs = token_logprobs(torch.tensor([[[200.0, 0.0], [0.0, 0.0]]]), torch.tensor([[0, 0]]))
    assert logprobs[0, 0].item() == 0.0
    mask = torch.tensor([[True, True]])
    assert masked_mean(logprobs, mask).item() == pytest.approx(-math.log(2) / 2)
    with pytest.raises(ValueError, match="must be bool or integer"):
        masked_mean(logprobs, logprobs)


def test_agreement() -> None:
    a = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert logprob_agreement(a, a, mask).item() == 1.0
    delta = torch.tensor([[math.log(2.0), -math.log(2.0), 0.0], [math.log(3.0), math.inf, math.nan]])
    # Factors 2, 2, 1, 3: over- and underestimates do not cancel, and padding does not count.
    assert logprob_agreement(a, a + delta, mask).item() == pytest.approx(2.0)
    assert logprob_agreement(a + delta, a, mask).item() == pytest.approx(2.0)
    assert logprob_agreement(a.bfloat16(), a, mask).dtype == torch.float32


def test_a_slow_loop_agrees_on_agreement() -> None:
    a, b, mask = draw(3, 4), draw(3, 4, seed=1), draw(3, 4, seed=2) > 0
    factors = [math.exp(abs(x - y)) for x, y, m in zip(*(t.flatten().tolist() for t in (a, b, mask)), strict=True) if m]
    assert logprob_agreement(a, b, mask).item() == pytest.approx(sum(factors) / len(factors), rel=1e-5)


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match=r"logits is \(1, 3, 3\).*tokens is \(1, 2\) and should be \[B, R\]"):
        token_logprobs(LOGITS, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="-100 to 2; the logits cover 0 to 2"):
        token_logprobs(LOGITS, torch.tensor([[0, -100, 2]]))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            token_logprobs(LOGITS, torch.tensor([[0, 1, 2]]), temperature=temperature)
    with pytest.raises(ValueError, match=r"should be \[B, R, V\]"):
        token_entropy(LOGITS[0])
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        logprob_agreement(torch.zeros(1, 3), torch.zeros(1, 2), torch.ones(1, 3, dtype=torch.bool))
