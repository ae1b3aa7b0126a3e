"""Which modules of a model are its vision tower, its projector and its language tower, and which of them get LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from perl_vlm.errors import PerlVlmError

Tower = Literal["vision", "projector", "language"]
TOWERS: tuple[Tower, ...] = ("vision", "projector", "language")

# Names that the transformers families use. The projector comes first: Qwen-VL keeps its merger inside the tower.
_PROJECTOR = re.compile(
    r"(^|\.)(connector|multi_modal_projector|mm_projector|merger|deepstack_merger_list|embed_vision)(\.|$)"
)
_VISION = re.compile(r"(^|\.)(vision_model|vision_tower|visual|vision_encoder|image_encoder)(\.|$)")
_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attn|attention)(\.|$)")


def tower_of(name: str) -> Tower:
    """The tower that a module or parameter belongs to, by its dotted name."""
    if _PROJECTOR.search(name):
        return "projector"
    return "vision" if _VISION.search(name) else "language"


def linear_names(model: Any) -> list[str]:
    """Dotted names of every linear layer except the language-model head, in module order, the same with and without
    adapters attached (peft moves a wrapped layer to ``<name>.base_layer`` and puts its matrices beside it)."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and ".lora_" not in name
    ]


def lora_targets(model: Any, tower: Tower, targets: Literal["attention", "all-linear"]) -> list[str]:
    """Names of the linear layers of one tower that receive an adapter; of the projector, all of them."""
    names = [name for name in linear_names(model) if tower_of(name) == tower]
    if targets == "attention" and tower != "projector":
        names = [name for name in names if _ATTENTION.search(name)]
    return names


def pattern_of(names: Iterable[str]) -> str:
    """A regular expression that matches exactly these names up to their layer numbers, short enough to read.

    Layers that differ by number and leaf alone share one alternative:
    ``model\\.text_model\\.layers\\.\\d+\\.self_attn\\.(k_proj|q_proj)``.
    """
    stems: dict[str, list[str]] = {}
    for name in names:
        stem, _, leaf = name.rpartition(".")
        stem = r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in stem.split("."))
        if leaf not in stems.setdefault(stem, []):
            stems[stem].append(leaf)
    if not stems:
        raise PerlVlmError("no linear layer was found to adapt; `lora.targets all-linear` looks beyond attention")
    alternatives = [f"{stem}\\.({'|'.join(sorted(map(re.escape, leaves)))})" for stem, leaves in stems.items()]
    return alternatives[0] if len(alternatives) == 1 else f"({'|'.join(alternatives)})"
