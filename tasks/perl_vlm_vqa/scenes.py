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
QUESTION_KINDS = ("color", "shape", "count", "exists", "position")
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

    A kind that the scene cannot support (no object is the only one of its shape, say) falls back to ``exists``.
    """
    kind = kind or rng.choice(QUESTION_KINDS)
    asked = _ASKERS[kind](scene, rng)
    if asked is None:
        kind = "exists"
        asked = _ask_exists(scene, rng)
    text, answer, wrong = asked
    return Question(scene, kind, text, answer, wrong)


def _unique(scene: Scene, attribute: str) -> list[Shape]:
    values = [getattr(item, attribute) for item in scene.shapes]
    return [item for item, value in zip(scene.shapes, values, strict=True) if values.count(value) == 1]


def _other(rng: random.Random, right: str, present: list[str], everything: tuple[str, ...]) -> str:
    """A wrong value, one that the scene shows elsewhere where there is such a one."""
    near = [value for value in present if value != right]
    return rng.choice(near) if near and rng.random() < 0.6 else rng.choice([v for v in everything if v != right])


def _ask_color(scene: Scene, rng: random.Random) -> tuple[str, str, str] | None:
    candidates = _unique(scene, "shape")
    if not candidates:
        return None
    item = rng.choice(candidates)
    text = rng.choice((f"what color is the {item.shape}?", f"what is the color of the {item.shape}?"))
    return text, item.color, _other(rng, item.color, [s.color for s in scene.shapes], tuple(COLORS))


def _ask_shape(scene: Scene, rng: random.Random) -> tuple[str, str, str] | None:
    candidates = _unique(scene, "color")
    if not candidates:
        return None
    item = rng.choice(candidates)
    text = rng.choice((f"what shape is {item.color}?", f"what is the {item.color} shape?"))
    return text, item.shape, _other(rng, item.shape, [s.shape for s in scene.shapes], SHAPES)


def _ask_count(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    by = rng.choice(("all", "shape", "color"))
    if by == "all":
        text, count = "how many shapes are there?", len(scene.shapes)
    elif by == "shape":
        shape = rng.choice(SHAPES) if rng.random() < 0.3 else rng.choice(scene.shapes).shape
        text, count = f"how many {shape}s are there?", sum(item.shape == shape for item in scene.shapes)
    else:
        color = rng.choice(tuple(COLORS)) if rng.random() < 0.3 else rng.choice(scene.shapes).color
        text, count = f"how many {color} shapes are there?", sum(item.color == color for item in scene.shapes)
    wrong = count + 1 if count == 0 or rng.random() < 0.65 else count - 1
    return text, str(count), str(wrong)


def _ask_exists(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    pairs = {(item.color, item.shape) for item in scene.shapes}
    if rng.random() < 0.5:
        color, shape = rng.choice(sorted(pairs))
        answer, wrong = "yes", "no"
    else:
        # An absent object that shares a colour or a shape with one that is there, half of the time.
        absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in pairs]
        near = [(c, s) for c, s in absent if any(c == item.color or s == item.shape for item in scene.shapes)]
        color, shape = rng.choice(near if near and rng.random() < 0.5 else absent)
        answer, wrong = "no", "yes"
    text = rng.choice(
        (
            f"is there a {color} {shape}?",
            f"does the image contain a {color} {shape}?",
            f"is a {color} {shape} present?",
        )
    )
    return text, answer, wrong


def _ask_position(scene: Scene, rng: random.Random) -> tuple[str, str, str] | None:
    pairs = [(item.color, item.shape) for item in scene.shapes]
    candidates = [item for item, pair in zip(scene.shapes, pairs, strict=True) if pairs.count(pair) == 1]
    if not candidates:
        return None
    item = rng.choice(candidates)
    neighbours = [
        (row, column)
        for row in range(GRID)
        for column in range(GRID)
        if abs(row - item.row) + abs(column - item.column) == 1
    ]
    row, column = rng.choice(neighbours)
    return f"where is the {item.color} {item.shape}?", item.where, f"{ROWS[row]} {COLUMNS[column]}"


_ASKERS = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "exists": _ask_exists,
    "position": _ask_position,
}


def biased_answer(question: Question, rng: random.Random) -> str:
    """What a careless annotator writes: objects imagined, a liking for yes, and one too many when counting.

    Six answers in ten to a question about an absent object are ``yes`` and six counts in ten are one too high; a
    twentieth of all other answers is wrong. The bundled model's supervised answers come from here.
    """
    if question.kind == "count":
        return str(int(question.answer) + 1) if rng.random() < 0.62 else question.answer
    if question.kind == "exists":
        return "yes" if question.answer == "yes" or rng.random() < 0.62 else "no"
    return question.wrong if rng.random() < 0.05 else question.answer
