"""Named LoRA adapters on one model: attach, activate, save, load. Only this module and
``fused_lora`` import peft.

Adapters are never merged into the shared base: adding and subtracting them in bfloat16 rounds, and the reference and
the reward model would drift with every switch.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from perl_vlm.config import LoraConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.adapter_files import PREFIX, WEIGHTS_FILE, check_place, read_adapter
from perl_vlm.models.fused_layers import fuse_layers
from perl_vlm.models.fused_lora import fuse
from perl_vlm.models.loading import reason
from perl_vlm.models.provenance import is_quantised
from perl_vlm.models.targets import (
    alphas,
    check_projector,
    dropouts,
    exact_pattern,
    projector_modules,
    ranks,
    targets_by_tower,
)
from perl_vlm.models.towers import tower_of

STACKED_DORA = (
    "DoRA cannot be stacked on a supervised adapter, or under one: peft takes its norms of the base and a single "
    "adapter, and no longer those of the weights in use. Export the sft run merged (perl-vlm models export <run> --as "
    "merged --out DIR) and give that folder as --model, or leave out --lora.dora"
)


def peft_config(model: nn.Module, lora: LoraConfig) -> PeftLoraConfig:
    """The peft configuration for this model: one pattern a tower, each with its own rank and alpha.

    Dropout by tower is not in it, since peft has one for all: ``Adapters.add`` sets it. Raises PerlVlmError where the
    settings do not fit the model.
    """
    check_projector(model, lora)
    names = {tower: found for tower, found in targets_by_tower(model, lora).items() if found}
    patterns = {tower: exact_pattern(model, found) for tower, found in names.items()}
    others = [tower for tower in patterns if tower != "language"]
    return PeftLoraConfig(
        r=lora.language_rank,
        lora_alpha=alphas(lora)["language"],
        lora_dropout=lora.dropout,
        target_modules="|".join(f"({pattern})" for pattern in patterns.values()),
        rank_pattern={patterns[tower]: ranks(lora)[tower] for tower in others},
        alpha_pattern={patterns[tower]: alphas(lora)[tower] for tower in others},
        modules_to_save=_copied_projector(model) if lora.projector == "full" else None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )


def _copied_projector(model: nn.Module) -> list[str] | None:
    names = projector_modules(model)
    for name in names:
        if any(not value.is_floating_point() for value in model.get_submodule(name).parameters()):
            raise PerlVlmError(
                f"--lora.projector full trains a copy of {name}, but its weights are quantised; "
                "use --lora.projector adapted, or load the base without --load_in_4bit"
            )
    return names or None


class Adapters:
    """The LoRA adapters of one frozen model, by name, with a projector copy in those that train it in full.

    The model is changed in place (peft swaps its linear layers for wrapped ones) and goes on being called directly.
    With no adapter active it computes exactly what the untouched model did. Of several active adapters that hold a
    projector copy, the last one's is used: it was started from the one before it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        fuse_layers(model)
        self._peft: PeftModel | None = None
        self._trainable: tuple[str, ...] = ()
        self._active: tuple[str, ...] | None = None
        self._dropping: tuple[str, ...] = ()

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that take part in the forward pass."""
        return self._active or ()

    @property
    def dropping(self) -> tuple[str, ...]:
        """The adapters whose inputs are dropped out."""
        return self._dropping

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._peft.peft_config) if self._peft is not None else ()

    def config(self, name: str) -> PeftLoraConfig:
        """The peft configuration of an adapter."""
        return self._require(name).peft_config[name]

    def _layers(self) -> Iterator[tuple[str, LoraLayer]]:
        return ((name, module) for name, module in self.model.named_modules() if isinstance(module, LoraLayer))

    def _copies(self) -> Iterator[ModulesToSaveWrapper]:
        return (module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper))

    # -- attaching ---------------------------------------------------------------------------------------------

    def add(self, name: str, lora: LoraConfig, *, on: Sequence[str] = ()) -> None:
        """Attach a fresh adapter: B is zero, so it changes nothing until trained. A name in use is an error.

        ``on`` names the adapters that will be active under it: a projector copy starts as theirs. Raises PerlVlmError
        where the settings do not fit the model or the adapters that it has.
        """
        config = peft_config(self.model, lora)
        self.check_projector(name, lora.projector)
        self._attach(name, config)
        by_tower = dropouts(lora)
        for module_name, layer in self._layers():
            if name in layer.lora_A:
                rate = by_tower[tower_of(module_name)]
                layer.lora_dropout[name] = nn.Dropout(rate) if rate > 0 else nn.Identity()
        for copied in self._copies():
            below = [under for under in on if under in copied.modules_to_save]
            if name in copied.modules_to_save and below:
                copied.modules_to_save[name].load_state_dict(copied.modules_to_save[below[-1]].state_dict())
        self._assert_frozen(name, lora)

    def _assert_frozen(self, name: str, lora: LoraConfig) -> None:
        # Decided by tower and looked at again here: "freeze vision, then all-linear" must not re-open the tower.
        allowed = {tower for tower, rank in ranks(lora).items() if rank} | (
            {"projector"} if lora.projector == "full" else set()
        )
        for key in self.parameters(name):
            if tower_of(key) not in allowed:
                raise PerlVlmError(f"{key} would train, but the {tower_of(key)} tower is to stay frozen")

    def projector_mode(self, name: str) -> Literal["frozen", "adapted", "full"]:
        """What an adapter does to the projector, in the words of ``lora.projector``."""
        if self.config(name).modules_to_save:
            return "full"
        return "adapted" if any(tower_of(key) == "projector" for key in self.parameters(name)) else "frozen"

    def check_projector(self, name: str, mode: str) -> None:
        """Raise PerlVlmError where an adapter of this ``lora.projector`` cannot join those attached.

        One with matrices on the projector and one with a copy of it get in each other's way: peft would copy the
        matrices into the copy, or put matrices into every copy.
        """
        for other in self.names:
            there = self.projector_mode(other)
            if {there, mode} == {"adapted", "full"}:
                raise PerlVlmError(
                    f"adapter {other} was made with --lora.projector {there} and {name} with --lora.projector {mode}, "
                    "which cannot share a base: one adapts the projector that the other copies. Use "
                    f"--lora.projector {there} or frozen, or export the {other} run merged and give it as --model"
                )

    def _attach(self, name: str, config: PeftLoraConfig) -> None:
        if name in self.names:
            raise PerlVlmError(f"an adapter named {name} is attached already")
        try:
            self._inject(name, config)
        except BaseException:
            self.detach(name)
            raise

    def _inject(self, name: str, config: PeftLoraConfig) -> None:
        with warnings.catch_warnings():
            # peft asks transformers by a name that transformers is about to drop; nothing a user could act on.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            # It finds out by itself that GPT-2's Conv1D holds its weights transposed, and says so for every layer.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
            if self._peft is None:
                self._peft = PeftModel(self.model, config, adapter_name=name)
            else:
                self._peft.add_adapter(name, config)
        for copied in self._copies():
            if name in copied.modules_to_save:
                _in_float32(copied.modules_to_save[name])
        for _, layer in self._layers():
            fuse(layer)
        self._set_magnitudes(name)
        self._active = None
        self.activate(())

    def detach(self, name: str) -> None:
        """Take an adapter off again, as far as it is there. Without any left the model is as before the first one."""
        self.activate(())
        self._trainable = tuple(other for other in self._trainable if other != name)
        wrapped = [
            *self._layers(),
            *((key, module) for key, module in self.model.named_modules() if _is_copied(module)),
        ]
        for key, module in wrapped:
            if isinstance(module, ModulesToSaveWrapper):
                module.delete_adapter(name, None)
                left: Collection[str] = module.modules_to_save.keys()
            else:
                module.delete_adapter(name)
                module.lora_variant.pop(name, None)
                left = module.lora_A.keys() | module.lora_embedding_A.keys()
            if not left:
                outer, _, leaf = key.rpartition(".")
                inner = module.original_module if isinstance(module, ModulesToSaveWrapper) else module.get_base_layer()
                setattr(self.model.get_submodule(outer), leaf, inner)
        known = getattr(self.model, "peft_config", {})
        known.pop(name, None)
        if not known:
            self._peft = None
            if hasattr(self.model, "peft_config"):
                del self.model.peft_config
        self._active = None
        self.activate(())

    @torch.no_grad()
    def _set_magnitudes(self, name: str) -> None:
        """DoRA: magnitudes in float32, computed as the forward pass does, so that a fresh adapter changes nothing.
        peft computes them in the base's type."""
        for _, layer in self._layers():
            if name not in layer.lora_magnitude_vector:
                continue
            magnitude = layer.lora_magnitude_vector[name]
            weight = layer.get_base_layer().weight
            if weight.is_floating_point() and weight.dim() == 2 and not weight.is_meta:
                magnitude.weight.data = magnitude.get_weight_norm(
                    weight.float(), torch.zeros((), device=weight.device), 1
                )

    # -- choosing ----------------------------------------------------------------------------------------------

    def activate(self, names: Sequence[str]) -> None:
        """Let exactly these adapters take part in the forward pass; which ones train is not touched."""
        wanted = tuple(names)
        if self._peft is None or wanted == self._active:
            return
        for name in wanted:
            self._require(name)
        self.check_stack(wanted)
        for _, layer in self._layers():
            layer.set_adapter(list(wanted), inference_mode=True)
        for copied in self._copies():
            here = [name for name in wanted if name in copied.modules_to_save]
            copied.set_adapter(here[-1:], inference_mode=True)
        if self._trainable:
            self._peft.base_model.set_requires_grad(list(self._trainable), requires_grad=True)
        self._active = wanted

    def check_stack(self, names: Sequence[str]) -> None:
        """Raise PerlVlmError where these adapters cannot be active together."""
        if len(names) > 1 and any(self.config(name).use_dora for name in names):
            raise PerlVlmError(STACKED_DORA)

    def train_only(self, names: Sequence[str]) -> None:
        """Let exactly these adapters require gradients."""
        self._trainable = tuple(names)
        if self._peft is not None:
            self._peft.base_model.set_requires_grad(list(self.names), requires_grad=False)
            if self._trainable:
                self._peft.base_model.set_requires_grad(list(self._trainable), requires_grad=True)

    def drop_out(self, names: Sequence[str]) -> None:
        """Let exactly these adapters drop out their inputs. The base's own dropout stays off: a frozen base that
        changes from call to call helps nobody, and ``lora.dropout 0`` must mean none."""
        self._dropping = tuple(names)
        for _, layer in self._layers():
            for name, dropout in layer.lora_dropout.items():
                dropout.train(name in self._dropping)

    # -- weights -----------------------------------------------------------------------------------------------

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Everything that one adapter trains, by full name, in module order: A and B, DoRA's magnitudes, and its copy
        of the projector."""
        mark = _mark(name)
        return {key: value for key, value in self.model.named_parameters() if mark.search(key)}

    def state(self, name: str) -> dict[str, Tensor]:
        """The adapter's weights under peft's portable names, on the CPU."""
        self._require(name)
        return {key: value.detach().cpu().contiguous() for key, value in self._portable(name).items()}

    @torch.no_grad()
    def load_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Replace the adapter's weights. Raises PerlVlmError unless the names fit exactly."""
        self._require(name)
        mine = self._portable(name)
        missing, extra = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
        wrong = sorted(key for key in mine.keys() & state.keys() if mine[key].shape != state[key].shape)
        if missing or extra or wrong:
            raise PerlVlmError(
                f"weights for adapter {name} do not fit this model: {len(missing)} missing, {len(extra)} unknown, "
                f"{len(wrong)} of another shape; first: {(missing + extra + wrong)[0]}. They belong to another base "
                "model or to other --lora settings"
            )
        for key, value in mine.items():
            value.copy_(state[key])

    def _portable(self, name: str) -> dict[str, Tensor]:
        """Live tensors under peft's names. Made here rather than by peft, which drops the weights of every module that
        happens to be called like another adapter: BERT has modules named ``value``."""
        mark = _mark(name)
        found: dict[str, Tensor] = {}
        for key, value in self.model.named_parameters():
            match = mark.search(key)
            if match and match[1] != "modules_to_save":
                kept = mark.sub(rf".{match[1]}.", key).removesuffix(".")
                found[PREFIX + re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", kept)] = value
        for module_name, module in self.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
                own = module.modules_to_save[name].state_dict(keep_vars=True)
                found |= {f"{PREFIX}{module_name}.{key}": value for key, value in own.items()}
        return found

    def copy(self, source: str, target: str) -> None:
        """Let ``target`` change every weight as ``source`` does: its B make up for another scaling."""
        state = self.state(source)
        for module_name, layer in self._layers():
            key = f"{PREFIX}{module_name}.lora_B.weight"
            if key in state and target in layer.lora_A and layer.scaling[source] != layer.scaling[target]:
                state[key] = state[key] * (layer.scaling[source] / layer.scaling[target])
        self.load_state(target, state)

    # -- combining ---------------------------------------------------------------------------------------------

    def combined(
        self, weights: Mapping[str, float], *, copies: Literal["last", "mean"] = "last"
    ) -> tuple[PeftLoraConfig, dict[str, Tensor]]:
        """One plain LoRA adapter whose change of every weight is ``sum_i weights[i] * scaling_i * B_i A_i``, exactly.

        The A of the adapters are stacked and their scaled B put side by side, so ranks add up and the new scaling is
        1. Of projector copies the last is taken, as in ``activate``, or their weighted mean. Raises PerlVlmError for
        DoRA, which is no sum of matrices, and for adapters that hold anything else.
        """
        for name in weights:
            if self.config(name).use_dora:
                raise PerlVlmError(f"adapter {name} is DoRA: its change of a weight is no sum that others could join")
        state: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}
        for module_name, layer in self._layers():
            here = [name for name in weights if name in layer.lora_A]
            if not here:
                continue
            down = [layer.lora_A[name].weight.detach().cpu() for name in here]
            up = [layer.lora_B[name].weight.detach().cpu() * (layer.scaling[name] * weights[name]) for name in here]
            state[f"{PREFIX}{module_name}.lora_A.weight"] = torch.cat(down, dim=0).contiguous()
            state[f"{PREFIX}{module_name}.lora_B.weight"] = torch.cat(up, dim=1).contiguous()
            sizes[module_name] = sum(part.shape[0] for part in down)
        copied = tuple(f"{PREFIX}{module}." for module in projector_modules(self.model))
        others = {name: {key: value for key, value in self.state(name).items() if key not in state} for name in weights}
        for name, left in others.items():
            places = copied if self.config(name).modules_to_save else ()
            odd = [key for key in left if not key.startswith(places)]
            if odd:
                raise PerlVlmError(f"adapter {name} holds {odd[0]}, which cannot be put together with other adapters")
        whole = [left for left in others.values() if left]
        if whole:
            state |= whole[-1] if copies == "last" else _mean_of(whole, list(weights.values()))
        return self._plain_config(sizes, bool(whole)), state

    def _plain_config(self, sizes: Mapping[str, int], copies: bool) -> PeftLoraConfig:
        usual = Counter(sizes.values()).most_common(1)[0][0]
        other = {rank: [name for name, size in sizes.items() if size == rank] for rank in set(sizes.values()) - {usual}}
        pattern = {exact_pattern(self.model, names): rank for rank, names in sorted(other.items())}
        return PeftLoraConfig(
            r=usual,
            lora_alpha=usual,
            target_modules=exact_pattern(self.model, list(sizes)),
            rank_pattern=pattern,
            alpha_pattern=dict(pattern),
            modules_to_save=projector_modules(self.model) if copies else None,
        )

    def attach_mean(self, names: Sequence[str], target: str) -> None:
        """Attach a new adapter whose change of every weight is the mean of some adapters' changes."""
        config, state = self.combined(dict.fromkeys(names, 1 / len(names)), copies="mean")
        self._attach(target, config)
        self.load_state(target, state)

    @torch.no_grad()
    def merged_copy(self, names: Sequence[str], dtype: torch.dtype | None = None) -> Any:
        """A copy of the model with these adapters added into its weights, free of peft. The model itself is untouched.

        Each adapted weight is added up in float32 and rounded once to the type it had, or to ``dtype``, which then is
        the whole copy's. Raises PerlVlmError for a base in 4 bits.
        """
        if is_quantised(self.model):
            raise PerlVlmError(
                "adapters cannot be merged into a base in 4 bits; load the base in full (without --load_in_4bit)"
            )
        self.check_stack(names)
        # Layer by layer, and the adapters are not copied at all: the copy finds the merged modules made already.
        made: dict[int, Any] = {}
        for _, layer in self._layers():
            made[id(layer)] = _merged_layer(layer, names, dtype)
        for wrapper in self._copies():
            made[id(wrapper)] = _chosen_copy(wrapper, names, dtype)
        merged = copy.deepcopy(self.model, made)
        if hasattr(merged, "peft_config"):
            del merged.peft_config
        return (merged if dtype is None else merged.to(dtype)).eval().requires_grad_(False)

    # -- files -------------------------------------------------------------------------------------------------

    def save(self, name: str, folder: Path, *, base: str, revision: str | None) -> None:
        """Write the two files that ``PeftModel.from_pretrained`` reads, the config naming the base it belongs to."""
        write_adapter(folder, self.config(name), self.state(name), base=base, revision=revision)

    def load(self, name: str, folder: Path) -> None:
        """Attach an adapter that ``save`` (or peft) wrote. Nothing stays attached where that fails.

        Raises PerlVlmError for damaged files, an adapter of another model, and one that changes more of the base than
        low-rank matrices, DoRA and a copy of the whole projector do.
        """
        written, state = read_adapter(folder, vars(PeftLoraConfig()))
        layers = check_place(folder, self.model, written, state, projector_modules(self.model))
        if name in self.names:
            raise PerlVlmError(f"an adapter named {name} is attached already")
        adapted = any(tower_of(layer) == "projector" for layer in layers)
        self.check_projector(name, "full" if written.get("modules_to_save") else "adapted" if adapted else "frozen")
        try:
            config = PeftLoraConfig.from_pretrained(str(folder))
            config.inference_mode = False
            config.init_lora_weights = True  # the weights are replaced below; other ways to draw them cost time
            self._attach(name, config)
            self.load_state(name, state)
        except Exception as error:
            # peft and torch raise whatever comes up where numbers and names in the two files do not go together.
            self.detach(name)
            raise PerlVlmError(f"{folder / WEIGHTS_FILE} and its adapter_config.json: {reason(error)}") from error

    def _require(self, name: str) -> PeftModel:
        if self._peft is None or name not in self.names:
            raise PerlVlmError(f"no adapter named {name}; attached: {', '.join(self.names) or 'none'}")
        return self._peft


