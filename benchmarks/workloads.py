"""What the benchmarks run: random models of given shapes, prompts and responses of exact lengths, and what a step needs
by the accounting.

The reference: Qwen3 of 29 million parameters (hidden size 512, 8 layers, vocabulary 8,000); reward models on 8 pairs of
384 + 48 tokens; PPO on 16 prompts of 128 + 48 tokens with 4 epochs; LoRA of rank 8 on q, k, v and o. Words are tokens,
so lengths are exact. Nothing here imports perl_vlm.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RANK = 8
LORA_TARGETS = r"(?!.*vision_model).*\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)"
"""For peft: the language model's attention. A vision tower stays frozen, in every arm."""
SPECIAL = (
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {% endif %}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}"
    "{{ p['text'] }}{% endif %}{% endfor %}{% endif %}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
)
"""Writes what it is given and nothing else, so that a prompt of n words has n tokens."""


@dataclass(frozen=True)
class Shape:
    """A model."""

    hidden: int = 512
    layers: int = 8
    vocabulary: int = 8000
    vision: bool = False
    """Whether it sees: a SmolVLM-like tower and one tile to a picture."""
    vision_hidden: int = 384
    vision_layers: int = 6
    side: int = 256
    """Pixels of a picture; patches have 16, and four of them make a token."""

    @property
    def matmul_parameters(self) -> int:
        """N: weights that every token is multiplied with, embeddings and LM head left out."""
        heads, keys = self.hidden, self.hidden // 2
        return self.layers * (2 * self.hidden * heads + 2 * self.hidden * keys + 3 * self.hidden * 3 * self.hidden)

    @property
    def image_tokens(self) -> int:
        return (self.side // 32) ** 2

    @property
    def image_flop(self) -> float:
        """One picture through the frozen tower: 2 FLOP for each weight and patch."""
        weights = self.vision_layers * 12 * self.vision_hidden**2
        return 2.0 * weights * (self.side // 16) ** 2 if self.vision else 0.0


@dataclass(frozen=True)
class Load:
    """A batch."""

    prompt: int
    """Tokens, those of a picture included."""
    response: int
    batch: int
    """Pairs, or episodes."""
    epochs: int = 1
    group: int = 1
    """Episodes that share a prompt."""


SHAPE, VLM = Shape(), Shape(vision=True)
PAIRS, EPISODES = Load(384, 48, 8), Load(128, 48, 16, epochs=4)
ONE_EPOCH = Load(128, 48, 16, group=4)
SMOKE_SHAPE = Shape(hidden=64, layers=2, vocabulary=64)
SMOKE_VLM = Shape(
    hidden=64, layers=2, vocabulary=64, vision=True, vision_hidden=32, vision_layers=1, side=64,
)  # fmt: skip
SMOKE_PAIRS, SMOKE_EPISODES = Load(16, 6, 4), Load(12, 6, 4, epochs=2)
SMOKE_ONE_EPOCH = Load(12, 6, 4, group=2)


# -- the accounting ------------------------------------------------------------------------------------------------


def training_factor(tuning: str) -> int:
    """FLOP for each weight and token: forward 2, the gradient of what comes in 2, that of the weights themselves 2."""
    return 6 if tuning == "full" else 4


def pairs_flop(shape: Shape, load: Load, *, tuning: str = "lora", shared: bool = True, models: int = 1) -> float:
    """A step of K reward models on pairs, each prompt read once where it is ``shared``."""
    tokens = load.batch * (load.prompt + 2 * load.response if shared else 2 * (load.prompt + load.response))
    pictures = load.batch * (1 if shared else 2) * shape.image_flop
    return models * (training_factor(tuning) * shape.matmul_parameters * tokens + pictures)


def ppo_flop(shape: Shape, load: Load, *, value: str, tuning: str = "lora", rewards: int = 1) -> float:
    """A round of PPO: decoding, scoring, epochs.

    Args:
        value: ``adapter``, ``policy_head`` or ``none``.
        rewards: K reward models of the same base.
    """
    prompts = load.batch // load.group
    tokens = prompts * load.prompt + load.batch * load.response
    on_policy = load.epochs == 1  # then the update's own first log-probs are the old ones
    own_value = value == "adapter"
    passes = 1 + (not on_policy) + own_value + rewards  # reference, old log-probs, value, rewards
    trained = 1 + own_value
    factor = 2 + 2 * passes + training_factor(tuning) * load.epochs * trained
    # Pictures go through the frozen tower once: its features serve decoding, scoring and every epoch.
    return float(factor) * shape.matmul_parameters * tokens + prompts * shape.image_flop


# -- texts ---------------------------------------------------------------------------------------------------------


def words(shape: Mapping[str, Any], count: int, seed: str) -> str:
    """Words that are one token each."""
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(len(SPECIAL), shape['vocabulary'])}" for _ in range(count))


def prompt_text(shape: Mapping[str, Any], load: Mapping[str, Any], number: int) -> str:
    """Prompt ``number``; a picture and its three marks take their tokens from its length."""
    seen = (shape["side"] // 32) ** 2 + 3 if shape["vision"] else 0
    return words(shape, load["prompt"] - seen, f"prompt-{number}")


def response_text(shape: Mapping[str, Any], load: Mapping[str, Any], number: int, side: str) -> str:
    """A response that has the load's length together with its end token."""
    return words(shape, load["response"] - 1, f"{side}-{number}")


def picture(shape: Mapping[str, Any], number: int) -> Any:
    """A PIL picture of random patches."""
    from PIL import Image

    draw = random.Random(f"picture-{number}")
    small = Image.new("RGB", (8, 8))
    small.putdata([tuple(draw.randrange(256) for _ in range(3)) for _ in range(64)])
    return small.resize((shape["side"], shape["side"]), Image.Resampling.NEAREST)


# -- models --------------------------------------------------------------------------------------------------------


def tokenizer_of(shape: Shape) -> Any:
    """Every word ``w17`` is the token 17; the first few ids are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = [f"w{number}" for number in range(len(SPECIAL), shape.vocabulary)]
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *plain])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left",
        additional_special_tokens=list(SPECIAL[4:]) if shape.vision else [], chat_template=TEMPLATE,
    )  # fmt: skip


def make_model(folder: Path, shape: Shape, dtype: str) -> str:
    """Write a random model with its tokenizer or processor; returns the folder, made once for each shape and type."""
    import torch

    target = folder / f"{shape.hidden}-{shape.layers}-{shape.vocabulary}-{'vlm' if shape.vision else 'text'}-{dtype}"
    if target.is_dir():
        return str(target)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    model = _vision_model(shape) if shape.vision else _text_model(shape)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(target)
    (_processor(shape) if shape.vision else tokenizer_of(shape)).save_pretrained(target)
    return str(target)


def _language(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "vocab_size": shape.vocabulary,
        "intermediate_size": 3 * shape.hidden, "num_attention_heads": max(1, shape.hidden // 64),
        "num_key_value_heads": max(1, shape.hidden // 128), "head_dim": min(64, shape.hidden),
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def _text_model(shape: Shape) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_language(shape)))


def _vision_model(shape: Shape) -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    tower = {
        "hidden_size": shape.vision_hidden, "intermediate_size": 4 * shape.vision_hidden, "patch_size": 16,
        "num_hidden_layers": shape.vision_layers, "num_attention_heads": max(1, shape.vision_hidden // 64),
        "image_size": shape.side,
    }  # fmt: skip
    config = Idefics3Config(
        vision_config=tower, text_config={**_language(shape), "model_type": "llama"}, scale_factor=2, image_token_id=4,
        pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return Idefics3ForConditionalGeneration(config)


def _processor(shape: Shape) -> Any:
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    sizes = {"size": {"longest_edge": shape.side}, "max_image_size": {"longest_edge": shape.side}}
    return Idefics3Processor(
        Idefics3ImageProcessor(**sizes, do_image_splitting=False), tokenizer_of(shape),
        image_seq_len=shape.image_tokens, chat_template=TEMPLATE,
    )  # fmt: skip


def spec_of(arm: str, folder: Path, shape: Shape, load: Load, dtype: str, args: Any, **more: Any) -> dict[str, Any]:
    """What a child must know of an arm; its model is made here."""
    return {
        "arm": arm, "folder": make_model(folder, shape, dtype), "dtype": dtype, "shape": asdict(shape),
        "load": asdict(load), "items": load.batch, "steps": args.steps, "warmup": args.warmup, **more,
    }  # fmt: skip
