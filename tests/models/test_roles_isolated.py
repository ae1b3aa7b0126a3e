"""One frozen base, many roles: nothing that trains in one may be seen from another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from perl_vlm.config import LoraConfig
from perl_vlm.data.collate import Collator
from perl_vlm.data.render import Renderer
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.backbone import Backbone, load_backbone
from perl_vlm.models.roles import REFERENCE, Roles, frozen_parameters
from perl_vlm.types import Example, Sequences


@pytest.fixture
def batch(renderer: Renderer, make_examples: Callable[[int], list[Example]]) -> Sequences:
    return Collator(renderer).references(make_examples(6))


def digest(roles: Roles) -> str:
    hasher = hashlib.sha256()
    for name, parameter in frozen_parameters(roles):
        hasher.update(name.encode())
        hasher.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def outputs(roles: Roles, batch: Sequences) -> dict[str, Tensor]:
    found = {}
    with torch.no_grad():
        for name in roles.names:
            found[name] = roles.logprobs(name, batch).logprobs
            if name == "value":
                found["value head"] = roles.values(name, batch)
            if name.startswith("reward"):
                found[f"{name} head"] = roles.scores(name, batch)
    return found


def train_steps(roles: Roles, batch: Sequences, name: str, steps: int = 3) -> None:
    roles.train_only(name)
    optimizer = torch.optim.AdamW(roles.parameters(name).values(), lr=1e-2)
    for _ in range(steps):
        if name == "value":
            loss = (roles.values(name, batch, training=True) - 1).square().mean()
        elif name.startswith("reward"):
            loss = -roles.scores(name, batch, training=True).mean()
        else:
            loss = -roles.logprobs(name, batch, training=True).logprobs.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def add_all(roles: Roles) -> None:
    roles.add("policy")
    roles.add("value", head="value")
    roles.add("reward", head="reward")
    roles.add("reward-2", head="reward")


@pytest.mark.parametrize("trained", ["policy", "value", "reward", "reward-2"])
def test_training_one_role_changes_that_role_alone(roles: Roles, batch: Sequences, trained: str) -> None:
    add_all(roles)
    base, before = digest(roles), outputs(roles, batch)
    train_steps(roles, batch, trained)
    after = outputs(roles, batch)
    assert digest(roles) == base, "the frozen base changed"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    own = {trained} | ({f"{trained} head"} if f"{trained} head" in before else set())
    assert changed == own


def test_adapters_off_is_the_untouched_base_to_the_bit(
    roles: Roles, batch: Sequences, scramble: Callable[..., None]
) -> None:
    with torch.no_grad():
        untouched = roles.logprobs(REFERENCE, batch).logprobs
    add_all(roles)
    for name in ("policy", "value", "reward"):
        scramble(roles, name)
    with torch.no_grad():
        again = roles.logprobs(REFERENCE, batch).logprobs
        policy = roles.logprobs("policy", batch).logprobs
    assert torch.equal(untouched, again)
    assert not torch.equal(untouched, policy)


def test_a_fresh_adapter_changes_nothing(roles: Roles, batch: Sequences) -> None:
    roles.add("policy")
    with torch.no_grad():
        assert torch.equal(roles.logprobs("policy", batch).logprobs, roles.logprobs(REFERENCE, batch).logprobs)


def test_both_towers_receive_gradients_and_the_base_none(roles: Roles, batch: Sequences) -> None:
    roles.add("policy")
    roles.train_only("policy")
    # B starts at zero, and with it A's gradient: one step of B first.
    train_steps(roles, batch, "policy", steps=1)
    roles.logprobs("policy", batch).logprobs.sum().backward()
    for tower, mark in (("vision", "vision_model"), ("language", "text_model")):
        grads = [p.grad for name, p in roles.parameters("policy").items() if mark in name]
        assert grads, f"no adapter on the {tower} tower"
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads), f"{tower} got no gradient"
    assert all(parameter.grad is None for _, parameter in frozen_parameters(roles))


def test_gradient_survives_a_change_of_role_before_backward(roles: Roles, batch: Sequences) -> None:
    """PPO runs policy and value forward before one backward: activating the value must not cut the policy off."""
    roles.add("policy")
    roles.add("value", head="value")
    roles.train_only("policy", "value")
    loss = roles.logprobs("policy", batch).logprobs.sum()
    loss = loss + roles.values("value", batch).sum() + roles.values("value", batch).square().sum()
    loss.backward()
    for name in ("policy", "value"):
        moved = [key for key, p in roles.parameters(name).items() if p.grad is not None and p.grad.abs().sum() > 0]
        assert any("lora_B" in key or key.startswith("head") for key in moved), f"{name} got no gradient"


def test_ranks_by_tower_and_a_frozen_vision_tower(backbone: Backbone) -> None:
    both = Roles(backbone, LoraConfig(language_rank=4, vision_rank=2))
    both.add("policy")
    counted = both.counts("policy")
    config = backbone.model.config
    width, layers = config.vision_config.hidden_size, config.vision_config.num_hidden_layers
    assert counted["vision"] == layers * 4 * 2 * (2 * width)
    width, layers = config.text_config.hidden_size, config.text_config.num_hidden_layers
    assert counted["language"] == layers * 4 * 4 * (2 * width)
    assert counted["projector"] == 0
    other = Roles(load_backbone("tiny", device="cpu"), LoraConfig(language_rank=4, vision_rank=0, targets="all-linear"))
    other.add("policy")
    assert other.counts("policy")["vision"] == 0, "all-linear must not re-open a frozen tower"


def test_projector_is_adapted_only_on_request(backbone: Backbone) -> None:
    roles = Roles(backbone, LoraConfig(language_rank=4, vision_rank=4, projector="adapted"))
    roles.add("policy")
    assert roles.counts("policy")["projector"] > 0
    assert "projector" in roles.describe("policy")


def test_the_trainable_share_is_under_one_percent_on_a_real_size_model() -> None:
    """SmolVLM-256M's shapes on the meta device: no weights, real counts."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    from perl_vlm.models.adapters import Adapters

    config = Idefics3Config(
        scale_factor=4,
        image_token_id=49190,
        vision_config={
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 512, "patch_size": 16,
        },
        text_config={
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280, "pad_token_id": 2,
        },
    )  # fmt: skip
    with torch.device("meta"):
        model = Idefics3ForConditionalGeneration(config)
        total = sum(parameter.numel() for parameter in model.parameters())
        adapters = Adapters(model)
        adapters.add("policy", LoraConfig())
    trained = sum(parameter.numel() for parameter in adapters.parameters("policy").values())
    assert total > 2e8
    assert 0 < trained / total < 0.01


