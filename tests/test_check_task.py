"""check_task finds each fault that it promises to find."""

from __future__ import annotations

import math
import random
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from PIL import Image

from perl_vlm.data.images import ImageBytes, to_png_bytes
from perl_vlm.errors import BadRecord, PerlVlmError
from perl_vlm.task import Task
from perl_vlm.testing import check_task, hooks
from perl_vlm.types import SPLITS, Comparison, Example, ImageSlot, Message, Rating, RewardHead, Split, Step


@dataclass(frozen=True)
class Patch:
    """A picture of one colour."""

    color: tuple[int, int, int]

    def load(self) -> Image.Image:
        return Image.new("RGB", (2, 2), self.color)


@dataclass(frozen=True)
class Broken:
    def load(self) -> Image.Image:
        raise BadRecord("cell 4", "the picture is truncated", "Replace it")


@dataclass(frozen=True)
class Grey:
    def load(self) -> Image.Image:
        return Image.new("L", (2, 2))


def patch(split: Split, index: int, what: int) -> Patch:
    return Patch((("train", "validation", "test").index(split), index, what))


class Sound(Task):
    """Say how red a patch is."""

    name = "sound"
    modality = "image+text"
    primary_metric = "accuracy"

    def examples(self, split: Split) -> Sequence[Example]:
        return [
            Example(f"{split} {i}", self.ask(i), (patch(split, i, 0),), reference=str(i), metadata={"i": i})
            for i in range(20)
        ]

    def preferences(self, split: Split) -> Sequence[Comparison] | Sequence[Rating]:
        return [
            Comparison(f"{split} pair {i}", self.ask(i), str(i), str(i + 1), (patch(split, i, 1),)) for i in range(20)
        ]

    def evaluate(self, example: Example, response: str) -> dict[str, float]:
        return {"accuracy": float(response == example.reference)}

    def verify(self, example: Example, response: str) -> float | None:
        return float(response == example.reference)

    def ask(self, index: int) -> tuple[Message, ...]:
        return (Message("user", (ImageSlot(), f"how red? ({index})")),)


def with_examples(change: Callable[[Example, int], Example]) -> type[Task]:
    class Faulty(Sound):
        def examples(self, split: Split) -> Sequence[Example]:
            return [change(example, i) for i, example in enumerate(super().examples(split))]

    return Faulty


def with_preferences(change: Callable[[Any, int], Any]) -> type[Task]:
    class Faulty(Sound):
        def preferences(self, split: Split) -> Sequence[Any]:
            return [change(pair, i) for i, pair in enumerate(super().preferences(split))]

    return Faulty


def with_members(**members: Any) -> type[Task]:
    return type("Faulty", (Sound,), members)


def rate(pair: Comparison) -> Rating:
    return Rating(pair.id, pair.messages, pair.chosen, True, pair.images)


def test_a_sound_task_passes() -> None:
    check_task(Sound())
    check_task(Sound(), samples=3, splits=("test",))


def test_a_sound_task_of_ratings_passes() -> None:
    labels = with_preferences(lambda pair, i: rate(pair))
    labels.reward_head = lambda self: RewardHead("labels")  # type: ignore[method-assign]
    check_task(labels())


WRONG = {"accuracy": 0.0}


@dataclass(frozen=True)
class Needy:
    path: str


@dataclass(frozen=True)
class Clashing:
    def __post_init__(self) -> None:
        raise ValueError("never")


class World:
    """An environment with a fault, or with none."""

    max_turns = 1

    def __init__(self, moody: bool | None = False) -> None:
        self.moody, self.calls = moody, 0
        self.log: list[str] = []

    def step(self, prompts: Sequence[Example], responses: Sequence[str]) -> list[Step]:
        self.calls += 1
        self.log.append("step")
        return [] if self.moody is None else [Step(self.calls * float(self.moody)) for _ in prompts]

    def close(self) -> None:
        self.log.append("close")


EMPTY, MOODY = World(None), World(True)


def unset(self: Task) -> None:
    self.config = None


