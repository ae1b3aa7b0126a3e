"""Policy, value, reference and any number of reward models as roles of ONE frozen base.

A role is a set of active adapters plus, for some, a head. ``reference = {sft}``, ``policy = {sft, policy}``,
``value = {sft, value}`` with a head at every token, ``reward = {sft, reward}`` with a head at the last one; without a
supervised stage the sft set is empty. A value head may also sit on the policy's own trunk. With ``tuning="full"``
every trained role is a full copy of the base instead: the control group.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perl_vlm.config import LoraConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.formulas import last_valid
from perl_vlm.models import provenance
from perl_vlm.models.adapters import STACKED_DORA, Adapters, seed_adapter
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.forward import pooled_hidden, response_hidden, response_logits, response_states
from perl_vlm.models.heads import ScalarHead
from perl_vlm.models.logits import ResponseLogprobs, ResponseStates, divergence_of, logprobs_of
from perl_vlm.models.provenance import parameter_size
from perl_vlm.models.recomputing import recompute_layers
from perl_vlm.models.roles_io import REFERENCE, load_role, save_role
from perl_vlm.models.towers import TOWERS, tower_of
from perl_vlm.types import Sequences

__all__ = ["REFERENCE", "HeadKind", "Role", "Roles", "base_fingerprint", "frozen_parameters"]

HeadKind = Literal["value", "reward"]


@dataclass(frozen=True)
class Role:
    """How one role is computed."""

    adapters: tuple[str, ...]
    """Adapters active in its forward pass."""
    head: ScalarHead | None
    model: Any
    """The shared base, or with full tuning the role's own copy."""
    trunk: str | None = None
    """The role whose weights it computes with, where nothing but its head is its own."""


