"""A question to the refiner: what it is shown, asked here and now or in a thread of its own, and what came of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .refiner import Refinement, Refiner, View, check_answers

if TYPE_CHECKING:
    from PIL.Image import Image

    from .trajectory import Trajectory


class Look:
    """One for a whole batch. `error` and `boundary` tell what failed and where; `seconds` what each part took."""

    def __init__(
        self, refiner: Refiner, trajectories: Sequence[Trajectory], sources: Sequence[Image | None], step: int, num_steps: int,
        sigma: float | None,
    ) -> None:  # fmt: skip
        self.refiner, self.trajectories, self.step, self.num_steps, self.sigma = refiner, trajectories, step, num_steps, sigma
        self.sources = sources
        self.images: Sequence[Image | None] = [None] * len(trajectories)
        self.boundary = "preview"
        self.seconds: dict[str, float] = {}
        self.error: BaseException | None = None
        self.answers: list[Refinement] | None = None
        self._thread: threading.Thread | None = None
        self._latency: int | None = None

    def see(self, preview: Callable[[], Sequence[Image]] | None) -> None:
        """Decodes the x0-estimates, if the refiner looks at all."""
        if preview is None or not getattr(self.refiner, "looks", True):
            return
        clock = time.perf_counter()
        try:
            self.images = _checked(preview(), len(self.images))
        except Exception as e:
            self.error = e
        self.seconds["preview"] = time.perf_counter() - clock

    def ask(self) -> None:
        """Asks, unless seeing failed. What is no Exception, like KeyboardInterrupt, gets through."""
        if self.error is not None:
            return
        self.boundary, clock = "refiner", time.perf_counter()
        try:
            self.answers = self.refiner.refine(self._views())
        except Exception as e:
            self.error = e
        self.seconds["refiner"] = time.perf_counter() - clock

    def ask_aside(self, latency: int | None) -> None:
        """Asks in a thread of its own. The answer is `ready` when it is there, or exactly `latency` steps later."""
        self._latency = latency
        views = self._views()
        self.boundary = "refiner"

        def work() -> None:
            clock = time.perf_counter()
            try:
                self.answers = self.refiner.refine(views)
            except BaseException as e:
                self.error = e
            self.seconds["refiner"] = time.perf_counter() - clock

        self._thread = threading.Thread(target=work, name="promptloop-refiner", daemon=True)  # a late answer holds nobody up
        self._thread.start()

    def ready(self, step: int) -> bool:
        if self._latency is not None:
            return step >= self.step + self._latency
        return self._thread is not None and not self._thread.is_alive()

    def result(self) -> list[Refinement]:
        """The answers, waited for if need be; a failure as one answer with an error for each sample.

        Raises ValueError or TypeError when the refiner broke its contract.
        """
        if self._thread is not None:
            self._thread.join()
        if self.error is not None and not isinstance(self.error, Exception):
            raise self.error
        if self.error is not None:
            return [Refinement(error=f"{type(self.error).__name__}: {self.error}")] * len(self.trajectories)
        check_answers(self.answers, len(self.trajectories), self.refiner)
        assert self.answers is not None
        return self.answers

    def _views(self) -> list[View]:
        return [
            View(t.request, t.prompt, self.step, self.num_steps, self.sigma, image, tuple(t.turns), source)
            for t, image, source in zip(self.trajectories, self.images, self.sources, strict=True)
        ]


def _checked(images: object, expected: int) -> Sequence[Image]:
    if not isinstance(images, (list, tuple)) or len(images) != expected:
        got = f"{len(images)} pictures" if isinstance(images, (list, tuple)) else type(images).__name__
        raise ValueError(
            f"the preview gave {got} for {expected} samples; it must give a list with one PIL image for each sample"
        )
    return images
