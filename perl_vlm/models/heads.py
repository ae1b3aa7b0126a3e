"""Scalar heads on the language tower's last hidden state."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perl_vlm.errors import PerlVlmError


class ScalarHead(nn.Module):
    """One number for a hidden state: ``h . weight + bias``, in float32 whatever the base's type.

    A reward head starts at std 1 / sqrt(H + 1) (Huang et al., "The N+ implementation details of RLHF with PPO",
    2403.17031); a value head starts at zero or as a copy of the reward head.
    """

    def __init__(self, hidden_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        drawn = torch.zeros(hidden_size)
        if generator is not None:
            drawn.normal_(0.0, (hidden_size + 1) ** -0.5, generator=generator)
        self.weight = nn.Parameter(drawn)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [...]."""
        return hidden.float() @ self.weight + self.bias

    @torch.no_grad()
    def normalise_(self, mean: float, std: float) -> None:
        """Fold ``(score - mean) / std`` into weight and bias, so that the constants travel with the head."""
        if not std > 0:
            raise PerlVlmError(
                f"the reward model gives every response the same score (std {std}); it has learned nothing to "
                "normalise. Train it longer or look at its pair accuracy"
            )
        self.weight.div_(std)
        self.bias.sub_(mean).div_(std)

    def save(self, path: Path) -> None:
        save_file({key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}, path)

    def load(self, path: Path) -> None:
        if not path.is_file():
            raise PerlVlmError(f"{path.parent} holds no reward model: {path.name} is missing")
        self.load_state_dict(load_file(path))
