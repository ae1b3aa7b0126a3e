"""A stage's forward and backward passes on the meta device, and the most bytes that are alive in each.

What is alive before (weights, optimizer states, and gradients where they are there already) is not counted here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perl_vlm.config import LoraConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.adapters import Adapters
from perl_vlm.models.block_attention import blockwise
from perl_vlm.models.fused_lora import FusedLinear
from perl_vlm.models.inspection import Skeleton
from perl_vlm.models.loading import reason
from perl_vlm.models.sharding import base_layers
from perl_vlm.models.shared_prefix import attention_masks, pack
from perl_vlm.models.towers import TOWERS, Tower, tower_of
from perl_vlm.plan.costs import Drawing, chunk_logits, drawing, head_cost
from perl_vlm.plan.dryrun import bump, joined, stand_ins
from perl_vlm.plan.live import LiveBytes, held_by
from perl_vlm.plan.settings import Batch, Job
from perl_vlm.plan.shapes import Shapes, vision_layers
from perl_vlm.types import Sequences

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Rehearsed:
    """One role on the meta device."""

    model: Any
    adapters: tuple[str, ...]
    """Active ones; none where the model is the role's own copy."""
    own: tuple[nn.Parameter, ...]
    """What trains in it, its head left out."""


class Rehearsal:
    """The roles of a stage without numbers.

    Args:
        skeleton: the model; it is copied.
        shapes: its sizes.
        job: what is planned.

    Raises PerlVlmError where the settings do not fit the model.
    """

    def __init__(self, skeleton: Skeleton, shapes: Shapes, job: Job) -> None:
        self.job, self.shapes = job, shapes
        self.dtype = TYPES[job.dtype]
        self.base = copy.deepcopy(skeleton.model).to(self.dtype)
        if skeleton.name == "tiny" and job.device == "cpu":
            self.base.set_attn_implementation("eager")  # as load_backbone has it
        self.full = job.config.tuning == "full"
        self.narrow = self.dtype if self.full and self.dtype is torch.bfloat16 else None
        """What full copies multiply in (Roles._arithmetic); their backward passes run outside of it."""
        self.adapters = Adapters(self.base)
        self.below: tuple[str, ...] = ()
        self.roles: dict[str, Rehearsed] = {}
        self._ends: list[int] = []
        self._mark: Callable[[], None] = lambda: None
        self.vision_left_out = ""
        """Why the vision tower could not be run, where it could not."""
        if (job.config.sft.enabled or job.config.sft.adapter) and job.stage != "sft" and not self.full:
            self._attach("sft")
            self.below = ("sft",)

    def add(self, name: str) -> Rehearsed:
        """A trained role: an adapter, or with full tuning a float32 copy of the base."""
        if self.full:
            own = copy.deepcopy(self.base).float()
            frozen = "vision" if self.job.config.lora.vision_rank == 0 else None
            for key, value in own.named_parameters():
                value.requires_grad_(tower_of(key) != frozen)
            trained = tuple(value for value in own.parameters() if value.requires_grad)
            self.roles[name] = Rehearsed(own, (), trained)
        else:
            self._attach(name)
            trained = tuple(self.adapters.parameters(name).values())
            self.roles[name] = Rehearsed(self.base, (*self.below, name), trained)
        return self.roles[name]

    def _attach(self, name: str) -> None:
        self.adapters.add(name, self.job.config.lora, on=self.below)
        self.base.to("meta")  # peft makes its matrices on the CPU
        if self.job.config.load_in_4bit:  # layers in 4 bits go peft's own way
            for layer in self.base.modules():
                if type(layer) is FusedLinear:
                    layer.__class__ = FusedLinear.__base__

    @contextmanager
    def acting(self, name: str) -> Iterator[Any]:
        """The model as this role (``reference`` is the base), checkpointed where that is asked for."""
        role = self.roles.get(name) or Rehearsed(self.base, self.below, ())
        if not self.full:
            self.adapters.activate(role.adapters)
            # As the stages do it: PPO never drops out.
            learns = torch.is_grad_enabled() and self.job.stage != "ppo"
            self.adapters.drop_out([name] if learns and name in self.roles else [])
        yield role.model

    def checkpoint(self) -> None:
        """Let every model recompute its layers' activations in the backward pass, by transformers' own switches."""
        # PyTorch calls backward with a function mode switched off: what is computed again enters it anew.
        again = partial(
            checkpoint,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), stand_ins(self.narrow)),
        )
        for model in {id(role.model): role.model for role in self.roles.values()}.values():
            if not model.supports_gradient_checkpointing:
                raise PerlVlmError(f"{type(model).__name__} has no activation checkpointing; leave out --checkpointing")
            for layer in model.modules():
                if hasattr(layer, "gradient_checkpointing"):
                    layer.gradient_checkpointing = True
                    layer._gradient_checkpointing_func = again
            model.train()

    # -- peaks -------------------------------------------------------------------------------------------------
    # Each in parts, one after the other: what a tower holds depends on its own layers, so that the peak of each part,
    # unlike the highest of them, grows along a line with the layers of either tower.

    def training_peaks(
        self, batch: Batch, graphs: Sequence[tuple[str, str]], *, with_gradients: bool
    ) -> tuple[int, ...]:
        """Forward and backward passes whose graphs live at once.

        Args:
            batch: one micro-batch.
            graphs: roles and what is read of each: ``logprobs``, ``values``, ``scores`` or ``logprobs+values``.
            with_gradients: gradients are there before, of the micro-batch before.
        """
        trained = [value for name, _ in graphs for value in self.roles[name].own]
        if not self.full:
            self.adapters.train_only([name for name, _ in graphs])
        heads = {name: nn.Parameter(torch.zeros(1, self.shapes.hidden, device="meta")) for name, _ in graphs}
        for value in trained:
            value.grad = torch.empty_like(value) if with_gradients else None
        masks = self._masks(batch)
        with self._counting([value.grad for value in trained if value.grad is not None]):
            with stand_ins(self.narrow):
                outs = [self._read(name, what, heads[name], batch, masks) for name, what in graphs]
            torch.autograd.backward([out.sum() for out in outs])  # outside of autocast, as in the stages
        for value in trained:
            value.grad = None
        return tuple(self._ends)

    @contextmanager
    def _counting(self, gradients: Sequence[Tensor] = ()) -> Iterator[LiveBytes]:
        """Count what comes to life besides all weights and these gradients."""
        models = {id(role.model): role.model for role in self.roles.values()}
        with LiveBytes([*held_by(self.base, *models.values()), *gradients]) as live, ExitStack() as stack:
            for model in (self.base, *models.values()):  # until backward has computed everything again
                stack.enter_context(blockwise(model))
            before, self._ends = live.now, []

            def mark() -> None:
                """A part ends."""
                self._ends.append(live.peak - before)
                live.since()

            self._mark = mark
            yield live
            mark()

    @torch.no_grad()
    def scoring_peaks(self, batch: Batch, role: str, what: str) -> tuple[int, ...]:
        """A forward pass without gradients."""
        head = nn.Parameter(torch.zeros(1, self.shapes.hidden, device="meta"))
        masks = self._masks(batch)
        with self._counting(), stand_ins(self.narrow):
            self._read(role, what, head, batch, masks)
        return tuple(self._ends)

    @torch.no_grad()
    def reading_peaks(self, prompts: int) -> tuple[int, ...]:
        """The prompts of a rollout through the policy, the cache left out."""
        config = self.job.config
        alone = Batch(prompts, 1, config.max_prompt_tokens, 0, self.job.image_tokens)
        masks = self._masks(alone)
        with self._counting(), stand_ins(self.narrow), self.acting("policy") as model:
            self._hidden(model, alone, masks)
        return tuple(self._ends)

    # -- one pass ----------------------------------------------------------------------------------------------

    def _read(self, name: str, what: str, head: nn.Parameter, batch: Batch, masks: Any) -> Tensor:
        """A role's trunk, and of it what the stage reads, as one number for each token."""
        with self.acting(name) as model:
            hidden = self._responses(self._hidden(model, batch, masks), batch)
            if what == "scores":
                return nn.functional.linear(hidden[:, -1].float(), head)
            found = []
            if "logprobs" in what:
                found.append(self._logprobs(model, hidden, batch))
            if "values" in what:
                found.append(nn.functional.linear(hidden[:, :-1].float(), head).flatten())
            return torch.cat(found)

    def _logprobs(self, model: Any, hidden: Tensor, batch: Batch) -> Tensor:
        features = hidden[:, :-1].flatten(0, 1).clone()
        how = drawing(self.job.config.ppo) if self.job.stage == "ppo" else Drawing()
        cost = head_cost(self.dtype, how, training=torch.is_grad_enabled())
        logits = chunk_logits(batch.response_tokens, self.shapes.vocabulary)
        states = bump(features, int(cost.going * logits), int(cost.coming * logits))
        if self.full and torch.is_grad_enabled():  # the head trains: its gradient comes into being here
            nn.functional.linear(states[:1], model.get_output_embeddings().weight)
            return nn.functional.linear(states, model.get_output_embeddings().weight[:1]).flatten()
        return states[:, 0].float()

    def _responses(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[M, L, H] -> [B, R + 1, H]."""
        if not batch.shared:
            return hidden[:, -batch.response - 1 :]
        where = torch.empty(batch.sequences, batch.response + 1, dtype=torch.long, device="meta")
        return hidden.flatten(0, 1)[where]

    def _hidden(self, model: Any, batch: Batch, masks: Any) -> Tensor:
        embeds = self._embeds(model, batch)
        inputs: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": _on_meta(masks, batch.rows)}
        decoder = model.get_decoder() if self.shapes.kind == "causal" else model
        taken = inspect.signature(decoder.forward).parameters
        if "position_ids" in taken:
            shape = (batch.rows, batch.length)
            if hasattr(model.base_model, "get_rope_index"):
                shape = (3, *shape)  # type: ignore[assignment]
            inputs["position_ids"] = torch.zeros(shape, dtype=torch.long, device="meta")
        if "use_cache" in taken:
            inputs["use_cache"] = False
        try:
            hidden: Tensor = decoder(**inputs).last_hidden_state
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError) as error:
            raise PerlVlmError(
                f"{type(model).__name__} cannot be run without its weights, which is how the planner learns what it "
                f"keeps: {reason(error)}. Measure a short run instead"
            ) from error
        return hidden

    def _embeds(self, model: Any, batch: Batch) -> Tensor:
        """[M, L, H] of the tokens, pictures joined in."""
        ids = torch.empty(batch.rows, batch.length, dtype=torch.long, device="meta")
        embeds: Tensor = model.get_input_embeddings()(ids)
        if not batch.image_tokens or self.shapes.picture is None:
            return embeds
        seen = self._vision(model, batch)
        self._mark()
        if seen is None:
            seen = embeds.new_empty(0)
        trains = any(value.requires_grad for name, value in model.named_parameters() if tower_of(name) == "projector")
        if trains and not seen.requires_grad:
            seen.requires_grad_(torch.is_grad_enabled())
        return joined(embeds, seen, self._mark)

    def _vision(self, model: Any, batch: Batch) -> Tensor | None:
        """The vision tower's layers over the pictures of a batch; None where they could not be run."""
        assert self.shapes.picture is not None
        try:
            return run_tower(model, self.shapes, batch)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError) as error:
            self.vision_left_out = reason(error)
            return None

    def _masks(self, batch: Batch) -> Any:
        """What attention is masked with, for one row."""
        kinds = set(getattr(self.base.config.get_text_config(), "layer_types", None) or ())
        if batch.shared and self.job.device == "cpu":
            return attention_masks(self.base, pack(_one_prompt(batch), 0))
        seen = torch.ones(1, 1, batch.length, batch.length, dtype=torch.bool, device="meta")
        return seen if kinds <= {"full_attention"} else dict.fromkeys(kinds, seen)


