"""A stage's forward and backward passes on the meta device, and the most bytes that are alive in each.

What is alive before (weights, optimizer states, and gradients where they are there already) is not counted here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perl_vlm.errors import PerlVlmError
from perl_vlm.models.adapters import Adapters
from perl_vlm.models.block_attention import blockwise
from perl_vlm.models.fused_lora import FusedLinear
from perl_vlm.models.inspection import Skeleton
from perl_vlm.models.last_layer import only_at
from perl_vlm.models.loading import reason
from perl_vlm.models.recomputing import recompute_layers
from perl_vlm.models.shared_prefix import attention_masks, pack
from perl_vlm.models.towers import tower_of
from perl_vlm.plan.costs import Drawing, HeadCost, chunk_logits, drawing, head_cost
from perl_vlm.plan.dryrun import bump, joined, stand_ins
from perl_vlm.plan.inputs import on_meta, one_prompt, run_tower
from perl_vlm.plan.live import LiveBytes, held_by
from perl_vlm.plan.settings import Batch, Job
from perl_vlm.plan.shapes import Shapes

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
        """Let every model compute its layers' activations again in the backward pass."""
        # PyTorch calls backward with a function mode switched off: what is computed again enters it anew.
        for model in {id(role.model): role.model for role in self.roles.values()}.values():
            recompute_layers(model, lambda: stand_ins(self.narrow))

    # -- peaks -------------------------------------------------------------------------------------------------
    # Each in parts, one after the other: what a tower holds depends on its own layers, so that the peak of each part,
    # unlike the highest of them, grows along a line with the layers of either tower.

    def training_peaks(
        self, batch: Batch, graphs: Sequence[tuple[str, str]], *, with_gradients: bool
    ) -> tuple[int, ...]:
        """Forward and backward passes, one role's after the other's.

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
            for name, what in graphs:
                with stand_ins(self.narrow):
                    out = self._read(name, what, heads[name], batch, masks)
                self._mark()
                out.sum().backward()  # outside of autocast, as in the stages
                del out
                self._mark()
        for value in trained:
            value.grad = None
        return tuple(self._ends)

    @contextmanager
    def _counting(self, gradients: Sequence[Tensor] = ()) -> Iterator[LiveBytes]:
        """Count what comes to life besides all weights and these gradients."""
        self._head_cost()  # where it is not known yet it is measured, on tensors that are not to be counted
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
            with self._narrow(model, batch, ends=what == "scores"):
                hidden = self._responses(self._hidden(model, batch, masks), batch)
            if what == "scores":
                return nn.functional.linear(hidden[:, -1].float(), head)
            found = []
            if "logprobs" in what:
                found.append(self._logprobs(model, hidden, batch))
            if "values" in what:
                found.append(nn.functional.linear(hidden[:, :-1].float(), head).flatten())
            return torch.cat(found)

    def _narrow(self, model: Any, batch: Batch, *, ends: bool) -> AbstractContextManager[None]:
        """The last layer at the tokens alone that are read, as in packed rows."""
        if not batch.shared:
            return nullcontext()
        alone = one_prompt(batch)
        packed = pack(alone, 0)
        read = (packed.at_ends(alone) if ends else packed).read
        places = read + batch.length * torch.arange(batch.rows)[:, None]
        return only_at(model, torch.Size((batch.rows, batch.length)), places.flatten())

    def _logprobs(self, model: Any, hidden: Tensor, batch: Batch) -> Tensor:
        features = hidden[:, :-1].flatten(0, 1).clone()
        cost = self._head_cost()
        logits = chunk_logits(batch.response_tokens, self.shapes.vocabulary, self.job.device)
        kept = [torch.empty_like(features) for _ in range(cost.kept)]
        states = bump(features, int(cost.going * logits), int(cost.coming * logits), self._mark, *kept)
        if self.full and torch.is_grad_enabled():  # the head trains: its gradient comes into being here
            nn.functional.linear(states[:1], model.get_output_embeddings().weight)
            return nn.functional.linear(states, model.get_output_embeddings().weight[:1]).flatten()
        return states[:, 0].float()

    def _head_cost(self) -> HeadCost:
        how = drawing(self.job.config.ppo) if self.job.stage == "ppo" else Drawing()
        return head_cost(
            self.dtype, how, training=torch.is_grad_enabled(), frozen=not self.full and not self.job.sharded
        )

    def _responses(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[M, L, H] -> [B, R + 1, H]."""
        if not batch.shared:
            return hidden[:, -batch.response - 1 :]
        where = torch.empty(batch.sequences, batch.response + 1, dtype=torch.long, device="meta")
        return hidden.flatten(0, 1)[where]

    def _hidden(self, model: Any, batch: Batch, masks: Any) -> Tensor:
        embeds = self._embeds(model, batch)
        inputs: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": on_meta(masks, batch.rows)}
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
            return attention_masks(self.base, pack(one_prompt(batch), 0))
        seen = torch.ones(1, 1, batch.length, batch.length, dtype=torch.bool, device="meta")
        return seen if kinds <= {"full_attention"} else dict.fromkeys(kinds, seen)
