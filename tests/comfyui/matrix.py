"""Samplers x families, run inside ComfyUI: `matrix.py BASE identity|swap|survivors FAMILY`. Prints one row for each case.

`diff` is the largest difference between the latents of two runs, `size` the largest value in them, `swaps` how often the
conditioning was put in anew, `effect` how far the refined run is from the untouched one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import checkpoints
import inside
import torch
from inside import KEPT, OBJECTS, Graph, Runner, Swaps

A, B = "a red ball on a green lawn", "an old lighthouse in a winter storm, oil painting"
STEPS, AT = 6, 2  # the swap acts from step 2 on
SHAPES = {"sd15": (1, 4, 8, 8), "sd3": (1, 16, 8, 8), "flux": (1, 16, 8, 8), "wan": (1, 16, 2, 8, 8)}
Conds = Callable[[Graph, Any, str], Any]


def said(function: Callable[[Any], Any]) -> Any:
    from promptloop_pipeline import FunctionRefiner

    return FunctionRefiner(function)


def same() -> Any:
    """Another text of the same tokens: the swap happens, and must change nothing. It looks, so that the VAE has its turn too."""
    return said(lambda view: view.prompt + " ")


class World:
    """One family's models in a workflow."""

    def __init__(self, name: str) -> None:
        self.name, self.run = name, Runner()
        self.file = name if name in ("sd15", "sd3") else "sd15"
        if self.file != name:
            OBJECTS[name], OBJECTS[f"{name} vae"] = checkpoints.family(name)
        OBJECTS["latent"] = {"samples": torch.zeros(SHAPES[name])}

    def parts(self, g: Graph, lora: bool = False, hooked: bool = False) -> tuple[Any, Any, Any]:
        """(model, clip, vae); hooked: a LoRA on the text encoder that loses strength in the midst of the run."""
        loaded = g("CheckpointLoaderSimple", ckpt_name=f"tiny_{self.file}.ckpt")
        model, clip, vae = loaded[0], loaded[1], loaded[2]
        if self.file != self.name:
            model, vae = g("ProbeMODEL", name=self.name)[0], g("ProbeVAE", name=f"{self.name} vae")[0]
        if lora:
            model = g("LoraLoaderModelOnly", model=model, lora_name=f"tiny_{self.name}.safetensors", strength_model=1.0)[0]
        if hooked:
            hooks = fading(g, self.name, strength_clip=1.0)
            clip = g("SetClipHooks", clip=clip, apply_to_conds=True, schedule_clip=True, hooks=hooks)[0]
        return model, clip, vae

    def sample(
        self, refiner: Any = None, at: str = "1, 3, 5", *, text: str = A, sampler: str = "euler", scheduler: str = "simple",
        conds: Conds | None = None, lora: bool = False, hooked: bool = False, cfg: float = 4.0,
        latent: str = "latent", door: str = "PromptLoop", guider: str | None = None, seed: int = 3, preview: str = "vae",
        denoise: float = 1.0, vae: str | None = None, more: dict[str, Any] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """One run: untouched where there is no refiner. KEPT["history"] is then what the loop tells of it."""
        g = Graph()
        model, clip, decoder = self.parts(g, lora, hooked)
        if vae is not None:
            decoder = g("ProbeVAE", name=vae)[0]
        encode = conds or (lambda g, clip, text: g("CLIPTextEncode", text=text, clip=clip)[0])
        positive, negative = encode(g, clip, text), g("CLIPTextEncode", text="blurry", clip=clip)[0]
        start = g("ProbeLATENT", name=latent)[0]
        loop: dict[str, Any] = {}
        if refiner is not None:
            name = f"refiner {len(OBJECTS)}"  # a refiner by the same name would be taken from the cache
            OBJECTS[name] = refiner
            probe = g("ProbePROMPTLOOP_REFINER", name=name)
            loop = {"refiner": probe[0], "clip": clip, "vae": decoder, "prompt": A, "refine_at": at, "preview": preview}
            loop |= more or {}
        ksampler = {
            "seed": seed, "steps": STEPS, "cfg": cfg, "sampler_name": sampler, "scheduler": scheduler, "denoise": denoise,
            "negative": negative, "latent_image": start,
        }  # fmt: skip
        result: Any = None
        if loop and door == "PromptLoopSampler":
            made = g("PromptLoopSampler", model=model, positive=positive, **loop, **ksampler)
            output, result = made[0], made[4]
        elif guider is None:
            if loop:
                made = g("PromptLoop", model=model, **loop)
                model = made[0]
            output = g("KSampler", model=model, positive=positive, **ksampler)[0]
        else:
            if loop and door == "PromptLoop":
                made = g("PromptLoop", model=model, **loop)
                model = made[0]
            guide = self.guider(g, guider, model, clip, positive, negative, cfg)
            if loop and door == "PromptLoopGuider":
                made = g("PromptLoopGuider", guider=guide, **loop)
                guide = made[0]
            sigmas = g("BasicScheduler", model=model, scheduler=scheduler, steps=STEPS, denoise=denoise)[0]
            noise, method = g("RandomNoise", noise_seed=seed)[0], g("KSamplerSelect", sampler_name=sampler)[0]
            output = g("SamplerCustomAdvanced", noise=noise, guider=guide, sampler=method, sigmas=sigmas, latent_image=start)[0]
        if loop:
            if result is None:
                told = g("PromptLoopResult", run=made[1], latent=output)
                output, result = told[0], told[3]
            g.keep("history", result)
        g.keep("latent", output)
        self.run(g)
        return KEPT["latent"]

    @staticmethod
    def guider(g: Graph, kind: str, model: Any, clip: Any, positive: Any, negative: Any, cfg: float) -> Any:
        if kind == "BasicGuider":
            return g("BasicGuider", model=model, conditioning=positive)[0]
        if kind == "CFGGuider":
            return g("CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg)[0]
        empty = g("CLIPTextEncode", text="", clip=clip)[0]
        if kind == "PerpNegGuider":
            more = {"empty_conditioning": empty, "neg_scale": 0.7}
            return g(kind, model=model, positive=positive, negative=negative, cfg=cfg, **more)[0]
        more = {"cfg_cond2_negative": 3.0, "style": "regular"}
        return g("DualCFGGuider", model=model, cond1=positive, cond2=empty, negative=negative, cfg_conds=cfg, **more)[0]

    def switched(self, step: int, sampler: str, scheduler: str, conds: Conds | None = None) -> Conds:
        """The reference that knows nothing of us: ComfyUI's time ranges, A down to the noise level of step - 1, B below it. In the
        callback of step - 1 the first model call of that step has been made, all later calls come at lower levels."""
        encode = conds or (lambda g, clip, text: g("CLIPTextEncode", text=text, clip=clip)[0])
        where = self.share(step, sampler, scheduler)

        def both(g: Graph, clip: Any, text: str) -> Any:
            first = g("ConditioningSetTimestepRange", conditioning=encode(g, clip, A), start=0.0, end=where)[0]
            then = g("ConditioningSetTimestepRange", conditioning=encode(g, clip, B), start=where, end=1.0)[0]
            return g("ConditioningCombine", conditioning_1=first, conditioning_2=then)[0]

        return both

    def share(self, step: int, sampler: str, scheduler: str) -> float:
        """The share of the run at which the noise is just below that of step - 1, by bisection."""
        import comfy.samplers

        model = self.loaded()
        sigmas = comfy.samplers.KSampler(model, STEPS, torch.device("cpu"), sampler, scheduler, 1.0, {}).sigmas
        sampling = model.get_model_object("model_sampling")
        high, low = float(sigmas[step - 1]), float(sigmas[step])
        left, right = 0.0, 1.0
        for _ in range(60):
            middle = (left + right) / 2
            left, right = (middle, right) if float(sampling.percent_to_sigma(middle)) >= high * 0.999 else (left, middle)
        found = float(sampling.percent_to_sigma(right))
        assert low < found < high, f"{sampler}: no share between the noise levels {low} and {high}"
        return right

    def loaded(self) -> Any:
        import nodes

        if self.file != self.name:
            return OBJECTS[self.name]
        if not hasattr(self, "_model"):
            self._model = nodes.CheckpointLoaderSimple().load_checkpoint(f"tiny_{self.file}.ckpt")[0]
        return self._model


def row(refined: torch.Tensor, expected: torch.Tensor, untouched: torch.Tensor, swaps: int) -> dict[str, Any]:
    print(end=".", file=sys.stderr, flush=True)
    turns = [turn for t in KEPT["history"] for turn in t.turns]
    return {
        "diff": float((refined - expected).abs().max()),
        "size": float(expected.abs().max()),
        "effect": float((refined - untouched).abs().max()),
        "finite": bool(torch.isfinite(refined).all()),
        "swaps": swaps,
        "turns": len(turns),
        "changed": sum(turn.changed for turn in turns),
        "looked": sum(turn.image is not None for turn in turns),
        "errors": [turn.error for turn in turns if turn.error],
    }


UNLIKE = ("heunpp2", "sa_solver_pece", "dpm_fast", "dpm_adaptive")
"""Time ranges cannot follow these samplers: they look beyond the next step, twice at one noise level, or have steps of their own."""


def samplers(family: str) -> list[str]:
    """All of ComfyUI's for the cheap families; SD1.5's UNet is five times as dear."""
    import comfy.samplers

    few = (
        "euler", "euler_ancestral", "heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde",
        "ddim", "uni_pc", "lcm", "lms", "euler_cfg_pp",
    )  # fmt: skip
    return list(few) if family == "sd15" else list(comfy.samplers.SAMPLER_NAMES)


def identity(world: World) -> dict[str, Any]:
    """Text of the same tokens at several steps: bit-identical to the untouched run, for every sampler, guider and door."""
    swaps, rows = Swaps(), {}
    for sampler in samplers(world.name):
        untouched = world.sample(sampler=sampler)
        swaps.taken()
        refined = world.sample(same(), sampler=sampler)
        rows[sampler] = row(refined, untouched, untouched, swaps.taken())
    for name, settings in {
        "sampler node": {"door": "PromptLoopSampler"},
        "start and end": {"at": "start, 2, end"},
        "cfg 1": {"cfg": 1.0},
        "fast preview": {"preview": "fast"},
        "CFGGuider, guider node": {"guider": "CFGGuider", "door": "PromptLoopGuider"},
        "BasicGuider": {"guider": "BasicGuider"},
        "BasicGuider, guider node": {"guider": "BasicGuider", "door": "PromptLoopGuider"},
        "DualCFGGuider": {"guider": "DualCFGGuider"},
        "DualCFGGuider, guider node": {"guider": "DualCFGGuider", "door": "PromptLoopGuider"},
        "PerpNegGuider": {"guider": "PerpNegGuider"},
        "PerpNegGuider, guider node": {"guider": "PerpNegGuider", "door": "PromptLoopGuider"},
    }.items():
        plain = {k: v for k, v in settings.items() if k in ("cfg", "guider")}
        untouched = world.sample(**plain)
        swaps.taken()
        refined = world.sample(same(), **settings)
        rows[name] = row(refined, untouched, untouched, swaps.taken())
    return rows


def swap(world: World) -> dict[str, Any]:
    """Another text from step AT on: what ComfyUI's own time ranges give, for every sampler; and what two stages give, for euler."""
    swaps, rows = Swaps(), {}
    for sampler in [s for s in samplers(world.name) if s not in UNLIKE]:
        untouched = world.sample(sampler=sampler)
        expected = world.sample(sampler=sampler, conds=world.switched(AT, sampler, "simple"))
        swaps.taken()
        refined = world.sample(said(lambda view: B), str(AT), sampler=sampler)
        rows[sampler] = row(refined, expected, untouched, swaps.taken())
    untouched, expected = world.sample(), two_stages(world)
    for name, settings in {
        "two stages": {},
        "two stages, sampler node": {"door": "PromptLoopSampler"},
        "two stages, guider node": {"door": "PromptLoopGuider", "guider": "CFGGuider"},
    }.items():
        swaps.taken()
        refined = world.sample(said(lambda view: B), str(AT), **settings)
        rows[name] = row(refined, expected, untouched, swaps.taken())
    swaps.taken()
    refined = world.sample(said(lambda view: B), "start")
    rows["start"] = row(refined, world.sample(text=B), untouched, 1)
    return rows


def fading(g: Graph, family: str, strength_clip: float = 0.0) -> Any:
    """A hook LoRA of full strength up to 60% of the run, of a fifth of it from there on."""
    name = f"tiny_{family}.safetensors"
    hooks = g("CreateHookLora", lora_name=name, strength_model=1.0, strength_clip=strength_clip)[0]
    frames = g("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)[0]
    frames = g("CreateHookKeyframe", strength_mult=0.2, start_percent=0.6, prev_hook_kf=frames)[0]
    return g("SetHookKeyframes", hooks=hooks, hook_kf=frames)[0]


def two_stages(world: World, conds: Conds | None = None, lora: bool = False, hooked: bool = False) -> torch.Tensor:
    """Steps 0..AT with A, the rest with B, by ComfyUI's own two samplers in a row."""
    g = Graph()
    model, clip, _ = world.parts(g, lora, hooked)
    encode = conds or (lambda g, clip, text: g("CLIPTextEncode", text=text, clip=clip)[0])
    latent, noise = g("ProbeLATENT", name="latent")[0], "enable"
    negative = g("CLIPTextEncode", text="blurry", clip=clip)[0]
    for text, first, last, left in ((A, 0, AT, "enable"), (B, AT, 10000, "disable")):
        positive = encode(g, clip, text)
        latent = g(
            "KSamplerAdvanced", model=model, add_noise=noise, noise_seed=3, steps=STEPS, cfg=4.0, sampler_name="euler",
            scheduler="simple", positive=positive, negative=negative, latent_image=latent, start_at_step=first, end_at_step=last,
            return_with_leftover_noise=left,
        )[0]  # fmt: skip
        noise = "disable"
    g.keep("latent", latent)
    world.run(g)
    return KEPT["latent"]


STAGED = ("area, target", "LoRA and area", "time range, target", "text encoder's hook LoRA")
"""What time ranges cannot be a reference for: ranges themselves, and areas, which ComfyUI pairs once for all of them."""


def survivors(world: World) -> dict[str, Any]:
    """What hangs on the conditioning, the model or the latent goes on acting after a swap: as ComfyUI's time ranges have it."""
    draw = torch.Generator().manual_seed(1)
    picture = torch.rand(1, 64, 64, 3, generator=draw)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    OBJECTS["picture"], OBJECTS["mask"] = picture, mask
    shape = SHAPES[world.name]
    filled = torch.randn(shape, generator=draw)
    OBJECTS["inpaint"] = {"samples": filled, "noise_mask": mask[:, None, ::8, ::8]}
    OBJECTS["filled"] = {"samples": filled}
    OBJECTS["batch"] = {"samples": torch.zeros(2, *shape[1:])}
    swaps, rows = Swaps(), {}
    for name, settings in cases(world.name).items():
        untouched = world.sample(**settings)
        without = world.sample(**{k: v for k, v in settings.items() if k not in ("conds", "lora", "hooked")})
        swaps.taken()
        again = world.sample(same(), "1, 2, 3, 4, 5", **settings)
        first = row(again, untouched, without, swaps.taken())
        if name in STAGED:
            expected = two_stages(world, **settings)
        else:
            expected = world.sample(**settings | {"conds": world.switched(AT, "euler", "simple", settings.get("conds"))})
        swaps.taken()
        refined = world.sample(said(lambda view: B), str(AT), **settings)
        rows[name] = {"identity": first, "swap": row(refined, expected, untouched, swaps.taken())}
    return rows | {"batch, one changed": {"swap": one_of_two(world)}}


def one_of_two(world: World) -> dict[str, Any]:
    """Sample 0 gets another text, sample 1 none: 1 is as in the untouched batch, 0 as where both are changed."""
    untouched = world.sample(latent="batch")
    both = world.sample(said(lambda view: B), str(AT), latent="batch")
    first = iter([B, None])
    refined = world.sample(said(lambda view: next(first)), str(AT), latent="batch")
    found = row(refined[:1], both[:1], untouched[:1], 1)
    return found | {"other": float((refined[1] - untouched[1]).abs().max()), "histories": [t.prompt for t in KEPT["history"]]}


def cases(family: str) -> dict[str, dict[str, Any]]:
    def text(g: Graph, clip: Any, words: str) -> Any:
        return g("CLIPTextEncode", text=words, clip=clip)[0]

    def strength(g: Graph, clip: Any, words: str) -> Any:
        return g("ConditioningSetAreaStrength", conditioning=text(g, clip, words), strength=0.6)[0]

    def area(g: Graph, clip: Any, words: str) -> Any:
        target = g("PromptLoopTarget", conditioning=text(g, clip, words))[0]
        left = g("ConditioningSetAreaPercentage", conditioning=target, width=0.5, height=1.0, x=0.0, y=0.0, strength=1.0)[0]
        rest = text(g, clip, "a forest")
        return g("ConditioningCombine", conditioning_1=left, conditioning_2=rest)[0]

    def masked(g: Graph, clip: Any, words: str) -> Any:
        half = g("ProbeMASK", name="mask")[0]
        one = g("ConditioningSetMask", conditioning=text(g, clip, words), mask=half, strength=0.8, set_cond_area="default")[0]
        return g("ConditioningCombine", conditioning_1=one, conditioning_2=text(g, clip, "a forest"))[0]

    def hook(g: Graph, clip: Any, words: str) -> Any:
        hooks = g("CreateHookLora", lora_name=f"tiny_{family}.safetensors", strength_model=1.0, strength_clip=0.0)[0]
        return g("PairConditioningSetProperties", positive_NEW=text(g, clip, words), negative_NEW=text(g, clip, "x"),
                 strength=1.0, set_cond_area="default", hooks=hooks)[0]  # fmt: skip

    def keyframes(g: Graph, clip: Any, words: str) -> Any:
        return g("PairConditioningSetProperties", positive_NEW=text(g, clip, words), negative_NEW=text(g, clip, "x"),
                 strength=1.0, set_cond_area="default", hooks=fading(g, family))[0]  # fmt: skip

    def ranged(g: Graph, clip: Any, words: str) -> Any:
        target = g("PromptLoopTarget", conditioning=text(g, clip, words))[0]
        early = g("ConditioningSetTimestepRange", conditioning=target, start=0.0, end=0.7)[0]
        late = g("ConditioningSetTimestepRange", conditioning=text(g, clip, "a forest"), start=0.7, end=1.0)[0]
        return g("ConditioningCombine", conditioning_1=early, conditioning_2=late)[0]

    def control(g: Graph, clip: Any, words: str) -> Any:
        net, picture = g("ControlNetLoader", control_net_name="tiny_sd15.safetensors")[0], g("ProbeIMAGE", name="picture")[0]
        return g("ControlNetApply", conditioning=text(g, clip, words), control_net=net, image=picture, strength=0.5)[0]

    def guidance(g: Graph, clip: Any, words: str) -> Any:
        return g("FluxGuidance", conditioning=text(g, clip, words), guidance=8.0)[0]

    found: dict[str, dict[str, Any]] = {
        "strength": {"conds": strength},
        "inpaint mask": {"latent": "inpaint"},
        "image to image": {"latent": "filled", "denoise": 1.0},
        "cfg 1": {"cfg": 1.0},
        "batch": {"latent": "batch"},
        "time range, target": {"conds": ranged},
    }
    if family != "wan":
        found |= {"area, target": {"conds": area}, "mask, the request's entry": {"conds": masked}}
    if family in ("sd15", "sd3"):
        found |= {
            "LoRA": {"lora": True},
            "hook LoRA": {"conds": hook},
            "hook LoRA with keyframes": {"conds": keyframes},
            "text encoder's hook LoRA": {"hooked": True},
            "LoRA and area": {"lora": True, "conds": area},
        }
    if family == "sd15":
        found |= {"ControlNet": {"conds": control}, "ControlNet and LoRA": {"conds": control, "lora": True}}
    if family == "flux":
        found |= {"guidance": {"conds": guidance, "cfg": 1.0}}
    for kind in ("BasicGuider", "DualCFGGuider", "PerpNegGuider"):
        found |= {kind: {"guider": kind}}
    return found


if __name__ == "__main__":
    base, job, family = sys.argv[1:4]
    inside.setup(base)
    inside.answer({"identity": identity, "swap": swap, "survivors": survivors}[job](World(family)))
