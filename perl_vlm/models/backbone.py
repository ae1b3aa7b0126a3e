"""Load a frozen language model, VLM, encoder or two-tower CLIP and its processor: the bundled model, a folder, a hub
name, or a pair named ``open_clip:...`` or ``clip:...``."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from perl_vlm.errors import PerlVlmError
from perl_vlm.models.clip_backbone import ClipLMConfig, compose_vlm
from perl_vlm.models.clip_reward import ClipRewardConfig, ClipRewardModel, ClipRewardProcessor, load_two_towers
from perl_vlm.models.encoders import encoder_options, generating_window, is_encoder, reading_window
from perl_vlm.models.loading import check_loaded, explain, four_bit, look_on_hub, reason
from perl_vlm.models.provenance import frozen_parameters, parameter_size

TINY = Path(__file__).parent / "tiny"
Kind = Literal["causal", "encoder", "clip"]


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
    kind: Kind = "causal"
    """``causal`` generates (VLMs too); ``encoder`` and ``clip`` only read: they serve as reward models."""

    @property
    def generates(self) -> bool:
        """Whether it can play the policy; the others give one hidden state a sequence (``pooled_hidden``)."""
        return self.kind == "causal"

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
    def what(self) -> str:
        """What it is, for messages that say what it cannot do."""
        if self.kind == "clip":
            return "a two-tower model, which scores how well a text fits an image but writes none"
        if self.kind == "encoder":
            return "an encoder, which scores texts but writes none"
        return "a VLM" if self.sees_images else "a language model"

    @cached_property
    def window(self) -> int | None:
        """The most tokens, prompt and response together, that the model can read: of encoders, two-tower models and
        generators with a table of positions (GPT-2, OPT). None where nothing but quality sets a limit (rotary or
        relative positions); see ``trained_window``."""
        if self.kind == "clip":
            return int(self.tokenizer.context_length)
        return reading_window(self.model) if self.kind == "encoder" else generating_window(self.model)

    @property
    def trained_window(self) -> int | None:
        """The most tokens that the configuration says the model was trained on, where it says so."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return positions if isinstance(positions, int) and positions > 0 else None

    @property
    def head_start(self) -> tuple[float, float] | None:
        """Weight and bias that a reward head starts from instead of random ones: a two-tower model was trained with
        ``exp(logit_scale) * cosine + logit_bias``."""
        return self.model.scale_and_bias() if self.kind == "clip" else None

    @property
    def parameter_count(self) -> int:
        """Parameters of the base itself, adapters left out."""
        return sum(parameter_size(value) for _, value in frozen_parameters(self.model))


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
            f"--device {name} cannot be used: {reason(error)}. Use --device auto, cpu or cuda"
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
    load_in_4bit: bool = False,
) -> Backbone:
    """Load a model and freeze it.

    ======================== ======================================================================= =========
    name                     what is loaded                                                          kind
    ======================== ======================================================================= =========
    tiny, a folder, the hub  any ``AutoModelForImageTextToText`` or ``AutoModelForCausalLM``         causal
    a folder, the hub        a text encoder (BERT, RoBERTa, DeBERTa, ModernBERT and their like)      encoder
    open_clip:TOWER+LM       an open_clip vision tower, a fresh projector, a language model          causal
    clip:TOWER               both towers of an open_clip model: image and text                       clip
    ======================== ======================================================================= =========

    TOWER is ``ARCH``, ``ARCH:PRETRAINED`` (open_clip's names, or a .safetensors file), ``hf-hub:ORG/NAME`` or a folder
    in open_clip's layout. Weights are read from safetensors only.

    ``revision`` is a branch, tag or commit on the hub, and of ``open_clip:TOWER+LM`` the language model's.

    Raises PerlVlmError where the name is neither ``tiny`` nor a model folder nor reachable on the hub, where a revision
    is asked of what is not on the hub, where the model
    wants code of its own and was not allowed to run it, where its files are damaged, incomplete, do not fit one another
    or lack the image processor, and where ``load_in_4bit`` cannot be had.
    """
    where = resolve_device(device)
    width = resolve_dtype(dtype, where, name)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    quantised = four_bit(where, width) if load_in_4bit else None
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    kind: Kind = "causal"
    if name.startswith(("open_clip:", "clip:")):
        if load_in_4bit:
            raise PerlVlmError(
                f"--load_in_4bit goes with a model that is loaded from a folder or the hub, and {name} is put together "
                "from parts. Save it once with save_pretrained and give the folder, or leave --load_in_4bit out"
            )
        model, processor, config = _load_parts(name, width, common)
        kind = "clip" if isinstance(config, ClipRewardConfig) else "causal"
        sees_images = True
    else:
        path = locate(name)
        check_revision(name, revision)
        look_on_hub(name, path, common["revision"])
        try:
            config = AutoConfig.from_pretrained(path, **common)
            kind = "clip" if isinstance(config, ClipRewardConfig) else "encoder" if is_encoder(config) else "causal"
            sees_images = isinstance(config, (ClipLMConfig, ClipRewardConfig)) or (
                config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
            )
            auto: Any = AutoModelForImageTextToText if sees_images else AutoModelForCausalLM
            auto = {"encoder": AutoModel, "clip": ClipRewardModel}.get(kind, auto)
            options: dict[str, Any] = encoder_options(config) if kind == "encoder" else {}
            if where.type == "cpu" and (name == "tiny" or kind == "encoder"):
                # Short texts and small models: a CPU runs plain attention faster than the fused kernel (MiniLM in
                # bfloat16, 16 x 128 tokens, forward and backward: 1.6 times).
                options["attn_implementation"] = "eager"
            if quantised is not None:
                options |= {"quantization_config": quantised, "device_map": {"": where}}
            model, found = auto.from_pretrained(
                path, dtype=width, use_safetensors=True, output_loading_info=True, **options, **common
            )
            # AutoProcessor does not tell our own class whether code was allowed.
            reader: Any = AutoProcessor if sees_images else AutoTokenizer
            processor = (ClipRewardProcessor if kind == "clip" else reader).from_pretrained(path, **common)
        except Exception as error:
            # Damaged or odd files surface as errors of transformers, huggingface_hub, safetensors, tokenizers, torch.
            raise explain(name, path, error) from error
        check_loaded(name, found, heads_are_extra=kind == "encoder")
    return _backbone(name, revision, model, processor, config, sees_images, kind, where, moved=quantised is not None)