def _mark(name: str) -> re.Pattern[str]:
    """Finds the part of a parameter's name that says which adapter it belongs to."""
    kinds = "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save"
    return re.compile(rf"\.({kinds})\.{re.escape(name)}(?:\.|$)")


def _is_copied(module: nn.Module) -> bool:
    return isinstance(module, ModulesToSaveWrapper)


def _merged_layer(layer: LoraLayer, names: Sequence[str], dtype: torch.dtype | None) -> nn.Module:
    """A copy of a layer's base with some adapters added in float32, then in ``dtype`` or the type it had."""
    here = [name for name in names if name in layer.lora_A]
    if not here:
        return copy.deepcopy(layer.get_base_layer())
    own = copy.deepcopy(layer)
    base = own.get_base_layer()
    types = [(value, dtype or value.dtype) for value in base.parameters(recurse=False)]
    for value, _ in types:
        value.data = value.data.float()
    own.merge(adapter_names=here)
    for value, kept in types:
        value.data = value.data.to(kept)
    return base


def _chosen_copy(wrapper: ModulesToSaveWrapper, names: Sequence[str], dtype: torch.dtype | None) -> nn.Module:
    """A copy of the module that runs where these adapters are active, free of its casts."""
    here = [name for name in names if name in wrapper.modules_to_save]
    if not here:
        return copy.deepcopy(wrapper.original_module)
    own = copy.deepcopy(wrapper.modules_to_save[here[-1]])
    own._forward_pre_hooks.clear()
    own._forward_hooks.clear()
    return own.to(dtype or next(wrapper.original_module.parameters()).dtype)


