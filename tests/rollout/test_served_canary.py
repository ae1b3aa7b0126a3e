"""The canary: a server that leaves an adapter, or a tower's part of it, out is found before it is learned from."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from perl_vlm.config import LoraConfig
from perl_vlm.data.render import Renderer
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.roles import Roles
from perl_vlm.rollout.served import ServedEngine
from perl_vlm.types import Example, Message

EngineOf = Callable[..., ServedEngine]
Examples = Callable[[int], list[Example]]


def round_of(engine: ServedEngine, examples: list[Example], temperature: float = 1.0) -> None:
    engine.sample_rollout(
        engine.renderer.prompts(examples), examples, max_new_tokens=3, min_new_tokens=1, temperature=temperature,
        top_p=1.0, seeds=range(len(examples)),
    )  # fmt: skip


def test_a_faithful_server_passes_and_the_adapter_is_as_before(
    server: Any, engine_of: EngineOf, roles: Roles, renderer: Renderer, make_examples: Examples
) -> None:
    said: list[str] = []
    engine = engine_of(server, roles, renderer, warn=said.append)
    before = {name: value.detach().clone() for name, value in roles.parameters("policy").items()}
    round_of(engine, make_examples(2), temperature=0.7)
    after = roles.parameters("policy")
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert said == []
    # The adapter itself, each of the two towers moved, and the adapter again; the rollout asks for the last.
    assert len(server.loaded) == 4
    assert list(server.adapters) == server.loaded[-1:]
    assert {asked["model"] for asked in server.asked[-2:]} == set(server.adapters)


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"ignored": ("",)}, r"ignores the LoRA of the language tower.*--enable-lora"),
        ({"ignored": ("vision_model",)}, r"ignores the LoRA of the vision tower.*--lora\.vision_rank 0.*engine local"),
        ({"strength": 0.3}, r"does not apply as training does the LoRA of the language tower"),
        ({"raw_logprobs": True}, r"log-probs of the plain model.*--logprobs-mode processed_logprobs"),
        ({"noise": 1.0}, r"more than 0\.1: it serves another model"),
    ],
)
def test_a_server_that_samples_from_another_model_is_refused(
    faults: dict[str, Any], words: str, server: Any, engine_of: EngineOf, roles: Roles, renderer: Renderer,
    make_examples: Examples,
) -> None:  # fmt: skip
    for name, value in faults.items():
        setattr(server.faults, name, value)
    engine = engine_of(server, roles, renderer)
    before = {name: value.detach().clone() for name, value in roles.parameters("policy").items()}
    with pytest.raises(PerlVlmError, match=re.escape(server.url) + f".*{words}"):
        round_of(engine, make_examples(2), temperature=1.7)
    assert all(torch.equal(value, before[name]) for name, value in roles.parameters("policy").items())


def test_without_vision_adapters_the_tower_is_not_asked_for(
    server: Any, engine_of: EngineOf, backbone: Backbone, make_examples: Examples
) -> None:
    server.faults.ignored = ("vision_model",)
    engine = engine_of(server, Roles(backbone, LoraConfig(language_rank=2, vision_rank=0)), Renderer(backbone))
    round_of(engine, make_examples(1))
    assert len(server.loaded) == 3


def test_it_looks_again_every_so_often(
    server: Any, engine_of: EngineOf, roles: Roles, renderer: Renderer, scramble: Callable[..., None]
) -> None:
    engine = engine_of(server, roles, renderer, canary_every=2)
    asked = [Example("t", (Message("user", ("what?",)),))]  # no picture: nothing but the language tower speaks
    round_of(engine, asked)
    assert engine.pushes == 3
    server.faults.ignored = ("",)
    scramble(roles, "policy", seed=1, scale=1e-6)
    round_of(engine, asked)  # pushed, not looked at: the metric rollout/logprob_agreement watches these
    assert engine.pushes == 4
    scramble(roles, "policy", seed=2, scale=1e-6)
    with pytest.raises(PerlVlmError, match="ignores the LoRA of the language tower"):
        round_of(engine, asked)


def test_a_tower_that_changes_nothing_is_warned_of(
    server: Any, engine_of: EngineOf, roles: Roles, renderer: Renderer, make_examples: Examples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    said: list[str] = []
    monkeypatch.setattr("perl_vlm.rollout.canary.TELLING", 1e9)
    round_of(engine_of(server, roles, renderer, warn=said.append), make_examples(1))
    assert [line.split("'s adapter")[0] for line in said] == ["the language tower", "the vision tower"]
