"""The optimizer of a stage: parameter groups by tower, a learning rate that is a function of the step, clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from perl_vlm.errors import PerlVlmError
from perl_vlm.models.roles import Roles
from perl_vlm.models.towers import tower_of


def lr_factor(step: int, steps: int, warmup: int, schedule: Literal["constant", "linear", "cosine"]) -> float:
    """The share of the peak learning rate at 0-based ``step``: a linear warm-up, then constant, or falling to zero.

    A pure function, so a resumed run needs no scheduler state.
    """
    warmup = min(warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


@dataclass(frozen=True)
class RoleRates:
    """Peak learning rates of one role."""

    role: str
    lr: float
    vision_lr: float | None = None
    """The vision tower's; ``lr`` when not given."""


class Optimizer:
    """AdamW over the own parameters of some roles, with the norm of each role's gradient kept apart.

    Args:
        roles: the run's roles; ``train_only`` is called with the trained ones.
        rates: the trained roles and their peak learning rates.
        steps: optimizer steps in the whole stage, for the schedule.
    """

    def __init__(
        self,
        roles: Roles,
        rates: Sequence[RoleRates],
        *,
        steps: int,
        warmup: int,
        schedule: Literal["constant", "linear", "cosine"],
        weight_decay: float,
        max_grad_norm: float,
    ) -> None:
        roles.train_only(*(rate.role for rate in rates))
        self.steps, self.warmup, self.schedule, self.max_grad_norm = steps, warmup, schedule, max_grad_norm
        self.step_count = 0
        self.named: list[tuple[str, nn.Parameter]] = []
        self._by_role: dict[str, list[nn.Parameter]] = {}
        groups = []
        for rate in rates:
            own = roles.parameters(rate.role)
            self.named += [(f"{rate.role}:{key}", parameter) for key, parameter in own.items()]
            self._by_role[rate.role] = list(own.values())
            vision = [p for key, p in own.items() if tower_of(key) == "vision" and not key.startswith("head.")]
            rest = [p for key, p in own.items() if tower_of(key) != "vision" or key.startswith("head.")]
            for parameters, peak in ((rest, rate.lr), (vision, rate.lr if rate.vision_lr is None else rate.vision_lr)):
                if parameters:
                    groups.append({"params": parameters, "lr": peak, "peak": peak})
        self.torch = torch.optim.AdamW(groups, weight_decay=weight_decay)

    @property
    def lr(self) -> float:
        """The first group's learning rate at the coming step."""
        return self.torch.param_groups[0]["peak"] * self._factor()

    def _factor(self) -> float:
        return lr_factor(self.step_count, self.steps, self.warmup, self.schedule)

    def step(self) -> dict[str, float]:
        """Clip the joint gradient to ``max_grad_norm``, step, clear. Returns each role's gradient norm before
        clipping and their joint norm as ``grad_norm``. Raises PerlVlmError for a NaN or infinite gradient,
        before any weight is touched."""
        norms = {f"grad_norm/{role}": _norm(parameters) for role, parameters in self._by_role.items()}
        joint = nn.utils.clip_grad_norm_([p for _, p in self.named], self.max_grad_norm).item()
        if not math.isfinite(joint):
            self.torch.zero_grad(set_to_none=True)
            raise PerlVlmError(
                f"the gradient norm is {joint} at optimizer step {self.step_count + 1}; no weight was touched. A lower "
                "learning rate or --dtype float32 is the usual cure; continue from the last checkpoint with --resume"
            )
        for group in self.torch.param_groups:
            group["lr"] = group["peak"] * self._factor()
        self.torch.step()
        self.torch.zero_grad(set_to_none=True)
        self.step_count += 1
        return {"grad_norm": joint, **norms}


def _norm(parameters: Sequence[nn.Parameter]) -> float:
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads])).item() if grads else 0.0


def mean_metrics(records: Sequence[Mapping[str, float | Tensor]]) -> dict[str, float]:
    """The plain mean of each key over several records with the same keys."""
    return {key: sum(float(record[key]) for record in records) / len(records) for key in records[0]} if records else {}
