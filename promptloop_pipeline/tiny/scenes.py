"""The shapes world: what a scene is, how scenes are drawn, and what is held out of all training.

A picture is 32 x 32 pixels. Requested objects live in the four quadrants, at most one each. The generator that is trained
on these pictures has a habit that nobody asks for: it scatters orange *stickers* over the free cells of a 4 x 4 grid. They
are in the training pictures, never in a positive caption, and differ with the seed: the embedded stand-in for what large
models add uninvited. The prompt language can forbid a sticker in one given cell only (`language.system_caption`), and
a prompt holds `SLOTS` clauses in all. Nor is a clause free: as with people, who say "no dog here" where dogs are about, captions
of pictures with more stickers name clear cells more often (`language.CLEAR_SHARE`). To forbid the right cell, one has to look.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw

SIZE = 32  # pixels on each side
SLOTS = 3  # clauses (objects and cleared cells together) that fit into one prompt
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (215, 35, 40),
    "yellow": (245, 230, 50),
    "green": (30, 150, 60),
    "cyan": (60, 205, 225),
    "blue": (40, 70, 220),
    "purple": (150, 50, 190),
}
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255)}
STICKER = (250, 140, 20)
RADIUS = {"small": 4.6, "large": 6.1}  # pixels
QUADRANTS: dict[str, tuple[float, float]] = {
    "top left": (8, 8),
    "top right": (24, 8),
    "bottom left": (8, 24),
    "bottom right": (24, 24),
}
RELATIONS = ("left of", "right of", "above", "below")
GRID = 4  # sticker cells on each side
CELLS = tuple((row, column) for row in range(GRID) for column in range(GRID))
STICKER_RADIUS = 3.0
STICKER_COUNTS = (0.15, 0.50, 0.35)  # probability of 0, 1, 2 stickers in a training picture

Cell = tuple[int, int]


@dataclass(frozen=True)
class Object:
    """One requested thing; `size` and `quadrant` are None where nothing was said."""

    color: str
    shape: str
    size: str | None = None
    quadrant: str | None = None


@dataclass(frozen=True)
class Spec:
    """What a request asks for. `relations`: (index, relation, index) over `objects`; `clear`: cells without a sticker;
    `clean`: nothing in the picture but what was asked for, so no sticker anywhere."""

    objects: tuple[Object, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None
    clear: tuple[Cell, ...] = ()
    clean: bool = False


@dataclass(frozen=True)
class Scene:
    """A fully determined picture, up to jitter."""

    objects: tuple[Object, ...]
    background: str
    stickers: tuple[Cell, ...] = ()


def cells_of(quadrant: str) -> tuple[Cell, ...]:
    x, y = QUADRANTS[quadrant]
    half = GRID // 2
    top, left = (0 if y < SIZE / 2 else half), (0 if x < SIZE / 2 else half)
    return tuple((top + r, left + c) for r in range(half) for c in range(half))


def free_cells(objects: tuple[Object, ...]) -> tuple[Cell, ...]:
    """Cells of the quadrants that hold no object: where stickers may be."""
    taken = {cell for o in objects if o.quadrant for cell in cells_of(o.quadrant)}
    return tuple(cell for cell in CELLS if cell not in taken)


def holds(relation: str, a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether a thing at `a` = (x, y) is `relation` a thing at `b`: on the same row or column of quadrants, in order."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return abs(across) < SIZE / 4 and (along > SIZE / 4 if relation in ("left of", "above") else along < -SIZE / 4)


# --- held out -----------------------------------------------------------------------------------------------------------


def _kind(o: Object) -> int:
    return list(COLORS).index(o.color) * len(SHAPES) + SHAPES.index(o.shape)


def held_out_pair(a: Object, b: Object) -> bool:
    """24 of the 276 pairs of coloured shapes never occur together in training, in any layout. They are pairs of one shape in two
    colours (a red and a blue square); each shape and each colour is in some of them."""
    low, high = sorted((_kind(a), _kind(b)))
    return low != high and (5 * low + 3 * high) % 8 == 0


def held_out(objects: tuple[Object, ...]) -> bool:
    return any(held_out_pair(a, b) for i, a in enumerate(objects) for b in objects[i + 1 :])


# --- sampling -----------------------------------------------------------------------------------------------------------


def _random_object(rng: random.Random) -> Object:
    return Object(rng.choice(list(COLORS)), rng.choice(SHAPES), rng.choice(list(RADIUS)))


def random_scene(rng: random.Random, count: int | None = None, split: str = "train") -> Scene:
    """`split` "train" never holds a held-out pair; "test" always does (for `count` >= 2); "any" draws freely."""
    while True:
        n = count or rng.choices((1, 2, 3), (0.2, 0.5, 0.3))[0]
        objects: list[Object] = []
        for quadrant in rng.sample(list(QUADRANTS), n):
            repeat = objects and rng.random() < 0.15  # so that counting requests are in the distribution
            objects.append(replace(objects[-1] if repeat else _random_object(rng), quadrant=quadrant))
        if split == "any" or held_out(tuple(objects)) == (split == "test" and n > 1):
            break
    n_stickers = rng.choices((0, 1, 2), STICKER_COUNTS)[0]
    stickers = tuple(rng.sample(free_cells(tuple(objects)), n_stickers))
    return Scene(tuple(objects), rng.choice(list(BACKGROUNDS)), stickers)


def random_spec(rng: random.Random, count: int | None = None, split: str = "train", clean: bool = False) -> Spec:
    """What a user could ask for: often no layout, size or background; sometimes a relation or a count."""
    scene = random_scene(rng, count, split)
    objects = tuple(replace(o, quadrant=None, size=o.size if rng.random() < 0.6 else None) for o in scene.objects)
    relations: tuple[tuple[int, str, int], ...] = ()
    if len(objects) >= 2 and objects[0] != objects[1] and rng.random() < 0.7:
        relations = ((0, rng.choice(RELATIONS), 1),)
    return Spec(objects, relations, scene.background if rng.random() < 0.7 else None, clean=clean)


def plan(spec: Spec, rng: random.Random | None = None) -> Spec:
    """Completes a request to a full layout that satisfies it: free choices are the first valid ones, or drawn by `rng`."""
    options = list(permutations(QUADRANTS, len(spec.objects)))
    valid = [
        q
        for q in options
        if all(o.quadrant in (None, q[i]) for i, o in enumerate(spec.objects))
        and all(holds(rel, QUADRANTS[q[i]], QUADRANTS[q[j]]) for i, rel, j in spec.relations)
    ]
    if not valid:
        raise ValueError(f"no layout of four quadrants satisfies {spec}")
    quadrants = rng.choice(valid) if rng else valid[0]
    objects = tuple(replace(o, quadrant=q, size=o.size or "large") for o, q in zip(spec.objects, quadrants, strict=True))
    return replace(spec, objects=objects, background=spec.background or "black")


# --- drawing ------------------------------------------------------------------------------------------------------------

_SCALE = 8  # drawn this much larger, then box-filtered


def outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Polygon of a shape of radius `r` around (x, y); a circle is a polygon of 48 corners."""
    if shape == "circle":
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return [(x + r * float(np.cos(a)), y + r * float(np.sin(a))) for a in angles]
    if shape == "square":
        a = 0.92 * r
        return [(x - a, y - a), (x + a, y - a), (x + a, y + a), (x - a, y + a)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + 0.9 * r), (x - r, y + 0.9 * r)]
    w = 0.34 * r
    corners = [(-w, -r), (w, -r), (w, -w), (r, -w), (r, w), (w, w), (w, r), (-w, r), (-w, w), (-r, w), (-r, -w), (-w, -w)]
    return [(x + dx, y + dy) for dx, dy in corners]


def render(scene: Scene, rng: random.Random) -> np.ndarray:
    """uint8 array (32, 32, 3). `rng` draws the jitter of place and radius, small enough that nothing touches."""
    canvas = Image.new("RGB", (SIZE * _SCALE, SIZE * _SCALE), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)

    def put(shape: str, x: float, y: float, r: float, color: tuple[int, int, int]) -> None:
        pen.polygon([(px * _SCALE, py * _SCALE) for px, py in outline(shape, x, y, r)], fill=color)

    for o in scene.objects:
        x, y = QUADRANTS[o.quadrant or ""]
        jitter = 0.7 if o.size == "large" else 1.6
        r = RADIUS[o.size or "large"] * rng.uniform(0.96, 1.04)
        put(o.shape, x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter), r, COLORS[o.color])
    cell = SIZE / GRID
    for row, column in scene.stickers:
        x, y = (column + 0.5) * cell + rng.uniform(-0.4, 0.4), (row + 0.5) * cell + rng.uniform(-0.4, 0.4)
        put("circle", x, y, STICKER_RADIUS * rng.uniform(0.95, 1.05), STICKER)
    return np.asarray(canvas.reduce(_SCALE))
