"""The evaluation: answers decoded, chosen or played; gains by kind, win rates, a judge, and how they are announced."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from perl_vlm.config import EvalConfig, LoraConfig, PpoConfig, RunConfig
from perl_vlm.data.images import BlankImage, ImageBytes
from perl_vlm.data.lazy import Lazy
from perl_vlm.errors import BadRecord, PerlVlmError
from perl_vlm.models.roles import REFERENCE
from perl_vlm.stats import bootstrap_mean, paired_bootstrap
from perl_vlm.task import Task
from perl_vlm.train import evaluate as evaluation_module
from perl_vlm.train.choices import choice_logprobs
from perl_vlm.train.compare import Answer, compared, shares_of
from perl_vlm.train.evaluate import Evaluation, announce, evaluate, greedy_answers
from perl_vlm.train.figures import group_of
from perl_vlm.train.judge import Judge
from perl_vlm.train.log import read_log
from perl_vlm.train.pipeline import open_session, run_verb
from perl_vlm.train.publish import _subtitle
from perl_vlm.train.reward import add_reward_role
from perl_vlm.train.rewards import Rewards
from perl_vlm.train.rundir import RunDir
from perl_vlm.train.session import look_at_data
from perl_vlm.train.signals import StopOnSignal
from perl_vlm.train.stage import Stage
from perl_vlm.train.tables import headline, tables
from perl_vlm.types import Example, Message, RewardHead, Split, Step

WORDS = ["<pad>", "<eos>", "<unk>", "a", "b", "c", "first", "second", "User", ":", "Assistant"]
PROMPTS = ("first", "second", "first second", "a second", "b first", "c")


def ask(place: int, **fields: Any) -> Example:
    text = " ".join(PROMPTS[(place + 7 * turn) % 6] for turn in range(1 + place // 6))
    return Example(f"e{place}", (Message("user", (text,)),), **fields)


@dataclass
class Corridor:
    """Whoever says anything to ``first`` comes to ``second``; an ``a`` there pays."""

    max_turns: int = 3

    def step(self, prompts: Sequence[Example], responses: Sequence[str]) -> list[Step]:
        steps = []
        for prompt, response in zip(prompts, responses, strict=True):
            turn = len(prompt.messages[0].text.split())
            onward = replace(prompt, messages=(Message("user", (f"{prompt.messages[0].text} second",)),))
            steps.append(Step(float("a" in response), onward if turn % 2 else None))
        return steps

    def close(self) -> None: ...


@dataclass
class Seen:
    judged: list[tuple[Example, dict[str, float]]] = field(default_factory=list)
    chosen: list[tuple[str, list[float]]] = field(default_factory=list)


class Talk(Task):
    """Answers of ten words, judged by whether they begin with ``a`` and by their length against four words."""

    name, modality, primary_metric = "talk", "text", "right"

    def __init__(self, given: Sequence[Example], *, kind: str = "pairs", world: Corridor | None = None) -> None:
        super().__init__()
        self.given, self.kind, self.world, self.seen = list(given), kind, world, Seen()

    def examples(self, split: Split) -> Sequence[Example]:
        return self.given

    def evaluate(self, example: Example, response: str) -> dict[str, float]:
        if self.world is not None:
            earned, turns = example.metadata["episode_return"], example.metadata["episode_turns"]
            return {"right": earned, "turns": turns, "last": float(sum(map(ord, response)))}
        return {"right": float(response[:1] == "a"), "length_ratio": len(response.split()) / 4 + 0.5}

    def judge_choices(self, example: Example, logprobs: Sequence[float]) -> dict[str, float]:
        self.seen.chosen.append((example.id, list(logprobs)))
        return {"right": float(logprobs[0] == max(logprobs))}

    def totals(self, judged: Sequence[tuple[Example, dict[str, float]]]) -> dict[str, float]:
        self.seen.judged = list(judged)
        return {"spread": max(one["right"] for _, one in judged) - min(one["right"] for _, one in judged)}

    def reward_head(self) -> RewardHead:
        return RewardHead("labels" if self.kind == "labels" else "pairs")

    def environment(self) -> Corridor | None:
        return self.world


def model_of_words(folder: Path, seed: int) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=1, pad_token_id=0, bos_token_id=None, initializer_range=0.2,
        max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= 3.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Llama of eleven words."""
    return model_of_words(tmp_path_factory.mktemp("words"), 3)


