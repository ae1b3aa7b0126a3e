"""What the parts of the live environment say to one another: where an episode stands, and what is seen there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from perl_vlm_ui_automation.elements import Element

FRAME = (160, 210)
"""Width and height of every page in pixels."""
FAILURE = -1.0
"""The raw reward of an episode that comes to nothing: an answer that cannot be carried out, or no turns left. It is
what the pages themselves give for a wrong click and for running out of time."""


class PageError(Exception):
    """A script of the page failed, or the page was left for another. The browser is well."""


@dataclass(frozen=True)
class Place:
    """Where an episode stands. The same place looks the same and is worth the same, whenever it is visited."""

    env: str
    """The environment, such as ``click-test-2``."""
    seed: int
    """What the page's random numbers come from."""
    actions: tuple[str, ...] = ()
    """What was done so far, as canonical JSON."""

    def after(self, action: str) -> Place:
        """Where the episode stands once this is done too."""
        return replace(self, actions=(*self.actions, action))

    @property
    def before(self) -> Place:
        """Where it stood before its last action."""
        return replace(self, actions=self.actions[:-1])

    def __str__(self) -> str:
        return f"{self.env}, seed {self.seed}, after {len(self.actions)} actions"


@dataclass(frozen=True)
class Screen:
    """What a page shows and says."""

    utterance: str
    """The instruction."""
    elements: tuple[Element, ...]
    """What can be seen of the page, in the order of the document, numbered from 1."""
    png: bytes
    """The screenshot, FRAME pixels."""


@dataclass(frozen=True)
class Outcome:
    """What there is at a place: a screen, or the end of the episode."""

    screen: Screen | None = None
    """None where the episode is over."""
    reward: float = 0.0
    """The raw reward where the episode is over, from -1 to 1."""
    problem: str = ""
    """Why the last action could not be carried out, where that ended the episode."""
    broken: bool = False
    """Whether a PageError ended it."""

    @property
    def over(self) -> bool:
        """Whether the episode has ended."""
        return self.screen is None
