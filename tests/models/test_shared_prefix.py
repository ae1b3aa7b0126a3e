"""Prompts that are read once for all their responses: the same numbers as from rows of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from perl_vlm.config import LoraConfig
from perl_vlm.data.collate import Collator
from perl_vlm.data.render import Renderer
from perl_vlm.data.sequences import take, with_responses
from perl_vlm.errors import PerlVlmError
from perl_vlm.models import shared_prefix, trunk
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.roles import Roles
from perl_vlm.models.shared_prefix import pack, pays, visible
from perl_vlm.types import Comparison, Example, Sequences

PAD = 0
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Words:
    """As much of a tokenizer as a forward pass asks for."""

    pad_token_id, bos_token_id, eos_token_id = PAD, 1, 2


def build(config: PreTrainedConfig) -> Roles:
    """Roles with random weights on a random model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    words: Any = Words()
    roles = Roles(
        Backbone("random", None, model, words, words, (2,), False, GenerationConfig()), LoraConfig(language_rank=4)
    )
    roles.add("reward", head="reward")
    roles.add("value", head="value")
    roles.add("policy")
    with torch.no_grad():
        for name in roles.names[1:]:
            for parameter in roles.parameters(name).values():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return roles


def batch(lengths: dict[int, list[int]], prompt_of: list[int] | None = None) -> Sequences:
    """Random prompts, by length, each with random responses of these lengths; equal prompts stand together."""
    generator = torch.Generator().manual_seed(4)

    def words(count: int) -> list[int]:
        return torch.randint(3, 61, (count,), generator=generator).tolist()

    width, ids, mask, responses, owners = max(lengths), [], [], [], []
    for number, (length, counts) in enumerate(lengths.items()):
        prompt = words(length)
        for count in counts:
            ids.append([PAD] * (width - length) + prompt)
            mask.append([0] * (width - length) + [1] * length)
            responses.append(words(count))
            owners.append(number)
    prompts = Sequences(
        torch.tensor(ids), torch.tensor(mask), torch.zeros(len(ids), 0, dtype=torch.bool), {}, (0,) * len(ids)
    )
    return replace(with_responses(prompts, responses, PAD), prompt_of=tuple(prompt_of or owners))


def measured(roles: Roles, sequences: Sequences) -> list[Tensor]:
    """Scores, values, log-probs, and the gradients of the scores."""
    with torch.no_grad():
        found = [roles.values("value", sequences), roles.logprobs("policy", sequences).logprobs]
    roles.train_only("reward")
    scores = roles.raw_scores("reward", sequences, training=True)
    scores.square().sum().backward()
    gradients = [parameter.grad for parameter in roles.parameters("reward").values()]
    roles.train_only()
    return [*found, scores.detach(), *(gradient for gradient in gradients if gradient is not None)]


def accepted(roles: Roles) -> bool:
    """Whether packed rows were compared and found to give the same."""
    known = shared_prefix._verdicts.get(roles.backbone.model, {}).values()
    return any(one.length for one in known) and not any(one.refused for one in known)


def apart(roles: Roles) -> Roles:
    """Every sequence in a row of its own."""
    shared_prefix.refuse(roles.backbone.model, "rows of their own are wanted")
    return roles


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(expected) > 10, "of every adapter weight"
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)


