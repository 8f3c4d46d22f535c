"""The reward: anything that scores finished pictures against what was asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("promptloop")


@runtime_checkable
class Reward(Protocol):
    """One score for each picture, in order, in the reward's own unit; higher is better; None where it does not apply.

    images: RGB. prompts: the users' own requests, one for each picture, never the rewritten prompts. context: whatever else the
    caller knows of each picture (lists of the same length); a reward takes what it needs and ignores the rest. A plain function
    will do; its name is the reward's name. A reward that can say why has a method `judge` with the same arguments, which returns a
    list of `Judgement`.
    """

    def __call__(self, images: Sequence[Image], prompts: Sequence[str], **context: Any) -> list[float | None]: ...


@dataclass(frozen=True)
class Judgement:
    """A score and what it stands on: JSON values, such as the boxes that were found. {"error": why}: there is no score for a reason
    that may pass; {"skipped": why}: the reward does not apply."""

    score: float | None
    details: dict[str, Any] = field(default_factory=dict)


def reward_name(reward: Any) -> str:
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__)


def ask(
    reward: Reward, images: Sequence[Any], prompts: Sequence[str], name: str | None = None, **context: Any
) -> list[float | None]:
    """A reward's scores. Raises TypeError or ValueError, with its name, when it returns no list of numbers, one for each picture."""
    found: Any = reward(images, prompts, **context)
    problem = (
        f"the reward {name or reward_name(reward)} returned {found!r:.80} for {len(images)} pictures; "
        "a reward returns a number, or None, for each"
    )
    if isinstance(found, (str, bytes, dict)) or not hasattr(found, "__len__"):
        raise TypeError(problem)
    if len(found) != len(images):
        raise ValueError(problem)
    if any(not (s is None or isinstance(s, Real) or hasattr(s, "item")) for s in found):
        raise TypeError(problem)
    scores = [None if s is None else float(s) for s in found]
    if any(s is not None and not math.isfinite(s) for s in scores):
        raise ValueError(problem)
    return scores


def ask_why(
    reward: Reward, images: Sequence[Any], prompts: Sequence[str], name: str | None = None, **context: Any
) -> list[Judgement]:
    """As `ask`, with the details of a reward that has any; {} of another."""
    if not hasattr(reward, "judge"):
        return [Judgement(score) for score in ask(reward, images, prompts, name, **context)]
    details: list[dict[str, Any]] = []

    def scores(*args: Any, **kwargs: Any) -> list[float | None]:
        found = reward.judge(*args, **kwargs)
        details.extend(j.details for j in found)
        return [j.score for j in found]

    return list(map(Judgement, ask(scores, images, prompts, name or reward_name(reward), **context), details))


def ask_each(
    reward: Reward, images: Sequence[Any], prompts: Sequence[str], name: str | None = None, **context: Sequence[Any]
) -> list[Judgement]:
    """As `ask_why`, for pictures that have been paid for: where a reward fails on several, it is asked about one after the other, and a
    picture that it fails on gets {"error": why}. context: lists with one value for each picture."""
    try:
        return ask_why(reward, images, prompts, name, **context)
    except Exception as e:  # whatever a reward of one's own may raise
        if len(images) == 1:
            return [Judgement(None, {"error": f"{type(e).__name__}: {e}"})]
        found = [
            ask_each(reward, [image], [prompt], name, **{key: [values[k]] for key, values in context.items()})[0]
            for k, (image, prompt) in enumerate(zip(images, prompts, strict=True))
        ]
        lost = [j.details["error"] for j in found if "error" in j.details and j.score is None]
        what = f"{len(lost)} of {len(found)}" if len(lost) < len(found) else f"all {len(found)}"
        reason = lost[0] if lost else f"{type(e).__name__}: {e}, but on none of them alone"
        logger.warning("the reward %s failed on %s pictures: %s", name or reward_name(reward), what, reason)
        return found
