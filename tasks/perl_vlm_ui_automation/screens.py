"""Drawn screens: coloured shapes that stand for buttons, one instruction about them, and what a hasty person would do.

A screen has two to four shapes, at most one in each quarter of 64 x 64 pixels, no two alike in both colour and shape.
Everything is a function of a seed, so a screen is drawn when it is looked at. Its split follows from its content, so no
screen is in two splits, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from perl_vlm.types import Split
from perl_vlm_ui_automation.actions import Action
from perl_vlm_ui_automation.elements import Element, center

SIZE = 64
"""Width and height in pixels."""
SHAPES = ("circle", "rectangle", "triangle", "star")
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 150, 40),
    "blue": (35, 55, 225),
    "yellow": (240, 210, 20),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "teal": (10, 150, 160),
    "brown": (130, 75, 25),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")
_HALF = SIZE // 2
_TWINS = 0.85
_HASTE = 0.75


@dataclass(frozen=True)
class Button:
    """One shape on a screen."""

    color: str
    shape: str
    place: int
    """Its quarter, an index into PLACES."""
    x: int
    y: int
    """Its middle, in pixels."""
    reach: int
    """Half its width, in pixels."""
    shade: tuple[int, int, int]
    """The colour as drawn: the one named, a little off."""

    @property
    def name(self) -> str:
        """What instructions call it."""
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The pixels it lies in."""
        return (self.x - self.reach, self.y - self.reach, self.x + self.reach, self.y + self.reach)

    def draw(self, canvas: ImageDraw.ImageDraw) -> None:
        """Paint it."""
        x, y, reach = self.x, self.y, self.reach
        if self.shape == "circle":
            canvas.ellipse(self.box, fill=self.shade)
        elif self.shape == "rectangle":
            canvas.rectangle((x - reach, y - 3 * reach // 4, x + reach, y + 3 * reach // 4), fill=self.shade)
        elif self.shape == "triangle":
            canvas.polygon([(x, y - reach), (x + reach, y + reach), (x - reach, y + reach)], fill=self.shade)
        else:
            canvas.polygon([_star_tip(x, y, reach, tip) for tip in range(10)], fill=self.shade)


def _star_tip(x: int, y: int, reach: int, tip: int) -> tuple[float, float]:
    radius = reach if tip % 2 == 0 else 0.42 * reach
    angle = math.pi * tip / 5
    return x + radius * math.sin(angle), y - radius * math.cos(angle)


@dataclass(frozen=True)
class Screen:
    """A picture source: the shapes in the order of their quarters."""

    buttons: tuple[Button, ...]
    ground: tuple[int, int, int]

    def load(self) -> Image.Image:
        """Draw the screen, RGB, SIZE x SIZE."""
        image = Image.new("RGB", (SIZE, SIZE), self.ground)
        canvas = ImageDraw.Draw(image)
        for button in self.buttons:
            button.draw(canvas)
        return image

    @property
    def split(self) -> Split:
        """A sixteenth of the screens each to ``test`` and ``validation``, by their content."""
        digit = hashlib.sha256(repr((self.buttons, self.ground)).encode()).hexdigest()[0]
        return "test" if digit == "0" else "validation" if digit == "1" else "train"

    def elements(self) -> list[Element]:
        """The shapes numbered from 1 and listed by their place alone, so that the picture has to be looked at."""
        return [Element(number, PLACES[one.place], "", one.box) for number, one in enumerate(self.buttons, 1)]


@dataclass(frozen=True)
class Job:
    """A screen with an instruction."""

    screen: Screen
    kind: str
    instruction: str
    right: Action
    wrong: Action
    """A plausible mistake."""
    hasty: Action
    """What a hasty person does: often right."""
    box: tuple[int, int, int, int] | None = None
    """Where a right click may land."""


def random_screen(rng: random.Random, split: Split) -> Screen:
    """Draw screens from ``rng`` until one belongs to the split."""
    while True:
        screen = _random_screen(rng)
        if screen.split == split:
            return screen


def _random_screen(rng: random.Random) -> Screen:
    places = sorted(rng.sample(range(len(PLACES)), rng.randint(2, len(PLACES))))
    looks = _looks(rng, len(places))
    buttons = []
    for place, (color, shape) in zip(places, looks, strict=True):
        reach = rng.randint(8, 12)
        off = _HALF // 2 - reach - 1
        row, column = divmod(place, 2)
        x = column * _HALF + _HALF // 2 + rng.randint(-off, off)
        y = row * _HALF + _HALF // 2 + rng.randint(-off, off)
        red, green, blue = (min(255, max(0, part + rng.randint(-12, 12))) for part in COLORS[color])
        buttons.append(Button(color, shape, place, x, y, reach, (red, green, blue)))
    ground = (rng.randint(215, 255), rng.randint(215, 255), rng.randint(215, 255))
    return Screen(tuple(buttons), ground)


def _looks(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Colours and shapes: two of one colour, most of the time, so that looking at colours alone is not enough."""
    colors = rng.sample(tuple(COLORS), count)
    shapes = [rng.choice(SHAPES) for _ in colors]
    if rng.random() < _TWINS:
        one, other = rng.sample(range(count), 2)
        colors[other] = colors[one]
        shapes[other] = rng.choice([shape for shape in SHAPES if shape != shapes[one]])
    return list(zip(colors, shapes, strict=True))


def random_job(rng: random.Random, split: Split, kinds: tuple[str, ...], by_point: bool) -> Job:
    """A screen of the split with an instruction of one of the kinds.

    Args:
        rng: decides.
        split: where the screen belongs.
        kinds: some of ``click``, ``type``, ``scroll``.
        by_point: whether clicks name a point rather than an element.
    """
    screen = random_screen(rng, split)
    return _MAKERS[rng.choice(kinds)](screen, rng, by_point)


def _click(screen: Screen, rng: random.Random, by_point: bool) -> Job:
    colors = [button.color for button in screen.buttons]
    twins = [number for number, color in enumerate(colors, 1) if colors.count(color) > 1]
    number = rng.choice(twins or range(1, len(colors) + 1))
    button = screen.buttons[number - 1]
    actions = [_target(other, one, by_point) for one, other in enumerate(screen.buttons, 1)]
    alike = [one for one, other in enumerate(screen.buttons, 1) if other.color == button.color]
    others = [one for one in alike if one != number] or [n for n in range(1, len(actions) + 1) if n != number]
    hasty = alike[0] if rng.random() < _HASTE else number
    wrong = actions[rng.choice(others) - 1]
    return Job(screen, "click", f"click the {button.name}", actions[number - 1], wrong, actions[hasty - 1], button.box)


def _target(button: Button, number: int, by_point: bool) -> Action:
    if not by_point:
        return Action("click", element=number)
    x, y = center(button.box)
    return Action("click", x=x, y=y)


def _type(screen: Screen, rng: random.Random, by_point: bool) -> Job:
    button = rng.choice(screen.buttons)
    others = [one for one in screen.buttons if one is not button]
    # Haste reads the first shape that it meets.
    read = screen.buttons[0] if rng.random() < _HASTE else button
    right, wrong, hasty = (_typed(one) for one in (button, rng.choice(others), read))
    return Job(screen, "type", f"type what is {PLACES[button.place]}", right, wrong, hasty)


def _typed(button: Button) -> Action:
    return Action("type", text=f"a {button.name}")


def _scroll(screen: Screen, rng: random.Random, by_point: bool) -> Job:
    button = rng.choice(screen.buttons)
    up, down = Action("scroll", direction="up"), Action("scroll", direction="down")
    right, wrong = (up, down) if button.place < 2 else (down, up)
    return Job(screen, "scroll", f"scroll to the {button.name}", right, wrong, right)


_MAKERS: dict[str, Callable[[Screen, random.Random, bool], Job]] = {"click": _click, "type": _type, "scroll": _scroll}