def test_optional_parts_that_keep_the_contract_pass() -> None:
    world = World()
    check_task(
        with_members(
            environment=lambda self: world,
            demonstrations=lambda self, split: self.examples(split)[:3],
            totals=lambda self, judged: {"answers": float(len(judged))},
        )()
    )
    chosen = with_examples(lambda e, i: replace(e, choices=("a", "b")))
    chosen.judge_choices = lambda self, e, logprobs: {"accuracy": float(logprobs[0] > logprobs[1])}  # type: ignore[method-assign]
    check_task(chosen())


def test_an_environment_is_closed_at_the_end_and_not_before() -> None:
    world, faulty = World(), World(None)
    check_task(with_members(environment=lambda self: world)())
    assert world.log.count("step") > 4
    first = world.log.index("close")
    assert set(world.log[:first]) == {"step"}
    assert set(world.log[first:]) == {"close"}
    with pytest.raises(AssertionError, match="one Step for each"):
        check_task(with_members(environment=lambda self: faulty)())
    assert faulty.log[-1] == "close", "a fault leaves no browser behind"


def earned(self: Task, example: Example, response: str) -> dict[str, float]:
    return {"accuracy": float(example.metadata["episode_return"] > 0)}


def test_a_live_task_that_judges_episodes_alone_passes_and_is_judged_by_episodes() -> None:
    world = World()
    live: dict[str, Any] = {"environment": lambda self: world, "verify": lambda self, e, r: None}
    check_task(with_members(**live, evaluate=earned)())
    with pytest.raises(AssertionError, match="not finite for an episode"):
        check_task(
            with_members(**live, evaluate=lambda self, e, r: {"accuracy": e.metadata["episode_turns"] * math.nan})()
        )
    with pytest.raises(AssertionError, match="KeyError"):
        check_task(with_members(**live, evaluate=lambda self, e, r: {"accuracy": e.metadata["missing"]})())
    # One that judges single answers too is held to what it says of them.
    with pytest.raises(AssertionError, match=r"scores 0\.5 on accuracy"):
        check_task(with_members(**live, evaluate=lambda self, e, r: {"accuracy": 0.5})())


def test_stored_pictures_are_compared_by_their_bytes() -> None:
    def stored(example: Example, index: int) -> Example:
        return replace(example, images=(ImageBytes(to_png_bytes(Patch((9, 9, index)).load()), example.id),))

    with pytest.raises(AssertionError, match="train and validation share 20 of the prompt with its pictures"):
        check_task(with_examples(stored)())


def test_an_import_that_takes_too_long_is_told_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from perl_vlm_vqa import VQA

    def never(*args: Any, **settings: Any) -> Any:
        raise subprocess.TimeoutExpired("python", settings["timeout"], stderr=b"x" * 5000 + b"fetching the dictionary")

    monkeypatch.setattr(hooks.subprocess, "run", never)
    told = r"importing perl_vlm_vqa.*more than 120 s.*fetching the dictionary"
    with pytest.raises(PerlVlmError, match=told) as caught:
        check_task(VQA())
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize(
    ("given", "stages", "judged_on"),
    [
        ({"preferences": False}, ["sft", "ppo", "eval"], "test"),
        ({"splits": ("train", "validation")}, ["sft", "rm", "ppo", "eval"], "validation"),
        ({"splits": ("test",), "preferences": False}, ["eval"], "test"),
    ],
    ids=["no preferences", "no test", "test alone"],
)
def test_with_a_model_what_is_not_there_is_not_asked_for(
    given: dict[str, Any], stages: list[str], judged_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from perl_vlm.testing import training

    class Partial(Sound):
        def examples(self, split: Split) -> Sequence[Example]:
            assert split in given.get("splits", SPLITS), f"{split} was asked for"
            return super().examples(split)

        def preferences(self, split: Split) -> Sequence[Comparison] | Sequence[Rating]:
            assert given.get("preferences", True), "preferences were asked for"
            assert split in given.get("splits", SPLITS), f"{split} was asked for"
            return super().preferences(split)

    seen: list[Any] = []
    monkeypatch.setattr(training, "run_stage", lambda stage, began: seen.append(stage))
    check_task(Partial(), samples=4, model="tiny", **given)
    assert [stage.name for stage in seen] == stages
    config = seen[-1].config
    assert config.eval.split == judged_on
    assert config.ppo.reward_model == ("learned" if given.get("preferences", True) else "untrained")
    for stage in seen:
        for split in SPLITS:
            absent = not given.get("preferences", True) or split not in given.get("splits", SPLITS)
            if split != "train":
                assert (len(stage.preferences(split)) == 0) == absent
            if split not in given.get("splits", SPLITS):
                assert not stage.demonstrations(split, needed=False)


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"preferences": False, "splits": ("train", "test")}, {"splits": ("test",)}])
def test_with_a_model_a_task_without_preferences_or_splits_takes_its_steps(given: dict[str, Any]) -> None:
    class Bare(Sound):
        def preferences(self, split: Split) -> Sequence[Comparison] | Sequence[Rating]:
            if not given.get("preferences", True):
                raise PerlVlmError("there are none")
            return super().preferences(split)

    check_task(Bare(), samples=4, model="tiny", **given)


