"""The loop. A host (diffusers, ComfyUI, a for-loop) tells a `Session` where its run is; at the scheduled steps the session
shows the x0-estimate to the refiner and hands back the prompts to go on with. Everything else is a host's business.

    session = Session(requests, refiner, "20%, 50%, 80%")
    session.start(num_steps)
    for step in range(num_steps):
        prompts = session.observe(step, sigma, preview)     # None: go on as you are
        ...
    session.finish(images)                                  # -> session.trajectories
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from itertools import repeat
from typing import TYPE_CHECKING, Any

from .refiner import Refinement, Refiner, View
from .schedule import RefinementSchedule
from .trajectory import Trajectory, Turn

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("promptloop")


class RefinerError(RuntimeError):
    """A turn failed and the session is strict."""


class Session:
    """One generation of a batch; made anew for each run.

    requests: the users' words, one for each sample.
    strict: a failing turn raises RefinerError; otherwise it is recorded, the prompt stays, and the run goes on.
    cancel: exception types by which the host stops a run; they always get through (KeyboardInterrupt does anyway).

    Raises ValueError for no requests or an unreadable schedule, TypeError for a request that is not text or a refiner without `refine`.
    """

    def __init__(
        self,
        requests: Sequence[str],
        refiner: Refiner,
        schedule: str | int | Iterable[str | int] | RefinementSchedule,
        *,
        strict: bool = False,
        cancel: tuple[type[BaseException], ...] = (),
        meta: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        if not requests:
            raise ValueError("the list of prompts is empty; give at least one prompt")
        if bad := [r for r in requests if not isinstance(r, str)]:
            raise TypeError(f"a prompt must be text, not {type(bad[0]).__name__} {bad[0]!r}")
        if isinstance(refiner, type) or not callable(getattr(refiner, "refine", None)):
            what = f"the class {refiner.__name__}" if isinstance(refiner, type) else type(refiner).__name__
            raise TypeError(f"{what} is no refiner: give an object with a method refine(views) -> list of Refinement")
        self.refiner, self.strict, self.cancel = refiner, strict, cancel
        self.schedule = RefinementSchedule.parse(schedule)
        self.trajectories = [Trajectory(r, meta=dict(m)) for r, m in zip(requests, meta or [{}] * len(requests), strict=True)]
        self.num_steps = 0
        self.due: tuple[int, ...] = ()

    @property
    def prompts(self) -> list[str]:
        """The prompt in use for each sample."""
        return [t.prompt for t in self.trajectories]

    def start(self, num_steps: int) -> None:
        """Raises ValueError when the schedule names a step beyond `num_steps`."""
        self.num_steps, self.due = num_steps, self.schedule.steps(num_steps)

    def observe(self, step: int, sigma: float | None, preview: Callable[[], Sequence[Image]] | None) -> list[str] | None:
        """To be called before `step` is computed (and once with `num_steps`, after the end). `preview` decodes the x0-estimates
        of the whole batch; it is called only when a turn is due and its refiner looks, and is None at the start.

        Returns the prompts for all samples when any of them changed, else None.
        """
        if step not in self.due:
            return None
        seconds: dict[str, float] = {}
        images: Sequence[Image | None] = [None] * len(self.trajectories)
        boundary, clock = "preview", time.perf_counter()
        try:
            if preview is not None and getattr(self.refiner, "looks", True):
                images = _check_preview(preview(), len(images))
                seconds["preview"] = time.perf_counter() - clock
            views = [
                View(t.request, t.prompt, step, self.num_steps, sigma, image, tuple(t.turns))
                for t, image in zip(self.trajectories, images, strict=True)
            ]
            boundary, clock = "refiner", time.perf_counter()
            answers = self.refiner.refine(views)
            seconds["refiner"] = time.perf_counter() - clock
        except Exception as e:
            if self.cancel and isinstance(e, self.cancel):
                raise
            if self.strict:
                raise RefinerError(f"step {step}: the {boundary} failed: {type(e).__name__}: {e}") from e
            seconds[boundary] = time.perf_counter() - clock
            answers = [Refinement(error=f"{type(e).__name__}: {e}")] * len(self.trajectories)
        else:
            _check_answers(answers, len(views), self.refiner)
        for t, image, a in zip(self.trajectories, images, answers, strict=True):
            error = a.error or (
                "the refiner answered with an empty prompt" if a.prompt is not None and not a.prompt.strip() else None
            )
            if error and self.strict:
                raise RefinerError(f"step {step}: {error}")
            if error:
                logger.warning("step %d: %s failed, the prompt is kept: %s", step, boundary, error)
            after = t.prompt if error or a.prompt is None else a.prompt
            t.turns.append(
                Turn(
                    step, self.num_steps, t.prompt, after, sigma, image, a.reasoning, a.raw, a.token_ids, a.logprobs,
                    error, boundary if error else None, dict(seconds),
                )
            )  # fmt: skip
        return self.prompts if any(t.turns[-1].changed for t in self.trajectories) else None

    def applied(self, seconds: float) -> None:
        """The host encoded the prompts of the last turn; `seconds` is what that took."""
        self._amend(lambda turn: replace(turn, seconds=turn.seconds | {"encode": seconds}))

    def rejected(self, error: Exception) -> None:
        """The host could not encode the prompts of the last turn and goes on with the old ones."""
        if self.strict:
            raise RefinerError(f"the refined prompt could not be encoded: {type(error).__name__}: {error}") from error
        message = f"{type(error).__name__}: {error}"
        logger.warning("the refined prompt could not be encoded, the old one is kept: %s", message)
        self._amend(lambda turn: replace(turn, after=turn.before, error=message, boundary="encode"))

    def _amend(self, change: Callable[[Turn], Turn]) -> None:
        for t in self.trajectories:
            if t.turns[-1].changed:
                t.turns[-1] = change(t.turns[-1])

    def finish(
        self,
        images: Sequence[Image] | None,
        sigma: float | None = 0.0,
        preview: Callable[[], Sequence[Image]] | None = None,
        look: bool = True,
    ) -> list[Trajectory]:
        """Stores the finished pictures and takes the turn "end", if there is one and the run was not cut short (`look`).

        preview: how to get pictures for that turn where the run gave none. sigma: of what was finished.
        """
        for t, image in zip(self.trajectories, images or repeat(None, len(self.trajectories)), strict=bool(images)):
            t.image = image
        if look and images:
            self.observe(self.num_steps, sigma, lambda: [image.copy() for image in images])  # the originals are the user's
        elif look and preview:
            self.observe(self.num_steps, sigma, preview)
        return self.trajectories


def _check_preview(images: object, expected: int) -> Sequence[Image]:
    if not isinstance(images, (list, tuple)) or len(images) != expected:
        got = f"{len(images)} pictures" if isinstance(images, (list, tuple)) else type(images).__name__
        raise ValueError(
            f"the preview gave {got} for {expected} samples; it must give a list with one PIL image for each sample"
        )
    return images


def _check_answers(answers: object, expected: int, refiner: Refiner) -> None:
    """A refiner that breaks its contract is a bug, not a failure of the run: it always raises."""
    name = type(refiner).__name__
    if not isinstance(answers, (list, tuple)) or len(answers) != expected:
        got = f"{len(answers)} answers" if isinstance(answers, (list, tuple)) else type(answers).__name__
        raise ValueError(
            f"{name}.refine returned {got} for {expected} views; it must return a list with one Refinement for each view"
        )
    for a in answers:
        if missing := [f.name for f in fields(Refinement) if not hasattr(a, f.name)]:
            what = f"{type(a).__name__} {a!r:.80} (without {', '.join(missing)})"
        elif not isinstance(a.prompt, str | None) or not isinstance(a.error, str | None):
            what = f"a Refinement whose prompt is {type(a.prompt).__name__} and whose error is {type(a.error).__name__}"
        else:
            continue
        raise TypeError(
            f"{name}.refine returned {what}; each answer must be a Refinement whose prompt is text, or None to keep it"
        )
