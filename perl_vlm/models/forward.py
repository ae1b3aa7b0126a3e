"""Forward passes over ``Sequences``: hidden states, log-probs and divergences of responses, only where needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perl_vlm.data.sequences import take
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.encoders import pooled_hidden
from perl_vlm.models.inputs import model_inputs
from perl_vlm.models.lm_head import head_is_known, head_of, learn_head
from perl_vlm.models.logits import (
    ResponseLogprobs,
    ResponseStates,
    divergence_of,
    drawn_from,
    filter_top_p,
    logprobs_of,
    token_rules,
)
from perl_vlm.models.sharding import is_sharded
from perl_vlm.models.trunk import own_forward, trunk
from perl_vlm.types import Sequences

__all__ = [
    "ResponseLogprobs",
    "ResponseStates",
    "divergence_of",
    "filter_top_p",
    "logprobs_of",
    "model_inputs",
    "pooled_hidden",
    "response_hidden",
    "response_logits",
    "response_logprobs",
    "response_states",
]


# -- log-probs -----------------------------------------------------------------------------------------------------


def response_states(model: Any, backbone: Backbone, sequences: Sequences) -> ResponseStates:
    """The trunk's last states at the tokens of the responses, and the head that turns them into logits.

    ``logprobs_of`` and ``divergence_of`` take it from there. The first time a model is seen, its head is learnt by
    comparison with logits of its own; where it cannot be reproduced, a warning says so and the model's own logits of
    the N real tokens are made here, a row at a time.
    """
    mask = sequences.response_mask
    width = mask.shape[1]
    hidden: Tensor | None = None
    if not head_is_known(model) or head_of(model) is not None:
        hidden, last = trunk(model, backbone, sequences)
        if not head_is_known(model):
            compared = None if hidden is None else hidden[:, -1:]
            if last is None:
                # Packed rows bring no logits, and some models cannot be asked for the last ones only.
                compared, last = own_forward(model, backbone, take(sequences, [0]), keep=1)
                compared = None if compared is None else compared[:, -last.shape[1] :]
            learn_head(model, compared, last)
    head = head_of(model)
    if head is None or hidden is None:
        hidden, features = _row_by_row(model, backbone, sequences)
        head = _identity
    else:
        hidden = features = hidden[:, -width - 1 : -1][mask]
    return ResponseStates(
        hidden=hidden,
        features=features,
        head=head,
        vocabulary=int(model.config.get_text_config().vocab_size),
        tokens=sequences.input_ids[:, sequences.prompt_width :][mask],
        steps=torch.arange(width, device=mask.device).expand_as(mask)[mask],
        mask=mask,
        rules=token_rules(model, backbone.eos_ids),
        frozen_head=features is hidden and _frozen(model),
    )


def _frozen(model: Any) -> bool:
    """Whether a model's LM head only hands gradients on. The head of a sharded base is left to its own hooks."""
    head = model.get_output_embeddings()
    return not is_sharded(model) and not any(value.requires_grad for value in head.parameters())


def response_logprobs(
    model: Any,
    backbone: Backbone,
    sequences: Sequences,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    min_new_tokens: int = 0,
    value_head: Any = None,
    chunk: int | None = None,
) -> ResponseLogprobs:
    """Log-probs and entropies of the responses under ``model``, exactly as the sampler drew them; see
    ``logprobs_of``."""
    return logprobs_of(
        response_states(model, backbone, sequences),
        temperature=temperature,
        top_p=top_p,
        min_new_tokens=min_new_tokens,
        value_head=value_head,
        chunk=chunk,
    )


def response_logits(
    model: Any,
    backbone: Backbone,
    sequences: Sequences,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    min_new_tokens: int = 0,
) -> Tensor:
    """Logits of the distributions that the response tokens were drawn from, all at once: [B, R, V] float32.

    Meant for small models and for tests; training goes by ``response_logprobs``, which never holds so much.
    """
    width = sequences.response_mask.shape[1]
    _, logits = own_forward(model, backbone, sequences, keep=width + 1)
    return drawn_from(
        logits[:, -width - 1 : -1],
        torch.arange(width, device=logits.device),
        token_rules(model, backbone.eos_ids),
        temperature=temperature,
        top_p=top_p,
        min_new_tokens=min_new_tokens,
        keep=sequences.input_ids[:, sequences.prompt_width :],
    )


# -- hidden states -------------------------------------------------------------------------------------------------


def response_hidden(model: Any, backbone: Backbone, sequences: Sequences, *, ends: bool = False) -> Tensor:
    """Last hidden states from the last prompt token to the last response column: [B, R + 1, H].

    Entry t is the state before response token t is known; entry t + 1 the state that has read it. With ``ends`` the
    entry behind each response's last token is right, and no other need be.

    Raises:
        PerlVlmError: for a model that does not show its last hidden states.
    """
    hidden, _ = trunk(model, backbone, sequences, ends=ends)
    if hidden is None:
        raise PerlVlmError(
            f"{type(model).__name__} does not show its last hidden states: its trunk, {type(model.base_model).__name__}"
            ", returns no last_hidden_state. Heads for rewards and values cannot be put on it"
        )
    return hidden[:, -sequences.response_mask.shape[1] - 1 :]


def _row_by_row(model: Any, backbone: Backbone, sequences: Sequences) -> tuple[Tensor | None, Tensor]:
    """Last hidden states [N, H] (if shown) and own logits [N, V] of the real response tokens.

    Raises PerlVlmError for a sharded base: processes with different numbers of rows would wait for each other for ever.
    """
    if is_sharded(backbone.model):
        raise PerlVlmError(
            f"{type(model).__name__} turns hidden states into logits in a way of its own, which takes a forward pass "
            "for each row; a base that is sharded over processes (FSDP2) cannot do that, since they have different "
            "numbers of rows. Launch with configs/accelerate/ddp.yaml"
        )
    states, logits = [], []
    for row in range(len(sequences)):
        single = take(sequences, [row])
        width = single.response_mask.shape[1]
        hidden, own = own_forward(model, backbone, single, keep=width + 1)
        logits.append(own[0, -width - 1 : -1])
        states.append(None if hidden is None else hidden[0, -width - 1 : -1])
    shown = [state for state in states if state is not None]
    return torch.cat(shown) if len(shown) == len(states) else None, torch.cat(logits)


def _identity(features: Tensor) -> Tensor:
    return features