_counted: WeakKeyDictionary[nn.Module, dict[LoraConfig, dict[Tower, int]]] = WeakKeyDictionary()


def adapter_counts(skeleton: Skeleton, lora: LoraConfig) -> dict[Tower, int]:
    """Parameters of one role's adapter (and projector copy) by tower. Raises PerlVlmError where it does not fit."""
    known = _counted.setdefault(skeleton.model, {})
    if lora not in known:
        adapters = Adapters(copy.deepcopy(skeleton.model))
        adapters.add("role", lora)
        known[lora] = dict.fromkeys(TOWERS, 0)
        for key, value in adapters.parameters("role").items():
            known[lora][tower_of(key)] += value.numel()
    return known[lora]


def shortened(skeleton: Skeleton, language: int, vision: int) -> Skeleton:
    """The same model with so many layers in each tower."""
    model = copy.deepcopy(skeleton.model)
    lists = [module for _, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for found, count in ((base_layers(model), language), (vision_layers(model), vision)):
        for layers in lists:
            if len(layers) == len(found) > count and layers[0] is found[0]:
                del layers[count:]
    return replace(skeleton, model=model)


def run_tower(model: Any, shapes: Shapes, batch: Batch) -> Tensor:
    """A vision tower's layers one after the other over all pictures of a batch, as the stage would run them."""
    picture = shapes.picture
    assert picture is not None
    patches = round(batch.image_tokens * picture.per_token)
    tiles, each = (max(1, -(-patches // picture.patches)), picture.patches) if picture.fixed else (1, patches)
    tiles *= batch.read_prompts
    layers = vision_layers(model)
    taken = inspect.signature(layers[0].forward).parameters
    extra: dict[str, Any] = {}
    weight = next(layers[0].parameters())
    if "cu_seqlens" in taken:
        extra["cu_seqlens"] = torch.arange(0, (tiles + 1) * each, each, dtype=torch.int32)
        hidden = weight.new_empty(tiles * each, shapes.vision_hidden)
    else:
        hidden = weight.new_empty(tiles, each, shapes.vision_hidden)
    if "position_embeddings" in taken:
        vision = model.config.vision_config
        heads = getattr(vision, "num_attention_heads", None) or vision.num_heads
        turned = weight.new_empty(hidden.shape[-2], shapes.vision_hidden // heads, dtype=torch.float32)
        extra["position_embeddings"] = (turned, turned)
    if "attention_mask" in taken:
        extra["attention_mask"] = None
    for layer in layers:
        out = layer(hidden, **extra)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden


def _one_prompt(batch: Batch) -> Sequences:
    """A prompt and its responses, at full length."""
    shape = (batch.group, batch.prompt + batch.response)
    ones = torch.ones(shape, dtype=torch.long)
    mask = torch.ones(batch.group, batch.response, dtype=torch.bool)
    return Sequences(ones, ones, mask, {}, (0,) * batch.group, prompt_of=(0,) * batch.group)


def _on_meta(masks: Any, rows: int) -> Any:
    """The masks of one row as those of several, on the meta device, blocks included."""
    if isinstance(masks, dict):
        return {kind: _on_meta(mask, rows) for kind, mask in masks.items()}
    made = torch.empty(rows, *masks.shape[1:], dtype=masks.dtype, device="meta")
    blocks = getattr(masks, "blocks", None)
    if blocks is not None:
        made.blocks = tuple(  # type: ignore[attr-defined]
            replace(block, bias=None if block.bias is None else _on_meta(block.bias, rows)) for block in blocks
        )
    return made
