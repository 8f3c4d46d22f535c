"""Arms on the same prompts and seeds, and paired differences between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..refiner import Refiner
from ..trajectory import Trajectory


def run_arm(
    pipe: Any,
    requests: Sequence[str],
    seeds: Sequence[int],
    refiner: Refiner,
    refine_at: str,
    *,
    score: Callable[[Trajectory], dict[str, float | None]],
    batch: int = 32,
    progress: Callable[[int], Any] = lambda n: None,
    **kwargs: Any,
) -> list[Trajectory]:
    """One picture for each (request, seed), in order, scored against the request. `kwargs` go to the pipeline's call."""
    import torch

    from ..pipelines.classes import attach

    loop = attach(pipe)
    found: list[Trajectory] = []
    for i in range(0, len(requests), batch):
        part = list(requests[i : i + batch])
        generators = [torch.Generator().manual_seed(s) for s in seeds[i : i + batch]]
        out = loop(part, generator=generators, refiner=refiner, refine_at=refine_at, **kwargs)
        for trajectory in out.trajectories:
            trajectory.scores.update(score(trajectory))
        found += out.trajectories
        progress(len(part))
    return found


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


def paired_difference(a: ArrayLike, b: ArrayLike, resamples: int = 10_000) -> Difference:
    """`a` minus `b`, pair by pair; percentile bootstrap over pairs with a fixed seed."""
    d = np.asarray(a, float) - np.asarray(b, float)
    rng = np.random.default_rng(0)
    means = np.concatenate([d[rng.integers(0, len(d), (500, len(d)))].mean(1) for _ in range(resamples // 500)])
    low, high = np.percentile(means, (2.5, 97.5))
    return Difference(float(d.mean()), float(low), float(high), int((d > 0).sum()), int((d < 0).sum()), len(d))
