"""Means, differences and shares, each with a 95% interval. Several pictures of one prompt are one sample: they are averaged first
(`by_prompt`), or the interval would be too sure."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Values = Sequence[float | None]
RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """Mean paired difference with a bootstrap interval of 95%; `better`, `worse`: pairs that differ either way."""

    mean: float
    low: float
    high: float
    better: int
    worse: int
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}] (n = {self.n}, {self.better} better, {self.worse} worse)"


def paired_difference(a: ArrayLike, b: ArrayLike, resamples: int = RESAMPLES) -> Difference:
    """`a` minus `b`, pair by pair; percentile bootstrap over pairs with a fixed seed."""
    d = np.asarray(a, float) - np.asarray(b, float)
    low, high = np.percentile(_resampled_means(d, np.random.default_rng(0), resamples), (2.5, 97.5))
    return Difference(float(d.mean()), float(low), float(high), int((d > 0).sum()), int((d < 0).sum()), len(d))


def _resampled_means(v: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES) -> np.ndarray:
    at_once = max(1, min(500, 5_000_000 // len(v)))
    parts = [at_once] * (resamples // at_once) + [resamples % at_once] * (resamples % at_once > 0)
    return np.concatenate([v[rng.integers(0, len(v), (k, len(v)))].mean(1) for k in parts])


def by_prompt(values: Values, requests: Sequence[Hashable]) -> list[float | None]:
    """The mean of the values of each request, in the order in which they first come, without those that are None; None where all
    are."""
    groups: dict[Hashable, list[float]] = {}
    for value, request in zip(values, requests, strict=True):
        groups.setdefault(request, []).extend([] if value is None else [value])
    return [sum(group) / len(group) if group else None for group in groups.values()]


def mean(values: Values) -> dict[str, float | int | None]:
    """With a 95% interval: Wilson's for shares (a bootstrap would be sure of a share of 0 or 1), else a percentile bootstrap; low and
    high None where a single value says nothing of it."""
    v = np.array([x for x in values if x is not None], float)
    if not len(v):
        return {"mean": None, "low": None, "high": None, "n": 0}
    if np.isin(v, (0, 1)).all():
        z2, p = 1.959964**2 / len(v), v.mean()
        middle, half = (p + z2 / 2) / (1 + z2), np.sqrt(z2 * (p * (1 - p) + z2 / 4)) / (1 + z2)
        low, high = max(0.0, middle - half), min(1.0, middle + half)
    else:
        low, high = (d := paired_difference(v, np.zeros(len(v)))).low, d.high
    if len(v) == 1 and not np.isin(v, (0, 1)).all():
        return {"mean": float(v[0]), "low": None, "high": None, "n": 1}
    return {"mean": float(v.mean()), "low": float(low), "high": float(high), "n": len(v)}


def difference(a: Values, b: Values, *, paired: bool) -> dict[str, Any] | None:
    """`a` minus `b` with a 95% bootstrap interval; None where nothing can be compared."""
    if paired:
        both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        found = {"paired": True, **asdict(paired_difference([x for x, _ in both], [y for _, y in both]))} if both else None
        return found | {"low": None, "high": None} if found and len(both) == 1 else found
    left, right = (np.array([x for x in values if x is not None], float) for values in (a, b))
    if not len(left) or not len(right):
        return None
    rng = np.random.default_rng(0)
    one, two = _resampled_means(left, rng), _resampled_means(right, rng)
    low, high = np.percentile(one - two, (2.5, 97.5))
    return {"paired": False, "mean": float(left.mean() - right.mean()), "low": float(low), "high": float(high)}


def share(hits: Sequence[int], of: Sequence[int]) -> dict[str, float | int | None]:
    """Hits in all, one entry a sample. The interval is a percentile bootstrap over samples, since the turns of one are alike."""
    a, b = np.asarray(hits), np.asarray(of)
    found: dict[str, float | int | None] = {"mean": None, "low": None, "high": None, "count": int(a.sum()), "of": int(b.sum())}
    if not b.sum():
        return found
    rng = np.random.default_rng(0)
    ratios: list[float] = []
    for _ in range(RESAMPLES // 500):
        picked = rng.integers(0, len(a), (500, len(a)))
        top, bottom = a[picked].sum(1), b[picked].sum(1)
        ratios += (top[bottom > 0] / bottom[bottom > 0]).tolist()
    low, high = np.percentile(ratios, (2.5, 97.5))
    return found | {"mean": float(a.sum() / b.sum()), "low": float(low), "high": float(high)}
