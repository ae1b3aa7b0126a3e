"""A headless Chromium with a few loaded pages, and the bookkeeping of which episode stands on which."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from perl_vlm.errors import PerlVlmError
from perl_vlm_ui_automation.actions import Action, parse_action
from perl_vlm_ui_automation.miniwob.launch import launch, process_of
from perl_vlm_ui_automation.miniwob.pages import INSTALL
from perl_vlm_ui_automation.miniwob.places import FAILURE, Outcome, PageError, Place

TABS = 4
"""Pages that a browser keeps loaded, and episodes that it keeps open."""


class Page(Protocol):
    """What the bookkeeping asks of a loaded page; ``tab.Tab`` is one."""

    env: str | None

    def start(self, env: str, seed: int, *, anew: bool) -> None: ...

    def over(self) -> bool: ...

    def look(self) -> Outcome: ...

    def act(self, action: Action) -> Outcome | None: ...


class Tabs:
    """Loaded pages, and where the episode on each stands.

    Args:
        open_page: loads nothing yet.
        limit: at most this many pages.
        anew: whether an environment's page must be loaded again for every episode.
    """

    def __init__(self, open_page: Callable[[], Page], *, limit: int, anew: Callable[[str], bool]) -> None:
        self._open_page, self._limit, self._anew = open_page, limit, anew
        self._pages: list[Page] = []
        self._places: dict[int, Place | None] = {}
        self._used: dict[int, int] = {}
        self._count = itertools.count()

    def visit(self, place: Place) -> Outcome:
        """Bring a page to a place and look. A page that stands there, or one action before, is taken; else the episode
        is played again from its seed. A script error of the page's own ends the episode."""
        try:
            return self._visit(place)
        except PageError as error:
            return Outcome(reward=FAILURE, problem=str(error), broken=True)

    def _visit(self, place: Place) -> Outcome:
        index = self._at(place)
        if index is not None:
            return self._look(index, place)
        index = self._at(place.before) if place.actions else None
        if index is None:
            index = self._free(place.env)
            self._places[index] = None
            self._pages[index].start(place.env, place.seed, anew=self._anew(place.env))
            missing = place.actions
        else:
            missing = place.actions[-1:]
        self._places[index] = None
        for number, action in enumerate(missing):
            # An episode that has ended waits for a click to begin another one.
            if number and self._pages[index].over():
                return self._look(index, place)
            ended = self._pages[index].act(parse_action(action))
            if ended is not None:
                return ended
        return self._look(index, place)

    def standing(self, place: Place) -> bool:
        """Whether the place is reached without playing the episode again."""
        return self._at(place) is not None or (bool(place.actions) and self._at(place.before) is not None)

    def _look(self, index: int, place: Place) -> Outcome:
        self._places[index] = None
        outcome = self._pages[index].look()
        self._places[index] = None if outcome.over else place
        self._used[index] = next(self._count)
        return outcome

    def _at(self, place: Place) -> int | None:
        # A copy, since `standing` is asked from other threads.
        return next((index for index, own in list(self._places.items()) if own == place), None)

    def _free(self, env: str) -> int:
        """A page for a new episode: an idle one of this environment, a new one, or the one not used for longest."""

        def cost(index: int) -> tuple[bool, int]:
            return self._pages[index].env != env, self._used[index]

        idle = [index for index, place in self._places.items() if place is None and self._pages[index].env == env]
        if idle:
            return min(idle, key=cost)
        if len(self._pages) < self._limit:
            self._pages.append(self._open_page())
            self._used[len(self._pages) - 1] = next(self._count)
            return len(self._pages) - 1
        return min(range(len(self._pages)), key=cost)


class Chromium:
    """A running browser. Everything but ``kill`` belongs to the thread that made it.

    Args:
        given: ``task.chromium``.
        folder: where the pages are.
        anew: whether an environment's page must be loaded again for every episode.

    Raises:
        PerlVlmError: Playwright or a browser is missing.
    """

    def __init__(self, given: str | None, folder: Path, anew: Callable[[str], bool]) -> None:
        from perl_vlm_ui_automation.miniwob.tab import Tab

        self.pid: int | None = None
        try:
            from playwright.sync_api import Error, sync_playwright
        except ImportError as error:
            raise PerlVlmError(
                f"task.source is miniwob, but Playwright is not installed. Install it: {INSTALL}"
            ) from error
        self._playwright = sync_playwright().start()
        try:
            self._browser = launch(self._playwright, given, Error)
            self.pid = process_of(self._browser)
        except BaseException:
            self._playwright.stop()
            raise
        self._tabs = Tabs(lambda: Tab(self._browser, folder), limit=TABS, anew=anew)

    def visit(self, place: Place) -> Outcome:
        """Bring a page to a place and look."""
        return self._tabs.visit(place)

    def standing(self, place: Place) -> bool:
        """Whether the place is reached without playing the episode again. Any thread may ask."""
        return self._tabs.standing(place)

    def kill(self) -> None:
        """End the browser's process at once: what waits for it then hears that it is gone. Any thread may do so."""
        if self.pid is not None:
            with suppress(OSError):
                os.kill(self.pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    def close(self) -> None:
        """End the browser and Playwright's driver, whatever state they are in."""
        for end in (self._browser.close, self._playwright.stop):
            with suppress(Exception):
                end()
        self.pid = None  # the system may give the number to another process
