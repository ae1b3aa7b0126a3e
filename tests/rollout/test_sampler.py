"""The sampler and the recomputation must be the same distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from perl_vlm.config import LoraConfig
from perl_vlm.data.render import Renderer
from perl_vlm.data.sequences import take, with_responses
from perl_vlm.formulas import logprob_agreement
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.logits import TokenRules, token_rules
from perl_vlm.models.roles import REFERENCE, Roles
from perl_vlm.rollout.decoding import Chooser
from perl_vlm.rollout.sampler import cut_at_end, decode, episode_seeds, sample_rollout
from perl_vlm.types import Example, Message, Rollout, Sequences


def rollout_of(
    roles: Roles, renderer: Renderer, examples: list[Example], role: str, temperature: float, **settings: Any
) -> Rollout:
    return sample_rollout(
        roles,
        role,
        renderer.prompts(examples),
        renderer,
        [example.id for example in examples],
        **{"max_new_tokens": 6, "min_new_tokens": 1, "temperature": temperature, **settings},
    )


@pytest.mark.parametrize(
    ("temperature", "top_p", "min_new"),
    [(0.5, 1.0, 1), (1.0, 1.0, 3), (1.7, 1.0, 1), (0.5, 0.8, 3), (1.0, 0.8, 1), (1.7, 0.8, 3)],
)
def test_sampled_and_recomputed_logprobs_agree(
    temperature: float,
    top_p: float,
    min_new: int,
    roles: Roles,
    renderer: Renderer,
    make_examples: Callable[[int], list[Example]],
    scramble: Callable[..., None],
) -> None:
    """The canary: however the adapter is perturbed, rollout and training must be the same model, at every temperature
    and with every nucleus."""
    roles.add("policy")
    settings = {"temperature": temperature, "top_p": top_p, "min_new_tokens": min_new}
    before = None
    for seed in (0, 1):
        scramble(roles, "policy", seed=seed, scale=0.05)
        rollout = rollout_of(roles, renderer, make_examples(8), "policy", seeds=range(8), **settings)
        mask = rollout.sequences.response_mask
        with torch.no_grad():
            same = roles.logprobs("policy", rollout.sequences, **settings).logprobs
            other = roles.logprobs(REFERENCE, rollout.sequences, **settings).logprobs
        assert logprob_agreement(rollout.sampled_logprobs, same, mask).item() < 1 + 1e-5
        assert logprob_agreement(rollout.sampled_logprobs, other, mask).item() > 1.001, "the adapter was not sampled"
        assert mask.sum(dim=1).min() >= min_new
        assert before is None or not torch.equal(before[:, 0], rollout.sampled_logprobs[:, 0])
        before = rollout.sampled_logprobs


def test_a_wrong_temperature_is_noticed(
    roles: Roles, renderer: Renderer, make_examples: Callable[[int], list[Example]]
) -> None:
    rollout = rollout_of(roles, renderer, make_examples(16), REFERENCE, 2.0, seeds=range(16))
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


# -- the noise -----------------------------------------------------------------------------------------------------


@pytest.fixture
def talker(text_backbone: Backbone) -> Roles:
    """A language model with likely and unlikely next tokens, which the random one has not."""
    with torch.no_grad():
        text_backbone.model.get_output_embeddings().weight.mul_(30.0)
    return Roles(text_backbone, LoraConfig(language_rank=2))


def ask(roles: Roles, *questions: str) -> Sequences:
    return Renderer(roles.backbone).prompts(
        [Example(f"q{n}", (Message("user", (question,)),)) for n, question in enumerate(questions)]
    )


def first_token_distribution(roles: Roles, prompt: Sequences, **settings: Any) -> Tensor:
    """[V], from the recomputation's side; token 3 stands for any sampled token and is kept in every nucleus."""
    answered = with_responses(prompt, [[3]], roles.backbone.pad_id)
    with torch.no_grad():
        return roles.logits(REFERENCE, answered, **settings)[0, 0].softmax(dim=-1)


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 1.7}, {"temperature": 1.0, "top_p": 0.8}])
def test_tokens_come_as_often_as_they_should(settings: dict[str, float], talker: Roles) -> None:
    """Pearson's chi-square of 4,500 first tokens against the model's own distribution."""
    prompt = ask(talker, "what is red?")
    many = take(prompt, [0] * 1500)
    drawn: Counter[int] = Counter()
    for step in range(3):
        seeds = episode_seeds(5, step, 0, 1500)
        sampled = decode(talker, REFERENCE, many, max_new_tokens=1, min_new_tokens=0, seeds=seeds, **settings)
        drawn.update(row[0] for row in sampled.tokens)
    expected = 4500 * first_token_distribution(talker, prompt, **settings)
    if "top_p" in settings:
        expected[3] = expected[3] if drawn[3] else 0.0
        expected *= 4500 / expected.sum()
    seen = torch.tensor([drawn[token] for token in range(len(expected))], dtype=torch.float)
    assert seen[expected == 0].sum() == 0, "tokens from outside the nucleus"
    common = expected >= 5
    seen = torch.cat([seen[common], seen[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    seen, expected = seen[expected > 0], expected[expected > 0]
    degrees = len(expected) - 1
    assert degrees > 10
    statistic = float(((seen - expected) ** 2 / expected).sum())
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5, f"chi-square {statistic:.1f} at {degrees} degrees of freedom"
    assert statistic > degrees - 4 * (2 * degrees) ** 0.5, "too even to be drawn at random"


def test_a_response_does_not_depend_on_its_batch(
    roles: Roles, renderer: Renderer, make_examples: Callable[[int], list[Example]]
) -> None:
    """Nor on the order of the rows, how many are sampled at once, or torch's global generator."""
    examples, seeds = make_examples(12), episode_seeds(0, 0, 0, 12)
    torch.manual_seed(1)
    together = rollout_of(roles, renderer, examples, REFERENCE, 2.0, seeds=seeds)
    assert len(set(together.texts)) > 3
    torch.manual_seed(2)
    state = torch.get_rng_state()
    for rows in (1, 5):
        parts = rollout_of(roles, renderer, examples, REFERENCE, 2.0, seeds=seeds, rows=rows)
        assert parts.texts == together.texts
        torch.testing.assert_close(parts.sampled_logprobs, together.sampled_logprobs, atol=1e-4, rtol=1e-4)
        assert torch.equal(parts.ended, together.ended)
    order = [7, 2, 11, 0, 5]
    moved = rollout_of(roles, renderer, [examples[n] for n in order], REFERENCE, 2.0, seeds=[seeds[n] for n in order])
    assert moved.texts == tuple(together.texts[n] for n in order)
    assert torch.equal(state, torch.get_rng_state())
    others = rollout_of(roles, renderer, examples, REFERENCE, 2.0, seeds=episode_seeds(0, 1, 0, 12))
    assert others.texts != together.texts


def test_without_seeds_the_global_generator_decides(talker: Roles) -> None:
    prompts = ask(talker, "what is red?", "where is the star?")

    def drawn(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return decode(talker, REFERENCE, prompts, max_new_tokens=6).tokens

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_every_episode_has_a_seed_of_its_own() -> None:
    whole = episode_seeds(3, 7, 0, 1000)
    assert whole[400:450] == episode_seeds(3, 7, 400, 50), "a process that samples a part draws other seeds"
    assert len(set(whole) | set(episode_seeds(3, 8, 0, 1000)) | set(episode_seeds(4, 7, 0, 1000))) == 3000
    assert episode_seeds(3, 7, 0, 2) == [4111788175, 2444111644], "a resumed run would draw other episodes"
    # torch's CPU generator takes 32 bits of a seed: more would promise differences that it does not make.
    assert max(whole) < 2**32


def test_seeds_must_fit_the_prompts(talker: Roles) -> None:
    prompts = ask(talker, "what is red?", "where?")
    with pytest.raises(ValueError, match="2 prompts but 3 seeds"):
        decode(talker, REFERENCE, prompts, max_new_tokens=2, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        sample_rollout(
            talker, REFERENCE, prompts, Renderer(talker.backbone), ["a", "b"],
            max_new_tokens=2, min_new_tokens=1, temperature=1.0, seeds=[1], rows=1,
        )  # fmt: skip


def test_the_chooser_keeps_no_logits() -> None:
    """PITFALLS: a rollout that keeps B x T x V logits."""
    chooser = Chooser(TokenRules((2,), (9,)), 1.0, 0.9, 1, torch.rand(3, 4, dtype=torch.float64))
    rows = torch.arange(3)
    for step in range(4):
        tokens, logprobs = chooser(torch.randn(3, 1000), rows, step)
        assert tokens.shape == logprobs.shape == (3,)
    held = [value for value in vars(chooser).values() if isinstance(value, Tensor)]
    assert max(tensor.numel() for tensor in held) <= 3 * 4


# -- ends ----------------------------------------------------------------------------------------------------------


def test_an_end_token_that_also_pads(talker: Roles) -> None:
    """PITFALLS: pad token == eos token masks the real EOS. Here only the sampled one counts."""
    tokenizer = talker.backbone.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    end = talker.backbone.eos_ids[0]
    assert talker.backbone.pad_id == end
    with torch.no_grad():  # ends come often
        talker.backbone.model.get_output_embeddings().weight[end] += 1.0
    questions = ["what is red?", "where is the blue star?", "why?"] * 8
    rollout = sample_rollout(
        talker, REFERENCE, ask(talker, *questions), Renderer(talker.backbone), questions,
        max_new_tokens=8, min_new_tokens=1, temperature=2.0, seeds=range(24),
    )  # fmt: skip
    mask, lengths = rollout.sequences.response_mask, rollout.sequences.response_mask.sum(dim=1)
    assert len(lengths.unique()) > 3
    last = rollout.sequences.input_ids[:, -mask.shape[1] :].gather(1, lengths[:, None] - 1)[:, 0]
    assert torch.equal(last == end, rollout.ended)
    with torch.no_grad():
        again = talker.logprobs(REFERENCE, rollout.sequences, temperature=2.0, min_new_tokens=1).logprobs
    assert logprob_agreement(rollout.sampled_logprobs, again, mask).item() < 1 + 1e-5
    assert (rollout.sampled_logprobs[~mask] == 0).all()
    assert (rollout.sampled_logprobs.gather(1, lengths[:, None] - 1) < 0).all(), "the end itself was drawn too"


def test_no_end_is_forced_onto_an_answer_that_was_cut_off(talker: Roles) -> None:
    """PITFALLS: EOS forced onto truncated answers."""
    sampled = decode(
        talker, REFERENCE, ask(talker, "what is red?", "why?"), max_new_tokens=3, min_new_tokens=3, seeds=[1, 2]
    )
    assert [len(row) for row in sampled.tokens] == [3, 3]
    assert not any(set(row) & set(talker.backbone.eos_ids) for row in sampled.tokens)
    assert not sampled.ended.any()
    assert (sampled.logprobs < 0).all()


def test_the_end_is_ruled_out_for_exactly_so_many_tokens() -> None:
    chooser = Chooser(TokenRules((2,)), 1.0, 1.0, 3, None)
    likeliest_is_the_end = torch.tensor([[0.0, 1.0, 5.0, 0.5]])
    drawn = [chooser(likeliest_is_the_end, torch.tensor([0]), step)[0].item() for step in range(4)]
    assert drawn == [1, 1, 1, 2]


# -- images --------------------------------------------------------------------------------------------------------


def test_an_image_placeholder_is_never_drawn(
    roles: Roles, renderer: Renderer, make_examples: Callable[[int], list[Example]]
) -> None:
    """A model would look for its image: some crash, others put the next row's picture there."""
    rules = token_rules(roles.backbone.model, roles.backbone.eos_ids)
    assert rules.never == (renderer.tokenizer.convert_tokens_to_ids("<image>"),)
    head = roles.backbone.model.get_output_embeddings()
    with torch.no_grad():
        head.weight[list(rules.never)] = 3 * head.weight[renderer.response_ids("yes")[0]]
    rollout = rollout_of(roles, renderer, make_examples(8), REFERENCE, 5.0, seeds=range(8), min_new_tokens=6)
    responses = rollout.sequences.input_ids[:, rollout.sequences.prompt_width :]
    assert not torch.isin(responses, torch.tensor(rules.never)).any()
    with torch.no_grad():
        again = roles.logprobs(REFERENCE, rollout.sequences, temperature=5.0, min_new_tokens=6).logprobs
        everything = roles.logits(REFERENCE, rollout.sequences, temperature=5.0).softmax(dim=-1)
    assert logprob_agreement(rollout.sampled_logprobs, again, rollout.sequences.response_mask).item() < 1 + 1e-5
    assert (everything[..., list(rules.never)] == 0).all()
