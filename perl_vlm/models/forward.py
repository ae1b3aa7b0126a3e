"""Forward passes over ``Sequences``: log-probs of responses and hidden states, only where they are needed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from perl_vlm.data.sequences import token_extras
from perl_vlm.formulas import token_entropy, token_logprobs
from perl_vlm.models.backbone import Backbone, accepts
from perl_vlm.types import Sequences


class ResponseLogprobs(NamedTuple):
    """What the policy loss needs of one forward pass."""

    logprobs: Tensor
    """[B, R] log-prob of each response token under the tempered policy, float32; anything outside the mask."""
    entropy: Tensor
    """[B, R] entropy of the distribution each token was drawn from, in nats."""


def model_inputs(model: Any, backbone: Backbone, sequences: Sequences) -> dict[str, Tensor]:
    """Keyword arguments of one forward pass.

    Positions count real tokens, so that padding on the left moves nothing; models with multimodal rotary positions
    compute theirs from ids and mask.
    """
    inputs = {
        "input_ids": sequences.input_ids,
        "attention_mask": sequences.attention_mask,
        **token_extras(sequences, fill=int(model.config.model_type == "paligemma")),
    }
    if accepts(backbone.model, "position_ids") and not _multimodal_rotary(model):
        inputs["position_ids"] = (sequences.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return inputs


def _multimodal_rotary(model: Any) -> bool:
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return "mrope_section" in rope


def ban_early_end(logits: Tensor, eos_ids: tuple[int, ...], min_new_tokens: int) -> Tensor:
    """Rule out the end of the response in its first ``min_new_tokens`` positions, as the sampler did. [B, R, V]"""
    if min_new_tokens < 1:
        return logits
    logits = logits.clone()
    logits[:, :min_new_tokens, list(eos_ids)] = float("-inf")
    return logits


def response_logits(
    model: Any, backbone: Backbone, sequences: Sequences, *, temperature: float = 1.0, min_new_tokens: int = 0
) -> Tensor:
    """Logits of the distributions that the response tokens were drawn from, [B, R, V] float32.

    They are tempered, the end is ruled out where the sampler ruled it out, and they are made at the R positions that
    predict a response token and nowhere else.
    """
    width = sequences.response_mask.shape[1]
    inputs = model_inputs(model, backbone, sequences)
    if accepts(backbone.model, "logits_to_keep"):
        logits = model(**inputs, logits_to_keep=width + 1, use_cache=False).logits[:, :-1]
    else:
        logits = model(**inputs, use_cache=False).logits[:, -width - 1 : -1]
    return ban_early_end(logits.float(), backbone.eos_ids, min_new_tokens) / temperature


def response_logprobs(
    model: Any, backbone: Backbone, sequences: Sequences, *, temperature: float = 1.0, min_new_tokens: int = 0
) -> ResponseLogprobs:
    """Log-probs and entropies of the responses under ``model``, exactly as the sampler drew them."""
    logits = response_logits(model, backbone, sequences, temperature=temperature, min_new_tokens=min_new_tokens)
    tokens = sequences.input_ids[:, -logits.shape[1] :]
    # A banned token may stand in the padding, where its log-prob would be -inf; the mask hides it, a zero is safer.
    logprobs = token_logprobs(logits, tokens)
    logprobs = torch.where(sequences.response_mask, logprobs, torch.zeros_like(logprobs))
    return ResponseLogprobs(logprobs, token_entropy(logits))


def response_hidden(model: Any, backbone: Backbone, sequences: Sequences) -> Tensor:
    """Last hidden states from the last prompt token to the last response column, without the LM head: [B, R + 1, H].

    Entry t is the state before response token t is known; entry t + 1 the state that has read it.
    """
    width = sequences.response_mask.shape[1]
    trunk = model.base_model
    output = trunk(**model_inputs(model, backbone, sequences), use_cache=False)
    return output.last_hidden_state[:, -width - 1 :]
