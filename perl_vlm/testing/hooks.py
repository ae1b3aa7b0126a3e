"""What ``check_task`` asks of the parts of the contract that a task may leave out."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from perl_vlm.errors import PerlVlmError
from perl_vlm.rollout.episodes import play
from perl_vlm.task import Environment, Task
from perl_vlm.types import Comparison, Example, Rating, Step

ODD_RESPONSES = ("", " \n", "\0", "word " * 2000, "\U0001f600 <image> {{x}} </s>", '{"a": ' * 500, "-1e999", "\ud800")
"""What a policy may say before it has learned anything: ``evaluate`` and ``verify`` judge it and do not fail."""


IMPORT_S = 120
"""Seconds that importing a task may take, on a machine that does other things too."""
STDERR = 600
"""Characters shown of what a failing import said."""


class Fault(AssertionError):
    """What is wrong with a task, where, and how to mend it."""


def require(task: Task, condition: object, text: str) -> None:
    """Raise ``Fault`` with the text unless the condition holds."""
    if not condition:
        raise Fault(f"{type(task).__name__}: {text}")


def check_config(task: Task) -> None:
    """Every field has a default and a type that the command line can read."""
    for field in dataclasses.fields(task.Config):
        given = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        require(task, given, f"Config.{field.name} has no default; every setting needs one, or no command line parses")
    try:
        task.Config()
    except Exception as error:
        raise Fault(f"{type(task).__name__}: Config() fails ({error}); the defaults must fit together") from error


def check_light(task: Task) -> None:
    """A registered task is imported without torch, so that listing tasks stays instant."""
    names = {point.value.partition(":")[0] for point in entry_points(group="perl_vlm.tasks") if _names(point, task)}
    for module in sorted({*names, *([type(task).__module__] if names else [])}):
        program = f"import {module}, sys; sys.exit('torch' in sys.modules)"
        try:
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=IMPORT_S)
        except subprocess.TimeoutExpired as error:
            raise PerlVlmError(
                f"importing {module}, as the listing of tasks does, took more than {IMPORT_S} s{_end(error.stderr)}. "
                "Download, compute and start things inside the methods that need them"
            ) from error
        text = f"importing {module} imports torch (or fails){_end(done.stderr)}; import it inside the methods that "
        require(task, done.returncode == 0, f"{text}need it")


def _end(stderr: bytes | None) -> str:
    """What a program said last, for a message."""
    said = (stderr or b"").decode(errors="replace").strip()
    return f"; the end of what it said: {said[-STDERR:]}" if said else ""


def _names(point: Any, task: Task) -> bool:
    package, _, attribute = point.value.partition(":")
    return attribute == type(task).__name__ and type(task).__module__.partition(".")[0] == package.partition(".")[0]


def check_metadata(task: Task, record: Example | Comparison | Rating) -> None:
    """Metadata holds JSON values, since samples and reports write them."""
    try:
        json.dumps(dict(record.metadata))
    except (TypeError, ValueError) as error:
        text = f"metadata of record {record.id!r} is no JSON ({error}); keep texts, numbers, lists and mappings in it"
        raise Fault(f"{type(task).__name__}: {text}") from error


def check_objective(task: Task, record: Comparison | Rating) -> None:
    """Every preference speaks of an objective that the reward head has."""
    known = list(task.reward_head().objectives)
    require(
        task,
        record.objective in known,
        f"record {record.id!r} speaks of the objective {record.objective!r}; reward_head() has {known}",
    )


def check_odd_responses(task: Task, example: Example) -> None:
    """Whatever a policy says is judged by finite numbers."""
    for response in ODD_RESPONSES:
        place = f"for the response {response[:24]!r} to record {example.id!r}"
        try:
            scores, reward = task.evaluate(example, response), task.verify(example, response)
        except Exception as error:
            text = f"evaluate() or verify() raised {type(error).__name__} {place}: {error}. Judge it as wrong instead"
            raise Fault(f"{type(task).__name__}: {text}") from error
        require(task, task.primary_metric in scores, f"evaluate() lacks {task.primary_metric!r} {place}")
        numbers = [*scores.values(), *([] if reward is None else [reward])]
        require(task, all(map(math.isfinite, numbers)), f"evaluate() or verify() is not finite {place}: {numbers}")


def check_choices(task: Task, example: Example) -> None:
    """Examples with choices are judged by their log-probs."""
    choices = example.choices
    place = f"record {example.id!r}"
    require(
        task, len(choices) >= 2 and len(set(choices)) == len(choices), f"{place} needs two or more distinct choices"
    )
    require(task, all(choice.strip() for choice in choices), f"{place} has an empty choice")
    judged = task.judge_choices(example, [-float(place + 1) for place in range(len(choices))])
    known = isinstance(judged, dict) and task.primary_metric in judged
    require(task, known, f"judge_choices() of {place} returned {judged!r}, which lacks {task.primary_metric!r}")
    require(task, all(map(math.isfinite, judged.values())), f"judge_choices() of {place} is not finite: {judged}")


def check_totals(task: Task, examples: Sequence[Example]) -> None:
    """Figures of a whole set are finite numbers, right answers or wrong ones."""
    for answer in ("", None):
        judged = [
            (example, task.evaluate(example, (example.reference or "") if answer is None else answer))
            for example in examples
            if not example.choices
        ]
        totals = task.totals(judged)
        sound = isinstance(totals, dict) and all(math.isfinite(value) for value in totals.values())
        require(task, sound, f"totals() returned {totals!r}; it returns finite numbers by name, whatever the answers")


def check_demonstrations(task: Task, demonstrations: Sequence[Example]) -> None:
    """Supervised fine-tuning needs an answer to each."""
    for example in demonstrations:
        require(task, example.reference, f"demonstrations: record {example.id!r} has no reference; SFT learns from it")


def judges_alone(task: Task, example: Example) -> bool:
    """Whether ``evaluate`` can be asked of an answer to an example as it is. Of a live task it may be able to judge
    nothing but episodes, whose examples are annotated."""
    if task.environment() is None:
        return True
    try:
        for response in ("", example.reference or "x"):
            task.evaluate(example, response)
    except Exception:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class _Said:
    text: str


def check_episodes(task: Task, environment: Environment, prompts: Sequence[Example]) -> None:
    """Whatever is said in it, an episode that was played to its end is judged by finite numbers."""
    for response in ("", *([prompts[0].reference] if prompts[0].reference else [])):
        turns = play(environment, prompts, lambda asked, of, number, text=response: [_Said(text)] * len(asked))  # type: ignore[misc]
        judged = []
        for example in (turn.prompt for turn in turns if turn.number == 0):
            place = f"an episode of {response[:24]!r} from record {example.id!r}"
            try:
                scores, reward = task.evaluate(example, response), task.verify(example, response)
            except Exception as error:
                text = f"evaluate() or verify() raised {type(error).__name__} for {place}: {error}"
                raise Fault(f"{type(task).__name__}: {text}") from error
            require(task, task.primary_metric in scores, f"evaluate() lacks {task.primary_metric!r} for {place}")
            numbers = [*scores.values(), *([] if reward is None else [reward])]
            require(task, all(map(math.isfinite, numbers)), f"evaluate() or verify() is not finite for {place}")
            judged.append((example, scores))
        totals = task.totals(judged)
        require(task, all(map(math.isfinite, totals.values())), f"totals() of episodes returned {totals!r}")


def close_environment(task: Task) -> None:
    """Let go of what a task's environment holds, where it has one."""
    environment = task.environment()
    if environment is not None:
        environment.close()


def check_environment(task: Task, environment: Environment, prompts: Sequence[Example]) -> None:
    """The environment answers every response with a step, an odd one too, and the same ones again the next time."""
    require(task, environment is task.environment(), "environment() gives another object at each call; keep one")
    require(task, environment.max_turns >= 1, f"environment().max_turns is {environment.max_turns}; at least 1")
    for response in ("", ODD_RESPONSES[4], *([prompts[0].reference] if prompts[0].reference else [])):
        found = []
        for _ in range(2):
            steps = environment.step(prompts, [response] * len(prompts))
            require(
                task,
                len(steps) == len(prompts) and all(isinstance(step, Step) for step in steps),
                f"environment().step() gave {steps!r:.200} for {len(prompts)} prompts; it gives one Step for each",
            )
            finite = all(math.isfinite(step.reward) for step in steps)
            require(task, finite, f"environment().step() gave rewards that are not finite: {steps!r:.200}")
            found.append([(step.reward, None if step.next is None else step.next.messages) for step in steps])
        require(
            task,
            found[0] == found[1],
            f"environment().step() answered the same responses differently: {found[0]!r:.200} and {found[1]!r:.200}. "
            "What a step gives depends on its prompt and response alone: bring the world where the prompt says it is",
        )
