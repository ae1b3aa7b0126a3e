"""Load a frozen language model or VLM and its processor from the bundled model, a folder or a hub name."""

from __future__ import annotations

import inspect
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from perl_vlm.errors import PerlVlmError

TINY = Path(__file__).parent / "tiny"


@dataclass(frozen=True)
class Backbone:
    """A pretrained model whose weights never change, with what is needed to feed it."""

    name: str
    """What the user asked for: ``tiny``, a folder or a hub name."""
    revision: str | None
    """The commit that was loaded, where known."""
    model: Any
    """The transformers model, in evaluation mode, no parameter requiring a gradient."""
    processor: Any
    """The processor of a VLM, or the tokenizer of a language model."""
    tokenizer: Any
    eos_ids: tuple[int, ...]
    """Token ids that end a response."""
    sees_images: bool
    generation_config: GenerationConfig
    """As published; ``model.generation_config`` itself is bare, so that no hidden penalty or filter bends sampling."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def hidden_size(self) -> int:
        """H, the width of the language tower."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def parameter_count(self) -> int:
        """Parameters of the base itself, adapters left out."""
        return sum(value.numel() for name, value in self.model.named_parameters() if ".lora_" not in name)


def resolve_device(name: str) -> torch.device:
    """``auto`` takes a CUDA device where there is one. Raises PerlVlmError for a device that torch cannot use."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise PerlVlmError(f"--device {name} was asked for, but torch sees no CUDA device; use --device cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise PerlVlmError(
            f"--device {name} cannot be used: {_reason(error)}. Use --device auto, cpu or cuda"
            + (f" (cuda:0 to cuda:{torch.cuda.device_count() - 1})" if torch.cuda.device_count() > 1 else "")
        ) from error
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device, model: str) -> torch.dtype:
    """``auto`` takes bfloat16 where the device multiplies it fast; the bundled model is too small to gain by it."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if model == "tiny":
        return torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def load_backbone(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> Backbone:
    """Load any ``AutoModelForImageTextToText`` or ``AutoModelForCausalLM``, frozen.

    Weights are read from safetensors only. Raises PerlVlmError where the name is neither ``tiny`` nor a model folder
    nor reachable on the hub, where the model wants code of its own and was not allowed to run it, and where its files
    are damaged, do not fit one another or lack the image processor.
    """
    path = _locate(name)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    where = resolve_device(device)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    try:
        config = AutoConfig.from_pretrained(path, **common)
        sees_images = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        auto: Any = AutoModelForImageTextToText if sees_images else AutoModelForCausalLM
        # At the bundled model's size a CPU runs plain attention faster than the fused kernel.
        plain = {"attn_implementation": "eager"} if name == "tiny" and where.type == "cpu" else {}
        model = auto.from_pretrained(
            path, dtype=resolve_dtype(dtype, where, name), use_safetensors=True, **plain, **common
        )
        processor = (AutoProcessor if sees_images else AutoTokenizer).from_pretrained(path, **common)
    except Exception as error:
        # Damaged or odd model files surface as errors of transformers, huggingface_hub, safetensors, tokenizers, torch.
        raise _explain(name, path, error) from error
    if sees_images and getattr(processor, "image_processor", None) is None:
        raise PerlVlmError(
            f"--model {name} sees images, but its files give a {type(processor).__name__} without an image processor: "
            "processor_config.json or preprocessor_config.json is missing. Copy them from the model it was made from"
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(where).eval().requires_grad_(False)
    published = model.generation_config
    eos_ids = _eos_ids(published, tokenizer)
    if not eos_ids:
        raise PerlVlmError(f"{name}: neither its generation config nor its tokenizer names an end-of-sequence token")
    model.generation_config = GenerationConfig(
        eos_token_id=list(eos_ids), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    return Backbone(
        name=name,
        revision=getattr(config, "_commit_hash", None) or revision,
        model=model,
        processor=processor,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        sees_images=sees_images,
        generation_config=published,
    )


def _locate(name: str) -> str:
    if name == "tiny":
        if not (TINY / "model.safetensors").is_file():
            raise PerlVlmError("the bundled model is missing from this installation; reinstall perl-vlm")
        return str(TINY)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
            raise PerlVlmError(
                f"--model {name} is a folder but no model: it has no config.json (found: {found}). A model folder is "
                "what save_pretrained writes: config.json, *.safetensors and the tokenizer or processor files"
            )
        return str(folder)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise PerlVlmError(f"--model {name}: there is no such folder. Give a model folder, a hub name, or tiny")
    return name


def _reason(error: BaseException) -> str:
    """The first line of an error, which may have none, short enough to read."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[0] if lines else type(error).__name__, 200, placeholder=" ...").rstrip(".")


def _explain(name: str, path: str, error: Exception) -> PerlVlmError:
    text, reason = str(error), _reason(error)
    if "trust_remote_code" in text:
        return PerlVlmError(
            f"--model {name} brings Python code of its own, which is not run unless you ask for it. Read that code, "
            "then pass --trust_remote_code true, or choose a model whose class is part of transformers"
        )
    local = Path(path).is_dir()
    if isinstance(error, SafetensorError) or "ignore_mismatched_sizes" in text:
        what = "damaged" if isinstance(error, SafetensorError) else "of other shapes than its config.json says"
        again = "Copy or save the folder again" if local else f"Drop the download with `hf cache rm model/{name}`"
        return PerlVlmError(f"--model {name}: its weights are {what} ({reason}). {again}, or choose another model")
    if local or not isinstance(error, (OSError, ValueError, ImportError)):
        place = " from its folder" if local else ""
        return PerlVlmError(
            f"--model {name} cannot be loaded{place} ({type(error).__name__}): {reason}. Copy or download its files "
            "again, or choose another model"
        )
    if "safetensors" in text:
        return PerlVlmError(f"--model {name} has no weights in safetensors, the only format read: {reason}")
    return PerlVlmError(
        f"--model {name} is no local folder, and the hub did not give it ({reason}). Without "
        "network, use --model tiny (bundled) or --model PATH with a folder written by save_pretrained or "
        "`hf download`; a private model needs HF_TOKEN in the environment"
    )


def _eos_ids(generation: GenerationConfig, tokenizer: Any) -> tuple[int, ...]:
    published = generation.eos_token_id
    ids = [published] if isinstance(published, int) else list(published or [])
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(int(i) for i in ids))


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether the module's forward names this argument."""
    return argument in inspect.signature(module.forward).parameters
