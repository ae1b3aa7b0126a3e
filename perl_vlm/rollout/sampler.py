"""Sample or decode responses with the model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from perl_vlm.data.render import Renderer
from perl_vlm.data.sequences import take, with_responses
from perl_vlm.models.forward import model_inputs
from perl_vlm.models.roles import Roles
from perl_vlm.types import Rollout, Sequences


class Sampled(NamedTuple):
    """Raw output of the decoder."""

    tokens: list[list[int]]
    """B responses, each up to and including its end token where it has one."""
    logprobs: Tensor
    """[B, R] log-prob of each sampled token, zero outside the response."""
    ended: Tensor
    """[B] bool, whether the response ended by itself."""


class _Recorder(LogitsProcessor):
    """Tempers the logits, rules out an early end, and remembers the log-prob of every token drawn, one step late:
    the token of a step is known when the next step begins. So no more than one step's [B, V] is ever held."""

    def __init__(self, eos_ids: Sequence[int], temperature: float, min_new_tokens: int) -> None:
        self.eos_ids, self.temperature, self.min_new_tokens = list(eos_ids), temperature, min_new_tokens
        self.pending: Tensor | None = None
        self.chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.settle(input_ids[:, -1])
        scores = scores.float() / self.temperature
        if len(self.chosen) < self.min_new_tokens:
            scores[:, self.eos_ids] = float("-inf")
        self.pending = torch.log_softmax(scores, dim=-1)
        return scores

    def settle(self, tokens: Tensor) -> None:
        if self.pending is not None:
            self.chosen.append(self.pending.gather(1, tokens[:, None])[:, 0])
            self.pending = None


@torch.no_grad()
def decode(
    roles: Roles,
    role: str,
    prompts: Sequences,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 1,
    temperature: float = 1.0,
    greedy: bool = False,
) -> Sampled:
    """Continue B prompts as ``role``, drawing from torch's global generator unless ``greedy``.

    Nothing filters the distribution: no top-k, no top-p, no repetition penalty, whatever the model publishes.
    """
    backbone = roles.backbone
    recorder = _Recorder(backbone.eos_ids, 1.0 if greedy else temperature, min_new_tokens)
    unfiltered = {} if greedy else {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        **unfiltered,
        repetition_penalty=1.0,
        num_beams=1,
        eos_token_id=list(backbone.eos_ids),
        pad_token_id=backbone.pad_id,
        bos_token_id=backbone.tokenizer.bos_token_id,
    )
    with roles.acting(role) as model:
        inputs = model_inputs(model, backbone, prompts)
        inputs.pop("position_ids", None)  # generate() derives the same positions from the mask and advances them
        produced = model.generate(
            **inputs, generation_config=settings, logits_processor=LogitsProcessorList([recorder])
        )
    recorder.settle(produced[:, -1])
    width = prompts.input_ids.shape[1]
    drawn = produced[:, width:]
    tokens, ended = cut_at_end(drawn, backbone.eos_ids)
    logprobs = torch.stack(recorder.chosen, dim=1)
    lengths = torch.tensor([len(row) for row in tokens], device=logprobs.device)
    inside = torch.arange(logprobs.shape[1], device=logprobs.device) < lengths[:, None]
    return Sampled(tokens, torch.where(inside, logprobs, torch.zeros_like(logprobs)), ended)


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
    renderer: Renderer,
    example_ids: Sequence[str],
    *,
    max_new_tokens: int,
    min_new_tokens: int,
    temperature: float,
    rows: int | None = None,
) -> Rollout:
    """Sample one response for each prompt as ``role``, ``rows`` prompts at a time (all at once when not given)."""
    size = rows or len(prompts)
    parts = [
        decode(
            roles,
            role,
            take(prompts, range(start, min(start + size, len(prompts)))) if size < len(prompts) else prompts,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
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
