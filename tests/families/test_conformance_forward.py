"""The conformance matrix, second part: forward passes. The first line of a test's docstring heads its column."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from perl_vlm.config import LoraConfig
from perl_vlm.data.images import BlankImage
from perl_vlm.data.sequences import take, token_extras, with_responses
from perl_vlm.errors import BadRecord
from perl_vlm.models import shared_prefix
from perl_vlm.models.forward import model_inputs
from perl_vlm.models.pictures import remembering_pictures, vision_tower
from perl_vlm.models.shared_prefix import refuse
from perl_vlm.models.towers import TOWERS, linear_names, lora_targets, tower_of
from perl_vlm.rollout.sampler import decode
from perl_vlm.types import Example, Sequences

# The tests take `bench` and `cell` from conftest.py, whose classes cannot be imported by name: tests are no package.
Bench = Any
Cell = Any

# transformers' PaliGemma processor and its gradient checkpointing, as peft asks for it, warn of their own affairs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]

# Where each family keeps its towers, written down by hand: the projector first, for Qwen-VL's is inside the tower.
PARTS: dict[str, tuple[str | None, str, str]] = {
    "idefics3": ("model.connector", "model.vision_model", "model.text_model"),
    "smolvlm": ("model.connector", "model.vision_model", "model.text_model"),
    "qwen2_vl": ("model.visual.merger", "model.visual", "model.language_model"),
    "qwen2_5_vl": ("model.visual.merger", "model.visual", "model.language_model"),
    "qwen3_vl": ("model.visual.merger", "model.visual", "model.language_model"),
    "llava": ("model.multi_modal_projector", "model.vision_tower", "model.language_model"),
    "llava_onevision": ("model.multi_modal_projector", "model.vision_tower", "model.language_model"),
    "paligemma": ("model.multi_modal_projector", "model.vision_tower", "model.language_model"),
    "gemma3_vl": ("model.multi_modal_projector", "model.vision_tower", "model.language_model"),
    "internvl": ("model.multi_modal_projector", "model.vision_tower", "model.language_model"),
    "open_clip_llama": ("model.multi_modal_projector", "model.vision_tower", "model.language_model"),
    "clip": (None, "clip.visual", "clip.transformer"),
}

# Classes that are attention and no more; open_clip's ResidualAttentionBlock has the feed-forward layers as well.
ATTENTION = re.compile(r"attention(?!block)", re.IGNORECASE)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=5e-5, rtol=5e-4)


def test_scores_and_logprobs_are_finite(bench: Bench, cell: Cell) -> None:
    """forward"""
    batch = bench.batch
    for what in bench.measures:
        found = bench.measure(what, batch)
        assert found.shape == ((len(batch), 1) if what == "scores" else batch.response_mask.shape)
        assert found.isfinite().all()
        assert found.std() > 1e-3
    if bench.generates:
        logits = bench.roles.logits("policy", batch).log_softmax(dim=-1)
        tokens = batch.input_ids[:, batch.prompt_width :, None]
        expected = logits.gather(2, tokens)[..., 0]
        found = bench.measure("logprobs", batch)
        close(found[batch.response_mask], expected[batch.response_mask])


def test_modules_belong_to_their_tower(bench: Bench, cell: Cell) -> None:
    """modules by tower"""
    model = bench.backbone.model
    for name, _ in model.named_parameters():
        expected = "language"
        if bench.sees:
            projector, vision, _ = PARTS[bench.name]
            merges = projector and name.startswith((projector, "model.visual.deepstack_merger_list"))
            expected = "projector" if merges else "vision" if name.startswith(vision) else "language"
        assert tower_of(name) == expected, name
    for tower in TOWERS:
        if (bench.name, tower) == ("gemma3_vl", "projector"):
            continue  # a bare matrix; see the training checks
        every = {name for name in linear_names(model) if tower_of(name) == tower}
        attention, everything = (
            set(lora_targets(model, tower, "attention")),
            set(lora_targets(model, tower, "all-linear")),
        )
        assert everything == every
        assert set(lora_targets(model, tower, r".*")) == every
        assert attention <= every
        if tower == "language" or (bench.sees and tower == "vision"):
            layers = (
                bench.backbone.model.get_submodule(PARTS[bench.name][1 if tower == "vision" else 2])
                if bench.sees
                else model
            )
            inside = {
                id(linear)
                for name, module in layers.named_modules()
                if ATTENTION.search(type(module).__name__) or name.endswith((".attn", ".self_attn"))
                for linear in module.modules()
            }
            own = {name for name in every if id(model.get_submodule(name)) in inside}
            assert attention == own
            assert own
            assert own < every


@torch.no_grad()
def test_pictures_change_what_is_computed(bench: Bench, cell: Cell) -> None:
    """black or swapped picture changes scores and log-probs"""
    if not bench.sees:
        return cell.not_applicable("sees no pictures")
    examples = bench.seen + [example for example in bench.several if example.images]
    whole = bench.all_measures(bench.together(examples))
    black = [bench.blacked(example) for example in examples]
    gray = [replace(e, images=tuple(BlankImage(image) for image in e.images)) for e in examples]
    # Of the same size, so that nothing but what is seen changes.
    swapped = [replace(e, images=tuple(replace(image, seed=image.seed + 100) for image in e.images)) for e in examples]
    turned = [replace(e, images=e.images[::-1]) for e in examples]
    for name, others in (("black", black), ("gray", gray), ("swapped", swapped), ("turned", turned)):
        for one, two in zip(whole, bench.all_measures(bench.together(others)), strict=True):
            change = (one - two).abs().max(dim=1).values
            for example, moved in zip(examples, change.tolist(), strict=True):
                if name != "turned" or (len(example.images) > 1 and bench.orders_pictures):
                    assert moved > 1e-4, f"{name} {example.id}"
                else:
                    assert moved < 1e-4, f"{name} {example.id}"


def test_padding_changes_nothing(bench: Bench, cell: Cell) -> None:
    """padding changes no score, log-prob, value"""
    examples = bench.seen
    batch = bench.together(examples)
    assert (batch.attention_mask.sum(dim=1) < batch.attention_mask.shape[1]).any()
    measured = bench.all_measures(batch)
    # What stands in the padding does not matter either, be it the token that ends a response.
    filled = replace(
        batch, input_ids=batch.input_ids.where(batch.attention_mask.bool(), torch.tensor(bench.backbone.eos_ids[0]))
    )
    for found, other in zip(measured, bench.all_measures(filled), strict=True):
        mask = batch.response_mask if found.shape[1] > 1 else slice(None)
        close(other[mask], found[mask])
    for row, example in enumerate(examples):
        single = bench.together([example])
        for found, alone in zip(measured, bench.all_measures(single), strict=True):
            close(found[row, : alone.shape[1]], alone[0])


def test_rows_with_and_without_pictures_mix(bench: Bench, cell: Cell) -> None:
    """rows without a picture, alone and mixed"""
    if not bench.sees:
        return cell.not_applicable("sees no pictures")
    if bench.family.kind == "clip":
        with pytest.raises(BadRecord, match="plain 0: it has no image"):
            bench.renderer.prompts([*bench.seen, bench.plain[0]])
        return cell.not_applicable("compares a text with a picture, and refuses a record without one")
    if not bench.reads_plain:
        mixed = [*bench.seen, bench.plain[0]]
        with cell.fails("every prompt needs a picture", "plain 0.*images.*expected"):
            bench.renderer.prompts(mixed)
        return None
    mixed = [bench.plain[1], *bench.seen, *bench.plain]
    batch = bench.together(mixed)
    measured = bench.all_measures(batch)
    alone = [bench.all_measures(bench.together([example])) for example in mixed]
    plain = bench.all_measures(bench.together(bench.plain))
    for at, found in enumerate(measured):
        for row in range(len(mixed)):
            single = alone[row][at][0]
            close(found[row, : len(single)], single)
        tail = plain[at].shape[1]
        mask = batch.response_mask[-3:, :tail] if tail > 1 else slice(None)
        close(found[-3:, :tail][mask], plain[at][mask])


def test_two_pictures_in_a_row(bench: Bench, cell: Cell) -> None:
    """two pictures in one row"""
    if not bench.sees:
        return cell.not_applicable("sees no pictures")
    batch = bench.together(bench.several)
    assert set(batch.image_counts) >= {1, 2}
    measured = bench.all_measures(batch)
    for row, example in enumerate(bench.several):
        for found, alone in zip(measured, bench.all_measures(bench.together([example])), strict=True):
            close(found[row, : alone.shape[1]], alone[0])


def test_sampled_logprobs_are_those_recomputed(bench: Bench, cell: Cell) -> None:
    """sampled log-probs recomputed"""
    if not bench.generates:
        return cell.not_applicable("generates nothing")
    groups = [bench.rows, bench.plain, bench.seen] if bench.reads_plain else [bench.rows, bench.seen]
    for seed, examples in enumerate(groups):
        prompts = bench.renderer.prompts(examples)
        drawn = decode(
            bench.roles, "policy", prompts, max_new_tokens=8, temperature=1.3,
            seeds=[100 * seed + row for row in range(len(examples))],
        )  # fmt: skip
        sequences = with_responses(prompts, drawn.tokens, bench.backbone.pad_id)
        with torch.no_grad():
            again = bench.roles.logprobs("policy", sequences, temperature=1.3, min_new_tokens=1).logprobs
        close(again[sequences.response_mask], drawn.logprobs[sequences.response_mask])


# -- token types and positions -------------------------------------------------------------------------------------


def whole_text_types(bench: Bench, example: Example, ids: list[int]) -> torch.Tensor | None:
    """Token types that the family's own processor gives to a prompt together with its response."""
    owner, text = bench.backbone.processor, bench.renderer.prompt_text(example.messages)
    if not bench.generates:
        return owner(text, f" {example.reference}", return_tensors="pt").get("token_type_ids")
    images = {"images": [[source.load() for source in example.images]]} if example.images else {}
    if bench.name == "paligemma":
        # Its processor writes a suffix behind the line break that ends the prefix, and an end token behind that.
        made = owner(text=[text], suffix=[f" {example.reference}"], return_tensors="pt", **images)
    else:
        tail = bench.backbone.tokenizer.decode(ids)
        made = owner(text=[text + tail], return_tensors="pt", add_special_tokens=False, **images)
        if made["input_ids"].shape[1] < len(ids) + 3:
            return None
    return next((made[key] for key in made if key.endswith("token_type_ids")), None)