StageOf = Callable[..., Stage]


@pytest.fixture
def stage_of(words: str, tmp_path: Path, scramble: Callable[..., None]) -> StageOf:
    """An evaluation of a task; with ``policy`` there is one that differs from its anchor."""

    def make(
        task: Task,
        *,
        policy: bool = False,
        policy_folder: str | None = None,
        model: str = words,
        ppo: Any = None,
        tokens: int = 2048,
        **settings: Any,
    ) -> Stage:
        config = RunConfig(
            model=model, device="cpu", dtype="float32", lora=LoraConfig(language_rank=4, targets="all-linear"),
            ppo=PpoConfig(max_new_tokens=3, **(ppo or {})), max_prompt_tokens=tokens,
            eval=EvalConfig(**{"bootstrap": 200, "batch_size": 5, "policy": policy_folder, **settings}),
        )  # fmt: skip
        session = open_session(task, config, StopOnSignal())
        if policy:
            session.roles.add("policy")
            scramble(session.roles, "policy", seed=1, scale=0.3)
        return session.stage("eval", RunDir.create(tmp_path / f"run{len(list(tmp_path.iterdir()))}", {}, resume=False))

    return make


def answers(key: str, *values: float, **others: Sequence[float]) -> list[Answer]:
    return [
        Answer("", [1], {key: value, **{name: column[place] for name, column in others.items()}})
        for place, value in enumerate(values)
    ]


CONFIG = RunConfig(eval=EvalConfig(bootstrap=300), seed=5)


def test_gains_by_kind_and_win_rates_with_their_intervals() -> None:
    kinds = ["x", "x", "x", "y", "y", None]
    examples = [ask(place, metadata={"kind": kind} if kind else {}) for place, kind in enumerate(kinds)]
    before = answers("right", 0, 0, 1, 1, 0, 1, other=[0, 0, 0, 0, 0, 0])
    after = answers("right", 1, 0, 1, 0, 1, 1, other=[1, 1, 1, 1, 1, 1])
    found = compared(CONFIG, examples, before, after, "right")
    assert found["gain/right"] == pytest.approx(1 / 6)
    assert found["gain/right/x"] == pytest.approx(1 / 3)
    assert found["gain/right/y"] == 0.0
    assert found["win_rate/right"] == pytest.approx((2 + 0.5 * 3) / 6)  # two gained, one lost, three alike
    assert found["gain/other"] == 1.0
    assert "win_rate/other" not in found
    assert "gain/other/x" not in found
    same = {"resamples": 300, "seed": 5}
    assert found.ci95["gain/right/x"] == paired_bootstrap([0, 0, 1], [1, 0, 1], **same)[1]
    assert found.ci95["win_rate/right"] == bootstrap_mean([1, 0.5, 0.5, 0, 1, 0.5], **same)[1]


def test_what_belongs_together_is_drawn_together_and_a_kind_of_one_group_has_no_interval() -> None:
    alike = [replace(ask(0, metadata={"kind": "x"}), id=f"{place}") for place in range(4)]
    apart = [ask(place, metadata={"kind": "y"}) for place in range(1, 5)]
    before, after = answers("right", *[0.0] * 8), answers("right", *[1.0, 0.0] * 4)
    found = compared(CONFIG, [*alike, *apart], before, after, "right")
    assert found["gain/right/x"] == found["gain/right/y"] == 0.5
    assert "gain/right/x" not in found.ci95
    assert found.ci95["gain/right/y"][0] < 0.5 < found.ci95["gain/right/y"][1]
    first, second = ask(0), ask(1)
    assert group_of(first) != group_of(second)
    assert group_of(replace(first, metadata={"group": 7})) == group_of(replace(second, metadata={"group": 7}))
    picture = (BlankImage(None),)  # type: ignore[arg-type]
    assert group_of(replace(first, images=picture)) == group_of(replace(second, images=picture))
    # Stored with each row that asks about it, one picture is one group all the same.
    rows = [replace(ask(place), images=(ImageBytes(b"PNG", f"row {place}"),)) for place in range(3)]
    assert len({group_of(row) for row in rows}) == 1
    assert group_of(rows[0]) != group_of(replace(rows[0], images=(ImageBytes(b"JPEG", "row 0"),)))


