"""`attach` for any stock pipeline object, and the named classes: the stock class with a refiner in its call."""

from __future__ import annotations

from typing import Any

from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from .engine import run
from .families import family_of, stock_class


class Attached:
    """A stock pipeline whose call takes a refiner; everything else is the pipeline's own, which is not changed."""

    def __init__(self, pipe: Any, defaults: dict[str, Any]) -> None:
        self.pipe, self.defaults = pipe, defaults

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _call(self.pipe, self.pipe.__call__, args, self.defaults | kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["pipe"], name)


def attach(pipe: Any, **defaults: Any) -> Attached:
    """Gives a stock diffusers pipeline the loop.

        loop = attach(pipe, refiner=refiner, refine_at="20%, 50%, 80%")
        out = loop("three red cubes left of a blue ball", num_inference_steps=30)
        out.images, out.trajectories

    Arguments of the pipeline's own `__call__`, given here, become defaults; those of the loop are

    refiner: any object with `refine` (`promptloop_pipeline.Refiner`); None runs the stock pipeline.
    refine_at: a `RefinementSchedule` or its text; default "20%, 50%, 80%".
    preview: how x0-estimates become pictures: None (the pipeline's VAE), an AutoencoderTiny, or a function
        (pipe, x0) -> PIL images.
    strict: raise when a turn fails, instead of keeping the prompt and recording the failure.

    Raises TypeError for a pipeline that the loop cannot work with.
    """
    pipe = pipe.pipe if isinstance(pipe, Attached) else pipe
    family_of(pipe)
    return Attached(pipe, defaults)


def _call(pipe: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    loop = {k: kwargs.pop(k) for k in ("refiner", "refine_at", "preview", "strict", "cancel") if k in kwargs}
    if loop.get("refiner") is None:
        return call(*args, **kwargs)
    return run(pipe, call, args, kwargs, **loop)


class _PromptLoop:
    """Mixed into a stock class. Not an `__init__` argument: `from_pretrained` and `from_pipe` go on as they are."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The stock call, and `refiner`, `refine_at`, `preview`, `strict` as in `promptloop_pipeline.attach`."""
        return _call(self, super().__call__, args, kwargs)  # type: ignore[misc]

    def to_json_string(self) -> str:
        """Names the stock class in what is saved, so that the folder loads without PromptLoop."""
        text: str = super().to_json_string()  # type: ignore[misc]
        return text.replace(f'"_class_name": "{type(self).__name__}"', f'"_class_name": "{stock_class(self).__name__}"')


class PromptLoopStableDiffusionPipeline(_PromptLoop, StableDiffusionPipeline):
    """Stable Diffusion 1.x and 2.x."""


class PromptLoopStableDiffusionXLPipeline(_PromptLoop, StableDiffusionXLPipeline):
    """Stable Diffusion XL."""


class PromptLoopStableDiffusion3Pipeline(_PromptLoop, StableDiffusion3Pipeline):
    """Stable Diffusion 3 and 3.5."""


class PromptLoopFluxPipeline(_PromptLoop, FluxPipeline):
    """FLUX.1 dev and schnell."""
