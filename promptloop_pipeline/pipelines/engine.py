"""Runs a stock diffusers pipeline with a refiner in the loop, without a copied denoising loop.

Three things are put on the pipeline for one run and taken off again, whatever happens:
- `scheduler.step` is wrapped on the instance: it sees the guided prediction, which gives the x0-estimate;
- a forward pre-hook on the denoiser takes the turn that is due before a step, and swaps the conditioning from then on;
- the new conditioning comes from a *probe*: the pipeline's own `__call__` with the new prompts, stopped just before its
  denoiser computes. So negative prompts, guidance, text encoders and their options are handled by the pipeline itself.

The swap replaces the very tensors that the pipeline passed in its first step, and only the rows of samples whose prompt changed.
Tensors that a user's callback has put in their place are left alone.
"""

from __future__ import annotations

import copy
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..refiner import Refiner
from ..schedule import RefinementSchedule
from ..session import Session
from .families import CONDITIONING, MODULES, Family, decode_preview, family_of
from .x0 import noise_level, sampling_step, sampling_steps, x0_estimate

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("promptloop")
DEFAULT_SCHEDULE = "20%, 50%, 80%"
_PER_PROMPT = ("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
_NOT_PROBED = ("latents", "generator", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback", "output_type")
Call = Callable[..., Any]
Slots = dict[tuple[str, ...], Tensor]  # path into a module's keyword arguments -> what the pipeline passed there


class _Stop(BaseException):
    """Ends a probe; no pipeline catches it."""


class Run:
    """One call of a pipeline with a refiner. `call` is the stock `__call__`, bound."""

    def __init__(self, pipe: Any, call: Call, session: Session, kwargs: dict[str, Any], preview: Any) -> None:
        self.pipe, self.call, self.session, self.kwargs, self.preview = pipe, call, session, kwargs, preview
        self.family: Family = family_of(pipe)
        self.modules = {n: m for n in MODULES if isinstance(m := getattr(pipe, n, None), nn.Module)}
        self.calls = 0  # of scheduler.step, finished
        self.turned = -1  # the last step before which a turn was considered
        self.probing = False
        self.probed: dict[str, Slots] = {}
        self.x0: Tensor | None = None
        self.sigma: float | None = None
        self.original: dict[str, Slots] = {}  # by module: what the pipeline passes
        self.versions: dict[str, dict[tuple[str, ...], int]] = {}  # to notice when somebody writes into it
        self.current: dict[str, Slots] = {}  # by module: what goes in instead
        self.unchecked = False  # whether this step's first call has yet to take the swap

    def __call__(self) -> Any:
        scheduler = self.pipe.scheduler
        with ExitStack() as stack:
            stack.enter_context(_wrapped(scheduler, "step", self._step(scheduler)))
            for name, module in self.modules.items():
                handle = module.register_forward_pre_hook(self._before(name), with_kwargs=True)
                stack.callback(handle.remove)
            return self.call(**self.kwargs)

    # --- reading x0 -----------------------------------------------------------------------------------------------------

    def _step(self, scheduler: Any) -> Call:
        original = scheduler.step
        signature = inspect.signature(original)

        def step(*args: Any, **kwargs: Any) -> Any:
            following = sampling_step(scheduler, self.calls + 1)[0]
            if following in self.session.due:  # nobody will look otherwise
                given = signature.bind(*args, **kwargs).arguments
                self.sigma = noise_level(scheduler, given["timestep"])
                self.x0 = x0_estimate(scheduler, given["model_output"], given["timestep"], given["sample"])
            result = original(*args, **kwargs)
            self.calls += 1
            return result

        step.__signature__ = signature  # type: ignore[attr-defined]  # pipelines look for eta, generator
        return step

    # --- turns and the swap -----------------------------------------------------------------------------------------------

    def _before(self, name: str) -> Call:
        module = self.modules[name]
        parameters = list(inspect.signature(module.forward).parameters)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            named = dict(zip(parameters, args)) | kwargs
            if self.probing:
                self.probed[name] = _slots(named)
                if name in ("unet", "transformer"):
                    raise _Stop
                return None
            if self.calls == 0 and name not in self.original:
                self.original[name] = _slots(named)
                self.versions[name] = {path: _version(tensor) for path, tensor in self.original[name].items()}
            self._turn()
            if name not in self.current:
                return None
            return (), self._swapped(name, named)

        return hook

    def _turn(self) -> None:
        step, first = sampling_step(self.pipe.scheduler, self.calls)
        if not first or step <= self.turned:
            return
        self.turned, self.unchecked = step, True
        if step == 0:
            scheduler = self.pipe.scheduler
            self.session.start(sampling_steps(scheduler, _num_calls(self.pipe)))
            if any(0 < due < self.session.num_steps for due in self.session.due):
                noise_level(scheduler, scheduler.timesteps[0])  # a scheduler without x0 says so now, not midway
        before = self.session.prompts
        prompts = self.session.observe(step, self.sigma, self.decode if step else None)
        if prompts is None:
            return
        clock = time.perf_counter()
        try:
            self._swap(before, prompts)
        except Exception as e:
            if self.session.cancel and isinstance(e, self.session.cancel):
                raise
            self.session.rejected(e)
        else:
            self.session.applied(time.perf_counter() - clock)

    def decode(self) -> Sequence[Image]:
        if self.x0 is None:
            raise RuntimeError("there is no x0-estimate yet")
        if callable(self.preview) and not isinstance(self.preview, nn.Module):
            return self.preview(self.pipe, self.x0)
        height, width = self.kwargs.get("height"), self.kwargs.get("width")
        return decode_preview(self.pipe, self.family, self.x0, height, width, self.preview)

    def pictures(self, images: Any) -> Sequence[Image] | None:
        """The finished images as PIL, whatever the output type; latents are decoded only if a turn wants to see them."""
        if isinstance(images, list):
            return images
        if self.kwargs.get("output_type") == "latent":
            self.x0 = images
            return self.decode() if self.session.num_steps in self.session.due else None
        if isinstance(images, Tensor):
            images = images.float().cpu().permute(0, 2, 3, 1).numpy()
        return self.pipe.image_processor.numpy_to_pil(images)

    def _swap(self, before: list[str], prompts: list[str]) -> None:
        changed = [i for i, (old, new) in enumerate(zip(before, prompts, strict=True)) if old != new]
        for name, slots in self.probe(prompts).items():
            old = self.current.get(name) or self.original.get(name) or slots
            self.current[name] = {
                path: _rows(old[path], new, changed, len(prompts)) for path, new in slots.items() if path in old
            }

    def _swapped(self, name: str, named: dict[str, Any]) -> dict[str, Any]:
        """The module's arguments with the pipeline's own conditioning replaced; what is not the pipeline's own stays."""
        out, unchecked, self.unchecked = dict(named), self.unchecked, False
        for path, original in self.original[name].items():
            owner = out.get(path[0]) if len(path) > 1 else out
            given = owner.get(path[-1]) if owner is not None else None
            untouched = _version(original) == self.versions[name][path]
            if not isinstance(given, Tensor) or path not in self.current[name] or not untouched:
                continue
            replacement = _counterpart(given, original, self.current[name][path])
            if replacement is not None:
                out[path[0]] = replacement if len(path) == 1 else dict(out[path[0]]) | {path[-1]: replacement}
                unchecked = False
        if unchecked:
            logger.warning(
                "step %d: a callback has replaced the prompt's conditioning; the refined prompt has no effect", self.turned
            )
        return out

    def probe(self, prompts: list[str]) -> dict[str, Slots]:
        """What the pipeline would pass to its modules for these prompts, one for each sample; costs no denoising.

        The pipeline's state is put back; the user's generator and the global random state are not touched.
        """
        n = len(prompts) // max(1, _count(self.kwargs.get("prompt")))
        kwargs = {k: v for k, v in self.kwargs.items() if k not in _NOT_PROBED}
        for key in _PER_PROMPT[1:]:
            if isinstance(text := kwargs.get(key), str):  # some pipelines want the same type as the prompt's
                kwargs[key] = [text] * len(prompts)
            elif isinstance(text, list):
                kwargs[key] = [t for t in text for _ in range(n)]
        kwargs |= {"prompt": prompts, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        if "num_images_per_prompt" in kwargs:
            kwargs["num_images_per_prompt"] = 1
        self.probing, self.probed = True, {}
        state = dict(vars(self.pipe))
        self.pipe.scheduler = copy.deepcopy(self.pipe.scheduler)
        self.pipe._progress_bar_config = {"disable": True}
        try:
            self.call(**kwargs)
        except _Stop:
            pass
        finally:
            # an interrupt that arrived meanwhile must not be lost with the rest of the probe's state
            state["_interrupt"] = state.get("_interrupt", False) or getattr(self.pipe, "_interrupt", False)
            for key in set(vars(self.pipe)) - set(state):
                delattr(self.pipe, key)
            vars(self.pipe).update(state)
            self.probing = False
        return self.probed


@contextmanager
def _wrapped(owner: Any, name: str, replacement: Call) -> Iterator[None]:
    """Sets an attribute on the instance and restores what was there, be it the class's own or another wrapper."""
    previous = vars(owner).get(name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if previous is None:
            delattr(owner, name)
        else:
            setattr(owner, name, previous)


def _num_calls(pipe: Any) -> int:
    """How often this run will call scheduler.step: image-to-image takes only a tail of the scheduler's timesteps."""
    return getattr(pipe, "_num_timesteps", None) or len(pipe.scheduler.timesteps)


def _count(prompt: str | list[str] | None) -> int:
    return len(prompt) if isinstance(prompt, list) else 1


def _slots(named: dict[str, Any]) -> Slots:
    """The conditioning among a module's arguments, flattened: {("added_cond_kwargs", "text_embeds"): tensor, ...}"""
    slots: Slots = {}
    for name in CONDITIONING:
        value = named.get(name)
        if isinstance(value, dict):
            slots |= {(name, key): v for key, v in value.items() if isinstance(v, Tensor)}
        elif isinstance(value, Tensor):
            slots[name,] = value
    return slots


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _rows(old: Tensor, new: Tensor, changed: list[int], samples: int) -> Tensor:
    """`old` with the rows of the changed samples taken from `new`. Rows are (groups x samples): [negative..., positive...]."""
    if old.shape != new.shape or old.shape[0] % samples:
        return new
    result = old.clone()
    for row in range(old.shape[0]):
        if row % samples in changed:
            result[row] = new[row].to(result)
    return result


def _counterpart(given: Tensor, original: Tensor, current: Tensor) -> Tensor | None:
    """`current` where the pipeline passes its original, its positive half where only that is passed (guidance switched off
    midway, skip-layer guidance, guess mode), None where it is something else."""
    if given.shape == original.shape:
        return current if given is original or torch.equal(given, original) else None
    half = original.shape[0] // 2
    if given.shape[1:] == original.shape[1:] and given.shape[0] == half and torch.equal(given, original[half:].to(given)):
        return current[current.shape[0] // 2 :].to(given)
    return None


def run(
    pipe: Any,
    call: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    refiner: Refiner,
    refine_at: str | int | Sequence[str | int] | RefinementSchedule = DEFAULT_SCHEDULE,
    preview: Any = None,
    strict: bool = False,
    cancel: tuple[type[BaseException], ...] = (),
) -> Any:
    """Calls a stock pipeline with a refiner; what `attach` and the named classes do. Returns the stock output with `.trajectories`
    (with `return_dict=False`: the stock tuple and the trajectories as its last element)."""
    signature = inspect.signature(call)
    bound = signature.bind(*args, **kwargs).arguments
    kwargs = bound | bound.pop("kwargs", {})
    prompt = kwargs.get("prompt")
    if prompt is None:
        raise ValueError("a refiner needs the prompt as text; give prompt=, not prompt_embeds=")
    if kwargs.get("prompt_embeds") is not None:
        raise ValueError("prompt_embeds cannot be refined: give the prompt as text, or leave out the refiner")
    prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
    kwargs["prompt"] = prompts if isinstance(prompt, (list, tuple)) else prompt
    n = kwargs.get("num_images_per_prompt") or 1
    requests = [text for text in prompts for _ in range(n)]
    session = Session(requests, refiner, refine_at, strict=strict, cancel=cancel, meta=_meta(pipe, kwargs, len(requests)))
    this = Run(pipe, call, session, kwargs, preview)
    output = this()
    session.finish(this.pictures(output[0] if isinstance(output, tuple) else output.images))
    for trajectory in session.trajectories:
        trajectory.meta["interrupted"] = bool(getattr(pipe, "_interrupt", False))
    if isinstance(output, tuple):
        return (*output, session.trajectories)
    output.trajectories = session.trajectories
    return output


def _meta(pipe: Any, kwargs: dict[str, Any], samples: int) -> list[dict[str, Any]]:
    generator = kwargs.get("generator")
    generators = generator if isinstance(generator, list) else [generator] * samples
    common = {
        "pipeline": type(pipe).__name__,
        "model": getattr(pipe.config, "_name_or_path", None),
        "scheduler": type(pipe.scheduler).__name__,
        "guidance_scale": kwargs.get("guidance_scale"),
        "negative_prompt": kwargs.get("negative_prompt"),
    }
    seeds = [g.initial_seed() if isinstance(g, torch.Generator) else None for g in generators[:samples]]
    return [common | {"seed": seed, "sample": i} for i, seed in enumerate(seeds + [None] * (samples - len(seeds)))]
