"""Sample or decode responses with the model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from perl_vlm.data.rendering import PromptRenderer
from perl_vlm.data.sequences import take, with_responses
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.block_attention import blockwise
from perl_vlm.models.forward import model_inputs
from perl_vlm.models.logits import token_rules
from perl_vlm.models.roles import Roles
from perl_vlm.rollout.decoding import Chooser, DecodeLoop, selects_rows
from perl_vlm.types import Rollout, Sequences


class Sampled(NamedTuple):
    """Raw output of the decoder."""

    tokens: list[list[int]]
    """B responses, each up to and including its end token where it has one."""
    logprobs: Tensor
    """[B, R] log-prob of each sampled token, zero outside the response."""
    ended: Tensor
    """[B] bool, whether the response ended by itself."""


def episode_seeds(seed: int, step: int, first: int, count: int) -> list[int]:
    """Seeds of the episodes ``first`` to ``first + count - 1`` of a training step: BLAKE2b over "seed:step:episode",
    32 bits of it, which is all that torch's CPU generator takes of a seed.

    They depend on nothing else, so that a process that samples a part of the step's episodes draws what one process
    would draw that samples them all, today and after a restart. Two episodes in 65,000 may share their noise by chance.
    """
    digests = (blake2b(f"{seed}:{step}:{first + n}".encode(), digest_size=4).digest() for n in range(count))
    return [int.from_bytes(digest, "big") for digest in digests]


def _noise(seeds: Sequence[int], steps: int) -> Tensor:
    """[B, steps] float64 uniform numbers in [0, 1), each row from a generator of its own."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(steps, generator=own, dtype=torch.float64) for own in generators])


@torch.no_grad()
def decode(
    roles: Roles,
    role: str,
    prompts: Sequences,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    greedy: bool = False,
    seeds: Sequence[int] | None = None,
    synced: bool = False,
) -> Sampled:
    """Continue B prompts as ``role``.

    Nothing filters the distribution but ``top_p``: no top-k, no repetition penalty, whatever the model publishes. Image
    placeholders are never drawn.

    Args:
        roles, role: who speaks.
        prompts: B rows without responses.
        max_new_tokens: where a response is cut off; no end is forced onto it.
        min_new_tokens: none of the first so many tokens may be an end.
        temperature: > 0.
        top_p: the nucleus tokens are drawn from.
        greedy: take the likeliest token; temperature and top_p are then 1, and no seed is used.
        seeds: B seeds. A row's response depends on its seed, its prompt and the model, and neither on the other rows
            nor on torch's global generator. Without them, seeds are drawn from the global generator.
        synced: let every process run as many steps as the slowest, as a base sharded over processes needs.

    Raises:
        ValueError: where there are not as many seeds as prompts.
        PerlVlmError: where prompt and response are longer than the model reads, and where its probabilities are no
            numbers.
    """
    backbone = roles.backbone
    _check_window(backbone, prompts, max_new_tokens)
    noise = None
    if not greedy:
        drawn_seeds = torch.randint(2**32, (len(prompts),)).tolist() if seeds is None else seeds
        if len(drawn_seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(drawn_seeds)} seeds")
        noise = _noise(drawn_seeds, max_new_tokens).to(backbone.device)
    chooser = Chooser(
        token_rules(backbone.model, backbone.eos_ids),
        1.0 if greedy else temperature,
        1.0 if greedy else top_p,
        min_new_tokens,
        noise,
    )
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # the loop draws
        repetition_penalty=1.0,
        num_beams=1,
        eos_token_id=list(backbone.eos_ids),
        pad_token_id=backbone.pad_id,
        bos_token_id=backbone.tokenizer.bos_token_id,
    )
    asked, prompt_of = _distinct(backbone.model, prompts)
    loop = DecodeLoop(chooser, backbone.eos_ids, max_new_tokens, prompt_of, synced)
    with roles.acting(role) as model, blockwise(model):
        inputs = model_inputs(model, backbone, asked)
        inputs.pop("position_ids", None)  # generate() derives the same positions from the mask and advances them
        model.generate(**inputs, generation_config=settings, custom_generate=loop)
    tokens, ended = cut_at_end(loop.tokens, backbone.eos_ids)
    lengths = torch.tensor([len(row) for row in tokens], device=loop.logprobs.device)
    inside = torch.arange(loop.logprobs.shape[1], device=loop.logprobs.device) < lengths[:, None]
    kept = torch.where(inside, loop.logprobs, torch.zeros_like(loop.logprobs))
    if not bool(torch.isfinite(kept).all()):
        raise PerlVlmError(
            f"{backbone.name} gave probabilities that are no numbers as {role}. A lower learning rate or "
            "--dtype float32 is the usual cure"
        )
    return Sampled(tokens, kept, ended)