def test_token_types_reach_over_the_response(bench: Bench, cell: Cell) -> None:
    """token types over padding and response"""
    examples, batch = bench.rows, bench.batch
    if not any(key.endswith("token_type_ids") for key in batch.extras) and bench.name != "modernbert":
        return cell.not_applicable("has no token types")
    if not bench.generates:
        given = captured(bench, batch)
        if "token_type_ids" not in given:
            return cell.not_applicable("has no token types")
    else:
        inputs = model_inputs(bench.backbone.model, bench.backbone, batch)
        given = {key: value for key, value in inputs.items() if key.endswith("token_type_ids")}
        given["attention_mask"] = inputs["attention_mask"]
    ((_, types),) = [(key, value) for key, value in given.items() if key.endswith("token_type_ids")]
    assert types.shape == given["attention_mask"].shape
    for row, example in enumerate(examples):
        ids = batch.input_ids[row, batch.prompt_width :][batch.response_mask[row]].tolist()
        own = whole_text_types(bench, example, ids)
        assert own is not None
        mine = types[row][given["attention_mask"][row].bool()]
        assert mine.tolist() == own[0].tolist(), example.id
    return None


@contextmanager
def listening(module: nn.Module, heard: list[dict[str, Any]]) -> Iterator[None]:
    hook = module.register_forward_pre_hook(lambda _, arguments, named: heard.append(dict(named)), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def captured(bench: Bench, batch: Sequences) -> dict[str, Any]:
    """What the decoder (of an encoder: the model) is called with while a batch is measured."""
    own, heard = bench.roles.backbone.model, []
    trunk = own.get_submodule(PARTS[bench.name][2]) if bench.sees else own.base_model
    with listening(trunk, heard), rows_of_their_own(own):
        bench.measure("scores", batch)
    return heard[-1]


@contextmanager
def rows_of_their_own(model: Any) -> Iterator[None]:
    """Within, no two sequences share a row."""
    known = dict(shared_prefix._verdicts.get(model, {}))
    refuse(model, "rows of their own are wanted")
    try:
        yield
    finally:
        shared_prefix._verdicts[model] = known


def test_positions_count_real_tokens(bench: Bench, cell: Cell) -> None:
    """positions (M-RoPE) over padding and response"""
    if not bench.generates:
        return cell.not_applicable("rows are padded on the right and positions counted by the model")
    batch = bench.batch
    positions = captured(bench, batch)["position_ids"]
    model = bench.roles.backbone.model
    if not hasattr(model.base_model, "get_rope_index"):
        for row in range(len(batch)):
            real = positions[row][batch.attention_mask[row].bool()]
            assert (real - real[0]).tolist() == list(range(len(real)))
            assert real[0] in (0, 1)
        return None
    spreads = 0
    for row, example in enumerate(bench.rows):
        single = bench.together([example])
        types = token_extras(single)["mm_token_type_ids"]
        own, _ = model.base_model.get_rope_index(
            single.input_ids, mm_token_type_ids=types, image_grid_thw=single.extras.get("image_grid_thw"),
            attention_mask=single.attention_mask,
        )  # fmt: skip
        real = batch.attention_mask[row].bool()
        assert positions[-3:, row][:, real].tolist() == own[:, 0].tolist(), example.id
        spreads += int((own[0] != own[2]).any())
        taken = captured(bench, take(batch, [row])).get("position_ids")
        assert taken is None or taken[-3:, 0].tolist() == own[:, 0].tolist()
    assert spreads == sum(bool(example.images) for example in bench.rows)
    return None


def test_prompts_are_read_once_for_all_their_responses(bench: Bench, cell: Cell) -> None:
    """a pair reads its prompt once"""
    if not bench.generates:
        return cell.not_applicable("reads prompt and response as one text")
    pairs, _ = bench.collator.comparisons(bench.comparisons(bench.rows))
    found, expected = [], []
    for measured in (found, expected):
        roles = bench.new_roles()
        if measured is expected:
            refuse(roles.backbone.model, "rows of their own are wanted")
        with counted_tokens(roles.backbone.model) as tokens:
            values = bench.all_measures(pairs, roles)
        roles.train_only("reward")
        roles.raw_scores("reward", pairs, training=True).sum().backward()
        gradients = [parameter.grad for parameter in roles.parameters("reward").values()]
        assert sum(gradient is not None for gradient in gradients) > len(gradients) / 2
        measured += [*values, *(gradient for gradient in gradients if gradient is not None)]
        # The first of the passes compares the two ways and the head is learnt on one row; the last is a plain pass.
        if measured is found:
            known = shared_prefix._verdicts[roles.backbone.model].values()
            assert any(one.length for one in known), "compared on the first batch"
            assert not any(one.refused for one in known), "and found the same"
            assert tokens[-1] < pairs.input_ids.numel()
        else:
            assert tokens[-1] == pairs.input_ids.numel()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=5e-5 * max(1.0, other.abs().max().item()), rtol=5e-4)


