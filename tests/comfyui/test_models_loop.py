"""The whole chain on the embedded models: ComfyUI's loop is the library's, wherever the refiner's weights are between two answers."""

import json
import sys
from pathlib import Path

import pytest

AT = "start, 3, 5, 7, 9"


@pytest.fixture(scope="module")
def found(inprocess, tmp_path_factory):
    return inprocess(Path(__file__), tmp_path_factory.mktemp("base"))


def test_the_loop_says_and_paints_what_the_librarys_does(found):
    for case in found["runs"]:
        assert case["said"] == case["the library's"] and case["difference"] <= 1, case  # of 255
    assert any(prompt.count("clear") for case in found["runs"] for prompt in case["said"]), "no look led to anything"


@pytest.mark.parametrize("memory", ["offload", "keep", "unload"])
def test_memory_changes_nothing_but_memory(found, memory):
    case = found["memory"][memory]
    assert case["difference"] == 0
    assert case["brought back"] > 1, "the diffusion model was never brought back after the refiner"
    assert case["refiner still there"] == (case["brought back"] if memory == "keep" else 0)


# --- inside ComfyUI ---------------------------------------------------------------------------------------------------


class World:
    def __init__(self):
        import inside

        self.graph, self.runner, self.kept = inside.Graph, inside.Runner, inside.KEPT

    def __call__(self, request, seed, memory="offload"):
        """(picture, prompts after each look)"""
        g = self.graph()
        model = g("PromptLoopLoadEmbedded", batch_size=1)
        widgets = {"template": "auto", "adapter": "none", "dtype": "auto", "quantization": "none", "max_new_tokens": 0}
        refiner = g("PromptLoopLoadRefiner", model="embedded: tiny", memory=memory, temperature=0.0, seed=0, **widgets)
        sampled = g(
            "PromptLoopSampler", model=model[0], refiner=refiner[0], clip=model[1], vae=model[2], prompt=request, refine_at=AT,
            negative=g("CLIPTextEncode", clip=model[1], text="")[0], latent_image=model[3], seed=seed, steps=20, cfg=3.0,
            sampler_name="ddim", scheduler="simple", denoise=1.0,
        )  # fmt: skip
        g.keep("picture", g("VAEDecode", samples=sampled[0], vae=model[2])[0])
        g.keep("history", sampled[4])
        self.runner()(g)  # a cache of its own
        return self.kept["picture"][0], [turn.after for turn in self.kept["history"][0].turns]


def against_the_library(world):
    import numpy
    import torch

    from promptloop_pipeline import attach, tiny

    loop = attach(tiny.load_pipeline("sd"), refiner=tiny.load_refiner(), refine_at=AT)
    for seed, request in enumerate(tiny.requests(4)):
        picture, said = world(request, seed)
        noise = torch.randn(1, 8, 8, 8, generator=torch.manual_seed(seed))  # as ComfyUI draws it
        theirs = loop(request, latents=noise, num_inference_steps=20, guidance_scale=3.0)
        difference = numpy.abs((picture.numpy() * 255).round() - numpy.asarray(theirs.images[0], float)).max()
        yield {
            "said": said,
            "the library's": [turn.after for turn in theirs.trajectories[0].turns],
            "difference": float(difference),
        }


def policies(world):
    import comfy.model_management as mm
    import comfy.sampler_helpers

    from promptloop_pipeline import tiny

    request, there, found = tiny.requests(2)[1], [], {}
    original = comfy.sampler_helpers.prepare_sampling

    def watched(*args, **kwargs):
        there.append(any(type(entry.model.model).__name__ == "LanguageModel" for entry in mm.current_loaded_models))
        return original(*args, **kwargs)

    before = world(request, 5)[0]
    comfy.sampler_helpers.prepare_sampling = watched
    for memory in ("offload", "keep", "unload"):
        mm.unload_all_models()
        there.clear()
        difference = (world(request, 5, memory)[0] - before).abs().max().item()
        found[memory] = {"difference": difference, "brought back": len(there), "refiner still there": sum(there)}
    return found


def main(base):
    import inside

    inside.setup(base, extras=False)
    world = World()
    inside.answer(json.loads(json.dumps({"runs": [*against_the_library(world)], "memory": policies(world)})))


if __name__ == "__main__":
    main(sys.argv[1])
