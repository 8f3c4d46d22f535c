"""The loop's own nodes: a MODEL or a GUIDER with a loop in it, for any sampler, and a sampler with all outputs."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from promptloop_pipeline.schedule import RefinementSchedule

from .types import HISTORY, REFINER, RUN, problem

_AT = "20%, 50%, 80%"
_AT_HELP = (
    'When to look: "start" (rewrites before the first step, nothing to see yet), "6" (a step), "20%, 50%" (shares of the run), '
    '"every 4", "end" (looks at the finished picture), or several of these with commas.'
)


def _prompt() -> Any:
    return io.String.Input(
        "prompt",
        multiline=True,
        dynamic_prompts=True,
        tooltip="What you want to see, in the same words as in the positive prompt. The refiner compares the preview with it.",
    )


def _refine_at() -> Any:
    return io.String.Input("refine_at", default=_AT, tooltip=_AT_HELP)


def _loop_inputs() -> list[Any]:
    return [
        REFINER.Input("refiner", tooltip="Who looks at the preview and rewrites the prompt."),
        io.Clip.Input("clip", tooltip="Encodes the rewritten prompt: the one that encoded the positive prompt."),
        io.Vae.Input("vae", tooltip="Decodes the preview that the refiner looks at."),
    ]


def _options() -> list[Any]:
    return [
        io.Combo.Input(
            "preview",
            options=["vae", "fast"],
            default="vae",
            optional=True,
            tooltip="What the refiner sees: the preview decoded by the VAE, or rough colours that cost nothing.",
        ),
        io.Combo.Input(
            "on_error",
            options=["keep the prompt", "stop"],
            default="keep the prompt",
            optional=True,
            tooltip="When the refiner fails: keep the prompt and finish the picture, or stop with the error.",
        ),
        io.Boolean.Input(
            "wait",
            default=True,
            optional=True,
            tooltip="Wait for the refiner. Off: sampling goes on while a refiner at an endpoint thinks; its answer acts when it comes.",
        ),
        io.Boolean.Input(
            "show_source",
            default=False,
            optional=True,
            tooltip="In image-to-image runs, also show the refiner the picture that the run starts from.",
        ),
    ]


def _loop(
    cls: Any, refiner: Any, clip: Any, vae: Any, prompt: str, refine_at: str, preview: str = "vae",
    on_error: str = "keep the prompt", wait: bool = True, show_source: bool = False,
) -> Any:  # fmt: skip
    from .host import Loop

    strict = on_error == "stop"
    return Loop(refiner, clip, vae, prompt, refine_at, preview, strict, wait, show_source, owner=str(cls.hidden.unique_id))


def readable(refine_at: str | None, steps: int | None = None) -> bool | str:
    """For validate_inputs: True, or what is wrong with a schedule, also for a run of so many steps."""

    def check() -> None:
        schedule = RefinementSchedule.parse(str(refine_at))
        if steps is not None:
            schedule.steps(steps)

    return problem(refine_at, check)


class PromptLoop(io.ComfyNode):
    """MODEL -> MODEL, for any sampler."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="PromptLoop",
            display_name="PromptLoop (any sampler)",
            category="PromptLoop",
            description="Puts the loop into a model: whatever samples it shows its preview to the refiner, who rewrites the prompt.",
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, with its LoRA and other patches."),
                *_loop_inputs(),
                _prompt(),
                _refine_at(),
                *_options(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler."),
                RUN.Output(display_name="run", tooltip="For PromptLoop Result, which tells what happened."),
            ],
            not_idempotent=True,  # two of them alike are two: each draws its own timeline
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, refine_at: str | None = None) -> bool | str:
        return readable(refine_at)

    @classmethod
    def execute(cls, model: Any, **given: Any) -> Any:
        from .host import with_loop

        loop = _loop(cls, **given)
        return io.NodeOutput(with_loop(model, loop), loop)


