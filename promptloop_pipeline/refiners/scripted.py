"""Refiners without a model: controls for experiments, and the simplest way to plug in one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral

from ..refiner import Refinement, View


class NoOpRefiner:
    """Keeps the prompt."""

    looks = False

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        return [Refinement() for _ in views]


class ScheduleRefiner:
    """A blind schedule: `{step: prompt}`, the same for every sample, or a list of such, one for each sample of the batch; steps that
    are not named keep the prompt. With a run's `prompt_schedule` it makes that run again.

    Raises TypeError for a step that is no whole number, as JSON has them.
    """

    looks = False

    def __init__(self, prompts: Mapping[int, str] | Sequence[Mapping[int, str]]) -> None:
        self.prompts = dict(prompts) if isinstance(prompts, Mapping) else [dict(p) for p in prompts]
        for step in (step for each in ([self.prompts] if isinstance(self.prompts, dict) else self.prompts) for step in each):
            if not isinstance(step, Integral):
                raise TypeError(f"ScheduleRefiner has the step {step!r}; use whole numbers, as in {{6: 'a red cube'}}")

    @property
    def refine_at(self) -> str:
        """Its steps as the text of a `RefinementSchedule`: "start, 6, 12"."""
        each = [self.prompts] if isinstance(self.prompts, dict) else self.prompts
        steps = sorted({step for prompts in each for step in prompts})
        return ", ".join("start" if step == 0 else str(step) for step in steps) or "none"

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        """Raises ValueError when there is a list of schedules and it is not as long as the batch."""
        each = [self.prompts] * len(views) if isinstance(self.prompts, dict) else self.prompts
        if len(each) != len(views):
            raise ValueError(
                f"ScheduleRefiner has {len(each)} schedules for a batch of {len(views)} samples; "
                "give one {step: prompt} for each sample, or a single one for all"
            )
        return [Refinement(prompts.get(v.step)) for v, prompts in zip(views, each)]


class FunctionRefiner:
    """`function(view)` returns the new prompt, None to keep it, or a whole `Refinement`; it is called once for each sample."""

    def __init__(self, function: Callable[[View], str | Refinement | None]) -> None:
        self.function = function

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        answers = [self.function(view) for view in views]
        return [a if isinstance(a, Refinement) else Refinement(a) for a in answers]
