"""`attach` for any stock pipeline object, and the named classes: the stock class with a refiner in its call."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from ..schedule import RefinementSchedule
from ..session import check_modes, check_refiner
from .engine import DEFAULT_SCHEDULE, named_arguments, run
from .families import family_of, signature_of, stock_class
from .gate import check_reward

LOOP = {
    "refiner": None, "refine_at": DEFAULT_SCHEDULE, "preview": None, "strict": False, "cancel": (), "trim": True, "apriori": False,
    "asynchronous": False, "gate": None,
}  # fmt: skip
_DEPRECATED = ("callback", "callback_steps")  # what diffusers' calls still take from their **kwargs


def check_names(call: Any, pipe: Any, names: Iterable[str], ours: Iterable[str] = LOOP) -> None:
    """Raises TypeError for an argument that nobody reads: some stock calls have `**kwargs`, and swallow what is misspelt.

    Somebody's own call with `**kwargs` may read, or hand on, whatever it likes.
    """
    parameters = signature_of(call).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        if call.__module__.split(".")[0] not in ("diffusers", __name__.split(".")[0]):
            return
        parameters = {**parameters, **dict.fromkeys(_DEPRECATED)}  # type: ignore[assignment]
    known = [*ours, *(name for name in parameters if name not in ("self", "args", "kwargs"))]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise TypeError(
                f"{name} is no argument of {stock_class(pipe).__name__}, nor of the loop"
                + (f"; did you mean {near[0]}?" if near else f"; those of the loop are {', '.join(ours)}")
            )


def check_loop(loop: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for a value that the loop cannot work with, given now or as a default."""
    if loop.get("refiner") is not None:
        check_refiner(loop["refiner"])
    RefinementSchedule.parse(loop.get("refine_at", DEFAULT_SCHEDULE))
    check_modes(**{k: loop[k] for k in ("strict", "cancel", "apriori", "asynchronous") if k in loop})
    if not isinstance(loop.get("trim", True), bool):
        raise TypeError(f"trim is {loop['trim']!r}; use True or False")
    preview = loop.get("preview")
    if preview is not None and not callable(preview):
        raise TypeError(f"preview is {preview!r:.80}; give None, an AutoencoderTiny, or a function (pipe, x0) -> PIL images")
    if loop.get("gate") is not None:
        check_reward(loop["gate"], "gate")


def stock_call(pipe: Any) -> Any:
    """The call that PromptLoop's own stands before, be it diffusers' or somebody's subclass; not bound."""
    mro = type(pipe).__mro__
    start = mro.index(_PromptLoop) + 1 if isinstance(pipe, _PromptLoop) else 0
    return next(vars(c)["__call__"] for c in mro[start:] if "__call__" in vars(c))


def _call(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    loop, call = {k: kwargs.pop(k) for k in LOOP if k in kwargs}, stock_call(pipe)
    check_names(call, pipe, kwargs)
    check_loop(loop)
    if loop.get("refiner") is None:
        return call(pipe, *args, **kwargs)
    return run(pipe, call, args, kwargs, **loop)


def _own_call(pipe: Any) -> Any:
    """What stands first: for a named class its own call, which knows of the loop and may be somebody's subclass's."""
    return type(pipe).__call__ if isinstance(pipe, _PromptLoop) else stock_call(pipe)


class Attached:
    """A stock pipeline whose call takes a refiner. All that is read from it or set on it is the pipeline's own."""

    pipe: Any
    defaults: dict[str, Any]

    def __init__(self, pipe: Any, defaults: dict[str, Any]) -> None:
        self.__dict__.update(pipe=pipe, defaults=defaults)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        loop = {k: kwargs.pop(k) for k in LOOP if k in kwargs}
        ours, call = isinstance(self.pipe, _PromptLoop), _own_call(self.pipe)
        named = self.defaults | named_arguments(self.pipe, call, args, kwargs) | loop
        return self.pipe(**named) if ours else _call(self.pipe, (), named)

    def to(self, *args: Any, **kwargs: Any) -> Attached:
        self.pipe.to(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        if "pipe" not in self.__dict__:  # while it is being copied
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.pipe, name, value)


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
    cancel: exception types by which a host stops a run from inside a refiner; they are never taken for a failure.
    trim: cut a refined prompt that the text encoders cannot hold, at a clause boundary, and note it; the encoders would cut it anyway,
        but anywhere, and silently.
    apriori: let the refiner write all prompts before the first step, without pictures (PromptLoop's open-loop mode).
    asynchronous: go on sampling while the refiner thinks; True applies the answer at the first step after it came, a number that
        many steps later. A question that is still open when the run ends is given up.
    gate: a reward (`promptloop_pipeline.reward.Reward`; a plain function will do), for runs that must do no harm. The untouched run,
        from the same random state, is made too, unless no prompt was changed; both are scored against the users' requests, and each
        sample's better picture is returned: the refined one if it scores strictly higher. The other one's trajectory is in
        `trajectory.others`, what the gate did in `trajectory.meta["gate"]`. A reward that fails keeps the untouched pictures. Your
        own callbacks are called in both runs, since they may change the picture.

    `pipe._interrupt = True`, diffusers' own way to stop a run, stops a refiner that has `on_token` after the token at hand, as does
    giving it up. What it says nevertheless is recorded and not applied.

    Raises TypeError for a pipeline that the loop cannot work with, and for an argument that neither the loop nor the pipeline knows;
    TypeError or ValueError for what the loop cannot work with, such as an unreadable schedule.
    """
    if isinstance(pipe, Attached):
        pipe, defaults = pipe.pipe, pipe.defaults | defaults
    family_of(pipe)
    check_names(_own_call(pipe), pipe, defaults)
    check_loop({k: v for k, v in defaults.items() if k in LOOP})
    return Attached(pipe, defaults)


class _PromptLoop:
    """Mixed into a stock class. Not an `__init__` argument: `from_pretrained` and `from_pipe` go on as they are."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls):  # somebody's own
            return

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            """The stock call, and `refiner` and the loop's other arguments as in `promptloop_pipeline.attach`."""
            return _call(self, args, kwargs)

        stock = inspect.signature(super().__call__)  # type: ignore[misc]
        ours = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in LOOP.items()]
        theirs = list(stock.parameters.values())
        rest = [p for p in theirs if p.kind is inspect.Parameter.VAR_KEYWORD]
        __call__.__signature__ = stock.replace(parameters=[p for p in theirs if p not in rest] + ours + rest)  # type: ignore[attr-defined]
        cls.__call__ = __call__  # type: ignore[method-assign]

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
