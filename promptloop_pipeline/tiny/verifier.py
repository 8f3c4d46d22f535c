"""The exact judge of the shapes world: reads a picture without any model and compares it with a request.

Each quadrant is read on its own: foreground against the background colour, connected components, colour by vote over the
core, shape by the best overlap with an ideal outline fitted into the component's box. On rendered scenes it is never
wrong (tested); on generated ones a malformed shape is no shape. Stickers count only against requests that want nothing else,
and against `clear` clauses: nobody said that they may not be there otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw

from .language import parse
from .scenes import (
    BACKGROUNDS,
    CELLS,
    COLORS,
    GRID,
    QUADRANTS,
    SHAPES,
    SIZE,
    STICKER,
    Cell,
    Object,
    Spec,
    holds,
    outline,
)  # fmt: skip

_ZOOM = 4  # pixels are read at this magnification
_HALF = SIZE * _ZOOM // 2
_CELL = SIZE * _ZOOM // GRID
_PALETTE = np.array([*COLORS.values(), STICKER], float)
_NAMES = (*COLORS, "sticker")
_CONTRAST = 60.0  # RGB distance from the background that makes a pixel foreground
_EDGE = 0.5  # an object ends where its contrast has fallen to this share of its colour's
_MIN_AREA = 9 * _ZOOM**2  # smaller components are no objects
_OVERLAP = 0.75  # least intersection over union with an ideal outline
_LARGE = 10.4  # pixels: longer side of a component from which on it is large


@dataclass(frozen=True)
class Seen:
    """One component: `color` of `COLORS` or "sticker"; `shape` None where malformed; centre in pixels."""

    color: str
    shape: str | None
    size: str
    quadrant: str
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    background: str | None
    objects: tuple[Seen, ...]
    stickers: tuple[Cell, ...]


@dataclass(frozen=True)
class Verdict:
    """`score` in [0, 1]: mean over the atoms (each object, size, quadrant, relation, background, absence); `strict`: all
    of them hold; `missing`: the atoms that do not, in words."""

    score: float
    strict: bool
    atoms: tuple[tuple[str, float], ...]
    reading: Reading

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name, value in self.atoms if value < 1)


def _as_array(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """float (size, size, 3), 0 to 255, from a PIL image or a uint8 array of any size."""
    picture = Image.fromarray(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
    picture = picture.convert("RGB")
    if picture.size != (SIZE, SIZE):
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(picture if size == SIZE else picture.resize((size, size), Image.Resampling.BICUBIC), dtype=float)


def _neighbours(mask: np.ndarray) -> tuple[np.ndarray, ...]:
    p = np.pad(mask, 1)
    return p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]


def _components(mask: np.ndarray) -> list[np.ndarray]:
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        grown = np.maximum.reduce([labels, *_neighbours(labels)]) * mask
        if (grown == labels).all():
            return [labels == k for k in np.unique(labels) if k]
        labels = grown


@lru_cache(maxsize=4096)
def _ideal(shape: str, width: int, height: int) -> np.ndarray:
    """The outline of `shape` stretched into a box of width x height."""
    corners = np.array(outline(shape, 0.0, 0.0, 1.0))
    corners = (corners - corners.min(0)) / np.ptp(corners, axis=0)
    canvas = Image.new("1", (4 * width, 4 * height))
    ImageDraw.Draw(canvas).polygon([(float(x) * 4 * width, float(y) * 4 * height) for x, y in corners], fill=1)
    return np.asarray(canvas.convert("L").reduce(4)) > 127


def _shape_of(mask: np.ndarray) -> tuple[str | None, float]:
    """(shape, longer side in pixels) of one component."""
    if not mask.any():
        return None, 0.0
    ys, xs = np.nonzero(mask)
    crop = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    height, width = crop.shape
    side = max(height, width) / _ZOOM
    if max(height, width) > 1.35 * min(height, width):
        return None, side
    overlaps = {}
    for shape in SHAPES:
        ideal = _ideal(shape, width, height)
        overlaps[shape] = (crop & ideal).sum() / (crop | ideal).sum()
    best = max(overlaps, key=lambda s: overlaps[s])
    return (best if overlaps[best] >= _OVERLAP else None), side


def background_of(image: Image.Image | np.ndarray) -> str | None:
    """Name of the background colour, by the median of the outermost pixels; None when it is neither."""
    a = _as_array(image, SIZE)
    border = np.median(np.concatenate([a[0], a[-1], a[:, 0], a[:, -1]]), axis=0)
    distance = {name: float(np.linalg.norm(border - rgb)) for name, rgb in BACKGROUNDS.items()}
    best = min(distance, key=lambda n: distance[n])
    return best if distance[best] < 60 else None


def read(image: Image.Image | np.ndarray) -> Reading:
    """What is in the picture."""
    background = background_of(image)
    a = _as_array(image, SIZE * _ZOOM)
    ground = np.array(BACKGROUNDS[background or "black"], float)
    contrast = np.linalg.norm(a - ground, axis=-1)
    nearest = ((a[:, :, None] - _PALETTE) ** 2).sum(-1).argmin(-1)
    objects: list[Seen] = []
    stickers: set[Cell] = set()
    for quadrant, (qx, qy) in QUADRANTS.items():
        top, left = (qy * _ZOOM // _HALF) * _HALF, (qx * _ZOOM // _HALF) * _HALF
        window = np.s_[top : top + _HALF, left : left + _HALF]
        for mask in _components(contrast[window] > _CONTRAST):
            if mask.sum() < _MIN_AREA:
                continue
            strength = contrast[window]
            core = mask & (strength >= 0.8 * strength[mask].max())  # not the blurred rim, whose colours mislead
            votes = np.bincount(nearest[window][core], minlength=len(_NAMES))
            color = _NAMES[int(votes.argmax())]
            pure = votes.max() >= 0.6 * votes.sum()
            ys, xs = np.nonzero(mask)
            x, y = float(left + xs.mean() + 0.5) / _ZOOM, float(top + ys.mean() + 0.5) / _ZOOM
            if color == "sticker":
                rows, columns = (top + ys) // _CELL, (left + xs) // _CELL  # two may touch: count by cell
                found = [
                    ((r, c), int(((rows == r) & (columns == c)).sum())) for r, c in set(zip(rows.tolist(), columns.tolist()))
                ]
                stickers |= {cell for cell, area in found if area >= min(_MIN_AREA, max(a for _, a in found))}
                continue
            full = np.linalg.norm(_PALETTE[votes.argmax()] - ground)
            shape, side = _shape_of(mask & (strength > _EDGE * full))
            objects.append(Seen(color, shape if pure else None, "large" if side >= _LARGE else "small", quadrant, x, y))
    return Reading(background, tuple(objects), tuple(c for c in CELLS if c in stickers))


def _likeness(o: Object, s: Seen | None) -> float:
    """1 for the thing itself, 0.4 for its colour or its shape alone, 0 for nothing of it."""
    if s is None or (s.color != o.color and s.shape != o.shape):
        return 0.0
    return 1.0 if (s.color, s.shape) == (o.color, o.shape) else 0.4


def _atoms(spec: Spec, seen: tuple[Seen | None, ...]) -> list[tuple[str, float]]:
    """The atoms of the requested objects under one assignment of what was seen to what was asked for."""
    atoms: list[tuple[str, float]] = []
    found: list[Seen | None] = []  # only where it is the thing itself
    names = [f"{o.color} {o.shape}" for o in spec.objects]
    for name, o, s in zip(names, spec.objects, seen, strict=True):
        atoms.append((name, _likeness(o, s)))
        found.append(s if atoms[-1][1] == 1 else None)
        if o.size:
            atoms.append((f"{name} is {o.size}", float(found[-1] is not None and found[-1].size == o.size)))
        if o.quadrant:
            atoms.append((f"{name} at {o.quadrant}", float(found[-1] is not None and found[-1].quadrant == o.quadrant)))
    for i, relation, j in spec.relations:
        a, b = found[i], found[j]
        ok = a is not None and b is not None and holds(relation, QUADRANTS[a.quadrant], QUADRANTS[b.quadrant])
        atoms.append((f"{names[i]} {relation} {names[j]}", float(ok)))
    return atoms


def verify(image: Image.Image | np.ndarray, request: str | Spec) -> Verdict:
    """Judges a picture against a request of either language (or a parsed one).

    Raises ValueError when the request names nothing of this world.
    """
    return judge(read(image), parse(request) if isinstance(request, str) else request)


def judge(reading: Reading, spec: Spec) -> Verdict:
    """`verify` on a picture that was read already."""
    n = len(spec.objects)
    pool: list[Seen | None] = [*reading.objects[:6], *([None] * n)]
    best: list[tuple[str, float]] = []
    for seen in {p for p in permutations(pool, n)}:
        atoms = _atoms(spec, seen)
        if not best or sum(v for _, v in atoms) > sum(v for _, v in best):
            best = atoms
    if spec.background:
        best.append((f"{spec.background} background", float(reading.background == spec.background)))
    extra = len(reading.objects) - n
    best.append(("no other object", 1.0 if extra <= 0 else max(0.0, 1 - 0.5 * extra)))
    if spec.clean:
        best.append(("nothing else", float(not reading.stickers)))
    for row, column in spec.clear:
        best.append((f"clear row {row + 1} column {column + 1}", float((row, column) not in reading.stickers)))
    values = [v for _, v in best]
    return Verdict(float(np.mean(values)), all(v == 1 for v in values), tuple(best), reading)


def sticker_amounts(image: Image.Image | np.ndarray, background: str) -> np.ndarray:
    """(4, 4): how much of each cell's centre is foreground, 0 to 1. Works on blurred x0-previews, where components do not."""
    a = _as_array(image, SIZE)
    ground = np.array(BACKGROUNDS[background], float)
    contrast = np.linalg.norm(a - ground, axis=-1) / np.linalg.norm(np.array(STICKER, float) - ground)
    cell = SIZE // GRID
    tiles = contrast.reshape(GRID, cell, GRID, cell).transpose(0, 2, 1, 3)[:, :, 2:-2, 2:-2]
    return np.asarray(tiles.mean((2, 3)).clip(0, 1))


__all__ = ["Object", "Reading", "Seen", "Verdict", "background_of", "read", "sticker_amounts", "verify"]
