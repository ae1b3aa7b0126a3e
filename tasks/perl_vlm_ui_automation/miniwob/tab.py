"""One loaded page, driven as a person would: by the mouse and the keyboard.

Time stands still in a page but for what an action takes, so that timers and animations do the same at every visit,
however fast the machine is. That is what makes an episode a function of its seed and its actions.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perl_vlm_ui_automation.actions import Action
from perl_vlm_ui_automation.elements import Element, center
from perl_vlm_ui_automation.miniwob.keys import playwright_keys
from perl_vlm_ui_automation.miniwob.limits import LOAD_S
from perl_vlm_ui_automation.miniwob.places import FAILURE, FRAME, Outcome, PageError, Screen

WINDOW = (500, 320)
"""Larger than FRAME, as in the original: pages have their scores to the right, and would be scrolled by a focus."""
TICK_MS = 16
"""A page draws every so often. All times are multiples, so that every episode begins at the same beat."""
STEP_MS = 32 * TICK_MS
"""Page time that an action takes: about half a second, more than an animation of jQuery."""
LONG_PRESS_MS = 63 * TICK_MS
LONGEST_WAIT_S = 30.0
SCROLL_PX = 60
"""How far a turn of the wheel goes."""
DRAG_STEPS = 10
_BEGIN, _STOP = "2016-06-01T12:00:00Z", "2016-06-01T12:00:01Z"


class CannotAct(Exception):
    """An action that cannot be carried out on this page. Says why."""


class Tab:
    """A page in a context of its own: no cookies, clock or storage are shared with others, and what is copied stays in
    the page. It reads the pages' own files, no other file, and no network.

    Args:
        browser: Playwright's.
        folder: where the pages are.
    """

    def __init__(self, browser: Any, folder: Path) -> None:
        self._folder = folder
        self._context = browser.new_context(
            viewport={"width": WINDOW[0], "height": WINDOW[1]},
            device_scale_factor=1,
            offline=True,
            accept_downloads=False,
            service_workers="block",
            locale="en-US",
            timezone_id="UTC",
        )
        self._context.set_default_timeout(1000 * LOAD_S)
        # The folder above holds the scripts and styles that pages share.
        self._context.route(_outside(folder.parent), _refuse_request)
        self._context.clock.install(time=_BEGIN)
        self._context.clock.pause_at(_STOP)
        self._context.add_init_script(path=Path(__file__).with_name("page.js"))
        self._page = self._context.new_page()
        self._cdp = self._context.new_cdp_session(self._page)
        self._elements: tuple[Element, ...] | None = None
        self.env: str | None = None
        """Which environment is loaded."""

    def start(self, env: str, seed: int, *, anew: bool) -> None:
        """Begin an episode. ``anew`` loads the page again where the same one is loaded already."""
        self._elements = None
        if anew or self.env != env:
            self.env = None
            self._page.goto((self._folder / f"{env}.html").as_uri(), wait_until="load")
            self.env = env
        with self._scripts():
            # Off everything, so that nothing is hovered over from the episode before.
            self._page.mouse.move(0, 0)
            self._page.evaluate("seed => perlVlm.start(seed)", seed)
            self._page.clock.run_for(STEP_MS)

    def over(self) -> bool:
        """Whether the episode has ended."""
        with self._scripts():
            return bool(self._page.evaluate("perlVlm.over()"))

    def look(self) -> Outcome:
        """What there is now, with a screenshot where the episode goes on."""
        with self._scripts():
            seen = self._read()
            if seen["over"]:
                return Outcome(reward=float(seen["reward"]))
            return Outcome(Screen(seen["utterance"], self._elements or (), self._picture()))

    def act(self, action: Action) -> Outcome | None:
        """Carry out one action. Where that is impossible, the end of the episode; else None."""
        try:
            with self._scripts():
                _ACTS.get(action.action, _refuse)(self, action)
                if action.action != "wait":
                    self._page.clock.run_for(STEP_MS)
        except CannotAct as problem:
            return Outcome(reward=FAILURE, problem=str(problem))
        finally:
            self._elements = None
        return None

    def close(self) -> None:
        """Close the page and its context."""
        self._context.close()

    @contextmanager
    def _scripts(self) -> Iterator[None]:
        """Tell errors of the page's scripts, raised as PageError, from those of a browser that is gone."""
        from playwright.sync_api import Error, TimeoutError

        try:
            yield
        except TimeoutError:
            raise
        except Error as error:
            if not self._answers():
                raise
            self.env = None  # who knows what state it is in
            raise PageError(error.message.splitlines()[0]) from error

    def _answers(self) -> bool:
        from playwright.sync_api import Error

        try:
            return bool(self._page.evaluate("1 + 1") == 2)
        except Error:
            return False

    def _read(self) -> dict[str, Any]:
        seen: dict[str, Any] = self._page.evaluate("perlVlm.look()")
        self._elements = tuple(
            Element(number, one["kind"], one["text"], tuple(one["box"]), one["clickable"])
            for number, one in enumerate(seen.get("elements", ()), start=1)
        )
        return seen

    def _picture(self) -> bytes:
        clip = {"x": 0, "y": 0, "width": FRAME[0], "height": FRAME[1], "scale": 1}
        shot = self._cdp.send("Page.captureScreenshot", {"format": "png", "clip": clip})
        return base64.b64decode(shot["data"])

    def _target(self, action: Action) -> tuple[int, int] | None:
        """The point that an action aims at, if it aims at any."""
        if action.element is not None:
            if self._elements is None:
                self._read()
            elements = self._elements or ()
            if action.element > len(elements):
                raise CannotAct(f"there is no element {action.element}; {len(elements)} are listed")
            return center(elements[action.element - 1].box or (0, 0, 0, 0))
        return None if action.point is None else _in_frame(*action.point)

    def _must(self, action: Action) -> tuple[int, int]:
        target = self._target(action)
        if target is None:
            raise CannotAct(f"{action.action} has no target")
        return target

    def _click(self, action: Action) -> None:
        self._page.mouse.click(*self._must(action), click_count=action.count or 1, button=action.button or "left")

    def _long_press(self, action: Action) -> None:
        self._page.mouse.move(*self._must(action))
        self._page.mouse.down()
        self._page.clock.run_for(LONG_PRESS_MS)
        self._page.mouse.up()

    def _drag(self, action: Action) -> None:
        start, end = self._must(action), _in_frame(action.to_x or 0, action.to_y or 0)
        self._page.mouse.move(*start)
        self._page.mouse.down()
        self._page.mouse.move(*end, steps=DRAG_STEPS)
        self._page.mouse.up()

    def _scroll(self, action: Action) -> None:
        middle = (FRAME[0] // 2, FRAME[1] // 2)
        self._page.mouse.move(*(self._target(action) or middle))
        across, down = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}[action.direction or "down"]
        self._page.mouse.wheel(across * SCROLL_PX, down * SCROLL_PX)
        # The browser scrolls when it draws, which a picture makes it do.
        for _ in range(2):
            self._picture()

    def _type(self, action: Action) -> None:
        target = self._target(action)
        # A list would open outside the page, where no picture shows it; typing chooses from it when it is closed.
        if target is not None and not self._page.evaluate("([x, y]) => perlVlm.focusList(x, y)", list(target)):
            self._page.mouse.click(*target)
            if self._page.evaluate("perlVlm.editable()"):
                self._page.keyboard.press("ControlOrMeta+a")
        self._page.keyboard.type(action.text or "")

    def _key(self, action: Action) -> None:
        keys = playwright_keys(action.key or "")
        if keys is None:
            raise CannotAct(f"there is no key {action.key!r}")
        self._page.keyboard.press(keys)

    def _wait(self, action: Action) -> None:
        ticks = round(1000 * min(action.seconds or 1.0, LONGEST_WAIT_S) / TICK_MS)
        self._page.clock.run_for(max(1, ticks) * TICK_MS)


