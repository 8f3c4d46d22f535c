"""Runs a stock diffusers pipeline with a refiner in the loop, without a copied denoising loop.

Two things are put on the pipeline for one run and taken off again, whatever happens:
- `scheduler.step` is wrapped on the instance: it sees the guided prediction, which gives the x0-estimate;
- a forward pre-hook on the denoiser (and control net) takes the turn that is due before a step, and swaps the conditioning.

The new conditioning comes from a *probe*: the pipeline's own `__call__` with the new prompts, on a shallow copy, stopped just before
its denoiser computes. So negative prompts, guidance, text encoders and their options are handled by the pipeline itself.
"""

from __future__ import annotations

import copy
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..refiner import Refiner
from ..reward import Reward
from ..schedule import RefinementSchedule
from ..session import Cancel, Session
from .budget import fit_to
from .conditioning import Conditioning, Slots, slots_of
from .families import DENOISERS, MODULES, decode_preview, family_of, signature_of, stock_class
from .gate import RandomState, check_reward, keep_better
from .x0 import noise_level, sampling_step, sampling_steps, x0_estimate

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_SCHEDULE = "20%, 50%, 80%"
_NOT_PROBED = ("latents", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback")
Call = Callable[..., Any]


class _Stop(BaseException):
    """Ends a probe; no pipeline catches it."""


class Run:
    """One call of a pipeline with a refiner. `call` is the stock class's `__call__`, not bound."""

    def __init__(self, pipe: Any, call: Call, session: Session, kwargs: dict[str, Any], preview: Any) -> None:
        self.pipe, self.call, self.session, self.kwargs, self.preview = pipe, call, session, kwargs, preview
        self.family = family_of(pipe)
        self.modules = {n: m for n in MODULES if isinstance(m := getattr(pipe, n, None), nn.Module)}
        self.conditioning: dict[str, Conditioning] = {}  # by module
        self.awaited: dict[str, list[tuple[Slots, int, set[int]]]] = {}  # updates of modules that are not met yet, at the start
        self.calls = 0  # of scheduler.step, finished
        self.step = -1  # the sampling step at hand
        self.thread = threading.get_ident()
        self.turning = False  # whether the refiner is at work
        self.pending = False  # whether a swap has yet to be felt
        self.probed: dict[str, Slots] | None = None  # by module, while a probe is under way
        self.x0: Tensor | Exception | None = None
        self.sigma: float | None = None

    def __call__(self) -> Any:
        scheduler = self.pipe.scheduler
        with ExitStack() as stack:
            stack.enter_context(_wrapped(scheduler, "step", self._read(scheduler)))
            for name, module in self.modules.items():
                handle = module.register_forward_pre_hook(self._before(name), with_kwargs=True)
                stack.callback(handle.remove)
            return self.call(self.pipe, **self.kwargs)

    # --- reading x0 -----------------------------------------------------------------------------------------------------

    def _read(self, scheduler: Any) -> Call:
        original = scheduler.step
        signature = inspect.signature(original)
        wanted = ("model_output", "timestep", "sample")

        def step(*args: Any, **kwargs: Any) -> Any:
            if sampling_step(scheduler, self.calls + 1)[0] in self.session.due:  # nobody will look otherwise
                named = {**dict(zip(signature.parameters if {*wanted} <= {*signature.parameters} else wanted, args)), **kwargs}
                try:
                    self.sigma = noise_level(scheduler, named["timestep"])
                    self.x0 = x0_estimate(scheduler, *(named[w] for w in wanted))
                except Exception as e:  # a failed preview, to be recorded in the turn that wants it
                    self.x0 = e
            result = original(*args, **kwargs)
            self.calls += 1
            return result

        step.__signature__ = signature  # type: ignore[attr-defined]  # pipelines look for eta, generator
        return step

    def decode(self) -> Sequence[Image]:
        """The last x0-estimates as pictures."""
        if isinstance(self.x0, Exception):
            raise self.x0
        if self.x0 is None:
            raise RuntimeError("there is no x0-estimate yet")
        return self._decode(self.x0)

    def _decode(self, latents: Tensor) -> Sequence[Image]:
        if callable(self.preview) and not isinstance(self.preview, nn.Module):
            return self.preview(self.pipe, latents)
        height, width = self.kwargs.get("height"), self.kwargs.get("width")
        return decode_preview(self.pipe, self.family, latents, height, width, self.preview)

    # --- what is finished -------------------------------------------------------------------------------------------------

    @property
    def interrupted(self) -> bool:
        return interrupted(self.pipe)

    @property
    def latent(self) -> bool:
        return self.kwargs.get("output_type") == "latent"

    def pictures(self, output: Any) -> Sequence[Image]:
        """Of a finished output, as PIL whatever its type; latents are decoded."""
        images = output[0] if isinstance(output, tuple) else output.images
        if self.latent:
            return self._decode(images)
        if isinstance(images, Tensor):
            images = images.float().cpu().permute(0, 2, 3, 1).numpy()
        return images if isinstance(images, list) else self.pipe.image_processor.numpy_to_pil(images)

    def finish(self, output: Any) -> None:
        """Hands the pictures to the session; latents are decoded only if a turn wants to look."""
        for trajectory in self.session.trajectories:
            trajectory.meta["interrupted"] = self.interrupted
        sigma = None if self.kwargs.get("denoising_end") else 0.0  # with it, noise is left
        images, preview = (None, lambda: self.pictures(output)) if self.latent else (self.pictures(output), None)
        self.session.finish(images, sigma, preview, look=not self.interrupted)

    # --- turns and the swap -----------------------------------------------------------------------------------------------

    def _before(self, name: str) -> Call:
        parameters = list(inspect.signature(self.modules[name].forward).parameters)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            named = dict(zip(parameters, args)) | kwargs
            if self.probed is not None:
                self.probed[name] = slots_of(named)
                if name in DENOISERS:
                    raise _Stop
                return None
            if self.turning or threading.get_ident() != self.thread:
                raise RuntimeError(
                    "the refiner called the pipeline that it refines; give it one of its own: PipelineClass.from_pipe(pipe)"
                )
            if self.calls == 0 and name not in self.conditioning:
                self.conditioning[name] = Conditioning(named)
                if not self.conditioning[name].has_prompt:
                    raise TypeError(
                        f"{type(self.pipe).__name__} is not supported: its {name} is not fed the prompt as encoder_hidden_states, "
                        "so a refined prompt could not reach it"
                    )
                for update in self.awaited.pop(name, []):
                    self.conditioning[name].update(*update)
            self._begin()
            swapped, felt = self.conditioning[name].swap(named)
            if self.pending and not felt:
                self._take_back(RuntimeError("a callback has put its own conditioning in the place of the prompt's"))
            self.pending = False
            return None if swapped is named else ((), swapped)

        return hook

    def _begin(self) -> None:
        """Takes the turn that is due, if this is the first call of a sampling step."""
        step, first = sampling_step(self.pipe.scheduler, self.calls)
        if not first or step <= self.step:
            return
        self.step = step
        for conditioning in self.conditioning.values():
            conditioning.begin_step()
        if step > 0 and not self.session.wants(step):
            return
        scheduler = self.pipe.scheduler
        before, state = self.session.prompts, dict(vars(scheduler))
        self.turning = True
        try:
            if step == 0:
                self.session.start(sampling_steps(scheduler, _num_calls(self.pipe)))
                if any(0 < due < self.session.num_steps for due in self.session.due):
                    noise_level(scheduler, scheduler.timesteps[0])  # a scheduler without x0 says so now, not midway
            prompts = self.session.observe(step, self.sigma, self.decode if step else None)
        finally:
            self.turning = False
            vars(scheduler).update(state)  # a refiner that called this pipeline was stopped, but not before this was changed
        if prompts is None:
            return
        changed = {i for i, (old, new) in enumerate(zip(before, prompts, strict=True)) if old != new}
        for conditioning in self.conditioning.values():
            conditioning.begin_turn()
        clock = time.perf_counter()
        try:
            self._swap(prompts, changed)
        except Exception as e:
            if self.session.cancel and isinstance(e, self.session.cancel):
                raise
            self._take_back(e)
        else:
            self.pending = True
            self.session.applied(time.perf_counter() - clock)

    def _take_back(self, error: Exception) -> None:
        for conditioning in self.conditioning.values():
            conditioning.take_back()
        self.awaited = {}
        self.session.rejected(error)

    def _swap(self, prompts: list[str], changed: set[int]) -> None:
        n = self.kwargs.get("num_images_per_prompt") or 1
        for k in range(
            n
        ):  # the pipeline makes n images of each prompt: the k-th of each have their prompts from the k-th probe
            if mine := {i for i in changed if i % n == k}:
                for name, slots in self.probe(prompts[k::n]).items():
                    if name in self.conditioning:
                        self.conditioning[name].update(slots, len(prompts), mine)
                    else:
                        self.awaited.setdefault(name, []).append((slots, len(prompts), mine))

    def probe(self, prompts: list[str]) -> dict[str, Slots]:
        """What the pipeline would pass to its modules for these prompts, one for each of its own; costs no denoising.

        Neither the pipeline, nor the user's generator, nor the global random state is touched.
        """
        kwargs = {k: v for k, v in self.kwargs.items() if k not in _NOT_PROBED}
        one = isinstance(kwargs["prompt"], str)  # some pipelines want the negative prompt to be of the same type
        kwargs |= {
            "prompt": prompts[0] if one else prompts,
            "generator": torch.Generator().manual_seed(0),
            "output_type": "latent",
        }
        shadow = copy.copy(self.pipe)
        shadow.scheduler = copy.deepcopy(self.pipe.scheduler)
        shadow._progress_bar_config = {"disable": True}
        self.probed = {}
        try:
            self.call(shadow, **kwargs)
        except _Stop:
            pass
        finally:
            found, self.probed = self.probed, None
        return found


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


def interrupted(pipe: Any) -> bool:
    """Whether somebody, in a callback or from another thread, has told this run to stop: diffusers' own way."""
    return bool(getattr(pipe, "_interrupt", False))


def _num_calls(pipe: Any) -> int:
    """How often this run will call scheduler.step: image-to-image takes only a tail of the scheduler's timesteps."""
    return getattr(pipe, "_num_timesteps", None) or len(pipe.scheduler.timesteps)


def named_arguments(pipe: Any, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call, all by name. A subclass's call that hands on what it is given is read as the stock one's.

    Raises TypeError as the call itself would.
    """
    own = signature_of(call)
    signature, extra = own, {}
    if "prompt" not in own.parameters or inspect.Parameter.VAR_POSITIONAL in {p.kind for p in own.parameters.values()}:
        signature = signature_of(stock_class(pipe).__call__)
        extra = {k: v for k, v in kwargs.items() if k in own.parameters and k not in signature.parameters}
    named = signature.bind(pipe, *args, **{k: v for k, v in kwargs.items() if k not in extra}).arguments
    del named[next(iter(signature.parameters))]  # self
    rest = next((p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), "")
    return named | named.pop(rest, {}) | extra


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
    cancel: Cancel = (),
    trim: bool = True,
    apriori: bool = False,
    asynchronous: bool | int = False,
    gate: Reward | None = None,
) -> Any:
    """Calls a stock pipeline with a refiner; what `attach` and the named classes do. `call` is the stock class's `__call__`.

    Returns the stock output with `.trajectories` (with `return_dict=False`: the stock tuple and the trajectories as its last element).
    An exception that ends the run carries what was recorded as `.trajectories`, and the finished output, if there is one, as `.output`.
    """
    if gate is not None:
        check_reward(gate, "gate")
    kwargs = named_arguments(pipe, call, args, kwargs)
    prompt = kwargs.get("prompt")
    if prompt is None:
        raise ValueError("a refiner needs the prompt as text; give prompt=, not prompt_embeds=")
    if kwargs.get("prompt_embeds") is not None:
        raise ValueError("prompt_embeds cannot be refined: give the prompt as text, or leave out the refiner")
    if isinstance(prompt, tuple):
        kwargs["prompt"] = prompt = list(prompt)
    prompts = prompt if isinstance(prompt, list) else [prompt]
    n = kwargs.get("num_images_per_prompt") or 1
    requests = [text for text in prompts for _ in range(n)]
    session = Session(
        requests, refiner, refine_at, strict=strict, cancel=cancel, meta=meta_of(pipe, kwargs, len(requests)),
        sources=sources_of(pipe, kwargs, len(requests)), fit=fit_to(pipe, kwargs) if trim else None, apriori=apriori,
        asynchronous=asynchronous, interrupted=lambda: interrupted(pipe),
    )  # fmt: skip
    this = Run(pipe, call, session, kwargs, preview)
    output, start = None, RandomState(kwargs) if gate is not None else None
    try:
        output = this()
        this.finish(output)
        if gate is not None and start is not None:
            output = keep_better(this, output, gate, start)
    except BaseException as e:  # KeyboardInterrupt too, and a host's own
        session.give_up("the run ended before the refiner's answer")
        e.trajectories, e.output = session.trajectories, output  # type: ignore[attr-defined]
        raise
    if isinstance(output, tuple):
        return (*output, session.trajectories)
    output.trajectories = session.trajectories
    return output


def sources_of(pipe: Any, kwargs: dict[str, Any], samples: int) -> list[Any] | None:
    """The pictures that an image-to-image run starts from, one for each sample, where they are pictures.

    With `strength`, a call starts from its `image`; without, that is something else, such as a control net's map. Of several pictures
    diffusers takes the first for the first sample, and so on, over and over: p, p, q, q are begun with a, b, a, b.
    """
    import PIL.Image

    given = kwargs.get("image") if "strength" in signature_of(stock_class(pipe).__call__).parameters else None
    pictures = list(given) if isinstance(given, (list, tuple)) else [given]
    if not pictures or samples % len(pictures) or not all(isinstance(picture, PIL.Image.Image) for picture in pictures):
        return None
    return pictures * (samples // len(pictures))


def meta_of(pipe: Any, kwargs: dict[str, Any], samples: int) -> list[dict[str, Any]]:
    """What is known of each sample before the run."""
    generator = kwargs.get("generator")
    generators = generator if isinstance(generator, list) else [generator] * samples
    model = getattr(pipe.config, "_name_or_path", None)
    common = {
        "pipeline": type(pipe).__name__,
        "model": None if model is None else str(model),  # it may be a Path
        "scheduler": type(pipe.scheduler).__name__,
        "guidance_scale": kwargs.get("guidance_scale"),
        "negative_prompt": kwargs.get("negative_prompt"),
    }
    seeds = [g.initial_seed() if isinstance(g, torch.Generator) else None for g in generators[:samples]]
    return [common | {"seed": seed, "sample": i} for i, seed in enumerate(seeds + [None] * (samples - len(seeds)))]
