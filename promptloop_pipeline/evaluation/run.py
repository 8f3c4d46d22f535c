"""An arm: pictures for requests and seeds, by one refiner and schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..refiner import Refiner
from ..trajectory import Trajectory


def run_arm(
    pipe: Any,
    requests: Sequence[str],
    seeds: Sequence[int],
    refiner: Refiner,
    refine_at: str,
    *,
    score: Callable[[Trajectory], dict[str, float | None]] = lambda _: {},
    batch: int = 32,
    progress: Callable[[int], Any] = lambda n: None,
    sources: Sequence[Any] | None = None,
    **kwargs: Any,
) -> list[Trajectory]:
    """One picture for each (request, seed), in order, scored against the request. sources: pictures to start from, one for each.
    `kwargs` go to the pipeline's call."""
    import torch

    from ..pipelines.classes import attach

    loop = attach(pipe)
    found: list[Trajectory] = []
    for i in range(0, len(requests), batch):
        part = list(requests[i : i + batch])
        generators = [torch.Generator().manual_seed(s) for s in seeds[i : i + batch]]
        start = {} if sources is None else {"image": list(sources[i : i + batch])}
        out = loop(part, generator=generators, refiner=refiner, refine_at=refine_at, **start, **kwargs)
        for trajectory in out.trajectories:
            trajectory.scores.update(score(trajectory))
        found += out.trajectories
        progress(len(part))
    return found