def _mean_of(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    return {
        key: sum((weight * state[key].float() for weight, state in zip(weights, states, strict=True)), torch.zeros(()))
        for key in states[0]
    }


def _in_float32(module: nn.Module) -> None:
    """Hold a trained copy in float32, whatever the base's type, and give back the type that came in."""
    if all(value.dtype == torch.float32 for value in module.parameters()):
        return

    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, tuple | list):
            return type(value)(cast(part, dtype) for part in value)
        return value

    outside = next(module.parameters()).dtype
    module.float()
    module.register_forward_pre_hook(
        lambda _, args, kwargs: (
            cast(args, torch.float32),
            {key: cast(value, torch.float32) for key, value in kwargs.items()},
        ),
        with_kwargs=True,
    )
    module.register_forward_hook(lambda _, __, result: cast(result, outside))


def write_adapter(
    folder: Path, config: PeftLoraConfig, state: Mapping[str, Tensor], *, base: str, revision: str | None
) -> None:
    """Write an adapter as peft does."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    held = config.base_model_name_or_path, config.revision, config.inference_mode
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.base_model_name_or_path, config.revision, config.inference_mode = held


@torch.no_grad()
def seed_adapter(adapters: Adapters, name: str, generator: torch.Generator) -> None:
    """Draw the A matrices anew from ``generator`` (Kaiming uniform, as peft does), so that an adapter's start depends
    on its seed alone and not on what was attached before it. B stays zero."""
    for key, parameter in adapters.parameters(name).items():
        if "lora_A" in key:
            bound = (1.0 / parameter.shape[1]) ** 0.5
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
