"""Refiners without a model: controls for experiments, and the simplest way to plug in one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..refiner import Refinement, View


class NoOpRefiner:
    """Keeps the prompt."""

    looks = False

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        return [Refinement() for _ in views]


class ScheduleRefiner:
    """A blind schedule: `{step: prompt}`, the same for every sample; steps that are not named keep the prompt."""

    looks = False

    def __init__(self, prompts: Mapping[int, str]) -> None:
        self.prompts = dict(prompts)

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        return [Refinement(self.prompts.get(v.step)) for v in views]


class FunctionRefiner:
    """`function(view)` returns the new prompt, None to keep it, or a whole `Refinement`; it is called once for each sample."""

    def __init__(self, function: Callable[[View], str | Refinement | None]) -> None:
        self.function = function

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        answers = [self.function(view) for view in views]
        return [a if isinstance(a, Refinement) else Refinement(a) for a in answers]
