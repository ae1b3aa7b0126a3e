"""Reward-model losses and accuracies: hand-worked tables, limiting cases, slow loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from perl_vlm.formulas import bradley_terry, label_accuracy, label_bce, pair_accuracy

LOG2 = math.log(2.0)


def draw(count: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_bradley_terry_by_hand() -> None:
    # Differences log 3 and -log 3: probabilities 3/4 and 1/4 of ranking the pair rightly.
    chosen, rejected = torch.tensor([math.log(3.0), 0.0]), torch.tensor([0.0, math.log(3.0)])
    assert bradley_terry(chosen, rejected).item() == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    # A margin of log 3 asked of the first pair makes it a toss-up.
    margin = torch.tensor([math.log(3.0), 0.0])
    assert bradley_terry(chosen, rejected, margin=margin).item() == pytest.approx((LOG2 + math.log(4.0)) / 2)
    centred = bradley_terry(chosen, rejected, centering_coef=0.5) - bradley_terry(chosen, rejected)
    assert centred.item() == pytest.approx(0.5 * math.log(3.0) ** 2)


def test_bradley_terry_against_a_loop() -> None:
    chosen, rejected, margin = draw(9, 0), draw(9, 1), draw(9, 2).abs()
    total = 0.0
    for c, r, m in zip(chosen.tolist(), rejected.tolist(), margin.tolist(), strict=True):
        total += -math.log(1 / (1 + math.exp(-(c - r - m)))) + 0.01 * (c + r) ** 2
    got = bradley_terry(chosen, rejected, margin=margin, centering_coef=0.01)
    assert got.item() == pytest.approx(total / 9, rel=1e-5)


def test_bradley_terry_limits() -> None:
    same = draw(4, 0)
    assert bradley_terry(same, same).item() == pytest.approx(LOG2)
    torch.testing.assert_close(bradley_terry(same + 7, same - 1 + 7), bradley_terry(same, same - 1))  # only differences
    far = torch.tensor([1e4])
    assert bradley_terry(far, -far).item() == 0.0
    assert bradley_terry(-far, far).item() == pytest.approx(2e4)  # log of a sigmoid that underflows
    # Centering alone decides the level, and pulls it to zero.
    level = torch.tensor([3.0], requires_grad=True)
    bradley_terry(level, level, centering_coef=0.1).backward()
    assert level.grad is not None
    assert level.grad.item() == pytest.approx(0.1 * 2 * 6.0 * 2)


def test_bradley_terry_pushes_the_pair_apart() -> None:
    chosen, rejected = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    bradley_terry(chosen, rejected).backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.tolist() == [-0.25, -0.25]
    assert rejected.grad.tolist() == [0.25, 0.25]


def test_label_bce_by_hand() -> None:
    # sigma(log 3) = 3/4.
    scores = torch.tensor([math.log(3.0), math.log(3.0)])
    assert label_bce(scores, torch.tensor([1.0, 0.0])).item() == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    weighted = label_bce(scores, torch.tensor([True, False]), positive_weight=3.0).item()
    assert weighted == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 2)


def test_label_bce_against_a_loop_and_torch() -> None:
    scores, labels = draw(12, 3), (draw(12, 4) > 0).float()
    total = 0.0
    for score, label in zip(scores.tolist(), labels.tolist(), strict=True):
        p = 1 / (1 + math.exp(-score))
        total -= 2.5 * math.log(p) if label else math.log(1 - p)
    assert label_bce(scores, labels, positive_weight=2.5).item() == pytest.approx(total / 12, rel=1e-5)
    for soft in (labels, torch.linspace(0, 1, 12)):
        want = binary_cross_entropy_with_logits(scores, soft, pos_weight=torch.tensor(2.5))
        torch.testing.assert_close(label_bce(scores, soft, positive_weight=2.5), want)


def test_label_bce_limits() -> None:
    far = torch.tensor([1e4, -1e4])
    assert label_bce(torch.zeros(2), torch.tensor([1, 0])).item() == pytest.approx(LOG2)
    assert label_bce(far, torch.tensor([1, 0])).item() == 0.0
    assert label_bce(far, torch.tensor([0, 1])).item() == pytest.approx(1e4)
    # The second term, where PE-RLHF's printed formula slips: its gradient is sigma(r), the probability given to good.
    scores = torch.tensor([-3.0], requires_grad=True)
    label_bce(scores, torch.tensor([0])).backward()
    assert scores.grad is not None
    assert scores.grad.item() == pytest.approx(1 / (1 + math.exp(3.0)))


def test_pair_accuracy() -> None:
    got = pair_accuracy(torch.tensor([2.0, 1.0, 0.0, 5.0]), torch.tensor([1.0, 2.0, 0.0, 4.0]))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert pair_accuracy(torch.zeros(5), torch.zeros(5)).item() == 0.5
    chosen, rejected = draw(50, 5), draw(50, 6)
    wins = sum(c > r for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True))
    assert pair_accuracy(chosen, rejected).item() == pytest.approx(wins / 50)
    assert pair_accuracy(rejected, chosen).item() == pytest.approx(1 - wins / 50)


def test_label_accuracy() -> None:
    scores = torch.tensor([0.1, -0.1, 3.0, -3.0, 0.0])
    assert label_accuracy(scores, torch.tensor([1, 1, 0, 0, 0])).item() == pytest.approx(3 / 5)
    assert label_accuracy(scores, torch.tensor([True, False, True, False, False])).item() == 1.0
    assert label_accuracy(scores, torch.tensor([0.9, 0.2, 0.6, 0.5, 1.0])).item() == pytest.approx(4 / 5)


def test_bf16_is_upcast() -> None:
    chosen, rejected = draw(6, 7).bfloat16(), draw(6, 8).bfloat16()
    got = bradley_terry(chosen, rejected, centering_coef=0.1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, bradley_terry(chosen.float(), rejected.float(), centering_coef=0.1), rtol=0, atol=0)
    got = label_bce(chosen, torch.ones(6))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, label_bce(chosen.float(), torch.ones(6)), rtol=0, atol=0)


def test_wrong_arguments_are_explained() -> None:
    two, three, none = torch.zeros(2), torch.zeros(3), torch.zeros(0)
    for formula in (bradley_terry, label_bce, pair_accuracy, label_accuracy):
        with pytest.raises(ValueError, match=r"\(2,\) and should be \[B\].*\(3,\) and should be \[B\]"):
            formula(two, three)
        with pytest.raises(ValueError, match="nothing to average"):
            formula(none, none)
    with pytest.raises(ValueError, match=r"margin is \(3,\)"):
        bradley_terry(two, two, margin=three)
    with pytest.raises(ValueError, match=r"chosen is \(2, 1\)"):
        bradley_terry(two[:, None], two)  # broadcast to 2 x 2 it would train on wrong pairs
    with pytest.raises(ValueError, match="centering_coef"):
        bradley_terry(two, two, centering_coef=-1.0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        label_bce(two, torch.tensor([-1.0, 1.0]))
    with pytest.raises(ValueError, match="positive_weight"):
        label_bce(two, two, positive_weight=0.0)
