"""ComfyUI as a host of the loop: one wrapper around a guider's sampling, for every sampler, guider and model family.

`with_loop(model, loop)` gives a MODEL whose sampling is refined. The wrapper (OUTER_SAMPLE) sees the x0-estimate in the sampler's own
callback, once a step, after the first model call of that step and before x moves. So what comes of looking at step k's estimate acts on
the rest of step k in samplers that call the model again within a step (heun, dpm_2, dpmpp_sde, ...), and from step k + 1 on in all
others; multistep samplers mix one prediction with the old prompt into it. Turns are numbered as everywhere: a turn at step k + 1 looks
at the estimate of step k.

The swap replaces the text of the positive conditioning and nothing else: what other nodes have hung on it (ControlNet, area, mask, time
range, hooks, guidance, reference latents) stays.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from promptloop_pipeline.schedule import RefinementSchedule
from promptloop_pipeline.session import Session
from promptloop_pipeline.trajectory import Trajectory

from . import live
from .conditioning import Cond, equal, rewritten
from .pictures import data_uri, samples_of, to_image

logger = logging.getLogger("promptloop")
KEY = "promptloop"
KEPT = 32  # runs that a loop remembers, for samplers that come from ComfyUI's cache
TARGET = "promptloop_target"  # on conditioning entries that may be rewritten


@dataclass
class Loop:
    """What an artist sets on one of our nodes, and what came of it. ComfyUI keeps it from one prompt to the next, so that nothing in it
    may depend on the run at hand.

    request: the words that the positive conditioning was made of. preview: "vae" or "fast" (the latent preview's rough colours).
    strict: a failing refiner ends the run with its error; else the prompt is kept. wait: False goes on sampling while the refiner
    thinks. source: show the refiner what an image-to-image run starts from. owner: id of the node on which the timeline is drawn.
    """

    refiner: Any
    clip: Any
    vae: Any
    request: str
    refine_at: str = "20%, 50%, 80%"
    preview: str = "vae"
    strict: bool = False
    wait: bool = True
    source: bool = False
    owner: str | None = None
    runs: dict[str, tuple[Any, dict[int, list[Trajectory]]]] = field(
        default_factory=dict
    )  # by sampler, see `add`; the last ones

    def __post_init__(self) -> None:
        if not self.request.strip():
            raise ValueError(
                "the prompt is empty; write what the picture should show, the same words as in the positive prompt"
            )
        RefinementSchedule.parse(self.refine_at)
        if not self.wait and (name := _local(self.refiner)):
            raise ValueError(
                f"the refiner {name} works in ComfyUI's memory, so the sampler has to wait for it; switch on wait, "
                "or use a refiner at an endpoint"
            )

    def add(self, trajectories: Sequence[Trajectory]) -> None:
        """Keeps a run under its sampler: that node and all that it depends on, since ComfyUI takes what such a node has made before
        for another one that is the same. A node that samples several times in one prompt has all of it, by the items of a list."""
        now = live.running()
        graph, node = (now["graph"], now["node"]) if now else ({}, None)
        key, this = live.signature(graph, str(node)), (now and now["prompt_id"], node)
        before, made = self.runs.pop(key, (None, {}))
        made = made if before == this else {}
        made.setdefault(live.item(), []).extend(trajectories)
        self.runs[key] = (this, made)
        while len(self.runs) > KEPT:
            del self.runs[next(iter(self.runs))]
        live.keep(trajectories)

    def made(self, graph: dict[str, Any], nodes: Sequence[str]) -> list[Trajectory] | None:
        """What the first of these nodes did that has sampled with this loop; None where none has. Of a node that has been run for each
        item of a list: for the item at hand."""
        named = live.signatures(graph)
        keys = [key for node in nodes for key in (named.get(node, node), node)]
        keys += [k for node in nodes for k in reversed(self.runs) if k.startswith(f"{node}.")]  # a node made it of itself
        found = next((self.runs[key][1] for key in keys if key in self.runs), None)
        if found is None:
            return None
        return found[live.item()] if live.item() in found else [t for run in found.values() for t in run]


def _local(refiner: Any) -> str | None:
    """The name of what is managed by ComfyUI, in a refiner or in what it stands around."""
    while refiner is not None:
        if getattr(refiner, "managed", False):
            return repr(refiner)
        refiner = getattr(refiner, "refiner", None)
    return None


def with_loop(model: Any, loop: Loop) -> Any:
    """A clone of a MODEL that is refined by `loop` wherever it is sampled. Raises ValueError for one that has a loop already."""
    from comfy.patcher_extension import WrappersMP

    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        raise ValueError("this model has a PromptLoop already; give each sampler one of them, from the model without it")
    patched = model.clone()
    patched.add_wrapper_with_key(
        WrappersMP.OUTER_SAMPLE, KEY, lambda execute, *args, **kwargs: Run(loop, execute)(*args, **kwargs)
    )
    return patched


class Run:
    """One sampling with a loop."""

    def __init__(self, loop: Loop, execute: Any) -> None:
        self.loop, self.execute, self.guider = loop, execute, execute.class_obj

    def __call__(
        self, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, denoise_mask: Any = None, callback: Any = None,
        disable_pbar: bool = False, seed: int | None = None, **extra: Any,
    ) -> Any:  # fmt: skip
        from comfy.model_management import InterruptProcessingException, processing_interrupted

        loop, self.extra = self.loop, extra
        self.noise, self.latent_image, self.denoise_mask, self.seed = noise, latent_image, denoise_mask, seed
        self.prompt_id, self.node = live.where()
        self.total, count = len(sigmas) - 1, noise.shape[0]
        stride = 3 if _name(sampler) == "dpm_fast_function" else 1  # of the steps asked for, in one of its own
        self.base = {k: [c.copy() for c in v] for k, v in self.guider.conds.items()}  # with what other wrappers did to it
        self.targets, self.checked = self.find_targets(), False
        self.session = Session(
            [loop.request] * count, loop.refiner, loop.refine_at, strict=loop.strict, cancel=InterruptProcessingException,
            meta=[{"host": "ComfyUI", "seed": seed, "sampler": _name(sampler), "index": k} for k in range(count)],
            asynchronous=not loop.wait, interrupted=processing_interrupted,
            fit=self.fit(),
        )  # fmt: skip
        last = -1

        def on_step(step: int, x0: Any, x: Any, total: int) -> None:
            nonlocal last
            if callback is not None:
                callback(step, x0, x, total)  # ComfyUI's own: the bar, its preview; raises on cancel
            step *= stride
            if last < step and step + 1 < self.total:  # the rest of a last step has nothing left to be refined
                for due in [d for d in self.session.due if last + 1 < d <= step + 1] or [step + 1]:
                    self.turn(due, float(sigmas[step]), lambda: self.pictures(self.decoded(x0)))
                last = step

        try:
            self.session.start(self.total)
            live.send("begin", requests=self.session.prompts, num_steps=self.total, due=list(self.session.due), **self.ids())
            if loop.source and bool(latent_image.any()) and bool(noise.any()):  # no noise: it goes on with another's run
                self.show_source(latent_image)
            self.turn(0, None, None)
            result = self.execute(noise, latent_image, sampler, sigmas, denoise_mask, on_step, disable_pbar, seed, **extra)
            self.finish(result, float(sigmas[-1]))
            return result
        except BaseException:
            self.session.give_up("not applied: the run was stopped")
            raise
        finally:
            trajectories = self.session.trajectories
            loop.add(trajectories)
            failures = sum(len(t.failures) for t in trajectories)
            live.send("end", prompts=self.session.prompts, failures=failures, **self.ids())

    def fit(self) -> Callable[[str], str] | None:
        """Of the embedded text encoder; ComfyUI's own take any length."""
        cut: Any = getattr(getattr(self.loop.clip, "tokenizer", None), "promptloop_fit", None)

        def fitting(text: str) -> str:
            try:
                return cut(text)
            except Exception:  # nothing that could be encoded: encoding it says so, and costs the turn only
                return text

        return None if cut is None else fitting

    def ids(self) -> dict[str, Any]:
        return {"prompt_id": self.prompt_id, "node": self.node, "owner": self.loop.owner or self.node}

    # --- turns ----------------------------------------------------------------------------------------------------------

    def turn(self, step: int, sigma: float | None, preview: Callable[[], list[Any]] | None) -> None:
        """Takes the turn that is due before `step`, if one is."""
        if not self.session.wants(step):
            return
        before = [len(t.turns) for t in self.session.trajectories]
        prompts = self.observe(step, sigma, preview)
        if prompts is not None:
            clock = time.perf_counter()
            try:
                note = self.swap(prompts, running=step > 0)
                self.session.applied(time.perf_counter() - clock)
                for t, had in zip(self.session.trajectories, before, strict=True):
                    t.turns[had:] = [replace(turn, notes=(*turn.notes, *note)) for turn in t.turns[had:]]
            except Exception as e:
                if isinstance(e, self.session.cancel):
                    raise
                self.session.rejected(e)
                prompts = None
        if prompts is None and step > 0:
            self.bring_back(self.base)
        self.report(before, step)

    def observe(self, step: int, sigma: float | None, preview: Callable[[], list[Any]] | None) -> list[str] | None:
        """Asks the session."""
        from comfy.model_management import throw_exception_if_processing_interrupted

        self.say(f"PromptLoop: looking at step {step} of {self.total} ...")
        with self.own_randomness():
            prompts = self.session.observe(step, sigma, preview)
        throw_exception_if_processing_interrupted()
        return prompts

    def own_randomness(self) -> Any:
        """A refiner that draws from the global random state must not shift the sampler's noise."""
        import torch

        device = self.guider.model_patcher.load_device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def finish(self, result: Any, sigma: float) -> None:
        """The turn "end", if there is one: it looks at the finished picture."""
        taken = {turn.step for turn in self.session.trajectories[0].turns} | {self.total}
        if self.loop.wait and (missed := sorted(set(self.session.due) - taken)):  # the sampler made fewer steps than asked for
            for trajectory in self.session.trajectories:
                trajectory.meta["left out"] = list(missed)
        before = [len(t.turns) for t in self.session.trajectories]
        with self.own_randomness():
            self.session.finish(None, sigma, lambda: self.pictures(self.loop.vae.decode(self.unpacked(result))))
        for trajectory, had in zip(self.session.trajectories, before, strict=True):
            if len(trajectory.turns) > had:
                trajectory.image = trajectory.turns[-1].image
        self.report(before, self.total)

    def report(self, before: Sequence[int], step: int) -> None:
        for sample, (trajectory, had) in enumerate(zip(self.session.trajectories, before, strict=True)):
            for turn in trajectory.turns[had:]:
                image = None if turn.image is None else data_uri(turn.image)
                live.send("turn", sample=sample, turn=live.turn_data(turn, image), **self.ids())
                if sample == 0 and turn.image is not None:
                    live.show(turn.image, step, self.total, self.node)
                if sample == 0:
                    what = f"kept, since it failed: {turn.error}" if turn.error else turn.after
                    self.say(f"PromptLoop, step {turn.step} of {self.total}: {what}")

    def say(self, text: str) -> None:
        """Under a sampler that is not ours; ours has the timeline."""
        if self.loop.owner != self.node:
            live.say(text, self.node)

    # --- pictures -------------------------------------------------------------------------------------------------------

    def decoded(self, x0: Any) -> Any:
        """The x0-estimate, in the model's own space, as pictures [N, H, W, C] in 0..1. May push the model off the GPU."""
        import torch

        x0 = self.unpacked(self.guider.inner_model.process_latent_out(x0.to(torch.float32)))
        if self.loop.preview == "vae":
            return self.loop.vae.decode(x0)
        from latent_preview import Latent2RGBPreviewer

        form = self.guider.inner_model.latent_format
        if form.latent_rgb_factors is None:
            raise ValueError("this model has no fast preview; set preview to vae")
        names = ("latent_rgb_factors", "latent_rgb_factors_bias", "latent_rgb_factors_reshape")
        previewer = Latent2RGBPreviewer(*(getattr(form, n) for n in names if hasattr(form, n)))
        rough = form.process_in(x0)
        return to_image([previewer.decode_latent_to_preview(rough[k : k + 1]) for k in range(rough.shape[0])])

    def show_source(self, latent: Any) -> None:
        """To the refiner. A source that cannot be decoded costs the refiner this picture, not the artist the run."""
        try:
            self.session.sources = self.pictures(self.loop.vae.decode(self.unpacked(latent)))
        except Exception as e:
            if self.loop.strict or isinstance(e, self.session.cancel):
                raise
            logger.warning("the picture that the run starts from cannot be shown to the refiner: %s: %s", type(e).__name__, e)

    def unpacked(self, latent: Any) -> Any:
        """The picture's part of a latent that holds sound too."""
        import comfy.utils

        shapes = self.extra.get("latent_shapes")
        return comfy.utils.unpack_latents(latent, shapes)[0] if shapes is not None and len(shapes) > 1 else latent

    def pictures(self, decoded: Any) -> list[Any]:
        return samples_of(decoded, self.noise.shape[0])

    # --- the swap -------------------------------------------------------------------------------------------------------

    def find_targets(self) -> list[int]:
        """Which positive entries may be rewritten: those that are marked; else those that were made of the request; else the only one.

        Raises ValueError when that leaves a choice, or when there is nothing positive.
        """
        positive = self.base.get("positive")
        if not positive:
            raise ValueError(f"{type(self.guider).__name__} has no positive conditioning, so there is no prompt to refine")
        if marked := [k for k, cond in enumerate(positive) if cond.get(TARGET)]:
            return marked
        if len(positive) == 1:
            return [0]
        made = [cond["cross_attn"] for cond in self.encode(self.loop.request) if "cross_attn" in cond]
        same = [k for k, cond in enumerate(positive) if any(equal(cond.get("cross_attn"), m) for m in made)]
        if not same:
            raise ValueError(
                f"the positive conditioning has {len(positive)} entries, and none was made of the prompt {self.loop.request!r}; "
                "mark the one that may be rewritten with a Refinement Target node, or use the same words there and here"
            )
        return same

    def encode(self, text: str) -> list[Cond]:
        import comfy.sampler_helpers

        return comfy.sampler_helpers.convert_cond(self.loop.clip.encode_from_tokens_scheduled(self.loop.clip.tokenize(text)))

    def unlike(self) -> list[str]:
        """What a rewrite takes away beside the words that it was told of, as a note."""
        made = [cond.get("cross_attn") for cond in self.encode(self.loop.request)]
        for text in (self.base["positive"][k].get("cross_attn") for k in self.targets):
            if text is not None and not any(equal(text[:1], m) for m in made):
                return [
                    "the positive conditioning was not made of this prompt by this CLIP alone (other words, another text node, a "
                    "node that mixes texts); the rewrite takes the place of all its text"
                ]
        return []

    def swap(self, prompts: Sequence[str], running: bool) -> list[str]:
        """Puts the prompts, one for each sample, in the place of the text. running: whether sampling has begun. Returns notes."""
        import comfy.samplers

        guider = self.guider
        with _kept([h.hook_keyframe for cs in guider.conds.values() for c in cs if "hooks" in c for h in c["hooks"].hooks]):
            notes, self.checked = [] if self.checked else self.unlike(), True
            conds = {k: [c.copy() for c in v] for k, v in self.base.items()}
            conds["positive"] = rewritten(
                conds["positive"], self.targets, prompts, self.loop.request, self.encode, self.noise.shape
            )
            comfy.samplers.preprocess_conds_hooks(conds)
            comfy.samplers.filter_registered_hooks_on_conds(conds, guider.model_options)
            if not running:
                guider.conds = conds
                return notes
            self.bring_back(conds)
            device = guider.model_patcher.load_device
            latent_image = self.latent_image.to(device)
            if bool(latent_image.any()):  # as ComfyUI does: an empty latent is not shifted
                latent_image = guider.inner_model.process_latent_in(latent_image)
            known = inspect.signature(comfy.samplers.process_conds).parameters
            guider.conds = comfy.samplers.process_conds(
                guider.inner_model, self.noise.to(device), conds, device, latent_image, self.denoise_mask, self.seed,
                **{k: v for k, v in self.extra.items() if k in known},
            )  # fmt: skip
        return notes

    def bring_back(self, conds: dict[str, list[Cond]]) -> None:
        """Decoding, encoding and the refiner may have pushed the diffusion model and its LoRA out; costs nothing if they have not."""
        import comfy.sampler_helpers

        guider = self.guider
        guider.inner_model, _, guider.loaded_models = comfy.sampler_helpers.prepare_sampling(
            guider.model_patcher, self.noise.shape, conds, guider.model_options
        )


@contextmanager
def _kept(frames: Sequence[Any]) -> Iterator[None]:
    """Keyframes of hooks stay where they are: encoding and processing conditionings begin them anew."""
    where = [vars(frame).copy() for frame in frames]
    try:
        yield
    finally:
        for frame, state in zip(frames, where, strict=True):
            vars(frame).update(state)


def _name(sampler: Any) -> str:
    function = getattr(sampler, "sampler_function", None)
    return getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")