@torch.no_grad()
def test_a_frozen_tower_runs_once_for_a_batch(bench: Bench, cell: Cell) -> None:
    """a frozen tower runs once for a batch"""
    if not bench.sees:
        return cell.not_applicable("sees no pictures")
    if not bench.generates:
        return cell.not_applicable("its reward models alone read a batch")
    if bench.family.has_parts:
        return cell.not_applicable("open_clip's tower is read part by part and runs for every role")
    roles = bench.new_roles(LoraConfig(language_rank=4, vision_rank=0, targets="all-linear"))
    model, runs = roles.backbone.model, []
    expected = bench.all_measures(bench.batch, roles)
    tower = vision_tower(model)
    first = next(module for module in tower.modules() if isinstance(module, nn.ModuleList))[0]
    handle = first.register_forward_hook(lambda *_: runs.append(None))
    with remembering_pictures(model):
        found = bench.all_measures(bench.batch, roles)
    once = len(runs)
    bench.all_measures(bench.batch, roles)
    handle.remove()
    assert len(runs) - once == len(bench.measures) * once, "and as often as it is asked elsewhere"
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@contextmanager
def counted_tokens(model: Any) -> Iterator[list[int]]:
    """Cells of each batch that goes through the language tower's first layer."""
    counts: list[int] = []
    layers = next(module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    handle = layers[0].register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[:2].numel()))
    try:
        yield counts
    finally:
        handle.remove()