def _load_parts(name: str, width: torch.dtype, common: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The model, processor and config of ``open_clip:TOWER+LM`` or ``clip:TOWER``."""
    scheme, _, rest = name.partition(":")
    if scheme == "clip":
        if not rest:
            raise PerlVlmError(
                f"--model {name} names no model. Write clip:TOWER, such as clip:ViT-B-32:laion2b_s34b_b79k, or "
                "clip:FOLDER with open_clip_config.json in it"
            )
        check_revision(name, None if common["revision"] == "main" else common["revision"])
        model, processor = load_two_towers(rest, trust_remote_code=common["trust_remote_code"])
        return model.to(width), processor, model.config
    tower, plus, language = rest.partition("+")
    if not (tower and plus and language):
        raise PerlVlmError(
            f"--model {name} does not name a pair. Write open_clip:TOWER+LM, such as "
            "open_clip:ViT-B-32:openai+Qwen/Qwen3-0.6B"
        )
    path = locate(language)
    check_revision(language, None if common["revision"] == "main" else common["revision"])
    look_on_hub(language, path, common["revision"])
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype=width, use_safetensors=True, output_loading_info=True, **common
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
    except Exception as error:
        raise explain(language, path, error) from error
    check_loaded(language, found)
    whole, processor = compose_vlm(tower, model, tokenizer)
    return whole.to(width), processor, whole.config


def _backbone(
    name: str,
    revision: str | None,
    model: Any,
    processor: Any,
    config: Any,
    sees_images: bool,
    kind: Kind,
    where: torch.device,
    *,
    moved: bool,
) -> Backbone:
    """Check the processor, freeze the model and bare its generation config."""
    if sees_images and getattr(processor, "image_processor", None) is None:
        raise PerlVlmError(
            f"--model {name} sees images, but its files give a {type(processor).__name__} without an image processor: "
            "processor_config.json or preprocessor_config.json is missing. Copy them from the model it was made from"
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    (model if moved else model.to(where)).eval().requires_grad_(False)
    published = getattr(model, "generation_config", None) or GenerationConfig()
    eos_ids = _eos_ids(published, tokenizer, kind)
    if not eos_ids:
        raise PerlVlmError(f"{name}: neither its generation config nor its tokenizer names an end-of-sequence token")
    text = config.get_text_config()  # of a composed VLM, the language model's alone comes from a place with commits
    model.generation_config = GenerationConfig(
        eos_token_id=list(eos_ids), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    return Backbone(
        name=name,
        revision=getattr(config, "_commit_hash", None) or getattr(text, "_commit_hash", None) or revision,
        model=model,
        processor=processor,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        sees_images=sees_images,
        generation_config=published,
        kind=kind,
    )


def locate(name: str) -> str:
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


def on_hub(name: str) -> bool:
    """Whether a model's name, one that ``locate`` takes, is that of a repository on the hub."""
    return name != "tiny" and not name.startswith("clip:") and not Path(name).expanduser().is_dir()


def check_revision(name: str, revision: str | None) -> None:
    """Refuse a revision of what has none: it would be written down with the run, and be false."""
    if revision is None or on_hub(name):
        return
    what = "the bundled model" if name == "tiny" else "an open_clip model" if name.startswith("clip:") else "a folder"
    raise PerlVlmError(
        f"--revision {revision} names a branch, tag or commit on the hub, but --model {name} is {what}, which has "
        "none. Leave --revision out, or give the model's name on the hub"
    )


def _eos_ids(generation: GenerationConfig, tokenizer: Any, kind: Kind) -> tuple[int, ...]:
    if kind == "encoder":
        # Encoders end each text of a pair with their separator; what they call EOS, if anything, is the same token.
        ends = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        return () if ends is None else (int(ends),)
    published = generation.eos_token_id
    ids = [published] if isinstance(published, int) else list(published or [])
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(int(i) for i in ids))


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether the module's forward names this argument."""
    return argument in inspect.signature(module.forward).parameters
