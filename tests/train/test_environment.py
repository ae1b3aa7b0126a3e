"""Live environments: episodes of several turns in rollouts, rewards, advantages and held-out measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perl_vlm.config import LoraConfig, PpoConfig, RunConfig
from perl_vlm.errors import PerlVlmError, TooLong
from perl_vlm.rollout.episodes import play
from perl_vlm.task import Task
from perl_vlm.train import ppo
from perl_vlm.train.experience import episode_totals, make_experience
from perl_vlm.train.log import read_log
from perl_vlm.train.pipeline import open_session
from perl_vlm.train.ppo import environment_counts, train_ppo
from perl_vlm.train.rewards import Rewards
from perl_vlm.train.rundir import RunDir
from perl_vlm.train.sampling import Episodes, sample_episodes
from perl_vlm.train.session import check_processes, look_at_data
from perl_vlm.train.signals import StopOnSignal
from perl_vlm.train.stage import Stage
from perl_vlm.types import Example, Message, Split, Step

WORDS = ["<pad>", "<eos>", "<unk>", "a", "b", "first", "second", "User", ":", "Assistant"]


def door(name: str, which: str) -> Example:
    return Example(name, (Message("user", (which,)),), metadata={"door": which})


@dataclass
class Corridor:
    """Two doors in a row: ``a`` opens the first, ``b`` the second, and only the second pays."""

    max_turns: int = 2
    closed: bool = False
    acted: int = 0

    def step(self, prompts: Sequence[Example], responses: Sequence[str]) -> list[Step]:
        self.acted += len(prompts)
        steps = []
        for prompt, response in zip(prompts, responses, strict=True):
            word = (response.split() or [""])[0]
            if prompt.metadata["door"] == "first" and word == "a":
                steps.append(Step(0.25, replace(prompt, id=f"{prompt.id}/2", messages=(Message("user", ("second",)),),
                                               metadata={**prompt.metadata, "door": "second"})))  # fmt: skip
            else:
                steps.append(Step(float(prompt.metadata["door"] == "second" and word == "b")))
        return steps

    def close(self) -> None:
        self.closed = True


class Walk(Task):
    """Through the corridor."""

    name, modality, primary_metric = "walk", "text", "through"

    def __init__(self) -> None:
        super().__init__()
        self.corridor = Corridor()

    def examples(self, split: Split) -> Sequence[Example]:
        return [door(f"{split}-{i}", "first") for i in range(16)]

    def demonstrations(self, split: Split) -> Sequence[Example]:
        return [replace(door(f"{split}-second-{i}", "second"), reference="b") for i in range(4)]

    def environment(self) -> Corridor:
        return self.corridor

    def evaluate(self, example: Example, response: str) -> dict[str, float]:
        return {"through": float(example.metadata["episode_return"] > 1)}


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Llama that knows ten words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(3)  # finds either door one time in seven or so
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=1, pad_token_id=0, bos_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    folder, model = tmp_path_factory.mktemp("walker"), LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= 3.0  # or no state could make it sure of anything
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def stage_of(walker: str, out: Path, **ppo: Any) -> Stage:
    settings = PpoConfig(
        **{
            "steps": 40, "batch_size": 64, "lr": 1e-2, "epochs": 2, "minibatches": 2, "max_new_tokens": 1,
            "reward_model": "verify", "kl_coef": 0.0, "save_every": 1000, "warmup": 0, "schedule": "constant",
            "value_lr": 1e-2, "entropy_coef": 0.02, "vf_coef": 0.5, **ppo,
        }
    )  # fmt: skip
    config = RunConfig(
        model=walker,
        device="cpu",
        dtype="float32",
        ppo=settings,
        lora=LoraConfig(language_rank=8, targets="all-linear"),
    )
    return open_session(Walk(), config, StopOnSignal()).stage("ppo", RunDir.create(out, {}, resume=False))


def say_words(*script: Sequence[str]) -> Any:
    """Answers by turn and then by episode."""
    return lambda prompts, of, turn: [SimpleNamespace(text=script[turn][place]) for place in of]


def test_open_episodes_take_their_turns_together_and_returns_are_what_was_earned_from_there_on() -> None:
    starts = [door(f"e{i}", "first") for i in range(3)]
    turns = play(Corridor(), starts, say_words(["a", "b", "a"], ["b", "", "a"]))
    found = [
        (t.episode, t.number, t.prompt.id, t.prompt.metadata["episode_return"], t.prompt.metadata["episode_turns"])
        for t in turns
    ]
    assert found == [
        (0, 0, "e0", 1.25, 2), (0, 1, "e0/2", 1.0, 2), (1, 0, "e1", 0.0, 1), (2, 0, "e2", 0.25, 2),
        (2, 1, "e2/2", 0.0, 2),
    ]  # fmt: skip


def test_an_episode_ends_with_the_last_turn_that_is_allowed() -> None:
    turns = play(Corridor(max_turns=1), [door("e", "first")], say_words(["a"]))
    assert [(t.number, t.prompt.metadata["episode_return"]) for t in turns] == [(0, 0.25)]


def test_an_episode_whose_prompt_grows_too_long_ends_there_with_what_it_earned() -> None:
    starts = [door(f"e{i}", "first") for i in range(3)]
    asked: list[list[str]] = []

    def answer(prompts: Sequence[Example], of: Sequence[int], turn: int) -> Any:
        asked.append([prompt.id for prompt in prompts])
        long = [prompt for prompt in prompts if prompt.id == "e1/2"]
        if long:
            raise TooLong("e1/2", "the prompt is too long", "Shorten it", long)
        return [SimpleNamespace(text="ab"[turn]) for _ in of]

    turns = play(Corridor(), starts, answer)
    known = [
        (t.prompt.id, t.prompt.metadata["episode_return"], "episode_truncated" in t.prompt.metadata) for t in turns
    ]
    assert known == [
        ("e0", 1.25, False), ("e0/2", 1.0, False), ("e1", 0.25, True), ("e2", 1.25, False), ("e2/2", 1.0, False),
    ]  # fmt: skip
    assert asked[-1] == ["e0/2", "e2/2"]
    # What failing costs there, lest writing on and on pays better than failing.
    world = Corridor()
    world.truncated_reward = -1.0  # type: ignore[attr-defined]
    cut = [turn.prompt.metadata["episode_return"] for turn in play(world, starts, answer) if turn.episode == 1]
    assert cut == [-0.75]
    with pytest.raises(TooLong):
        play(Corridor(), [door("e1/2", "first")], answer)  # a task's own first prompt is a bad record


def test_prompts_that_grow_too_long_are_counted_and_the_environments_own_counts_are_logged(
    walker: str, tmp_path: Path
) -> None:
    class Winding(Corridor):
        """Pays for every turn, and says ever more."""

        @property
        def counts(self) -> dict[str, int]:
            return {"visits": self.acted}

        def step(self, prompts: Sequence[Example], responses: Sequence[str]) -> list[Step]:
            self.acted += len(prompts)
            grown = [replace(one, messages=(Message("user", (f"{one.messages[0].text} a b",)),)) for one in prompts]
            return [Step(0.5, one) for one in grown]

    stage = stage_of(walker, tmp_path / "run", batch_size=8)
    stage.task.corridor = Winding(max_turns=9)  # type: ignore[attr-defined]
    stage.renderer.max_prompt_tokens = 2 + stage.collator.prompts(stage.task.examples("train")[:1]).input_ids.shape[1]
    stage.roles.add("policy")
    experience = make_experience(stage, stage.examples("train")[:8], Rewards(stage), 0, 0.0)
    assert len(experience.episodes.prompts) == 16, "two turns each"
    assert experience.measured.rewards[experience.episodes.begins].tolist() == [1.0] * 8
    assert environment_counts(stage, experience) == {"environment/visits": 16.0, "environment/too_long": 8.0}


def test_a_round_logs_what_its_environment_counts(walker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_of(walker, tmp_path / "run", steps=1, batch_size=8)
    stage.task.corridor.counts = {"visits": 3}  # type: ignore[attr-defined]
    monkeypatch.setattr(ppo, "update", lambda *_: {})
    train_ppo(stage)
    (line,) = read_log(stage.run.metrics)
    assert (line["environment/visits"], line["environment/too_long"]) == (3.0, 0.0)


def test_an_environment_that_loses_count_is_told_so() -> None:
    class Forgetful(Corridor):
        def step(self, prompts: Sequence[Example], responses: Sequence[str]) -> list[Step]:
            return super().step(prompts, responses)[1:]

    with pytest.raises(PerlVlmError, match="1 steps for 2 responses"):
        play(Forgetful(), [door("e", "first"), door("f", "first")], say_words(["a", "a"]))


def test_every_turn_is_a_row_with_the_tokens_and_logprobs_that_were_sampled(walker: str, tmp_path: Path) -> None:
    stage = stage_of(walker, tmp_path / "run")
    stage.roles.add("policy")
    starts = stage.task.examples("train")
    episodes = sample_episodes(stage, "policy", starts, 0, range(16), 8)
    assert len(episodes.prompts) > 16, "the test needs an episode that goes on"
    assert len(episodes.begins) == 16
    rollout = episodes.rollout
    assert [stage.renderer.decode(row[mask].tolist()) for row, mask in zip(
        rollout.sequences.input_ids[:, rollout.sequences.prompt_width :], rollout.sequences.response_mask, strict=True
    )] == list(rollout.texts)  # fmt: skip
    again = stage.roles.logprobs("policy", rollout.sequences, min_new_tokens=1).logprobs
    torch.testing.assert_close(again * rollout.sequences.response_mask, rollout.sampled_logprobs, atol=1e-5, rtol=1e-5)
    # What is drawn depends on the episode's own place, not on who is played beside it.
    alone = sample_episodes(stage, "policy", starts[3:4], 0, [3], 8)
    assert list(alone.rollout.texts) == [
        text for text, owner in zip(rollout.texts, episodes.episode, strict=True) if owner == 3
    ]


@pytest.mark.parametrize("score_coef", [1.0, 0.8], ids=["r - beta KL", "(1 - beta) r - beta KL"])
def test_an_episodes_total_counts_its_return_once_and_every_turns_penalty(score_coef: float) -> None:
    earned = score_coef * torch.tensor([1.25, 1.0, 0.0])
    penalties = torch.tensor([[-0.1, 0.0], [-0.2, -0.3], [-0.4, 0.0]])  # of divergence, length, missing end
    rewards = penalties.clone()
    rewards[:, 0] += earned
    episodes = Episodes(rollout=None, prompts=[door("x", "first")] * 3, episode=[0, 0, 1], begins=[0, 2])  # type: ignore[arg-type]
    wanted = torch.tensor([score_coef * 1.25 - 0.6, -0.4])
    torch.testing.assert_close(episode_totals(rewards, earned, episodes), wanted)


def test_a_reward_that_is_not_the_environments_is_refused(walker: str, tmp_path: Path) -> None:
    stage = stage_of(walker, tmp_path / "run", reward_model="verify + 0.5*untrained")
    with pytest.raises(PerlVlmError, match=r"--ppo\.reward_model verify"):
        look_at_data(stage, "ppo")


@pytest.mark.parametrize(
    "settings",
    [
        {"advantage": "rloo", "group_size": 4},
        pytest.param({"advantage": "gae"}, marks=pytest.mark.slow),
        # At twice the rate one seed in five walks into a wall; at this one, five of five found the way.
        pytest.param({"advantage": "reinforce", "epochs": 1, "lr": 5e-3, "value_lr": 5e-3}, marks=pytest.mark.slow),
    ],
    ids=["rloo", "gae", "reinforce"],
)
def test_estimators_learn_to_walk_through_two_doors(settings: dict[str, Any], walker: str, tmp_path: Path) -> None:
    stage = stage_of(walker, tmp_path / "run", eval_every=40, eval_prompts=16, **settings)
    train_ppo(stage)
    lines = read_log(stage.run.metrics)
    assert lines[0]["gold/through"] < 0.5
    assert sum(line["gold/through"] for line in lines[-4:]) / 4 > 0.85
    assert lines[-1]["episodes"] == 64
    assert lines[-1]["turns"] > 110
    assert lines[-1]["eval/scores"] > 1.1
    assert all(line["rollout/logprob_agreement"] < 1.001 for line in lines)


def test_supervised_tuning_learns_from_demonstrations_and_rl_from_first_prompts(walker: str, tmp_path: Path) -> None:
    stage = stage_of(walker, tmp_path / "run")
    look_at_data(stage, "sft")
    look_at_data(stage, "ppo")  # its examples have no reference, and need none
    assert [one.reference for one in stage.demonstrations("train")] == ["b"] * 4
    assert all(one.reference is None for one in stage.examples("train"))


def test_several_processes_are_refused() -> None:
    two: Any = SimpleNamespace(world=2)
    with pytest.raises(PerlVlmError, match="one process"):
        check_processes(Walk(), RunConfig(), "ppo", two)
    check_processes(Walk(), RunConfig(), "data", two)
