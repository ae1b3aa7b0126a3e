"""Responses sampled by a vLLM server from the policy's adapter, behind what ``sampler.sample_rollout`` gives.

The base stays where it is on both sides. Before a round, the adapter travels: megabytes in a folder, which the server
is told to read. Every version has a name of its own: vLLM keeps the states of prompts and the embeddings of pictures
by the adapter's name, and weights that change under one name would meet what older ones left.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perl_vlm.data.rendering import PromptRenderer
from perl_vlm.data.sequences import take, with_responses
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.adapters import write_adapter
from perl_vlm.models.logits import TokenRules, token_rules
from perl_vlm.models.roles import Roles
from perl_vlm.rollout.canary import look
from perl_vlm.rollout.protocol import Answer, Client, Prompt, Sampling, data_url
from perl_vlm.types import Example, Rollout, Sequences

CANARY_PROMPTS, CANARY_TOKENS = 4, 8
_PREFIX = "perl-vlm-"


def check_servable(roles: Roles) -> None:
    """Raise PerlVlmError for settings whose policy is more than LoRA matrices: no server takes that as an adapter."""
    lora, remedy = roles.lora, "or use --ppo.engine local"
    if roles.tuning == "full":
        raise PerlVlmError(f"--tuning full trains whole models, and a rollout server takes adapters alone; {remedy}")
    if lora.dora:
        raise PerlVlmError(f"vLLM has no DoRA: leave out --lora.dora, {remedy}")
    copied = [name for name in roles.adapters.names if roles.adapters.projector_mode(name) == "full"]
    if copied or lora.projector == "full":
        raise PerlVlmError(
            f"vLLM takes no trained copy of the projector (--lora.projector full): use adapted or frozen, {remedy}"
        )


class ServedEngine:
    """Samples as one role from a server.

    Args:
        roles, role: whose adapters are pushed: the role's own and those under it, as one.
        renderer: of the prompts.
        client: the server.
        folder: where adapters are written, this run's alone. The server must see it under the same path.
        requests: under way at once.
        canary_every: pushes between two looks at whether the server applies the adapter; one comes before the first.
        is_main: whether this process pushes; the others wait for it.
        share: gives every process what the main one has; all call it in step.
        warn: takes what the user should read.
    """

    def __init__(
        self,
        roles: Roles,
        role: str,
        renderer: PromptRenderer,
        client: Client,
        folder: Path,
        *,
        requests: int,
        canary_every: int,
        warn: Callable[[str], None],
        is_main: bool = True,
        share: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self.roles, self.role, self.renderer, self.client = roles, role, renderer, client
        self.folder = folder.absolute()
        self.requests, self.canary_every = requests, canary_every
        self.is_main, self.share, self.warn = is_main, share, warn
        self.name: str | None = None
        """Under which the server has the adapter as it was last pushed."""
        self.pushes = 0
        self._label = f"{_PREFIX}{uuid.uuid4().hex[:8]}"
        self._digest = ""
        self._looked_at: int | None = None

    # -- sampling --------------------------------------------------------------------------------------------------

    def sample_rollout(
        self,
        prompts: Sequences,
        examples: Sequence[Example],
        *,
        max_new_tokens: int,
        min_new_tokens: int,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
    ) -> Rollout:
        """One response to each of B prompts, which were rendered from the examples.

        As the local sampler draws them, with the same rules and settings; but vLLM has its own generator, so that the
        same seeds give other draws. The adapter is pushed first where it has changed.

        Raises PerlVlmError where the server fails or is not to be believed; nothing has been changed by then.
        """
        sampling = Sampling(max_new_tokens, min_new_tokens, temperature, top_p, self._rules())
        asked = self._prompts(prompts, examples)
        if self.is_main:
            self._refresh(prompts, asked, sampling)
        self.name = self.share(self.name)
        answers = self._ask(asked, sampling, seeds)
        sequences, logprobs = self._joined(prompts, answers)
        return Rollout(
            sequences=sequences,
            sampled_logprobs=logprobs,
            ended=torch.tensor([answer.ended for answer in answers], device=logprobs.device),
            texts=tuple(self.renderer.decode(answer.tokens) for answer in answers),
            example_ids=tuple(example.id for example in examples),
        )

    def _rules(self) -> TokenRules:
        backbone = self.roles.backbone
        rules = token_rules(backbone.model, backbone.eos_ids)
        # A placeholder without a logit is never drawn, and vLLM refuses to be told so.
        size = int(backbone.model.config.get_text_config().vocab_size)
        return rules._replace(never=tuple(token for token in rules.never if token < size))

    def _prompts(self, prompts: Sequences, examples: Sequence[Example]) -> list[Prompt]:
        made: dict[tuple[int, int], Prompt] = {}  # the answers to one prompt share it
        found = []
        for row, example in enumerate(examples):
            key = id(example.messages), id(example.images)
            if key not in made:
                ids = prompts.input_ids[row][prompts.attention_mask[row].bool()].tolist()
                images = tuple(data_url(source) for source in example.images)
                sent = self._unfilled(example, ids) if images else ids
                made[key] = Prompt(example.origin or example.id, ids, sent, images)
            found.append(made[key])
        return found

    def _unfilled(self, example: Example, ids: list[int]) -> list[int]:
        """The prompt as the template writes it, with one placeholder a picture. What the server makes of it is
        compared with ``ids``."""
        text, tokenizer = self.renderer.prompt_text(example.messages), self.roles.backbone.tokenizer
        plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole: list[int] = tokenizer(text, add_special_tokens=True)["input_ids"]
        return whole if whole[0] == ids[0] != plain[0] else plain

    def _ask(self, asked: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Answer]:
        name = self.name
        assert name is not None
        if len(seeds) != len(asked):
            raise ValueError(f"{len(asked)} prompts but {len(seeds)} seeds")
        with ThreadPoolExecutor(max_workers=min(self.requests, len(asked))) as pool:
            waiting = [
                pool.submit(self.client.complete, name, prompt, sampling, seed)
                for prompt, seed in zip(asked, seeds, strict=True)
            ]
            try:
                return [future.result() for future in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # one failure is enough
                raise

    def _joined(self, prompts: Sequences, answers: Sequence[Answer]) -> tuple[Sequences, Tensor]:
        sequences = with_responses(prompts, [answer.tokens for answer in answers], self.roles.backbone.pad_id)
        logprobs = torch.zeros(sequences.response_mask.shape, dtype=torch.float32)
        for row, answer in enumerate(answers):
            logprobs[row, : len(answer.logprobs)] = torch.tensor(answer.logprobs)
        return sequences, logprobs.to(sequences.input_ids.device)

    # -- pushing ---------------------------------------------------------------------------------------------------

    def _refresh(self, prompts: Sequences, asked: Sequence[Prompt], sampling: Sampling) -> None:
        """Let the server have the adapter as it is, and look now and then whether it uses it."""
        config, state = self._adapter()
        digest = _digest(state)
        if digest == self._digest:
            return
        if self._looked_at is None:
            check_servable(self.roles)
            self._clear()
        if self._looked_at is None or self.pushes - self._looked_at >= self.canary_every:
            self._look(prompts, asked, sampling)
            self._looked_at = self.pushes
        self._push(config, state)
        self._digest = digest

    def _adapter(self) -> tuple[Any, Mapping[str, Tensor]]:
        # As one adapter whose scaling is 1 everywhere: servers differ in what they read of scales by layer.
        return self.roles.adapters.combined(dict.fromkeys(self.roles.role(self.role).adapters, 1.0))

    def _push(self, config: Any, state: Mapping[str, Tensor]) -> None:
        """Write an adapter and let the server read it, in the place of the last one."""
        self.pushes += 1
        name, before, self._digest = f"{self._label}-{self.pushes}", self.name, ""
        whole, part = self.folder / name, self.folder / f".tmp-{name}"
        backbone = self.roles.backbone
        write_adapter(part, config, state, base=backbone.name, revision=backbone.revision)
        os.replace(part, whole)
        if before is not None:
            # Before the new one comes: a server may have room for one adapter, and forgets the older by itself.
            self.client.unload(before)
            shutil.rmtree(self.folder / before, ignore_errors=True)
            self.name = None
        self.client.load(name, whole)
        self.name = name

    def _clear(self) -> None:
        """Remove what a process that ended early left in the folder and on the server."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, root in self.client.models().items():
            if name.startswith(_PREFIX) and Path(root).parent == self.folder:
                self.client.unload(name)
        for left in (*self.folder.glob(f"{_PREFIX}*"), *self.folder.glob(f".tmp-{_PREFIX}*")):
            shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        """Let the server forget the adapter, and delete it. Only of this process; the run's own is elsewhere."""
        if self.is_main and self.name is not None:
            self.client.unload(self.name)
            shutil.rmtree(self.folder, ignore_errors=True)
        self.name, self._digest = None, ""

    # -- looking ---------------------------------------------------------------------------------------------------

    def _look(self, prompts: Sequences, asked: Sequence[Prompt], sampling: Sampling) -> None:
        rows = _some_rows(asked)
        few, some = take(prompts, rows), [asked[row] for row in rows]
        length = min(CANARY_TOKENS, sampling.max_new_tokens)
        # No ends: every look compares the same number of tokens.
        own = Sampling(length, length, sampling.temperature, sampling.top_p, sampling.rules)

        def draw() -> tuple[Sequences, Tensor]:
            self._push(*self._adapter())
            return self._joined(few, self._ask(some, own, range(len(some))))

        @torch.no_grad()
        def recompute(sequences: Sequences, *, raw: bool = False) -> Tensor:
            settings: dict[str, Any] = (
                {} if raw else {"temperature": own.temperature, "top_p": own.top_p, "min_new_tokens": length}
            )
            return self.roles.logprobs(self.role, sequences, **settings).logprobs

        look(
            self.roles.parameters(self.role),
            draw,
            recompute,
            who=self.client.who,
            pictures=any(prompt.images for prompt in some),
            warn=self.warn,
        )


def _some_rows(asked: Sequence[Prompt]) -> list[int]:
    """A few rows of different prompts, those with pictures first."""
    first = {id(prompt): row for row, prompt in reversed(list(enumerate(asked)))}
    return sorted(sorted(first.values()), key=lambda row: not asked[row].images)[:CANARY_PROMPTS]


def _digest(state: Mapping[str, Tensor]) -> str:
    """Tells adapters apart to the bit: a step at a low learning rate changes no leading digit."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
