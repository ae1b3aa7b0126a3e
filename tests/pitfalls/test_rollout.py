"""What is sampled, by whom, and whether training computes the same of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from perl_vlm.data.render import Renderer
from perl_vlm.errors import PerlVlmError
from perl_vlm.models import chunks as chunks_module
from perl_vlm.models.roles import Roles
from perl_vlm.models.towers import tower_of
from perl_vlm.rollout import sampler as sampler_module
from perl_vlm.rollout.canary import look
from perl_vlm.rollout.sampler import Sampled, sample_rollout
from perl_vlm.task import Task
from perl_vlm.train.experience import agreement
from perl_vlm.train.log import read_log
from perl_vlm.train.ppo import train_ppo
from perl_vlm.train.stage import Stage
from perl_vlm.train.update import accumulate
from perl_vlm.types import Comparison, Example, Message, Rollout, Sequences, Split

Play = Callable[..., Any]
StageOf = Callable[..., Stage]


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory that tensors made by ``work`` hold at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary(
    play: Play, save_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake: logits of all tokens, B x T x V, are kept by the rollout, the recomputation or the update."""
    vocabulary, rows, lengths = 8192, 8, (8, 40)
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", 16 * 4 * vocabulary)
    wide = save_llama(tmp_path / "wide", vocab_size=vocabulary, hidden_size=16, intermediate_size=16)
    peaks = {"round": [], "update": []}
    for length in lengths:
        played = play(
            model=wide, value="zero", batch_size=rows, max_new_tokens=length, min_new_tokens=length, entropy_coef=0.1
        )
        peaks["round"].append(peak_bytes(played.again))
        peaks["update"].append(
            peak_bytes(lambda played=played: accumulate(played.stage, played.experience, range(rows), 0, 0.0))
        )
    logits = rows * (lengths[1] - lengths[0]) * vocabulary * 4
    for what, (short, long) in peaks.items():
        assert long - short < 0.25 * logits, f"{what}: {short:,} and {long:,} bytes; the logits are {logits:,}"


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 1.0), (1.7, 1.0), (1.3, 0.8)])
def test_recomputed_logprobs_have_the_sampling_temperature(temperature: float, top_p: float, play: Play) -> None:
    """The mistake: log-probs are recomputed at temperature 1, so that ratio and KL compare two other policies."""
    played = play(temperature=temperature, top_p=top_p, value="zero")
    experience = played.experience
    assert agreement(experience.measured) == pytest.approx(1.0, abs=1e-5)
    diagnostics = accumulate(played.stage, experience, range(len(experience)), 0, 0.0)
    assert diagnostics["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    plain = played.stage.roles.logprobs("policy", experience.rollout.sequences).logprobs
    assert (plain - experience.measured.logprobs)[experience.mask].abs().max() > 0.05


@pytest.mark.parametrize("tower", ["language", "vision"])
def test_a_perturbed_adapter_moves_the_sampler_and_the_recomputation_alike(
    tower: Literal["language", "vision"], roles: Roles, renderer: Renderer, make_examples: Callable[..., list[Example]]
) -> None:
    """The mistake: what serves the rollouts ignores an adapter, say the vision tower's, and samples another model."""
    roles.add("policy")
    examples = make_examples(6)
    prompts = renderer.prompts(examples)

    def rollout() -> Rollout:
        return sample_rollout(
            roles, "policy", prompts, renderer, [example.id for example in examples], max_new_tokens=4,
            min_new_tokens=4, temperature=2.0, seeds=range(6),
        )  # fmt: skip

    @torch.no_grad()
    def recomputed(found: Rollout) -> torch.Tensor:
        return roles.logprobs("policy", found.sequences, temperature=2.0, min_new_tokens=4).logprobs

    before = rollout()
    stale = recomputed(before)
    torch.testing.assert_close(before.sampled_logprobs, stale, atol=1e-4, rtol=1e-4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in roles.parameters("policy").items():
            if tower_of(name) == tower:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    assert (recomputed(before) - stale).abs().max() > 1e-2
    after = rollout()
    torch.testing.assert_close(after.sampled_logprobs, recomputed(after), atol=1e-4, rtol=1e-4)
    # The look that a served engine takes: it passes a faithful sampler, and names the tower that another leaves out.
    own = {name: value for name, value in roles.parameters("policy").items() if tower_of(name) == tower}
    kept = {name: value.detach().clone() for name, value in own.items()}

    def faithful() -> tuple[Sequences, torch.Tensor]:
        found = rollout()
        return found.sequences, found.sampled_logprobs

    @torch.no_grad()
    def deaf() -> tuple[Sequences, torch.Tensor]:
        moved = {name: value.clone() for name, value in own.items()}
        for name, value in own.items():
            value.copy_(kept[name])
        found = faithful()
        for name, value in own.items():
            value.copy_(moved[name])
        return found

    @torch.no_grad()
    def again(sequences: Sequences, *, raw: bool = False) -> torch.Tensor:
        settings = {} if raw else {"temperature": 2.0, "min_new_tokens": 4}
        return roles.logprobs("policy", sequences, **settings).logprobs

    given = {"who": "the server", "pictures": True, "warn": pytest.fail}
    look(roles.parameters("policy"), faithful, again, **given)
    with pytest.raises(PerlVlmError, match=f"the server ignores the LoRA of the {tower} tower"):
        look(roles.parameters("policy"), deaf, again, **given)
    assert all(torch.equal(value, kept[name]) for name, value in own.items())


def test_a_sampler_that_disagrees_with_training_is_logged_and_warned_about(
    stage_of: StageOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake: nobody looks whether the sampler's log-probs are those that training computes."""
    faithful = stage_of("ppo", steps=1, value="zero")
    train_ppo(faithful)
    assert read_log(faithful.run.metrics)[0]["rollout/logprob_agreement"] == pytest.approx(1.0, abs=1e-5)
    assert not any("sampler" in note for note in faithful.notes)

    decode = sampler_module.decode

    def astray(*arguments: Any, **named: Any) -> Sampled:
        sampled = decode(*arguments, **named)
        return sampled._replace(logprobs=sampled.logprobs - 0.1)

    monkeypatch.setattr(sampler_module, "decode", astray)
    stage = stage_of("ppo", steps=2, value="zero")
    train_ppo(stage)
    lines = read_log(stage.run.metrics)
    assert [line["rollout/logprob_agreement"] for line in lines] == [pytest.approx(math.exp(0.1), rel=1e-3)] * 2
    assert sum("1.05" in note and "sampler" in note for note in stage.notes) == 1


@dataclass(frozen=True)
class Bad:
    """What to do with records that cannot be used."""

    on_bad_record: str = "error"


class Long(Task):
    """One comparison of four has a response of fifty words."""

    name, modality, primary_metric, Config = "long", "text", "points", Bad

    def preferences(self, split: Split) -> Sequence[Comparison]:
        question = (Message("user", ("talk",)),)
        return [
            Comparison(f"{i}", question, "a " * (50 if i == 2 else 2), "b", origin=f"{split}.jsonl row {i}")
            for i in range(4)
        ]


class LongPrompt(Long):
    """Many prompts of long words, and one of more and shorter words that has fewer letters."""

    def preferences(self, split: Split) -> Sequence[Comparison]:
        return [
            Comparison(
                f"{i}", (Message("user", ("yellow " * 12 if i != 99 else "a " * 20,)),), "a", "b", origin=f"row {i}"
            )
            for i in range(100)
        ]


def test_truncated_answers_stay_truncated_and_long_pairs_are_counted(play: Play, stage_of: StageOf) -> None:
    """The mistake: an EOS is forced onto what the limit cut off, in rollouts or in training pairs."""
    experience = play(value="zero", max_new_tokens=3, temperature=4.0).experience
    sequences, ended = experience.rollout.sequences, experience.measured.ended
    assert 0 < ended.sum() < len(ended)
    for ids, mask, end in zip(
        sequences.input_ids[:, sequences.prompt_width :], experience.mask, ended.tolist(), strict=True
    ):
        spoken = ids[mask].tolist()
        assert (spoken[-1] == 1) == end
        assert end or len(spoken) == 3
    # Training pairs are not cut at all: refused by name, or left out and counted.
    stage = stage_of("rm", task=Long())
    stage.renderer.max_response_tokens = 20
    with pytest.raises(PerlVlmError, match=r"1 of 4 train preferences.*train\.jsonl row 2.*51 tokens"):
        stage.preferences("train")
    stage = stage_of("rm", task=Long(Bad("skip")))
    stage.renderer.max_response_tokens = 20
    assert [record.id for record in stage.preferences("train")] == ["0", "1", "3"]
    assert any("1 of 4 train preferences were skipped" in note for note in stage.notes)
    # The prompts with the most letters are not those with the most tokens.
    stage = stage_of("rm", task=LongPrompt(Bad("skip")))
    stage.renderer.max_prompt_tokens = 20
    assert len(stage.preferences("train")) == 99
    assert any("row 99" in note for note in stage.notes)


def test_an_eos_inside_the_prompt_does_not_spare_the_missing_eos_penalty(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake: the penalty looks for an EOS anywhere in the row, and finds one that closes a turn of the prompt."""
    played = play(value="zero", max_new_tokens=3, temperature=1.5, missing_eos_penalty=3.0)
    collate = played.stage.collator.prompts

    def with_a_closed_turn(examples: Sequence[Example]) -> Sequences:
        prompts = collate(examples)
        second = prompts.attention_mask.cumsum(dim=1) == 2
        return replace(prompts, input_ids=prompts.input_ids.where(~second, torch.tensor(1)))

    monkeypatch.setattr(played.stage.collator, "prompts", with_a_closed_turn)
    experience = played.again()
    sequences = experience.rollout.sequences
    prompts, responses = sequences.input_ids.split([sequences.prompt_width, experience.mask.shape[1]], dim=1)
    assert (prompts == 1).any(dim=1).all()
    truncated = ~((responses == 1) & experience.mask).any(dim=1)
    assert 0 < truncated.sum() < len(truncated)
    torch.testing.assert_close(experience.scores, experience.measured.rewards - 3.0 * truncated)
