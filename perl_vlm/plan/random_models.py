"""Models of a few families with random weights and any sizes, for measuring the planner against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perl_vlm.models.inspection import Skeleton

SMALL: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 3, "vocab_size": 800, "intermediate_size": 384, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""A language model of 0.7 million parameters."""
TOWER: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 384, "patch_size": 16, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 128,
}  # fmt: skip
"""A vision tower: 64 patches, which become 16 tokens."""
IMAGE_TOKEN = 4


def random_model(family: str, tower: dict[str, Any] | None = None, **sizes: Any) -> Any:
    """A frozen transformers model.

    Args:
        family: ``qwen3``, ``llama``, or ``smolvlm``, which is Idefics 3 over a Llama.
        tower: of ``smolvlm``, the vision tower's sizes where they are not ``TOWER``'s.
        sizes: of the language model where they are not ``SMALL``'s.

    Raises KeyError for another family.
    """
    makers: dict[str, Callable[[], Any]] = {
        "qwen3": lambda: _qwen3({**SMALL, **sizes}),
        "llama": lambda: _llama({**SMALL, **sizes}),
        "smolvlm": lambda: _smolvlm({**TOWER, **(tower or {})}, {**SMALL, **sizes}),
    }
    return makers[family]().eval().requires_grad_(False)


def skeleton_of(family: str, tower: dict[str, Any] | None = None, **sizes: Any) -> Skeleton:
    """The same model without weights."""
    with torch.device("meta"):
        return Skeleton(f"random {family}", "causal", random_model(family, tower, **sizes), None)


def random_pictures(model: Any, prompts: int) -> dict[str, Tensor]:
    """One picture for each of so many prompts, as Idefics 3's processor gives them."""
    side = int(model.config.vision_config.image_size)
    return {
        "pixel_values": torch.rand(prompts, 1, 3, side, side),
        "pixel_attention_mask": torch.ones(prompts, 1, side, side, dtype=torch.long),
    }


def _qwen3(sizes: dict[str, Any]) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**sizes))


def _llama(sizes: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**sizes))


def _smolvlm(tower: dict[str, Any], sizes: dict[str, Any]) -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    config = Idefics3Config(
        vision_config=tower, text_config={**sizes, "model_type": "llama"}, scale_factor=2, image_token_id=IMAGE_TOKEN,
        pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return Idefics3ForConditionalGeneration(config)
