"""The token loop of decoding: one prompt is read once for all its samples, and who has finished leaves the batch.

transformers' ``generate`` prepares everything that a family needs and hands over to ``DecodeLoop`` (its
``custom_generate``). In place of its own loop and cache this one writes keys and values into tensors with room for the
whole response, where transformers' copies all of them at every token; reads the prompt of several samples once; and
drops rows that ended, so that a step costs what the living rows cost.

Shape letters: N prompts, B rows (samples), n living rows, V vocabulary, R tokens of a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from perl_vlm.formulas import inverse_cdf
from perl_vlm.models.fused_lora import weights_stay
from perl_vlm.models.logits import TokenRules, drawn_from

LEAVE_AT = 0.75
"""Rows leave once no more than this share of the batch is alive: leaving copies what is kept of the cache."""
_BY_ROW = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
"""What ``generate`` carries from token to token besides the cache, rows in the last dimension but one."""
_KINDS = {"full_attention", "sliding_attention"}


class Chooser:
    """Draws tokens and says their log-probs.

    Row b's token of step t comes from row b's t-th uniform number by inverse CDF: nothing but a row's own numbers and
    its own distribution decides.

    Args:
        rules: which tokens are special.
        temperature, top_p, min_new_tokens: see ``drawn_from``.
        noise: [B, R] uniform numbers, or None for the likeliest token.
    """

    def __init__(
        self, rules: TokenRules, temperature: float, top_p: float, min_new_tokens: int, noise: Tensor | None
    ) -> None:
        self.rules, self.temperature, self.top_p, self.min_new_tokens = rules, temperature, top_p, min_new_tokens
        self.noise = noise

    def __call__(self, scores: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and log-probs, [n] each, of the living ``rows`` at a step whose logits are ``scores`` [n, V]."""
        logits = drawn_from(
            scores,
            torch.tensor(step, device=scores.device),
            self.rules,
            temperature=self.temperature,
            top_p=self.top_p,
            min_new_tokens=self.min_new_tokens,
        )
        logprobs = torch.log_softmax(logits, dim=-1)
        if self.noise is None:
            tokens = logits.argmax(dim=-1)
        else:
            # On a GPU a look at the values at every token would wait for it; `decode` looks once, at the end.
            tokens = inverse_cdf(logprobs.exp(), self.noise[rows, step], check=scores.device.type == "cpu")
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


class RoomyLayer(DynamicLayer):
    """A cache layer with room for ``capacity`` tokens, which are written in place."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add [n, heads, t, size] keys and values; all of them so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = [self._make(states) for states in (key_states, value_states)]
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if end > self.capacity:
            raise IndexError(f"a cache with room for {self.capacity} tokens was given {end}")
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, begin:end] = states
        self._show(end)
        return self.keys, self.values

    def _make(self, states: Tensor) -> Tensor:
        rows, heads, _, size = states.shape
        return states.new_empty(rows, heads, self.capacity, size)

    def _show(self, length: int) -> None:
        self.keys, self.values = (room[:, :, :length] for room in self._room)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order, as often as they are named."""
        length = self.get_seq_length()
        for place, room in enumerate(self._room):
            kept = room.new_empty(len(indices), *room.shape[1:])
            kept[:, :, :length] = room[indices, :, :length]
            self._room[place] = kept
        self._show(length)


def selects_rows(model: Any) -> bool:
    """Whether rows of a model's cache can be repeated and dropped: attention's can, other memories may not."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return kinds <= _KINDS and not getattr(model, "_is_stateful", False)


class DecodeLoop:
    """Decodes B rows from N prompts; give it to ``generate`` as ``custom_generate`` and read ``tokens`` and
    ``logprobs`` afterwards.

    Args:
        chooser: draws.
        ends: ids that end a response.
        limit: R, the most tokens of a response.
        prompt_of: for each of the B rows which of the N prompts it answers; None where row b answers prompt b.
        synced: run as many steps as the slowest of all processes, as a base sharded over them needs.
    """

    def __init__(
        self, chooser: Chooser, ends: Sequence[int], limit: int, prompt_of: Sequence[int] | None, synced: bool
    ) -> None:
        self.chooser, self.limit, self.prompt_of, self.synced = chooser, limit, prompt_of, synced
        self.ends = torch.tensor(list(ends))
        self.tokens = torch.empty(0)
        """[B, R'] what was drawn, as many columns as steps were run. What follows a row's first end means nothing."""
        self.logprobs = torch.empty(0)
        """[B, R'] log-probs of that."""

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **carried: Any,
    ) -> Tensor:
        """What ``generate`` calls. It is called with [N, P] prompts and returns them: the responses are in
        ``tokens``."""
        with weights_stay():
            self._decode(model, input_ids, carried)
        return input_ids

    def _decode(self, model: Any, input_ids: Tensor, carried: dict[str, Any]) -> None:
        flexible = selects_rows(model)
        if flexible:
            carried["past_key_values"] = _roomy(model, input_ids.shape[1] + self.limit)
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **carried)
        scores, carried = self._run(model, inputs, carried)
        ids, rows = input_ids, torch.arange(len(input_ids), device=input_ids.device)
        if self.prompt_of is not None:
            chosen = torch.tensor(self.prompt_of, device=ids.device)
            ids, scores = ids[chosen], scores[chosen]
            _keep(carried, chosen)
            rows = torch.arange(len(chosen), device=ids.device)
        self.ends = self.ends.to(ids.device)
        drawn, known = ids.new_zeros(len(rows), self.limit), scores.new_zeros(len(rows), self.limit, dtype=torch.float)
        alive, step = torch.ones_like(rows, dtype=torch.bool), 0
        while True:
            tokens, logprobs = self.chooser(scores, rows, step)
            drawn[rows, step], known[rows, step] = tokens, logprobs
            alive &= ~torch.isin(tokens, self.ends)
            step += 1
            count = int(alive.sum())
            if step == self.limit or not self._any(count):
                break
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            if flexible and 0 < count <= LEAVE_AT * len(rows):
                kept = alive.nonzero()[:, 0]
                ids, rows, alive = ids[kept], rows[kept], alive[kept]
                _keep(carried, kept)
            inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **carried)
            scores, carried = self._run(model, inputs, carried)
        self.tokens, self.logprobs = drawn[:, :step], known[:, :step]

    def _run(self, model: Any, inputs: dict[str, Any], carried: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """One forward pass: logits [n, V] of the next token, and what is carried on."""
        outputs = model(**inputs, return_dict=True)
        return outputs.logits[:, -1], model._update_model_kwargs_for_generation(outputs, carried)

    def _any(self, alive: int) -> bool:
        if not self.synced or not torch.distributed.is_initialized():
            return alive > 0
        total = torch.tensor(float(alive), device=self.ends.device)
        torch.distributed.all_reduce(total)
        return bool(total > 0)


def _roomy(model: Any, capacity: int) -> DynamicCache:
    """An empty cache of the kinds of layers that a model has, those that keep everything with room."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    assert all(isinstance(layer, DynamicLayer | DynamicSlidingWindowLayer) for layer in cache.layers)
    return cache


def _keep(carried: dict[str, Any], chosen: Tensor) -> None:
    """Go on with these rows, in this order, as often as they are named."""
    carried["past_key_values"].batch_select_indices(chosen)
    for name in _BY_ROW:
        if isinstance(carried.get(name), Tensor):
            carried[name] = carried[name].index_select(carried[name].dim() - 2, chosen)
