"""The reward: anything that scores finished pictures against what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL.Image import Image


@runtime_checkable
class Reward(Protocol):
    """One score for each picture, in order, in the reward's own unit; higher is better; None where it does not apply.

    images: RGB. prompts: the users' own requests, one for each picture, never the rewritten prompts. context: whatever else the
    caller knows of each picture (lists of the same length); a reward takes what it needs and ignores the rest. A plain function
    will do; its name is the reward's name.
    """

    def __call__(self, images: Sequence[Image], prompts: Sequence[str], **context: Any) -> list[float | None]: ...


def reward_name(reward: Any) -> str:
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__)
