"""What every training loop needs around it: data order, checkpoints, guards, and where things are written."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import set_seed
from torch import Tensor

from perl_vlm.config import RunConfig
from perl_vlm.data.collate import Collator
from perl_vlm.data.lazy import Lazy
from perl_vlm.data.rendering import PromptRenderer
from perl_vlm.errors import Absent, PerlVlmError
from perl_vlm.models.roles import Roles
from perl_vlm.task import Task
from perl_vlm.train.best import Best
from perl_vlm.train.checkpoint import load_latest, save_checkpoint
from perl_vlm.train.log import MetricLog, SampleLog, read_log, say
from perl_vlm.train.optimize import Optimizer
from perl_vlm.train.parallel import Parallel, engine
from perl_vlm.train.rundir import RunDir
from perl_vlm.train.signals import StopOnSignal
from perl_vlm.train.state import optimizer_state, restore_optimizer, restore_rng, rng_state
from perl_vlm.train.validate import prompt_limit, usable_records
from perl_vlm.types import Comparison, Example, Rating, Split

if TYPE_CHECKING:
    from perl_vlm.rollout.served import ServedEngine

Record = TypeVar("Record")


@dataclass(frozen=True)
class Stage:
    """One stage of a run, ready to train."""

    name: str
    """``sft``, ``rm``, ``ppo`` or ``eval``."""
    task: Task
    config: RunConfig
    roles: Roles
    renderer: PromptRenderer
    collator: Collator
    run: RunDir
    stop: StopOnSignal
    parallel: Parallel
    seen: dict[tuple[str, Split], Sequence[Any]] = field(default_factory=dict)
    """Records that were looked at already, shared by the stages of a run."""
    notes: list[str] = field(default_factory=list)
    """What the report should say in words; shared by the stages of a run."""
    fits: dict[str, int] = field(default_factory=dict)
    """How many rows of each kind of work memory has room for, where it ran out with more; see ``in_micro_batches``."""
    engine: ServedEngine | None = None
    """Who samples as the policy in its training, where this process does not."""

    @property
    def device(self) -> torch.device:
        return self.roles.backbone.device

    @property
    def sharded(self) -> bool:
        """Whether the base lies in parts on several processes, which must then run its layers in step."""
        return engine(self.parallel) == "fsdp2"

    @property
    def rows_at_once(self) -> int:
        """Records that the reward model is measured on at once: no more than it trains on at once."""
        training = self.config.rm.batch_size // (self.config.rm.accumulate * self.parallel.world)
        return max(1, min(self.config.eval.batch_size, training, self.fits.get("records", training)))

    def examples(self, split: Split, *, needed: bool = True) -> Sequence[Example]:
        """The task's usable examples of a split. Raises PerlVlmError where there are none, if they are ``needed``."""
        return self._usable("examples", split, self.task.examples, needed)

    def demonstrations(self, split: Split, *, needed: bool = True) -> Sequence[Example]:
        """What supervised fine-tuning learns from, likewise."""
        own = type(self.task).demonstrations is not Task.demonstrations
        # Examples that are trained on are not answered: where an answer takes room from the prompt, more of them fit.
        if own or (split == "train" and self._answers_take_room()):
            return self._usable("demonstrations", split, self.task.demonstrations, needed)
        return self.examples(split, needed=needed)

    def some_examples(self, split: Split, count: int) -> list[Example]:
        """At most ``count`` usable examples of a split to measure on."""
        return self.some(self.examples(split), count)

    def some(self, records: Sequence[Record], count: int) -> list[Record]:
        """At most ``count`` records to measure on, from all over the set, which may be several one after the other.
        Generated ones are alike, and live ones are opened ahead in their order: of those the first."""
        in_order = isinstance(records, Lazy) or self.task.environment() is not None
        return (first if in_order else spaced)(records, count)

    def preferences(self, split: Split) -> Sequence[Comparison | Rating]:
        """The task's usable preferences of a split; none at all is an error for ``train`` alone."""
        return self._usable("preferences", split, self.task.preferences, split == "train")

    def _usable(self, what: str, split: Split, source: Callable[[Split], Sequence[Any]], needed: bool) -> Sequence[Any]:
        if (what, split) not in self.seen:
            skip = getattr(self.task.config, "on_bad_record", "error") == "skip"
            try:
                given = source(split)
            except Absent:
                if needed:
                    raise
                given = []
            new_tokens = self.config.ppo.max_new_tokens if self._answered(what, split) else 0
            # Training and its measurements decode whatever they are given; nothing but the evaluation sees `test`.
            choosing = what == "examples" and split == "test" and self.task.environment() is None
            kept, notes = usable_records(
                given, self.renderer, f"{split} {what}", skip=skip, new_tokens=new_tokens, choosing=choosing
            )
            for note in notes:
                self.warn(note)
            self.seen[what, split] = kept
        records = self.seen[what, split]
        if not len(records) and needed:
            raise PerlVlmError(
                f"task {self.task.name} has no {split} {what} for the {self.name} stage. Check --task.source and "
                f"--task.path; `perl-vlm {self.task.name} data --preview 8` shows what it finds"
            )
        return records

    def _answered(self, what: str, split: Split) -> bool:
        """Whether prompts are answered, and not only scored with the responses that are given."""
        if not self.roles.backbone.generates:
            return False
        if what == "preferences":  # the reward is normalised on the anchor's answers to these
            return split == "validation" and self.config.rm.normalise == "anchor"
        return what != "demonstrations" or split != "train"  # held-out ones are answered for samples.jsonl

    def _answers_take_room(self) -> bool:
        with_answer, without = (prompt_limit(self.renderer, new)[0] for new in (self.config.ppo.max_new_tokens, 0))
        return with_answer < without

    def begin(self) -> None:
        """Seed every generator from the run's seed and the stage's name, so that no stage depends on what ran before
        it in the same process. Processes draw apart, for dropout: what must be alike everywhere (data order, first
        weights, sampled answers) has seeds of its own."""
        set_seed((self.config.seed * 1009 + sum(map(ord, self.name)) + self.parallel.rank * 7919) % 2**32)

    def own(self, records: Sequence[Record]) -> list[Record]:
        """This process's share of a batch: a contiguous run of it."""
        return [records[place] for place in self.parallel.share(len(records))]

    def blocks(self, count: int, size: int, *, stopping: bool = True) -> Iterator[list[int]]:
        """This process's share of ``count`` records to evaluate, as indices, ``size`` at a time.

        Every process gets equally many blocks of equal sizes, since the parts of a sharded base must run in step; the
        last record is repeated to fill up. ``gathered`` drops the repeats. Between two blocks a signal ends the stage,
        unless ``stopping`` is false: a training loop finishes its step first and saves it.
        """
        each = -(-count // self.parallel.world)
        own = [min(place, count - 1) for place in range(self.parallel.rank * each, (self.parallel.rank + 1) * each)]
        for start in range(0, each, size):
            if stopping:
                self.stop_together()
            yield own[start : start + size]

    def gathered(self, rows: Tensor, count: int) -> Tensor:
        """What all processes made of ``blocks``, one row a record, on the CPU."""
        return self.parallel.gather_rows(rows)[:count].cpu()

    def stop_together(self) -> None:
        """Raise ``Stopped`` in every process where one was asked to stop."""
        if self.parallel.any(self.stop.requested):
            self.stop.request()
            self.stop.raise_if_requested()

    def require_finite(self, value: Tensor, what: str, ids: Sequence[str], step: int) -> None:
        """Stop every process, before a NaN reaches a weight, where one of them sees one; its records are named."""
        bad = not bool(torch.isfinite(value).all())
        if not self.parallel.any(bad):
            return
        named = self.parallel.gather_objects(list(ids) if bad else [])
        raise PerlVlmError(
            f"{what} is not finite at step {step}; nothing was changed by it. Records of the batch: "
            f"{', '.join(named[:16])}{' ...' if len(named) > 16 else ''}. A lower learning rate or float32 is the "
            "usual cure; continue from the last checkpoint with --resume"
        )

    def metric_log(self, start_step: int) -> MetricLog:
        """The stage's metrics.jsonl and tracker, continued after ``start_step``."""
        return MetricLog(
            self.run.metrics,
            stage=self.name,
            start_step=start_step,
            tracker=self.config.report_to,
            project=f"perl-vlm-{self.task.name}",
            config=asdict(self.config),
        )

    def warn(self, text: str) -> None:
        """Say it once, on the terminal and in the report. Any process may."""
        if text not in self.notes:
            self.notes.append(text)
            print(f"perl-vlm: warning: {text}", file=sys.stderr, flush=True)


class DataOrder:
    """Which records each step uses: a fresh permutation for every epoch, a pure function of seed and step.

    Args:
        size: number of records, at least 1.
        batch_size: records a step; a batch may span two epochs, so none is dropped or doubled.
        seed: anything printable.
        bagging: draw ``size`` records with replacement once, and order those (Breiman, "Bagging predictors", 1996).
    """

    def __init__(self, size: int, batch_size: int, seed: str, *, bagging: bool = False) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self._epochs: dict[int, list[int]] = {}
        draw = random.Random(f"{seed}-bag")
        self._bag = sorted(draw.randrange(size) for _ in range(size)) if bagging else range(size)

    def batch(self, step: int) -> list[int]:
        """Indices of the records of 0-based ``step``."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._epoch(place // self.size)[place % self.size] for place in places]

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self._epochs:
            order = list(self._bag)
            random.Random(f"{self.seed}-{epoch}").shuffle(order)
            # One batch touches two neighbouring epochs at most, unless the set is smaller than a batch.
            self._epochs = {key: value for key, value in self._epochs.items() if key >= epoch - 1}
            self._epochs[epoch] = order
        return self._epochs[epoch]


def first(records: Sequence[Record], count: int) -> list[Record]:
    """The first ``count`` records, or all where there are fewer."""
    return [records[place] for place in range(min(count, len(records)))]


def spaced(records: Sequence[Record], count: int) -> list[Record]:
    """``count`` records from all over a set, in order, or all where there are fewer; only these are made.

    The set is cut into ``count`` stretches and one record of each is drawn, the same at every call. So sets and
    objectives that stand one after the other are met by their size, and kinds that take turns are too, of which steps
    of one length might meet but one.
    """
    size = len(records)
    if size <= count:
        return first(records, count)
    rng = random.Random(f"{size}-{count}-spaced")
    ends = [place * size // count for place in range(count + 1)]
    return [records[rng.randrange(start, end)] for start, end in itertools.pairwise(ends)]


class Keeper:
    """Saves and restores all that a stage's future depends on: weights, optimizer, random generators, step, the best
    weights so far, and whatever numbers the loop keeps in ``memory``."""

    def __init__(self, stage: Stage, optimizer: Optimizer, trained: Sequence[str], *, best: Best | None = None) -> None:
        self.stage, self.optimizer, self.trained, self.best = stage, optimizer, trained, best
        self.logs: tuple[MetricLog | SampleLog, ...] = ()
        self.memory: dict[str, float] = {}

    def last_metrics(self, step: int) -> dict[str, float]:
        """What the log holds of the last finished step: the result of a stage that was cut off after its last one."""
        lines = [line for line in read_log(self.stage.run.metrics) if line["stage"] == self.stage.name]
        last: dict[str, Any] = next((line for line in reversed(lines) if line["step"] == step), {})
        return {key: value for key, value in last.items() if key not in ("stage", "step", "time") and value is not None}

    def save(self, step: int) -> None:
        """Write a checkpoint of the state after ``step`` steps; the logs reach the disk first, so that none of their
        lines is missing when the run goes on from here. One process writes, with the random state of all."""
        for log in self.logs:
            log.sync()
        states = self.stage.parallel.gather_objects([rng_state()])
        if self.stage.parallel.is_main:  # the others hold the same weights, and need not copy them
            self._write(step, states)
        self.stage.parallel.barrier()

    def _write(self, step: int, rng_states: Sequence[tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        optimizer_tensors, optimizer_record = optimizer_state(self.optimizer.torch, self.optimizer.named)
        tensors = {"optimizer": optimizer_tensors}
        tensors |= {f"role-{name}": self.stage.roles.state(name) for name in self.trained}
        position = {
            "step": step,
            "stage": self.stage.name,
            "notes": self.stage.notes,
            "optimizer_steps": self.optimizer.step_count,
            "processes": self.stage.parallel.world,
            "memory": self.memory,
        }
        records = {"optimizer": optimizer_record, "position": position}
        for rank, (rng_tensors, rng_record) in enumerate(rng_states):
            tensors[f"rng-{rank}"], records[f"rng-{rank}"] = rng_tensors, rng_record
        if self.best is not None:
            best_tensors, records["best"] = self.best.state()
            tensors |= best_tensors
        limit: int | None = getattr(self.stage.config, self.stage.name).save_total_limit
        save_checkpoint(self.stage.run.checkpoints, step, tensors, records, keep=limit)

    def resume(self) -> int:
        """Restore the latest good checkpoint where the run was asked to resume; the number of steps done."""
        if not self.stage.config.resume:
            return 0
        found = load_latest(self.stage.run.checkpoints, warn=self.stage.warn)
        if found is None:
            return 0
        position, parallel = found.records["position"], self.stage.parallel
        if position["stage"] != self.stage.name:
            raise PerlVlmError(f"{found.path} belongs to the stage {position['stage']}, not to {self.stage.name}")
        if position["processes"] != parallel.world:
            raise PerlVlmError(
                f"{found.path} was written by {position['processes']} processes and this run has {parallel.world}: "
                "each process's random state is part of it. Continue with as many processes"
            )
        for name in self.trained:
            self.stage.roles.load_state(name, dict(found.tensors[f"role-{name}"]))
        restore_optimizer(
            self.optimizer.torch, self.optimizer.named, found.tensors["optimizer"], found.records["optimizer"]
        )
        if self.best is not None:
            self.best.load(found.tensors, found.records["best"])
        restore_rng(found.tensors[f"rng-{parallel.rank}"], found.records[f"rng-{parallel.rank}"])
        self.optimizer.step_count = int(position["optimizer_steps"])
        self.memory = dict(position["memory"])
        self.stage.notes.extend(note for note in position["notes"] if note not in self.stage.notes)
        say(f"{self.stage.name}: resumed after step {found.step} from {found.path.name}")
        return int(found.step)

    def stop_if_asked(self, step: int) -> None:
        """After a step: where a signal asked any process for an end, save and raise ``Stopped`` in all of them."""
        if self.stage.parallel.any(self.stage.stop.requested):
            self.save(step)
            self.close_logs()
            self.stage.stop_together()

    def close_logs(self) -> None:
        """Close the files and finish the tracker."""
        for log in self.logs:
            log.close()
