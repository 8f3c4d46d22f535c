"""A question to the refiner: what it is shown, asked here and now or in a thread of its own, and what came of it."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .refiner import Refinement, Refiner, View, check_answers

if TYPE_CHECKING:
    from PIL.Image import Image

    from .trajectory import Trajectory


PATIENCE = 5.0  # seconds to wait for a refiner that was told to stop: a token, or its whole answer where it cannot be told
_TICK = 0.05  # seconds between two looks at whether the run was interrupted


class Stopped(BaseException):
    """Raised in a refiner, by its `on_token`: nobody wants the answer any more. No `except Exception` takes it for a failure."""


class _Ear:
    """Stands in the place of a refiner's own `on_token` while it is asked. Several runs may ask a refiner, each in its thread."""

    def __init__(self, own: Callable[[], None] | None) -> None:
        self.own = own
        self.looks: dict[int, Look] = {}  # by the thread that asks

    def __call__(self) -> None:
        look = self.looks.get(threading.get_ident())
        if look and look.unwanted():
            raise Stopped
        if self.own is not None:
            self.own()


class Look:
    """One for a whole batch. `error` and `boundary` tell what failed and where; `seconds` what each part took.

    interrupted: whether the host has stopped the run. A refiner with an attribute `on_token`, a function that it calls after each
    token in the thread that asked, is then stopped at once, as it is when the look is given up; the user's own is called too.
    """

    def __init__(
        self, refiner: Refiner, trajectories: Sequence[Trajectory], sources: Sequence[Image | None], step: int, num_steps: int,
        sigma: float | None, interrupted: Callable[[], bool] = lambda: False, fit: Callable[[str], str] | None = None,
    ) -> None:  # fmt: skip
        self.refiner, self.trajectories, self.step, self.num_steps, self.sigma = refiner, trajectories, step, num_steps, sigma
        self.sources, self.interrupted, self.fit = sources, interrupted, fit
        self.images: Sequence[Image | None] = [None] * len(trajectories)
        self.boundary = "preview"
        self.seconds: dict[str, float] = {}
        self.error: BaseException | None = None
        self.answers: list[Refinement] | None = None
        self.stopped = False  # whether the refiner was, within the question
        self._given_up = False
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
        if self.error is None:
            self.boundary = "refiner"
            self._refine(self._views(), Exception)

    def ask_aside(self, latency: int | None) -> None:
        """Asks in a thread of its own. The answer is `ready` when it is there, or exactly `latency` steps later."""
        self._latency = latency
        views = self._views()
        self.boundary = "refiner"

        def work() -> None:
            try:
                self._refine(views, BaseException)
            finally:
                _aside.discard(self)

        self._thread = threading.Thread(target=work, name="promptloop-refiner", daemon=True)  # a late answer holds nobody up
        atexit.unregister(_end_all)
        atexit.register(_end_all)  # last in, first out: before the libraries that the refiner works with are torn down
        _aside.add(self)
        self._thread.start()

    def _refine(self, views: list[View], failures: type[BaseException]) -> None:
        clock = time.perf_counter()
        try:
            with self._listening():
                self.answers = self.refiner.refine(views)
        except Stopped:
            self.stopped = True
        except failures as e:
            self.error = e
        self.seconds["refiner"] = time.perf_counter() - clock

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """For the time of the question, the refiner's `on_token` also sees whether the answer is still wanted."""
        refiner: Any = self.refiner
        with _lock:
            now = getattr(refiner, "on_token", None)
            ear = now if isinstance(now, _Ear) else _Ear(now)
            ear.looks[threading.get_ident()] = self
            try:
                if hasattr(refiner, "on_token"):
                    refiner.on_token = ear
            except AttributeError:  # it can only be read; such a refiner is not stopped
                pass
        try:
            yield
        finally:
            with _lock:
                ear.looks.pop(threading.get_ident(), None)
                if not ear.looks and getattr(refiner, "on_token", None) is ear:  # else somebody has set another one meanwhile
                    refiner.on_token = ear.own

    def unwanted(self) -> bool:
        return self._given_up or self.interrupted()

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def ready(self, step: int, cancel: tuple[type[BaseException], ...] = ()) -> bool:
        """Whether it is time for the answer. What is no failure but a wish to stop does not wait for its step."""
        if self.done and (self.stopped or (self.error is not None and not _is_failure(self.error, cancel))):
            return True
        return step >= self.step + self._latency if self._latency is not None else self.done

    def wait(self) -> bool:
        """Waits for the answer; False when the run is interrupted meanwhile."""
        while not self.done:
            if self.interrupted():
                return False
            self.join(_TICK)
        return True

    def join(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def give_up(self) -> None:
        """Tells the refiner to stop, and waits for nothing."""
        self._given_up = True

    def free(self) -> bool:
        """Whether the refiner is; it may have to end a question first that was given up, and is waited for, but not for long."""
        return _ended([other for other in list(_aside) if other.refiner is self.refiner and other._given_up])

    def result(self) -> list[Refinement]:
        """The answers, once they are there; a failure as one answer with an error for each sample.

        Raises ValueError or TypeError when the refiner broke its contract.
        """
        if self.stopped:
            return [Refinement()] * len(self.trajectories)
        if self.error is not None and not isinstance(self.error, Exception):
            raise self.error
        if self.error is not None:
            return [Refinement(error=f"{type(self.error).__name__}: {self.error}")] * len(self.trajectories)
        check_answers(self.answers, len(self.trajectories), self.refiner)
        assert self.answers is not None
        return self.answers

    def _views(self) -> list[View]:
        return [
            View(t.request, t.prompt, self.step, self.num_steps, self.sigma, image, tuple(t.turns), source, self.fit)
            for t, image, source in zip(self.trajectories, self.images, self.sources, strict=True)
        ]


_lock = threading.Lock()
_aside: set[Look] = set()  # asked in threads of their own that have not ended yet


def _ended(looks: Sequence[Look]) -> bool:
    """Whether they have, within PATIENCE for all of them."""
    deadline = time.monotonic() + PATIENCE
    for look in looks:
        look.join(max(0.0, deadline - time.monotonic()))
    return all(look.done for look in looks)


def _end_all() -> None:
    """At exit: a thread that Python ends in the midst of a library's C++ code takes the whole process down with it (SIGABRT)."""
    looks = list(_aside)
    for look in looks:
        look.give_up()
    _ended(looks)


def _is_failure(error: BaseException, cancel: tuple[type[BaseException], ...]) -> bool:
    return isinstance(error, Exception) and not isinstance(error, cancel)


def _checked(images: object, expected: int) -> Sequence[Image]:
    if not isinstance(images, (list, tuple)) or len(images) != expected:
        got = f"{len(images)} pictures" if isinstance(images, (list, tuple)) else type(images).__name__
        raise ValueError(
            f"the preview gave {got} for {expected} samples; it must give a list with one PIL image for each sample"
        )
    return images
