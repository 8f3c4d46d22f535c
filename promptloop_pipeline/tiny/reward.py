"""The embedded world's judge as a reward. Exact, and free of any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..rewards.images import as_rgb
from .language import parse
from .verifier import judge, read


def verifier_score(images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[float | None]:
    """Share of what the prompt asks for that is in the picture, 0 to 1. None where it asks for nothing of this world, and where there
    is no picture."""
    return [None if v is None else v.score for v in _verdicts(images, prompts)]


def verifier_strict(images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[float | None]:
    """1 where all that the prompt asks for is in the picture, else 0. None as in `verifier_score`."""
    return [None if v is None else float(v.strict) for v in _verdicts(images, prompts)]


def _verdicts(images: Sequence[Any], prompts: Sequence[str]) -> list[Any]:
    if isinstance(prompts, str) or len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures and {len(prompts)} prompts; give one prompt for each picture")
    found = []
    for image, prompt in zip(images, prompts):
        try:
            spec = parse(prompt)
        except ValueError:
            spec = None
        found.append(None if image is None or spec is None else judge(read(as_rgb(image)), spec))
    return found