def test_one_group_alone_gets_no_verdict_and_the_report_says_why(stage_of: StageOf) -> None:
    given = [replace(ask(0), id=f"{place}") for place in range(4)]
    found = compared(CONFIG, given, answers("right", *[0.0] * 4), answers("right", *[1.0] * 4), "right")
    assert found["gain/right"] == found["win_rate/right"] == 1.0
    assert not found.ci95, "an interval of no width would be a verdict"
    stage = stage_of(Talk(given), policy=True)
    evaluation = evaluate(stage)
    assert not evaluation.ci95
    assert any("an interval needs two" in note for note in stage.notes)
    summary = {"metrics": {**evaluation.metrics, **found}, "ci95": {}}
    assert "cannot be told" in _subtitle(stage, summary)
    rows = {label: text for label, _, text in headline(stage, summary, evaluation)}
    assert "an interval needs two" in rows["Gain in right"]
    assert "interval" not in rows["Wins"]


class Alike(Lazy[Example]):
    """Generated examples."""

    what = "example"

    def _record(self, index: int) -> Example:
        return ask(index)


def test_sets_are_evaluated_all_over_and_generated_examples_in_order(stage_of: StageOf) -> None:
    """What is read may be several sets one after the other; what is generated is alike."""
    given = [ask(place % 6, metadata={"kind": "xy"[place >= 12]}) for place in range(24)]
    given = [replace(one, id=f"{place}") for place, one in enumerate(given)]
    listed = stage_of(Talk(given)).some_examples("test", 6)
    assert [one.metadata["kind"] for one in listed] == ["x"] * 3 + ["y"] * 3
    assert [one.metadata["kind"] for one in evaluate(stage_of(Talk(given), limit=6)).examples] == ["x"] * 3 + ["y"] * 3
    talk = Talk(given)
    talk.examples = lambda split: tuple(given)  # type: ignore[method-assign]
    assert [one.metadata["kind"] for one in stage_of(talk).some_examples("test", 6)] == ["x"] * 3 + ["y"] * 3
    talk.examples = lambda split: Alike(split, 24, 0)  # type: ignore[method-assign]
    assert stage_of(talk).some_examples("test", 6) == [ask(place) for place in range(6)]


def test_a_judgement_that_some_answers_lack_is_compared_where_both_have_it() -> None:
    examples = [ask(place) for place in range(3)]
    before, after = answers("right", 0, 0, 0), answers("right", 1, 0, 0)
    before[0].judged["rare"], after[0].judged["rare"] = 2.0, 5.0
    before[1].judged["rare"] = 100.0
    found = compared(CONFIG, examples, before, after, "right")
    assert found["gain/rare"] == 3.0


def brute(stage: Stage, role: str, example: Example, choice: str) -> float:
    """The log-prob of one choice, alone in its batch, from the model's own logits."""
    tokenizer = stage.roles.backbone.tokenizer
    prompt = stage.collator.prompts([example]).input_ids[0].tolist()
    said = tokenizer(f"{choice}", add_special_tokens=False)["input_ids"]
    assert 1 not in said  # no end
    with torch.no_grad(), stage.roles.acting(role) as model:
        logits = model(input_ids=torch.tensor([prompt + said])).logits[0]
    table = logits.float().log_softmax(dim=-1)
    return sum(table[len(prompt) - 1 + place, token].item() for place, token in enumerate(said))


@pytest.mark.parametrize("size", [1, 4, 100])
def test_choices_are_judged_by_the_log_prob_of_their_tokens_without_the_end(size: int, stage_of: StageOf) -> None:
    given = [ask(place, choices=("a", "b c", "c a b", "second")[: 2 + place % 3]) for place in range(6)]
    stage = stage_of(Talk(given), policy=True, batch_size=size)
    for role in (REFERENCE, "policy"):
        found = choice_logprobs(stage, role, given)
        assert [len(row) for row in found] == [len(example.choices) for example in given]
        for example, row in zip(given, found, strict=True):
            expected = [brute(stage, role, example, choice) for choice in example.choices]
            assert row == pytest.approx(expected, abs=1e-4)
        stage.task.seen.chosen.clear()  # type: ignore[attr-defined]
        said = greedy_answers(stage, role, given)
        best = [example.choices[row.index(max(row))] for example, row in zip(given, found, strict=True)]
        assert [answer.response for answer in said] == best
        assert stage.task.seen.chosen == [(e.id, row) for e, row in zip(given, found, strict=True)]  # type: ignore[attr-defined]
        assert all(
            answer.tokens[-1] == 1 and list(answer.logprobs) == row for answer, row in zip(said, found, strict=True)
        )


