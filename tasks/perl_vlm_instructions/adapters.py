"""Which adapter reads a data set; those of one table: Alpaca, HaluEval, lists of prompts, the documented columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perl_vlm.data.adapters import Adapter, Columns, Row, first_columns
from perl_vlm.data.columns import missing_columns, require, to_example
from perl_vlm.data.messages import show
from perl_vlm.errors import BadRecord
from perl_vlm.types import Rating, RewardHead, Split
from perl_vlm_instructions.alpaca_farm import INSTRUCTIONS, AlpacaFarm
from perl_vlm_instructions.prompts import prompt_text
from perl_vlm_instructions.records import Apart, Asked, InstructionSource, about, optional_text, text, texts
from perl_vlm_instructions.truthfulqa import TruthfulQA

if TYPE_CHECKING:
    from perl_vlm_instructions.task import InstructionsConfig


class Alpaca(InstructionSource):
    """Alpaca: instruction, input, output. A row without an output has no right answer; ``text`` is not read."""

    def ask(self, row: Row, origin: str) -> Asked:
        require(row, ["instruction", "output"], origin)
        return Asked(
            origin,
            text(row, "instruction", origin),
            origin,
            optional_text(row, "input", origin),
            optional_text(row, "output", origin) or None,
            about(row, origin),
        )


class HaluEval(InstructionSource):
    """HaluEval's general queries: user_query, chatgpt_response, hallucination (yes or no), hallucination_spans.

    Preferences are labels: a response without hallucination is good. Only such a response is a reference.
    """

    split_key = "user_query"

    def ask(self, row: Row, origin: str) -> Asked:
        require(row, ["user_query", "chatgpt_response", "hallucination"], origin)
        response = text(row, "chatgpt_response", origin)
        reference = response if _is_good(row, origin) else None
        return Asked(origin, text(row, "user_query", origin), origin, reference=reference, metadata=about(row, origin))

    def preferences(self, split: Split) -> Sequence[Rating]:
        def rating(asked: Asked, row: Row) -> Rating:
            return Rating(
                asked.id,
                asked.messages(self.config.prompt_style),
                str(row["chatgpt_response"]),
                asked.reference is not None,
                metadata={"spans": row.get("hallucination_spans") or []},
                origin=asked.origin,
            )

        return self.gather(split, "preferences", rating)

    def reward_head(self) -> RewardHead:
        return RewardHead("labels")


def _is_good(row: Row, origin: str) -> bool:
    label = row["hallucination"]
    if label not in ("yes", "no"):
        raise BadRecord(origin, f"column `hallucination` holds {show(label)}", "It is yes or no")
    return bool(label == "no")


class Prompts(InstructionSource):
    """Lists of prompts: MT-bench (turns, category, reference), Self-Instruct (instruction, instances).

    Of MT-bench's turns the first is asked, of Self-Instruct's instances too.
    """

    def ask(self, row: Row, origin: str) -> Asked:
        if "turns" in row:
            return self._turns(row, origin)
        if "instruction" in row and "instances" in row:
            return self._instances(row, origin)
        raise missing_columns(["turns"], row, origin)

    def _turns(self, row: Row, origin: str) -> Asked:
        first = texts(row["turns"], "turns", origin)[0]
        answers = texts(row["reference"], "reference", origin) if row.get("reference") else [""]
        kind = optional_text(row, "category", origin)
        metadata = {**({"kind": kind} if kind else {}), **about(row, origin)}
        return Asked(origin, _filled(first, "turns", origin), origin, "", answers[0].strip() or None, metadata)

    def _instances(self, row: Row, origin: str) -> Asked:
        instances = row["instances"]
        first = instances[0] if isinstance(instances, list) and instances else None
        if not isinstance(first, Mapping):
            problem = f"column `instances` holds {show(instances)}"
            raise BadRecord(origin, problem, 'Give a list of {"input": ..., "output": ...} that is not empty')
        output = optional_text(first, "output", origin)
        return Asked(
            origin,
            text(row, "instruction", origin),
            origin,
            optional_text(first, "input", origin),
            output or None,
            about(row, origin),
        )


def _filled(value: str, column: str, origin: str) -> str:
    if not value.strip():
        raise BadRecord(origin, f"column `{column}` begins with an empty text", "Fill it, or remove the record")
    return value


class InstructionColumns(Apart, Columns):
    """The documented columns, with ``topic`` and ``knowledge`` beside them and prompts in the configured style."""

    # What cannot be judged is left out by the task, which knows whether there is knowledge to judge by.
    referenced = False
    config: InstructionsConfig

    def key(self, row: Row, origin: str) -> str:
        messages = to_example(row, origin).messages
        return "\n".join(f"{turn.role}: {' '.join(turn.text.lower().split())}" for turn in messages)

    def collect(self, rows: Any, convert: Callable[[Row, str], Any], split: Split, what: str) -> list[Any]:
        return self.apart(rows, convert, split, what)

    def renamed(self, row: Row, origin: str) -> Row:
        found = about(row, origin)
        given = row.get("metadata") or {}
        changed = dict(row)
        if found and isinstance(given, Mapping):
            changed["metadata"] = {**given, **found}
        if self.config.prompt_style != "chat" and isinstance(row.get("prompt"), str):
            changed["prompt"] = prompt_text(row["prompt"], "", self.config.prompt_style)
        return changed


_SINGLE = {"alpaca": Alpaca, "halueval": HaluEval, "prompts": Prompts, "truthfulqa": TruthfulQA}


def open_adapter(config: InstructionsConfig) -> Adapter:
    """Return the adapter for the configuration's format, recognising it where that is ``auto``."""
    kind: str = config.format
    if kind == "auto":
        kind = _recognise(config)
    if kind == "alpaca_farm":
        return AlpacaFarm(config)
    return _SINGLE[kind](config) if kind in _SINGLE else InstructionColumns(config)


def _recognise(config: InstructionsConfig) -> str:
    """Tell the format by the data set's name or a folder's parts, else by the columns of its first record."""
    for format_name, hub_name in config.HUB.items():
        if config.source == "hub" and config.dataset == hub_name:
            return format_name
    if config.source == "local" and (Path(config.path or "") / INSTRUCTIONS).is_dir():
        return "alpaca_farm"
    columns = set(first_columns(config))
    if {"Question", "Best Answer"} <= columns or "mc1_targets" in columns or {"question", "best_answer"} <= columns:
        return "truthfulqa"
    if {"user_query", "chatgpt_response"} <= columns:
        return "halueval"
    if "turns" in columns or {"instruction", "instances"} <= columns:
        return "prompts"
    return "alpaca" if {"instruction", "output"} <= columns else "columns"