def _distinct(model: Any, prompts: Sequences) -> tuple[Sequences, Sequence[int] | None]:
    """Each prompt once, and for every row which of them it is; None where they are all different."""
    if prompts.prompt_of is None or len(set(prompts.prompt_of)) == len(prompts) or not selects_rows(model):
        return prompts, None
    places: dict[int, int] = {}
    of = [places.setdefault(prompt, len(places)) for prompt in prompts.prompt_of]
    return take(prompts, [of.index(place) for place in range(len(places))]), of


def _check_window(backbone: Backbone, prompts: Sequences, max_new_tokens: int) -> None:
    longest = int(prompts.attention_mask.sum(dim=1).max())
    if backbone.window is not None and longest + max_new_tokens > backbone.window:
        raise PerlVlmError(
            f"a prompt has {longest} tokens, and {backbone.name} reads {backbone.window} with the "
            f"--ppo.max_new_tokens {max_new_tokens} of its answer; lower that or --max_prompt_tokens"
        )


def cut_at_end(drawn: Tensor, eos_ids: Sequence[int]) -> tuple[list[list[int]], Tensor]:
    """Cut each row after its first end token. A row without one was cut off by the limit and stays as it is: no end
    is forced onto it.

    Args:
        drawn: [B, R] sampled ids, anything after a row's first end token.
        eos_ids: ids that end a response; the padding id may be one of them.
    """
    is_end = torch.isin(drawn, torch.tensor(list(eos_ids), device=drawn.device))
    ended = is_end.any(dim=1)
    lengths = torch.where(ended, is_end.to(torch.long).argmax(dim=1) + 1, drawn.shape[1])
    rows = [row[:length].tolist() for row, length in zip(drawn, lengths.tolist(), strict=True)]
    return rows, ended


def sample_rollout(
    roles: Roles,
    role: str,
    prompts: Sequences,
    renderer: PromptRenderer,
    example_ids: Sequence[str],
    *,
    max_new_tokens: int,
    min_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    rows: int | None = None,
    synced: bool = False,
) -> Rollout:
    """Sample one response for each prompt as ``role``, ``rows`` prompts at a time (all at once when not given).

    See ``decode``. With ``synced``, every process must come with the same number of batches.
    """
    size = rows or len(prompts)
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    parts = [
        decode(
            roles,
            role,
            take(prompts, range(start, min(start + size, len(prompts)))) if size < len(prompts) else prompts,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seeds=None if seeds is None else seeds[start : start + size],
            synced=synced,
        )
        for start in range(0, len(prompts), size)
    ]
    tokens = [row for part in parts for row in part.tokens]
    sequences = with_responses(prompts, tokens, roles.backbone.pad_id)
    width = sequences.response_mask.shape[1]
    padded = [torch.nn.functional.pad(part.logprobs, (0, width - part.logprobs.shape[1])) for part in parts]
    return Rollout(
        sequences=sequences,
        sampled_logprobs=torch.cat(padded),
        ended=torch.cat([part.ended for part in parts]),
        texts=tuple(renderer.decode(row) for row in tokens),
        example_ids=tuple(example_ids),
    )
