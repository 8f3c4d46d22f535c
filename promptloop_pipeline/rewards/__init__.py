"""Rewards: what scores finished pictures against what was asked for. A model loads when its reward is asked for by name.

from promptloop_pipeline.rewards import load_reward
reward = load_reward("image-reward")
scores = reward(images, prompts)  # one number, or None, for each picture, in the reward's own unit
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "load_reward": "combine", "parse_rewards": "combine", "score_all": "combine", "weighted_sum": "combine",
    "z_normalised": "combine", "tagged": "combine", "win_rates": "combine", "gain": "combine", "filled": "combine", "capped": "combine",
    "RewardSpec": "combine", "load_image": "images", "as_rgb": "images", "ImageReward": "image_reward",
    "Similarity": "clip", "Aesthetic": "clip", "Length": "simple", "Format": "simple", "Ocr": "ocr", "GenEval": "geneval",
    "Artifact": "artifact", "vlm_judge": "judge", "unified_reward": "judge", "edit_reward": "judge", "KeyPoints": "key_points",
    "Pairwise": "key_points",
}  # fmt: skip

__all__ = [*_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


if TYPE_CHECKING:
    from .artifact import Artifact
    from .clip import Aesthetic, Similarity
    from .combine import (
        RewardSpec,
        capped,
        filled,
        gain,
        load_reward,
        parse_rewards,
        score_all,
        tagged,
        weighted_sum,
        win_rates,
        z_normalised,
    )
    from .geneval import GenEval
    from .image_reward import ImageReward
    from .images import as_rgb, load_image
    from .judge import edit_reward, unified_reward, vlm_judge
    from .key_points import KeyPoints, Pairwise
    from .ocr import Ocr
    from .simple import Format, Length