@pytest.mark.slow
def test_with_a_model_every_stage_takes_a_step() -> None:
    from perl_vlm_vqa import VQA

    check_task(VQA(), samples=8, model="tiny")
    with pytest.raises(AssertionError, match="longer max_prompt_tokens"):
        check_task(VQA(), samples=8, model="tiny", max_prompt_tokens=12)


@pytest.mark.slow
def test_a_stage_that_fails_is_named() -> None:
    class Wordless(Sound):
        def examples(self, split: Split) -> Sequence[Example]:
            return [replace(one, reference=None) for one in super().examples(split)]

        def evaluate(self, example: Example, response: str) -> dict[str, float]:
            if example.reference is None and response:
                raise KeyError("reference")
            return {"accuracy": float(response == example.reference)}

    with pytest.raises(AssertionError, match="one step of the stage eval fails"):
        check_task(Wordless(), samples=8, model="tiny")


FAULTS: dict[str, tuple[type[Task], str]] = {
    "no metric": (with_members(primary_metric=""), "set the class attribute `primary_metric`"),
    "modality": (with_members(modality="video"), "`modality` is 'video'"),
    "config": (with_members(Config=dict), "frozen=True"),
    "no sequence": (with_members(examples=lambda self, split: iter([])), "return a sequence"),
    "empty": (with_members(examples=lambda self, split: []), r"examples\('train'\) is empty"),
    "id type": (with_examples(lambda e, i: replace(e, id=i)), r"\[0\]\.id is 0"),
    "id twice": (with_examples(lambda e, i: replace(e, id="x")), "the id 'x' twice"),
    "random id": (with_examples(lambda e, i: replace(e, id=f"{random.random()}")), "loaded again"),
    "random reference": (with_examples(lambda e, i: replace(e, reference=f"{random.random()}")), "loaded again"),
    "same ids": (with_examples(lambda e, i: replace(e, id=f"{i}")), "train and validation share 20 of the ids"),
    "same prompts": (
        with_examples(lambda e, i: replace(e, images=(Patch((9, 9, i)),))),
        "train and validation share 20 of the prompt with its pictures",
    ),
    "same pictures": (
        with_examples(
            lambda e, i: replace(e, images=(Patch((9, 9, i)),), messages=(Message("user", (ImageSlot(), e.id)),))
        ),
        "train and validation share 20 of the pictures",
    ),
    "preferences of tests": (
        with_preferences(lambda p, i: replace(p, images=(Patch((2, i, 0)),)) if p.id.startswith("train") else p),
        "train and test share",
    ),
    "no messages": (with_examples(lambda e, i: replace(e, messages=())), "has no messages"),
    "role": (
        with_examples(lambda e, i: replace(e, messages=(Message("human", (ImageSlot(), "x")),))),
        r"roles \['human'\]",
    ),
    "last turn": (
        with_examples(lambda e, i: replace(e, messages=(*e.messages, Message("assistant", ("x",))))),
        "ends in a turn of 'assistant'",
    ),
    "slots": (with_examples(lambda e, i: replace(e, images=e.images * 2)), "1 image slots and 2 images"),
    "text task": (with_members(modality="text"), 'has images, but `modality` is "text"'),
    "nothing asked": (
        with_examples(lambda e, i: replace(e, messages=(Message("user", (" ",)),), images=())),
        "neither text nor images",
    ),
    "broken picture": (with_examples(lambda e, i: replace(e, images=(Broken(),))), "does not open: cell 4"),
    "grey picture": (with_examples(lambda e, i: replace(e, images=(Grey(),))), "loads as L"),
    "metric absent": (with_members(evaluate=lambda self, e, r: {"f1": 1.0}), "lacks the primary metric 'accuracy'"),
    "metric nan": (
        with_members(evaluate=lambda self, e, r: {"accuracy": float(r == e.reference), "x": float("nan")}),
        "x = nan",
    ),
    "nan when empty": (
        with_members(evaluate=lambda self, e, r: {"accuracy": float(r == e.reference) if r else float("nan")}),
        "accuracy = nan",
    ),
    "reference": (with_members(evaluate=lambda self, e, r: {"accuracy": 0.5}), "scores 0.5 on accuracy"),
    "verify": (with_members(verify=lambda self, e, r: 0.0), "verify.*earns 1.0"),
    "all right": (with_members(evaluate=lambda self, e, r: {"accuracy": 1.0}), "must score lower"),
    "verify all": (with_members(verify=lambda self, e, r: 1.0), "verify.*must score lower"),
    "head": (with_members(reward_head=lambda self: RewardHead("labels")), "trained on Ratings.*Comparison"),
    "ratings": (with_preferences(lambda p, i: rate(p)), "trained on Comparisons.*Rating"),
    "empty rejected": (with_preferences(lambda p, i: replace(p, rejected=" ")), "empty rejected response"),
    "metadata": (with_examples(lambda e, i: replace(e, metadata={"x": {1}})), "metadata of record .* is no JSON"),
    "objective": (with_preferences(lambda p, i: replace(p, objective="charm")), "objective 'charm'"),
    "no default": (with_members(Config=Needy, __init__=unset), "Config.path has no default"),
    "defaults that clash": (with_members(Config=Clashing, __init__=unset), r"Config\(\) fails \(never\)"),
    "raises on odd answers": (
        with_members(evaluate=lambda self, e, r: {"accuracy": float(int(r) == int(e.reference))} if r else WRONG),
        "evaluate.. or verify.. raised ValueError for the response",
    ),
    "totals": (
        with_members(totals=lambda self, judged: {"f1": 1 / 0.0 if not judged else math.nan}),
        "totals.. returned",
    ),
    "one choice": (with_examples(lambda e, i: replace(e, choices=("a",))), "two or more distinct choices"),
    "choices unjudged": (
        type("F", (with_examples(lambda e, i: replace(e, choices=("a", "b"))),), {"judge_choices": lambda *_: {}}),
        "judge_choices.. of record .* lacks 'accuracy'",
    ),
    "demonstrations": (
        with_members(demonstrations=lambda self, split: [replace(e, reference=None) for e in self.examples(split)]),
        "demonstrations: record 'train 0' has no reference",
    ),
    "new environments": (with_members(environment=lambda self: World()), "another object at each call"),
    "no steps": (with_members(environment=lambda self, world=EMPTY: world), "one Step for each"),
    "moody": (with_members(environment=lambda self, world=MOODY: world), "differently"),
    "equal": (with_preferences(lambda p, i: replace(p, rejected=p.chosen)), "chosen and rejected are the same"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(fault: str) -> None:
    task, text = FAULTS[fault]
    with pytest.raises(AssertionError, match=text):
        check_task(task())
