"""Rollouts from a server: the same distribution, the same prompts, the right adapter, and what happens when not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perl_vlm.config import LoraConfig
from perl_vlm.data.render import Renderer
from perl_vlm.errors import PerlVlmError
from perl_vlm.formulas import logprob_agreement
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.roles import REFERENCE, Roles
from perl_vlm.rollout import protocol
from perl_vlm.rollout.protocol import Client
from perl_vlm.rollout.sampler import decode
from perl_vlm.rollout.served import ServedEngine, check_servable
from perl_vlm.types import Example, Message, Rollout

EngineOf = Callable[..., ServedEngine]
Examples = Callable[[int], list[Example]]
PLAIN = {"max_new_tokens": 4, "min_new_tokens": 1, "temperature": 1.0, "top_p": 1.0}


@pytest.fixture(autouse=True)
def no_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own tests are elsewhere; here it would take most of the time."""
    monkeypatch.setattr("perl_vlm.rollout.served.look", lambda *given, **named: None)


def rollout_of(engine: ServedEngine, examples: list[Example], seed: int = 0, **settings: Any) -> Rollout:
    prompts = engine.renderer.prompts(examples)
    seeds = range(seed, seed + len(examples))
    return engine.sample_rollout(prompts, examples, seeds=seeds, **{**PLAIN, **settings})


def agreement(engine: ServedEngine, rollout: Rollout, role: str, **settings: Any) -> float:
    kept = {key: value for key, value in {**PLAIN, **settings}.items() if key != "max_new_tokens"}
    with torch.no_grad():
        ours = engine.roles.logprobs(role, rollout.sequences, **kept).logprobs
    return logprob_agreement(rollout.sampled_logprobs, ours, rollout.sequences.response_mask).item()


# -- the same distribution -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p", "min_new"), [(0.6, 1.0, 1), (1.7, 0.8, 3)])
def test_what_the_server_drew_is_what_training_recomputes(
    temperature: float, top_p: float, min_new: int, server: Any, engine_of: EngineOf, roles: Roles,
    renderer: Renderer, make_examples: Examples, scramble: Callable[..., None],
) -> None:  # fmt: skip
    engine = engine_of(server, roles, renderer)
    settings = {"temperature": temperature, "top_p": top_p, "min_new_tokens": min_new}
    for seed in (0, 1):
        scramble(roles, "policy", seed=seed)
        rollout = rollout_of(engine, make_examples(4), **settings)
        assert agreement(engine, rollout, "policy", **settings) < 1 + 1e-4
        assert agreement(engine, rollout, REFERENCE, **settings) > 1.001, "the adapter was not sampled"
    assert rollout.example_ids == ("e0", "e1", "e2", "e3")
    assert rollout.texts == tuple(renderer.decode(row) for row in _responses(rollout))


def _responses(rollout: Rollout) -> list[list[int]]:
    sequences = rollout.sequences
    ids = sequences.input_ids[:, sequences.prompt_width :]
    return [row[mask].tolist() for row, mask in zip(ids, sequences.response_mask, strict=True)]


def test_near_temperature_zero_it_says_what_the_local_sampler_says(
    server: Any, engine_of: EngineOf, roles: Roles, renderer: Renderer, make_examples: Examples,
    scramble: Callable[..., None],
) -> None:  # fmt: skip
    engine = engine_of(server, roles, renderer)
    scramble(roles, "policy")
    examples = make_examples(6)
    rollout = rollout_of(engine, examples, temperature=1e-3, max_new_tokens=5)
    local = decode(roles, "policy", renderer.prompts(examples), max_new_tokens=5, greedy=True)
    assert _responses(rollout) == local.tokens
    assert rollout.ended.tolist() == local.ended.tolist()


def test_truncated_stays_truncated_and_ends_wait_for_their_time(
    server: Any, engine_of: EngineOf, roles: Roles, renderer: Renderer, make_examples: Examples
) -> None:
    engine = engine_of(server, roles, renderer)
    rollout = rollout_of(engine, make_examples(8), temperature=2.5, max_new_tokens=3, min_new_tokens=2)
    (end,) = roles.backbone.eos_ids
    for response, ended in zip(_responses(rollout), rollout.ended.tolist(), strict=True):
        assert len(response) == 3
        assert (response[-1] == end) == ended
        assert end not in response[:-1]
    assert (rollout.sampled_logprobs[rollout.sequences.response_mask] < 0).all()


def test_every_episode_has_its_own_seed(
    server: Any, engine_of: EngineOf, roles: Roles, renderer: Renderer, make_examples: Examples
) -> None:
    engine = engine_of(server, roles, renderer)
    examples = make_examples(1) * 6
    first, again = (rollout_of(engine, examples, temperature=3.0) for _ in range(2))
    assert _responses(first) == _responses(again)
    assert len(set(map(tuple, _responses(first)))) > 1
    assert sorted(asked["sampling_params"]["seed"] for asked in server.asked[:6]) == list(range(6))


