"""The sampler and the recomputation must be the same distribution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from perl_vlm.data.render import Renderer
from perl_vlm.formulas import logprob_agreement
from perl_vlm.models.roles import REFERENCE, Roles
from perl_vlm.rollout.sampler import cut_at_end, decode, sample_rollout
from perl_vlm.types import Example, Rollout


def rollout_of(
    roles: Roles, renderer: Renderer, examples: list[Example], role: str, temperature: float, min_new: int = 1
) -> Rollout:
    return sample_rollout(
        roles,
        role,
        renderer.prompts(examples),
        renderer,
        [example.id for example in examples],
        max_new_tokens=6,
        min_new_tokens=min_new,
        temperature=temperature,
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("min_new", [1, 3])
def test_sampled_and_recomputed_logprobs_agree(
    temperature: float,
    min_new: int,
    roles: Roles,
    renderer: Renderer,
    make_examples: Callable[[int], list[Example]],
    scramble: Callable[..., None],
) -> None:
    """The canary: with a perturbed adapter, rollout and training must still be the same model, at every temperature."""
    roles.add("policy")
    scramble(roles, "policy", scale=0.05)
    torch.manual_seed(0)
    rollout = rollout_of(roles, renderer, make_examples(16), "policy", temperature, min_new)
    mask = rollout.sequences.response_mask
    with torch.no_grad():
        same = roles.logprobs("policy", rollout.sequences, temperature=temperature, min_new_tokens=min_new).logprobs
        other = roles.logprobs(REFERENCE, rollout.sequences, temperature=temperature, min_new_tokens=min_new).logprobs
    assert logprob_agreement(rollout.sampled_logprobs, same, mask).item() < 1.001
    assert logprob_agreement(rollout.sampled_logprobs, other, mask).item() > 1.001, "the adapter was not sampled from"
    assert mask.sum(dim=1).min() >= min_new


def test_a_wrong_temperature_is_noticed(
    roles: Roles, renderer: Renderer, make_examples: Callable[[int], list[Example]]
) -> None:
    torch.manual_seed(0)
    rollout = rollout_of(roles, renderer, make_examples(16), REFERENCE, 2.0)
    with torch.no_grad():
        wrong = roles.logprobs(REFERENCE, rollout.sequences, temperature=1.0, min_new_tokens=1).logprobs
    assert logprob_agreement(rollout.sampled_logprobs, wrong, rollout.sequences.response_mask).item() > 1.01


def test_truncated_stays_truncated_and_the_first_end_counts() -> None:
    drawn = torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8], [2, 9, 9, 9]])
    rows, ended = cut_at_end(drawn, [2])
    assert rows == [[5, 2], [5, 6, 7, 8], [2]]
    assert ended.tolist() == [True, False, True]


def test_any_of_several_end_tokens_ends() -> None:
    rows, ended = cut_at_end(torch.tensor([[5, 3, 2], [5, 2, 3]]), [2, 3])
    assert rows == [[5, 3], [5, 2]]
    assert ended.all()


def test_greedy_is_deterministic_and_ignores_the_global_generator(
    roles: Roles, renderer: Renderer, make_examples: Callable[[int], list[Example]]
) -> None:
    prompts = renderer.prompts(make_examples(8))
    torch.manual_seed(1)
    first = decode(roles, REFERENCE, prompts, max_new_tokens=5, greedy=True)
    state = torch.get_rng_state()
    second = decode(roles, REFERENCE, prompts, max_new_tokens=5, greedy=True)
    assert first.tokens == second.tokens
    assert torch.equal(state, torch.get_rng_state())


def test_published_sampling_filters_do_not_bend_the_distribution(
    roles: Roles, renderer: Renderer, make_examples: Callable[[int], list[Example]]
) -> None:
    """A hub model may publish top_k=1 or a repetition penalty; rollouts must not inherit it."""
    assert roles.backbone.model.generation_config.top_k in (None, 0)
    prompts = renderer.prompts(make_examples(4))
    torch.manual_seed(0)
    seen = {tuple(decode(roles, REFERENCE, prompts, max_new_tokens=4, temperature=3.0).tokens[0]) for _ in range(8)}
    assert len(seen) > 1


def test_left_padding_does_not_change_what_is_decoded(
    roles: Roles, renderer: Renderer, make_examples: Callable[[int], list[Example]]
) -> None:
    examples = make_examples(10)
    together = decode(roles, REFERENCE, renderer.prompts(examples), max_new_tokens=5, greedy=True).tokens
    for example, tokens in zip(examples, together, strict=True):
        alone = decode(roles, REFERENCE, renderer.prompts([example]), max_new_tokens=5, greedy=True).tokens[0]
        assert alone == tokens
