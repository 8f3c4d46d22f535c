"""Refiners that need no model: the oracle that looks through the verifier's eyes, and the blind controls it is held against.

All of them start from the gold single-shot caption (scheduled at "start") and then spend the free slots of the prompt on
`clear` clauses. The oracle knows where to look because it reads the preview; the blind ones do not look. None is trained: the
oracle is an upper bound for what a trained refiner can gain, and is named as such wherever its figures stand.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..refiner import Refinement, View
from .language import clear_clause, parse, system_caption, with_clear
from .scenes import SLOTS, Cell, Spec, free_cells, plan
from .verifier import sticker_amounts, verify


def single_shot(request: str) -> str:
    """The gold rewrite of a request: the system caption of the first layout that satisfies it."""
    return system_caption(plan(parse(request)))


def _planned(request: str) -> Spec:
    return plan(parse(request))


class SingleShotRefiner:
    """The gold caption at the start; then nothing more."""

    looks = False

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        return [Refinement(single_shot(v.request)) if v.step == 0 else Refinement() for v in views]


class OracleRefiner:
    """Looks at the preview for stickers and forbids the cells where most of one is seen, as many as fit; else keeps the prompt.

    It uses the request's planned layout and the background, and the pixel measure of `verifier.sticker_amounts`; `threshold`
    is the least amount that counts as seen. Its reasoning says what is missing.
    """

    def __init__(self, threshold: float = 0.3) -> None:
        self.threshold = threshold

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        return [self._look(v) for v in views]

    def _look(self, view: View) -> Refinement:
        if view.image is None:
            return Refinement(single_shot(view.request), "no image yet: the request in the generator's words")
        spec = _planned(view.request)
        seen = verify(view.image, view.request).missing
        reasoning = f"not as asked: {'; '.join(seen)}" if seen else "all there"
        if not spec.clean:
            return Refinement(None, reasoning)
        amounts = sticker_amounts(view.image, spec.background or "black")
        spare = SLOTS - len(spec.objects)
        cells = sorted(free_cells(spec.objects), key=lambda c: -amounts[c])
        found = [c for c in cells if amounts[c] > self.threshold][:spare]
        if not found:
            return Refinement(None, reasoning)
        where = ", ".join(f"row {r + 1} column {c + 1} ({amounts[r, c]:.2f})" for r, c in found)
        return Refinement(with_clear(single_shot(view.request), tuple(found)), f"{reasoning}; a sticker forms at {where}")


class RotationRefiner:
    """Blind: forbids the free cells in turn, without looking. From the start on, so that no step is wasted.

    order: "rows", "columns", "spread" (far apart in a row), "center" (nearest the middle first) or "random" (its own for each
    request). `terse` drops commas and background after the start, which makes room for one more clause than training ever
    had; `alone` drops the objects too and fills all slots with clauses. With `hold` the first choice `hold` stays throughout.
    """

    looks = False

    def __init__(
        self, order: str = "rows", hold: int | None = None, terse: bool = False, alone: bool = False, from_start: bool = True
    ):
        self.order, self.hold, self.terse, self.alone, self.from_start = order, hold, terse, alone, from_start

    def _cells(self, request: str, spec: Spec) -> list[Cell]:
        cells = list(free_cells(spec.objects))
        if self.order == "columns":
            cells.sort(key=lambda c: (c[1], c[0]))
        elif self.order == "spread":
            cells = cells[::3] + cells[1::3] + cells[2::3]
        elif self.order == "center":
            cells.sort(key=lambda c: (c[0] - 1.5) ** 2 + (c[1] - 1.5) ** 2)
        elif self.order == "random":
            random.Random(request).shuffle(cells)
        return cells

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        return [Refinement(self._prompt(v)) for v in views]

    def _prompt(self, view: View) -> str:
        spec = _planned(view.request)
        cells = self._cells(view.request, spec)
        turn = len(view.turns)
        if self.hold is not None:
            return system_caption(replace(spec, clear=(cells[self.hold % len(cells)],)))
        if turn == 0 and not self.from_start:
            return system_caption(spec)
        spare = SLOTS - len(spec.objects)
        late = turn > 0 and (self.terse or self.alone)
        count = SLOTS if late and self.alone else spare + 1 if late else spare
        turn = turn if self.from_start else turn - 1
        chosen = [cells[(turn * count + k) % len(cells)] for k in range(count)]
        if not late:
            return system_caption(replace(spec, clear=tuple(chosen)))
        if self.alone:
            return " , ".join([f"{spec.background} background", *map(clear_clause, chosen)])
        objects = [f"{o.size} {o.color} {o.shape} {o.quadrant}" for o in spec.objects]
        return " ".join([*objects, *map(clear_clause, chosen)])


class YokedRefiner:
    """Plays another request's looking history: `cells[request][turn]` are ranks among the free cells. It has the looker's
    statistics of when and how often, but not where."""

    looks = False

    def __init__(self, ranks: Mapping[str, Sequence[tuple[int, ...]]]) -> None:
        self.ranks = ranks

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        answers = []
        for v in views:
            spec = _planned(v.request)
            cells = free_cells(spec.objects)
            chosen = self.ranks[v.request][len(v.turns)]
            answers.append(Refinement(system_caption(replace(spec, clear=tuple(cells[k % len(cells)] for k in chosen)))))
        return answers
