"""What a renderer is: ``Renderer`` for models that write or read sequences, ``ClipRenderer`` for two towers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from perl_vlm.types import Comparison, Example, Message, Rating, Sequences

if TYPE_CHECKING:
    from perl_vlm.models.backbone import Backbone


class PromptRenderer(Protocol):
    """Turns messages, pictures and responses into what one backbone reads."""

    backbone: Backbone
    max_prompt_tokens: int
    max_response_tokens: int

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The prompt as text, up to where the response begins."""
        ...

    def response_ids(self, response: str, origin: str = "") -> list[int]:
        """Token ids of a whole response, its end included. Raises BadRecord where it is too long."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """A response as text."""
        ...

    def prompts(self, records: Sequence[Example | Comparison | Rating]) -> Sequences:
        """B prompts padded on the left. Raises BadRecord for a record that cannot be rendered; TooLong, which is one,
        lets an episode whose prompt has grown too long end there."""
        ...