class Roles:
    """The roles of one run.

    Args:
        backbone: the frozen base.
        lora: adapter settings, the same for every role.
        tuning: ``lora``, or ``full`` for a float32 copy of the base in each trained role, which multiplies in bfloat16
            where the base is in bfloat16. Its language tower and its projector train; its vision tower does too unless
            ``lora.vision_rank`` is 0.
        seed: initial weights of a role depend on this and on the role's name alone.
    """

    def __init__(
        self, backbone: Backbone, lora: LoraConfig, *, tuning: Literal["lora", "full"] = "lora", seed: int = 0
    ) -> None:
        self.backbone, self.lora, self.tuning, self.seed = backbone, lora, tuning, seed
        self.adapters = Adapters(backbone.model)
        self._sft: tuple[str, ...] = ()
        self._nested, self._recomputing = 0, False
        self._roles: dict[str, Role] = {REFERENCE: Role((), None, backbone.model)}
        # Taken now: a base that is spread over processes later can be read by all of them together only.
        self.quantised = provenance.is_quantised(backbone.model)
        self.fingerprints = provenance.model_fingerprint(backbone.model), provenance.vectors_fingerprint(backbone.model)
        self._base_size = sum(parameter_size(value) for _, value in provenance.frozen_parameters(backbone.model))
        if tuning == "full" and self.quantised:
            raise PerlVlmError("a base in 4 bits cannot be trained in full; leave out --load_in_4bit, or use lora")

    def __contains__(self, name: str) -> bool:
        return name in self._roles

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._roles)

    # -- building ----------------------------------------------------------------------------------------------

    def add(self, name: str, *, head: HeadKind | None = None, outputs: int = 1) -> None:
        """Add a trainable role: a fresh adapter that changes nothing yet, and a head where asked for.

        Args:
            name: a name not in use; ``reward-0``, ``reward-1``, ... for the members of an ensemble.
            head: ``reward`` starts from small random weights, ``value`` from zero.
            outputs: of the head, one for each objective; set ``head(name).mix`` to weigh them.
        """
        self._check_new(name)
        generator = torch.Generator().manual_seed(_stable_seed(self.seed, name))
        new_head = None
        if head is not None:
            new_head = ScalarHead(self.backbone.hidden_size, outputs, generator if head == "reward" else None)
            if head == "reward" and self.backbone.head_start is not None:
                new_head.start_from(*self.backbone.head_start)
            new_head = new_head.to(self.backbone.device).requires_grad_(False)
        if self.tuning == "full":
            # float32: at usual learning rates most updates of a bfloat16 weight round to nothing.
            own = copy.deepcopy(self._roles[REFERENCE].model).float().requires_grad_(False)
            self._roles[name] = Role((), new_head, own)
            if self._recomputing:
                self._let_recompute(own)
            return
        self.adapters.add(name, self.lora, on=self._sft)
        seed_adapter(self.adapters, name, generator)
        self._roles[name] = Role((*self._sft, name), new_head, self.backbone.model)

    def recompute(self) -> None:
        """From here on every role's layers compute their activations again for backward; see ``recomputing``."""
        for model in {id(role.model): role.model for role in self._roles.values()}.values():
            self._let_recompute(model)
        self._recomputing = True

    @property
    def recomputing(self) -> bool:
        """Whether ``recompute`` was called."""
        return self._recomputing

    def _let_recompute(self, model: Any) -> None:
        """As ``recompute`` says, of a model that a role has for itself or all have in common."""
        text = model.config.get_text_config()

        def note() -> AbstractContextManager[None]:
            return self._as_it_was(
                model, self.adapters.active, self.adapters.dropping, model.training, text._attn_implementation
            )

        recompute_layers(model, note)

    @contextmanager
    def _as_it_was(
        self, model: Any, active: Sequence[str], dropping: Sequence[str], own_dropout: bool, attention: str
    ) -> Iterator[None]:
        """Within, a model works as it did when a forward pass went through it."""
        text = model.config.get_text_config()
        then, now = (active, dropping, own_dropout), (self.adapters.active, self.adapters.dropping, model.training)
        wanted, text._attn_implementation = text._attn_implementation, attention
        if then != now:
            self._act(model, *then)
        try:
            yield
        finally:
            text._attn_implementation = wanted
            if then != now:
                self._act(model, *now)

    def add_head_on(self, name: str, trunk: str) -> None:
        """Add a role that is nothing but a head of one output, zero at first, on the weights of role ``trunk``.

        Its loss trains the trunk too, as far as the trunk itself trains.
        """
        self._check_new(name)
        under = self.role(trunk)
        head = ScalarHead(self.backbone.hidden_size).to(self.backbone.device).requires_grad_(False)
        self._roles[name] = Role(under.adapters, head, under.model, trunk)

    def stack_sft(self) -> None:
        """Put the supervised adapter under every role from here on: the reference becomes ``{sft}``.

        Must come before other roles are added, since they are trained on top of it. Raises PerlVlmError where this
        run's adapters cannot stand on it: DoRA, and projector settings that exclude each other.
        """
        if set(self._roles) - {REFERENCE, "sft"}:
            raise PerlVlmError("the supervised adapter must be stacked before other roles are added")
        if self.tuning == "full":
            tuned = self._roles.pop("sft").model
            self._roles[REFERENCE] = Role((), None, tuned.requires_grad_(False))
            return
        if self.lora.dora or self.adapters.config("sft").use_dora:
            raise PerlVlmError(STACKED_DORA)
        self.adapters.check_projector("of this run", self.lora.projector)
        del self._roles["sft"]
        self._sft = ("sft",)
        self._roles[REFERENCE] = Role(self._sft, None, self.backbone.model)

    def start_value_from_reward(self, value: str, reward: str) -> None:
        """Give the value role the weights of a reward role and its head, objectives and constants folded into one
        output (the papers start the critic there)."""
        source, target = self.role(reward), self.role(value)
        if source.head is None or target.head is None:
            raise PerlVlmError(f"{reward} and {value} both need a head to copy")
        if target.trunk is not None:
            raise PerlVlmError(f"{value} is a head on {target.trunk}, whose weights are not the reward model's")
        if self.tuning == "full":
            target.model.load_state_dict(source.model.state_dict())
        else:
            self.adapters.copy(reward, value)
        target.head.load_state_dict(source.head.folded().state_dict())

    def alike(self, one: str, other: str) -> bool:
        """Whether two roles' adapters have the same layers and ranks, so that one can start from the other."""
        if self.tuning == "full":
            return True
        shapes = [{key: value.shape for key, value in self.adapters.state(name).items()} for name in (one, other)]
        return shapes[0] == shapes[1]

    def average(self, names: Sequence[str], target: str) -> None:
        """Add a frozen role whose weights are the mean of some roles' weights (WARM, Ramé et al., 2401.12187).

        Of LoRA the mean of the products B A is taken, exactly, as an adapter of the members' ranks together: the
        product of a mean A and a mean B is another matrix. Heads are averaged after each member's constants are folded
        in, so that no member outweighs another by its scale; mean and std of the result are 0 and 1, to be set anew.
        Raises PerlVlmError for DoRA, for roles without heads of one shape and for fewer than two roles.
        """
        self._check_new(target)
        heads = [self.head(name).normalised() for name in names]
        if len(names) < 2 or len({head.outputs for head in heads}) != 1:
            raise PerlVlmError(f"an average needs two or more roles with equal heads, got {', '.join(names) or 'none'}")
        head = ScalarHead(self.backbone.hidden_size, heads[0].outputs).to(self.backbone.device).requires_grad_(False)
        with torch.no_grad():
            for key, value in head.state_dict().items():
                value.copy_(torch.stack([each.state_dict()[key] for each in heads]).mean(dim=0))
            head.std.fill_(1.0)
        if self.tuning == "lora":
            self.adapters.attach_mean(names, target)
            self._roles[target] = Role((*self._sft, target), head, self.backbone.model)
            return
        own = copy.deepcopy(self.role(names[0]).model).requires_grad_(False)
        members = [self.role(name).model.state_dict() for name in names]
        for key, value in own.state_dict().items():
            if value.is_floating_point():
                value.zero_()
                for member in members:
                    value.add_(member[key], alpha=1 / len(members))
        self._roles[target] = Role((), head, own)

    # -- training ----------------------------------------------------------------------------------------------

    def train_only(self, *names: str) -> None:
        """Let exactly these roles' own weights and heads require gradients."""
        for name in names:
            self.role(name)
        for name, role in self._roles.items():
            if self.tuning == "full" and role.trunk is None and name != REFERENCE:
                role.model.requires_grad_(False)
            if role.head is not None:
                role.head.requires_grad_(name in names)
        if self.tuning == "full":
            for name in names:
                for parameter in self.parameters(name).values():
                    parameter.requires_grad_(True)
        else:
            self.adapters.train_only([name for name in names if name in self.adapters.names])

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """A role's own parameters, adapter (or copy) and head, by name, in a stable order."""
        role = self.role(name)
        own: dict[str, nn.Parameter] = {}
        if role.trunk is None and self.tuning == "lora":
            own = self.adapters.parameters(name)
        elif role.trunk is None:
            frozen = "vision" if self.lora.vision_rank == 0 else None
            own = {key: value for key, value in role.model.named_parameters() if tower_of(key) != frozen}
        if role.head is not None:
            own = {**own, **{f"head.{key}": value for key, value in role.head.named_parameters()}}
        return own

    def clear_gradients(self, name: str) -> None:
        """Forget the gradients of a role's own parameters."""
        for parameter in self.parameters(name).values():
            parameter.grad = None

    def counts(self, name: str) -> dict[str, int]:
        """Trainable parameters of a role by tower, and of its head."""
        counted = dict.fromkeys((*TOWERS, "head"), 0)
        for key, value in self.parameters(name).items():
            counted["head" if key.startswith("head.") else tower_of(key)] += value.numel()
        return counted

    def describe(self, name: str) -> str:
        """One line: what trains in a role, and its share of the base."""
        counted = self.counts(name)
        share = sum(counted.values()) / self._base_size
        parts = ", ".join(f"{tower} {number:,}" for tower, number in counted.items() if number)
        return f"{name}: {sum(counted.values()):,} trainable parameters ({share:.2%} of the base): {parts}"

    # -- computing ---------------------------------------------------------------------------------------------

    @contextmanager
    def acting(self, name: str, *, training: bool = False) -> Iterator[Any]:
        """The model as this role, until the block ends.

        Dropout is on only where ``training`` is asked for: with LoRA that on the inputs of the role's own adapter
        (``lora.dropout``) and no other, with full tuning the model's own. Inside another such block, the role of that
        block acts again afterwards; after the outermost one the adapters stay as they are until the next.
        """
        role = self.role(name)
        before = self.adapters.active, self.adapters.dropping, role.model.training
        own = [adapter for adapter in role.adapters if adapter not in self._sft]
        self._act(role.model, role.adapters, own if training else (), training and self.tuning == "full")
        self._nested += 1
        try:
            with self._arithmetic(role.model):
                yield role.model
        finally:
            self._nested -= 1
            if self._nested:
                self._act(role.model, *before)
            elif training:
                self._act(role.model, role.adapters, (), False)

    def _arithmetic(self, model: Any) -> AbstractContextManager[Any]:
        """A full copy holds float32 weights; where the base is in bfloat16, it multiplies in that too."""
        narrow = next(self.backbone.model.parameters()).dtype is torch.bfloat16
        mixed = self.tuning == "full" and narrow and model is not self.backbone.model
        return torch.autocast(self.backbone.device.type, torch.bfloat16) if mixed else nullcontext()

    def _act(self, model: Any, active: Sequence[str], dropping: Sequence[str], own_dropout: bool) -> None:
        self.adapters.activate(active)
        model.train(own_dropout)
        self.adapters.drop_out(dropping)

    def logits(
        self,
        name: str,
        sequences: Sequences,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        min_new_tokens: int = 0,
        training: bool = False,
    ) -> Tensor:
        """Logits of the distributions that the responses were drawn from, all at once: [B, R, V]. For small models."""
        self._need_language_model(name)
        with self.acting(name, training=training) as model:
            return response_logits(
                model, self.backbone, sequences, temperature=temperature, top_p=top_p, min_new_tokens=min_new_tokens
            )

    def logprobs(
        self,
        name: str,
        sequences: Sequences,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        min_new_tokens: int = 0,
        training: bool = False,
        value_head: str | None = None,
        divergence: str | None = None,
        entropy_gradient: bool = True,
    ) -> ResponseLogprobs:
        """Log-probs and entropies of the responses under a role, [B, R].

        ``value_head`` names a role added by ``add_head_on`` to this one: its values come from the same pass.
        ``divergence`` is a kind that ``divergence`` takes: the same pass serves it too. ``entropy_gradient``: whether
        gradients go through the entropies.
        """
        self._need_language_model(name)
        if value_head is not None and self.role(value_head).trunk != name:
            raise PerlVlmError(f"{value_head} is no head on {name}; its values come from values({value_head!r}, ...)")
        head = None if value_head is None else self.head(value_head)
        reference = None if divergence is None else self._reference_states(sequences)
        with self.acting(name, training=training) as model:
            own = response_states(model, self.backbone, sequences)
            out = logprobs_of(
                own, temperature=temperature, top_p=top_p, min_new_tokens=min_new_tokens, value_head=head,
                entropy_gradient=entropy_gradient,
            )  # fmt: skip
            if divergence is None or reference is None:
                return out
            away = divergence_of(divergence, own, reference, temperature=temperature, min_new_tokens=min_new_tokens)
            return out._replace(divergence=away)

    @torch.no_grad()
    def _reference_states(self, sequences: Sequences) -> ResponseStates:
        with self.acting(REFERENCE) as model:
            return response_states(model, self.backbone, sequences)

    def divergence(
        self,
        kind: str,
        name: str,
        sequences: Sequences,
        *,
        temperature: float = 1.0,
        min_new_tokens: int = 0,
        training: bool = False,
        chunk: int | None = None,
    ) -> Tensor:
        """The exact divergence of a role from the reference at each response token, [B, R]; zero outside the response.

        Gradients reach the role alone. ``kind`` is a name of ``formulas.exact_divergence``: ``reverse_kl``,
        ``forward_kl`` or ``js``.
        """
        self._need_language_model(name)
        reference = self._reference_states(sequences)
        with self.acting(name, training=training) as model:
            own = response_states(model, self.backbone, sequences)
            return divergence_of(
                kind, own, reference, temperature=temperature, min_new_tokens=min_new_tokens, chunk=chunk
            )

    def values(self, name: str, sequences: Sequences, *, training: bool = False) -> Tensor:
        """V(state before each response token), [B, R]; zero outside the response."""
        head = self.head(name)
        self._need_language_model(name)
        with self.acting(name, training=training) as model:
            predicted = head.value(response_hidden(model, self.backbone, sequences)[:, :-1])
        return torch.where(sequences.response_mask, predicted, torch.zeros_like(predicted))

    def raw_scores(self, name: str, sequences: Sequences, *, training: bool = False) -> Tensor:
        """The head's outputs for each whole response, before mean, std and mix: [B, O].

        A language model is read at the response's last token, an encoder or CLIP model through its pooled state.
        """
        head = self.head(name)
        with self.acting(name, training=training) as model:
            if self.backbone.kind != "causal":
                return head(pooled_hidden(model, self.backbone, sequences))
            hidden = response_hidden(model, self.backbone, sequences, ends=True)[:, 1:]
            last = last_valid(sequences.response_mask)
            return head(hidden[torch.arange(len(sequences), device=hidden.device), last])

    def scores(self, name: str, sequences: Sequences, *, training: bool = False) -> Tensor:
        """The reward of each whole response, [B]: outputs normalised by the head's constants and mixed."""
        return self.head(name).mixed(self.raw_scores(name, sequences, training=training))

    def _need_language_model(self, name: str) -> None:
        if self.backbone.kind != "causal":
            raise PerlVlmError(
                f"{self.backbone.name} is a model of kind {self.backbone.kind}: it scores whole sequences, but gives "
                f"no probabilities or values of tokens, which role {name} needs. Train a reward model (rm) with it"
            )

    # -- saving ------------------------------------------------------------------------------------------------

    def state(self, name: str) -> dict[str, Tensor]:
        """A role's own weights and its head's constants, on the CPU, for checkpoints."""
        return {key: value.detach().cpu().clone() for key, value in self._held(name).items()}

    @torch.no_grad()
    def load_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state`` gave. Raises PerlVlmError unless names and shapes fit exactly."""
        mine = self._held(name)
        differing = sorted(mine.keys() ^ state.keys())
        differing += sorted(key for key in mine.keys() & state.keys() if mine[key].shape != state[key].shape)
        if differing:
            raise PerlVlmError(f"the saved weights of {name} do not fit: {len(differing)} differ, as {differing[0]}")
        for key, tensor in mine.items():
            tensor.copy_(state[key].to(tensor))

    def _held(self, name: str) -> dict[str, Tensor]:
        head = self.role(name).head
        constants = {} if head is None else {f"head.{key}": value for key, value in head.named_buffers()}
        return {**self.parameters(name), **constants}

    def save(self, name: str, folder: Path) -> None:
        """Write a role for use elsewhere; see ``roles_io.save_role``."""
        save_role(self, name, folder)

    def load(self, name: str, folder: Path, *, head: HeadKind | None = None, complete: bool = False) -> None:
        """Add a role from what ``save`` wrote; see ``roles_io.load_role``."""
        self._check_new(name)
        if complete and self._sft:
            raise PerlVlmError(f"{folder} would bring a supervised adapter, and this run has one under every role")
        loaded = load_role(self, name, folder, with_head=head is not None, complete=complete)
        if loaded.trunk is not None:
            under = self.role(loaded.trunk)
            self._roles[name] = Role(under.adapters, loaded.head, under.model, loaded.trunk)
        elif loaded.model is None:
            self._roles[name] = Role((*self._sft, name), loaded.head, self.backbone.model)
        else:
            self._roles[name] = Role((), loaded.head, loaded.model)

    def stacked_on(self, name: str) -> tuple[str, ...]:
        """Adapters under a role's own: the supervised one, or none."""
        return tuple(adapter for adapter in self.role(name).adapters if adapter != name)

    def role(self, name: str) -> Role:
        """How a role is computed. Raises PerlVlmError for a name that is not one."""
        if name not in self._roles:
            raise PerlVlmError(f"there is no role named {name}; this run has {', '.join(self._roles)}")
        return self._roles[name]

    def _check_new(self, name: str) -> None:
        if name in self._roles:
            raise PerlVlmError(f"a role named {name} exists already")

    def head(self, name: str) -> ScalarHead:
        """The head of a value or reward role."""
        head = self.role(name).head
        if head is None:
            raise PerlVlmError(f"role {name} has no head and gives no scores or values")
        return head


def _stable_seed(seed: int, name: str) -> int:
    # Python's own hash of a string changes from process to process.
    return (seed * 1_000_003 + sum(ord(letter) * 31**place for place, letter in enumerate(name))) % (2**63)


def frozen_parameters(roles: Roles) -> Sequence[tuple[str, Tensor]]:
    """The base's own parameters, adapters and projector copies left out, under the names they had before any was
    attached."""
    return provenance.frozen_parameters(roles.backbone.model)


def base_fingerprint(roles: Roles) -> str:
    """Tells bases apart; see ``provenance.model_fingerprint``."""
    return roles.fingerprints[0]
