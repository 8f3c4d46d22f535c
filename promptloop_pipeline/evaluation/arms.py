"""The arms of an evaluation: ways to generate from the same requests and seeds, and how they are rendered batch by batch onto
disk, so that a run that was stopped can be taken up again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..refiner import Around, Refinement, Refiner, View
from ..refiners.scripted import NoOpRefiner
from ..rewards.images import load_image
from ..session import check_refiner
from ..trajectory import FILE, Trajectory, iterate, save
from .memory import Meter
from .run import run_arm

SECOND = 10**6  # how far the second seeds lie from the first
GREY = (128, 128, 128)


@dataclass(frozen=True)
class ArmSpec:
    """One way to generate.

    make: the arm's refiner, made of the one under test; it is handed None where `needs_refiner` is False.
    refine_at: the arm's own schedule; None for the one that the user gave.
    second_of: the arm whose pictures these rival: rendered with second seeds, the better of the two counts.
    """

    name: str
    note: str
    make: Callable[[Any], Refiner]
    refine_at: str | None = None
    needs_refiner: bool = True
    second_of: str | None = None

    def seeds(self, first: int, n: int) -> range:
        first += SECOND if self.second_of else 0
        return range(first, first + n)


class GreyRefiner(Around):
    """Another refiner, shown a flat grey picture wherever there is one: what is left of it without eyes. The previews are made
    and recorded all the same."""

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        # earlier turns hold pictures too
        return self.refiner.refine([replace(_grey(v), turns=tuple(map(_grey, v.turns))) for v in views])


def _grey(seen: Any) -> Any:
    """A view or a turn without what can be seen in it."""
    from PIL import Image

    return seen if seen.image is None else replace(seen, image=Image.new("RGB", seen.image.size, GREY))


class UnseeingRefiner(Around):
    """Another refiner at the same turns, given no picture at all: rewriting again and again without looking."""

    looks = False

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        return self.refiner.refine([replace(v, image=None) for v in views])


class _Metered(Around):
    """A refiner whose looks are laps of a meter: what memory each needed."""

    def __init__(self, refiner: Refiner, meter: Meter) -> None:
        super().__init__(refiner)
        self.meter = meter
        self.peaks: list[dict[str, int]] = []  # of each look of the batch: its step, and bytes by device

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        self.meter.lap()
        try:
            return self.refiner.refine(views)
        finally:
            peaks = {device: of["peak"] for device, of in self.meter.lap().items()}
            self.peaks.append({"step": views[0].step, **peaks})


def _metered(refiner: Refiner, meter: Meter) -> _Metered:
    check_refiner(refiner)
    named = type(type(refiner).__name__, (_Metered,), {})  # errors speak of the refiner, not of what it is wrapped in
    return named(refiner, meter)


# What any benchmark can have; arms that know a benchmark's answers are its own.
RAW = ArmSpec("raw", "the user's words, as they are", lambda _: NoOpRefiner(), "none", needs_refiner=False)
SINGLE = ArmSpec("single", "rewritten once by the refiner, before the first step", lambda r: r, "start")
BLIND = ArmSpec("blind", "the refiner at its schedule, without any picture", UnseeingRefiner)
LOOP = ArmSpec("loop", "the refiner at its schedule, looking at the x0-estimate", lambda r: r)
LOOP_NOIMAGE = ArmSpec("loop-noimage", "the same refiner and schedule, shown a flat grey picture", GreyRefiner)
BEST_OF_2 = ArmSpec(
    "best-of-2", "single with two seeds, the better by the score itself: twice the cost", lambda r: r, "start", second_of="single"
)  # fmt: skip
ARMS = (RAW, SINGLE, BLIND, LOOP, LOOP_NOIMAGE, BEST_OF_2)


def with_rivals(chosen: Sequence[ArmSpec], allowed: Sequence[ArmSpec]) -> list[ArmSpec]:
    """The chosen arms and those that they rival: all that has to be rendered."""
    names = {a.name for a in chosen} | {a.second_of for a in chosen}
    return [*chosen, *(a for a in allowed if a.name in names and a not in chosen)]


def take_up(folder: Path, requests: Sequence[str], seeds: Sequence[int]) -> dict[int, Trajectory]:
    """What an arm's folder holds already, by position, without pictures. A record that was torn off in writing is cut off, to be
    rendered anew.

    Raises ValueError, naming the line, for a file that is damaged elsewhere, or holds something else.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    cut_torn(file)
    position = {key: i for i, key in enumerate(zip(requests, seeds, strict=True))}
    found: dict[int, Trajectory] = {}
    for t in iterate(file, pictures=False, previews=False):
        if (i := position.get((t.request, t.meta.get("seed", -1)))) is None or t.id != f"{i:05d}":
            raise ValueError(f"{file} holds pictures of other requests or seeds; choose another folder")
        found.setdefault(i, t)
    return found


def cut_torn(file: Path) -> None:
    """Cuts off a last line that was torn off in writing."""
    data = file.read_bytes()
    if (whole := data.rfind(b"\n") + 1) < len(data):
        with open(file, "r+b") as f:
            f.truncate(whole)


def render(
    pipe: Any,
    arm: ArmSpec,
    refiner: Refiner | None,
    refine_at: str,
    requests: Sequence[str],
    seeds: Sequence[int],
    done: dict[int, Trajectory],
    folder: Path,
    *,
    batch: int,
    sources: Sequence[str] | None = None,
    progress: Callable[[int], Any] = lambda n: None,
    **options: Any,
) -> None:
    """Renders what `done` lacks, onto disk and (without pictures) into it, batch by batch. sources: files of the pictures to start
    from. `options` go to the pipeline's call.

    Batches have the same bounds whatever is there already: a picture may differ in its last bit with the size of its batch.
    """
    the_refiner = None
    for first in range(0, len(requests), batch):
        todo = [i for i in range(first, min(first + batch, len(requests))) if i not in done]
        if not todo:
            continue
        the_refiner = arm.make(refiner) if the_refiner is None else the_refiner
        clock = time.perf_counter()
        starts = None if sources is None else [load_image(sources[i]) for i in todo]
        with Meter() as meter:
            metered = _metered(the_refiner, meter)
            found = run_arm(
                pipe, [requests[i] for i in todo], [seeds[i] for i in todo], metered, arm.refine_at or refine_at, batch=batch,
                sources=starts, progress=progress, **options,
            )  # fmt: skip
        seconds = (time.perf_counter() - clock) / len(todo)
        for i, t in zip(todo, found, strict=True):
            t.id = f"{i:05d}"
            t.meta |= {"arm": arm.name, "seconds": seconds, "memory": meter.found, "memory_by_turn": metered.peaks}
        save(found, folder)
        done |= {i: without_pictures(t) for i, t in zip(todo, found, strict=True)}


def without_pictures(t: Trajectory) -> Trajectory:
    return replace(t, image=None, turns=[replace(turn, image=None) for turn in t.turns], others=[])


def better(first: Trajectory, second: Trajectory, by: str) -> Trajectory:
    """The one with the higher score, at the cost of both; the first where they are equal."""
    a, b = (-float("inf") if (v := t.scores[by]) is None else v for t in (first, second))
    chosen = second if b > a else first
    return replace(chosen, meta=chosen.meta | {"seconds": first.meta["seconds"] + second.meta["seconds"]})
