"""What a model's forward pass takes, from ``Sequences``."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from perl_vlm.data.sequences import token_extras
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.backbone import Backbone, accepts
from perl_vlm.types import Sequences


def model_inputs(model: Any, backbone: Backbone, sequences: Sequences) -> dict[str, Tensor]:
    """Keyword arguments of one forward pass.

    Positions count real tokens, so that padding on the left moves nothing; models with multimodal rotary positions
    compute theirs from ids and mask.

    Raises PerlVlmError for a row longer than the model has positions for; one that is longer than the model was trained
    on is a warning, once for each model.
    """
    check_length(backbone, sequences)
    inputs = {
        "input_ids": sequences.input_ids,
        "attention_mask": sequences.attention_mask,
        **token_extras(sequences, fill=response_type(model)),
    }
    if accepts(backbone.model, "position_ids") and not _multimodal_rotary(model):
        inputs["position_ids"] = (sequences.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return inputs


def response_type(model: Any) -> int:
    """The ``token_type_ids`` of responses; see ``token_extras``."""
    return int(model.config.model_type == "paligemma")


def check_length(backbone: Backbone, sequences: Sequences) -> None:
    limit = backbone.window or backbone.trained_window
    # The mask is on the device, and reading it waits for that; the shape alone rules most batches out.
    if limit is None or sequences.attention_mask.shape[1] <= limit:
        return
    longest = int(sequences.attention_mask.sum(dim=1).max())
    if longest <= limit:
        return
    if backbone.window is not None:
        raise PerlVlmError(
            f"a prompt with its response has {longest} tokens, but {backbone.name} has positions for {limit} only. "
            "Lower --max_prompt_tokens and --max_response_tokens (in ppo: --ppo.max_new_tokens) to that sum, or take a "
            "model that reads more"
        )
    if backbone.name not in _warned and not _stretched(backbone.model.config):
        _warned.add(backbone.name)
        warnings.warn(
            f"a sequence has {longest} tokens, but {backbone.name} was trained on {limit} at most, by its "
            "max_position_embeddings; what it makes of longer ones is uncertain",
            stacklevel=2,
        )


_warned: set[str] = set()
"""Models whose training length has been passed."""


def _stretched(config: Any) -> bool:
    """Whether the rotary positions are scaled (YaRN and the like), to reach beyond the length of training."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return any("factor" in part for part in kinds)


def _multimodal_rotary(model: Any) -> bool:
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return "mrope_section" in rope or hasattr(model.base_model, "rope_deltas")
