"""Does the server apply the adapter that it was given, to every tower?

A server may load an adapter and leave a part of it out without a word: the vision tower's where it serves LoRA to
language towers alone, or all of it where the names do not match. The policy would then learn from another model's
samples. So each tower's weights are moved in turn, the server samples from them, and its log-probs must be those that
training computes of the moved weights, and not those of the unmoved ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from perl_vlm.errors import PerlVlmError
from perl_vlm.models.towers import TOWERS, Tower, tower_of
from perl_vlm.types import Sequences

TOLERANCE = 0.1
"""Nats a token by which two computations of one model may differ on average; bfloat16 stays well below."""
MOVED = 0.5
"""Nats a token by which moved weights should change the log-probs. A tower that cannot is moved as far as it goes."""
TELLING = 10
"""How many times the difference between the two computations it must be at least, to be told from it."""
SHARE = 0.2
"""Part of the move by which the server may miss it. An adapter at half its strength, or without some of its layers,
misses by more."""
_LEAST = 1e-3
"""Nats a token below which two computations are called equal."""
_FIRST_SCALE, _DOUBLINGS = 0.02, 12

_REMEDY: Mapping[Tower, str] = {
    "language": "Start it with --enable-lora and a --max-lora-rank that is large enough, and without "
    "--lora-target-modules",
    "projector": "Start it with --enable-tower-connector-lora. Where its vLLM has no such adapters for this model, "
    "freeze the projector (--lora.projector frozen)",
    "vision": "Start it with --enable-tower-connector-lora. Where its vLLM has no such adapters for this model, "
    "freeze the tower (--lora.vision_rank 0)",
}


class Recompute(Protocol):
    """Log-probs as training computes them."""

    def __call__(self, sequences: Sequences, *, raw: bool = False) -> Tensor:
        """[B, R] under the weights as they are; with ``raw``, of the plain model: untempered, nothing ruled out."""
        ...


def look(
    parameters: Mapping[str, nn.Parameter],
    draw: Callable[[], tuple[Sequences, Tensor]],
    recompute: Recompute,
    *,
    who: str,
    pictures: bool,
    warn: Callable[[str], None],
) -> None:
    """Try the server with the adapter as it is, then with each tower's weights moved. They are put back to the bit.

    Args:
        parameters: the adapter's, by name.
        draw: pushes the adapter as it is at that moment and samples from the server: sequences with responses, and
            the server's [B, R] log-probs of these.
        recompute: what training makes of such sequences.
        who: the server, for messages.
        pictures: whether the prompts that ``draw`` uses have any; without, nothing but the language tower speaks.
        warn: takes what the user should read.

    Raises PerlVlmError where the server disagrees, saying in what.
    """
    first, served = draw()
    plain = recompute(first)
    noise = _apart(served, plain, first)
    _check_plain(noise, _apart(served, recompute(first, raw=True), first), who)
    noise = max(noise, _LEAST)
    for tower in reversed(TOWERS):  # the language tower first: a server that ignores it ignores all of them
        own = [value for name, value in parameters.items() if tower_of(name) == tower and ".lora_B." in name]
        if not own or (tower != "language" and not pictures):
            continue
        with _moved(own, lambda: _apart(recompute(first), plain, first)) as change:
            telling = change >= TELLING * noise
            if telling:
                second, served = draw()
                moved = recompute(second)
        if telling:
            _judge(tower, served, moved, recompute(second), second, noise, who)
        else:
            warn(
                f"the {tower} tower's adapter, however it is moved, changes these prompts' log-probs by no more than "
                f"{change:.2g} nats a token, too little to see whether {who} applies it"
            )


def _apart(one: Tensor, other: Tensor, sequences: Sequences) -> float:
    """Mean |difference| over the response tokens, in nats."""
    mask = sequences.response_mask
    return float((one - other).abs()[mask].mean())


def _check_plain(apart: float, apart_raw: float, who: str) -> None:
    if apart > apart_raw + 0.01:
        raise PerlVlmError(
            f"{who} gives the log-probs of the plain model (they are {apart_raw:.3g} nats a token from those), and not "
            f"those of the distribution that it draws from ({apart:.3g}). Start it with --logprobs-mode "
            "processed_logprobs"
        )
    if not apart <= TOLERANCE:
        raise PerlVlmError(
            f"{who} gives log-probs that are {apart:.3g} nats a token from those that training computes of the same "
            f"tokens, more than {TOLERANCE}: it serves another model, or the same in another precision. Serve --model, "
            "at the same revision and unquantised, or use --ppo.engine local"
        )


def _judge(
    tower: Tower, served: Tensor, moved: Tensor, plain: Tensor, sequences: Sequences, noise: float, who: str
) -> None:
    right, wrong, span = (
        _apart(one, other, sequences) for one, other in ((served, moved), (served, plain), (moved, plain))
    )
    if right <= max(2 * noise, SHARE * span) and right < wrong:
        return
    what = "ignores" if wrong <= 2 * noise else "does not apply as training does"
    raise PerlVlmError(
        f"{who} {what} the LoRA of the {tower} tower: with that tower's adapter moved, its log-probs are {right:.3g} "
        f"nats a token from those of the moved weights and {wrong:.3g} from those of the unmoved ones. "
        f"{_REMEDY[tower]}, or use --ppo.engine local"
    )


@contextmanager
@torch.no_grad()
def _moved(parameters: Sequence[nn.Parameter], change: Callable[[], float]) -> Iterator[float]:
    """Move weights at random until ``change`` says MOVED, or else about as far as it says the most; gives what it
    says then."""
    before = [value.detach().clone() for value in parameters]
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(value.shape, generator=generator).to(value) for value in parameters]

    def move(scale: float) -> None:
        for value, start, direction in zip(parameters, before, noise, strict=True):
            value.copy_(start + scale * direction)

    try:
        seen: dict[float, float] = {}
        for doubling in range(_DOUBLINGS):
            scale = _FIRST_SCALE * 2**doubling
            move(scale)
            found = change()
            if not math.isfinite(found):
                break
            seen[scale] = found
            if found >= MOVED:
                break
        best = max(seen.values(), default=0.0)
        # The least move of those that do: the further, the more two precisions differ.
        scale = next((scale for scale, found in seen.items() if found >= min(MOVED, 0.8 * best)), 0.0)
        move(scale)
        yield seen.get(scale, 0.0)
    finally:
        for value, start in zip(parameters, before, strict=True):
            value.copy_(start)