def _refuse(tab: Tab, action: Action) -> None:
    raise CannotAct(f"a page of MiniWoB++ knows no {action.action}")


_ACTS: dict[str, Callable[[Tab, Action], None]] = {
    "click": Tab._click,
    "long_press": Tab._long_press,
    "drag": Tab._drag,
    "scroll": Tab._scroll,
    "type": Tab._type,
    "key": Tab._key,
    "wait": Tab._wait,
}


def _outside(folder: Path) -> re.Pattern[str]:
    """Addresses of anything but the files in a folder. An escaped slash or backslash is no part of a file's name."""
    inside = re.escape(f"{folder.as_uri()}/")
    return re.compile(rf"^(?!(?:data|blob|about):|{inside}(?![^?#]*%(?:2[fF]|5[cC])))")


def _refuse_request(route: Any) -> None:
    # A page whose way elsewhere is aborted stays where it is; any other error would show the browser's own page.
    route.abort("aborted" if route.request.is_navigation_request() else "blockedbyclient")


def _in_frame(x: int, y: int) -> tuple[int, int]:
    if not (0 <= x < FRAME[0] and 0 <= y < FRAME[1]):
        raise CannotAct(f"the point {x}, {y} lies outside the picture of {FRAME[0]} x {FRAME[1]} pixels")
    return x, y
