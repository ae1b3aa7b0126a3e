"""Named LoRA adapters on one model: attach, activate, save, load. The only module that imports peft.

Adapters are never merged into the shared base: adding and subtracting them in bfloat16 rounds, and the reference and
the reward model would drift with every switch.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perl_vlm.config import LoraConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.towers import Tower, lora_targets, pattern_of


def ranks(lora: LoraConfig) -> dict[Tower, int]:
    """The adapter rank of each tower, 0 where it stays frozen."""
    projector = lora.language_rank if lora.projector == "adapted" else 0
    return {"vision": lora.vision_rank, "projector": projector, "language": lora.language_rank}


def peft_config(model: nn.Module, lora: LoraConfig) -> PeftLoraConfig:
    """The peft configuration for this model: one pattern a tower, each with its own rank and alpha."""
    by_tower = {tower: lora_targets(model, tower, lora.targets) for tower, rank in ranks(lora).items() if rank}
    patterns = {tower: pattern_of(names) for tower, names in by_tower.items() if names}
    if "language" not in patterns:
        raise PerlVlmError(
            f"no {lora.targets} linear layer was found in the language tower of {type(model).__name__}; "
            "try --lora.targets all-linear"
        )
    alphas = {tower: 2.0 * rank if lora.alpha is None else lora.alpha for tower, rank in ranks(lora).items()}
    others = [tower for tower in patterns if tower != "language"]
    return PeftLoraConfig(
        r=lora.language_rank,
        lora_alpha=alphas["language"],
        lora_dropout=lora.dropout,
        target_modules="|".join(f"({pattern})" for pattern in patterns.values()),
        rank_pattern={patterns[tower]: ranks(lora)[tower] for tower in others},
        alpha_pattern={patterns[tower]: alphas[tower] for tower in others},
    )


class Adapters:
    """The LoRA adapters of one frozen model, by name.

    The model is changed in place (peft swaps its linear layers for wrapped ones) and goes on being called directly.
    With no adapter active it computes exactly what the untouched model did.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._peft: PeftModel | None = None
        self._trainable: tuple[str, ...] = ()
        self._active: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._peft.peft_config) if self._peft is not None else ()

    def add(self, name: str, lora: LoraConfig) -> None:
        """Attach a fresh adapter: B is zero, so it changes nothing until trained. A name in use is an error."""
        self._attach(name, peft_config(self.model, lora))

    def _attach(self, name: str, config: PeftLoraConfig) -> None:
        if name in self.names:
            raise PerlVlmError(f"an adapter named {name} is attached already")
        with warnings.catch_warnings():
            # peft asks transformers by a name that transformers is about to drop; nothing a user could act on.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            if self._peft is None:
                self._peft = PeftModel(self.model, config, adapter_name=name)
            else:
                self._peft.add_adapter(name, config)
        self._active = None
        self.activate(())

    def activate(self, names: Sequence[str]) -> None:
        """Let exactly these adapters take part in the forward pass; which ones train is not touched."""
        wanted = tuple(names)
        if self._peft is None or wanted == self._active:
            return
        tuner = self._peft.base_model
        tuner.set_adapter(list(wanted), inference_mode=True)
        if self._trainable:
            tuner.set_requires_grad(list(self._trainable), requires_grad=True)
        self._active = wanted

    def train_only(self, names: Sequence[str]) -> None:
        """Let exactly these adapters require gradients."""
        self._trainable = tuple(names)
        if self._peft is not None:
            self._peft.base_model.set_requires_grad(list(self.names), requires_grad=False)
            if self._trainable:
                self._peft.base_model.set_requires_grad(list(self._trainable), requires_grad=True)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter by full name, in module order."""
        marks = (f".lora_A.{name}.", f".lora_B.{name}.", f".lora_embedding_A.{name}", f".lora_embedding_B.{name}")
        return {key: value for key, value in self.model.named_parameters() if any(mark in key for mark in marks)}

    def state(self, name: str) -> dict[str, Tensor]:
        """The adapter's weights under peft's portable names, on the CPU."""
        state = get_peft_model_state_dict(self._require(name), adapter_name=name, save_embedding_layers=False)
        return {key: value.detach().cpu().contiguous() for key, value in state.items()}

    def load_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Replace the adapter's weights. Raises PerlVlmError unless the names fit exactly."""
        mine = self.state(name)
        missing, extra = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
        wrong = sorted(key for key in mine.keys() & state.keys() if mine[key].shape != state[key].shape)
        if missing or extra or wrong:
            raise PerlVlmError(
                f"weights for adapter {name} do not fit this model: {len(missing)} missing, {len(extra)} unknown, "
                f"{len(wrong)} of another shape; first: {(missing + extra + wrong)[0]}. They belong to another base "
                "model or to other --lora settings"
            )
        set_peft_model_state_dict(self._require(name), dict(state), adapter_name=name)
        self._active = None
        self.activate(())

    def copy(self, source: str, target: str) -> None:
        """Give ``target`` the weights of ``source``."""
        self.load_state(target, self.state(source))

    def save(self, name: str, folder: Path, *, base: str, revision: str | None) -> None:
        """Write the two files that ``PeftModel.from_pretrained`` reads, the config naming the base it belongs to."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state(name), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = self._require(name).peft_config[name]
        held = config.base_model_name_or_path, config.revision, config.inference_mode
        config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
        try:
            config.save_pretrained(str(folder))
        finally:
            config.base_model_name_or_path, config.revision, config.inference_mode = held

    def load(self, name: str, folder: Path) -> None:
        """Attach an adapter that ``save`` (or peft) wrote. PerlVlmError for one that is more than plain LoRA."""
        for needed in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / needed).is_file():
                raise PerlVlmError(f"{folder} holds no adapter: {needed} is missing")
        written = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if written.get("peft_type") != "LORA":
            raise PerlVlmError(f"{folder} holds a {written.get('peft_type')} adapter; only LORA can be stacked here")
        _check_plain(folder, written)
        config = PeftLoraConfig.from_pretrained(str(folder))
        config.inference_mode = False
        config.init_lora_weights = True  # the weights are replaced below; other ways to draw them cost time
        self._attach(name, config)
        self.load_state(name, load_file(folder / "adapter_model.safetensors"))

    def _require(self, name: str) -> PeftModel:
        if self._peft is None or name not in self.names:
            raise PerlVlmError(f"no adapter named {name}; attached: {', '.join(self.names) or 'none'}")
        return self._peft


# Ways to draw the first A and B that leave the base as it is; every other one (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
# subtracts the adapter's start from the base's weights, and the adapter is right on that other base alone.
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def _check_plain(folder: Path, written: Mapping[str, Any]) -> None:
    """Refuse an adapter that changes more of the base than plain low-rank matrices do."""
    found = [
        f"{key} {written[key]}"
        for key in ("modules_to_save", "use_dora", "trainable_token_indices", "layer_replication")
        if written.get(key)
    ]
    if written.get("bias", "none") != "none":
        found.append(f"bias {written['bias']}")
    if found:
        raise PerlVlmError(
            f"{folder} holds an adapter with {', '.join(found)}. Only plain LoRA matrices can be stacked on the base "
            "that all roles share: merge the adapter into its base and give the merged folder as --model"
        )
    start = written.get("init_lora_weights", True)
    if start not in _KEEPS_BASE:
        raise PerlVlmError(
            f"{folder} holds an adapter with init_lora_weights {start}, which belongs to a base with other weights. "
            "Convert it to plain LoRA: save it with peft's path_initial_model_for_weight_conversion"
        )


def seed_adapter(adapters: Adapters, name: str, generator: torch.Generator) -> None:
    """Draw the A matrices anew from ``generator`` (Kaiming uniform, as peft does), so that an adapter's start depends
    on its seed alone and not on what was attached before it. B stays zero."""
    for key, parameter in adapters.parameters(name).items():
        if "lora_A" in key:
            bound = (1.0 / parameter.shape[1]) ** 0.5
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                parameter.copy_(drawn)
