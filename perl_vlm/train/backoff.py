"""Micro-batches that fit: where memory runs out a step is begun again with smaller ones, at last with activations
computed again for backward, and nothing of it is lost."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from perl_vlm.errors import PerlVlmError, is_out_of_memory
from perl_vlm.models.recomputing import recomputable

if TYPE_CHECKING:
    from perl_vlm.train.stage import Stage

Item = TypeVar("Item")
Found = TypeVar("Found")


def in_micro_batches(
    stage: Stage,
    what: str,
    items: Sequence[Item],
    size: int,
    work: Callable[[Sequence[Item]], Found],
    *,
    undo: Callable[[], None] = lambda: None,
) -> list[Found]:
    """``work`` on ``size`` items at a time, in order; on fewer, from here on, where memory ran out.

    What was found before that is thrown away, after ``undo``, and all items are gone through again: ``backward`` fills
    gradients as it goes, and one that broke off has filled some.

    Args:
        what: names the kind of work, whose size is remembered for as long as the stage lives.
        items: all of them.
        size: at most so many at once.
        work: must give the same whether its items come together or apart, summed up by the caller.
        undo: takes back what ``work`` did outside itself.

    Raises:
        PerlVlmError: where a single item is too much even with checkpointing, or several processes run: who ran out
            cannot tell the others, which wait for its gradient.
    """
    while True:
        now = max(1, min(size, len(items), stage.fits.get(what, size)))
        try:
            return [work(items[start : start + now]) for start in range(0, len(items), now)]
        except RuntimeError as error:  # torch's own out-of-memory errors are such, and those of the CPU plain ones
            if not is_out_of_memory(error):
                raise
            said = str(error).partition("\n")[0]
        undo()
        gc.collect()
        if stage.device.type == "cuda":
            torch.cuda.empty_cache()
        if stage.parallel.world > 1 or (now == 1 and not _can_recompute(stage)):
            raise PerlVlmError(_advice(stage, what, now, said))
        if now == 1:
            stage.roles.recompute()
            stage.warn(
                f"{stage.name}: memory ran out with a single one of the {what} ({said}); going on with activations "
                "computed again for backward, which takes longer. --checkpointing true does so from the start"
            )
            continue
        stage.fits[what] = now // 2
        stage.warn(
            f"{stage.name}: memory ran out with {now} {what} at once ({said}); going on with {stage.fits[what]}, which "
            "changes the order of additions alone. --ppo.accumulate, --rm.accumulate and --sft.accumulate set it from "
            "the start"
        )


def _can_recompute(stage: Stage) -> bool:
    """Whether checkpointing is left to be tried; where nothing learns it saves nothing."""
    if not torch.is_grad_enabled() or stage.roles.recomputing:
        return False
    return bool(recomputable(stage.roles.backbone.model))


def _advice(stage: Stage, what: str, now: int, said: str) -> str:
    cures = "--checkpointing true, " if not stage.roles.recomputing else ""
    cures += "a smaller --lora rank, shorter --max_prompt_tokens, --load_in_4bit true, or a smaller model"
    if now > 1:
        world = stage.parallel.world
        cures = f"a larger --{stage.name}.accumulate (with {world} processes it is not lowered by itself), {cures}"
    return (
        f"memory ran out in {stage.name} with {now} {what} at once: {said}. What helps: {cures}. `perl-vlm plan` "
        "predicts what fits"
    )
