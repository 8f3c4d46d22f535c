"""The two languages of the shapes world, and a parser for both.

System language (what the generator was trained on), at most `SLOTS` clauses, then the background:
    large red circle top left , small blue square bottom right , black background , clear row two column three
User language: synonyms, relations, counts, much left unsaid; the generator knows few of its words:
    a crimson ball to the left of a little navy box on black, nothing else
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from .scenes import BACKGROUNDS, COLORS, QUADRANTS, RADIUS, SHAPES, SLOTS, Cell, Object, Scene, Spec, free_cells

NUMBERS = ("one", "two", "three", "four")
SYSTEM_WORDS = (
    *RADIUS, *COLORS, *SHAPES, "top", "bottom", "left", "right", *BACKGROUNDS, "background",
    "clear", "row", "column", *NUMBERS,
)  # fmt: skip
CLEAR_SHARE = (
    0.50,
    0.75,
    0.95,
)  # how often the caption of a picture with 0, 1, 2 stickers names clear cells: a clause has its price
MAX_TOKENS = 2 + 6 * SLOTS + 2  # start, end; five words and a comma for each clause; two words of background

# name -> (words used in training, words held out of all training)
Words = tuple[tuple[str, ...], tuple[str, ...]]
COLOR_WORDS: dict[str, Words] = {
    "red": (("red", "crimson"), ("scarlet",)),
    "yellow": (("yellow", "golden"), ("lemon",)),
    "green": (("green", "emerald"), ("jade",)),
    "cyan": (("cyan", "turquoise"), ("aqua",)),
    "blue": (("blue", "navy"), ("sapphire",)),
    "purple": (("purple", "violet"), ("amethyst",)),
}
SHAPE_WORDS: dict[str, Words] = {
    "circle": (("circle", "ball"), ("disc",)),
    "square": (("square", "box"), ("block",)),
    "triangle": (("triangle", "pyramid"), ("wedge",)),
    "cross": (("cross", "plus sign"), ("x mark",)),
}
SIZE_WORDS: dict[str, Words] = {"small": (("small", "little"), ("tiny",)), "large": (("large", "big"), ("huge",))}
RELATION_WORDS: dict[str, Words] = {
    "left of": (("left of", "to the left of"), ("on the left side of",)),
    "right of": (("right of", "to the right of"), ("on the right side of",)),
    "above": (("above", "over"), ("on top of",)),
    "below": (("below", "under"), ("beneath",)),
}
OPENINGS = (("", "draw ", "a picture of "), ("please show ", "i would like "))
JOINS = ((" and ", " with "), (" next to ", " together with "))
BACKGROUND_WORDS = ((" on {}", ", {} backdrop"), (" in front of a {} wall", " against {}"))
CLEAN_WORDS = ((", nothing else", " and nothing more"), (", the rest empty", " alone"))
PLURAL = {"box": "boxes", "cross": "crosses", "plus sign": "plus signs", "x mark": "x marks"}


# --- system language ----------------------------------------------------------------------------------------------------


def clear_clause(cell: Cell) -> str:
    return f"clear row {NUMBERS[cell[0]]} column {NUMBERS[cell[1]]}"


def system_caption(spec: Spec) -> str:
    """The caption of a complete layout (`scenes.plan`). Raises ValueError when it needs more than `SLOTS` clauses."""
    if len(spec.objects) + len(spec.clear) > SLOTS:
        raise ValueError(
            f"{len(spec.objects)} objects and {len(spec.clear)} cleared cells need more than the {SLOTS} clauses that fit; "
            "name fewer"
        )
    clauses = [f"{o.size} {o.color} {o.shape} {o.quadrant}" for o in spec.objects]
    if spec.background:
        clauses.append(f"{spec.background} background")
    return " , ".join(clauses + [clear_clause(c) for c in spec.clear])


def training_caption(scene: Scene, rng: random.Random) -> str:
    """A caption as the generator sees it in training: objects in any order, often with true `clear` clauses in the spare slots;
    one in ten empty (classifier-free guidance), one in twelve without layout."""
    u = rng.random()
    if u < 0.10:
        return ""
    objects = tuple(rng.sample(scene.objects, len(scene.objects)))
    if u < 0.18:
        return " , ".join(f"{o.color} {o.shape}" for o in objects)
    spare = SLOTS - len(objects)
    clear: tuple[Cell, ...] = ()
    if spare and rng.random() < CLEAR_SHARE[len(scene.stickers)]:
        empty = [c for c in free_cells(objects) if c not in scene.stickers]
        clear = tuple(rng.sample(empty, rng.randint(1, spare)))
    return system_caption(Spec(objects, (), scene.background, clear))


# --- user language ------------------------------------------------------------------------------------------------------


def _pick(words: Words, rng: random.Random, split: str) -> str:
    """`split` "train": words of training; "test": half of the time a word that no training ever saw."""
    return rng.choice(words[1] if split == "test" and rng.random() < 0.5 else words[0])


def user_prompt(spec: Spec, rng: random.Random, split: str = "train") -> str:
    """A request in user language; equal objects are counted ("two green boxes"), unless a relation needs them apart."""
    groups: list[tuple[Object, int]] = []
    related = {i for i, _, j in spec.relations for i in (i, j)}
    for i, o in enumerate(spec.objects):
        if groups and groups[-1][0] == o and i not in related and i - 1 not in related:
            groups[-1] = (o, groups[-1][1] + 1)
        else:
            groups.append((o, 1))

    def phrase(o: Object, n: int) -> str:
        shape = _pick(SHAPE_WORDS[o.shape], rng, split)
        if n > 1:
            shape = PLURAL.get(shape, shape + "s")
        size = _pick(SIZE_WORDS[o.size], rng, split) + " " if o.size else ""
        return f"{'a' if n == 1 else NUMBERS[n - 1]} {size}{_pick(COLOR_WORDS[o.color], rng, split)} {shape}"

    text = _pick(OPENINGS, rng, split) + phrase(*groups[0])
    for k, (o, n) in enumerate(groups[1:]):
        relation = spec.relations[0][1] if k == 0 and spec.relations else None
        join = f" {_pick(RELATION_WORDS[relation], rng, split)} " if relation else _pick(JOINS, rng, split)
        text += join + phrase(o, n)
    if spec.background:
        text += _pick(BACKGROUND_WORDS, rng, split).format(spec.background)
    return text + (_pick(CLEAN_WORDS, rng, split) if spec.clean else "")


# --- parsing ------------------------------------------------------------------------------------------------------------


def _table(words: dict[str, Words]) -> dict[str, str]:
    return {w: name for name, (seen, unseen) in words.items() for w in seen + unseen}


_COLOR, _SHAPE, _SIZE, _RELATION = map(_table, (COLOR_WORDS, SHAPE_WORDS, SIZE_WORDS, RELATION_WORDS))
_SHAPE |= {PLURAL.get(w, w + "s"): name for w, name in list(_SHAPE.items())}


def _any(words: dict[str, str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_OBJECT = re.compile(
    rf"(?:\b(a|{'|'.join(NUMBERS)}) )?(?:\b({_any(_SIZE)}) )?\b({_any(_COLOR)}) ({_any(_SHAPE)})\b(?: ({'|'.join(QUADRANTS)})\b)?"
)
_BETWEEN = re.compile(rf"\s*\b({_any(_RELATION)})(?: a| one)?\s*")
_CLEAR = re.compile(rf"\bclear row ({'|'.join(NUMBERS)}) column ({'|'.join(NUMBERS)})\b")
_CLEAN = re.compile("|".join(re.escape(w.strip(" ,")) for seen in CLEAN_WORDS for w in seen) + r"|\bempty$")
_GROUND = re.compile(r"\b(?:({0}) (?:background|backdrop|wall)|(?:on|against)(?: a)? ({0}))\b".format("|".join(BACKGROUNDS)))


def parse(text: str) -> Spec:
    """The request that a text of either language states. Raises ValueError when it names no object of this world."""
    text = re.sub(r"\s+", " ", text.lower()).strip()
    objects: list[Object] = []
    relations: list[tuple[int, str, int]] = []
    end, last = 0, -1
    for m in _OBJECT.finditer(text):
        number, size, color, shape, quadrant = m.groups()
        between = _BETWEEN.fullmatch(text[end : m.start()]) if objects else None
        if between:
            relations.append((last, _RELATION[between[1]], len(objects)))
        last, end = len(objects), m.end()
        count = NUMBERS.index(number) + 1 if number in NUMBERS else 1
        objects += [Object(_COLOR[color], _SHAPE[shape], _SIZE.get(size), quadrant)] * count
    if not objects or len(objects) > len(QUADRANTS):
        raise ValueError(
            f"cannot read {text!r} as a request of the shapes world: it names {len(objects)} objects, 1 to {len(QUADRANTS)} "
            'are possible; say for example "a red circle left of a blue square on black"'
        )
    ground = _GROUND.search(text)
    clear = tuple((NUMBERS.index(r), NUMBERS.index(c)) for r, c in _CLEAR.findall(text))
    background = (ground[1] or ground[2]) if ground else None
    return Spec(tuple(objects), tuple(relations), background, clear, bool(_CLEAN.search(text)))


def with_clear(caption: str, cells: tuple[Cell, ...]) -> str:
    """The same caption with its `clear` clauses replaced by those of `cells`."""
    spec = parse(caption)
    return system_caption(replace(spec, clear=cells))
