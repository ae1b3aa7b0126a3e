"""What a model is made of, as far as memory and operations are concerned, read off its skeleton on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from perl_vlm.models.inspection import Skeleton
from perl_vlm.models.provenance import frozen_parameters
from perl_vlm.models.sharding import base_layers
from perl_vlm.models.towers import TOWERS, Tower, tower_of

QUANTISED = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: half a byte, a byte of scale for 64 of them, and four bytes for 256 scales."""
USUAL_PATCHES = 1024
"""Of a picture, where a model takes them in any size: 448 x 448 pixels in patches of 14."""


@dataclass(frozen=True)
class Picture:
    """One picture as a model sees it."""

    patches: int
    """Tokens of the vision tower, in one tile."""
    per_token: float
    """Patches behind a token of the prompt."""
    pixel_bytes: int
    """Of one patch as the processor gives it: float32, with a mask of integers where the family has one."""
    fixed: bool
    """Whether every tile has this size."""

    @property
    def tokens(self) -> int:
        """Of the prompt, for one tile."""
        return round(self.patches / self.per_token)


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model."""

    name: str
    kind: str
    parameters: dict[Tower, int]
    matmul: dict[Tower, int]
    """Parameters of linear layers, the LM head left out; attention's own products have none."""
    head: int
    """V x H, the LM head's, whether tied or not."""
    hidden: int
    vocabulary: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    windows: tuple[int | None, ...]
    """How many tokens each layer's cache keeps; None for all."""
    vision_layers: int
    vision_hidden: int
    picture: Picture | None
    period: int
    """After how many layers of the language tower their kinds come again."""
    layer_parameters: int
    """Of the language tower's layers, which FSDP shards."""
    largest_layer: int
    largest_linear: int
    quantisable: int
    """Parameters that 4 bits can hold."""

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    def base_bytes(self, size: int, *, four_bit: bool = False) -> int:
        """The base in a type of so many bytes."""
        if not four_bit:
            return self.total * size
        return int((self.total - self.quantisable) * size + self.quantisable * QUANTISED)

    def cache_bytes(self, tokens: int, size: int) -> int:
        """Keys and values of one sequence."""
        kept = sum(tokens if window is None else min(window, tokens) for window in self.windows)
        return 2 * kept * self.kv_heads * self.head_size * size


def shapes_of(skeleton: Skeleton) -> Shapes:
    """Sizes of a model without adapters."""
    model = skeleton.model
    config = model.config
    text = config.get_text_config()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    parameters, matmul = dict.fromkeys(TOWERS, 0), dict.fromkeys(TOWERS, 0)
    for name, value in frozen_parameters(model):
        parameters[tower_of(name)] += value.numel()
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    for name, module in linears:
        matmul[tower_of(name)] += module.weight.numel()
    sizes = [sum(value.numel() for value in layer.parameters()) for layer in base_layers(model)]
    heads = int(_first(text, "num_attention_heads", "n_head"))
    hidden = int(text.hidden_size)
    layers = int(_first(text, "num_hidden_layers", "n_layer"))
    return Shapes(
        name=skeleton.name,
        kind=skeleton.kind,
        parameters=parameters,
        matmul=matmul,
        head=0 if head is None else head.weight.numel(),
        hidden=hidden,
        vocabulary=int(text.vocab_size),
        layers=layers,
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_size=int(getattr(text, "head_dim", None) or hidden // heads),
        windows=_windows(text, layers),
        vision_layers=len(vision_layers(model)),
        period=_period(text, layers),
        vision_hidden=vision_width(model),
        picture=picture_of(config),
        layer_parameters=sum(sizes),
        largest_layer=max(sizes, default=0),
        largest_linear=max((module.weight.numel() for _, module in linears), default=0),
        quantisable=sum(matmul.values()),
    )


def _windows(text: Any, layers: int) -> tuple[int | None, ...]:
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    window = getattr(text, "sliding_window", None)
    return tuple(window if "sliding" in kind or "chunked" in kind else None for kind in kinds)


def _period(text: Any, layers: int) -> int:
    kinds = list(getattr(text, "layer_types", None) or [""])[:layers]
    return next(size for size in range(1, layers + 1) if all(kind == kinds[at % size] for at, kind in enumerate(kinds)))


def _first(config: Any, *names: str) -> Any:
    return next(value for value in (getattr(config, name, None) for name in names) if value is not None)


def vision_layers(model: Any) -> list[nn.Module]:
    """The vision tower's repeated layers, in order."""
    language = set(map(id, base_layers(model)))
    return [layer for layer in base_layers(model, vision=True) if id(layer) not in language]


def vision_width(model: Any) -> int:
    """The vision tower's hidden size, which the first vector of its first layer has: a norm's or an attention's."""
    for layer in vision_layers(model)[:1]:
        return next(int(value.numel()) for value in layer.parameters() if value.dim() == 1)
    return 0


def picture_of(config: Any) -> Picture | None:
    """How a model with a vision tower takes pictures in, by what its configuration says; None for a language model."""
    if isinstance(tower := getattr(config, "tower", None), dict) and config.image_seq_length:  # of open_clip
        pixels = (_side(tower["vision_cfg"].get("patch_size")) or 16) ** 2
        return Picture(int(config.image_seq_length), 1.0, pixels * 3 * 4, True)
    vision = getattr(config, "vision_config", None)
    patch = _side(getattr(vision, "patch_size", None))
    if vision is None or patch is None:
        return None
    side = _side(getattr(vision, "image_size", None))
    patches = USUAL_PATCHES if side is None else (side // patch) ** 2
    per_token = 1.0
    if isinstance(scale := getattr(config, "scale_factor", None), int):  # Idefics 3, SmolVLM
        per_token = float(scale) ** 2
    elif isinstance(ratio := getattr(config, "downsample_ratio", None), float):  # InternVL
        per_token = ratio**-2
    elif isinstance(merged := getattr(vision, "spatial_merge_size", None), int):  # Qwen-VL
        per_token = float(merged) ** 2
    elif isinstance(count := getattr(config, "mm_tokens_per_image", None), int):  # Gemma 3
        per_token = patches / count
    frames = int(getattr(vision, "temporal_patch_size", 1) or 1)
    pixel = 3 * frames * 4 + (8 if isinstance(scale, int) else 0)
    return Picture(patches, per_token, patch * patch * pixel, side is not None)


def _side(size: Any) -> int | None:
    if isinstance(size, list | tuple):
        size = size[0]
    return size if isinstance(size, int) and size > 0 else None
