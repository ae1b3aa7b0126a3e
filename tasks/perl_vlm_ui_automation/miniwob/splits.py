"""Which split an episode belongs to: by the content of its first prompt, as in the other generated sources. So what is
tested on was not trained on, whatever the seeds."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Hashable

from perl_vlm.types import SPLITS, Split
from perl_vlm_ui_automation.miniwob.places import Place, Screen
from perl_vlm_ui_automation.miniwob.pool import Pool

PROBES = 24
"""First prompts that are looked at to see how many an environment has. Their seeds are negative: no record's are."""
LEAST = 2
"""As many different ones each split must have among them."""

log = logging.getLogger("perl_vlm_ui_automation")

Content = Callable[[Screen], Hashable]


def words(screen: Screen) -> Hashable:
    """What a prompt says: the instruction and the elements."""
    return screen.utterance, tuple((element.kind, element.text) for element in screen.elements)


def layout(screen: Screen) -> Hashable:
    """The same with the places of the elements, which the picture alone shows."""
    return words(screen), tuple(element.box for element in screen.elements)


def split_of(env: str, content: Hashable) -> Split:
    """Half of an environment's prompts to ``train``, a quarter each to ``validation`` and ``test``."""
    quarter = hashlib.sha256(repr((env, content)).encode()).digest()[0] % 4
    return "test" if quarter == 3 else "validation" if quarter == 2 else "train"


class Splits:
    """Tells the episodes of a split from those of others.

    What counts is the words of the first prompt. Where they are so few that a split would be left without any, it is
    the words and the layout; where layouts are as few, the splits share them, and a warning says so.

    Args:
        pool: where the pages are.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._by_env: dict[str, Content | None] = {}

    def holds(self, split: Split, env: str, screen: Screen) -> bool:
        """Whether an episode of the environment that begins with this screen may be in the split."""
        content = self.content(env)
        return content is None or split_of(env, content(screen)) == split

    def content(self, env: str) -> Content | None:
        """What keeps the environment's splits apart; None where nothing does."""
        if env not in self._by_env:
            seen = self._pool.visit_all([Place(env, -1 - number) for number in range(PROBES)])
            screens = [outcome.screen for outcome in seen if outcome.screen is not None]
            self._by_env[env] = next((content for content in (words, layout) if _enough(env, content, screens)), None)
            if self._by_env[env] is None:
                log.warning(
                    "MiniWoB++: %s has %d different first screens in %d episodes, too few to keep splits apart: train, "
                    "validation and test share them, and `data --check` reports them",
                    env, len(set(map(layout, screens))), PROBES,
                )  # fmt: skip
        return self._by_env[env]


def _enough(env: str, content: Content, screens: list[Screen]) -> bool:
    shares = Counter(split_of(env, one) for one in set(map(content, screens)))
    return all(shares[split] >= LEAST for split in SPLITS)
