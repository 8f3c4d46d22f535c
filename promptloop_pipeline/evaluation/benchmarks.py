"""What is asked for, how it is judged, and the figures of arms that were judged.

A benchmark is plain data: requests, a score, the pipeline that is measured. A new one is a function that returns one, and a line
in `BENCHMARKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..tiny import load_pipeline
from ..tiny.benchmark import requests
from ..trajectory import Trajectory
from . import shapes as shapes_world
from .arms import ArmSpec
from .headroom import score as score_shapes
from .run import paired_difference

Scores = Sequence[float | None]
MOST = 10_000  # requests of shapes; there are more, but not so many more that drawing them would stay quick
REFERENCE = "loop"  # the arm that all others are held against


@dataclass(frozen=True)
class Benchmark:
    """metrics: names of scores, the one that matters most first; `choose_by`: the one that best-of-2 chooses by.
    turn_figures: what can be said of an arm's single turns; {} where nothing can."""

    name: str
    intro: str
    requests: list[str]
    score: Callable[[Trajectory], dict[str, float | None]]
    load_pipeline: Callable[[], Any]
    guidance_scale: float
    arms: tuple[ArmSpec, ...]
    metrics: tuple[str, ...]
    choose_by: str
    turn_figures: Callable[[Sequence[Trajectory]], dict[str, Any]] = lambda _: {}
    pixelated: bool = False


def shapes(n: int, objects: int) -> Benchmark:
    """The embedded world's held-out requests, judged by its exact verifier. Raises ValueError for a number it cannot have."""
    if not 1 <= objects <= 3:
        raise ValueError(f"--objects {objects}: a request of the shapes benchmark names 1, 2 or 3 objects")
    if n > MOST:
        raise ValueError(f"--n {n}: the shapes benchmark has at most {MOST} requests")
    return Benchmark(
        name="shapes",
        intro="Held-out requests of the embedded shapes world, which want nothing else in the picture; the generator scatters "
        "stickers that nobody asked for. All arms have the same requests and seeds. strict: everything is as asked, by an exact "
        "verifier, against the user's own words; score: the share of it that is.",
        requests=requests(n, "test", objects),
        score=score_shapes,
        load_pipeline=load_pipeline,
        guidance_scale=3.0,
        arms=shapes_world.ARMS,
        metrics=("strict", "score"),
        choose_by="score",
        turn_figures=shapes_world.turn_figures,
        pixelated=True,
    )


BENCHMARKS: dict[str, Callable[[int, int], Benchmark]] = {"shapes": shapes}


# --- figures ------------------------------------------------------------------------------------------------------------


def figures(benchmark: Benchmark, arms: Mapping[str, Sequence[Trajectory]]) -> list[dict[str, Any]]:
    """One row of figures an arm, in order; JSON values only."""
    rows = []
    for spec in (a for name in arms for a in benchmark.arms if a.name == name):
        found = arms[spec.name]
        row: dict[str, Any] = {"arm": spec.name, "note": spec.note, "n": len(found)}
        row |= {m: mean(column(found, m)) for m in benchmark.metrics}
        row["changes_per_image"] = sum(turn.changed for t in found for turn in t.turns) / len(found)
        row["turns"] = sum(len(t.turns) for t in found)
        row["failed_turns"] = sum(len(t.failures) for t in found)
        row["seconds_per_image"] = sum(t.meta["seconds"] for t in found) / len(found)
        if REFERENCE in arms and spec.name != REFERENCE:
            row["loop_minus_arm"] = {
                m: difference(column(arms[REFERENCE], m), column(found, m), paired=True) for m in benchmark.metrics
            }
        if looks := benchmark.turn_figures(found):
            row["looks"] = looks
        rows.append(row)
    return rows


def column(arm: Sequence[Trajectory], metric: str) -> list[float | None]:
    return [t.scores[metric] for t in arm]


def mean(values: Scores) -> dict[str, float | int | None]:
    """With a 95% interval: Wilson's for shares (a bootstrap would be sure of a share of 0 or 1), else a percentile bootstrap."""
    v = np.array([x for x in values if x is not None], float)
    if not len(v):
        return {"mean": None, "low": None, "high": None, "n": 0}
    if np.isin(v, (0, 1)).all():
        z2, p = 1.959964**2 / len(v), v.mean()
        middle, half = (p + z2 / 2) / (1 + z2), np.sqrt(z2 * (p * (1 - p) + z2 / 4)) / (1 + z2)
        low, high = max(0.0, middle - half), min(1.0, middle + half)
    else:
        low, high = (d := paired_difference(v, np.zeros(len(v)))).low, d.high
    return {"mean": float(v.mean()), "low": float(low), "high": float(high), "n": len(v)}


def difference(a: Scores, b: Scores, *, paired: bool) -> dict[str, Any] | None:
    """`a` minus `b` with a 95% bootstrap interval; None where nothing can be compared."""
    if paired:
        both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        return {"paired": True, **asdict(paired_difference([x for x, _ in both], [y for _, y in both]))} if both else None
    left, right = (np.array([x for x in values if x is not None], float) for values in (a, b))
    if not len(left) or not len(right):
        return None
    rng = np.random.default_rng(0)
    one, two = (np.concatenate([v[rng.integers(0, len(v), (500, len(v)))].mean(1) for _ in range(20)]) for v in (left, right))
    low, high = np.percentile(one - two, (2.5, 97.5))
    return {"paired": False, "mean": float(left.mean() - right.mean()), "low": float(low), "high": float(high)}


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two results side by side, arm by arm: the second minus the first, in pairs where both have the same requests and seeds."""
    paired = all(first[k] == second[k] for k in ("requests", "seeds"))
    one, two = ({row["arm"]: row for row in results["arms"]} for results in (first, second))
    made_with = [{**r["settings"], **r.get("files", {}), **r.get("versions", {})} for r in (first, second)]
    rows: list[dict[str, Any]] = []
    for arm in dict.fromkeys([*one, *two]):
        scores = [results["scores"].get(arm, {}) for results in (first, second)]
        for metric in dict.fromkeys([*scores[0], *scores[1]]):
            row: dict[str, Any] = {"arm": arm, "figure": metric}
            row |= {side: mean(s[metric]) for side, s in zip(("first", "second"), scores) if metric in s}
            if all(metric in s for s in scores):
                row["second_minus_first"] = difference(scores[1][metric], scores[0][metric], paired=paired)
            rows.append(row)
        looks = [found.get(arm, {}).get("looks", {}) for found in (one, two)]
        for name in dict.fromkeys([*looks[0], *looks[1]]):
            rows.append({"arm": arm, "figure": name, **{s: x[name] for s, x in zip(("first", "second"), looks) if name in x}})
    values = {k: [m.get(k) for m in made_with] for k in dict.fromkeys([*made_with[0], *made_with[1]])}
    return {"paired": paired, "differs": {k: v for k, v in values.items() if v[0] != v[1]}, "rows": rows}
