"""Policy, value, reference and any number of reward models as roles of ONE frozen base.

A role is a set of active adapters plus, for some, a head. ``reference = {sft}``, ``policy = {sft, policy}``,
``value = {sft, value}`` with a head at every token, ``reward = {sft, reward}`` with a head at the last one; without a
supervised stage the sft set is empty. With ``tuning="full"`` every trained role is a full copy of the base instead:
the control group.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perl_vlm.config import LoraConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.formulas import last_valid, take_at
from perl_vlm.models.adapters import Adapters, seed_adapter
from perl_vlm.models.backbone import Backbone
from perl_vlm.models.forward import ResponseLogprobs, response_hidden, response_logits, response_logprobs
from perl_vlm.models.heads import ScalarHead
from perl_vlm.models.towers import TOWERS, tower_of
from perl_vlm.types import Sequences

REFERENCE = "reference"
HeadKind = Literal["value", "reward"]


@dataclass(frozen=True)
class Role:
    """How one role is computed."""

    adapters: tuple[str, ...]
    """Adapters active in its forward pass."""
    head: ScalarHead | None
    model: Any
    """The shared base, or with full tuning the role's own copy."""


class Roles:
    """The roles of one run.

    Args:
        backbone: the frozen base.
        lora: adapter settings, the same for every role.
        tuning: ``lora``, or ``full`` for a copy of the base in each trained role.
        seed: initial weights of a role depend on this and on the role's name alone.
    """

    def __init__(
        self, backbone: Backbone, lora: LoraConfig, *, tuning: Literal["lora", "full"] = "lora", seed: int = 0
    ) -> None:
        self.backbone, self.lora, self.tuning, self.seed = backbone, lora, tuning, seed
        self.adapters = Adapters(backbone.model)
        self._sft: tuple[str, ...] = ()
        self._roles: dict[str, Role] = {REFERENCE: Role((), None, backbone.model)}
        self._training: tuple[str, ...] = ()

    def __contains__(self, name: str) -> bool:
        return name in self._roles

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._roles)

    # -- building ----------------------------------------------------------------------------------------------

    def add(self, name: str, *, head: HeadKind | None = None) -> None:
        """Add a trainable role: a fresh adapter that changes nothing yet, and a head where asked for."""
        if name in self._roles:
            raise PerlVlmError(f"a role named {name} exists already")
        generator = torch.Generator().manual_seed(_stable_seed(self.seed, name))
        new_head = None
        if head is not None:
            drawn = ScalarHead(self.backbone.hidden_size, generator if head == "reward" else None)
            new_head = drawn.to(self.backbone.device).requires_grad_(False)
        if self.tuning == "full":
            # float32: at usual learning rates most updates of a bfloat16 weight round to nothing.
            own = copy.deepcopy(self._roles[REFERENCE].model).float().requires_grad_(False)
            self._roles[name] = Role((), new_head, own)
            return
        self.adapters.add(name, self.lora)
        seed_adapter(self.adapters, name, generator)
        self._roles[name] = Role((*self._sft, name), new_head, self.backbone.model)

    def stack_sft(self) -> None:
        """Put the supervised adapter under every role from here on: the reference becomes ``{sft}``.

        Must come before other roles are added, since they are trained on top of it.
        """
        if set(self._roles) - {REFERENCE, "sft"}:
            raise PerlVlmError("the supervised adapter must be stacked before other roles are added")
        if self.tuning == "full":
            tuned = self._roles.pop("sft").model
            self._roles[REFERENCE] = Role((), None, tuned.requires_grad_(False))
            return
        del self._roles["sft"]
        self._sft = ("sft",)
        self._roles[REFERENCE] = Role(self._sft, None, self.backbone.model)

    def start_value_from_reward(self, value: str, reward: str) -> None:
        """Give the value role the reward role's weights and head (the papers start the critic there)."""
        source, target = self._role(reward), self._role(value)
        if source.head is None or target.head is None:
            raise PerlVlmError(f"{reward} and {value} both need a head to copy")
        if self.tuning == "full":
            target.model.load_state_dict(source.model.state_dict())
        else:
            self.adapters.copy(reward, value)
        target.head.load_state_dict(source.head.state_dict())

    # -- training ----------------------------------------------------------------------------------------------

    def train_only(self, *names: str) -> None:
        """Let exactly these roles' own weights and heads require gradients."""
        for name in names:
            self._role(name)
        self._training = names
        for name, role in self._roles.items():
            wanted = name in names
            if role.head is not None:
                role.head.requires_grad_(wanted)
            if self.tuning == "full" and name != REFERENCE:
                role.model.requires_grad_(wanted)
        if self.tuning == "lora":
            self.adapters.train_only([name for name in names if name != REFERENCE])

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """A role's own parameters, adapter (or copy) and head, by name, in a stable order."""
        role = self._role(name)
        own = self.adapters.parameters(name) if self.tuning == "lora" else dict(role.model.named_parameters())
        if role.head is not None:
            own = {**own, **{f"head.{key}": value for key, value in role.head.named_parameters()}}
        return own

    def counts(self, name: str) -> dict[str, int]:
        """Trainable parameters of a role by tower, and of its head."""
        counted = dict.fromkeys((*TOWERS, "head"), 0)
        for key, value in self.parameters(name).items():
            counted["head" if key.startswith("head.") else tower_of(key)] += value.numel()
        return counted

    def describe(self, name: str) -> str:
        """One line: what trains in a role, and its share of the base."""
        counted = self.counts(name)
        share = sum(counted.values()) / self.backbone.parameter_count
        parts = ", ".join(f"{tower} {number:,}" for tower, number in counted.items() if number)
        return f"{name}: {sum(counted.values()):,} trainable parameters ({share:.2%} of the base): {parts}"

    # -- computing ---------------------------------------------------------------------------------------------

    @contextmanager
    def acting(self, name: str, *, training: bool = False) -> Iterator[Any]:
        """The model as this role, until the block ends. Dropout is on only where ``training`` is asked for."""
        role = self._role(name)
        self.adapters.activate(role.adapters)
        role.model.train(training)
        try:
            yield role.model
        finally:
            role.model.eval()

    def logits(
        self,
        name: str,
        sequences: Sequences,
        *,
        temperature: float = 1.0,
        min_new_tokens: int = 0,
        training: bool = False,
    ) -> Tensor:
        """Tempered logits of the responses under a role, [B, R, V]: for exact divergences and supervised learning."""
        with self.acting(name, training=training) as model:
            return response_logits(
                model, self.backbone, sequences, temperature=temperature, min_new_tokens=min_new_tokens
            )

    def logprobs(
        self,
        name: str,
        sequences: Sequences,
        *,
        temperature: float = 1.0,
        min_new_tokens: int = 0,
        training: bool = False,
    ) -> ResponseLogprobs:
        """Log-probs and entropies of the responses under a role, [B, R]."""
        with self.acting(name, training=training) as model:
            return response_logprobs(
                model, self.backbone, sequences, temperature=temperature, min_new_tokens=min_new_tokens
            )

    def values(self, name: str, sequences: Sequences, *, training: bool = False) -> Tensor:
        """V(state before each response token), [B, R]; zero outside the response."""
        head = self.head(name)
        with self.acting(name, training=training) as model:
            predicted = head(response_hidden(model, self.backbone, sequences)[:, :-1])
        return torch.where(sequences.response_mask, predicted, torch.zeros_like(predicted))

    def scores(self, name: str, sequences: Sequences, *, training: bool = False) -> Tensor:
        """The reward of each whole response, read at its last valid token, [B]."""
        head = self.head(name)
        with self.acting(name, training=training) as model:
            hidden = response_hidden(model, self.backbone, sequences)[:, 1:]
        return take_at(head(hidden), last_valid(sequences.response_mask))

    # -- saving ------------------------------------------------------------------------------------------------

    def state(self, name: str) -> dict[str, Tensor]:
        """A role's own weights, on the CPU, for checkpoints."""
        return {key: value.detach().cpu().clone() for key, value in self.parameters(name).items()}

    @torch.no_grad()
    def load_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Put back what ``state`` gave. Raises PerlVlmError unless names and shapes fit exactly."""
        mine = self.parameters(name)
        differing = sorted(mine.keys() ^ state.keys())
        differing += sorted(key for key in mine.keys() & state.keys() if mine[key].shape != state[key].shape)
        if differing:
            raise PerlVlmError(f"the saved weights of {name} do not fit: {len(differing)} differ, as {differing[0]}")
        for key, parameter in mine.items():
            parameter.copy_(state[key].to(parameter))

    def save(self, name: str, folder: Path) -> None:
        """Write a role for use elsewhere: a PEFT adapter (or with full tuning a whole model), the head beside it, and
        ``role.json``, which says what it belongs on."""
        role = self._role(name)
        folder.mkdir(parents=True, exist_ok=True)
        if self.tuning == "lora":
            self.adapters.save(name, folder, base=self.backbone.name, revision=self.backbone.revision)
        else:
            bare, role.model.generation_config = role.model.generation_config, self.backbone.generation_config
            role.model.save_pretrained(folder)
            role.model.generation_config = bare
            self.backbone.processor.save_pretrained(folder)
        if role.head is not None:
            role.head.save(folder / "head.safetensors")
        (folder / "role.json").write_text(json.dumps(self._belongs(name), indent=2) + "\n", encoding="utf-8")

    def load(self, name: str, folder: Path, *, head: HeadKind | None = None) -> None:
        """Add a role from what ``save`` wrote.

        Raises PerlVlmError where it belongs to another base, to another supervised adapter or to another kind of role.
        An adapter without ``role.json``, such as peft itself writes, is taken as it is.
        """
        if name in self._roles:
            raise PerlVlmError(f"a role named {name} exists already")
        self._check_belonging(name, folder)
        new_head = ScalarHead(self.backbone.hidden_size).to(self.backbone.device) if head else None
        if new_head is not None:
            new_head.load(folder / "head.safetensors")
            new_head.requires_grad_(False)
        if self.tuning == "lora":
            self.adapters.load(name, folder)
            self._roles[name] = Role((*self._sft, name), new_head, self.backbone.model)
            return
        if not (folder / "config.json").is_file():
            raise PerlVlmError(f"{folder} holds no full model: config.json is missing. Was it trained with lora?")
        base = self.backbone.model
        own = type(base).from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, attn_implementation=base.config._attn_implementation
        )
        own.generation_config = base.generation_config
        self._roles[name] = Role((), new_head, own.to(self.backbone.device).eval().requires_grad_(False))

    def _belongs(self, name: str) -> dict[str, str | None]:
        under = fingerprint(self.adapters.state("sft")) if self._sft and name != "sft" else None
        return {
            "role": name,
            "tuning": self.tuning,
            "base": self.backbone.name,
            "base_revision": self.backbone.revision,
            "base_fingerprint": base_fingerprint(self),
            "sft_fingerprint": under,
        }

    def _check_belonging(self, name: str, folder: Path) -> None:
        path = folder / "role.json"
        if not path.is_file():
            return
        written, mine = json.loads(path.read_text(encoding="utf-8")), self._belongs(name)
        if written.get("base_fingerprint") != mine["base_fingerprint"]:
            raise PerlVlmError(
                f"{folder} was trained on the base {written.get('base')}, whose weights are not those of "
                f"{self.backbone.name}; give --model {written.get('base')}"
            )
        if written.get("sft_fingerprint") != mine["sft_fingerprint"]:
            now = "another supervised adapter" if mine["sft_fingerprint"] else "no supervised adapter"
            raise PerlVlmError(
                f"{folder} was trained on top of {'a' if written.get('sft_fingerprint') else 'no'} supervised adapter, "
                f"but this run has {now} under it; name the right one in --sft.adapter"
            )
        kind = str(written.get("role"))
        if kind.split("-")[0] != name.split("-")[0] and {kind, name} != {"reward", "untrained"}:
            raise PerlVlmError(f"{folder} holds a {kind} adapter, where a {name} adapter was asked for")

    def _role(self, name: str) -> Role:
        if name not in self._roles:
            raise PerlVlmError(f"there is no role named {name}; this run has {', '.join(self._roles)}")
        return self._roles[name]

    def head(self, name: str) -> ScalarHead:
        """The head of a value or reward role."""
        head = self._role(name).head
        if head is None:
            raise PerlVlmError(f"role {name} has no head and gives no scores or values")
        return head


def _stable_seed(seed: int, name: str) -> int:
    # Python's own hash of a string changes from process to process.
    return (seed * 1_000_003 + sum(ord(letter) * 31**place for place, letter in enumerate(name))) % (2**63)


def frozen_parameters(roles: Roles) -> Sequence[tuple[str, Tensor]]:
    """The base's own parameters, adapters left out, under the names they had before any was attached."""
    return [
        (name.replace(".base_layer", ""), parameter)
        for name, parameter in roles.backbone.model.named_parameters()
        if ".lora_" not in name
    ]


def base_fingerprint(roles: Roles) -> str:
    """Tells bases apart by the first values of every weight, rounded so that the type they were loaded in is no
    matter. Cheap at any size; no proof against forgery."""
    return fingerprint({name: parameter.detach().flatten()[:16] for name, parameter in frozen_parameters(roles)})


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 over names, shapes and bfloat16 values."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().to(torch.bfloat16).contiguous()
        hasher.update(f"{name}{tuple(value.shape)}".encode())
        hasher.update(value.view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
