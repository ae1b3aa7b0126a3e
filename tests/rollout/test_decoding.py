"""The token loop: prompts read once, rows that leave, a cache that is written in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig, PreTrainedConfig, RecurrentGemmaConfig
from transformers.cache_utils import DynamicLayer

from perl_vlm.config import LoraConfig
from perl_vlm.data.collate import Collator
from perl_vlm.data.render import Renderer
from perl_vlm.data.sequences import take
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.roles import REFERENCE, Roles
from perl_vlm.rollout.decoding import DecodeLoop, RoomyLayer, selects_rows
from perl_vlm.rollout.sampler import Sampled, decode
from perl_vlm.types import Example, Sequences

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def build(config: PreTrainedConfig) -> Roles:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.get_output_embeddings().weight.mul_(20.0)

    class Words:
        pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    words: Any = Words()
    backbone = Backbone("random", None, model, words, words, (2,), False, GenerationConfig())
    return Roles(backbone, LoraConfig(language_rank=4))


def prompts(lengths: list[int]) -> Sequences:
    generator, width = torch.Generator().manual_seed(1), max(lengths)
    ids = torch.randint(3, 61, (len(lengths), width), generator=generator)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return Sequences(ids * mask, mask, torch.zeros(len(lengths), 0, dtype=torch.bool), {}, (0,) * len(lengths))


@contextmanager
def batches(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens of each batch that goes through the first layer."""
    seen: list[tuple[int, int]] = []
    layers = next(module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    handle = layers[0].register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[:2])))
    try:
        yield seen
    finally:
        handle.remove()


def same(one: Sampled, other: Sampled) -> None:
    assert one.tokens == other.tokens
    width = min(one.logprobs.shape[1], other.logprobs.shape[1])
    torch.testing.assert_close(one.logprobs[:, :width], other.logprobs[:, :width], atol=1e-4, rtol=1e-4)
    assert torch.equal(one.ended, other.ended)


CONFIGS = {
    # Windows that the prompts outgrow, and that responses outgrow as they are made.
    "sliding": MistralConfig(**SIZES, sliding_window=6),
    "full": MistralConfig(**SIZES, sliding_window=None),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_samples_of_one_prompt_read_it_once(kind: str) -> None:
    roles = build(CONFIGS[kind])
    asked = prompts([9, 4, 7])
    many = replace(
        asked, input_ids=asked.input_ids[[0, 0, 1, 2, 2]], attention_mask=asked.attention_mask[[0, 0, 1, 2, 2]]
    )
    many = replace(many, response_mask=torch.zeros(5, 0, dtype=torch.bool), image_counts=(0,) * 5)
    settings: dict[str, Any] = {"max_new_tokens": 10, "seeds": range(5), "temperature": 1.3}
    with batches(roles.backbone.model) as seen:
        together = decode(roles, REFERENCE, replace(many, prompt_of=(3, 3, 8, 5, 5)), **settings)
    assert seen[0] == (3, 9), "three prompts"
    assert seen[1][0] >= 4, "and their samples from there on"
    same(together, decode(roles, REFERENCE, many, **settings))
    assert len({tuple(row) for row in together.tokens}) == 5, "samples of one prompt differ"


def test_samples_of_one_picture_read_it_once(
    roles: Roles, renderer: Renderer, make_examples: Callable[[int], list[Example]]
) -> None:
    one, two = make_examples(2)
    rows = [one, two, one, one]
    shared = Collator(renderer).prompts(rows)
    assert shared.prompt_of == (0, 1, 0, 0)
    settings: dict[str, Any] = {"max_new_tokens": 6, "seeds": range(4), "temperature": 2.0}
    with batches(roles.backbone.model) as seen:
        together = decode(roles, REFERENCE, shared, **settings)
    assert seen[0][0] == 2
    same(together, decode(roles, REFERENCE, renderer.prompts(rows), **settings))


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_that_ended_leave_the_batch(kind: str) -> None:
    roles = build(CONFIGS[kind])
    roles.backbone.model.get_output_embeddings().weight[2] += 4.0  # ends come often, and at different steps
    asked = prompts([9, 4, 7, 9, 3, 8, 5, 6])
    settings: dict[str, Any] = {"max_new_tokens": 16, "temperature": 2.0}
    with batches(roles.backbone.model) as seen:
        together = decode(roles, REFERENCE, asked, seeds=range(8), **settings)
    lengths = [len(row) for row in together.tokens]
    assert len(set(lengths)) > 3
    sizes = [rows for rows, _ in seen]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= max(1, sum(length == max(lengths) for length in lengths) / 0.75)
    assert len(sizes) == max(lengths), "and nothing runs when all have ended"
    for row in range(8):
        alone = take(asked, [row])
        single = decode(roles, REFERENCE, alone, seeds=[row], **settings)
        assert single.tokens[0] == together.tokens[row]


def test_who_is_done_runs_on_with_the_other_processes_of_a_sharded_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer gathers its weights from all processes whenever it runs: they must run it equally often."""
    others = iter([3, 2, 1, 0])
    monkeypatch.setattr(DecodeLoop, "_any", lambda loop, alive: alive + (next(others) if loop.synced else 0) > 0)
    roles = build(CONFIGS["full"])
    settings: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 0, "greedy": True}
    roles.backbone.model.lm_head.bias = nn.Parameter(torch.eye(61)[2] * 1e6, requires_grad=False)
    with batches(roles.backbone.model) as seen:
        found = decode(roles, REFERENCE, prompts([5, 4]), synced=True, **settings)
    assert found.tokens == [[2], [2]]
    assert len(seen) == 4
    with batches(roles.backbone.model) as seen:
        decode(roles, REFERENCE, prompts([5, 4]), **settings)
    assert len(seen) == 1


def test_memories_that_cannot_be_divided_are_left_whole() -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_hidden_layers"}
    config = RecurrentGemmaConfig(
        **sizes, num_hidden_layers=3, lru_width=16, attention_window_size=64, block_types=["recurrent", "attention"]
    )
    roles = build(config)
    assert not selects_rows(roles.backbone.model)
    asked = replace(prompts([6, 6, 6, 6]), prompt_of=(0, 0, 1, 1))
    roles.backbone.model.get_output_embeddings().weight[2] += 4.0
    with batches(roles.backbone.model) as seen:
        found = decode(roles, REFERENCE, asked, max_new_tokens=8, seeds=range(4), temperature=2.0)
    assert {rows for rows, _ in seen} == {4}
    assert len({len(row) for row in found.tokens}) > 1


# -- the cache -----------------------------------------------------------------------------------------------------


def test_a_roomy_layer_holds_what_a_growing_one_holds() -> None:
    torch.manual_seed(0)
    ours, theirs = RoomyLayer(12), DynamicLayer()
    assert ours.get_seq_length() == 0
    for length in (5, 1, 1):
        states = torch.randn(3, 2, length, 4), torch.randn(3, 2, length, 4)
        for one, other in zip(ours.update(*states), theirs.update(*states), strict=True):
            assert torch.equal(one, other)
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
    chosen = torch.tensor([2, 0, 0, 1])
    ours.batch_select_indices(chosen)
    theirs.batch_select_indices(chosen)
    states = torch.randn(4, 2, 1, 4), torch.randn(4, 2, 1, 4)
    for one, other in zip(ours.update(*states), theirs.update(*states), strict=True):
        assert torch.equal(one, other)


def test_a_roomy_layer_says_when_it_is_full() -> None:
    layer = RoomyLayer(3)
    layer.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    with pytest.raises(IndexError, match="room for 3 tokens was given 4"):
        layer.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