def test_language_models_are_asked_by_tokens_alone(
    start: Callable[..., Any], engine_of: EngineOf, text_backbone: Backbone, scramble: Callable[..., None]
) -> None:
    server = start(text_backbone.name)
    renderer = Renderer(text_backbone)
    engine = engine_of(server, Roles(text_backbone, LoraConfig(language_rank=2)), renderer)
    scramble(engine.roles, "policy", scale=0.3)
    examples = [Example(f"q{n}", (Message("user", (f"what {n}?",)),)) for n in range(3)]
    rollout = rollout_of(engine, examples, temperature=1.3)
    assert agreement(engine, rollout, "policy", temperature=1.3) < 1 + 1e-4
    prompts = renderer.prompts(examples)
    for row, asked in enumerate(sorted(server.asked, key=lambda asked: asked["seed"])):
        assert asked["prompt"] == prompts.input_ids[row][prompts.attention_mask[row].bool()].tolist()


# -- what is pushed ------------------------------------------------------------------------------------------------


def test_only_what_changed_is_pushed_under_a_new_name_in_the_old_ones_place(
    server: Any, engine_of: EngineOf, roles: Roles, renderer: Renderer, make_examples: Examples,
    scramble: Callable[..., None],
) -> None:  # fmt: skip
    engine = engine_of(server, roles, renderer)
    with torch.no_grad():
        for value in roles.parameters("policy").values():
            value.fill_(0.07)
    examples = make_examples(1)
    rollout_of(engine, examples)
    rollout_of(engine, examples)
    assert len(server.loaded) == 1
    scramble(roles, "policy", scale=1e-7)  # as a step at a low learning rate does: bfloat16 would not show it
    rollout_of(engine, examples)
    assert len(set(server.loaded)) == len(server.loaded) == 2
    assert list(server.adapters) == server.loaded[1:]
    assert [asked["model"] for asked in server.asked] == [server.loaded[0]] * 2 + [server.loaded[1]]
    files = [path for path in engine.folder.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {server.loaded[1]}
    assert {path.name for path in files} == {"adapter_config.json", "adapter_model.safetensors"}
    # The matrices and nothing of the base.
    own = sum(value.numel() for value in roles.parameters("policy").values())
    assert sum(path.stat().st_size for path in files) < 4 * own + 100_000
    engine.close()
    assert server.adapters == {}
    assert not engine.folder.exists()


def test_what_a_process_that_died_left_is_cleared(
    server: Any, engine_of: EngineOf, roles: Roles, renderer: Renderer, make_examples: Examples
) -> None:
    rollout_of(engine_of(server, roles, renderer), make_examples(1))
    (left,) = server.adapters
    other = engine_of(server, roles, renderer)
    rollout_of(other, make_examples(1))
    assert left not in server.adapters
    assert [path.name for path in other.folder.iterdir()] == list(server.adapters)


def test_a_supervised_adapter_travels_with_the_policy(
    server: Any, engine_of: EngineOf, roles: Roles, renderer: Renderer, make_examples: Examples,
    scramble: Callable[..., None],
) -> None:  # fmt: skip
    roles.add("sft")
    scramble(roles, "sft", seed=5)
    roles.stack_sft()
    engine = engine_of(server, roles, renderer)
    scramble(roles, "policy", seed=6)
    rollout = rollout_of(engine, make_examples(3))
    assert agreement(engine, rollout, "policy") < 1 + 1e-4
    assert agreement(engine, rollout, REFERENCE) > 1.001


def test_an_adapter_that_the_server_refuses_is_told_with_its_words(
    start: Callable[..., Any], engine_of: EngineOf, text_backbone: Backbone
) -> None:
    server = start(text_backbone.name, max_lora_rank=1)
    engine = engine_of(server, Roles(text_backbone, LoraConfig(language_rank=2)), Renderer(text_backbone))
    with pytest.raises(PerlVlmError, match="LoRA rank 2 is greater than max_lora_rank 1"):
        rollout_of(engine, [Example("q", (Message("user", ("what?",)),))])


def test_a_load_whose_answer_was_lost_is_no_failure(server: Any, roles: Roles, tmp_path: Path) -> None:
    roles.add("policy")
    roles.save("policy", tmp_path / "one")
    client = Client(server.url, timeout=5.0, retries=1, backoff=0.001)
    client.load("one", tmp_path / "one")
    client.load("one", tmp_path / "one")
    with pytest.raises(PerlVlmError, match=r"already been loaded.*--ppo.engine_adapters"):
        client.load("one", tmp_path / "two")


@pytest.mark.parametrize(
    ("lora", "tuning", "words"),
    [
        ({"dora": True}, "lora", "no DoRA"),
        ({"projector": "full"}, "lora", "--lora.projector full"),
        ({}, "full", "--tuning full"),
    ],
)
def test_what_is_no_plain_adapter_is_refused(lora: dict[str, Any], tuning: Any, words: str, backbone: Backbone) -> None:
    with pytest.raises(PerlVlmError, match=f"{words}.*--ppo.engine local"):
        check_servable(Roles(backbone, LoraConfig(language_rank=2, **lora), tuning=tuning))


# -- what is not believed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"prompt_shift": 1}, r"read another prompt than training does at e0: (\d+) tokens against \1, and from token"),
        ({"silent_prompt": True}, "does not say which prompt it read"),
        ({"draws": 4}, "drew token 4, the placeholder of a picture"),
        ({"draws": 2}, "after 1 tokens .stop; the last one is 2"),
        ({"reads": 35}, "after 2 tokens .length;.*--max-model-len"),
        ({"closed": ("/inference/v1/generate",)}, "HTTP 403 at /inference/v1/generate.*--enable-scale-out"),
        ({"closed": ("/v1/load_lora_adapter",), "off": 404}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_is_refused(
    faults: dict[str, Any], words: str, server: Any, engine_of: EngineOf, roles: Roles, renderer: Renderer,
    make_examples: Examples,
) -> None:  # fmt: skip
    for name, value in faults.items():
        setattr(server.faults, name, value)
    engine = engine_of(server, roles, renderer)
    examples = make_examples(1)
    assert int(renderer.prompts(examples).attention_mask.sum()) == 33  # what `reads` counts from
    with pytest.raises(PerlVlmError, match=words) as caught:
        rollout_of(engine, examples, min_new_tokens=4)
    assert server.url in str(caught.value)


def test_a_passing_failure_is_tried_again_and_a_lasting_one_is_named(
    server: Any, engine_of: EngineOf, roles: Roles, renderer: Renderer, make_examples: Examples
) -> None:
    engine = engine_of(server, roles, renderer)
    rollout_of(engine, make_examples(1))
    server.faults.statuses = [500, 429]
    rollout_of(engine, make_examples(1))
    server.faults.statuses = [503] * 3
    with pytest.raises(PerlVlmError, match=rf"{server.url}\S+ failed 3 times, .*HTTP 503.*--resume"):
        rollout_of(engine, make_examples(1))


def test_a_server_that_dies_in_the_middle_ends_the_round_and_changes_nothing(
    server: Any, engine_of: EngineOf, roles: Roles, renderer: Renderer, make_examples: Examples
) -> None:
    engine = engine_of(server, roles, renderer)
    before = {name: value.clone() for name, value in roles.parameters("policy").items()}
    server.faults.lives = 2
    with pytest.raises(PerlVlmError, match=r"failed 3 times.*continue with --resume"):
        rollout_of(engine, make_examples(6))
    server.faults.lives = None
    assert all(torch.equal(value, before[name]) for name, value in roles.parameters("policy").items())
    assert len(rollout_of(engine, make_examples(6)).texts) == 6


def test_a_server_that_was_started_anew_is_told_apart(
    server: Any, engine_of: EngineOf, roles: Roles, renderer: Renderer, make_examples: Examples
) -> None:
    engine = engine_of(server, roles, renderer)
    rollout_of(engine, make_examples(1))
    server.unload(*server.adapters)
    with pytest.raises(PerlVlmError, match=r"no longer knows the adapter.*--resume"):
        rollout_of(engine, make_examples(1))


def test_a_server_is_looked_for_before_anything_trains(server: Any) -> None:
    client = Client(server.url + "/", timeout=5.0, retries=0)
    client.look()
    server.faults.closed = ("/health",)
    with pytest.raises(PerlVlmError, match=f"the rollout server {server.url}/health refused"):
        client.look()


# -- secrets -------------------------------------------------------------------------------------------------------


def test_the_key_travels_in_its_header_and_shows_nowhere(
    server: Any, engine_of: EngineOf, roles: Roles, renderer: Renderer, make_examples: Examples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    server.key = "canary-123"
    engine = engine_of(server, roles, renderer)
    with pytest.raises(PerlVlmError, match=r"HTTP 401.*PERL_VLM_ENGINE_TOKEN"):
        rollout_of(engine, make_examples(1))
    monkeypatch.setenv(protocol.TOKEN, "canary-124")
    with pytest.raises(PerlVlmError, match="HTTP 401") as caught:
        rollout_of(engine, make_examples(1))
    assert "canary" not in str(caught.value)
    monkeypatch.setenv(protocol.TOKEN, "canary-123")
    rollout_of(engine, make_examples(1))
    assert not any(b"canary" in path.read_bytes() for path in engine.folder.rglob("*") if path.is_file())
