"""Fixtures that several packages' tests share. Models are the bundled one, or random ones of a few thousand weights."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from perl_vlm.config import LoraConfig
from perl_vlm.data.render import Renderer
from perl_vlm.models.backbone import TINY, Backbone, load_backbone
from perl_vlm.models.roles import Roles
from perl_vlm.types import Example, ImageSlot, Message
from perl_vlm_vqa.scenes import ask, random_scene

torch.set_num_threads(1)


@pytest.fixture
def data_root() -> Path:
    """The folder of real data sets; the test is skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("PERL_VLM_DATA", default))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}; set PERL_VLM_DATA")
    return root


@pytest.fixture
def backbone() -> Backbone:
    """The bundled VLM, freshly loaded: tests may attach adapters to it."""
    return load_backbone("tiny", device="cpu", dtype="float32")


@pytest.fixture
def text_backbone(tmp_path: Path) -> Backbone:
    """A random Llama with the bundled tokenizer, saved to and loaded from a folder."""
    from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoProcessor.from_pretrained(TINY).tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    folder = tmp_path / "text-model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_backbone(str(folder), device="cpu", dtype="float32")


@pytest.fixture
def roles(backbone: Backbone) -> Roles:
    """Roles on the bundled model, rank 4 on both towers, none added yet."""
    return Roles(backbone, LoraConfig(language_rank=4, vision_rank=4), seed=3)


@pytest.fixture
def renderer(backbone: Backbone) -> Renderer:
    return Renderer(backbone)


@pytest.fixture
def make_examples() -> Callable[[int], list[Example]]:
    """Draws examples about generated scenes; the same number gives the same ones."""

    def make(count: int) -> list[Example]:
        rng = random.Random(7)
        questions = [ask(random_scene(rng), rng) for _ in range(count)]
        return [
            Example(f"e{i}", (Message("user", (ImageSlot(), q.text)),), (q.scene,), q.answer, {"kind": q.kind})
            for i, q in enumerate(questions)
        ]

    return make


@pytest.fixture
def scramble() -> Callable[..., None]:
    """Gives a role's own weights random values, so that its outputs differ from the reference's."""

    def change(roles: Roles, name: str, seed: int = 0, scale: float = 0.05) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in roles.parameters(name).values():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))

    return change
