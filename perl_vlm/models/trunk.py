"""Last hidden states of a batch: every sequence in a row of its own, or prompts read once for all their responses."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from perl_vlm.errors import PerlVlmError, is_out_of_memory
from perl_vlm.models.backbone import Backbone, accepts
from perl_vlm.models.block_attention import blockwise, has_blocks
from perl_vlm.models.inputs import check_length, model_inputs, response_type
from perl_vlm.models.last_layer import narrows, only_at, stay_wide
from perl_vlm.models.sharding import is_sharded
from perl_vlm.models.shared_prefix import (
    Packed,
    differ,
    judge,
    pack,
    packed_inputs,
    pays,
    refuse,
    tolerance,
    verdict,
)
from perl_vlm.types import Sequences


def trunk(
    model: Any, backbone: Backbone, sequences: Sequences, *, ends: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Last hidden states [B, T, H], and the model's own logits of the last column [B, 1, V] where those can be had.

    They are right from the last prompt token on, to the end of each response; with ``ends`` at those last tokens alone.

    The model is called as a whole, with one column for its LM head, and its trunk listened to: what a family does on
    the way to the trunk is done, and a sharded model gathers its weights as it does in any forward pass.
    """
    if _worth_packing(model, sequences):
        check_length(backbone, sequences)
        packed = pack(sequences, backbone.pad_id)
        if ends:
            packed = packed.at_ends(sequences)
        if _sharing(model, backbone, sequences, packed):
            return _shared(model, backbone, packed), None
    return _separate(model, backbone, sequences)


def _worth_packing(model: Any, sequences: Sequences) -> bool:
    # The processes of a sharded base run in step, and what pays, or was compared, is a matter of each one's own rows.
    if not sequences.response_mask.shape[1] or is_sharded(model):
        return False
    return pays(sequences, at_most=1.0 if has_blocks(model) else 0.9)


def _separate(model: Any, backbone: Backbone, sequences: Sequences) -> tuple[Tensor | None, Tensor | None]:
    """Every sequence in a row of its own."""
    if accepts(backbone.model, "logits_to_keep"):
        return own_forward(model, backbone, sequences, keep=1)
    output = model.base_model(**model_inputs(model, backbone, sequences), use_cache=False)
    return getattr(output, "last_hidden_state", None), None


def _shared(model: Any, backbone: Backbone, packed: Packed) -> Tensor:
    """Last hidden states [B, R + 1, H] of sequences of which several have one prompt, each prompt read once."""
    inputs = packed_inputs(model, backbone, packed, fill=response_type(model))
    narrow = only_at(model, packed.input_ids.shape, packed.read) if narrows(backbone.model) else nullcontext()
    with blockwise(model), narrow:
        if accepts(backbone.model, "logits_to_keep"):
            hidden, _ = _listened(model, backbone, inputs, keep=1)
        else:  # the head alone would cost logits of every token
            hidden = getattr(model.base_model(**inputs, use_cache=False), "last_hidden_state", None)
    if hidden is None:
        raise PerlVlmError(f"{type(model).__name__} does not show its last hidden states")
    return packed.unpack(hidden)


def _sharing(model: Any, backbone: Backbone, sequences: Sequences, packed: Packed) -> bool:
    """Whether prompts may be shared in this batch: batches of its kind have been compared with separate rows, and none
    that was shorter only, since a window that a model counts in columns shows in long rows alone."""
    known = verdict(backbone.model, sequences, packed)
    if known.refused:
        return False
    if packed.length <= known.length:
        return True
    why = _try_sharing(model, backbone, sequences, packed)
    if why:
        warnings.warn(
            f"{backbone.name}: every response goes through the model in a row of its own, behind a copy of its "
            f"prompt, which takes longer: {why}",
            stacklevel=2,
        )
    return not why


_FAILURES = (PerlVlmError, RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)
"""How a model says that it cannot take such rows."""


@torch.no_grad()
def _try_sharing(model: Any, backbone: Backbone, sequences: Sequences, packed: Packed) -> str:
    base, training = backbone.model, [module for module in model.modules() if module.training]
    try:
        for module in training:  # dropout would make any two passes differ
            module.training = False
        separate, _ = _separate(model, backbone, sequences)
        if separate is None:
            return refuse(base, "it does not show its last hidden states")
        real = _compared(sequences, packed)
        expected = separate[:, -real.shape[1] :][real]
        if narrows(base):
            states = _narrowly(model, backbone, packed)
            if states is not None and differ(states[real], expected) <= tolerance(expected):
                return judge(base, sequences, packed, states[real], expected)
            stay_wide(base)
        return judge(base, sequences, packed, _shared(model, backbone, packed)[real], expected)
    except _FAILURES as error:
        _raise_out_of_memory(error)
        return refuse(base, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    finally:
        for module in training:
            module.training = True


def _compared(sequences: Sequences, packed: Packed) -> Tensor:
    """[B, R + 1] bool: the states that are read."""
    if packed.ends:
        nowhere = torch.zeros_like(sequences.response_mask[:, :1]).expand(-1, sequences.response_mask.shape[1] + 1)
        return nowhere.scatter(1, sequences.response_mask.sum(dim=1, keepdim=True), True)
    return torch.cat([sequences.response_mask[:, :1] | True, sequences.response_mask], dim=1)


def _narrowly(model: Any, backbone: Backbone, packed: Packed) -> Tensor | None:
    """What packed rows give where the last layer meets the tokens alone that are read; None where it cannot."""
    try:
        return _shared(model, backbone, packed)
    except _FAILURES as error:
        _raise_out_of_memory(error)
        return None


def _raise_out_of_memory(error: Exception) -> None:
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        raise error  # says nothing about the model; who called begins again with fewer rows


def own_forward(
    model: Any, backbone: Backbone, sequences: Sequences, *, keep: int | None = None
) -> tuple[Tensor | None, Tensor]:
    """The model's own forward pass: last hidden states [B, T, H] if its trunk shows them, and the logits of at least
    the last ``keep`` columns, [B, n, V] (by default of all)."""
    return _listened(model, backbone, model_inputs(model, backbone, sequences), keep=keep)


def _listened(
    model: Any, backbone: Backbone, inputs: dict[str, Any], *, keep: int | None
) -> tuple[Tensor | None, Tensor]:
    """A forward pass with these inputs, and what the trunk showed on the way."""
    shown: list[Tensor] = []

    def listen(module: nn.Module, arguments: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is not None:
            shown.append(hidden)

    limit = {"logits_to_keep": keep} if keep is not None and accepts(backbone.model, "logits_to_keep") else {}
    # Nearly every head calls the base model; OPT's calls the decoder in it. The outer one speaks last.
    handles = [part.register_forward_hook(listen) for part in {model.base_model, model.get_decoder()}]
    try:
        logits = model(**inputs, **limit, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return (shown[-1] if shown else None), logits
