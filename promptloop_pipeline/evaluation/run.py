"""An arm: pictures for requests and seeds, by one refiner and schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    for rows in _batches(len(requests), batch, sources):
        part = [requests[k] for k in rows]
        generators = [torch.Generator().manual_seed(seeds[k]) for k in rows]
        start = {} if sources is None else {"image": [sources[k] for k in rows]}
        out = loop(part, generator=generators, refiner=refiner, refine_at=refine_at, **start, **kwargs)
        for trajectory in out.trajectories:
            trajectory.scores.update(score(trajectory))
        found += out.trajectories
        progress(len(part))
    return found


def _batches(n: int, size: int, sources: Sequence[Any] | None) -> Iterator[list[int]]:
    """Rows in order, at most `size` at a time, with pictures to start from of one size: others would be squashed to that of the
    first."""
    rows: list[int] = []
    for k in range(n):
        if rows and (len(rows) == size or (sources is not None and sources[k].size != sources[rows[0]].size)):
            yield rows
            rows = []
        rows.append(k)
    if rows:
        yield rows