class PromptLoopGuider(io.ComfyNode):
    """GUIDER -> GUIDER, for custom sampling."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="PromptLoopGuider",
            display_name="PromptLoop Guider",
            category="PromptLoop",
            description="Puts the loop into any guider (CFG, Basic, DualCFG, of other packs): its positive prompt is refined.",
            inputs=[
                io.Guider.Input("guider", tooltip="Any guider with a positive conditioning."),
                *_loop_inputs(),
                _prompt(),
                _refine_at(),
                *_options(),
            ],
            outputs=[
                io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced."),
                RUN.Output(display_name="run", tooltip="For PromptLoop Result, which tells what happened."),
            ],
            not_idempotent=True,  # two of them alike are two: each draws its own timeline
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, refine_at: str | None = None) -> bool | str:
        return readable(refine_at)

    @classmethod
    def execute(cls, guider: Any, **given: Any) -> Any:
        import copy

        from .host import with_loop

        loop, guided = _loop(cls, **given), copy.copy(guider)
        guided.original_conds = dict(guider.original_conds)
        guided.model_patcher = with_loop(guider.model_patcher, loop)
        guided.model_options = guided.model_patcher.model_options
        return io.NodeOutput(guided, loop)


class PromptLoopSampler(io.ComfyNode):
    """KSampler with the loop, and everything that comes of it as outputs."""

    @classmethod
    def define_schema(cls) -> Any:
        import comfy.samplers

        return io.Schema(
            node_id="PromptLoopSampler",
            display_name="PromptLoop Sampler",
            category="PromptLoop",
            description="KSampler with the loop in it. Draws the timeline while it works: what was seen, what changed, and why.",
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, with its LoRA and other patches."),
                *_loop_inputs(),
                io.Conditioning.Input("negative", tooltip="What you do not want to see. It is never rewritten."),
                io.Latent.Input("latent_image", tooltip="What to start from: an empty latent, or an encoded picture."),
                _prompt(),
                _refine_at(),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip="Of the noise at the start."
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Number of denoising steps."),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance scale."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="Any of ComfyUI's."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="Noise levels of the steps."),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Below 1: how much of the picture to change."
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The positive prompt with what hangs on it (ControlNet, masks, areas). Left open: the prompt as it is.",
                ),
                *_options(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The finished latent."),
                io.Latent.Output(display_name="denoised", tooltip="The last x0-estimate."),
                io.Image.Output(display_name="timeline", tooltip="All previews that were looked at, in order."),
                io.String.Output(display_name="final_prompt", tooltip="The prompt at the end; one line for each picture."),
                HISTORY.Output(display_name="history", tooltip="The whole record, for the history nodes."),
            ],
            not_idempotent=True,  # two of them alike are two: each draws its own timeline
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, refine_at: str | None = None) -> bool | str:
        return readable(refine_at)

    @classmethod
    def execute(
        cls, model: Any, negative: Any, latent_image: Any, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str,
        denoise: float, positive: Any = None, **given: Any,
    ) -> Any:  # fmt: skip
        from .host import with_loop

        loop = _loop(cls, **given)
        if (wrong := readable(loop.refine_at, steps)) is not True:
            raise ValueError(wrong)
        patched = with_loop(model, loop)
        if positive is None:
            positive = loop.clip.encode_from_tokens_scheduled(loop.clip.tokenize(loop.request))
        latent, denoised = _sampled(
            patched, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise
        )
        made = [t for _, runs in loop.runs.values() for run in runs.values() for t in run]
        return _output(cls, latent, made or _untouched(loop, latent), denoised)


def _sampled(
    model: Any, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, positive: Any, negative: Any, latent: Any,
    denoise: float,
) -> tuple[Any, Any]:  # fmt: skip
    """As ComfyUI's KSampler does; the last x0-estimate beside it."""
    import comfy.sample
    import comfy.utils
    import latent_preview

    start = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
    last: dict[str, Any] = {}
    samples = comfy.sample.sample(
        model, noise, steps, cfg, sampler_name, scheduler, positive, negative, start, denoise=denoise,
        noise_mask=latent.get("noise_mask"), callback=latent_preview.prepare_callback(model, steps, last),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed,
    )  # fmt: skip
    if "x0" not in last:
        return latent | {"samples": samples}, latent | {"samples": samples}
    denoised = model.model.process_latent_out(last["x0"].float().cpu())
    if getattr(samples, "is_nested", False):  # video with sound
        from comfy.nested_tensor import NestedTensor

        denoised = NestedTensor(comfy.utils.unpack_latents(denoised, [part.shape for part in samples.unbind()]))
    return latent | {"samples": samples}, latent | {"samples": denoised.to(samples.device)}


class PromptLoopResult(io.ComfyNode):
    """What happened in a sampler that is not ours."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="PromptLoopResult",
            display_name="PromptLoop Result",
            category="PromptLoop",
            description="Between a sampler and the VAE: passes the latent through, and tells what the loop did in that sampler.",
            inputs=[
                RUN.Input("run", tooltip="Of the PromptLoop node, or PromptLoop Guider, that the sampler uses."),
                io.Latent.Input("latent", tooltip="What the sampler made."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The same latent."),
                io.Image.Output(display_name="timeline", tooltip="All previews that were looked at, in order."),
                io.String.Output(display_name="final_prompt", tooltip="The prompt at the end; one line for each picture."),
                HISTORY.Output(display_name="history", tooltip="The whole record, for the history nodes."),
            ],
            not_idempotent=True,  # two of them alike are two: each draws its own timeline
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.dynprompt],
        )

    @classmethod
    def execute(cls, run: Any, latent: Any) -> Any:
        from . import live

        graph, now = cls.hidden.prompt or {}, cls.hidden.dynprompt
        whole = {node: now.get_node(node) for node in now.all_node_ids()}  # with what nodes have made of themselves in running
        made = run.made(graph, live.upstream(whole, str(cls.hidden.unique_id), "latent"))
        if made is None:
            raise ValueError(
                "no sampler before this node has used this run; connect run of the PromptLoop node whose model, or guider, the "
                "sampler uses, and the latent of that sampler"
            )
        return _output(cls, latent, made or _untouched(run, latent))


def _untouched(loop: Any, latent: Any) -> list[Any]:
    """Where there was nothing to sample (denoise 0)."""
    from promptloop_pipeline import Trajectory

    return [Trajectory(loop.request) for _ in latent["samples"]]


def _output(cls: Any, latent: Any, trajectories: list[Any], *denoised: Any) -> Any:
    from . import live
    from .pictures import timeline

    final = "\n".join(dict.fromkeys(t.prompt for t in trajectories))
    shown = live.ui_of(trajectories, cls) | {"text": (final,)}
    return io.NodeOutput(latent, *denoised, timeline(trajectories), final, trajectories, ui=shown)


NODES = [PromptLoop, PromptLoopResult, PromptLoopSampler, PromptLoopGuider]
