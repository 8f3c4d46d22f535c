"""PromptLoop: a refiner looks at the x0-estimate of a running diffusion sampling and rewrites the prompt for the rest of it.

Importing this package loads neither torch nor diffusers; the names below load what they need when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "RefinementSchedule": "schedule", "Refiner": "refiner", "View": "refiner", "Refinement": "refiner",
    "Session": "session", "RefinerError": "session", "Turn": "trajectory", "Trajectory": "trajectory",
    "NoOpRefiner": "refiners.scripted", "ScheduleRefiner": "refiners.scripted", "FunctionRefiner": "refiners.scripted",
    "MLLMRefiner": "refiners.mllm", "GuardedRefiner": "refiners.guards",
    "prompt_schedule": "replay", "save_schedule": "replay", "load_schedule": "replay", "prompt_editing": "replay",
    "refine_in_rounds": "pipelines.rounds", "attach": "pipelines.classes", "PromptLoopStableDiffusionPipeline": "pipelines.classes",
    "PromptLoopStableDiffusionXLPipeline": "pipelines.classes", "PromptLoopStableDiffusion3Pipeline": "pipelines.classes",
    "PromptLoopFluxPipeline": "pipelines.classes",
}  # fmt: skip

__all__ = [*_HOME, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from .pipelines.classes import (
        PromptLoopFluxPipeline,
        PromptLoopStableDiffusion3Pipeline,
        PromptLoopStableDiffusionPipeline,
        PromptLoopStableDiffusionXLPipeline,
        attach,
    )
    from .pipelines.rounds import refine_in_rounds
    from .refiner import Refinement, Refiner, View
    from .refiners.guards import GuardedRefiner
    from .refiners.mllm import MLLMRefiner
    from .refiners.scripted import FunctionRefiner, NoOpRefiner, ScheduleRefiner
    from .replay import load_schedule, prompt_editing, prompt_schedule, save_schedule
    from .schedule import RefinementSchedule
    from .session import RefinerError, Session
    from .trajectory import Trajectory, Turn