def test_choices_and_open_questions_mix_in_any_order(stage_of: StageOf) -> None:
    given = [ask(place, choices=("a", "b") if place % 3 == 0 else ()) for place in range(7)]
    stage = stage_of(Talk(given), policy=True)
    mixed = greedy_answers(stage, "policy", given)
    alone = [greedy_answers(stage, "policy", [example])[0] for example in given]
    for one, other, example in zip(mixed, alone, given, strict=True):
        assert (one.response, one.tokens, one.judged) == (other.response, other.tokens, other.judged)
        assert bool(one.logprobs) == bool(example.choices)
    metrics = evaluate(stage).metrics
    # Lengths and divergences are of what was decoded.
    decoded = [len(answer.tokens) for answer in mixed if not answer.logprobs]
    assert metrics["policy/response_tokens"] == pytest.approx(sum(decoded) / len(decoded))
    assert metrics["policy/kl"] > 0


def test_a_set_of_choices_alone_decodes_nothing(stage_of: StageOf, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be decoded")

    monkeypatch.setattr(evaluation_module, "decode", never)
    monkeypatch.setattr(evaluation_module, "sample", never)
    stage = stage_of(Talk([ask(place, choices=("a", "b", "c a")) for place in range(4)]), policy=True)
    found = evaluate(stage)
    assert {"anchor/right", "policy/right", "gain/right", "win_rate/right"} <= found.metrics.keys()
    assert not {"policy/kl", "anchor/response_tokens"} & found.metrics.keys()
    lines = read_log(stage.run.samples)
    assert lines[0]["choices"] == ["a", "b", "c a"]
    assert len(lines[0]["policy/logprobs"]) == 3


@pytest.mark.parametrize(
    ("choices", "text"),
    [(("a", " "), "one of its choices is empty"), (("a", "b " * 600), "512")],
    ids=["empty", "long"],
)
def test_choices_that_cannot_be_compared_are_named(choices: tuple[str, ...], text: str, stage_of: StageOf) -> None:
    given = [ask(0, choices=choices, origin="test.jsonl row 3")]
    with pytest.raises((BadRecord, PerlVlmError), match=text) as caught:
        greedy_answers(stage_of(Talk(given)), REFERENCE, given)
    assert "test.jsonl row 3" in str(caught.value)


def test_figures_of_whole_sets_are_logged_for_each_role(stage_of: StageOf) -> None:
    given = [ask(place) for place in range(6)]
    stage = stage_of(Talk(given), policy=True)
    found = evaluate(stage)
    for label, own in (("anchor", found.anchor), ("policy", found.policy)):
        rights = [answer.judged["right"] for answer in own]
        assert found.metrics[f"{label}/spread"] == max(rights) - min(rights)
    asked = stage.task.seen.judged  # type: ignore[attr-defined]
    assert [(example.id, judged) for example, judged in asked] == [
        (example.id, answer.judged) for example, answer in zip(given, found.policy, strict=True)
    ]
    assert read_log(stage.run.metrics)[-1]["policy/spread"] == found.metrics["policy/spread"]


def test_episodes_are_played_greedily_to_their_end(stage_of: StageOf) -> None:
    given, world = [ask(place) for place in range(5)], Corridor()
    stage = stage_of(Talk(given, world=world), policy=True, batch_size=2)
    found = greedy_answers(stage, "policy", given)
    plain = Talk([])  # no world: one greedy answer to each prompt
    alone = replace(stage, task=plain)
    for example, answer in zip(given, found, strict=True):
        prompt: Example | None = example
        earned, said = 0.0, []
        while prompt is not None and len(said) < world.max_turns:
            turn = greedy_answers(alone, "policy", [prompt])[0]
            said.append(turn)
            (step,) = world.step([prompt], [turn.response])
            earned, prompt = earned + step.reward, step.next
        assert answer.response == "\n".join(turn.response for turn in said)
        assert answer.tokens == [token for turn in said for token in turn.tokens]
        last = float(sum(map(ord, said[-1].response)))
        assert answer.judged == {"right": earned, "turns": len(said), "last": last}
        assert answer.turns == len(said)
    assert {answer.turns for answer in found} == {1, 2}, "the test needs episodes of both lengths"
    assert any(len(set(answer.response.split("\n"))) > 1 for answer in found), "and turns that differ"
    evaluate(stage)
    assert [line["policy/turns"] for line in read_log(stage.run.samples)] == [answer.turns for answer in found]


def rules(folder: Path) -> str:
    (folder / "rules.py").write_text("def count(example, response):\n    return 10.0 * len(response.split())\n")
    return f"python:{folder / 'rules.py'}:count"


def test_a_judge_scores_both_sides(stage_of: StageOf, tmp_path: Path) -> None:
    given = [ask(place, metadata={"kind": "xy"[place % 2]}) for place in range(6)]
    stage = stage_of(Talk(given), policy=True, judge=rules(tmp_path))
    found = evaluate(stage)
    expected = {
        label: [10.0 * len(answer.response.split()) for answer in own]
        for label, own in (("anchor", found.anchor), ("policy", found.policy))
    }
    for label, values in expected.items():
        assert found.metrics[f"{label}/judge"] == pytest.approx(sum(values) / 6)
        assert [line[f"{label}/judge"] for line in read_log(stage.run.samples)] == values
    gain, interval = paired_bootstrap(expected["anchor"], expected["policy"], resamples=200, seed=0)
    assert found.metrics["gain/judge"] == pytest.approx(gain)
    assert found.ci95["gain/judge"] == pytest.approx(interval)
    assert 0 <= found.ci95["win_rate/judge"][0] <= found.metrics["win_rate/judge"] <= found.ci95["win_rate/judge"][1]
    assert "gain/judge/x" in found.metrics
    assert "anchor/judge_positive" not in found.metrics
    assert found.judge.endswith("rules.py:count")
    # What the task says of a whole set, it says of its own judgements.
    assert all(judged.keys() == {"right", "length_ratio"} for _, judged in stage.task.seen.judged)  # type: ignore[attr-defined]


def reward_role(stage: Stage, name: str, scramble: Callable[..., None], seed: int = 2, mean: float = 0.25) -> None:
    add_reward_role(stage, name)
    scramble(stage.roles, name, seed=seed, scale=0.3)
    stage.roles.head(name).normalise_(mean, 1.5)  # so that a score of 0 is no logit of 0


def logits_of(stage: Stage, name: str, given: Sequence[Example], said: Sequence[Answer]) -> torch.Tensor:
    from perl_vlm.data.sequences import with_responses

    rows = with_responses(stage.collator.prompts(given), [answer.tokens for answer in said], 0)
    with torch.no_grad():
        return stage.roles.raw_scores(name, rows)[:, 0]


def whole(stage: Stage, said: Sequence[Answer]) -> list[Answer]:
    """The same answers, read from their texts: with an end, also where they were cut off."""
    return [replace(answer, tokens=stage.renderer.response_ids(answer.response)) for answer in said]


def test_the_runs_own_reward_model_judges_by_that_name_and_counts_good_labels(
    stage_of: StageOf, scramble: Callable[..., None]
) -> None:
    given = [ask(place) for place in range(12)]
    stage = stage_of(Talk(given, kind="labels"), policy=True, judge="learned")
    reward_role(stage, "reward", scramble)
    found = evaluate(stage)
    assert found.judge == "the run's own reward model"
    for label, own in (("anchor", found.anchor), ("policy", found.policy)):
        logits = logits_of(stage, "reward", given, own)
        assert found.metrics[f"{label}/judge"] == pytest.approx(((logits - 0.25) / 1.5).mean().item(), abs=1e-5)
        assert found.metrics[f"{label}/judge_positive"] == pytest.approx((logits > 0).float().mean().item())
    both = [answer.judged["judge_positive"] for answer in [*found.anchor, *found.policy]]
    assert 0 < sum(both) < len(both), "the test needs logits on both sides of 0"
    assert "gain/judge_positive" in found.ci95


@pytest.mark.parametrize("base", ["same", "other"])
def test_a_saved_run_judges_beside_the_policys_own_reward_model(
    base: str, stage_of: StageOf, scramble: Callable[..., None], tmp_path: Path
) -> None:
    given = [ask(place) for place in range(12)]
    other = model_of_words(tmp_path / "other", 4) if base == "other" else None
    saved = stage_of(Talk(given, kind="labels"), **({"model": other} if other else {}))
    for place, name in enumerate(("one", "two")):
        role = f"reward-{place}" if name == "two" else "reward"
        reward_role(saved, role, scramble, seed=place)
        saved.roles.save(role, tmp_path / name / "adapter")
    stage = stage_of(
        Talk(given, kind="labels"),
        policy=True,
        judge=str(tmp_path / "two"),
        ppo={"reward_model": str(tmp_path / "one")},
    )
    Rewards(stage)
    found = evaluate(stage)
    assert found.judge == str(tmp_path / "two")
    logits = logits_of(saved, "reward-1", given, found.policy if base == "same" else whole(saved, found.policy))
    assert found.metrics["policy/judge"] == pytest.approx(((logits - 0.25) / 1.5).mean().item(), abs=1e-4)
    assert found.metrics["policy/judge_positive"] == pytest.approx((logits > 0).float().mean().item())
    assert ("reward-judge-0" in stage.roles) == (base == "same")
    same = replace(stage.config, eval=replace(stage.config.eval, judge=str(tmp_path / "one")))
    if base == "other":  # on this base its adapter's name is taken by the first judge
        assert "which the policy was trained on" in Judge(replace(stage, config=same)).title


@pytest.mark.parametrize("base", ["same", "other"])
@pytest.mark.parametrize("learned_from", ["pairs", "labels"])
def test_a_judge_counts_good_answers_where_it_learned_from_labels_itself(
    learned_from: str, base: str, stage_of: StageOf, scramble: Callable[..., None], tmp_path: Path
) -> None:
    """A judge of labels gives the harmless rate of a task whose feedback is pairs; one of pairs has no such sign."""
    given = [ask(place) for place in range(4)]
    other = {"model": model_of_words(tmp_path / "other", 4)} if base == "other" else {}
    saved = stage_of(Talk(given, kind=learned_from), **other)
    reward_role(saved, "reward", scramble)
    saved.roles.save("reward", tmp_path / "rm" / "adapter")
    evaluated = "labels" if learned_from == "pairs" else "pairs"
    found = evaluate(stage_of(Talk(given, kind=evaluated), judge=str(tmp_path / "rm")))
    assert ("anchor/judge_positive" in found.metrics) == (learned_from == "labels")
    if learned_from == "labels":
        said = found.anchor if base == "same" else whole(saved, found.anchor)
        positive = (logits_of(saved, "reward", given, said) > 0).float().mean().item()
        assert found.metrics["anchor/judge_positive"] == pytest.approx(positive)


@pytest.mark.parametrize("said", [None, "labels", "stars"])
def test_a_judge_that_does_not_say_what_it_learned_from_is_told_of(
    said: str | None, stage_of: StageOf, scramble: Callable[..., None], tmp_path: Path
) -> None:
    given = [ask(place) for place in range(2)]
    saved = stage_of(Talk(given, kind="labels"))
    reward_role(saved, "reward", scramble)
    saved.roles.save("reward", tmp_path / "rm" / "adapter")
    file = tmp_path / "rm" / "adapter" / "role.json"
    written = {key: value for key, value in json.loads(file.read_text()).items() if key != "feedback"}
    file.write_text(json.dumps(written | ({"feedback": said} if said else {})))
    stage = stage_of(Talk(given), judge=str(tmp_path / "rm"))
    if said == "stars":
        with pytest.raises(PerlVlmError, match=r"role\.json says .* learned from 'stars' .* `pairs` or `labels`"):
            Judge(stage)
        return
    assert ("anchor/judge_positive" in evaluate(stage).metrics) == (said == "labels")
    assert any("saved without what it learned from" in note for note in stage.notes) == (said is None)


@pytest.mark.parametrize("layout", ["two runs", "one run"])
def test_the_reward_that_the_policys_own_run_names_is_no_stranger(
    layout: str, stage_of: StageOf, scramble: Callable[..., None], tmp_path: Path
) -> None:
    given = [ask(place) for place in range(3)]
    saved, whole = stage_of(Talk(given)), tmp_path / "whole"
    reward_role(saved, "reward", scramble)
    for folder in (whole / "rm", tmp_path / "other"):
        saved.roles.save("reward", folder / "adapter")
    (whole / "ppo" / "adapter").mkdir(parents=True)
    trained_on = "learned" if layout == "one run" else f"verify + 0.5*{tmp_path}/other/../whole/rm"
    (whole / "ppo" / "config.yaml").write_text(yaml.safe_dump({"ppo": {"reward_model": trained_on}}))

    def title(judge: Path, policy: Path) -> str:
        return Judge(stage_of(Talk(given), judge=str(judge), policy_folder=str(policy))).title

    for policy in (whole, whole / "ppo", whole / "ppo" / "adapter"):
        for judge in (whole / "rm", whole / "rm" / "adapter", whole):
            assert title(judge, policy).endswith(", which the policy was trained on"), (judge, policy)
        assert title(tmp_path / "other", policy) == str(tmp_path / "other")
    (whole / "ppo" / "config.yaml").unlink()
    assert title(whole / "rm", whole) == str(whole / "rm"), "nothing is known of it"


def test_the_report_says_that_the_policy_was_trained_to_please_its_judge(
    stage_of: StageOf, scramble: Callable[..., None], tmp_path: Path
) -> None:
    given = [ask(place) for place in range(3)]
    saved = stage_of(Talk(given))
    reward_role(saved, "reward", scramble)
    saved.roles.save("reward", tmp_path / "rm" / "adapter")
    (tmp_path / "ppo" / "adapter").mkdir(parents=True)
    (tmp_path / "ppo" / "config.yaml").write_text(yaml.safe_dump({"ppo": {"reward_model": str(tmp_path / "rm")}}))
    stage = stage_of(Talk(given), policy=True, judge=str(tmp_path / "rm"), policy_folder=str(tmp_path / "ppo"))
    evaluation = evaluate(stage)
    assert "which the policy was trained on" in evaluation.judge
    shown = tables(stage, {"metrics": evaluation.metrics, "ci95": evaluation.ci95}, evaluation)
    assert any("which the policy was trained on" in table.note for table in shown)


def test_a_judge_is_refused_in_the_same_words_before_training_and_before_decoding(stage_of: StageOf) -> None:
    for settings, world in (({"judge": "verify"}, Corridor()), ({"judge": "learned"}, None)):
        stage = stage_of(Talk([ask(0)], world=world), **settings)
        with pytest.raises(PerlVlmError) as early:
            look_at_data(stage, "eval")
        with pytest.raises(PerlVlmError) as late:
            Judge(stage)
        assert str(early.value) == str(late.value)


def test_episodes_that_outgrow_the_prompt_end_there_and_are_judged(stage_of: StageOf) -> None:
    class Winding(Corridor):
        def step(self, prompts: Sequence[Example], responses: Sequence[str]) -> list[Step]:
            onward = [
                replace(one, messages=(Message("user", (f"{one.messages[0].text} {'second ' * 6}",)),))
                for one in prompts
            ]
            return [Step(1.0, following) for following in onward]

    given = [ask(place) for place in range(3)]
    stage = stage_of(Talk(given, world=Winding(max_turns=5)), tokens=20)
    found = evaluate(stage)
    assert {answer.turns for answer in found.anchor} == {3}
    assert [answer.judged["right"] for answer in found.anchor] == [float(answer.turns) for answer in found.anchor]
    assert any("3 of 3 episodes of reference ended where their prompt grew longer" in note for note in stage.notes)


def test_a_judge_that_cannot_be_had_is_told_before_anything_is_decoded(
    stage_of: StageOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_module, "greedy_answers", lambda *_: pytest.fail("decoded"))
    given = [ask(0)]
    with pytest.raises(PerlVlmError, match=r"--eval\.judge runs/"):
        evaluate(stage_of(Talk(given), judge="learned"))
    with pytest.raises(PerlVlmError, match=r"missing\.py"):
        evaluate(stage_of(Talk(given), judge="python:missing.py:f"))
    with pytest.raises(PerlVlmError, match="live environment"):
        evaluate(stage_of(Talk(given, world=Corridor()), judge="verify"))


def test_an_ensemble_judges_by_its_mean(stage_of: StageOf, scramble: Callable[..., None]) -> None:
    given = [ask(place) for place in range(8)]
    stage = stage_of(Talk(given, kind="labels"), judge="learned", ppo={"ensemble": "min"})
    stage = replace(stage, config=replace(stage.config, rm=replace(stage.config.rm, members=2)))
    for member in range(2):
        reward_role(stage, f"reward-{member}", scramble, seed=member, mean=-1.0)
    said = greedy_answers(stage, REFERENCE, given)
    verdicts = Judge(stage).judge(given, said)
    each = torch.stack([logits_of(stage, f"reward-{member}", given, said) for member in range(2)])
    assert [one["judge"] for one in verdicts] == pytest.approx(((each + 1) / 1.5).mean(dim=0).tolist(), abs=1e-5)
    assert bool(((each.mean(dim=0) > 0) & (each.mean(dim=0) < 1)).any()), "the test needs a score near a logit of 0"
    assert [one["judge_positive"] for one in verdicts] == (each.mean(dim=0) > 0).float().tolist()


def test_percentages_are_for_shares_alone(stage_of: StageOf, capsys: pytest.CaptureFixture[str]) -> None:
    stage = stage_of(Talk([ask(0)]))
    metrics = {
        "anchor/right": 0.5, "anchor/length_ratio": 1.25, "anchor/judge": 0.1, "anchor/judge_positive": 0.25,
        "anchor/right/x": 0.5, "policy/right": 0.75, "policy/length_ratio": 0.875, "policy/judge": 0.9,
        "policy/judge_positive": 0.5, "gain/right": 0.25, "gain/length_ratio": -0.375, "gain/judge": 0.8,
        "win_rate/right": 0.6, "win_rate/judge": 0.7, "gain/right/x": 0.3, "gain/right/y": 0.2, "policy/kl": 0.5,
    }  # fmt: skip
    ci95 = {key: (value - 0.1, value + 0.1) for key, value in metrics.items() if key.startswith(("gain", "win_rate"))}
    del ci95["gain/right/y"]
    shares = frozenset({"right", "judge_positive"})
    announce(stage, Evaluation([ask(0)], [], [], metrics, ci95, shares, "runs/other/rm"))
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "eval: right of the anchor 50.0%, of the policy 75.0%: gain +25.0 points [+15.0, +35.0], wins 60.0% "
        "[50.0, 70.0], KL 0.500 nats (1 test examples)",
        "eval: gain in right by kind: x +30.0 points [+20.0, +40.0], y +20.0 points",
        "eval: judged by runs/other/rm: score of the anchor 0.1, of the policy 0.9: gain +0.8 [+0.7, +0.9], wins 70.0% "
        "[60.0, 80.0]; found good: 25.0% -> 50.0%",
        "eval: also length_ratio 1.25 -> 0.875",
    ]


def test_a_share_is_what_no_answer_puts_outside_0_to_1() -> None:
    found = [Answer("", [1], {"right": 1.0, "ratio": 0.4, "judge": 0.5}), Answer("", [1], {"right": 0.0, "ratio": 1.2})]
    assert shares_of(found) == {"right"}


def test_the_verb_leaves_every_figure_in_the_summary_and_the_report(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [ask(place, metadata={"kind": "xy"[place % 2]}) for place in range(6)]
    config = RunConfig(
        model=words, device="cpu", dtype="float32", ppo=PpoConfig(max_new_tokens=3), out=str(tmp_path / "run"),
        eval=EvalConfig(bootstrap=50, judge=rules(tmp_path)),
    )  # fmt: skip
    assert run_verb("eval", Talk(given), config) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"anchor/right", "anchor/right/x", "anchor/judge", "anchor/spread"} <= summary["metrics"].keys()
    out = capsys.readouterr().out
    assert "eval: right of the anchor" in out
    assert "wins" not in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "right by kind" in page
    assert '<th scope="row">length_ratio</th>' in page
