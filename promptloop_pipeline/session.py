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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING, Any

from .look import Look
from .refiner import Refiner
from .schedule import RefinementSchedule
from .trajectory import Trajectory, Turn

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("promptloop")
_LATE = "the refiner's answer came too late to act"
_INTERRUPTED = "not applied: the run was interrupted"


class RefinerError(RuntimeError):
    """A turn failed and the session is strict."""


def check_refiner(refiner: Any) -> None:
    """Raises TypeError for what is none."""
    if isinstance(refiner, type) or not callable(getattr(refiner, "refine", None)):
        what = f"the class {refiner.__name__}" if isinstance(refiner, type) else type(refiner).__name__
        raise TypeError(f"{what} is no refiner: give an object with a method refine(views) -> list of Refinement")


Cancel = type[BaseException] | Iterable[type[BaseException]]


def check_modes(
    *, strict: bool = False, cancel: Cancel = (), apriori: bool = False, asynchronous: bool | int = False
) -> tuple[type[BaseException], ...]:
    """Raises ValueError or TypeError for what a session cannot work with. Returns `cancel` as a tuple, as `isinstance` wants it."""
    for name, value in (("strict", strict), ("apriori", apriori)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; use True or False")
    types = tuple(cancel) if isinstance(cancel, (tuple, list, set, frozenset)) else (cancel,)
    if bad := [t for t in types if not (isinstance(t, type) and issubclass(t, BaseException))]:
        raise TypeError(f"cancel names {bad[0]!r}; give types of exceptions, as in cancel=(KeyError,)")
    if not isinstance(asynchronous, (bool, int)) or asynchronous < 0:
        raise ValueError(f"asynchronous is {asynchronous!r}; use False, True, or a number of steps from 1 on")
    if apriori and asynchronous:
        raise ValueError("apriori and asynchronous exclude each other: what is written beforehand is not waited for; drop one")
    return types


class Session:
    """One generation of a batch; made anew for each run.

    requests: the users' words, one for each sample.
    strict: a failing turn raises RefinerError; otherwise it is recorded, the prompt stays, and the run goes on.
    cancel: exception types by which the host stops a run; they always get through (KeyboardInterrupt does anyway).
    interrupted: whether the host has stopped the run in another way: what comes of a question meanwhile is recorded and not applied,
        and a refiner that has `on_token` is stopped after the token at hand.
    sources: the pictures that an image-to-image run starts from, for the refiner to see.
    fit: shortens a refined prompt to what the host's text encoders can hold; what it leaves out is noted.
    apriori: all prompts are written before the first step, without pictures (PromptLoop's open-loop mode); "end" looks as ever.
    asynchronous: the run goes on while the refiner thinks, and the answer acts from the first step after it has come; a number
        waits that many steps, no more, no less. One question at a time: a turn that is due meanwhile is left out, and noted.

    Raises ValueError for no requests or an unreadable schedule, TypeError for a request that is not text or a refiner without `refine`.
    """

    def __init__(
        self,
        requests: Sequence[str],
        refiner: Refiner,
        schedule: str | int | Iterable[str | int] | RefinementSchedule,
        *,
        strict: bool = False,
        cancel: Cancel = (),
        meta: Sequence[dict[str, Any]] | None = None,
        sources: Sequence[Image | None] | None = None,
        fit: Callable[[str], str] | None = None,
        apriori: bool = False,
        asynchronous: bool | int = False,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        if not requests:
            raise ValueError("the list of prompts is empty; give at least one prompt")
        if bad := [r for r in requests if not isinstance(r, str)]:
            raise TypeError(f"a prompt must be text, not {type(bad[0]).__name__} {bad[0]!r}")
        check_refiner(refiner)
        cancel = check_modes(strict=strict, cancel=cancel, apriori=apriori, asynchronous=asynchronous)
        self.refiner, self.strict, self.cancel, self.fit = refiner, strict, cancel, fit
        self.apriori, self.asynchronous, self.interrupted = apriori, asynchronous, interrupted
        self.schedule = RefinementSchedule.parse(schedule)
        self.trajectories = [Trajectory(r, meta=dict(m)) for r, m in zip(requests, meta or [{}] * len(requests), strict=True)]
        self.sources = sources or [None] * len(requests)
        self.num_steps = 0
        self.due: tuple[int, ...] = ()
        self._planned: dict[int, list[Turn]] = {}  # a priori
        self._waiting: Look | None = None  # asynchronous
        self._seen = 0  # turns taken before the last `observe`

    @property
    def prompts(self) -> list[str]:
        """The prompt in use for each sample."""
        return [t.prompt for t in self.trajectories]

    def start(self, num_steps: int) -> None:
        """Raises ValueError when the schedule names a step beyond `num_steps`."""
        self.num_steps, self.due = num_steps, self.schedule.steps(num_steps)
        had = len(self.trajectories[0].turns)
        try:
            for step in self.due if self.apriori else ():
                if step < num_steps:
                    self._take(step, None, None)
                    self._planned[step] = [t.turns[-1] for t in self.trajectories]
        finally:  # nothing of it has been applied yet
            for t in self.trajectories:
                del t.turns[had:]

    def wants(self, step: int) -> bool:
        """Whether `observe` has anything to do at this step; the host may leave it uncalled otherwise."""
        return step in self.due or self._waiting is not None

    def observe(self, step: int, sigma: float | None, preview: Callable[[], Sequence[Image]] | None) -> list[str] | None:
        """To be called before `step` is computed (and once with `num_steps`, after the end). `preview` decodes the x0-estimates
        of the whole batch; it is called only when a turn is due and its refiner looks, and is None at the start.

        Returns the prompts for all samples when any of them changed, else None.
        """
        before, self._seen = self.prompts, len(self.trajectories[0].turns)
        if self._waiting and self._waiting.ready(step, self.cancel):
            if self._waiting.wait():
                self._settle(self._waiting, step)
            else:
                self.give_up(_INTERRUPTED)
        if step in self._planned:
            for t, turn in zip(self.trajectories, self._planned.pop(step), strict=True):
                # an earlier one may have been taken back
                t.turns.append(replace(turn, before=t.prompt, after=turn.after if turn.changed else t.prompt))
        elif step in self.due and self._waiting:
            self._pass(step, sigma, f"left out: the refiner was still busy with step {self._waiting.step}")
        elif step in self.due:
            self._take(step, sigma, preview)
        return self.prompts if self.prompts != before else None

    def _take(self, step: int, sigma: float | None, preview: Callable[[], Sequence[Image]] | None) -> None:
        look = Look(self.refiner, self.trajectories, self.sources, step, self.num_steps, sigma, self.interrupted, self.fit)
        if self.interrupted():
            return self._pass(step, sigma, "left out: the run was interrupted")
        if not look.free():
            return self._pass(step, sigma, "left out: the refiner was still busy with an earlier question, that was given up")
        look.see(preview)
        if self.asynchronous and step < self.num_steps and look.error is None:
            self._waiting = look
            return look.ask_aside(None if self.asynchronous is True else int(self.asynchronous))
        look.ask()
        self._settle(look, step)

    def _settle(self, look: Look, step: int, unused: str | None = None) -> None:
        """Takes the answers: records them, and what comes of them, as one turn of each sample; unused: why nothing does."""
        self._waiting = None
        unused = unused or (_INTERRUPTED if look.stopped or self.interrupted() else None)
        answers, error = look.result(), look.error
        if error is not None:
            if self.cancel and isinstance(error, self.cancel):
                raise error
            if self.strict:
                raise RefinerError(f"step {look.step}: the {look.boundary} failed: {type(error).__name__}: {error}") from error
        for t, image, a in zip(self.trajectories, look.images, answers, strict=True):
            empty = a.prompt is not None and not a.prompt.strip() and a.prompt != t.prompt  # an empty request may stay
            said = a.error or ("the refiner answered with an empty prompt" if empty else None)
            if said and self.strict:
                raise RefinerError(f"step {look.step}: {said}")
            if said:
                logger.warning("step %d: %s failed, the prompt is kept: %s", look.step, look.boundary, said)
            after, notes = t.prompt if said or unused or a.prompt is None else a.prompt, tuple(a.notes)
            notes += (unused,) if unused else ()
            if self.fit and after != t.prompt and (fitting := self.fit(after)) != after:
                notes += (
                    f"too long for the text encoder, cut after {fitting[-40:]!r}; left out: {_left_out(after, fitting)!r}",
                )
                after = fitting
            t.turns.append(
                Turn(
                    look.step, self.num_steps, t.prompt, after, look.sigma, image, a.reasoning, a.raw, a.token_ids, a.logprobs,
                    said, look.boundary if said else None, dict(look.seconds), a.tokens, a.format_ok, notes,
                    applied=step if step != look.step and not unused else None,
                )
            )  # fmt: skip

    def _pass(self, step: int, sigma: float | None, note: str) -> None:
        for t in self.trajectories:
            t.turns.append(Turn(step, self.num_steps, t.prompt, t.prompt, sigma, notes=(note,)))

    def applied(self, seconds: float) -> None:
        """The host encoded the prompts of the last turn; `seconds` is what that took."""
        for t in self.trajectories:
            t.turns[self._seen :] = [
                replace(turn, seconds=turn.seconds | {"encode": seconds}) if turn.changed else turn
                for turn in t.turns[self._seen :]
            ]

    def rejected(self, error: Exception) -> None:
        """The host could not encode the prompts of the last turn and goes on with the old ones."""
        if self.strict:
            raise RefinerError(f"the refined prompt could not be encoded: {type(error).__name__}: {error}") from error
        message = f"{type(error).__name__}: {error}"
        logger.warning("the refined prompt could not be encoded, the old one is kept: %s", message)
        failed: dict[str, Any] = {"error": message, "boundary": "encode"}
        for t in self.trajectories:
            old = t.turns[self._seen].before
            t.turns[self._seen :] = [
                replace(turn, before=old, after=old, **(failed if turn.changed else {})) for turn in t.turns[self._seen :]
            ]

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
        if self._waiting and self._waiting.done:  # what it has said, or raised, is not lost for being late
            self._settle(self._waiting, self.num_steps, _INTERRUPTED if self.interrupted() else _LATE)
        self.give_up(_INTERRUPTED if self.interrupted() else _LATE)
        if look and images:
            self.observe(self.num_steps, sigma, lambda: [image.copy() for image in images])  # the originals are the user's
        elif look and preview:
            self.observe(self.num_steps, sigma, preview)
        return self.trajectories

    def give_up(self, note: str) -> None:
        """Whatever has not acted by now will not: it is recorded with the note, and a refiner at work is told to stop. For a host
        whose run ends by an exception; `finish` does the same."""
        late, self._waiting = self._waiting, None
        if late:
            late.give_up()
            self._pass(late.step, late.sigma, note)
        for step in sorted(self._planned):
            for t, turn in zip(self.trajectories, self._planned.pop(step), strict=True):
                notes = (*turn.notes, "the run ended before this step")
                t.turns.append(replace(turn, before=t.prompt, after=t.prompt, notes=notes))


def _left_out(long: str, short: str) -> str:
    return long[len(short) :].strip(" ,;.") if long.startswith(short) else long
