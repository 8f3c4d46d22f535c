"""The embedded world: a text-to-image task with an exact judge, small enough for a laptop's CPU, made of real classes.

from promptloop_pipeline import tiny
pipe = tiny.load_pipeline("sd")                    # a stock StableDiffusionPipeline
image = pipe("large red circle top left , black background").images[0]
tiny.verify(image, "a big red ball on black, nothing else")
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

_HOME = {
    "verify": "verifier", "Verdict": "verifier", "SingleShotRefiner": "refiners", "parse": "language",
    "system_caption": "language", "user_prompt": "language",
    "plan": "scenes", "random_spec": "scenes", "single_shot": "refiners", "OracleRefiner": "refiners",
    "RotationRefiner": "refiners", "requests": "benchmark",
}  # fmt: skip
WEIGHTS = Path(__file__).parent / "weights"
GENERATORS = ("sd",)
REFINERS = {"tiny": "refiner", "tiny-warm-up": "warm-up"}  # by name: their folders
TEMPLATE = Path(__file__).parent / "refiner.txt"  # what they are told


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and notices of the libraries while something loads ("Expected types for vae": AutoencoderTiny is a documented use)."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(m, m.get_verbosity(), m.is_progress_bar_enabled()) for m in (diffusers_logging, transformers_logging)]
    for module, _, _ in before:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, level, bars in before:
            module.set_verbosity(level)
            if bars:
                module.enable_progress_bar()


def load_pipeline(name: str = "sd") -> Any:
    """A generator of the embedded world, as the stock diffusers pipeline of its kind, in float32 on the CPU.

    Raises ValueError for an unknown name.
    """
    if name not in GENERATORS:
        raise ValueError(f"there is no embedded generator {name!r}; there are: {', '.join(GENERATORS)}")
    import torch
    from diffusers import DiffusionPipeline

    with quiet():
        pipe = DiffusionPipeline.from_pretrained(WEIGHTS / name).to(torch.float32)
    pipe.vae.to(memory_format=torch.channels_last)  # a quarter faster on CPUs
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_refiner(name: str = "tiny", **options: Any) -> Any:
    """The embedded refiner: a tiny vision-language model that was trained for this world, as an `MLLMRefiner`, in float32 on the CPU.

    It knows two jobs: at the start, to say a request in the generator's words; later, to look at the preview and forbid a sticker that
    forms. name: "tiny", or "tiny-warm-up", which seldom acts upon what it sees: what reinforcement learning begins with. options: of
    `MLLMRefiner` and of its chat model.

    Raises ValueError for an unknown name.
    """
    if name not in REFINERS:
        raise ValueError(f"there is no embedded refiner {name!r}; there are: {', '.join(REFINERS)}")
    from ..refiners.mllm import MLLMRefiner

    with quiet():
        return MLLMRefiner.from_pretrained(
            WEIGHTS / REFINERS[name], TEMPLATE, **{"device": "cpu", "max_new_tokens": 96} | options
        )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


if TYPE_CHECKING:
    from .language import parse, system_caption, user_prompt
    from .scenes import plan, random_spec
    from .verifier import Verdict, verify