CONFIGS = {
    "full": Qwen3Config(**SIZES),
    # Its window is shorter than the prompts, so that a window that counted columns would show.
    "sliding": MistralConfig(**SIZES, sliding_window=5),
    "eager": Qwen3Config(**SIZES, attn_implementation="eager"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_shared_prompts_give_the_same_numbers(kind: str) -> None:
    sequences = batch({9: [3, 6], 14: [1, 4, 4], 5: [2], 7: [1, 5]})
    roles = build(CONFIGS[kind])
    together = measured(roles, sequences)
    assert accepted(roles)
    same(together, measured(apart(build(CONFIGS[kind])), sequences))


def test_rows_of_a_prompt_need_not_stand_together() -> None:
    sequences = batch({9: [3, 6], 14: [1, 4]})
    turned = take(sequences, [2, 0, 3, 1])
    assert turned.prompt_of == (1, 0, 1, 0)
    roles = build(CONFIGS["full"])
    for one, other in zip(measured(roles, turned)[:3], measured(roles, sequences)[:3], strict=True):
        torch.testing.assert_close(one, other[[2, 0, 3, 1]], atol=2e-5, rtol=2e-4)


def test_a_packed_row_holds_each_prompt_once_and_nothing_is_lost() -> None:
    sequences = batch({9: [3, 6], 14: [1, 4, 4], 5: [2]})
    packed = pack(sequences, PAD)
    assert int((packed.owners >= 0).sum()) == 9 + 14 + 5 + 3 + 6 + 1 + 4 + 4 + 2
    width = sequences.prompt_width
    # What unpacks to a response's columns are its own tokens, and before them the prompt's last one.
    ids = packed.unpack(packed.input_ids[..., None])[..., 0]
    assert torch.equal(ids[:, 1:][sequences.response_mask], sequences.input_ids[:, width:][sequences.response_mask])
    assert torch.equal(ids[:, 0], sequences.input_ids[:, width - 1])
    places = packed.unpack(packed.positions[..., None])[..., 0]
    prompts = sequences.attention_mask[:, :width].sum(dim=1)
    expected = prompts[:, None] + torch.arange(sequences.response_mask.shape[1])
    assert torch.equal(places[:, 1:][sequences.response_mask], expected[sequences.response_mask])


def test_a_response_sees_its_prompt_and_itself_alone() -> None:
    packed = pack(batch({3: [2, 2], 4: [1]}), PAD)
    seen = visible(packed)[:, 0]
    for row in range(len(seen)):
        for query in range(seen.shape[1]):
            for key in range(seen.shape[1]):
                of = packed.owners[row, query], packed.segments[row, query]
                other = packed.owners[row, key], packed.segments[row, key]
                mine = of[0] == other[0] >= 0 and (other[1] == 0 or other[1] == of[1]) and key <= query
                assert bool(seen[row, query, key]) == (bool(mine) or query == key)


def test_groups_fill_rows_up_to_the_longest() -> None:
    packed = pack(batch({30: [10], 12: [4], 11: [3], 7: [1]}), PAD)
    assert packed.input_ids.shape == (2, 40), "40 tokens, and 16 + 14 + 8 of the others"
    assert packed.holds_several, "prompts, though each has one response"
    assert not pack(batch({30: [10], 29: [11]}), PAD).holds_several
    assert pack(batch({30: [10, 1]}), PAD).holds_several


def test_packing_is_for_batches_that_gain() -> None:
    assert pays(batch({9: [3, 6]}), 0.9), "18 cells in place of 30"
    assert not pays(batch({9: [3, 6]}), 0.5)
    assert not pays(replace(batch({9: [6, 6]}), prompt_of=None), 0.9)
    assert pays(replace(batch({9: [6, 6]}), prompt_of=None), 1.0)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda seen, packed: torch.ones_like(seen).tril(),
        lambda seen, packed: seen & (packed.segments[:, None, None] == packed.segments[:, None, :, None]),
    ],
    ids=["responses see each other", "responses do not see their prompt"],
)
def test_a_model_that_would_differ_is_found_out_and_read_row_by_row(
    mistake: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = shared_prefix.visible
    monkeypatch.setattr(shared_prefix, "visible", lambda packed, *rest: mistake(right(packed, *rest), packed))
    sequences = batch({9: [3, 6], 14: [1, 4, 4]})
    roles = build(CONFIGS["full"])
    with pytest.warns(UserWarning, match="row of its own.*states differ by [01][.\\d]* of their size"):
        found = measured(roles, sequences)
    same(found, measured(apart(build(CONFIGS["full"])), sequences))


def test_a_model_that_cannot_take_packed_rows_is_read_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise TypeError("no 4D masks here")

    monkeypatch.setattr(trunk, "packed_inputs", broken)
    sequences = batch({9: [3, 6]})
    roles = build(CONFIGS["full"])
    with pytest.warns(UserWarning, match="TypeError: no 4D masks here"):
        found = measured(roles, sequences)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        roles.values("value", sequences)
    same(found, measured(apart(build(CONFIGS["full"])), sequences))


def test_longer_rows_and_other_kinds_are_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that a model counts in columns shows in long rows alone, and a lone response proves nothing of two."""
    tried: list[int] = []
    usual = trunk._try_sharing

    def noting(model: Any, backbone: Backbone, sequences: Sequences, packed: Any) -> str:
        tried.append(packed.length)
        return usual(model, backbone, sequences, packed)

    monkeypatch.setattr(trunk, "_try_sharing", noting)
    roles = build(CONFIGS["full"])
    for lengths in ({9: [3]}, {9: [3]}, {5: [2, 2]}, {4: [2, 2]}, {9: [3, 6]}, {9: [2, 6]}):
        roles.values("value", batch(lengths))
    assert tried == [12, 9, 18]
    right = shared_prefix.visible
    monkeypatch.setattr(shared_prefix, "visible", lambda packed, *rest: right(packed, *rest).tril().triu(-20))
    with pytest.warns(UserWarning, match="row of its own"):
        found = roles.values("value", batch({30: [6, 6]}))
    torch.testing.assert_close(found, apart(build(CONFIGS["full"])).values("value", batch({30: [6, 6]})))


def test_full_copies_of_a_bfloat16_base_learn_from_packed_rows() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES)).eval().requires_grad_(False).bfloat16()
    words: Any = Words()
    backbone = Backbone("random", None, model, words, words, (2,), False, GenerationConfig())
    roles = Roles(backbone, LoraConfig(language_rank=4), tuning="full")
    roles.add("reward", head="reward")
    roles.train_only("reward")
    sequences, gradients = batch({9: [3, 6], 14: [1, 4, 4]}), []
    for _ in range(2):
        roles.raw_scores("reward", sequences, training=True).square().sum().backward()
        gradients.append([p.grad for p in roles.parameters("reward").values() if p.grad is not None])
        roles.clear_gradients("reward")
        if len(gradients) == 1:
            assert accepted(roles)
            apart(roles)
    assert len(gradients[0]) > 20
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 0.1 * other.norm() + 1e-3


def test_running_out_of_memory_says_nothing_about_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    roles, sequences = build(CONFIGS["full"]), batch({9: [3, 6]})
    with monkeypatch.context() as broken:
        broken.setattr(trunk, "packed_inputs", full)
        with pytest.raises(torch.OutOfMemoryError):
            roles.values("value", sequences)
    assert not accepted(roles)
    roles.values("value", sequences)
    assert accepted(roles)


def test_layers_that_remember_other_than_by_attention_are_read_row_by_row() -> None:
    config = Qwen3Config(**SIZES)
    config.layer_types = ["full_attention", "linear_attention"]
    packed = pack(batch({9: [3, 6]}), PAD)
    with pytest.raises(PerlVlmError, match="layers of kind linear_attention"):
        shared_prefix.attention_masks(SimpleNamespace(config=config, parameters=lambda: iter([torch.zeros(1)])), packed)


# -- who says that rows share a prompt -----------------------------------------------------------------------------


def test_the_two_sides_of_a_pair_share_their_prompt(
    renderer: Renderer, make_examples: Callable[[int], list[Example]]
) -> None:
    pairs = [Comparison(e.id, e.messages, "circle", "blue square", e.images) for e in make_examples(3)]
    sequences, _ = Collator(renderer).comparisons(pairs)
    assert sequences.prompt_of == (0, 1, 2, 0, 1, 2)


def test_equal_words_with_other_pictures_are_other_prompts(
    roles: Roles, renderer: Renderer, make_examples: Callable[[int], list[Example]], scramble: Callable[..., None]
) -> None:
    """Ids tell nothing of pictures: pairs with one text and two pictures must not be merged."""
    roles.add("reward", head="reward")
    scramble(roles, "reward")
    one, two = make_examples(2)
    pairs = [Comparison("a", one.messages, "circle", "blue square", images) for images in (one.images, two.images)]
    sequences, _ = Collator(renderer).comparisons(pairs)
    width = sequences.prompt_width
    assert torch.equal(sequences.input_ids[0, :width], sequences.input_ids[1, :width])
    with torch.no_grad():
        scores = roles.scores("reward", sequences)
        assert accepted(roles)
        single = apart(roles).scores("reward", sequences)
    torch.testing.assert_close(scores, single, atol=2e-5, rtol=2e-4)
    assert (scores[0] - scores[1]).abs() > 1e-4


def test_samples_of_one_prompt_are_rendered_once(
    renderer: Renderer, make_examples: Callable[[int], list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make_examples(2)
    asked: list[int] = []
    plain = renderer.prompts

    def counting(examples: Any) -> Sequences:
        asked.append(len(examples))
        return plain(examples)

    monkeypatch.setattr(renderer, "prompts", counting)
    found = Collator(renderer).prompts([one, one, two, two, one])
    assert asked == [2]
    assert found.prompt_of == (0, 0, 1, 1, 0)
    expected = plain([one, one, two, two, one])
    assert torch.equal(found.input_ids, expected.input_ids)
    for key, value in expected.extras.items():
        assert torch.equal(found.extras[key], value)
