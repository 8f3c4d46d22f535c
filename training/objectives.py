"""Advantages of groups of trajectories: plain functions on lists of rewards.

A group holds the trajectories of one prompt: those that the policy refined, and those that were left as the user wrote them
("retained", PromptRL, arXiv 2602.01382), which enter mean and deviation and carry no loss. A reward that is None takes no part.

Where this departs: TRL repeats a trajectory's reward for each of its K turns before it takes the deviation, which makes
advantages larger by sqrt((G K - 1) / (K (G - 1))); here the deviation is over trajectories, as the papers have it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

EPSILON = 1e-4  # TRL's own; keeps the advantage of a nearly flat group finite
Rewards = Sequence[float | None]


def group_advantages(groups: Sequence[Rewards], scale: str = "group", std: float | None = None) -> list[list[float]]:
    """(reward - mean of its group) / (deviation + 1e-4), for each trajectory; 0 where there is no reward, or nothing to compare
    it with.

    scale: "group": the deviation of its own group (GRPO); "batch": that of all rewards, given as `std` where they are spread
    over several processes (Flow-GRPO's `global_std`); "none": no division (Dr. GRPO). Deviations divide by n - 1.

    Raises ValueError for another scale.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f'scale_rewards is {scale!r}; use "group", "batch" or "none"')
    everything = deviation([r for group in groups for r in group]) if std is None else std
    found = []
    for group in groups:
        present = [r for r in group if r is not None]
        if is_flat(group):
            found.append([0.0] * len(group))
            continue
        mean = math.fsum(present) / len(present)
        by = {"group": deviation(group) + EPSILON, "batch": everything + EPSILON, "none": 1.0}[scale]
        found.append([0.0 if r is None else (r - mean) / by for r in group])
    return found


def deviation(rewards: Rewards) -> float:
    """Of those that are there, with n - 1; 0 for fewer than two."""
    present = [r for r in rewards if r is not None]
    if len(present) < 2:
        return 0.0
    mean = math.fsum(present) / len(present)
    return math.sqrt(math.fsum((r - mean) ** 2 for r in present) / (len(present) - 1))


def is_flat(rewards: Rewards) -> bool:
    """Whether a group says nothing: all of its rewards are the same, up to rounding."""
    present = [r for r in rewards if r is not None]
    return not present or max(present) - min(present) <= 1e-9 * max(1.0, *map(abs, present))


def turn_rewards(looks: Sequence[float | None], final: float | None) -> list[float | None]:
    """What each turn brought: the score of what was seen at the next one, or of the finished picture, minus the score of what
    was seen at this one (DenseGRPO's idea, on x0-estimates). Its sum is the final score minus the first one; None where one of
    the two scores is missing.

    The limits of this: an x0-estimate of an early step is blurred, and scores of it are biased, most for rewards that want sharp
    pictures; what a turn does later than the next one is credited to that one; and a part of each difference is only that the
    picture was finished, which the comparison with the same turn of the other trajectories takes out.
    """
    after = [*looks[1:], final]
    return [None if a is None or b is None else a - b for a, b in zip(after, looks)]