def test_initial_weights_depend_on_seed_and_name_alone(backbone: Backbone) -> None:
    first = Roles(backbone, LoraConfig(language_rank=4, vision_rank=4), seed=5)
    first.add("other")
    first.add("policy")
    second = Roles(load_backbone("tiny", device="cpu"), LoraConfig(language_rank=4, vision_rank=4), seed=5)
    torch.rand(17)
    second.add("policy")
    one, two = first.state("policy"), second.state("policy")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    third = Roles(load_backbone("tiny", device="cpu"), LoraConfig(language_rank=4, vision_rank=4), seed=6)
    third.add("policy")
    assert any(not torch.equal(one[key], value) for key, value in third.state("policy").items())


def test_heads_start_as_published(roles: Roles) -> None:
    roles.add("reward", head="reward")
    roles.add("value", head="value")
    width = roles.backbone.hidden_size
    assert roles.head("reward").weight.std().item() == pytest.approx((width + 1) ** -0.5, rel=0.2)
    assert roles.head("value").weight.abs().sum() == 0


def test_value_starts_from_the_reward_model(roles: Roles, batch: Sequences, scramble: Callable[..., None]) -> None:
    roles.add("reward", head="reward")
    scramble(roles, "reward")
    roles.add("value", head="value")
    roles.start_value_from_reward("value", "reward")
    reward, value = roles.state("reward"), roles.state("value")
    assert [t.tolist() for t in reward.values()] == [t.tolist() for t in value.values()]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_saved_roles_give_the_same_outputs_to_the_bit(
    tuning: str, backbone: Backbone, batch: Sequences, scramble: Callable[..., None], tmp_path: Path
) -> None:
    lora = LoraConfig(language_rank=4, vision_rank=2)
    roles = Roles(backbone, lora, tuning=tuning, seed=1)  # type: ignore[arg-type]
    roles.add("policy")
    roles.add("reward", head="reward")
    scramble(roles, "policy", scale=0.02)
    scramble(roles, "reward", seed=1, scale=0.02)
    roles.head("reward").normalise_(0.3, 1.7)
    with torch.no_grad():
        before = roles.logprobs("policy", batch).logprobs, roles.scores("reward", batch)
    roles.save("policy", tmp_path / "policy")
    roles.save("reward", tmp_path / "reward")
    fresh = Roles(load_backbone("tiny", device="cpu"), lora, tuning=tuning, seed=9)  # type: ignore[arg-type]
    # The other order than they were made in.
    fresh.load("reward", tmp_path / "reward", head="reward")
    fresh.load("policy", tmp_path / "policy")
    with torch.no_grad():
        after = fresh.logprobs("policy", batch).logprobs, fresh.scores("reward", batch)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_peft_itself_loads_a_saved_policy(
    roles: Roles, batch: Sequences, scramble: Callable[..., None], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from perl_vlm.models.backbone import TINY

    roles.add("policy")
    scramble(roles, "policy")
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": (batch.attention_mask.cumsum(1) - 1).clamp(min=0),
        **batch.extras,
    }
    with torch.no_grad(), roles.acting("policy") as model:
        ours = model(**inputs).logits
    roles.save("policy", tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(TINY, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    with torch.no_grad():
        out = theirs(**inputs).logits
    torch.testing.assert_close(ours, out, atol=1e-5, rtol=1e-5)


def test_supervised_adapter_under_every_role(roles: Roles, batch: Sequences, scramble: Callable[..., None]) -> None:
    roles.add("sft")
    scramble(roles, "sft")
    with torch.no_grad():
        tuned = roles.logprobs("sft", batch).logprobs
    roles.stack_sft()
    roles.add("policy")
    with torch.no_grad():
        assert torch.equal(roles.logprobs(REFERENCE, batch).logprobs, tuned)
        assert torch.equal(roles.logprobs("policy", batch).logprobs, tuned)
    with pytest.raises(PerlVlmError, match="before other roles"):
        roles.stack_sft()


def test_full_tuning_trains_a_copy_and_leaves_the_base(backbone: Backbone, batch: Sequences) -> None:
    roles = Roles(backbone, LoraConfig(), tuning="full")
    roles.add("policy")
    roles.add("value", head="value")
    before, base = outputs(roles, batch), digest(roles)
    train_steps(roles, batch, "policy")
    after = outputs(roles, batch)
    assert digest(roles) == base
    assert not torch.equal(before["policy"], after["policy"])
    assert torch.equal(before[REFERENCE], after[REFERENCE])
    assert torch.equal(before["value head"], after["value head"])
    assert sum(roles.counts("policy").values()) == backbone.parameter_count


def test_a_full_copy_of_a_narrow_base_multiplies_as_narrowly(batch: Sequences) -> None:
    roles = Roles(load_backbone("tiny", device="cpu", dtype="bfloat16"), LoraConfig(), tuning="full")
    roles.add("policy")
    roles.add("reward", head="reward")
    with roles.acting("policy") as model:
        assert torch.is_autocast_enabled("cpu")
        assert next(model.parameters()).dtype == torch.float32
    with roles.acting(REFERENCE):
        assert not torch.is_autocast_enabled("cpu")
    found = outputs(roles, batch)
    assert found["reward head"].dtype == torch.float32
    torch.testing.assert_close(found["policy"], found[REFERENCE], atol=0.1, rtol=0.05)
    before, base = outputs(roles, batch), digest(roles)
    train_steps(roles, batch, "reward")
    after = outputs(roles, batch)
    assert digest(roles) == base
    assert not torch.equal(before["reward head"], after["reward head"])
    assert torch.equal(before["policy"], after["policy"])


def test_weights_of_another_shape_are_refused(backbone: Backbone, roles: Roles, tmp_path: Path) -> None:
    roles.add("policy")
    state = roles.adapters.state("policy")
    first = next(iter(state))
    with pytest.raises(PerlVlmError, match="of another shape"):
        roles.adapters.load_state("policy", {**state, first: state[first][:1]})
    with pytest.raises(PerlVlmError, match="1 missing"):
        roles.adapters.load_state("policy", {key: value for key, value in state.items() if key != first})
    with pytest.raises(PerlVlmError, match=r"adapter_config\.json is missing"):
        roles.load("elsewhere", tmp_path)


def test_dropout_is_off_unless_training(backbone: Backbone, batch: Sequences, scramble: Callable[..., None]) -> None:
    roles = Roles(backbone, replace(LoraConfig(language_rank=4, vision_rank=4), dropout=0.5))
    roles.add("policy")
    scramble(roles, "policy")
    with torch.no_grad():
        one, two = (roles.logprobs("policy", batch).logprobs for _ in range(2))
        noisy = roles.logprobs("policy", batch, training=True).logprobs
    assert torch.equal(one, two)
    assert not torch.equal(one, noisy)
    assert not backbone.model.training


def test_a_role_is_refused_on_another_base_or_stack(
    roles: Roles, backbone: Backbone, scramble: Callable[..., None], tmp_path: Path
) -> None:
    roles.add("sft")
    scramble(roles, "sft")
    roles.save("sft", tmp_path / "sft")
    roles.stack_sft()
    roles.add("policy")
    roles.save("policy", tmp_path / "policy")
    bare = Roles(load_backbone("tiny", device="cpu"), LoraConfig(language_rank=4, vision_rank=4))
    with pytest.raises(PerlVlmError, match=r"--sft\.adapter"):
        bare.load("policy", tmp_path / "policy")
    with pytest.raises(PerlVlmError, match="holds a sft adapter, where a policy adapter was asked for"):
        bare.load("policy", tmp_path / "sft")
    other = load_backbone("tiny", device="cpu")
    with torch.no_grad():
        next(iter(other.model.parameters())).add_(1.0)
    with pytest.raises(PerlVlmError, match="trained on the base tiny"):
        Roles(other, LoraConfig(language_rank=4, vision_rank=4)).load("sft", tmp_path / "sft")
    bare.load("sft", tmp_path / "sft")
    bare.stack_sft()
    bare.load("policy", tmp_path / "policy")
    assert "policy" in bare


def test_the_fingerprint_does_not_depend_on_the_loaded_type(backbone: Backbone) -> None:
    from perl_vlm.models.roles import base_fingerprint

    small = load_backbone("tiny", device="cpu", dtype="bfloat16")
    assert base_fingerprint(Roles(backbone, LoraConfig())) == base_fingerprint(Roles(small, LoraConfig()))


def test_a_role_inside_another_hands_back(roles: Roles, batch: Sequences, scramble: Callable[..., None]) -> None:
    roles.lora = replace(roles.lora, dropout=0.5)
    roles.add("policy")
    roles.add("value", head="value")
    scramble(roles, "policy")
    with torch.no_grad():
        policy = roles.logprobs("policy", batch).logprobs
        ids = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.extras}
        with roles.acting("policy") as model:
            before = model(**ids).logits
            with roles.acting("value", training=True), roles.acting(REFERENCE):
                assert roles.adapters.active == ()
                assert roles.adapters.dropping == ()
            assert torch.equal(model(**ids).logits, before)
        with roles.acting("policy", training=True) as model:
            roles.values("value", batch)
            assert roles.adapters.active == roles.adapters.dropping == ("policy",)
            one, two = (model(**ids).logits for _ in range(2))
            assert not torch.equal(one, two), "dropout is on again"
            with pytest.raises(PerlVlmError), roles.acting(REFERENCE):
                raise PerlVlmError("on the way")
            assert roles.adapters.dropping == ("policy",)
        assert torch.equal(roles.logprobs("policy", batch).logprobs, policy)


def test_a_fully_tuned_role_inside_another_hands_back(backbone: Backbone) -> None:
    roles = Roles(backbone, LoraConfig(), tuning="full")
    roles.add("policy")
    roles.add("value", head="value")
    with roles.acting("policy", training=True) as policy:
        with roles.acting("value", training=True) as value:
            assert value.training
        assert policy.training
        assert not value.training
        with roles.acting("policy"):
            assert not policy.training
        assert policy.training
    assert not policy.training


def test_the_supervised_adapter_under_a_role_never_drops_out(
    backbone: Backbone, batch: Sequences, scramble: Callable[..., None], tmp_path: Path
) -> None:
    first = Roles(load_backbone("tiny", device="cpu"), LoraConfig(language_rank=2, vision_rank=2, dropout=0.5))
    first.add("sft")
    scramble(first, "sft")
    first.save("sft", tmp_path)
    with torch.no_grad():
        noisy = [first.logprobs("sft", batch, training=True).logprobs for _ in range(2)]
        assert not torch.equal(*noisy), "it drops out while it trains itself"
    roles = Roles(backbone, LoraConfig(language_rank=2, vision_rank=2, dropout=0.0))
    roles.load("sft", tmp_path)
    roles.stack_sft()
    roles.add("policy")
    with torch.no_grad():
        one, two = (roles.logprobs("policy", batch, training=True).logprobs for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    "saved",
    [
        LoraConfig(language_rank=4, vision_rank=2, alpha=64.0),
        LoraConfig(language_rank=4, vision_rank=2, alpha=8.0, rslora=True),
        LoraConfig(language_rank=4, vision_rank=2, alpha=64.0, dora=True),
    ],
    ids=["alpha", "rslora", "dora"],
)
def test_the_value_starts_as_a_reward_of_another_scaling(
    saved: LoraConfig, backbone: Backbone, batch: Sequences, scramble: Callable[..., None], tmp_path: Path
) -> None:
    first = Roles(load_backbone("tiny", device="cpu"), saved)
    first.add("reward", head="reward")
    scramble(first, "reward", scale=0.02)
    first.save("reward", tmp_path)
    roles = Roles(backbone, LoraConfig(language_rank=4, vision_rank=2, alpha=8.0, dora=saved.dora))
    roles.load("reward", tmp_path, head="reward")
    roles.add("value", head="value")
    assert roles.alike("value", "reward")
    roles.start_value_from_reward("value", "reward")
    with torch.no_grad():
        torch.testing.assert_close(roles.values("value", batch), roles.values("reward", batch), atol=1e-5, rtol=1e-4)
