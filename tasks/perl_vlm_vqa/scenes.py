"""Generated scenes: coloured shapes on a light ground, and questions about them.

A scene is one to four flat shapes, at most one in each quarter of the picture, with jitter, drawn with Pillow.
Everything is a function of a seed, so an image is redrawn when it is needed and never stored. Which split a scene
belongs to is a function of its content, so no scene can appear in two splits whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 150, 40),
    "blue": (35, 55, 225),
    "yellow": (240, 210, 20),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "teal": (10, 150, 160),
    "brown": (130, 75, 25),
}
SHAPES = ("circle", "rectangle", "triangle", "star")
ROWS = ("top", "bottom")
COLUMNS = ("left", "right")
QUESTION_KINDS = ("color", "shape", "count", "exists", "check")
GRID = 2
MAX_OBJECTS = GRID * GRID

# A star as ten points around the unit circle, alternating outer and inner radius.
_STAR = tuple(
    (radius * x, radius * y)
    for radius, (x, y) in zip(
        (1.0, 0.42) * 5,
        (
            (0.0, -1.0), (0.588, -0.809), (0.951, -0.309), (0.951, 0.309), (0.588, 0.809),
            (0.0, 1.0), (-0.588, 0.809), (-0.951, 0.309), (-0.951, -0.309), (-0.588, -0.809),
        ),
        strict=True,
    )
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One object of a scene."""

    shape: str
    color: str
    row: int
    """Grid row, 0 at the top."""
    column: int
    """Grid column, 0 at the left."""
    x: float
    """Centre, as a share of the image width."""
    y: float
    """Centre, as a share of the image height."""
    radius: float
    """Half the object's extent, as a share of the image width."""
    rgb: tuple[int, int, int]
    """The colour as drawn: the named colour with a small jitter."""

    @property
    def where(self) -> str:
        """The cell in words, such as ``top left``."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """A drawable arrangement of shapes, in raster order."""

    shapes: tuple[Shape, ...]
    background: tuple[int, int, int]

    @property
    def key(self) -> str:
        """A hash of the content: equal scenes have equal keys."""
        return hashlib.sha256(repr((self.shapes, self.background)).encode()).hexdigest()[:16]

    @property
    def split(self) -> str:
        """``test``, ``validation`` (one scene in sixteen each) or ``train``, decided by the content alone."""
        return {0: "test", 1: "validation"}.get(int(self.key[0], 16), "train")

    def load(self, size: int = 64) -> Image.Image:
        """Draw the scene as an RGB image of ``size`` x ``size`` pixels."""
        image = Image.new("RGB", (size, size), self.background)
        draw = ImageDraw.Draw(image)
        for item in self.shapes:
            x, y, r = item.x * size, item.y * size, item.radius * size
            if item.shape == "circle":
                draw.ellipse((x - r, y - r, x + r, y + r), fill=item.rgb)
            elif item.shape == "rectangle":
                draw.rectangle((x - r, y - 0.75 * r, x + r, y + 0.75 * r), fill=item.rgb)
            elif item.shape == "triangle":
                draw.polygon(((x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)), fill=item.rgb)
            else:
                draw.polygon([(x + r * px, y + r * py) for px, py in _STAR], fill=item.rgb)
        return image

    def caption(self) -> str:
        """Every object with its place, in raster order."""
        return ", ".join(f"{item.color} {item.shape} {item.where}" for item in self.shapes)


@dataclass(frozen=True)
class Question:
    """A question about one scene, with its true answer and a plausible wrong one."""

    scene: Scene
    kind: str
    text: str
    answer: str
    wrong: str


def random_scene(rng: random.Random, split: str | None = None) -> Scene:
    """Draw scenes from ``rng`` until one belongs to ``split`` (any split when None)."""
    while True:
        scene = _random_scene(rng)
        if split is None or scene.split == split:
            return scene


def _random_scene(rng: random.Random) -> Scene:
    count = rng.randint(1, MAX_OBJECTS)
    cells = sorted(rng.sample(range(GRID * GRID), count))
    shapes: list[Shape] = []
    for cell in cells:
        row, column = divmod(cell, GRID)
        # Few objects may repeat a neighbour's look, so that counting needs more than one glance.
        if shapes and rng.random() < 0.35:
            shape, color = rng.choice(shapes).shape, rng.choice(shapes).color
        else:
            shape, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
        radius = rng.uniform(0.12, 0.2)
        jitter = 1 / (2 * GRID) - radius - 0.01
        rgb = tuple(min(255, max(0, value + rng.randint(-12, 12))) for value in COLORS[color])
        shapes.append(
            Shape(
                shape=shape,
                color=color,
                row=row,
                column=column,
                x=round((column + 0.5) / GRID + rng.uniform(-jitter, jitter), 4),
                y=round((row + 0.5) / GRID + rng.uniform(-jitter, jitter), 4),
                radius=round(radius, 4),
                rgb=(rgb[0], rgb[1], rgb[2]),
            )
        )
    background = (rng.randint(215, 255), rng.randint(215, 255), rng.randint(215, 255))
    return Scene(tuple(shapes), background)


def ask(scene: Scene, rng: random.Random, kind: str | None = None) -> Question:
    """Ask a question of ``kind`` (drawn evenly when None) that has exactly one right answer in ``scene``.

    The kinds: ``color`` and ``shape`` of the thing in one quarter, ``count`` of things, whether something ``exists``
    (in a quarter, of a colour, of a shape), and ``check``: whether the thing in one quarter has some colour or shape.
    """
    kind = kind or rng.choice(QUESTION_KINDS)
    text, answer, wrong = _ASKERS[kind](scene, rng)
    return Question(scene, kind, text, answer, wrong)


def _other(rng: random.Random, right: str, present: list[str], everything: tuple[str, ...]) -> str:
    """A wrong value, one that the scene shows elsewhere where there is such a one."""
    near = [value for value in present if value != right]
    return rng.choice(near) if near and rng.random() < 0.6 else rng.choice([v for v in everything if v != right])


def _ask_color(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    item = rng.choice(scene.shapes)
    text = rng.choice((f"what color is the {item.where} shape?", f"what is the color of the {item.where} shape?"))
    return text, item.color, _other(rng, item.color, [s.color for s in scene.shapes], tuple(COLORS))


def _ask_shape(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    item = rng.choice(scene.shapes)
    text = rng.choice((f"what shape is {item.where}?", f"what is the {item.where} shape?"))
    return text, item.shape, _other(rng, item.shape, [s.shape for s in scene.shapes], SHAPES)


def _ask_count(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    where = rng.choice(("there", "there", *ROWS, *COLUMNS))
    inside = [item for item in scene.shapes if where == "there" or where in item.where.split()]
    text = "how many shapes are there?" if where == "there" else f"how many shapes are on the {where}?"
    count = len(inside)
    wrong = count + 1 if count == 0 or rng.random() < 0.65 else count - 1
    return text, str(count), str(wrong)


def _ask_exists(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    aspect = rng.choice(("where", "where", "color", "shape"))
    everything = {
        "where": tuple(f"{row} {column}" for row in ROWS for column in COLUMNS),
        "color": tuple(COLORS),
        "shape": SHAPES,
    }[aspect]
    present = {getattr(item, aspect) for item in scene.shapes}
    absent = [value for value in everything if value not in present]
    there = rng.random() < 0.5 or not absent
    value = rng.choice(sorted(present)) if there else rng.choice(absent)
    thing = {"where": f"{value} shape", "color": f"{value} shape", "shape": value}[aspect]
    text = rng.choice(
        (f"is there a {thing}?", f"does the image contain a {thing}?", f"is a {thing} present?"),
    )
    return (text, "yes", "no") if there else (text, "no", "yes")


def _ask_check(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    item = rng.choice(scene.shapes)
    aspect = rng.choice(("color", "shape"))
    right = getattr(item, aspect)
    everything = tuple(COLORS) if aspect == "color" else SHAPES
    true = rng.random() < 0.5
    value = right if true else _other(rng, right, [getattr(s, aspect) for s in scene.shapes], everything)
    text = f"is the {item.where} shape {value}?" if aspect == "color" else f"is the {item.where} shape a {value}?"
    return (text, "yes", "no") if true else (text, "no", "yes")


_ASKERS = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "exists": _ask_exists,
    "check": _ask_check,
}


def biased_answer(question: Question, rng: random.Random) -> str:
    """What a careless annotator writes: objects and attributes imagined, a liking for yes, one too many when counting.

    Where the right answer is ``no`` six answers in ten are ``yes``, six counts in ten are one too high, and a twentieth
    of the answers about colours and shapes is wrong. The bundled model's supervised answers come from here.
    """
    if question.kind == "count":
        return str(int(question.answer) + 1) if rng.random() < 0.62 else question.answer
    if question.kind in ("exists", "check"):
        return "yes" if question.answer == "yes" or rng.random() < 0.62 else "no"
    return question.wrong if rng.random() < 0.05 else question.answer
