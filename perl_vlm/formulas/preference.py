"""Losses and accuracies of reward models, from pairs and from labels.

Shape letters: B pairs or labelled responses. r is the reward model's scalar for a whole response, sigma the logistic
function. Losses are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from perl_vlm.formulas._checks import check_positive, check_shapes, check_some, upcast


def bradley_terry(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, centering_coef: float = 0.0
) -> Tensor:
    """``-mean log sigma(r_c - r_r - margin) + c mean (r_c + r_r)^2``.

    The pair fixes only the difference of two rewards; the second term pulls their sum to zero, which makes rewards of
    different prompts comparable.

    Args:
        chosen: [B] r_c, rewards of the preferred responses.
        rejected: [B] r_r.
        margin: [B] by how much each chosen response should win, in units of reward; none when not given.
        centering_coef: c >= 0; 0.01 is usual.

    Returns:
        A scalar: log 2 where both rewards are alike and there is neither margin nor centering.

    Raises:
        ValueError: where the shapes differ, B is 0, or c is negative.

    Sources: PE-RLHF, 2403.10704 (the loss); Llama 2, 2307.09288 (the margin); Eisenstein et al., "Helping or
    herding?", 2312.09244 (the centering, as in TRL's ``center_rewards_coefficient``).
    """
    shapes = {"chosen": (chosen, "B"), "rejected": (rejected, "B")}
    check_shapes(**(shapes if margin is None else {**shapes, "margin": (margin, "B")}))
    check_some(chosen=chosen)
    if not centering_coef >= 0:
        raise ValueError(f"centering_coef is {centering_coef}; it must be 0 or more")
    chosen, rejected = upcast(chosen), upcast(rejected)
    difference = chosen - rejected if margin is None else chosen - rejected - upcast(margin)
    loss = -logsigmoid(difference).mean()
    if centering_coef:
        loss = loss + centering_coef * ((chosen + rejected) ** 2).mean()
    return loss


def label_bce(scores: Tensor, labels: Tensor, *, positive_weight: float = 1.0) -> Tensor:
    """``-mean [w p log sigma(r) + (1 - p) log(1 - sigma(r))]``, the binary cross-entropy of a probability sigma(r).

    The formula printed in PE-RLHF has a slip in its second term; ``log(1 - sigma(r)) = log sigma(-r)`` is what makes
    this the likelihood of a bad label.

    Args:
        scores: [B] r, logits.
        labels: [B] p, 1 or True for good, 0 for bad, anything between for soft labels.
        positive_weight: w > 0, the weight of good labels; above 1 where they are rare.

    Returns:
        A scalar: log 2 at r = 0 and w = 1. Divided by B, not by the sum of weights, as in torch.

    Raises:
        ValueError: where the shapes differ, B is 0, a label lies outside [0, 1], or w is not positive.

    Source: PE-RLHF, 2403.10704, with its slip corrected.
    """
    check_shapes(scores=(scores, "B"), labels=(labels, "B"))
    check_some(scores=scores)
    check_positive(positive_weight=positive_weight)
    scores, target = upcast(scores), upcast(labels)
    if not bool(((target >= 0) & (target <= 1)).all()):
        raise ValueError(f"labels run from {target.min().item()} to {target.max().item()}; they must lie in [0, 1]")
    good, bad = positive_weight * target * logsigmoid(scores), (1 - target) * logsigmoid(-scores)
    return -(good + bad).mean()


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``mean [r_c > r_r] + [r_c = r_r] / 2``: the share of pairs ranked rightly, a tie counting half, so that a reward
    model that scores everything alike gets 0.5.

    Args:
        chosen: [B].
        rejected: [B].

    Returns:
        A float scalar in [0, 1].

    Raises:
        ValueError: where the shapes differ or B is 0.
    """
    check_shapes(chosen=(chosen, "B"), rejected=(rejected, "B"))
    check_some(chosen=chosen)
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean()


def label_accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """``mean [(r > 0) = (p > 1/2)]``: the share of labels that the sign of the score tells; a score of 0 says bad.

    Args:
        scores: [B] logits.
        labels: [B] bool, or numbers of which those above 1/2 are good.

    Returns:
        A float scalar in [0, 1].

    Raises:
        ValueError: where the shapes differ or B is 0.
    """
    check_shapes(scores=(scores, "B"), labels=(labels, "B"))
    check_some(scores=scores)
    return ((scores > 0) == (upcast(labels) > 0.5)).float().mean()
