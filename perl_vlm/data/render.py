"""Messages and images to token ids and pixels, through the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from perl_vlm.errors import BadRecord, PerlVlmError
from perl_vlm.types import Comparison, Example, ImageSlot, Message, Rating, Sequences

if TYPE_CHECKING:
    from perl_vlm.models.backbone import Backbone

Prompted = Example | Comparison | Rating


class Renderer:
    """Renders prompts and responses for one model.

    Texts of users are data: a special token spelled out in them (``<image>``, an end-of-turn mark) is broken by a
    space, so that image slots and turns come from structure alone. Prompts are never truncated, because a cut may
    fall among image tokens; a longer one than ``max_prompt_tokens`` is refused by name.
    """

    def __init__(self, backbone: Backbone, *, max_prompt_tokens: int = 2048, max_response_tokens: int = 512) -> None:
        self.backbone = backbone
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.processor, self.tokenizer = backbone.processor, backbone.tokenizer
        special = {str(token) for token in self.tokenizer.all_special_tokens}
        special |= {str(token) for token in self.tokenizer.get_added_vocab() if str(token).startswith("<")}
        if backbone.sees_images and getattr(self.processor, "image_token", None):
            special.add(str(self.processor.image_token))
        self._special = sorted((token for token in special if len(token) > 1), key=len, reverse=True)
        self._has_template = bool(getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template)
        self._lead, self._end = self._probe_turn()

    def escape(self, text: str) -> str:
        """Break every special token that a text spells out."""
        for token in self._special:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The prompt as the model's template writes it, up to where the response begins."""
        return self._apply([self._plain(message) for message in messages], generation=True)

    def response_ids(self, response: str, origin: str = "") -> list[int]:
        """Token ids of a whole response, its end-of-turn token included.

        Raises BadRecord where it is longer than ``max_response_tokens``: cutting it would teach a wrong ending.
        """
        ids = self.tokenizer(self._lead + self.escape(response), add_special_tokens=False)["input_ids"] + [self._end]
        if len(ids) > self.max_response_tokens:
            raise BadRecord(
                origin or "a response",
                f"the response has {len(ids)} tokens, more than --max_response_tokens {self.max_response_tokens}",
                "Raise the limit, shorten the response, or pass --task.on_bad_record skip",
            )
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """A response as text, without special tokens and outer blanks."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def prompts(self, records: Sequence[Prompted]) -> Sequences:
        """Render the prompts of B records: ids padded on the left, pixels as the processor makes them.

        Raises BadRecord for a prompt that is too long, for images given to a model that sees none, and where slots
        and images differ in number.
        """
        texts = [self.prompt_text(record.messages) for record in records]
        counts = tuple(len(record.images) for record in records)
        for record in records:
            self._check_images(record)
        if any(counts):
            images = [[source.load() for source in record.images] for record in records]
            encoded = self.processor(
                text=texts, images=images, padding=True, padding_side="left", add_special_tokens=False,
                return_tensors="pt",
            )  # fmt: skip
        else:
            encoded = self.tokenizer(
                texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
            )
        fields = dict(encoded)
        ids, mask = fields.pop("input_ids"), fields.pop("attention_mask")
        lengths = mask.sum(dim=1)
        for record, length in zip(records, lengths.tolist(), strict=True):
            if length > self.max_prompt_tokens:
                raise BadRecord(
                    record.origin or record.id,
                    f"the prompt has {length} tokens with its images, more than --max_prompt_tokens "
                    f"{self.max_prompt_tokens}",
                    "Prompts are not cut, for a cut may fall among image tokens: raise the limit or shorten the prompt",
                )
        extras = {key: value for key, value in fields.items() if isinstance(value, torch.Tensor)}
        return Sequences(
            input_ids=ids,
            attention_mask=mask,
            response_mask=torch.zeros((len(records), 0), dtype=torch.bool),
            extras=extras,
            image_counts=counts,
        )

    def _check_images(self, record: Prompted) -> None:
        slots = sum(isinstance(part, ImageSlot) for message in record.messages for part in message.content)
        if slots != len(record.images):
            raise BadRecord(
                record.origin or record.id,
                f"the messages have {slots} image slots but the record has {len(record.images)} images",
                "Give one image for each slot",
            )
        if slots and not self.backbone.sees_images:
            raise BadRecord(
                record.origin or record.id,
                f"the record has images, but {self.backbone.name} is a language model without a vision tower",
                "Choose an image-text-to-text model",
            )

    def _plain(self, message: Message) -> dict[str, Any]:
        if not self.backbone.sees_images:
            return {"role": message.role, "content": self.escape(message.text)}
        parts: list[dict[str, str]] = []
        for part in message.content:
            if isinstance(part, ImageSlot):
                parts.append({"type": "image"})
            else:
                parts.append({"type": "text", "text": self.escape(part)})
        return {"role": message.role, "content": parts}

    def _apply(self, turns: list[dict[str, Any]], *, generation: bool) -> str:
        if self._has_template:
            owner = self.processor if getattr(self.processor, "chat_template", None) else self.tokenizer
            return str(owner.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
        # A base model without a template: plain turns, the last left open.
        lines = [f"{turn['role'].capitalize()}: {_text(turn['content'])}" for turn in turns]
        return "\n".join([*lines, "Assistant:"] if generation else lines)

    def _probe_turn(self) -> tuple[str, int]:
        """What the template puts before a response, and the token that ends its turn, read off a sample dialogue."""
        user = self._plain(Message("user", ("x",)))
        answer = self._plain(Message("assistant", ("x",)))
        prompt, whole = self._apply([user], generation=True), self._apply([user, answer], generation=False)
        if not whole.startswith(prompt):
            return "", self.backbone.eos_ids[0]
        tail = whole[len(prompt) :]
        lead, _, rest = tail.partition("x")
        for token in self.tokenizer(rest, add_special_tokens=False)["input_ids"]:
            if token in self.backbone.eos_ids:
                return lead, int(token)
        return lead, self.backbone.eos_ids[0]


def _text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def check_chat_model(renderer: Renderer) -> None:
    """Fail early where a model's template cannot hold a plain user turn."""
    try:
        renderer.prompt_text([Message("user", ("hello",))])
    except Exception as error:
        raise PerlVlmError(f"the chat template of {renderer.backbone.name} refuses a user message: {error}") from error
