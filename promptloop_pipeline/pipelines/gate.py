"""Do no harm: the untouched run is made too, and each sample's better picture is kept.

What the gate and `refine_in_rounds` share is here as well: running again from the same random state, asking a reward, and putting
one output together from several.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..replay import prompt_schedule
from ..reward import Reward, ask, reward_name
from ..session import RefinerError, Session
from ..trajectory import Trajectory

if TYPE_CHECKING:
    from PIL.Image import Image

    from .engine import Run

logger = logging.getLogger("promptloop")
_UNFINISHED = "the run was interrupted; an unfinished picture is not compared"


class RandomState:
    """Of all that a pipeline's call may draw from: the generators among its arguments, and torch's global ones."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("generator")
        self.generators = [g for g in (given if isinstance(given, list) else [given]) if isinstance(g, torch.Generator)]
        self.states = [g.get_state() for g in self.generators]
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@contextmanager
def again_from(start: RandomState, kwargs: dict[str, Any]) -> Iterator[None]:
    """For a run that is made once more: it begins as the first one did, and leaves no trace in what is drawn afterwards."""
    now = RandomState(kwargs)
    start.restore()
    try:
        yield
    finally:
        now.restore()


def check_reward(reward: Any, argument: str) -> None:
    if isinstance(reward, type) or not callable(reward):
        what = f"the class {reward.__name__}" if isinstance(reward, type) else f"{type(reward).__name__} {reward!r:.80}"
        raise TypeError(
            f"{argument} is {what}; give a reward: a function (images, prompts) -> a score, or None, for each picture"
        )


def score(reward: Reward, images: Sequence[Image], requests: Sequence[str]) -> list[float | None]:
    return ask(reward, [image.copy() for image in images], list(requests))  # the originals are the user's


def beats(new: float | None, old: float | None) -> bool:
    return new is not None and (old is None or new > old)


def failure(session: Session, what: str, error: Exception) -> str:
    """A failure as text for the record. Raised instead are a host's cancel, and in a strict session every one as RefinerError."""
    if session.cancel and isinstance(error, session.cancel):
        raise error
    message = f"{what} failed: {type(error).__name__}: {error}"
    if session.strict:
        raise RefinerError(message) from error
    logger.warning("%s", message)
    return message


def put_together(outputs: Sequence[Any], which: Sequence[int]) -> Any:
    """The first output, with what output number `which[i]` has for sample i. With `return_dict=False` they are tuples."""
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(_picked(values, which) for values in zip(*outputs, strict=True))
    for name in list(first.keys()):
        setattr(first, name, _picked([output[name] for output in outputs], which))
    return first


def _picked(values: Sequence[Any], which: Sequence[int]) -> Any:
    first = values[0]
    if not any(which) or not isinstance(first, (list, np.ndarray, torch.Tensor)) or len(first) != len(which):
        return first  # not one for each sample
    rows = [values[k][i] for i, k in enumerate(which)]
    return torch.stack(rows) if isinstance(first, torch.Tensor) else np.stack(rows) if isinstance(first, np.ndarray) else rows


def keep_better(run: Run, output: Any, reward: Reward, start: RandomState) -> Any:
    """Makes the untouched run beside a finished refined one and returns the output with each sample's better picture.

    The refined picture has to score strictly higher. The session's trajectories become those of the pictures that are returned, with
    the other one's in `others` and what the gate did in `meta["gate"]`. Where no prompt acted, the refined picture is the untouched
    one: nothing is run for it, and its trajectory stays, with its looks.
    """
    session, refined = run.session, run.session.trajectories
    changed = [prompt_schedule(t) != {0: t.request} for t in refined]
    outputs, keep = [output], list(changed)  # keep: whether the refined picture is
    record: dict[str, Any] = {"reward": reward_name(reward), "kept": "", "runs": 1, "seconds": {}}
    error = _UNFINISHED if run.interrupted else None
    if any(changed) and not error:
        clock = time.perf_counter()
        try:
            with again_from(start, run.kwargs):
                untouched = run.call(run.pipe, **run.kwargs)
            if run.interrupted:
                error = _UNFINISHED
            else:
                _add(run, untouched, changed)
                outputs.append(untouched)
        except Exception as e:
            error = failure(session, "the untouched run", e)
        record["seconds"]["untouched"], record["runs"] = time.perf_counter() - clock, 2
    if not error:
        clock = time.perf_counter()
        try:
            keep = _compared(run, outputs, changed, reward)
        except Exception as e:  # nothing shows that refining did no harm
            error, keep = failure(session, "the reward", e), [False] * len(refined)
        record["seconds"]["reward"] = time.perf_counter() - clock
    which = [int(c and not k) for c, k in zip(changed, keep, strict=True)]
    for i, t in enumerate(refined):
        if which[i]:
            refined[i] = t.others.pop()
            refined[i].others.append(t)
        record["kept"] = "refined" if keep[i] else "untouched"
        refined[i].meta["gate"] = record | ({"error": error} if error else {})
    return put_together(outputs, which)


def _add(run: Run, untouched: Any, changed: Sequence[bool]) -> None:
    """The untouched pictures' trajectories become `others` of the refined ones."""
    pictures = None if run.latent else run.pictures(untouched)
    for i, t in enumerate(run.session.trajectories):
        if changed[i]:
            t.others.append(Trajectory(t.request, image=pictures[i] if pictures else None, meta=dict(t.meta)))


def _compared(run: Run, outputs: Sequence[Any], changed: Sequence[bool], reward: Reward) -> list[bool]:
    """Scores all pictures and says for each sample whether the refined one is to be kept."""
    refined, name = run.session.trajectories, reward_name(reward)
    requests = [t.request for t in refined]
    for t, value in zip(refined, score(reward, run.pictures(outputs[0]), requests), strict=True):
        t.scores[name] = value
    if len(outputs) == 1:
        return [False] * len(refined)
    keep = []
    for t, value, acted in zip(refined, score(reward, run.pictures(outputs[1]), requests), changed, strict=True):
        if acted:
            t.others[-1].scores[name] = value
        keep.append(acted and beats(t.scores[name], value))
    return keep
